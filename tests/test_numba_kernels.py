"""What is particular to the Numba backend: C's bits, its twins, its cache, threads and forks."""

import platform
import re
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("numba")

import llvmlite.binding
import numba
from cases import dtype_of
from numba import float32, njit
from pylogits.kernels import cpu

import pylogits
from pylogits._reference import LossOptions, Scores

SHAPES = [
    (1, 1, 1),
    (33, 10, 1),
    (5, 33, 1),
    (19, 100, 1),
    (3, 1000, 1),
    (2, 9001, 1),
    (2, 100, 37),
    (1, 1100, 9),
]


def draw(shape, dtype, kind):
    rng = np.random.default_rng(shape[1])
    logits = (rng.standard_normal(shape) * 8).astype(dtype)
    if kind == "special":
        for value in (np.nan, np.inf, -np.inf, -0.0):
            logits[rng.random(shape) < 0.3 / shape[1]] = value
        logits[0] = -np.inf
    if kind == "ties":
        logits = np.round(logits)
    if kind == "strided":
        logits = np.asfortranarray(logits)[:, ::-1]
    return logits


def new_scores(shape, dtype, top_k):
    rows = shape[0], shape[2]
    return Scores(
        prediction=np.empty(rows, np.int64),
        confidence=np.empty(rows, dtype),
        entropy=np.empty(rows, dtype),
        logsumexp=np.empty(rows, dtype),
        top_k_indices=np.empty((*rows, top_k), np.int64),
        top_k_probabilities=np.empty((*rows, top_k), dtype),
        loss=np.empty(rows, dtype),
        correct=np.empty(rows, np.bool_),
    )


def everything(backend, logits, threads):
    """Return all that a backend makes of these logits, by name."""
    rng = np.random.default_rng(0)
    shape, dtype = logits.shape, logits.dtype
    rows = shape[0], shape[2]
    where = rng.random(shape) < 0.7
    indices = rng.integers(shape[1], size=(shape[0], 3, shape[2]))
    labels = rng.integers(shape[1], size=rows)
    soft = rng.random(shape).astype(dtype) * (rng.random(shape) < 0.5)
    results = {}
    for temperature in (1.0, 0.7):
        for mask in (None, where):
            for name in ("softmax", "log_softmax", "logsumexp"):
                out = np.empty(rows if name == "logsumexp" else shape, dtype)
                getattr(backend, name)(logits, mask, temperature, out, threads)
                results[name, temperature, mask is None] = out
        out = np.empty(indices.shape, dtype)
        assert backend.selective_log_softmax(logits, indices, temperature, out, threads) == -1
        results["selective", temperature] = out
        for top_k in {1, min(3, shape[1])}:
            scores, brier = new_scores(shape, dtype, top_k), np.empty(rows, dtype)
            assert backend.score(logits, labels, temperature, scores, threads, brier) == -1
            fields = scores._asdict() | {"brier": brier}
            results |= {(name, temperature, top_k): array for name, array in fields.items()}
    results["dense"] = np.empty(rows, dtype)
    backend.softmax_cross_entropy_with_logits(logits, soft, results["dense"], threads)
    out = results["sparse"] = np.empty(rows, dtype)
    assert backend.sparse_softmax_cross_entropy_with_logits(logits, labels, out, threads) == -1
    return results


def same_bits(got, expected):
    for name, array in expected.items():
        if array.dtype.kind != "f":
            np.testing.assert_array_equal(got[name], array, err_msg=str(name))
            continue
        bits = f"u{array.itemsize}"
        equal = (got[name].view(bits) == array.view(bits)) | (np.isnan(got[name]) & np.isnan(array))
        assert equal.all(), name


