"""What only a GPU can show of the CUDA kernels: torch's tensors and streams, every length of a row, more than 2^31 elements."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import pylogits

torch = pytest.importorskip("torch")
pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")
if not torch.cuda.is_available():
    pytest.skip("there is no GPU", allow_module_level=True)

DTYPES = {torch.float32: 24, torch.float64: 53, torch.float16: 11, torch.bfloat16: 8}  # and their digits
# Short rows, those about which a row gets more lanes or a second tile (of float32, and of half precision), and long ones.
EDGES = (1024, 2048, 4096, 10232, 16384, 20464)
LENGTHS = (*range(1, 601), *(edge + step for edge in EDGES for step in (-1, 0, 1, 8)), 50257, 128256)


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape, device="cuda", dtype=torch.float32).mul_(4).to(dtype)


def errors(got, expected, scale=None):
    """Return the largest error in ulp of the result's dtype; `expected` is float64."""
    digits = DTYPES[got.dtype]
    size = (expected if scale is None else scale).abs().clamp(min=torch.finfo(got.dtype).tiny)
    unit = torch.ldexp(torch.ones_like(expected), torch.frexp(size)[1] - digits)
    return ((got.double() - expected).abs() / unit).max().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_length_of_a_row(dtype):
    half = 0.51 if dtype != torch.float32 else 0
    for classes in LENGTHS:
        x = randn(3, classes, dtype=dtype)
        wide = x.double()
        log_sum = torch.logsumexp(wide, -1)
        assert errors(pylogits.softmax(x), torch.softmax(wide, -1)) <= (half or 2.1), classes
        assert errors(pylogits.logsumexp(x), log_sum, torch.maximum(log_sum.abs(), wide.amax(-1).abs())) <= 1, classes
        labels = torch.randint(classes, (3,), device="cuda")
        losses = pylogits.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=x)
        expected = (log_sum - wide.gather(1, labels[:, None])[:, 0]).abs()
        if classes > 1 and dtype == torch.float32:
            assert errors(losses, expected, expected.clamp(min=1e-3)) <= 2, classes
        mean, grad = pylogits.cross_entropy_value_and_grad(x, labels)
        slope = (torch.softmax(wide, -1) - torch.nn.functional.one_hot(labels, classes)) / 3
        torch.testing.assert_close(mean.double(), expected.mean(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(grad.double(), slope, rtol=4 * 2.0 ** -DTYPES[dtype], atol=2.0**-24)


def test_every_length_of_a_row_in_float64_and_strided():
    for classes in LENGTHS:
        x = randn(2, classes, dtype=torch.float64)
        torch.testing.assert_close(pylogits.softmax(x), torch.softmax(x, -1), rtol=1e-14, atol=0)
        strided = randn(2, classes, 5)
        assert errors(pylogits.softmax(strided, 1), torch.softmax(strided.double(), 1)) <= 2.1, classes


def test_a_last_tile_far_above_the_others():
    x = torch.zeros(40, 128256, device="cuda")
    x[:, -1] = torch.linspace(80, 97, 40)  # e^-88 is below the smallest normal number, and so many times that is not
    loss = torch.log1p(128255 * torch.exp(-x[:, -1].double()))
    assert errors(-pylogits.log_softmax(x)[:, -1], loss) <= 2
    assert errors(pylogits.cross_entropy(x, torch.full((40,), 128255, device="cuda"), reduction="none"), loss) <= 2


def test_rows_that_are_not_aligned():
    whole = randn(1 << 16)
    for start in range(5):
        for classes in (7, 64, 1000, 10001):
            x = whole[start : start + 3 * classes].view(3, classes)
            out = torch.full((3 * classes + 9,), 5.0, device="cuda")
            inner = out[start + 1 : start + 1 + 3 * classes].view(3, classes)
            pylogits.softmax(x, out=inner)
            assert errors(inner, torch.softmax(x.double(), -1)) <= 2.1
            assert (out[: start + 1] == 5).all() and (out[start + 1 + 3 * classes :] == 5).all()


def test_rows_that_are_all_the_same_memory():
    x = randn(3, 40)
    torch.testing.assert_close(
        pylogits.softmax(x[:, :, None].expand(3, 40, 5), 1), torch.softmax(x[:, :, None].expand(3, 40, 5), 1)
    )
    torch.testing.assert_close(pylogits.softmax(x[:1].expand(9, 40)), torch.softmax(x[:1].expand(9, 40), -1))


def test_results_are_tensors_of_the_current_stream():
    x, labels = torch.zeros(512, 1000, device="cuda"), torch.randint(1000, (512,), device="cuda")
    pylogits.softmax(x)  # compiles
    pylogits.cross_entropy_value_and_grad(x, labels)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    new = randn(512, 1000)
    expected = torch.softmax(new.double(), -1)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # a tenth of a second: a kernel of another stream would see zeros
        x.copy_(new)
        probabilities = pylogits.softmax(x)
        with pylogits.deferred_checks():
            mean, _ = pylogits.cross_entropy_value_and_grad(x, labels)
    assert isinstance(probabilities, torch.Tensor) and probabilities.device == x.device and mean.shape == ()
    stream.synchronize()
    assert errors(probabilities, expected) <= 2.1
    torch.testing.assert_close(mean, torch.nn.functional.cross_entropy(new, labels), rtol=1e-6, atol=0)


def test_a_cuda_graph_replays_the_call():
    x = randn(64, 300)
    pylogits.softmax(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        probabilities = pylogits.softmax(x)
    x.copy_(randn(64, 300))
    graph.replay()
    assert errors(probabilities, torch.softmax(x.double(), -1)) <= 2.1


def test_calls_of_many_threads():
    inputs = [randn(100 + i, 1000) for i in range(8)]
    expected = [pylogits.softmax(x) for x in inputs]

    def differences(i):
        return sum(not torch.equal(pylogits.softmax(inputs[i]), expected[i]) for _ in range(50))

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(differences, range(8))) == 0


def test_arrays_of_cupy():
    cupy = pytest.importorskip("cupy")
    x = cupy.random.standard_normal((33, 70)).astype(cupy.float32)
    result = pylogits.softmax(x)
    assert isinstance(result, cupy.ndarray)
    np.testing.assert_allclose(cupy.asnumpy(result), pylogits.softmax(cupy.asnumpy(x)), rtol=3e-7)


def test_a_bad_label_among_many():
    x, labels = randn(100_000, 10), torch.randint(10, (100_000,), device="cuda")
    labels[77_777] = 10
    grad = torch.full_like(x, 5)
    with pytest.raises(ValueError, match=r"target 10 at index \(77777,\)"):
        pylogits.cross_entropy_value_and_grad(x, labels, grad_out=grad)
    assert (grad == 5).all()


@pytest.mark.parametrize("rows", [1, 2**31 // 10 + 3])
def test_more_than_2_31_elements(rows):
    classes = 2**31 + 16 if rows == 1 else 10
    if torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("needs 16 GiB of a GPU")
    x = torch.zeros(rows, classes, device="cuda", dtype=torch.float16)
    x[-1, -1] = 10
    pylogits.softmax(x, out=x)
    total = np.exp(10.0) + classes - 1
    assert x[-1, -1].item() == np.float16(np.exp(10.0) / total) and x[-1, -2].item() == np.float16(1 / total)
    if rows > 1:
        assert (x[:-1] == np.float16(0.1)).all()
