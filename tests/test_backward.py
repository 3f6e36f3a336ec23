"""The gradients through softmax and log_softmax."""

import numpy as np
import pytest

import pylogits

FUNCTIONS = {"softmax": pylogits.softmax_backward, "log_softmax": pylogits.log_softmax_backward}


def test_by_hand(backend, dtype):
    got = pylogits.softmax_backward(np.array([1, 0], dtype), np.array([0.75, 0.25], dtype))
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, [0.1875, -0.1875])
    got = pylogits.log_softmax_backward(np.array([3, -1, 0], dtype), np.log(np.array([0.5, 0.25, 0.25], dtype)))
    np.testing.assert_allclose(got, [2, -1.5, -0.5], rtol=4 * np.finfo(dtype).eps)


def expected(name, grad, result):
    grad, result = grad.astype(np.longdouble), result.astype(np.longdouble)
    if name == "softmax":
        return result * (grad - (grad * result).sum(1, keepdims=True))
    return grad - np.exp(result) * grad.sum(1, keepdims=True)


def scale(name, grad, result):
    """What an error is measured by: the terms of the sum cancel, and so may the difference."""
    grad, result = np.abs(grad.astype(float)), result.astype(float)
    if name == "softmax":
        return result * (grad + (grad * result).sum(1, keepdims=True))
    return grad + np.exp(result) * grad.sum(1, keepdims=True)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("shape", [(1, 1), (40, 3), (17, 33), (9, 16, 20), (3, 1000), (2, 1030, 9), (2, 9001)])
def test_against_longdouble(backend, dtype, name, shape):
    rng = np.random.default_rng(shape[1])
    result = getattr(pylogits, name)((rng.standard_normal(shape) * 3).astype(dtype), axis=1)
    grad = rng.standard_normal(shape).astype(dtype)
    got = FUNCTIONS[name](grad, result, axis=1)
    error = np.abs(got - expected(name, grad, result)) / scale(name, grad, result)
    assert error.max() <= 2 * np.finfo(dtype).eps


@pytest.mark.parametrize("name", FUNCTIONS)
def test_bits_do_not_depend_on_the_layout(backend, dtype, name):
    if backend == "reference":
        pytest.skip("NumPy's sums depend on the layout")
    rng = np.random.default_rng(0)
    result = getattr(pylogits, name)(rng.standard_normal((40, 100)).astype(dtype))
    grad = rng.standard_normal((40, 100)).astype(dtype)
    whole = FUNCTIONS[name](grad, result)
    np.testing.assert_array_equal(FUNCTIONS[name](grad.T.copy(), result.T.copy(), axis=0), whole.T)
    np.testing.assert_array_equal(FUNCTIONS[name](grad[5:6, ::-1][:, ::-1], result[5:6]), whole[5:6])
    both = np.stack([grad, result], -1)
    np.testing.assert_array_equal(FUNCTIONS[name](both[..., 0], both[..., 1]), whole)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_finite_differences(name):
    rng = np.random.default_rng(0)
    logits, upstream, step = rng.standard_normal((3, 5)), rng.standard_normal((3, 5)), 1e-5
    function = getattr(pylogits, name)
    got = FUNCTIONS[name](upstream, function(logits))
    for index in np.ndindex(logits.shape):
        moved = np.zeros_like(logits)
        moved[index] = step
        slope = ((function(logits + moved) - function(logits - moved)) * upstream).sum() / (2 * step)
        assert got[index] == pytest.approx(slope, rel=5e-6, abs=1e-9)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_torch(name):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    logits, grad = torch.from_numpy(rng.standard_normal((4, 7))), torch.from_numpy(rng.standard_normal((4, 7)))
    logits.requires_grad_()
    result = getattr(torch, name)(logits, -1)
    result.backward(grad)
    got = FUNCTIONS[name](grad, result)
    assert isinstance(got, torch.Tensor)
    np.testing.assert_allclose(got.numpy(), logits.grad.numpy(), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_out_may_be_either_argument(backend, dtype, name):
    rng = np.random.default_rng(0)
    result = getattr(pylogits, name)(rng.standard_normal((40, 9)).astype(dtype))
    grad = rng.standard_normal((40, 9)).astype(dtype)
    want = FUNCTIONS[name](grad, result)
    for alias in (0, 1):
        arguments = grad.copy(), result.copy()
        assert FUNCTIONS[name](*arguments, out=arguments[alias]) is arguments[alias]
        np.testing.assert_array_equal(arguments[alias], want)
    buffer = np.concatenate([grad, grad[:1]])
    FUNCTIONS[name](buffer[:-1], result, out=buffer[1:])
    np.testing.assert_array_equal(buffer[1:], want)


def test_other_dtypes(backend):
    half = FUNCTIONS["softmax"](np.array([1, 0], np.float16), np.array([0.75, 0.25], np.float16))
    assert half.dtype == np.float16
    np.testing.assert_array_equal(half, np.array([0.1875, -0.1875], np.float16))
    wide = FUNCTIONS["softmax"](np.array([1, 0], np.longdouble), np.array([0.75, 0.25], np.longdouble))
    assert wide.dtype == np.longdouble
    np.testing.assert_array_equal(FUNCTIONS["softmax"]([1, 0], [0.75, 0.25]), [0.1875, -0.1875])
    np.testing.assert_array_equal(FUNCTIONS["softmax"]([[1, 0]], [[0.75, 0.25]], axis=None), [[0.1875, -0.1875]])
    assert FUNCTIONS["softmax"](np.empty((0, 3)), np.empty((0, 3))).shape == (0, 3)


def test_impossible_classes_and_nan(backend, dtype):
    got = FUNCTIONS["softmax"](np.array([2, 5, 1], dtype), np.array([1, 0, 0], dtype))
    np.testing.assert_array_equal(got, [0, 0, 0])
    got = FUNCTIONS["log_softmax"](np.array([2, 0], dtype), np.array([0, -np.inf], dtype))
    np.testing.assert_array_equal(got, [0, 0])
    assert np.isnan(FUNCTIONS["softmax"](np.array([np.nan, 1], dtype), np.array([0.5, 0.5], dtype))).all()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_errors(name):
    out = np.full(2, 7.0)
    with pytest.raises(ValueError, match=r"grad must have the shape of (log_)?probs, \(2,\), not \(3,\)"):
        FUNCTIONS[name](np.zeros(3), np.zeros(2), out=out)
    with pytest.raises(TypeError, match="grad must hold real numbers, not complex128"):
        FUNCTIONS[name](np.zeros(2, complex), np.zeros(2), out=out)
    with pytest.raises(ValueError, match=r"out must have shape \(3,\), not \(2,\)"):
        FUNCTIONS[name](np.zeros(3), np.zeros(3), out=out)
    assert (out == 7).all()
