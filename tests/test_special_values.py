"""NaN, infinities, masks and empty arrays: each promise of the numerics, on every backend.

Nothing here may warn: all of these are results, not accidents.
"""

import numpy as np
import pytest

import pylogits

pytestmark = pytest.mark.filterwarnings("error")

nan, inf = np.nan, np.inf
LN2 = 0.6931471805599453
FUNCTIONS = (pylogits.softmax, pylogits.log_softmax)


def dense(labels, logits):
    return pylogits.softmax_cross_entropy_with_logits(labels=np.asarray(labels), logits=logits)


def sparse(labels, logits):
    return pylogits.sparse_softmax_cross_entropy_with_logits(labels=np.asarray(labels), logits=logits)


def same(got, expected):
    np.testing.assert_allclose(got, expected, rtol=3e-7)


@pytest.fixture(params=[3, 20, 5000])
def classes(request):
    """A row that fits in a vector, one with a tail, one of two blocks."""
    return request.param


def rows(classes, dtype, *specials):
    """Return a zero row for each special row, with the special values spread over it."""
    logits = np.zeros((len(specials), classes), dtype)
    for row, special in zip(logits, specials, strict=True):
        row[[0, classes // 2, -1]] = special
    return logits


def all_rows(logits):
    """Return what the operations say of each row: the labels' class is the first."""
    first = np.zeros(len(logits), int)
    hot = np.zeros_like(logits)
    hot[:, 0] = 1
    return {
        "softmax": pylogits.softmax(logits)[:, 0],
        "softmax last": pylogits.softmax(logits)[:, -1],
        "log_softmax": pylogits.log_softmax(logits)[:, 0],
        "logsumexp": pylogits.logsumexp(logits),
        "selective": pylogits.selective_log_softmax(logits, first),
        "dense": dense(hot, logits),
        "sparse": sparse(first, logits),
    }


def test_nan_in_a_row_is_nan_in_that_row_alone(backend, dtype, classes):
    logits = rows(classes, dtype, [0, 0, nan], [0, 0, 0], [nan, 0, 0], [0, nan, -inf], [0, nan, inf])
    for results in all_rows(logits).values():
        assert np.isnan(results).tolist() == [True, False, True, True, True]
    for function in FUNCTIONS:
        assert np.isnan(function(logits)).all(axis=1).tolist() == [True, False, True, True, True]
    same(pylogits.logsumexp(logits)[1], np.log(classes))


def test_plus_infinity_is_nan_but_for_logsumexp(backend, dtype, classes):
    logits = rows(classes, dtype, [inf, 0, 0], [0, 0, 0], [0, 0, inf], [inf, inf, 0], [-inf, inf, 0])
    results = all_rows(logits)
    same(results.pop("logsumexp"), [inf, np.log(classes), inf, inf, inf])
    for values in results.values():
        assert np.isnan(values).tolist() == [True, False, True, True, True]
    for function in FUNCTIONS:
        assert np.isnan(function(logits)).all(axis=1).tolist() == [True, False, True, True, True]


def test_minus_infinity_has_no_probability(backend, dtype, classes):
    logits = rows(classes, dtype, [-inf, 0, 0], [0, -inf, -inf])
    one, two = classes - 1, classes - 2
    results = all_rows(logits)
    assert results["softmax"][0] == 0
    assert results["softmax last"][1] == 0
    same(results["softmax"][1], 1 / two)
    same(results["softmax last"][0], 1 / one)
    same(results["logsumexp"], np.log([one, two]))
    for log_probability in ("log_softmax", "selective"):
        same(results[log_probability], [-inf, -np.log(two)])
    for loss in ("dense", "sparse"):
        same(results[loss], [inf, np.log(two)])
    # 0 x -inf with a soft label is 0
    labels = rows(classes, dtype, [0, 0.5, 0.5], [1, 0, 0])
    same(dense(labels, logits), [np.log(one), np.log(two)])
    labels = rows(classes, dtype, [0.5, 0.5, 0], [0.5, 0, 0.5])
    assert dense(labels, logits).tolist() == [inf, inf]


def test_all_minus_infinity(backend, dtype, classes):
    logits = np.full((2, classes), -inf, dtype)
    logits[1] = 0
    results = all_rows(logits)
    same(results.pop("logsumexp"), [-inf, np.log(classes)])
    for values in results.values():
        assert np.isnan(values).tolist() == [True, False]
    for function in FUNCTIONS:
        assert np.isnan(function(logits)).all(axis=1).tolist() == [True, False]


def test_one_class(backend, dtype):
    logits = np.array([[5], [-inf], [inf], [nan]], dtype)
    same(pylogits.softmax(logits)[:, 0], [1, nan, nan, nan])
    same(pylogits.log_softmax(logits)[:, 0], [0, nan, nan, nan])
    same(pylogits.logsumexp(logits), [5, -inf, inf, nan])
    same(sparse([0, 0, 0, 0], logits), [0, nan, nan, nan])


def test_extremes(backend, dtype):
    largest, tiny = np.finfo(dtype).max, np.finfo(dtype).tiny
    logits = np.array([[largest, -largest], [-largest, -largest], [tiny, 0]], dtype)
    same(pylogits.softmax(logits), [[1, 0], [0.5, 0.5], [0.5, 0.5]])
    same(pylogits.logsumexp(logits), [largest, -largest, LN2])
    same(sparse([0, 0, 0], logits), [0, LN2, LN2])


def test_subnormal_probabilities_are_kept(backend):
    logits = np.array([[0, -100]], np.float32)
    assert pylogits.softmax(logits)[0, 1] == pytest.approx(3.78e-44, abs=2e-45)
    logits = np.array([[0, -740]], np.float64)
    assert pylogits.softmax(logits)[0, 1] == pytest.approx(4.199558e-322, abs=1e-323)


def test_a_subnormal_loss_of_many_terms(backend, dtype):
    """The terms of each block, far below the maximum in another one, may lose half of the smallest number only once."""
    smallest, classes = np.finfo(dtype).smallest_subnormal, 300_000
    logits = np.log(smallest.astype(np.longdouble)) - np.linspace(0, 4, classes)
    logits = logits.astype(dtype)
    logits[1] = 0
    loss = np.exp(np.delete(logits, 1).astype(np.longdouble)).sum()
    assert 1000 * smallest < loss < np.finfo(dtype).tiny
    assert abs(sparse([1], logits[None])[0] - loss) <= smallest


def test_masked_logits_count_for_nothing(backend, dtype, classes):
    for masked in (nan, inf, -inf, 1e30, 0):
        logits = np.full((2, classes), masked, dtype)
        logits[:, [0, -1]] = 1
        where = np.zeros(classes, bool)
        where[[0, -1]] = True
        same(pylogits.softmax(logits, where=where), where * np.full((2, 1), 0.5))
        same(pylogits.log_softmax(logits, where=where), np.where(where, [[-LN2]] * 2, -inf))
        same(pylogits.logsumexp(logits, where=where), [1 + LN2] * 2)


def test_special_values_that_are_not_masked_still_count(backend, dtype):
    logits = np.array([[nan, 0, 0], [inf, 0, 0], [-inf, 0, 0], [-inf, -inf, 0]], dtype)
    where = [True, True, False]
    same(
        pylogits.softmax(logits, where=where),
        [[nan, nan, 0], [nan, nan, 0], [0, 1, 0], [nan, nan, 0]],
    )
    same(
        pylogits.log_softmax(logits, where=where),
        [[nan, nan, -inf], [nan, nan, -inf], [-inf, 0, -inf], [nan, nan, -inf]],
    )
    same(pylogits.logsumexp(logits, where=where), [nan, inf, 0, -inf])


def test_fully_masked_rows(backend, dtype, classes):
    logits = rows(classes, dtype, [nan, 0, 0], [inf, 0, 0], [0, 0, 0], [0, 0, 0])
    where = np.array([[False], [False], [False], [True]])
    same(pylogits.softmax(logits, where=where)[:, 0], [0, 0, 0, 1 / classes])
    assert (pylogits.softmax(logits, where=where)[:3] == 0).all()
    same(pylogits.log_softmax(logits, where=where)[:, 0], [-inf] * 3 + [-np.log(classes)])
    assert (pylogits.log_softmax(logits, where=where)[:3] == -inf).all()
    same(pylogits.logsumexp(logits, where=where), [-inf] * 3 + [np.log(classes)])
    assert (pylogits.softmax(logits, where=False) == 0).all()


def test_temperature_keeps_special_values(backend, dtype):
    logits = np.array([[nan, 0], [inf, 0], [-inf, 0], [-inf, -inf]], dtype)
    same(
        pylogits.softmax(logits, temperature=3),
        [[nan, nan], [nan, nan], [0, 1], [nan, nan]],
    )
    same(pylogits.logsumexp(logits, temperature=3), [nan, inf, 0, -inf])


def test_no_rows(backend, dtype):
    for shape, axis in (((0, 5), -1), ((5, 0), 0), ((2, 5, 0), 1), ((2, 0, 5), (0, 2))):
        logits = np.empty(shape, dtype)
        for function in FUNCTIONS:
            result = function(logits, axis)
            assert (result.shape, result.dtype) == (shape, dtype)
    logits = np.empty((0, 5), dtype)
    nothing = {
        "logsumexp": pylogits.logsumexp(logits),
        "dense": dense(np.empty((0, 5), dtype), logits),
        "sparse": sparse(np.empty(0, int), logits),
        "selective": pylogits.selective_log_softmax(logits, np.empty(0, int)),
    }
    for result in nothing.values():
        assert (result.shape, result.dtype) == ((0,), dtype)
    assert pylogits.logsumexp(logits, keepdims=True).shape == (0, 1)
    picks = pylogits.selective_log_softmax(logits, np.empty((0, 3), int))
    assert picks.shape == (0, 3)


def test_no_picks(backend, dtype):
    picks = pylogits.selective_log_softmax(np.zeros((2, 5), dtype), np.empty((2, 0), int))
    assert (picks.shape, picks.dtype) == ((2, 0), dtype)


def test_no_classes(backend, dtype):
    logits = np.empty((2, 0), dtype)
    for function in FUNCTIONS:
        result = function(logits)
        assert (result.shape, result.dtype) == ((2, 0), dtype)
    assert pylogits.logsumexp(logits).tolist() == [-inf, -inf]
    assert pylogits.logsumexp(logits, keepdims=True).tolist() == [[-inf], [-inf]]
    assert pylogits.logsumexp(logits, axis=None) == -inf
    with pytest.raises(ValueError, match="logits"):
        dense(np.empty((2, 0), dtype), logits)
    with pytest.raises(ValueError):
        sparse(np.zeros(2, int), logits)


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_half_precision(backend, name):
    dtype = np.dtype(pytest.importorskip("ml_dtypes").bfloat16 if name == "bfloat16" else name)
    logits = np.array([[nan, 0], [inf, 0], [-inf, 0], [-inf, -inf], [0, 0]]).astype(dtype)
    same(
        pylogits.softmax(logits).astype(float),
        [[nan, nan], [nan, nan], [0, 1], [nan, nan], [0.5, 0.5]],
    )
    same(pylogits.logsumexp(logits), [nan, inf, 0, -inf, LN2])
    same(sparse([0, 0, 0, 0, 0], logits), [nan, nan, inf, nan, LN2])
    same(
        pylogits.softmax(logits, where=[True, False]).astype(float),
        [[nan, 0], [nan, 0], [nan, 0], [nan, 0], [1, 0]],
    )
