"""score: each field by hand, ties, NaN, axes; and check_logits."""

import warnings

import numpy as np
import pytest
from cases import LAYOUTS, lay_out

import pylogits
from pylogits.scoring import score_with_brier

LN2, LN3 = 0.6931471805599453, 1.0986122886681098
nan, inf = np.nan, np.inf

# Probabilities 1/2, 1/4, 1/8, 1/8 in another order each.
ROWS = np.array([[2, 0, 1, 0], [0, 0, 1, 2], [1, 2, 0, 0]]) * LN2


def same(got, expected, rtol=1e-6):
    np.testing.assert_allclose(got, expected, rtol=rtol, atol=1e-7)


def test_fields(backend, dtype):
    scores = pylogits.score(ROWS.astype(dtype))
    assert scores.prediction.tolist() == [0, 3, 1]
    same(scores.confidence, [0.5] * 3)
    same(scores.entropy, [1.75 * LN2] * 3)
    same(scores.logsumexp, [3 * LN2] * 3)
    assert scores.top_k_indices.tolist() == [[0], [3], [1]]
    same(scores.top_k_probabilities, [[0.5]] * 3)
    assert scores.loss is None
    assert scores.correct is None


def test_targets(backend, dtype):
    for targets_dtype in "bBhHiIlLqQ":
        scores = pylogits.score(ROWS.astype(dtype), np.array([0, 2, 3], targets_dtype))
        same(scores.loss, [LN2, 2 * LN2, 3 * LN2])
        assert scores.correct.dtype == bool
        assert scores.correct.tolist() == [True, False, False]


def test_fields_agree_with_the_functions(backend, dtype):
    rng = np.random.default_rng(0)
    for classes in (1, 2, 10, 37, 1000, 5000):
        logits = (rng.standard_normal((19, classes)) * 4).astype(dtype)
        targets = rng.integers(classes, size=19)
        k = min(classes, 5)
        scores = pylogits.score(logits, targets, top_k=k)
        p = pylogits.softmax(logits)
        order = np.argsort(-logits, axis=1, kind="stable")[:, :k]
        tight = 20 * np.finfo(dtype).eps
        np.testing.assert_array_equal(scores.prediction, logits.argmax(1))
        np.testing.assert_array_equal(scores.correct, logits.argmax(1) == targets)
        np.testing.assert_array_equal(scores.top_k_indices, order)
        same(scores.top_k_probabilities, np.take_along_axis(p, order, 1), tight)
        same(scores.confidence, p.max(1), tight)
        same(scores.logsumexp, pylogits.logsumexp(logits), tight)
        same(
            scores.loss,
            pylogits.sparse_softmax_cross_entropy_with_logits(labels=targets, logits=logits),
            tight,
        )
        wide = p.astype(np.longdouble)
        same(scores.entropy, -(wide * np.log(np.where(wide > 0, wide, 1))).sum(1), 4 * tight)


def test_brier(backend, dtype):
    _, brier = score_with_brier(ROWS.astype(dtype), [0, 2, 3], -1, 1, 1.0)
    same(brier, [0.34375, 0.84375, 1.09375])


def test_brier_of_confident_rows(backend):
    """Right, it has all its digits; wrong, it is nearly 2."""
    for classes, top_k in ((10, 1), (10, 2)):
        logits = np.zeros((20, classes), np.float32)
        logits[:, 0] = 15
        _, brier = score_with_brier(logits, [0, 3] * 10, -1, top_k, 1.0)
        np.testing.assert_allclose(brier, [8.4218142993466564e-12, 1.9999938819788555] * 10, rtol=5e-7)


@pytest.mark.parametrize("classes", [1, 2, 10, 100, 161, 1000, 5000, 20000])
def test_brier_is_exact(backend, dtype, classes):
    """Against extended precision: rows of several blocks, ties of the maximum, a large common offset, a temperature."""
    rng = np.random.default_rng(classes)
    logits = (rng.standard_normal((30, classes)) * rng.choice([0.1, 3, 30], (30, 1))).astype(dtype)
    logits[::3, 0] += 40
    logits[1::4, :3] = logits.max()
    logits[20:] += 1000
    targets = rng.integers(classes, size=30)
    targets[::2] = logits[::2].argmax(1)
    for temperature in (1.0, 2.0):
        x = logits.astype(np.longdouble) / temperature
        x -= x.max(1, keepdims=True)
        others = np.exp(x)
        np.put_along_axis(others, logits.argmax(1)[:, None], 0, axis=1)
        total = others.sum(1)
        missed = -np.expm1(np.take_along_axis(x, targets[:, None], 1)[:, 0])
        expected = ((others**2).sum(1) + total**2 + 2 * (1 + total) * missed) / (1 + total) ** 2
        _, brier = score_with_brier(logits, targets, -1, 1, temperature)
        np.testing.assert_allclose(brier, expected, rtol=4 * np.finfo(dtype).eps, atol=np.finfo(dtype).tiny)


