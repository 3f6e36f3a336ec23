"""The CUDA kernels against the oracle and the reference: on a GPU, or (tests/test_cuda.py starts it) in Numba's simulator.

The simulator runs a thread of a block as a thread of Python: blocks are of 8 there, and tiles so small that rows have several.
"""

import importlib
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from cases import ULP, Case, dtype_of, oracle, promised, ulp_error

import pylogits

SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"

cuda = pytest.importorskip("numba.cuda", reason="numba-cuda is not installed")
pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")
if SIMULATED:
    import cuda_simulator

    cuda_simulator.install()
elif not cuda.is_available():
    pytest.skip("there is no GPU; in the simulator these tests are run by test_cuda.py", allow_module_level=True)

_cuda, _launch = importlib.import_module("pylogits._cuda"), importlib.import_module("pylogits._launch")
kernels = importlib.import_module("pylogits.kernels.cuda")

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, in the simulator


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    if SIMULATED:
        monkeypatch.setattr(kernels, "THREADS", 8)
        monkeypatch.setattr(kernels, "WARP", 4)
        monkeypatch.setattr(kernels, "ROWS", 16)
        monkeypatch.setattr(_cuda, "CHECKED", 8)
        monkeypatch.setattr(_cuda, "STRIDED_LANES", 2)
        monkeypatch.setattr(_cuda, "CLASSES_PER_LANE", 8)
        monkeypatch.setattr(_cuda, "FEWEST_LANES", 2)
        monkeypatch.setattr(_cuda, "TILE_BYTES", 512)


def to_gpu(value):
    """An array of Numba's; a bfloat16 one of torch's, as Numba has none."""
    if not isinstance(value, np.ndarray):
        return value
    if SIMULATED or value.dtype != dtype_of("bfloat16"):
        return cuda.to_device(value)
    torch = pytest.importorskip("torch")
    return torch.from_numpy(np.ascontiguousarray(value).view(np.uint16)).cuda().view(torch.bfloat16)


def to_host(value):
    if isinstance(value, tuple):
        return type(value)(*map(to_host, value)) if hasattr(value, "_fields") else tuple(map(to_host, value))
    if hasattr(value, "untyped_storage"):  # torch's
        bits = value.view(getattr(sys.modules["torch"], f"uint{8 * value.itemsize}"))
        return bits.cpu().numpy().view(dtype_of(str(value.dtype).removeprefix("torch.")))
    return value.copy_to_host() if hasattr(value, "copy_to_host") else value


def on_gpu(function, *args, **kwargs):
    """Return what a function of pylogits answers for arguments on the GPU, in main memory."""
    args, kwargs = map(to_gpu, args), {name: to_gpu(value) for name, value in kwargs.items()}
    return to_host(function(*args, **kwargs))


def reference(function, *args, **kwargs):
    with pylogits.use_backend("reference"):
        return function(*args, **kwargs)


def check(case, **geometry):
    """Run a case of float32 or float64 against the oracle; half precision is that, rounded once."""
    arguments = case.arguments()
    wide = {k: v.astype(np.float32) if getattr(v, "itemsize", 0) == 2 else v for k, v in arguments.items()}
    expected, scale = oracle(case.op, **wide)
    exact = on_gpu(getattr(pylogits, case.op), **wide)
    assert ulp_error(exact, expected, scale) <= promised(case.op, exact.dtype)
    if case.dtype not in ULP:
        got = on_gpu(getattr(pylogits, case.op), **arguments)
        np.testing.assert_array_equal(got, exact.astype(got.dtype))


OPS = ("softmax", "log_softmax", "logsumexp", "selective_log_softmax")
LOSSES = ("softmax_cross_entropy_with_logits", "sparse_softmax_cross_entropy_with_logits")
SHORT, TILES, STRIDED = ((3, 10), -1), ((2, 90), -1), ((2, 20, 3), 1)
ROWS = {"float32": (SHORT, TILES, STRIDED), "float64": (TILES,), "float16": (SHORT,), "bfloat16": (STRIDED,)}


