"""CPU torch tensors in, torch tensors out, with the numbers of NumPy."""

import numpy as np
import pytest

import pylogits

torch = pytest.importorskip("torch")

LOGITS = np.random.default_rng(0).standard_normal((5, 7)).astype(np.float32)
LABELS = np.array([0, 6, 3, 2, 1])


def calls(logits, labels, hot):
    """Return what every function answers."""
    return {
        "softmax": pylogits.softmax(logits),
        "log_softmax": pylogits.log_softmax(logits, temperature=2),
        "logsumexp": pylogits.logsumexp(logits, keepdims=True),
        "selective": pylogits.selective_log_softmax(logits, labels),
        "dense": pylogits.softmax_cross_entropy_with_logits(labels=hot, logits=logits),
        "sparse": pylogits.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits),
    }


def check(tensors, arrays):
    for name, tensor in tensors.items():
        assert isinstance(tensor, torch.Tensor), name
        assert str(tensor.dtype) == f"torch.{arrays[name].dtype}"
        assert not tensor.requires_grad
        numbers = tensor.double().numpy()
        np.testing.assert_array_equal(numbers, arrays[name].astype(float), err_msg=name)


@pytest.mark.parametrize("name", ["float32", "float64", "float16", "bfloat16"])
def test_floats(backend, name):
    dtype = np.dtype(pytest.importorskip("ml_dtypes").bfloat16 if name == "bfloat16" else name)
    logits, hot = LOGITS.astype(dtype), np.eye(7)[LABELS].astype(dtype)
    tensor = torch.from_numpy(LOGITS).to(getattr(torch, name))
    np.testing.assert_array_equal(tensor.double().numpy(), logits.astype(float))
    tensors = calls(tensor, torch.from_numpy(LABELS), torch.from_numpy(hot.astype("f")))
    check(tensors, calls(logits, LABELS, hot.astype("f")))


def test_integers():
    tensor = torch.arange(6).reshape(2, 3)
    result = pylogits.softmax(tensor)
    assert result.dtype == torch.float64
    np.testing.assert_array_equal(result.numpy(), pylogits.softmax(tensor.numpy()))


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "int32", "int64"])
def test_labels(dtype):
    labels = torch.from_numpy(LABELS).to(getattr(torch, dtype))
    loss = pylogits.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=torch.from_numpy(LOGITS))
    expected = pylogits.sparse_softmax_cross_entropy_with_logits(labels=LABELS, logits=LOGITS)
    np.testing.assert_array_equal(loss.numpy(), expected)


def test_the_kind_follows_the_logits():
    labels = torch.from_numpy(LABELS)
    loss = pylogits.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=LOGITS)
    assert isinstance(loss, np.ndarray)
    loss = pylogits.sparse_softmax_cross_entropy_with_logits(labels=LABELS, logits=torch.from_numpy(LOGITS))
    assert isinstance(loss, torch.Tensor)


def test_requires_grad():
    tensor = torch.from_numpy(LOGITS.copy()).requires_grad_()
    result = pylogits.softmax(tensor)
    assert not result.requires_grad
    np.testing.assert_array_equal(result.numpy(), pylogits.softmax(LOGITS))


def test_views(backend):
    tensor = torch.from_numpy(LOGITS)
    for view in (tensor.T, tensor[::2, 1::2], tensor[:1].expand(4, 7), tensor[0]):
        result = pylogits.softmax(view)
        assert result.shape == view.shape
        np.testing.assert_array_equal(result.numpy(), pylogits.softmax(view.numpy()))
    whole = pylogits.logsumexp(tensor, axis=None)
    assert isinstance(whole, torch.Tensor)
    assert whole.item() == pylogits.logsumexp(LOGITS, axis=None)


def test_where():
    mask = LOGITS > -0.5
    result = pylogits.softmax(torch.from_numpy(LOGITS), where=torch.from_numpy(mask))
    np.testing.assert_array_equal(result.numpy(), pylogits.softmax(LOGITS, where=mask))


def test_out(backend):
    tensor = torch.from_numpy(LOGITS.copy())
    out = torch.empty_like(tensor)
    assert pylogits.softmax(tensor, out=out) is out
    np.testing.assert_array_equal(out.numpy(), pylogits.softmax(LOGITS))
    np.testing.assert_array_equal(tensor.numpy(), LOGITS)
    out = torch.empty(7, 5).T
    assert pylogits.softmax(tensor, out=out) is out
    np.testing.assert_array_equal(out.numpy(), pylogits.softmax(LOGITS))
    assert pylogits.softmax(tensor, out=tensor) is tensor
    np.testing.assert_array_equal(tensor.numpy(), pylogits.softmax(LOGITS))
    with pytest.raises(TypeError, match=r"out.*float64"):
        pylogits.softmax(tensor, out=torch.empty(5, 7, dtype=torch.float64))


def test_out_in_bfloat16(backend):
    tensor = torch.from_numpy(LOGITS).bfloat16()
    out = torch.empty_like(tensor)
    assert pylogits.softmax(tensor, out=out) is out
    assert torch.equal(out, pylogits.softmax(tensor))
    assert torch.equal(out, pylogits.softmax(tensor.float()).bfloat16())


def test_score(backend):
    scores = pylogits.score(torch.from_numpy(LOGITS), torch.from_numpy(LABELS), top_k=3)
    expected = pylogits.score(LOGITS, LABELS, top_k=3)
    for got, want in zip(scores, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(got), want)


def test_errors():
    with pytest.raises(ValueError, match=r"label 7 at index \(1,\) is outside \[0, 7\)"):
        pylogits.sparse_softmax_cross_entropy_with_logits(labels=torch.tensor([0, 7, 0, 0, 0]), logits=torch.from_numpy(LOGITS))
    with pytest.raises(TypeError, match="labels"):
        pylogits.sparse_softmax_cross_entropy_with_logits(labels=torch.zeros(5), logits=torch.from_numpy(LOGITS))
    with pytest.raises(TypeError, match="logits"):
        pylogits.softmax(torch.zeros(3, dtype=torch.complex64))
    with pytest.raises(TypeError, match=r"logits.*meta"):
        pylogits.softmax(torch.zeros(3, device="meta"))


def test_flushed_subnormals_do_not_reach_the_kernels(simd):
    """The C backend sets its own floating-point environment, and leaves the caller's as it was."""
    logits = np.tile(np.float32([0, -100]), (50_000, 1))
    for isa in simd.available_isas():
        simd.use_isa(isa)
        expected = pylogits.softmax(logits).view(np.int32)
        assert expected[0, 1] == 27
        try:
            if not torch.set_flush_denormal(True):
                pytest.skip("this machine cannot flush subnormals")
            result = pylogits.softmax(logits).view(np.int32)
            still_flushes = np.multiply(np.float32(1e-30), np.float32(1e-10)).view(np.int32) == 0
        finally:
            torch.set_flush_denormal(False)
        np.testing.assert_array_equal(result, expected)
        assert still_flushes
