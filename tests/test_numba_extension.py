"""pylogits inside a user's own @njit code: the bits, the errors, and prange. (A function takes seconds to compile.)"""

import numpy as np
import pytest

import pylogits

numba = pytest.importorskip("numba")

X = (np.random.default_rng(0).standard_normal((70, 5000)) * 3).astype(np.float32)
LABELS = X.argmax(-1).astype(np.int32)
LABELS[::2] = 7


@numba.njit
def of_rows(x, labels):
    return (
        pylogits.softmax(x),
        pylogits.log_softmax(x, axis=1),
        pylogits.logsumexp(x, axis=-1),
        pylogits.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=x),
        pylogits.cross_entropy(x, labels, reduction="none"),
    )


@numba.njit
def of_one(x, label):
    return (
        pylogits.softmax(x),
        pylogits.logsumexp(x),
        pylogits.sparse_softmax_cross_entropy_with_logits(labels=label, logits=x),
        pylogits.cross_entropy(x, label, reduction="none"),
    )


@numba.njit(parallel=True)
def perplexities(x, labels):
    out = np.empty(len(x), x.dtype)
    for i in numba.prange(len(x)):
        out[i] = np.exp(pylogits.cross_entropy(x[i], labels[i], reduction="none"))
    return out


def outside(x, labels):
    return (
        pylogits.softmax(x),
        pylogits.log_softmax(x),
        pylogits.logsumexp(x),
        pylogits.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=x),
        pylogits.cross_entropy(x, labels, reduction="none"),
    )


@pytest.mark.parametrize("rows", [1, 3, 70])
@pytest.mark.parametrize("classes", [1, 10, 100, 4097, 5000])
def test_rows(rows, classes):
    x, labels = np.ascontiguousarray(X[:rows, :classes]), LABELS[:rows] % classes
    for got, expected in zip(of_rows(x, labels), outside(x, labels), strict=True):
        np.testing.assert_array_equal(got, expected)
        assert got.dtype == expected.dtype


def test_no_rows():
    for got in of_rows(X[:0], LABELS[:0]):
        assert got.size == 0


@pytest.mark.parametrize("classes", [1, 10, 5000])
def test_one_row(classes):
    x, label = X[3, :classes].astype(np.float64), classes // 2
    softmax, logsumexp, *losses = of_one(x, label)
    np.testing.assert_array_equal(softmax, pylogits.softmax(x))
    assert logsumexp == pylogits.logsumexp(x)
    assert losses == [pylogits.cross_entropy(x[None], [label])] * 2


def test_read_only():
    inside = numba.njit(lambda x, labels: (pylogits.softmax(x), pylogits.cross_entropy(x, labels, reduction="none")))
    x, labels = X[:3].copy(), LABELS[:3].copy()
    x.flags.writeable = labels.flags.writeable = False
    softmax, losses = inside(x, labels)
    np.testing.assert_array_equal(softmax, pylogits.softmax(x))
    np.testing.assert_array_equal(losses, pylogits.cross_entropy(x, labels, reduction="none"))
    assert softmax.flags.writeable


def test_prange():
    expected = np.exp(pylogits.cross_entropy(X, LABELS, reduction="none"))
    np.testing.assert_allclose(perplexities(X, LABELS), expected, rtol=1e-6)


def test_bad_labels():
    labels = LABELS.copy()
    labels[5] = 5000
    with pytest.raises(ValueError, match=r"label 5000 at index \(5,\) is outside \[0, 5000\)"):
        of_rows(X, labels)
    with pytest.raises(ValueError, match=r"label -1 at index \(0,\) is outside \[0, 10\)"):
        of_one(X[0, :10].astype(np.float64), -1)
    with pytest.raises(ValueError, match="as many as the rows"):
        of_rows(X, LABELS[1:])


def test_arguments_that_are_not_taken():
    """Said when the function is compiled, with what would be."""
    x = X[:4, :10]
    logsumexp = numba.njit(lambda x: pylogits.logsumexp(x))
    for wrong in (x, x.T, x[:, None], np.zeros((2, 2), np.float16), np.zeros((2, 2), int), 1.0):
        with pytest.raises(numba.TypingError, match="logsumexp in compiled code takes C-contiguous logits"):
            logsumexp(wrong)
    loss = numba.njit(lambda x, labels: pylogits.cross_entropy(x, labels))
    with pytest.raises(numba.TypingError, match='has reduction="none" only'):
        loss(X, LABELS)
    loss = numba.njit(lambda x, labels: pylogits.cross_entropy(x, labels, reduction="none"))
    with pytest.raises(numba.TypingError, match="takes an integer label a row"):
        loss(X, LABELS.astype(np.float32))
    with pytest.raises(ValueError, match="axis must be the last"):
        numba.njit(lambda x, axis: pylogits.logsumexp(x, axis))(X, 0)
