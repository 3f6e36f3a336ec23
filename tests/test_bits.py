"""One row, one answer: a row's bits come from the row alone.

The bits that a row must have are those that scalar C code makes of it alone. Every backend and instruction set has to make
the same, wherever the row lies.
"""

from functools import cache

import numpy as np
import pytest
from cases import LAYOUTS, OPS, dtype_of, lay_out
from conftest import BACKENDS

import pylogits
from pylogits import Scores
from pylogits.scoring import score_with_brier

pytestmark = pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"], indirect=True)

ALL_OPS = (*OPS, "score")
FULL_OPS = ("softmax", "log_softmax")  # the result is as large as the logits
CLASSES = (1, 3, 10, 33, 100, 200, 1000, 4096, 4097, 9001)
COUNTS = (1, 2, 3, 15, 16, 17, 64, 257, 4097)
ELEMENTS = 200_000  # of a batch at most, but for threads

# From a maximum of 512 (float32) or 4096 (float64) on, a row is moved towards zero first; a batch can hold both kinds. Where
# the offset changes along a row, the maxima of its blocks are far apart.
OFFSETS = {
    "near": ([0], [0]),
    "300": ([300], [300]),
    "5000": ([5000], [5000]),
    "mixed": ([0, 300, -5000, 0, 5000, 0, -300], [0, 300, -5000, 70, 5000, -1000, -300]),
}

# Rows that are drawn, and repeated to make a batch. Tiles have 8 or 16 rows: each of 7 comes to lie everywhere in them.
DISTINCT = 7