def test_the_simulator_computes_as_a_gpu_does():
    if not SIMULATED:
        pytest.skip("this is the GPU")
    real, one = np.float32, np.float32(1)
    assert cuda_simulator.fma(None, one + real(2**-12), one + real(2**-12), real(-1 - 2**-11)) == 2.0**-24
    assert cuda_simulator.mul(one + real(2**-12), one + real(2**-12)) == 1 + 2.0**-11
    assert [cuda_simulator.power_of(real(x)) for x in (1, 1.41, 1.42, 2**20 + 1)] == [0, 0, 1, 20]
    assert cuda_simulator.scale_of(kernels._F32.round_shift - real(3)) == 2.0**-3 * kernels._F32.exp_scale
    halves = np.arange(16, dtype=np.float16)
    copied = np.zeros((1, 24, 1), np.float16)
    cuda_simulator.copy_vector(copied, (0, 0, 0), halves, 0, 1)
    np.testing.assert_array_equal(copied[0, 8:16, 0], halves[8:16])
    assert copied.sum() == halves[8:16].sum()
    rows = np.zeros((2, 3, 1), np.float32)
    cuda_simulator.move_element(False, np.float32([7]), 0, rows, (0, 4, 0))
    assert rows[1, 1, 0] == 7 and rows.sum() == 7


@pytest.mark.parametrize("op", OPS + LOSSES)
@pytest.mark.parametrize("dtype", ROWS)
def test_operation(op, dtype):
    for shape, axis in ROWS[dtype]:
        check(Case(op, dtype, shape, axis))


@pytest.mark.parametrize("op", OPS[:3])
def test_options(op):
    check(Case(op, "float32", (3, 70), temperature=0.7, masked=True))
    check(Case(op, "float64", (3, 20, 2), axis=1, temperature=0.7, masked=True, spread=30.0))


def rows_that_are_hard():
    """Rows that lose digits elsewhere: confident ones, ties, a large common offset, a maximum that rises from tile to tile,
    also by more than float32 has room for."""
    x = np.zeros((6, 200), np.float32)
    x[0, 7] = 18
    x[1, ::3] = 4.25
    x[2] = 1e8 + 8 * np.arange(200) % 56
    x[3] = np.linspace(-60, 40, 200)
    x[4] = np.linspace(0, 1, 200) ** 2
    x[5, -1] = 92
    return x


@pytest.mark.parametrize("op", OPS[:3])
def test_hard_rows(op):
    x = rows_that_are_hard()
    expected, scale = oracle(op, x)
    assert ulp_error(on_gpu(getattr(pylogits, op), x), expected, scale) <= promised(op, x.dtype)


def test_confident_row():
    row = np.array([[15] + [0] * 9], np.float32)
    loss = on_gpu(pylogits.sparse_softmax_cross_entropy_with_logits, labels=np.array([0]), logits=row)
    assert ulp_error(loss, np.array([2.75311709e-06], np.longdouble), loss) <= 1


def test_a_rows_bits_do_not_depend_on_its_batch():
    x = np.random.default_rng(0).standard_normal((5, 61)).astype(np.float32)
    whole, loss, grad = on_gpu(lambda x: (pylogits.softmax(x), *value_and_grad(x, to_gpu(np.arange(5)), reduction="none")), x)
    for i in (0, 4):
        np.testing.assert_array_equal(on_gpu(pylogits.softmax, x[i : i + 1]), whole[i : i + 1])
        one = on_gpu(value_and_grad, x[i : i + 1], np.array([i]), reduction="none")
        np.testing.assert_array_equal(one[0], loss[i : i + 1])
        np.testing.assert_array_equal(one[1], grad[i : i + 1])


# ---- losses ----

value_and_grad = pylogits.cross_entropy_value_and_grad


def every_option(rng, rows, classes, targets, dtype):
    where = rng.random((rows, classes)) < 0.8
    if targets.ndim == 1:
        where[np.arange(rows), targets % classes] = True
    return {
        "weight": rng.random(classes).astype(dtype),
        "label_smoothing": 0.1,
        "z_loss": 0.01,
        "softcap": 5.0,
        "temperature": 0.7,
        "where": where,
        "sample_weight": rng.random(rows).astype(dtype),
    }


def problems():
    rng = np.random.default_rng(1)
    for option in ("plain", "weight", "label_smoothing", "z_loss", "softcap", "temperature", "where", "sample_weight", "all"):
        for soft in (False, True):
            for dtype in (np.float32, np.float64) if option in ("weight", "all") else (np.float32,):
                rows, classes = (3, 11) if option != "all" else (2, 70)
                targets = rng.random((rows, classes)).astype(dtype) if soft else rng.integers(classes, size=rows)
                every = every_option(rng, rows, classes, targets, dtype)
                options = every if option == "all" else {option: every[option]} if option in every else {}
                x = (rng.standard_normal((rows, classes)) * 3).astype(dtype)
                yield pytest.param(x, targets, options, id=f"{option}-{'soft' if soft else 'hard'}-{dtype.__name__}")