@pytest.mark.parametrize("kind", ["normal", "special", "ties", "strided"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_of_c(shape, kind, dtype):
    simd = pytest.importorskip("pylogits._simd")
    logits = draw(shape, dtype, kind)
    expected = everything(simd, logits, threads=1)
    same_bits(everything(cpu, logits, threads=1), expected)


OPTIONS = {
    "softcap": {"softcap": 5.0, "temperature": 0.7},
    "smoothing": {"label_smoothing": 0.1, "z_loss": 0.01},
    "one": {"label_smoothing": 1.0},
    "weight": {"weight": True},
    "ignore": {"ignore_index": 0},
    "all": {"weight": True, "softcap": 1e30, "temperature": 3.0, "label_smoothing": 0.01, "z_loss": -1.0, "scale": (0.3, 0.0)},
}


def losses_and_slopes(backend, logits, options, threads=1):
    """Return the losses and gradients of these logits, from labels and from probabilities, with a mask and without."""
    rng = np.random.default_rng(1)
    shape, dtype = logits.shape, logits.dtype
    rows = shape[0], shape[2]
    options = dict(options)
    if "weight" in options:
        options["weight"] = rng.standard_normal(shape[1]).astype(dtype)
    options = LossOptions(**options)
    labels = rng.integers(shape[1], size=rows)
    soft = rng.random(shape).astype(dtype) * (rng.random(shape) < 0.5)
    where = rng.random(shape) < 0.7
    np.put_along_axis(where, labels[:, None], True, axis=1)
    where[-1] = False
    per_row = rng.random(rows).astype(dtype), -rng.random(rows).astype(dtype)
    results = {}
    for hard in (True, False) if options.ignore_index is None else (True,):
        targets = (None, labels) if hard else (soft, None)
        for mask, weights in ((None, per_row), (where, (None, None)), (None, (None, None))):
            for kind in ("value", "grad", "in place"):
                x, out = logits.copy(order="K"), np.empty(rows, dtype)
                grad = {"value": None, "grad": np.empty(shape, dtype), "in place": x}[kind]
                assert backend.cross_entropy(x, mask, *targets, *weights, grad, out, options, threads) == -1
                name = hard, mask is None, weights[0] is None, kind
                results[name] = out
                if grad is not None:
                    results[*name, "slopes"] = grad
    return results


BY_ROW = [(3, 1, 1), (3, 33, 1), (29, 130, 1), (1, 129, 3), (3, 1000, 1), (2, 4096, 1), (1, 9001, 2)]
BY_TILE = [(37, 1, 1), (21, 10, 1), (16, 70, 1), (1, 100, 41)]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", ["normal", "special", "strided"])
@pytest.mark.parametrize("shape", BY_ROW + BY_TILE, ids=str)
def test_losses_of_c(shape, kind, options, dtype):
    simd = pytest.importorskip("pylogits._simd")
    logits = draw(shape, dtype, kind)
    expected = losses_and_slopes(simd, logits, options)
    same_bits(losses_and_slopes(cpu, logits, options), expected)
    same_bits(losses_and_slopes(cpu, logits, options, threads=2), expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_slopes_of_c(shape, dtype):
    simd = pytest.importorskip("pylogits._simd")
    logits, grad = draw(shape, dtype, "normal"), draw(shape, dtype, "strided")
    for name in ("softmax", "log_softmax"):
        forward = np.empty_like(logits)
        getattr(simd, name)(logits, None, 1.0, forward, 1)
        expected = np.empty_like(logits)
        getattr(simd, name + "_backward")(forward, grad, expected, 1)
        for threads in (1, 2):
            out = forward.copy()
            getattr(cpu, name + "_backward")(out, grad, out, threads)
            same_bits({name: out}, {name: expected})


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_twins(shape, dtype):
    logits = draw(shape, dtype, "special")
    same_bits(everything(cpu, logits, threads=2), everything(cpu, logits, threads=1))


def test_in_place_and_read_only(dtype):
    logits = draw((4, 50, 1), dtype, "normal")
    expected = np.empty_like(logits)
    logits.flags.writeable = False
    cpu.softmax(logits, None, 1.0, expected, 1)
    out = logits.copy()
    cpu.softmax(out, None, 1.0, out, 1)
    assert out.tobytes() == expected.tobytes()


def test_first_bad_label(dtype):
    logits = draw((4, 5, 3), dtype, "normal")
    labels = np.zeros((4, 3), np.int64)
    labels[1, 2], labels[3, 0] = 5, -1
    out = np.full((4, 3), 7, dtype)
    assert cpu.sparse_softmax_cross_entropy_with_logits(logits, labels, out, 2) == 5
    assert (out == 7).all()


def test_constants_of_c():
    source = (Path(__file__).parents[1] / "c" / "kernel.c").read_text()
    literals = re.findall(r"0x[0-9a-f.]+p[+-]\d+", source)
    in_c = {abs(float.fromhex(text)) for text in literals} | {0.5}
    for constants in (cpu._F32, cpu._F64):
        numbers = (constants.log2_e, constants.ln2_hi, constants.ln2_lo, *constants.exp_tail)
        assert {abs(float(number)) for number in numbers} <= in_c


def test_vectorised():
    kernel = njit(**cpu.OPTIONS)(cpu.logsumexp_pieces)
    kernel.compile(cpu._signature(cpu.logsumexp_pieces, float32))
    (assembly,) = kernel.inspect_asm().values()
    if "xmm" not in assembly:
        pytest.skip("not an x86-64 machine")
    if "vfmadd" not in assembly:
        pytest.skip("this machine has no AVX2")
    assert re.search(r"vfmadd\w+ps\s.*%[yz]mm", assembly)


LOGSUMEXP = """
import sys
import numpy as np
from pylogits.kernels import cpu
logits = np.arange(80, dtype=sys.argv[1] if sys.argv[1:] else "f4").reshape(8, 10, 1) % 7
def run(threads):
    out = np.empty((8, 1), logits.dtype)
    cpu.logsumexp(logits, None, 1.0, out, threads)
    return out
expected = np.log(np.exp(logits).sum(1))
def check(threads=1):
    np.testing.assert_allclose(run(threads), expected, rtol=1e-5)
"""


def files(directory):
    return {path: path.stat().st_mtime_ns for path in directory.rglob("*.nbc")}


@pytest.mark.parametrize("damage", ["none", "truncated", "flipped", "garbage", "directory"])
def test_cache(damage, python, tmp_path):
    def run():
        done = python(LOGSUMEXP + "check()", NUMBA_CACHE_DIR=str(tmp_path))
        assert done.returncode == 0, done.stderr
        assert not done.stderr

    run()
    before = files(tmp_path)
    assert len(before) == 1
    (path,) = before
    data = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "flipped":
        path.write_bytes(bytes([*data[: len(data) // 2], data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :])
    elif damage == "garbage":
        path.write_bytes(b"garbage")
    elif damage == "directory":
        path.unlink()
        path.mkdir()
    run()
    if damage == "none":
        assert files(tmp_path) == before
    elif damage != "directory":
        assert path.stat().st_size == len(data)


def test_cache_that_cannot_be_written(python, tmp_path):
    code = """
import errno
def fail(*arguments):
    raise OSError(errno.ENOSPC, "no space left on device")
cpu._CacheFile.save = fail
check()
"""
    done = python(LOGSUMEXP + code, NUMBA_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert not files(tmp_path)


def test_no_cache_directory(python):
    code = """
import numba.core.caching
numba.core.caching.CacheImpl._locator_classes = []
check()
"""
    done = python(LOGSUMEXP + code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("layer", ["workqueue", "omp", "tbb"])
def test_threads_and_fork(layer, python):
    """With any of Numba's layers; one that is not installed is never launched."""
    code = """
import os
import numba
from contextlib import suppress
from concurrent.futures import ThreadPoolExecutor
check(2)
with suppress(ValueError):  # not installed
    assert numba.threading_layer() == LAYER
with ThreadPoolExecutor(8) as pool:
    for result in [pool.submit(check, 2) for _ in range(400)]:
        result.result()
child = os.fork()
if child == 0:
    check(1)  # as many as the dispatcher gives there
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
check(2)
"""
    done = python(f"LAYER = {layer!r}\n" + LOGSUMEXP + code, NUMBA_THREADING_LAYER=layer, NUMBA_NUM_THREADS="2")
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(platform.machine() != "x86_64", reason="reads x86-64 assembly")
@pytest.mark.parametrize(("dtype", "suffix"), [("float32", "ps"), ("float64", "pd")])
def test_the_exponential_is_computed_in_whole_registers(dtype, suffix):
    """Twelve fused multiply-adds and more, of 32 or 64 bytes; a kernel of single numbers would be ten times as slow."""
    features = llvmlite.binding.get_host_cpu_features()
    if not features.get("fma"):
        pytest.skip("this machine has no fused multiply-add")
    function = njit(**cpu.OPTIONS)(cpu.logsumexp_pieces)
    function.compile(cpu._signature(cpu.logsumexp_pieces, getattr(numba, dtype)))
    (assembly,) = function.inspect_asm().values()
    assert len(re.findall(rf"vfn?madd\d+{suffix}\s.*%[yz]mm", assembly)) >= 12
    assert not re.search(r"\bcall.*\bexpf?\b", assembly)


# ---- half precision ----


@njit
def convert(halves, numbers, widen, bfloat16):
    cpu.convert(halves, numbers, widen, bfloat16)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_converted_as_numpy_does(dtype):
    every = np.arange(1 << 16).astype(np.uint16).view(dtype_of(dtype))
    rng = np.random.default_rng(0)
    bits = rng.integers(1 << 32, size=1 << 20, dtype=np.uint32)
    near = rng.integers(0x33000000, 0x48000000, size=1 << 20, dtype=np.uint32)  # what is finite in float16
    ties = np.concatenate([near & ~np.uint32(0xFFF), bits & ~np.uint32(0x7FFF)])
    numbers = np.concatenate([bits, near, ties, ties + 1, ties - 1])
    with np.errstate(all="ignore"):
        wide, narrow = every.astype(np.float32), numbers.view(np.float32).astype(every.dtype)
    halves, room = np.empty(numbers.size, np.uint16), np.empty(every.size, np.uint32)
    convert(every.view(np.uint16), room, True, dtype == "bfloat16")
    np.testing.assert_array_equal(room, wide.view(np.uint32))
    convert(halves, numbers, False, dtype == "bfloat16")
    np.testing.assert_array_equal(halves, narrow.view(np.uint16))


def rows_of_halves(layout, axis):
    logits = np.random.default_rng(0).normal(size=(6, 40, 37)).astype(np.float16)
    labels = np.arange(logits.size // logits.shape[axis]).reshape(np.delete(logits.shape, axis)) % logits.shape[axis]
    return {
        "contiguous": logits,
        "reversed": logits[..., ::-1],
        "every other": np.repeat(logits, 2, -1)[..., ::2],
        "transposed": np.ascontiguousarray(logits.T).T,
        "byte-swapped": logits.astype(">f2"),
    }[layout], labels


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("layout", ["contiguous", "reversed", "every other", "transposed", "byte-swapped"])
def test_half_precision_of_any_layout(layout, axis):
    """More rows than are float32 at once."""
    logits, labels = rows_of_halves(layout, axis)
    single = logits.astype(np.float32)
    with pylogits.use_backend("numba"):
        wanted = pylogits.softmax(single, axis=axis)
        out = np.empty_like(logits, np.float16)
        pylogits.softmax(logits, axis=axis, out=out)
        np.testing.assert_array_equal(out, wanted.astype(np.float16))
        loss, grad = pylogits.cross_entropy_value_and_grad(logits, labels, axis=axis, reduction="none")
        wanted, slopes = pylogits.cross_entropy_value_and_grad(single, labels, axis=axis, reduction="none")
        np.testing.assert_array_equal(loss, wanted)
        np.testing.assert_array_equal(grad, slopes.astype(np.float16))
