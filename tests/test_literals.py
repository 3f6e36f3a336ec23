"""Numbers worked out by hand or by mpmath, on every backend, in float32 and float64."""

import ml_dtypes
import numpy as np
import pytest

import pylogits

LN2, LN3, LN4 = 0.6931471805599453, 1.0986122886681098, 1.3862943611198906

LOGITS = [[0.5, 1.5, 0.1], [2.2, 1.3, 1.7]]
PROBABILITIES = [[0.227863, 0.61939586, 0.15274114], [0.49674623, 0.20196195, 0.30129182]]
LABELS = [[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
CLASSES = [1, 2]
LOSS_VALUES = [0.4790107, 1.19967598]


def close(got, expected, dtype, digits=16):
    """Compare to the precision of the dtype or of a literal with that many decimal places."""
    assert got.dtype == dtype
    relative = 4 * np.finfo(dtype).eps
    np.testing.assert_allclose(got, expected, rtol=relative, atol=0.51 * 10.0**-digits)


def dense(labels, logits, **options):
    return pylogits.softmax_cross_entropy_with_logits(labels=labels, logits=logits, **options)


def sparse(labels, logits, **options):
    return pylogits.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits, **options)


# The question that the project answers.


def test_softmax_of_the_question(backend, dtype):
    expected = [0.16838508, 0.205666, 0.25120102, 0.37474789]
    close(pylogits.softmax(np.array([0.1, 0.3, 0.5, 0.9], dtype)), expected, dtype, 8)
    close(pylogits.softmax(np.array(LOGITS, dtype)), PROBABILITIES, dtype, 8)


def test_lists_are_float64(backend):
    close(pylogits.softmax(LOGITS), PROBABILITIES, np.float64, 8)
    close(pylogits.logsumexp([0, 0, 0]), LN3, np.float64)
    close(dense(LABELS, LOGITS), LOSS_VALUES, np.float64, 8)
    close(sparse(CLASSES, LOGITS), LOSS_VALUES, np.float64, 8)


def test_losses_of_the_question(backend, dtype):
    logits, labels = np.array(LOGITS, dtype), np.array(LABELS, dtype)
    close(dense(labels, logits), LOSS_VALUES, dtype, 8)
    close(sparse(np.array(CLASSES), logits), LOSS_VALUES, dtype, 8)
    close(-(labels * pylogits.log_softmax(logits)).sum(-1), LOSS_VALUES, dtype, 8)
    close(-(labels * np.log(pylogits.softmax(logits))).sum(-1), LOSS_VALUES, dtype, 8)


def test_mean_loss_of_the_question(backend):
    assert dense(LABELS, LOGITS).mean() == pytest.approx(0.83934333897877922, rel=4e-16)
    assert sparse(CLASSES, LOGITS).mean() == pytest.approx(0.83934333897877922, rel=4e-16)


def test_negative_logits_are_fine(backend, dtype):
    logits = np.array([[-1.0, -1, -1], [-2, -1, 0]], dtype)
    labels = np.array([[1.0, 0, 0], [0, 1, 0]], dtype)
    close(dense(labels, logits), [LN3, 1.4076059644443804], dtype)
    close(sparse(np.array([0, 1]), logits), [LN3, 1.4076059644443804], dtype)
    with np.errstate(invalid="ignore", divide="ignore"):
        assert np.isnan(-(labels * np.log(logits)).sum(-1)).all()


def test_softmax_twice_is_another_loss_and_a_warning(backend):
    probabilities = pylogits.softmax(LOGITS)
    close(sparse(CLASSES, probabilities), [0.83426317, 1.13825193], np.float64, 8)
    with pytest.warns(pylogits.DoubleSoftmaxWarning):
        pylogits.check_logits(probabilities)


# Each operation.


def test_softmax(backend, dtype):
    close(pylogits.softmax(np.array([7], dtype)), [1], dtype)
    close(pylogits.softmax(np.array([3, 3], dtype)), [0.5, 0.5], dtype)
    close(pylogits.softmax(np.array([1e4, 1e4, 1e4, 1e4], dtype)), [0.25] * 4, dtype)
    close(
        pylogits.softmax(np.array([1, 2, 3], dtype)),
        [0.09003057317038046, 0.24472847105479765, 0.6652409557748219],
        dtype,
    )
    assert pylogits.softmax(np.array([-1e30, 0], dtype)).tolist() == [0, 1]


def test_log_softmax(backend, dtype):
    close(pylogits.log_softmax(np.array([7], dtype)), [0], dtype)
    close(pylogits.log_softmax(np.array([[5, 5, 5, 5]], dtype)), [[-LN4] * 4], dtype)
    close(
        pylogits.log_softmax(np.array([1, 2, 3], dtype)),
        [-2.4076059644443806, -1.4076059644443804, -0.4076059644443805],
        dtype,
    )
    assert pylogits.log_softmax(np.array([-1e30, 0], dtype)).tolist() == [dtype.type(-1e30), 0]


def test_logsumexp(backend, dtype):
    close(pylogits.logsumexp(np.array([[7], [-7]], dtype)), [7, -7], dtype)
    close(pylogits.logsumexp(np.array([[0, 0], [1000, 1000]], dtype)), [LN2, 1000 + LN2], dtype)
    close(pylogits.logsumexp(np.array([1, 2, 3], dtype)), 3.4076059644443806, dtype)


def test_selective_log_softmax(backend, dtype):
    logits = np.array([[1, 2, 3], [4, 4, 4]], dtype)
    close(
        pylogits.selective_log_softmax(logits, np.array([1, 0])),
        [-1.4076059644443804, -LN3],
        dtype,
    )
    close(
        pylogits.selective_log_softmax(logits, np.array([[2, 0, 2, 1], [0, 1, 2, 2]])),
        [
            [-0.4076059644443805, -2.4076059644443806, -0.4076059644443805, -1.4076059644443804],
            [-LN3] * 4,
        ],
        dtype,
    )
    close(
        pylogits.selective_log_softmax(logits, np.array([[0, 0, 1]]), axis=0),
        [[-3.0485873515737420, -2.1269280110429727, -0.3132616875182228]],
        dtype,
    )


def test_dense_loss_of_soft_labels(backend, dtype):
    logits = np.array([[0, LN3], [5, 5]], dtype)
    close(dense(np.array([[0.5, 0.5], [0.25, 0.75]], dtype), logits), [0.83698822, LN2], dtype, 7)
    # Labels are used as given: twice the labels, twice the loss; no labels, none.
    close(dense(np.array([[2, 2], [0, 0]], dtype), logits), [4 * 0.8369882168, 0], dtype, 6)


def test_dense_labels_broadcast(backend, dtype):
    logits = np.array([[1, 2, 3], [4, 4, 4]], dtype)
    expected = [2.4076059644443806, LN3]
    close(dense(np.array([1, 0, 0], dtype), logits), expected, dtype)
    close(dense(np.array([[1, 0, 0]], dtype), logits), expected, dtype)
    close(dense(np.array([[1], [0.5]], dtype), logits), [4.2228178933331414, 1.5 * LN3], dtype)
    close(dense(dtype.type(1), logits), [4.2228178933331414, 3 * LN3], dtype)
    labels = np.array([[[1, 0, 0]], [[0, 0, 1]]], dtype)
    close(
        dense(labels, logits),
        [[2.4076059644443806, LN3], [0.4076059644443805, LN3]],
        dtype,
    )


def test_dense_labels_of_another_float_dtype(backend, dtype):
    for labels_dtype in (np.float16, np.float32, np.float64, ml_dtypes.bfloat16):
        labels = np.array(LABELS).astype(labels_dtype)
        close(dense(labels, np.array(LOGITS, dtype)), LOSS_VALUES, dtype, 8)


def test_sparse_labels_of_every_integer_dtype(backend, dtype):
    logits = np.zeros((2, 300), dtype)
    logits[:, 100] = 10
    expected = [0.013483269796101813, 10.013483269796101]
    for labels_dtype in "bBhHiIlLqQ":
        close(sparse(np.array([100, 99], labels_dtype), logits), expected, dtype)
        swapped = np.array([100, 99]).astype(np.dtype(labels_dtype).newbyteorder())
        close(sparse(swapped, logits), expected, dtype)
    close(sparse(np.array([299, 255], np.uint16), logits), [expected[1]] * 2, dtype)


def test_scalars(backend, dtype):
    row = np.array([1, 2, 3], dtype)
    for label in (1, np.int8(1), np.array(1)):
        loss = sparse(label, row)
        assert isinstance(loss, dtype.type)
        close(loss, 1.4076059644443804, dtype)
    assert isinstance(dense(np.array([0, 1, 0], dtype), row), dtype.type)
    assert isinstance(pylogits.logsumexp(row), dtype.type)
    assert isinstance(pylogits.logsumexp(row.reshape(1, 3), axis=None), dtype.type)
    picked = pylogits.selective_log_softmax(row, 1)
    assert isinstance(picked, dtype.type)
    close(picked, -1.4076059644443804, dtype)
    assert pylogits.softmax(3.0, axis=None) == 1
    assert pylogits.logsumexp(3, axis=None) == 3


def test_confident_rows(backend):
    logits = np.zeros((2, 10), np.float32)
    logits[:, 0] = 15, 18
    expected = np.float32([2.7531171e-06, 1.3706981e-07])
    np.testing.assert_allclose(sparse(np.array([0, 0]), logits), expected, rtol=5e-7)
    np.testing.assert_allclose(dense(np.eye(1, 10, dtype="f"), logits), expected, rtol=5e-7)
    np.testing.assert_allclose(-pylogits.log_softmax(logits)[:, 0], expected, rtol=5e-7)
    np.testing.assert_allclose(
        sparse(np.array([0, 0]), logits.astype(float)),
        [2.7531170946860857e-06, 1.3706980830834705e-07],
        rtol=2e-15,
    )


# Options.


def test_temperature(backend, dtype):
    logits = np.array([0, 2 * LN3], dtype)
    close(pylogits.softmax(logits, temperature=2), [0.25, 0.75], dtype, 7)
    close(pylogits.log_softmax(logits, temperature=2.0), [-LN4, LN3 - LN4], dtype, 6)
    close(pylogits.logsumexp(logits, temperature=np.float32(2)), LN4, dtype, 6)
    close(pylogits.selective_log_softmax(logits, [0, 0], temperature=2), [-LN4] * 2, dtype, 6)
    close(pylogits.softmax(np.array([1, 2, 3], dtype), temperature=1e30), [1 / 3] * 3, dtype)
    assert pylogits.softmax(np.array([1, 2, 3], dtype), temperature=1e-30).tolist() == [0, 0, 1]


def test_where(backend, dtype):
    logits = np.array([[1, 9, 1], [2, 2, 2]], dtype)
    where = np.array([[True, False, True], [True, True, True]])
    inf = np.inf
    close(pylogits.softmax(logits, where=where), [[0.5, 0, 0.5], [1 / 3] * 3], dtype)
    close(pylogits.log_softmax(logits, where=where), [[-LN2, -inf, -LN2], [-LN3] * 3], dtype)
    close(pylogits.logsumexp(logits, where=where), [1 + LN2, 2 + LN3], dtype)
    # where broadcasts to the logits
    close(pylogits.softmax(logits, where=[True, False, True]), [[0.5, 0, 0.5]] * 2, dtype)
    close(pylogits.logsumexp(logits, where=[[False], [True]]), [-inf, 2 + LN3], dtype)
    close(pylogits.logsumexp(logits, where=True, temperature=2), [4.535976, 1 + LN3], dtype, 6)


def test_axes(backend, dtype):
    logits = np.array([[[0, 0], [LN3, 0]], [[0, 0], [LN3, LN3]]], dtype)
    half, quarter = [0.5, 0.5], [0.25, 0.25]
    close(
        pylogits.softmax(logits, axis=1),
        [[[0.25, 0.5], [0.75, 0.5]], [quarter, [0.75, 0.75]]],
        dtype,
        7,
    )
    close(pylogits.softmax(logits, axis=0), [[half, [0.5, 0.25]], [half, [0.5, 0.75]]], dtype, 7)
    close(pylogits.logsumexp(logits, axis=(0, 2)), [LN4, np.log(10)], dtype, 6)
    close(pylogits.logsumexp(logits, axis=(-1, 0)), [LN4, np.log(10)], dtype, 6)
    close(pylogits.logsumexp(logits, axis=None), np.log(14), dtype, 6)
    close(pylogits.softmax(np.zeros((2, 5), dtype), axis=None), np.full((2, 5), 0.1), dtype)
    kept = pylogits.logsumexp(logits, axis=(0, 2), keepdims=True)
    close(kept, [[[LN4], [np.log(10)]]], dtype, 6)
    close(pylogits.logsumexp(logits, axis=None, keepdims=True), [[[np.log(14)]]], dtype, 6)
    close(pylogits.logsumexp(logits, keepdims=True)[..., 0], pylogits.logsumexp(logits), dtype)
    close(
        sparse(np.array([[0, 1], [1, 0]]), logits, axis=1),
        [[LN4, LN2], [LN4 - LN3, LN4]],
        dtype,
        6,
    )


def test_no_axes(backend, dtype):
    """As in NumPy and SciPy, every element is then a row of its own."""
    logits = np.array([[1, 2]], dtype)
    assert pylogits.softmax(logits, axis=()).tolist() == [[1, 1]]
    assert pylogits.log_softmax(logits, axis=()).tolist() == [[0, 0]]
    assert pylogits.logsumexp(logits, axis=()).tolist() == [[1, 2]]


def test_integers_and_booleans_are_float64(backend):
    rows = np.array([[1, 2, 3]])
    for integer in "bBhHiIlLqQ":
        close(pylogits.logsumexp(rows.astype(integer)), [3.4076059644443806], np.float64)
        close(sparse([1], rows.astype(integer)), [1.4076059644443804], np.float64)
    close(
        pylogits.softmax(np.array([True, True, False])),
        [0.42231880, 0.42231880, 0.15536240],
        np.float64,
        8,
    )


def test_dtypes_of_results(backend):
    for name in ("float16", ml_dtypes.bfloat16):
        logits = np.array([[0, 0], [1, 1]]).astype(name)
        close(pylogits.softmax(logits).astype("f"), [[0.5, 0.5]] * 2, np.float32)
        assert pylogits.softmax(logits).dtype == name
        assert pylogits.log_softmax(logits).dtype == name
        assert pylogits.selective_log_softmax(logits, [0, 1]).dtype == name
        close(pylogits.logsumexp(logits), [LN2, 1 + LN2], np.float32)
        close(sparse([0, 1], logits), [LN2, LN2], np.float32)
        close(dense(logits, logits), [0, 2 * LN2], np.float32)


def test_longdouble_stays_longdouble(backend):
    third = np.longdouble(1) / 3
    result = pylogits.softmax(np.ones((2, 3), np.longdouble))
    assert result.dtype == np.longdouble
    assert abs(result - third).max() <= 4 * np.finfo(np.longdouble).eps
    loss = sparse([0, 2], np.ones((2, 3), np.longdouble))
    assert loss.dtype == np.longdouble
    assert abs(loss - np.log(np.longdouble(3))).max() <= 8 * np.finfo(np.longdouble).eps


def test_one_hot(dtype):
    assert pylogits.one_hot([0, 2], 3).dtype == np.float32
    for labels_dtype in "bBhHiIlLqQ":
        hot = pylogits.one_hot(np.array([0, 2], labels_dtype), 3, dtype=dtype)
        assert hot.dtype == dtype
        assert hot.tolist() == [[1, 0, 0], [0, 0, 1]]
    assert pylogits.one_hot([[0, 2]], 3, axis=0).tolist() == [[[1, 0]], [[0, 0]], [[0, 1]]]
    assert pylogits.one_hot([[0, 2]], 3, axis=1).tolist() == [[[1, 0], [0, 0], [0, 1]]]
    assert pylogits.one_hot(1, 2).tolist() == [0, 1]
    assert pylogits.one_hot(np.empty(0, int), 2).shape == (0, 2)
    assert pylogits.one_hot([1], 2, dtype=int).tolist() == [[0, 1]]


def test_out(backend, dtype):
    logits, labels = np.array(LOGITS, dtype), np.array(LABELS, dtype)
    for function in (pylogits.softmax, pylogits.log_softmax):
        expected, out = function(logits), np.empty((2, 3), dtype)
        assert function(logits, out=out) is out
        np.testing.assert_array_equal(out, expected)
        alias = logits.copy()
        assert function(alias, out=alias) is alias
        np.testing.assert_array_equal(alias, expected)
    out = np.empty(2, dtype)
    assert pylogits.logsumexp(logits, out=out) is out
    np.testing.assert_array_equal(out, pylogits.logsumexp(logits))
    kept = np.empty((2, 1), dtype)
    assert pylogits.logsumexp(logits, keepdims=True, out=kept) is kept
    np.testing.assert_array_equal(kept[:, 0], out)
    assert dense(labels, logits, out=out) is out
    close(out, LOSS_VALUES, dtype, 8)
    out[:] = 0
    assert sparse(CLASSES, logits, out=out) is out
    close(out, LOSS_VALUES, dtype, 8)
    assert pylogits.selective_log_softmax(logits, CLASSES, out=out) is out
    close(-out, LOSS_VALUES, dtype, 8)
    scalar = np.empty((), dtype)
    assert pylogits.logsumexp(logits, axis=None, out=scalar) is scalar
    close(scalar, 3.23490030, dtype, 8)
    np.testing.assert_array_equal(logits, np.array(LOGITS, dtype))
