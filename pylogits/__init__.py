"""Softmax and cross entropy for NumPy arrays of logits: exact, and at the speed of memory."""

from pylogits._device import deferred_checks
from pylogits._dispatch import get_num_threads, set_num_threads, show_config, use_backend
from pylogits._reference import Scores
from pylogits.activations import (
    log_softmax,
    log_softmax_backward,
    logsumexp,
    selective_log_softmax,
    softmax,
    softmax_backward,
)
from pylogits.linear import linear_cross_entropy, linear_cross_entropy_value_and_grad
from pylogits.losses import (
    cross_entropy,
    cross_entropy_value_and_grad,
    one_hot,
    softmax_cross_entropy_with_logits,
    sparse_softmax_cross_entropy_with_logits,
)
from pylogits.scoring import DoubleSoftmaxWarning, check_logits, score

__all__ = [
    "DoubleSoftmaxWarning",
    "Scores",
    "check_logits",
    "cross_entropy",
    "cross_entropy_value_and_grad",
    "deferred_checks",
    "get_num_threads",
    "linear_cross_entropy",
    "linear_cross_entropy_value_and_grad",
    "log_softmax",
    "log_softmax_backward",
    "logsumexp",
    "one_hot",
    "score",
    "selective_log_softmax",
    "set_num_threads",
    "show_config",
    "softmax",
    "softmax_backward",
    "softmax_cross_entropy_with_logits",
    "sparse_softmax_cross_entropy_with_logits",
    "use_backend",
]

__version__ = "0.1.0"