def test_brier_of_special_rows(backend, dtype):
    rows = np.array([[0, nan, 1], [inf, 0, 1], [-inf, -inf, -inf], [0, -inf, 0]], dtype)
    _, brier = score_with_brier(rows, [0, 0, 0, 1], -1, 1, 1.0)
    np.testing.assert_allclose(brier, [nan, nan, nan, 1.5])


def test_top_k(backend, dtype):
    scores = pylogits.score(ROWS.astype(dtype), top_k=4)
    assert scores.top_k_indices.tolist() == [[0, 2, 1, 3], [3, 2, 0, 1], [1, 0, 2, 3]]
    same(scores.top_k_probabilities, [[0.5, 0.25, 0.125, 0.125]] * 3)


def test_ties_go_to_the_earlier_class(backend, dtype):
    logits = np.zeros((2, 100), dtype)
    logits[1, [40, 70, 99]] = 1
    scores = pylogits.score(logits, top_k=5)
    assert scores.prediction.tolist() == [0, 40]
    assert scores.top_k_indices.tolist() == [[0, 1, 2, 3, 4], [40, 70, 99, 0, 1]]
    # -0 and 0 are equal
    scores = pylogits.score(np.array([[-0.0, 0.0, -0.0]], dtype), top_k=3)
    assert scores.top_k_indices.tolist() == [[0, 1, 2]]


def test_temperature(backend, dtype):
    scores = pylogits.score(ROWS.astype(dtype) * 3, [0, 2, 3], top_k=2, temperature=3)
    assert scores.prediction.tolist() == [0, 3, 1]
    same(scores.confidence, [0.5] * 3)
    same(scores.entropy, [1.75 * LN2] * 3)
    same(scores.logsumexp, [3 * LN2] * 3)
    same(scores.top_k_probabilities, [[0.5, 0.25]] * 3)
    same(scores.loss, [LN2, 2 * LN2, 3 * LN2])


def test_axis(backend, dtype):
    logits = np.stack([ROWS.T, ROWS[::-1].T]).astype(dtype)  # (2, classes, rows)
    for axis in (1, -2):
        scores = pylogits.score(logits, [[0, 2, 3], [3, 2, 0]], axis=axis, top_k=2)
        assert scores.prediction.tolist() == [[0, 3, 1], [1, 3, 0]]
        same(scores.confidence, np.full((2, 3), 0.5))
        same(scores.logsumexp, np.full((2, 3), 3 * LN2))
        assert scores.top_k_indices.tolist() == [
            [[0, 3, 1], [2, 2, 0]],
            [[1, 3, 0], [0, 2, 2]],
        ]
        same(scores.top_k_probabilities, [[[0.5] * 3, [0.25] * 3]] * 2)
        same(scores.loss, [[LN2, 2 * LN2, 3 * LN2], [3 * LN2, 2 * LN2, LN2]])
        assert scores.correct.tolist() == [[True, False, False], [False, False, True]]


def test_one_row(backend, dtype):
    scores = pylogits.score(ROWS[0].astype(dtype), 2, top_k=2)
    assert scores.prediction == 0
    same(scores.confidence, 0.5)
    same(scores.entropy, 1.75 * LN2)
    same(scores.logsumexp, 3 * LN2)
    assert scores.top_k_indices.tolist() == [0, 2]
    same(scores.top_k_probabilities, [0.5, 0.25])
    same(scores.loss, 2 * LN2)
    assert not scores.correct


def test_no_rows(backend, dtype):
    scores = pylogits.score(np.empty((0, 4), dtype), np.empty(0, int), top_k=2)
    for name in ("prediction", "confidence", "entropy", "logsumexp", "loss", "correct"):
        assert getattr(scores, name).shape == (0,)
    assert scores.top_k_indices.shape == scores.top_k_probabilities.shape == (0, 2)


def test_nan_rows(backend, dtype):
    logits = np.array([[0, nan, 5, nan], [0, 1, 2, 3]], dtype)
    scores = pylogits.score(logits, [2, 3], top_k=2)
    assert scores.prediction.tolist() == logits.argmax(1).tolist() == [1, 3]
    for name in ("confidence", "entropy", "logsumexp", "loss"):
        assert np.isnan(getattr(scores, name)).tolist() == [True, False]
    assert np.isnan(scores.top_k_probabilities).tolist() == [[True, True], [False, False]]
    assert scores.top_k_indices[1].tolist() == [3, 2]
    assert scores.correct.tolist() == [False, True]
    scores = pylogits.score(np.array([[inf, nan, 0, inf, nan]], dtype), top_k=5)
    assert scores.prediction.tolist() == [1]
    assert scores.top_k_indices.tolist() == [[1, 4, 0, 3, 2]]


