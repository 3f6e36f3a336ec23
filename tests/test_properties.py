"""Laws that hold for any logits."""

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from cases import ULP, oracle, promised, ulp_error
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pylogits

# The backend fixture is set once for all examples, as it should be.
pytestmark = pytest.mark.usefixtures("backend")
laws = settings(
    deadline=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

DTYPES = st.sampled_from([np.float32, np.float64])
SHAPES = hnp.array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=40)


@st.composite
def logits(draw, largest=1000, shapes=SHAPES, dtypes=DTYPES):
    width = 8 * np.dtype(dtype := draw(dtypes)).itemsize
    elements = st.floats(-largest, largest, width=width)
    return draw(hnp.arrays(dtype, shapes, elements=elements))


@st.composite
def logits_and_labels(draw):
    x = draw(logits())
    labels = hnp.arrays(np.int64, x.shape[:-1], elements=st.integers(0, x.shape[-1] - 1))
    return x, draw(labels)


def tolerance(x, ulp=2):
    return ulp * ULP[x.dtype.name] * np.finfo(x.dtype).eps


@laws
@given(logits())
def test_rows_sum_to_one(x):
    total = pylogits.softmax(x).sum(-1, dtype=np.longdouble)
    np.testing.assert_allclose(total, 1, rtol=tolerance(x))


@laws
@given(logits())
def test_probabilities_keep_the_order_of_logits(x):
    order = x.argsort(-1)
    p = np.take_along_axis(pylogits.softmax(x), order, -1)
    assert (p >= 0).all()
    assert (p <= 1).all()
    assert (p[..., 1:] >= p[..., :-1] * (1 - tolerance(x))).all()


@laws
@given(logits(largest=100), st.integers(-100, 100))
def test_shift_invariance(x, shift):
    x = np.round(x * 16) / 16  # so that adding the shift is exact
    np.testing.assert_allclose(
        pylogits.softmax(x + x.dtype.type(shift)),
        pylogits.softmax(x),
        rtol=tolerance(x),
        atol=1e-37,
    )
    np.testing.assert_allclose(pylogits.log_softmax(x + x.dtype.type(shift)), pylogits.log_softmax(x), rtol=tolerance(x))


@laws
@given(logits(), st.randoms(use_true_random=False))
def test_permutation_of_classes(x, random):
    order = list(range(x.shape[-1]))
    random.shuffle(order)
    y = x[..., order]
    np.testing.assert_allclose(pylogits.softmax(y), pylogits.softmax(x)[..., order], rtol=tolerance(x), atol=1e-37)
    np.testing.assert_allclose(pylogits.log_softmax(y), pylogits.log_softmax(x)[..., order], rtol=tolerance(x))
    np.testing.assert_allclose(pylogits.logsumexp(y), pylogits.logsumexp(x), rtol=tolerance(x), atol=4 * tolerance(x))


@laws
@given(logits())
def test_log_softmax_is_the_log_of_softmax(x):
    p, log_p = pylogits.softmax(x), pylogits.log_softmax(x)
    normal = p >= np.finfo(x.dtype).tiny
    np.testing.assert_allclose(
        np.log(p[normal].astype(np.longdouble)),
        log_p[normal],
        rtol=tolerance(x),
        atol=tolerance(x),
    )
    assert (log_p <= 0).all()


@laws
@given(logits())
def test_logsumexp_is_what_log_softmax_subtracts(x):
    total = pylogits.logsumexp(x, keepdims=True)
    assert (total >= x.max(-1, keepdims=True)).all()
    np.testing.assert_allclose(
        x.astype(np.longdouble) - total,
        pylogits.log_softmax(x),
        rtol=tolerance(x),
        atol=tolerance(x) * max(1, abs(x).max()),
    )


@laws
@given(logits_and_labels())
def test_dense_of_one_hot_is_sparse_to_the_bit(x_and_labels):
    x, labels = x_and_labels
    hot = pylogits.one_hot(labels, x.shape[-1], dtype=x.dtype)
    dense = pylogits.softmax_cross_entropy_with_logits(labels=hot, logits=x)
    sparse = pylogits.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=x)
    assert np.asarray(dense).tobytes() == np.asarray(sparse).tobytes()


@laws
@given(logits_and_labels())
def test_selective_is_log_softmax_at_the_indices_to_the_bit(x_and_labels):
    x, labels = x_and_labels
    log_p = pylogits.log_softmax(x)
    indices = np.stack([labels, labels * 0, labels], -1)
    picked = pylogits.selective_log_softmax(x, indices)
    assert picked.tobytes() == np.take_along_axis(log_p, indices, -1).tobytes()
    picked = np.asarray(pylogits.selective_log_softmax(x, labels))
    assert picked.tobytes() == np.take_along_axis(log_p, indices[..., :1], -1).tobytes()


@laws
@given(logits_and_labels())
def test_sparse_loss_is_minus_log_softmax(x_and_labels):
    x, labels = x_and_labels
    loss = pylogits.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=x)
    assert (loss >= 0).all()
    log_p = pylogits.selective_log_softmax(x, labels)
    np.testing.assert_allclose(loss, -log_p, rtol=tolerance(x))


@laws
@given(logits(), st.sampled_from([0.25, 0.7, 1.0, 3.0, 100.0]))
def test_temperature_divides(x, temperature):
    for op in ("softmax", "log_softmax", "logsumexp"):
        result = np.asarray(getattr(pylogits, op)(x, temperature=temperature))
        error = ulp_error(result, *oracle(op, x, temperature=temperature))
        assert error <= promised(op, x.dtype)
        if temperature == 0.25:  # the quotients are exact
            np.testing.assert_allclose(result, getattr(pylogits, op)(x / 0.25), tolerance(x), 1e-37)


@laws
@given(logits())
def test_out_is_returned(x):
    for function in (pylogits.softmax, pylogits.log_softmax):
        out = np.empty_like(x)
        assert function(x, out=out) is out
        np.testing.assert_array_equal(out, function(x))
        alias = x.copy()
        function(alias, out=alias)
        np.testing.assert_array_equal(alias, out)


@laws
@given(logits(shapes=hnp.array_shapes(min_dims=2, max_dims=4, max_side=9)), st.data())
def test_axes_are_the_same_rows(x, data):
    axis = data.draw(st.integers(-x.ndim, x.ndim - 1))
    rows = np.moveaxis(x, axis, -1)
    for function in (pylogits.softmax, pylogits.log_softmax):
        np.testing.assert_allclose(np.moveaxis(function(x, axis), axis, -1), function(rows), tolerance(x), 1e-37)
    np.testing.assert_allclose(pylogits.logsumexp(x, axis), pylogits.logsumexp(rows), tolerance(x), 4 * tolerance(x))
    whole = pylogits.softmax(x, axis=tuple(range(x.ndim)))
    np.testing.assert_array_equal(whole, pylogits.softmax(x, axis=None))
    np.testing.assert_array_equal(whole, pylogits.softmax(x.ravel()).reshape(x.shape))


@laws
@given(logits(), st.data())
def test_where_leaves_out(x, data):
    where = data.draw(hnp.arrays(bool, x.shape[-1:]).filter(np.any))
    p = pylogits.softmax(x, where=where)
    assert (p[..., ~where] == 0).all()
    np.testing.assert_allclose(p[..., where], pylogits.softmax(x[..., where]), rtol=tolerance(x), atol=1e-37)
