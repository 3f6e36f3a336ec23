"""More elements than one call into a backend takes, or than 32 bits count; and Ctrl-C in between."""

import math
import os
import signal

import numpy as np
import pytest

import pylogits
from pylogits import _dispatch, _rows

ROW = (np.random.default_rng(0).standard_normal(1000) * 3).astype(np.float32)
huge = pytest.mark.skipif("PYLOGITS_HUGE" not in os.environ, reason="needs 20 GiB and minutes: see `make huge`")


def everything(x, axis):
    labels = np.moveaxis(x, axis, -1).argmax(-1)
    labels.flat[::3] = 0
    weights = (labels + 1).astype(x.dtype)
    probabilities = pylogits.softmax(x, axis)
    return [
        probabilities,
        pylogits.log_softmax(x, axis, where=x > -4),
        pylogits.logsumexp(x, axis),
        pylogits.selective_log_softmax(x, labels, axis),
        pylogits.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=x, axis=axis),
        pylogits.softmax_cross_entropy_with_logits(labels=probabilities, logits=x, axis=axis),
        *pylogits.cross_entropy_value_and_grad(x, labels, axis=axis, sample_weight=weights, ignore_index=0, reduction="none"),
        pylogits.softmax_backward(x, probabilities, axis),
        *pylogits.score(x, labels, axis=axis, top_k=2),
    ]


@pytest.mark.parametrize("shape, axis", [((77, 30), -1), ((30, 77), 0), ((5, 30, 77), 1), ((200, 30, 2), 1), ((1, 700), 1)])
def test_parts(shape, axis, monkeypatch):
    """A call in many parts gives what one call does, along whatever the rows are cut."""
    x = np.resize(ROW, shape)
    expected = everything(x, axis)
    monkeypatch.setattr(_rows, "CALL_SIZE", 600)
    for a, b in zip(everything(x, axis), expected, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_long_rows_in_parts(dtype, simd, monkeypatch):
    """A row that is longer than a call takes gives what it gives as a whole."""
    x = np.resize(ROW, (3, 40_001)).astype(dtype)
    expected = everything(x, 1)
    monkeypatch.setattr(_rows, "CALL_SIZE", 30_000)
    monkeypatch.setattr(simd, "PART_SIZE", 10_000)
    for a, b in zip(everything(x, 1), expected, strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match=r"label 40001 at index \(1,\)"):
        pylogits.sparse_softmax_cross_entropy_with_logits(labels=[0, 40_001, 0], logits=x)


def test_bad_label_in_a_later_part(monkeypatch):
    monkeypatch.setattr(_rows, "CALL_SIZE", 600)
    labels = np.zeros(77, int)
    labels[70] = 30
    out = np.full(77, 7, np.float32)
    with pytest.raises(ValueError, match=r"label 30 at index \(70,\) is outside \[0, 30\)"):
        pylogits.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=np.resize(ROW, (77, 30)), out=out)
    assert (out == 7).all()


def test_interrupt(monkeypatch):
    """Ctrl-C ends a large call, and not only when all of it is done; the next call is right."""
    monkeypatch.setattr(_rows, "CALL_SIZE", 1000)
    x = np.resize(ROW, (100, 1000))
    module = _dispatch.load(_dispatch.choose_backend(x.dtype))
    kernel, rows = module.softmax, []

    def interrupted(logits, *arguments):
        rows.append(len(logits))
        if len(rows) == 3:
            signal.raise_signal(signal.SIGINT)
        return kernel(logits, *arguments)

    monkeypatch.setattr(module, "softmax", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pylogits.softmax(x)
    assert rows == [1, 1, 1]
    monkeypatch.undo()
    np.testing.assert_array_equal(pylogits.softmax(x)[7], pylogits.softmax(ROW))


@pytest.mark.parametrize("rows", [2**21, 1])
def test_interrupt_of_8_gib(python, rows):
    """The whole of it, with a real signal; prints how long it took to be seen.

    Called until the signal comes: a fast machine is through 8 GiB of zeros before that.
    """
    done = python(f"""
import os, signal, threading, time
import numpy as np, pylogits
x = np.zeros(({rows}, 2**31 // {rows}), np.float32)
pylogits.logsumexp(x[:1, :10000])
sent = []
def send():
    sent.append(time.perf_counter())
    os.kill(os.getpid(), signal.SIGINT)
threading.Timer(0.3, send).start()
try:
    while True:
        pylogits.logsumexp(x)
except KeyboardInterrupt:
    print(time.perf_counter() - sent[0])
""")
    assert done.returncode == 0, done.stderr
    print(f"{rows} rows: Ctrl-C was seen after {float(done.stdout):.3f} s")


# More than 2^31 elements. Strides of 0 make them from a few.


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_one_row_of_more_than_2_31(dtype):
    n = 2**31 + 16
    row = np.broadcast_to(dtype(0.5), n)
    expected = float(dtype(0.5)) + math.log(n)
    result = pylogits.logsumexp(row)
    assert abs(result - expected) <= np.spacing(np.float32(expected))
    loss = pylogits.sparse_softmax_cross_entropy_with_logits(labels=[n - 1], logits=row[None])
    assert abs(loss[0] - math.log(n)) <= 2 * np.spacing(np.float32(math.log(n)))
    with pytest.raises(ValueError, match=f"label {n} at index"):
        pylogits.sparse_softmax_cross_entropy_with_logits(labels=[n], logits=row[None])


def test_more_than_2_31_in_many_rows():
    rows = 2**31 // len(ROW) + 100
    x = np.broadcast_to(ROW, (rows, len(ROW)))
    np.testing.assert_array_equal(pylogits.logsumexp(x), np.full(rows, pylogits.logsumexp(ROW)))
    labels = np.arange(rows) % len(ROW)
    expected = pylogits.sparse_softmax_cross_entropy_with_logits(labels=np.arange(1000), logits=x[:1000])
    losses = pylogits.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=x)
    np.testing.assert_array_equal(losses, np.resize(expected, rows))
    labels[-1] = len(ROW)
    with pytest.raises(ValueError, match=rf"label 1000 at index \({rows - 1},\)"):
        pylogits.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=x)


@huge
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("shape, axis", [((2_200_000, 1000), -1), ((1000, 2_200_000), 0)])
def test_softmax_of_more_than_2_31(shape, axis, dtype):
    """In place, each row compared with its own softmax."""
    x = np.empty(shape, dtype)
    rows = np.moveaxis(x, axis, -1)
    rows[...] = ROW
    rows[::7] = ROW[::-1]
    pylogits.softmax(x, axis, out=x)
    one, reversed_one = pylogits.softmax(ROW.astype(dtype)), pylogits.softmax(ROW[::-1].astype(dtype))
    for start in range(0, len(rows), 70_000):
        part = rows[start : start + 70_000]
        assert (part[::7] == reversed_one).all()
        part = np.delete(part, np.s_[::7], axis=0)
        assert (part == one).all()


@huge
def test_one_row_of_more_than_2_31_in_place():
    n = 2**31 + 16
    x = np.zeros((1, n), np.float32)
    x[0, -1] = 1
    pylogits.log_softmax(x, out=x)
    expected = -math.log(n - 1 + math.e)
    assert abs(x[0, 0] - expected) <= 2 * np.spacing(np.float32(-expected))
    assert (x[0, :-1] == x[0, 0]).all()
    assert abs(x[0, -1] - (expected + 1)) <= 2 * np.spacing(np.float32(-expected))