def test_infinities(backend, dtype):
    logits = np.array([[-inf, 0, 0, -inf], [0, inf, 0, 0], [-inf] * 4], dtype)
    scores = pylogits.score(logits, [0, 1, 0], top_k=3)
    assert scores.prediction.tolist() == [1, 1, 0]
    same(scores.confidence, [0.5, nan, nan])
    same(scores.entropy, [LN2, nan, nan])
    same(scores.logsumexp, [LN2, inf, -inf])
    same(scores.loss, [inf, nan, nan])
    assert scores.top_k_indices.tolist() == [[1, 2, 0], [1, 0, 2], [0, 1, 2]]
    same(scores.top_k_probabilities, [[0.5, 0.5, 0], [nan] * 3, [nan] * 3])


def test_confident_rows(backend):
    logits = np.zeros((1, 10), np.float32)
    logits[0, 3] = 18
    scores = pylogits.score(logits, [3])
    np.testing.assert_allclose(scores.loss, [1.3706981e-07], rtol=5e-7)
    # 9 p (18 + loss) + loss for p = exp(-18 - loss)
    np.testing.assert_allclose(scores.entropy, [2.6043262e-06], rtol=2e-6)


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_half_precision_is_scored_in_float32(backend, name):
    dtype = np.dtype(pytest.importorskip("ml_dtypes").bfloat16 if name == "bfloat16" else name)
    logits = np.random.default_rng(0).standard_normal((9, 37)).astype(dtype)
    scores = pylogits.score(logits, np.arange(9), top_k=3)
    expected = pylogits.score(logits.astype(np.float32), np.arange(9), top_k=3)
    for got, want in zip(scores, expected, strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)
    assert scores.confidence.dtype == np.float32


def test_dtypes(backend, dtype):
    scores = pylogits.score(ROWS.astype(dtype), [0, 0, 0])
    for name in ("confidence", "entropy", "logsumexp", "top_k_probabilities", "loss"):
        assert getattr(scores, name).dtype == dtype
    assert scores.prediction.dtype == scores.top_k_indices.dtype == np.int64
    assert pylogits.score([[1, 2]]).confidence.dtype == np.float64


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend, layout, dtype):
    logits = np.random.default_rng(0).standard_normal((19, 37)).astype(dtype)
    logits = lay_out(logits, layout)
    before = logits.copy()
    scores = pylogits.score(logits, np.arange(19), top_k=3)
    expected = pylogits.score(np.array(logits, dtype), np.arange(19), top_k=3)
    for got, want in zip(scores, expected, strict=True):
        np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(logits, before)


# check_logits.


def warns(logits, axis=-1):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert pylogits.check_logits(logits, axis) is None
    assert all(one.category is pylogits.DoubleSoftmaxWarning for one in caught)
    return bool(caught)


@pytest.mark.parametrize("shape", [(50, 10), (1, 10), (3, 2), (2, 5000), (10,), (2, 3, 4)])
def test_check_logits(dtype, shape):
    logits = (np.random.default_rng(0).standard_normal(shape) * 3).astype(dtype)
    assert warns(pylogits.softmax(logits))
    assert not warns(logits)
    assert not warns(pylogits.log_softmax(logits))
    assert not warns(-pylogits.softmax(logits))
    assert not warns(pylogits.softmax(logits) * 2)


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_check_logits_in_half_precision(name):
    dtype = np.dtype(pytest.importorskip("ml_dtypes").bfloat16 if name == "bfloat16" else name)
    logits = (np.random.default_rng(0).standard_normal((20, 10)) * 3).astype(dtype)
    assert warns(pylogits.softmax(logits))
    assert not warns(logits)


def test_check_logits_axis():
    p = pylogits.softmax(np.random.default_rng(0).standard_normal((5, 7)), axis=0)
    assert warns(p, 0)
    assert not warns(p, 1)


def test_check_logits_needs_every_row():
    """A row or two that happen to sum to 1 among raw logits are no probabilities."""
    logits = np.random.default_rng(0).standard_normal((50, 3))
    logits[7] = 0.2, 0.3, 0.5
    assert not warns(logits)


def test_check_logits_of_other_raw_scores():
    assert not warns(np.zeros((3, 4)))
    assert not warns(np.ones((3, 4)))
    assert not warns(np.full((3, 4), nan))
    assert not warns(np.empty((0, 4)))
    assert not warns([[0.5, 1.5, 0.1], [2.2, 1.3, 1.7]])
    assert not warns([[1.5, -0.5], [-1.0, 2.0]])


def test_double_softmax_warning_is_a_user_warning():
    assert issubclass(pylogits.DoubleSoftmaxWarning, UserWarning)