@pytest.mark.parametrize(("x", "targets", "options"), list(problems()))
def test_cross_entropy(x, targets, options):
    for reduction in ("none", "mean"):
        loss, grad = on_gpu(value_and_grad, x, targets, reduction=reduction, **options)
        expected, slopes = reference(value_and_grad, x, targets, reduction=reduction, **options)
        eps = np.finfo(x.dtype).eps
        assert loss.shape == expected.shape and loss.dtype == expected.dtype
        np.testing.assert_allclose(loss, expected, rtol=6 * eps)
        np.testing.assert_allclose(grad, slopes, rtol=4 * eps, atol=4 * eps * abs(slopes).max())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_halves_are_float32_rounded_once(dtype):
    rng = np.random.default_rng(2)
    x, targets = rng.standard_normal((4, 21)).astype(dtype_of(dtype)), rng.integers(21, size=4)
    loss, grad = on_gpu(value_and_grad, x, targets)
    expected, slopes = on_gpu(value_and_grad, x.astype(np.float32), targets)
    assert loss == expected and loss.dtype == np.float32
    np.testing.assert_array_equal(grad, slopes.astype(x.dtype))


def test_ignored_rows_and_their_mean():
    x = np.array([[np.nan, np.inf, 0], [0.5, 1.5, 0.1], [-np.inf] * 3, [2.2, 1.3, 1.7]], np.float32)
    targets = np.array([7, 1, 7, 2], np.uint8)
    loss, grad = on_gpu(value_and_grad, x, targets, ignore_index=7)
    np.testing.assert_allclose(loss, 0.8393433, rtol=1e-6)
    np.testing.assert_array_equal(grad[::2], 0)
    np.testing.assert_allclose(grad[1], [0.1139314, -0.1903021, 0.0763706], rtol=1e-5)


@pytest.mark.parametrize("reduction", ["sum", "sum_over_batch_size", "sum_by_nonzero_weights", "mean"])
def test_reductions(reduction):
    rng = np.random.default_rng(7)
    x, targets = rng.standard_normal((20, 5)).astype(np.float32), rng.integers(5, size=20).astype(np.int32)
    options = {"sample_weight": np.arange(20, dtype=np.float32) % 3, "weight": rng.random(5).astype(np.float32)}
    loss, grad = on_gpu(value_and_grad, x, targets, ignore_index=2, reduction=reduction, **options)
    expected, slopes = reference(value_and_grad, x, targets, ignore_index=2, reduction=reduction, **options)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_allclose(grad, slopes, rtol=1e-6, atol=1e-7)


def test_strided_loss():
    rng = np.random.default_rng(3)
    x, targets = rng.standard_normal((2, 19, 5)).astype(np.float32), rng.integers(19, size=(2, 5))
    loss, grad = on_gpu(value_and_grad, x, targets, axis=1, loss_grad=np.float32([2.0]).reshape(()))
    expected, slopes = reference(value_and_grad, x, targets, axis=1, loss_grad=2.0)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_allclose(grad, slopes, rtol=1e-5, atol=1e-8)


def test_infinities():
    x = np.array([[np.nan, 0, 0], [np.inf, 0, 0], [-np.inf, 0, 0], [-np.inf] * 3], np.float32)
    losses, grad = on_gpu(value_and_grad, x, np.array([1, 1, 0, 0]), reduction="none")
    np.testing.assert_array_equal(losses, [np.nan, np.nan, np.inf, np.nan])
    assert np.isnan(grad[[0, 1, 3]]).all()
    np.testing.assert_array_equal(grad[2], [-1, 0.5, 0.5])
    np.testing.assert_array_equal(on_gpu(pylogits.logsumexp, x), reference(pylogits.logsumexp, x))
    np.testing.assert_array_equal(on_gpu(pylogits.softmax, x), reference(pylogits.softmax, x))


def test_fully_masked_rows():
    x = np.array([[0.5, np.nan], [1.0, 1.0]], np.float32)
    where = np.array([[False, False], [True, True]])
    np.testing.assert_array_equal(on_gpu(pylogits.softmax, x, where=where), [[0, 0], [0.5, 0.5]])
    losses, grad = on_gpu(value_and_grad, x, np.array([0, 1]), where=where, reduction="none")
    np.testing.assert_array_equal(losses, np.float32([0, np.log(2)]))
    np.testing.assert_array_equal(grad, [[0, 0], [0.5, -0.5]])


def test_gradients_near_the_smallest_normal_number():
    x = np.concatenate([[0], np.linspace(-87.3, -84, 399)]).astype(np.float32)[None]
    _, grad = on_gpu(value_and_grad, x, np.array([0]), reduction="none")
    terms = np.exp(x.astype(np.longdouble))
    expected = (terms / terms.sum())[:, 1:]
    assert ulp_error(grad[:, 1:], expected, expected) <= 2