# The shape of the rows, and the axis that the classes then get.
ARRANGEMENTS = {
    "last axis": (lambda count: (count,), -1),
    "first axis": (lambda count: (count,), 0),
    "middle axis": (lambda count: (2, count // 2), 1),
}


@pytest.fixture(autouse=True)
def one_thread():
    threads = pylogits.get_num_threads()
    pylogits.set_num_threads(1)
    yield
    pylogits.set_num_threads(threads)


def draw(op, classes, dtype, offsets):
    """Return the arguments for DISTINCT rows: all arrays, the row first."""
    rng = np.random.default_rng(classes)
    start, end = np.resize(offsets[0], DISTINCT), np.resize(offsets[1], DISTINCT)
    logits = rng.standard_normal((DISTINCT, classes)) * 5 + np.linspace(start, end, classes, axis=1)
    arguments = {"logits": logits.astype(dtype)}
    if op == "softmax_cross_entropy_with_logits":
        arguments["labels"] = rng.random((DISTINCT, classes)).astype(dtype)
    elif op == "sparse_softmax_cross_entropy_with_logits":
        arguments["labels"] = rng.integers(classes, size=DISTINCT)
    elif op == "selective_log_softmax":
        arguments["indices"] = rng.integers(classes, size=(DISTINCT, 3))
    elif op == "score":
        arguments["targets"] = rng.integers(classes, size=DISTINCT)
    return arguments


def run(op, arguments, **options):
    """Return all results of a call: one array, or the fields of Scores."""
    if op == "score":
        axis = options.get("axis", -1)
        scores, brier = score_with_brier(*arguments.values(), axis, min(3, arguments["logits"].shape[axis]), 1.0)
        return *scores, brier
    return (getattr(pylogits, op)(**arguments, **options),)


@cache
def given_and_expected(op, classes, dtype, offsets):
    """Return the rows drawn, and the results of each by scalar C code alone."""
    simd = pytest.importorskip("pylogits._simd")
    arguments = draw(op, classes, dtype, OFFSETS[offsets])
    isa = simd.isa()
    simd.use_isa("scalar")
    with pylogits.use_backend("c"):
        rows = [run(op, {name: value[i : i + 1] for name, value in arguments.items()}) for i in range(DISTINCT)]
    simd.use_isa(isa)
    return arguments, [np.concatenate(parts) for parts in zip(*rows, strict=True)]


def arrange(array, shape, axis):
    """Return an array of rows with the rows in this shape and the classes, if it has any, at this axis."""
    array = array.reshape(*shape, *array.shape[1:])
    return np.ascontiguousarray(np.moveaxis(array, -1, axis)) if array.ndim > len(shape) else array


def rearrange(array, shape, axis):
    """Return the array of rows that `arrange` was given."""
    if array.ndim > len(shape):
        return np.moveaxis(array, axis, -1).reshape(-1, array.shape[axis])
    return array.reshape(-1)


def place(array, layout):
    """Return an array in a memory layout of `lay_out`, or as a part of a wider array of NaN."""
    wider = {"every second": (2, np.s_[..., ::2]), "one off": (1, np.s_[..., 1:])}
    if layout not in wider:
        return lay_out(array, layout)
    factor, part = wider[layout]
    *shape, last = array.shape
    view = np.full((*shape, last * factor + (layout == "one off")), np.nan, array.dtype)[part]
    view[...] = array
    return view


def check(op, classes, dtype, offsets, count, arrangement="last axis", layout="contiguous", start=0, out=None):
    """Run a batch, which starts with row `start` of those drawn, and compare each of its rows."""
    given, expected = given_and_expected(op, classes, dtype, offsets)
    rows = (start + np.arange(count)) % DISTINCT
    shape, axis = ARRANGEMENTS[arrangement]
    shape = shape(count)
    arguments = {name: arrange(value[rows], shape, axis) for name, value in given.items()}
    for name in ("logits", "labels"):
        if name in arguments and arguments[name].dtype == dtype:
            arguments[name] = place(arguments[name], layout)
    options = {}
    if out == "in place":
        options["out"] = arguments["logits"]
    elif out == "elsewhere":
        options["out"] = place(np.zeros_like(arguments["logits"], dtype), layout)
    results = run(op, arguments, axis=axis, **options)
    for i, (result, wanted) in enumerate(zip(results, expected, strict=True)):
        result = rearrange(np.asarray(result), shape, axis)
        assert result.dtype == wanted.dtype
        bits = f"u{wanted.itemsize}"
        same = np.ascontiguousarray(result).view(bits) == wanted[rows].view(bits)
        if not same.all():
            where = [int(n) for n in np.argwhere(~same)[0]]
            field = (*Scores._fields, "brier")[i] if op == "score" else op
            pytest.fail(
                f"{field} of {count} x {classes} {offsets}, {arrangement}, {layout}, out {out}, from row {start}: "
                f"{(~same).sum()} differ, first at {where}: {result[*where]!r}, not {wanted[rows][*where]!r}"
            )


@pytest.mark.parametrize("offsets", OFFSETS)
@pytest.mark.parametrize("op", ALL_OPS)
def test_batch_and_position(op, backend, dtype, offsets):
    for classes in CLASSES:
        for count in COUNTS:
            if count * classes <= ELEMENTS:
                for start in range(DISTINCT) if count <= 3 else [0]:
                    check(op, classes, dtype, offsets, count, start=start)
                check(op, classes, dtype, offsets, count, "first axis")


@pytest.mark.parametrize("op", ALL_OPS)
def test_threads(op, backend, dtype):
    for count, classes in ((1, 300_001), (3, 100_003), (17, 9001), (257, 1000), (4097, 100), (20_001, 10)):
        for threads in (1, 2, 3, 7):
            pylogits.set_num_threads(threads)
            check(op, classes, dtype, "mixed", count)
            if threads == 2:
                check(op, classes, dtype, "mixed", count, "first axis")


@pytest.mark.parametrize(("classes", "layout"), [(1000, "contiguous"), (9001, "one off")])
@pytest.mark.parametrize("op", FULL_OPS)
def test_streamed(op, backend, dtype, classes, layout):
    """Results of 32 MiB and more bypass the caches, in whole vectors where they lie at multiples of one."""
    count = (33 << 20) // (classes * dtype.itemsize)
    check(op, classes, dtype, "mixed", count, layout=layout, out="elsewhere")


@pytest.mark.parametrize("layout", [*(name for name in LAYOUTS if name != "broadcast"), "every second", "one off"])
@pytest.mark.parametrize("op", ALL_OPS)
def test_layout(op, backend, layout, dtype):
    outs = [None]
    if op in FULL_OPS:
        outs += ["elsewhere", "in place"]
        if layout == "byteswapped":
            outs = outs[:1]
    for classes in CLASSES:
        count = 70 if classes <= 1000 else 14
        for arrangement in ARRANGEMENTS:
            for out in outs:
                check(op, classes, dtype, "mixed", count, arrangement, layout, out=out)


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
@pytest.mark.parametrize("op", OPS)
def test_half_precision_rounds_the_same_bits(op, backend, half):
    for classes in CLASSES:
        arguments = draw(op, classes, dtype_of(half), ([0, 300], [0, 300]))
        (expected,) = run(op, {**arguments, "logits": arguments["logits"].astype(np.float32)})
        (result,) = run(op, arguments)
        assert result.tobytes() == expected.astype(result.dtype).tobytes()


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
def test_every_number_in_half_precision(backend, half):
    """In short rows, which are converted together."""
    every = np.arange(1 << 16, dtype=np.uint16).view(dtype_of(half))
    rows = np.zeros((every.size, 17), every.dtype)
    rows[:, 16] = every
    for function in (pylogits.softmax, pylogits.log_softmax):
        expected = function(rows.astype(np.float32)).astype(every.dtype)
        np.testing.assert_array_equal(function(rows).astype(np.float32), expected.astype(np.float32))


@pytest.mark.parametrize("classes", [1, 8, 200, 5000])
def test_a_temperature_whose_inverse_overflows(classes, backend, dtype):
    """Rows go by different ways, alone and in numbers."""
    temperature = float(np.finfo(dtype).smallest_subnormal)
    x = np.tile(np.resize(np.array([1.0, 0.0, -1.0, 0.5], dtype), classes), (33, 1))
    for function in (pylogits.softmax, pylogits.log_softmax, pylogits.logsumexp):
        together = function(x, temperature=temperature)
        np.testing.assert_array_equal(together[0], function(x[0], temperature=temperature))
    share = dtype.type(1) / dtype.type((x[0] == 1).sum())
    np.testing.assert_array_equal(pylogits.softmax(x, temperature=temperature), np.where(x == 1, share, 0))


def test_zeros_have_one_sign(backend, dtype):
    """A label of weight 0: GCC made one operation of a negated multiply-add, whose zero was of the other sign."""
    logits = np.zeros((16, 3), dtype)
    logits[:, 0] = 10_000
    options = {"weight": np.array([1, 0, 1], dtype), "z_loss": 0.1, "loss_grad": -1.0, "reduction": "sum"}
    for rows in (1, 3, 16):
        _, grad = pylogits.cross_entropy_value_and_grad(logits[:rows], np.ones(rows, int), **options)
        np.testing.assert_array_equal(np.signbit(grad), [[True, False, True]] * rows)


def test_zeros_of_targets_have_one_sign(backend, dtype):
    """A target of 0, whose class has a negative weight: rows by themselves had another zero than many together."""
    logits = np.zeros((16, 3), dtype)
    logits[:, 1] = -np.inf
    targets = np.array([[0.5, 0, 0.5]], dtype).repeat(16, 0)
    weight = np.array([1, -1, 1], dtype)
    for upstream in (1, -1):
        grads = [
            pylogits.cross_entropy_value_and_grad(
                logits[:rows], targets[:rows], weight=weight, loss_grad=np.full(rows, upstream, dtype), reduction="none"
            )[1][0]
            for rows in (1, 3, 16)
        ]
        for grad in grads:
            np.testing.assert_array_equal(np.signbit(grad), np.signbit(grads[-1]))
