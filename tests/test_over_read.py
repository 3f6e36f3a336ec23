"""No access beside an array: every number of classes from 1 to 600, and long rows, with unreadable pages before and after."""

import sys

import pytest

import pylogits

# Each instruction set and dtype is a process of its own, as a stray access ends it. What it was at is the last line.
PROGRAM = """
import ctypes, mmap, sys
import ml_dtypes
import numpy as np, pylogits
from pylogits import _simd
from pylogits.scoring import score_with_brier

isa, dtype = sys.argv[1], np.dtype(getattr(ml_dtypes, sys.argv[2], sys.argv[2]))
real = np.dtype("float64" if dtype == np.float64 else "float32")
ROWS, CLASSES = 19, (*range(1, 601), 2049, 4097, 5001, 9007)
protect = ctypes.CDLL(None, use_errno=True).mprotect
protect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int


class Guarded:
    '''Memory between two pages that nobody may touch.'''

    def __init__(self, size):
        page = mmap.PAGESIZE
        pages = -(-size // page) * page
        self.memory = mmap.mmap(-1, pages + 2 * page)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        for guard in (start, start + page + pages):
            assert protect(guard, page, 0) == 0  # PROT_NONE
        self.bytes = np.frombuffer(self.memory, np.uint8)[page : page + pages]

    def put(self, array, at_end):
        size = array.nbytes
        place = self.bytes[self.bytes.size - size :] if at_end else self.bytes[:size]
        result = place.view(array.dtype).reshape(array.shape)
        result[...] = array
        return result


names = "logits", "result", "labels", "indices", "where", "weight", "sample_weight", "probabilities"
guarded = {name: Guarded(ROWS * CLASSES[-1] * 8) for name in names}
rng = np.random.default_rng(0)
drawn = (rng.standard_normal((ROWS, CLASSES[-1])) * 3).astype(dtype)
_simd.use_isa(isa)
for classes in CLASSES:
    for at_end in (False, True):
        x = drawn[:, :classes]
        labels = rng.integers(classes, size=ROWS)
        given = {
            "logits": x,
            "result": x,
            "labels": labels,
            "indices": rng.integers(classes, size=(ROWS, 2)),
            "where": (x > -2) | (np.arange(classes) == labels[:, None]),
            "weight": rng.random(classes).astype(real),
            "sample_weight": rng.random(ROWS).astype(real),
            "probabilities": pylogits.softmax(x),
        }
        a = {name: guarded[name].put(np.ascontiguousarray(array), at_end) for name, array in given.items()}
        logits, result, labels, q = a["logits"], a["result"], a["labels"], a["probabilities"]
        options = {"weight": a["weight"], "sample_weight": a["sample_weight"], "label_smoothing": 0.1}
        print(isa, dtype, classes, at_end, flush=True)
        assert np.array_equal(pylogits.softmax(logits, out=result), q)
        pylogits.softmax(logits)
        pylogits.softmax(logits, where=a["where"], temperature=2.0, out=result)
        pylogits.log_softmax(logits, out=result)
        pylogits.logsumexp(logits)
        pylogits.selective_log_softmax(logits, a["indices"])
        pylogits.softmax_backward(logits, q, out=result)
        pylogits.log_softmax_backward(logits, q, out=result)
        pylogits.softmax_cross_entropy_with_logits(labels=q, logits=logits)
        pylogits.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits)
        pylogits.cross_entropy_value_and_grad(logits, labels, grad_out=result, softcap=5.0, z_loss=0.1, **options)
        pylogits.cross_entropy_value_and_grad(logits, labels, grad_out=result, where=a["where"], **options)
        pylogits.cross_entropy_value_and_grad(logits, q, grad_out=result, **options)
        for top_k in (1, min(3, classes)):
            score_with_brier(logits, labels, -1, top_k, 1.0)
        turned = logits.reshape(classes, ROWS), result.reshape(classes, ROWS)
        pylogits.softmax(turned[0], axis=0, out=turned[1])
        pylogits.cross_entropy_value_and_grad(turned[0], labels, axis=0, grad_out=turned[1], **options)
        assert np.array_equal(logits, x)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="pages are protected through mprotect")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512", "neon"])
def test_guard_pages(isa, dtype, simd, python):
    if isa not in pylogits.show_config()["available_isas"]:
        pytest.skip(f"this machine has no {isa}")
    done = python(PROGRAM, isa, dtype)
    assert done.returncode == 0, (done.stdout.splitlines()[-1:], done.stderr)
    assert len(done.stdout.splitlines()) == 1208