# ---- gradients of results, scores ----


@pytest.mark.parametrize("op", ["softmax", "log_softmax"])
@pytest.mark.parametrize("shape", [(3, 30), (2, 70)])
def test_backward(op, shape):
    rng = np.random.default_rng(4)
    x, grad = rng.standard_normal((2, *shape)).astype(np.float32)
    result = getattr(pylogits, op)(x)
    backward = getattr(pylogits, f"{op}_backward")
    np.testing.assert_allclose(on_gpu(backward, grad, result), reference(backward, grad, result), rtol=3e-7, atol=1e-7)


@pytest.mark.parametrize("top_k", [1, 3, 20])  # the last is more than a tile of strided rows has
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize(("shape", "axis"), [((2, 40, 2), 1), ((3, 200), 1)])
def test_score(dtype, shape, axis, top_k):
    rng = np.random.default_rng(5)
    x = rng.integers(-4, 4, shape).astype(dtype_of(dtype))
    x[0, 5] = np.nan
    targets = rng.integers(40, size=np.delete(shape, axis))
    got = on_gpu(pylogits.score, x, targets, axis=axis, top_k=top_k, temperature=0.7)
    wide = x.astype(np.float64 if dtype == "float64" else np.float32)
    expected = reference(pylogits.score, wide, targets, axis=axis, top_k=top_k, temperature=0.7)
    for name, mine, theirs in zip(got._fields, got, expected, strict=True):
        assert mine.dtype == theirs.dtype
        np.testing.assert_allclose(mine, theirs, rtol=8 * np.finfo(wide.dtype).eps, err_msg=name)


# ---- checks ----


def errors(function, *args, **kwargs):
    """Return what a call raises on the CPU, and assert that it raises that on the GPU."""
    with pytest.raises((TypeError, ValueError)) as cpu:
        function(*args, **kwargs)
    with pytest.raises(cpu.type) as gpu:
        on_gpu(function, *args, **kwargs)
    assert str(gpu.value) == str(cpu.value)
    return str(gpu.value)


X = np.array([[0.5, 1.5, 0.1], [2.2, 1.3, 1.7]], np.float32)


def test_bad_labels_are_the_errors_of_the_cpu():
    labels = np.array([1, 7])
    assert errors(pylogits.sparse_softmax_cross_entropy_with_logits, labels=labels, logits=X).startswith(
        "label 7 at index (1,)"
    )
    errors(pylogits.selective_log_softmax, X, np.array([[0, 1], [-1, 2]]))
    errors(pylogits.score, X, np.array([2**63, 0], np.uint64))
    errors(pylogits.cross_entropy, X, labels, ignore_index=-100)
    errors(pylogits.cross_entropy, X, np.array([0, 2]), where=np.array([True, True, False]))
    errors(pylogits.cross_entropy, X, np.array([0, 2]), sample_weight=np.float32([1, np.inf]))
    errors(pylogits.cross_entropy, X, np.array([0, 2]), weight=np.float32([1, np.nan, 1]))
    errors(pylogits.cross_entropy, X, np.array([0, 1, 2]))
    errors(pylogits.softmax, X, temperature=0)


def test_nothing_is_written_where_a_label_is_bad():
    out, grad = cuda.to_device(np.full(2, 5, np.float32)), cuda.to_device(X)
    labels = cuda.to_device(np.array([1, 7]))
    with pytest.raises(ValueError, match="target 7"):
        value_and_grad(cuda.to_device(X), labels, reduction="none", out=out, grad_out=grad)
    np.testing.assert_array_equal(out.copy_to_host(), 5)
    np.testing.assert_array_equal(grad.copy_to_host(), X)


def test_deferred_checks():
    labels = cuda.to_device(np.array([1, 7]))
    reached = False
    with pytest.raises(ValueError, match=r"label 7 at index \(1,\)"), pylogits.deferred_checks():
        pylogits.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=cuda.to_device(X))
        reached = True
    assert reached


def test_the_mean_of_nothing():
    with pytest.warns(RuntimeWarning, match="mean of no losses"):
        loss, grad = on_gpu(value_and_grad, X, np.array([7, 7]), ignore_index=7)
    assert np.isnan(loss)
    np.testing.assert_array_equal(grad, 0)


