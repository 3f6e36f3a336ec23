"""From how much work on a second thread pays: measured, and written by `make tune`."""

MACHINE = "AMD EPYC, avx512, 2 threads"
# By backend, operation and bytes of a logit: logits, and ROW_WORK for each row.
SERIAL_BELOW = {
    "c": {
        "softmax": {2: 8192, 4: 8192, 8: 8192},
        "log_softmax": {2: 16384, 4: 16384, 8: 8192},
        "logsumexp": {2: 8192, 4: 8192, 8: 8192},
        "selective_log_softmax": {2: 8192, 4: 8192, 8: 8192},
        "softmax_cross_entropy_with_logits": {2: 8192, 4: 8192, 8: 8192},
        "sparse_softmax_cross_entropy_with_logits": {2: 8192, 4: 8192, 8: 8192},
        "cross_entropy": {2: 8192, 4: 8192, 8: 8192},
        "cross_entropy_value_and_grad": {2: 8192, 4: 8192, 8: 8192},
        "softmax_backward": {2: 8192, 4: 8192, 8: 8192},
        "log_softmax_backward": {2: 8192, 4: 8192, 8: 8192},
        "score": {2: 8192, 4: 8192, 8: 8192},
    },
    "numba": {
        "softmax": {2: 32768, 4: 32768, 8: 16384},
        "log_softmax": {2: 32768, 4: 65536, 8: 16384},
        "logsumexp": {2: 32768, 4: 65536, 8: 16384},
        "selective_log_softmax": {2: 65536, 4: 65536, 8: 16384},
        "softmax_cross_entropy_with_logits": {2: 16384, 4: 16384, 8: 16384},
        "sparse_softmax_cross_entropy_with_logits": {2: 32768, 4: 65536, 8: 16384},
        "cross_entropy": {2: 32768, 4: 65536, 8: 16384},
        "cross_entropy_value_and_grad": {2: 32768, 4: 32768, 8: 16384},
        "softmax_backward": {2: 16384, 4: 65536, 8: 32768},
        "log_softmax_backward": {2: 32768, 4: 65536, 8: 32768},
        "score": {2: 32768, 4: 32768, 8: 16384},
    },
}