def test_operands_lie_on_one_side():
    labels = np.array([0, 1])
    for give, take, place in ((to_gpu, np.asarray, "in main memory"), (np.asarray, to_gpu, "on a GPU")):
        with pytest.raises(TypeError, match=f"labels is {place}; "):
            pylogits.sparse_softmax_cross_entropy_with_logits(labels=take(labels), logits=give(X))
        with pytest.raises(TypeError, match=f"out is {place}; "):
            pylogits.softmax(give(X), out=take(X))


# ---- arrays ----


def test_out_and_in_place():
    given = cuda.to_device(X)
    assert pylogits.softmax(given, out=given) is given
    expected, scale = oracle("softmax", X)
    assert ulp_error(given.copy_to_host(), expected, scale) <= 2
    overlapping = cuda.to_device(np.zeros(7, np.float32))
    with pytest.raises(ValueError, match="out overlaps"):
        pylogits.softmax(overlapping[:6].reshape(2, 3), out=overlapping[1:].reshape(2, 3))


def test_views():
    x = np.random.default_rng(6).standard_normal((4, 24)).astype(np.float32)
    view = cuda.to_device(x)[1:, ::2]
    np.testing.assert_allclose(to_host(pylogits.softmax(view)), pylogits.softmax(x[1:, ::2]), rtol=3e-7)
    memory = cuda.to_device(x.reshape(-1))
    for start in (1, 3):  # rows of every alignment
        rows = memory[start : start + 60].reshape(4, 15)
        np.testing.assert_allclose(
            to_host(pylogits.softmax(rows)), pylogits.softmax(x.reshape(-1)[start : start + 60].reshape(4, 15)), rtol=3e-7
        )
    scalar = pylogits.logsumexp(cuda.to_device(x), axis=None)
    assert scalar.shape == ()
    np.testing.assert_allclose(to_host(scalar), pylogits.logsumexp(x, axis=None), rtol=3e-7)
    with pytest.raises(ValueError, match="strides that have rows"):
        pylogits.softmax(cuda.to_device(np.zeros((2, 3, 4), np.float32)), axis=(0, 2))


class OfALibrary:
    """An array of a library that allocates, on the GPU number 0 and on its own stream."""

    device = SimpleNamespace(id=0)

    def __init__(self, array):
        self.array = array
        self.__cuda_array_interface__ = {**array.__array_interface__, "version": 3, "stream": 7}

    def __array_namespace__(self, api_version=None):
        return OfALibrary

    float32, int32, float64 = np.float32, np.int32, np.float64

    @staticmethod
    def empty(shape, *, dtype, device):
        assert device is OfALibrary.device
        return OfALibrary(np.empty(shape, dtype))


def test_results_come_from_the_library_and_by_way_of_its_stream(monkeypatch):
    if not SIMULATED:
        pytest.skip("the simulator takes memory of the CPU for that of a GPU")
    streams = []

    def launch(kernel, stream, *rest):
        streams.append(stream)
        cuda_simulator.launch(kernel, stream, *rest)

    monkeypatch.setattr(_launch, "launch", launch)
    loss, grad = value_and_grad(OfALibrary(X), OfALibrary(np.array([1, 2])))
    assert isinstance(loss, OfALibrary) and isinstance(grad, OfALibrary)
    np.testing.assert_allclose(loss.array, 0.8393433, rtol=1e-6)
    np.testing.assert_allclose(grad.array, [[0.1139314, -0.1903021, 0.0763706], [0.2483731, 0.1009809, -0.349354]], rtol=1e-5)
    assert set(streams) == {7}


def test_rows_that_are_all_the_same_memory():
    if not SIMULATED:
        pytest.skip("test_gpu.py has it with tensors")
    x = np.random.default_rng(8).standard_normal((2, 40, 1)).astype(np.float32)
    wide = np.broadcast_to(x, (2, 40, 3))
    np.testing.assert_allclose(pylogits.logsumexp(OfALibrary(wide), axis=1).array, pylogits.logsumexp(wide, axis=1), rtol=3e-7)


def test_empty():
    x, labels = np.empty((0, 3), np.float32), np.empty(0, np.int64)
    assert on_gpu(value_and_grad, x, labels, reduction="sum")[0] == 0
    assert on_gpu(pylogits.sparse_softmax_cross_entropy_with_logits, labels=labels, logits=x).shape == (0,)
    with pytest.warns(RuntimeWarning, match="mean of no losses"):
        assert np.isnan(on_gpu(pylogits.cross_entropy, x, labels))
    assert on_gpu(pylogits.softmax, np.empty((0, 3), np.float32)).shape == (0, 3)
    np.testing.assert_array_equal(on_gpu(pylogits.logsumexp, np.empty((2, 0), np.float32)), [-np.inf, -np.inf])
