"""Hostile arguments to every public function: refused alike by every backend, or answered like the reference.

The reference gets plain copies, in C order and native byte order and without `out`. So it judges what becomes of memory
layouts, too. PYLOGITS_FUZZ_EXAMPLES is the number of examples in all; if it is set, they are new ones in every run.
"""

import math
import os
import threading
import warnings
from itertools import cycle

import ml_dtypes
import numpy as np
import pytest
from cases import Case, lay_out, oracle, ulp_error
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

import pylogits
from pylogits import _problem, _rows, linear

PLAIN = ("softmax", "log_softmax", "logsumexp")
LOSSES = ("cross_entropy", "cross_entropy_value_and_grad")
LINEAR = ("linear_cross_entropy", "linear_cross_entropy_value_and_grad")
FUNCTIONS = (
    *PLAIN,
    "selective_log_softmax",
    "softmax_backward",
    "log_softmax_backward",
    "softmax_cross_entropy_with_logits",
    "sparse_softmax_cross_entropy_with_logits",
    *LOSSES,
    *LINEAR,
    "one_hot",
    "score",
    "check_logits",
)
EXAMPLES = int(os.environ.get("PYLOGITS_FUZZ_EXAMPLES", 10_000))
NUMBA_SHARE = 8  # one example in so many
fuzz = settings(
    deadline=None,
    database=None,
    report_multiple_bugs=False,
    derandomize="PYLOGITS_FUZZ_EXAMPLES" not in os.environ,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture
def small_parts(monkeypatch):
    """Small arrays, too, go a part at a time."""
    monkeypatch.setattr(_rows, "PIECE_BYTES", 256)
    monkeypatch.setattr(_problem, "ROWS_AT_A_TIME", 7)
    monkeypatch.setattr(linear, "TILE_BYTES", 4096)


# ---- hostile values ----

FLOATS = ("float32", "float64", "float16", "bfloat16", "longdouble")
INTEGERS = ("int64", "int32", "int8", "uint8", "uint16", "uint64", "int16", "uint32")
NO_NUMBERS = ("complex64", "object", "U3", "S2", "m8[s]", "M8[s]")
LAYOUTS = (
    "contiguous",
    "sliced",
    "reversed",
    "fortran",
    "permuted",
    "broadcast",
    "misaligned",
    "byteswapped",
    "read-only",
    "list",
)
OUT_LAYOUTS = ("contiguous", "sliced", "reversed", "fortran", "permuted", "misaligned")
NO_AXIS = (5, -6, 1.0, 0.5, "0", None, True, np.int8(0), np.array(0), (), (0,), (0, 0), (0, -1), (1.0,), [0], 2**70, b"")
NO_REAL = (0, 0.0, -1, -0.5, math.nan, math.inf, -math.inf, "1", None, True, 1j, 10**400, [1.0], np.ones(2), 1e-60, 1e60, b"1")
NO_INTEGER = (1.0, "1", 1j, [1], math.nan, True, np.float32(2), np.array([1, 2]), np.array(1))
NO_ARRAY = (None, "x", 1j, [[1, 2], [3]], {}, np.ma.masked_array([[1.0, 2.0]], [[True, False]]), np.zeros(2, [("a", float)]))
NO_OUT = ("list", "text", "number", "masked", "read-only", "longer", "another shape", "another dtype", "byteswapped")
SPECIAL = (math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, 5e-324, 1e-38, 1.5e38, -1.5e38, 8e307, -8e307, 1e8, 65504.0)
FAR = (-(2**63), -1, 2**31, 2**63 - 1, 2**64 - 1, -(2**31), 2**32)


def dtype_of(name):
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def plain(value):
    """Return a copy in C order and native byte order."""
    return np.array(value, value.dtype.newbyteorder("="), order="C") if type(value) is np.ndarray else value


class Maker:
    """Draws the arguments of a call: shapes and options from hypothesis, which makes them simple where a call fails; the rest,
    for half of the time, from a seed of its own."""

    def __init__(self, draw):
        self.draw = draw
        self.rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))

    def one_of(self, values):
        return values[self.rng.integers(len(values))]

    def once_in(self, count):
        return bool(self.rng.integers(count) == 0)

    def lay_out(self, array):
        """Return the array in another layout, or as a list."""
        layout = self.one_of(LAYOUTS)
        array = np.asarray(array)
        if layout == "list":
            return array.tolist()
        if layout == "read-only":
            array.flags.writeable = False
            return array
        if array.dtype.hasobject or array.dtype.kind in "mMSU" or (layout == "broadcast" and not array.ndim):
            return array
        return self.placed(array, layout)

    def placed(self, array, layout):
        if layout == "permuted":
            order = self.rng.permutation(array.ndim)
            return np.array(array.transpose(order), order="C").transpose(np.argsort(order))
        return lay_out(array, layout)

    def numbers(self, shape, dtype, greatest):
        """Return numbers of a dtype: usual ones, tied ones, of all sizes, or with special values among them."""
        dtype = dtype_of(dtype)
        values = self.rng.standard_normal(shape) * 3
        kind = self.one_of(("usual", "tied", "all sizes", "special"))
        if kind == "tied":
            values = np.round(values)
        elif kind == "all sizes":
            values = values * 10.0 ** self.rng.integers(-30, 30)
        elif kind == "special":
            values = np.where(self.rng.random(shape) < 0.2, self.rng.choice(SPECIAL, shape), values)
        if greatest == 0:
            values = -abs(values)
        if dtype.hasobject or dtype.kind in "mMSU":
            return np.zeros(shape, dtype)
        if dtype.kind in "iu":
            return (values if kind in ("usual", "tied") else self.rng.integers(0, 2**62, shape)).astype(np.int64).astype(dtype)
        with np.errstate(all="ignore"):
            return values.astype(dtype)

    def array(self, shape, dtypes=FLOATS, greatest=math.inf):
        """Return an array of numbers in any layout; seldom, of something else or of another shape."""
        if self.once_in(40):
            dtypes = NO_NUMBERS
        if self.once_in(40):
            return self.one_of(NO_ARRAY)
        if self.once_in(40):
            shape = self.another_shape(shape)
        return self.lay_out(self.numbers(shape, self.one_of(dtypes), greatest))

    def another_shape(self, shape):
        return self.one_of(((*shape, 1), (1, *shape), shape[1:], shape[:-1], (*shape[:-1], 4), (0,), ()))

    def shape(self):
        """Return a shape and its class axis."""
        if self.once_in(60):
            return self.one_of(((), (3, 3, 3, 3))), 0
        rows = self.draw(st.lists(st.sampled_from((1, 2, 3, 5, 9, 17, 0)), max_size=2))
        classes = self.draw(st.sampled_from((3, 1, 2, 10, 16, 17, 33, 65, 100, 0)))
        if self.once_in(150):  # of several blocks, or for several threads
            rows, classes = self.one_of((([2], 4100), ([331], 100), ([], 9000), ([70], 500)))
        number = int(self.rng.integers(0, len(rows) + 1))
        return (*rows[:number], classes, *rows[number:]), number

    def axis(self, shape, number, several=False):
        if self.once_in(30):
            return self.one_of(NO_AXIS)
        if several and shape and self.once_in(4):
            return self.one_of((None, tuple(range(len(shape))), (number,), (-1, 0)[: len(shape)]))
        return self.one_of((number, number - len(shape)))

    def labels(self, shape, classes):
        """Return class numbers; seldom, not all of them are."""
        dtype = np.dtype(self.one_of(INTEGERS))
        labels = self.rng.integers(0, max(1, min(classes, 127)), shape).astype(dtype)
        if labels.size and self.once_in(8):
            far = self.one_of((*FAR, classes))
            if np.iinfo(dtype).min <= far <= np.iinfo(dtype).max:
                labels.flat[self.rng.integers(labels.size)] = far
        if self.once_in(40):
            labels = labels.astype(self.one_of(("bool", "float32", "float64", *NO_NUMBERS[:4])))
        if self.once_in(40):
            return self.one_of(NO_ARRAY)
        if self.once_in(40):
            labels = np.zeros(self.another_shape(shape), dtype)
        return self.lay_out(labels)

    def real(self, valid):
        return self.one_of(NO_REAL) if self.once_in(15) else self.one_of(valid)

    def mask(self, shape):
        """Return a mask that broadcasts to a shape; seldom, something else."""
        if self.once_in(20):
            return self.one_of((1, "x", np.ones(2), np.ones((7, 7, 7, 7), bool), [True, False], 1.0, [[True], []][:1]))
        wide = tuple(1 if self.once_in(4) else size for size in shape)
        mask = self.rng.random(wide[self.one_of((0, 0, 0, 1)) :]) < self.one_of((0.9, 0.5, 0))
        return mask if self.once_in(2) else self.lay_out(mask)

    def options(self, shape, number, rows, targets):
        """Return the options of a cross entropy."""
        classes = shape[number] if shape else 0
        makers = {
            "weight": lambda: self.array((classes,), (*FLOATS, "int8")),
            "sample_weight": lambda: self.array(
                self.one_of((rows, (), rows[1:], tuple(1 for _ in rows))), (*FLOATS, "int8", "bool")
            ),
            "ignore_index": lambda: self.one_of((0, 1, 2, classes, -1, -100, *FAR, 10**30, *NO_INTEGER)),
            "label_smoothing": lambda: self.real((0.1, 1, 0.0, 1.0, 1e-30, np.float32(0.25), 1.5)),
            "z_loss": lambda: self.real((0.1, 1, -0.5, 1e-4, 1e30, -0.0)),
            "softcap": lambda: self.real((4.0, 30, 0.5, 1e4, 1e-4)),
            "temperature": lambda: self.real((0.5, 2, 0.7, 30.0, 0.01)),
            "where": lambda: self.mask(shape),
            "reduction": lambda: self.one_of(("none", "sum", *_problem.REDUCTIONS, "avg", None, 1)),
        }
        chosen = self.draw(st.lists(st.sampled_from(tuple(makers)), max_size=4, unique=True))
        options = {name: makers[name]() for name in chosen}
        mask, labels = options.get("where"), targets
        if (
            all(type(one) is np.ndarray for one in (mask, labels))
            and (mask.shape, labels.shape) == (shape, rows)
            and mask.flags.writeable
            and labels.dtype.kind in "iu"
            and classes
        ):
            known = np.expand_dims(np.clip(labels, 0, classes - 1).astype(np.int64), number)
            np.put_along_axis(mask, known, True, number)  # labels are seldom masked out
        return options

    def arguments(self, function):
        """Return the arguments of a call, by name, but out."""
        shape, number = self.shape()
        rows = shape[:number] + shape[number + 1 :]
        classes = shape[number] if shape else 0
        logits = (*FLOATS, "float32", "float64", "int32", "bool", "uint64")
        arguments = {}
        if function in PLAIN:
            arguments = {"logits": self.array(shape, logits), "axis": self.axis(shape, number, several=True)}
            if self.once_in(3):
                arguments["where"] = self.mask(shape)
            if function == "logsumexp":
                arguments["keepdims"] = self.once_in(2)
        elif function == "selective_log_softmax":
            several = (*shape[:number], self.one_of((1, 2, 5, 0)), *shape[number + 1 :])
            indices = self.labels(self.one_of((rows, several)), classes)
            arguments = {"logits": self.array(shape, logits), "indices": indices, "axis": self.axis(shape, number)}
        elif function.endswith("backward"):
            kind = "log_probs" if function.startswith("log") else "probs"
            results = self.array(shape, FLOATS, greatest=0) if kind == "log_probs" else self.array(shape, logits)
            arguments = {"grad": self.array(shape, logits), kind: results, "axis": self.axis(shape, number, several=True)}
        elif function == "softmax_cross_entropy_with_logits":
            labels = self.array(self.one_of((shape, shape, shape[1:], tuple(1 for _ in shape))), logits)
            arguments = {"labels": labels, "logits": self.array(shape, logits), "axis": self.axis(shape, number)}
        elif function == "sparse_softmax_cross_entropy_with_logits":
            arguments = {
                "labels": self.labels(rows, classes),
                "logits": self.array(shape, logits),
                "axis": self.axis(shape, number),
            }
        elif function in LOSSES:
            targets = self.labels(rows, classes) if self.once_in(2) else self.array(shape)
            arguments = {"logits": self.array(shape, logits), "targets": targets, "axis": self.axis(shape, number)}
            arguments |= self.options(shape, number, rows, targets)
        elif function in LINEAR:
            features = self.one_of((3, 1, 0, 8))
            shape = (*rows, classes)
            targets = self.labels(rows, classes) if self.once_in(2) else self.array(shape)
            arguments = {
                "inputs": self.exact((*rows, features)),
                "linear_weight": self.exact((classes, features)),
                "targets": targets,
            }
            if self.once_in(2):
                arguments["linear_bias"] = self.exact((classes,))
            arguments |= self.options(shape, len(rows), rows, targets)
        elif function == "one_hot":
            arguments = {
                "labels": self.labels(shape, classes),
                "num_classes": self.one_of((classes, 127, 200, 0, -1, np.int8(9), 2**80, *NO_INTEGER)),
                "axis": self.one_of((-1, number, 0)) if self.once_in(2) else self.axis(shape, number),
                "dtype": self.one_of(
                    (np.float32, "float64", "int8", "bool", "complex64", dtype_of("bfloat16"), "nonsense", "O", ">f4")
                ),
            }
        elif function == "score":
            arguments = {"logits": self.array(shape, logits), "axis": self.axis(shape, number)}
            if self.once_in(2):
                arguments["targets"] = self.labels(rows, classes)
            if self.once_in(2):
                arguments["top_k"] = self.one_of((1, 2, classes, classes + 1, 0, -1, np.int64(2), 2**80, *NO_INTEGER))
        else:
            arguments = {"logits": self.array(shape, logits), "axis": self.axis(shape, number)}
        if function in (*PLAIN, "selective_log_softmax", "score") and self.once_in(3):
            arguments["temperature"] = self.real((0.5, 2, 0.7, 30.0, 0.01, np.float32(0.3), 1e-20, 1e20))
        if function.endswith("value_and_grad") and self.once_in(3):
            arguments["loss_grad"] = self.array(self.one_of((rows, (), ())), (*FLOATS, "int8"))
        return arguments

    def exact(self, shape):
        """Return an array of numbers whose sums of products are exact, in whatever order."""
        if self.once_in(40):
            return self.array(shape, ("bool",))
        numbers = self.rng.integers(-9, 10, shape) / 2
        if self.once_in(8):
            numbers = np.where(self.rng.random(shape) < 0.05, self.rng.choice(SPECIAL[:3], shape), numbers)
        with np.errstate(invalid="ignore"):
            return self.lay_out(numbers.astype(dtype_of(self.one_of((*FLOATS, "float32", "float64", "int32")))))

    def out(self, result, arguments):
        """Return what a result goes to: a new array, memory of an argument, or what must be refused; and whether it is that."""
        result = np.asarray(result)
        zeros = np.zeros(result.shape, result.dtype)
        arrays = {name: value for name, value in arguments.items() if type(value) is np.ndarray and not value.dtype.hasobject}
        if self.once_in(5):
            return self.no_out(zeros, self.one_of(NO_OUT)), True
        if arrays and self.once_in(2):
            name = self.one_of(tuple(arrays))
            return self.overlapping(zeros, arguments, name), False
        return self.placed(zeros, self.one_of(OUT_LAYOUTS)), False

    def overlapping(self, zeros, arguments, name):
        """Return an out with (part of) the memory of an argument, which moves there."""
        array = arguments[name]
        way = self.one_of(("same", "reversed", "shifted", "shifted", "any"))
        if array.dtype == zeros.dtype and array.shape == zeros.shape and way in ("same", "reversed") and array.flags.writeable:
            return array if way == "same" or not array.ndim else np.flip(array)
        memory = np.zeros(array.nbytes + zeros.nbytes, np.uint8)
        moved = memory[: array.nbytes].view(array.dtype).reshape(array.shape)
        moved[...] = array
        arguments[name] = moved
        first = int(self.rng.integers(0, array.nbytes + 1))
        if way == "shifted":
            first -= first % zeros.itemsize
        return memory[first : first + zeros.nbytes].view(zeros.dtype).reshape(zeros.shape)

    def no_out(self, zeros, kind):
        match kind:
            case "list":
                return zeros.tolist()
            case "text":
                return "out"
            case "number":
                return 1.0
            case "masked":
                return np.ma.array(zeros)
            case "read-only":
                zeros.flags.writeable = False
                return zeros
            case "longer":
                return np.zeros((*zeros.shape, 1), zeros.dtype)
            case "another shape":
                return np.zeros(tuple(size + 1 for size in zeros.shape) or (1,), zeros.dtype)
            case "another dtype":
                return zeros.astype(
                    self.one_of([one for one in ("float32", "float64", "int32", "O", "c8") if one != zeros.dtype])
                )
            case "byteswapped":
                return np.zeros(zeros.shape, ">f8" if zeros.dtype == np.float64 else ">f4")


# ---- what a call did ----


def memory_of(array):
    """Return the array that owns the memory of a view."""
    while type(array.base) is np.ndarray:
        array = array.base
    return array


def outcome(function, arguments):
    """Return the result of a call, or its exception; and the warnings, which are none but the documented ones."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = getattr(pylogits, function)(**arguments)
        except (TypeError, ValueError) as error:
            result = error
    for warning in caught:
        assert "mean of no losses" in str(warning.message) or warning.category is pylogits.DoubleSoftmaxWarning, warning
        assert warning.filename == __file__
    return result, [str(warning.message) for warning in caught]


def flat(result):
    """Return all arrays of a result."""
    if isinstance(result, tuple):
        return [array for one in result for array in flat(one)]
    return [] if result is None else [result]


def check(backend, function, maker):
    arguments = maker.arguments(function)
    note((function, arguments))
    given = {name: plain(value) for name, value in arguments.items()}
    with pylogits.use_backend("reference"):
        expected, warned = outcome(function, given)
    failed = isinstance(expected, Exception)
    places, refused = {}, False
    if function not in (*LINEAR, "one_hot", "score", "check_logits") or function == LINEAR[0]:
        results = [np.zeros(3)] * 2 if failed else flat(expected)
        for name, result in zip(("out", "grad_out"), results, strict=False):
            if (name == "out" or function == LOSSES[1]) and maker.once_in(2) and not places:
                places[name], refused = maker.out(result, arguments)
    arguments |= places
    note(places)

    arrays = {name: value for name, value in arguments.items() if isinstance(value, np.ndarray)}
    before = {name: (value.copy(), memory_of(value).tobytes()) for name, value in arrays.items()}
    with pylogits.use_backend(backend):
        got, warned_too = outcome(function, arguments)
    if isinstance(got, Exception):
        assert failed or refused, repr(got)
        with pylogits.use_backend("reference"):
            again, _ = outcome(function, arguments)
        assert (type(got), str(got)) == (type(again), str(again))
    else:
        assert not failed, repr(expected)
        assert not refused
        assert warned == warned_too
        for name, place in places.items():
            result = (got[name == "grad_out"]) if isinstance(got, tuple) else got
            assert result is place
        got = [np.array(one) for one in flat(got)]
        for name, place in places.items():
            place[...] = before[name][0]
    for name, array in arrays.items():
        assert memory_of(array).tobytes() == before[name][1], f"{name} was overwritten"
    if not isinstance(got, Exception):
        judge(function, given, got, [np.asarray(one) for one in flat(expected)])


# ---- judging finite values ----

BEYOND = np.longdouble("1e1500")  # every dtype but longdouble, and so are its square and its cube
SATURATED = 4 * np.exp(np.longdouble(-40))  # the slope of a softcap where its tanh is 1
# Kernels scale terms up, to keep them normal, and factors down: tiny gradients lose digits.
TERM_SCALES = {np.dtype(np.float32): np.longdouble(2.0**64), np.dtype(np.float64): np.longdouble(2.0**512)}


def limits(dtype):
    """Return the relative and the absolute distance of neighbours in a dtype, and its largest number."""
    info = ml_dtypes.finfo(dtype)
    return [np.longdouble(one) for one in (info.eps, info.smallest_subnormal, info.max)]


def is_beyond(size, dtype):
    """Where terms are so large that a step may overflow: then nothing is promised of their sum."""
    return np.isfinite(size) & (size > limits(dtype)[2] / 2**14)


def close(got, expected, size, ulp, work=None):
    """Assert that special values are the same and that others differ by some ulp of `size`, the larger of the terms.

    `work` is the dtype that was computed in, before the result was rounded.
    """
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
    if got.dtype.kind not in "fV":
        np.testing.assert_array_equal(got, expected)
        return
    wide, want = got.astype(np.longdouble), expected.astype(np.longdouble)
    eps, least, _ = limits(work or got.dtype)
    beyond = np.broadcast_to(is_beyond(size, work or got.dtype), want.shape).copy()
    with np.errstate(all="ignore"):
        bound = ulp * np.maximum(np.broadcast_to(size, want.shape) * eps, least)
        if work not in (None, got.dtype):
            eps, least, most = limits(got.dtype)
            beyond |= bound > most
            bound = bound + np.maximum(np.abs(want) * eps, least)
        same = (
            beyond | (wide == want) | (np.isnan(wide) & np.isnan(want)) | (np.isfinite(wide) & (np.abs(wide - want) <= bound))
        )
    if not same.all():
        worst = tuple(np.argwhere(~same)[0])
        raise AssertionError(f"{wide[worst]!r} at {worst}, not {want[worst]!r}; bound {bound[worst]!r}")


def judge(function, given, got, expected):
    if function in ("one_hot", "check_logits"):
        for one, want in zip(got, expected, strict=True):
            close(one, want, 0, 0)
        return
    # The reference in longdouble, for the sizes of terms.
    with pylogits.use_backend("reference"), np.errstate(all="ignore"):
        sizes = SIZES[function](given, expected)
    for one, want, size in zip(got, expected, sizes, strict=True):
        work = _rows.row_dtype(want.dtype) if want.dtype.kind in "fV" else None
        ulp = 8 if want.dtype != np.longdouble else 1000  # NumPy's sums err with the number of terms
        if function.endswith("grad") or function.endswith("backward"):
            size = size + TERM_SCALES.get(work, 0) * limits(work)[1] / limits(work)[0]
        if work is not None:
            size = np.fmax(np.nan_to_num(size, nan=0, posinf=np.inf), np.where(np.isfinite(want), abs(want), 0))
        close(one, want, size, ulp, work)


def of_results(given, expected):
    return [abs(one.astype(np.longdouble)) for one in expected]


def of_logsumexp(given, expected):
    """The largest logit, the log of the sum, and the result."""
    logits = np.asarray(given["logits"])
    where = np.broadcast_to(given.get("where", True), logits.shape)
    temperature = np.asarray(given.get("temperature", 1), _rows.row_dtype(_rows.check_floats(logits, "")))
    axis, keepdims = _rows.check_axis(given["axis"], logits.ndim), given.get("keepdims", False)
    top = np.max(logits.astype(np.longdouble), axis, keepdims=keepdims, initial=-np.inf, where=where) / temperature
    return [abs(expected[0]) + abs(top)]


def of_score(given, expected):
    sizes = of_results(given, expected)
    sizes[3] = of_logsumexp({name: given[name] for name in ("logits", "axis", "temperature") if name in given}, expected[3:])[0]
    return sizes


def of_dense(given, expected):
    logits, labels = (np.asarray(given[name]).astype(np.longdouble) for name in ("logits", "labels"))
    log_p = pylogits.log_softmax(logits, axis=given["axis"])
    labels = np.broadcast_to(labels, np.broadcast_shapes(labels.shape, logits.shape))
    terms = np.where(labels == 0, 0, np.where(np.isinf(labels), BEYOND, abs(labels) * -log_p))
    number = _rows.check_single_axis(given["axis"], logits.ndim) - logits.ndim
    terms, factors = (np.moveaxis(one, number, -1) for one in (terms, bounded(labels)))
    return [total_of(terms, factors, expected[0].dtype)]


def bounded(array):
    """Return an array with numbers beyond every dtype for infinities: what a product or a sum makes of them is not promised."""
    return np.where(np.isinf(array), BEYOND, array)


def total_of(terms, factors, dtype):
    """Return the sums of rows of terms: beyond the dtype if the finite ones are, or factors in them, whatever the others."""
    finite = np.where(np.isfinite(terms), terms, 0).sum(-1)
    return np.where(is_beyond(finite, dtype) | is_beyond(abs(factors), dtype).any(-1), BEYOND, terms.sum(-1))


def of_backward(given, expected):
    """p (|g| + sum |g p|), or |g| + p sum |g|; or the sum, if it is beyond the dtype."""
    grad = abs(bounded(np.asarray(given["grad"]).astype(np.longdouble)))
    axis = _rows.check_axis(given["axis"], grad.ndim)
    if "probs" in given:
        p = abs(bounded(np.asarray(given["probs"]).astype(np.longdouble)))
        total, terms = (grad * p).sum(axis, keepdims=True), p * grad
    else:
        p = np.exp(np.asarray(given["log_probs"]).astype(np.longdouble))
        total, terms = grad.sum(axis, keepdims=True), grad
    return [terms + np.where(is_beyond(total, expected[0].dtype), total, p * total)]


def of_loss(given, expected):
    """The sizes of a row's loss and of its gradient: their formulas in docs/losses.md, of absolute values."""
    logits, targets = np.asarray(given["logits"]), np.asarray(given["targets"])
    axis = given["axis"]
    real = _rows.row_dtype(_rows.check_floats(logits, ""))

    def number(name, default):
        return np.longdouble(real.type(default if given.get(name) is None else given[name]))

    x = np.moveaxis(logits.astype(np.longdouble), axis, -1) / number("temperature", 1)
    cap, slope = np.longdouble(0), 1 / number("temperature", 1)
    if given.get("softcap") is not None:
        cap = number("softcap", 1)
        x = x / cap
        size = 1 + np.minimum(abs(x), 20) / 4  # 2 x / cap is rounded before it is an exponent
        slope = slope * (size / np.cosh(x) ** 2 + np.where(abs(x) > 20, SATURATED / limits(real)[0], 0))
        x = cap * np.tanh(x)
    mask = np.moveaxis(np.broadcast_to(True if given.get("where") is None else given["where"], logits.shape), axis, -1)
    x = np.where(mask, x, -np.inf)
    top = x.max(-1, keepdims=True)
    log_sum = np.log(np.exp(x - top).sum(-1, keepdims=True))
    hard = targets.dtype.kind in "iu"
    counted = np.ones(x.shape[:-1], bool)
    if hard:
        counted = targets != given["ignore_index"] if given.get("ignore_index") is not None else counted
        labels = np.where(counted, targets, 0).astype(np.int64)
        q = np.eye(x.shape[-1])[labels]
    else:
        q = np.moveaxis(abs(bounded(targets.astype(np.longdouble))), axis, -1)
    smoothing, z_loss = number("label_smoothing", 0), abs(number("z_loss", 0))
    weight = np.ones(x.shape[-1]) if given.get("weight") is None else np.asarray(given["weight"]).astype(real)
    sample_weight = np.asarray(1 if given.get("sample_weight") is None else given["sample_weight"])
    sample_weight = np.broadcast_to(sample_weight.astype(real).astype(np.longdouble), counted.shape)
    a = np.where(mask, (1 - smoothing) * q + smoothing / mask.sum(-1, keepdims=True), 0) * abs(weight)
    a = np.where(a == 0, 0, np.maximum(a, limits(real)[1] / limits(real)[0]))  # products below normal numbers lose digits
    if smoothing and not hard:  # a negative probability and its part of the smoothing may be infinities of opposite signs
        negative = np.moveaxis(targets, axis, -1).astype(np.longdouble) < 0
        a = np.where((negative & ~np.isfinite(x) & mask).any(-1, keepdims=True), BEYOND, a)
    if smoothing == 1:  # no matter how infinities and NaN count that do not count
        a = np.where((np.isfinite(q) & ~is_beyond(q, real)).all(-1, keepdims=True), a, BEYOND)
    total = abs(top) + log_sum + cap
    p = np.exp(x - top - log_sum)
    away = (top - x) + log_sum + cap
    losses = total_of(np.where(a == 0, 0, a * away), a, real) + z_loss * total[..., 0] ** 2
    if smoothing:  # the classes' distances are summed before they are multiplied with it
        spread = np.where(np.isfinite(away) & mask, away * abs(weight), 0).sum(-1)
        losses = np.where(is_beyond(spread, real), BEYOND, losses)
    mass = (a.sum(-1, keepdims=True) + 2 * z_loss * total) * (1 + cap)
    slopes = (mass * p + a) * slope * (1 + cap)
    beyond = is_beyond(mass, real)
    losses, slopes = losses * abs(sample_weight), slopes * abs(sample_weight)[..., None]
    losses, slopes = np.where(beyond[..., 0], BEYOND, losses), np.where(beyond, BEYOND, slopes)
    losses, slopes = np.where(counted & mask.any(-1), losses, 0), np.where(counted[..., None] & mask, slopes, 0)

    reduction = given.get("reduction", "mean")
    divisors = {"sum_over_batch_size": counted.size, "sum_by_nonzero_weights": np.count_nonzero(counted & (sample_weight != 0))}
    if reduction == "mean":
        each = sample_weight * (weight.astype(float)[labels] if hard else 1)
        divisors["mean"] = abs(np.where(counted, each, 0).sum())
    divisor = divisors.get(reduction, 1) or 1
    loss_grad = np.asarray(1 if given.get("loss_grad") is None else given["loss_grad"])
    loss_grad = np.broadcast_to(abs(bounded(loss_grad.astype(real).astype(np.longdouble))), counted.shape)
    loss_grad = np.maximum(loss_grad, BEYOND**-0.25)  # what is beyond stays so
    factor = (loss_grad / divisor)[..., None]
    beyond = is_beyond(mass * abs(sample_weight)[..., None] * factor, real) | is_beyond(1 / np.longdouble(divisor), real)
    beyond = beyond & counted[..., None] & mask
    slopes = np.moveaxis(np.where(beyond, BEYOND, slopes * factor), -1, axis)
    if reduction != "none":
        losses = np.asarray(BEYOND if is_beyond(losses, real).any() else losses.sum() / divisor)
    return [losses, slopes][: len(expected)]


def of_linear(given, expected):
    x, w = (np.asarray(given[name]).astype(np.longdouble) for name in ("inputs", "linear_weight"))
    bias = given.get("linear_bias")
    logits = x @ w.T + (0 if bias is None else np.asarray(bias).astype(np.longdouble))
    dtype = np.result_type(
        *(_rows.row_dtype(_rows.check_floats(np.asarray(given[name]), "")) for name in ("inputs", "linear_weight"))
    )
    if bias is not None:
        dtype = np.result_type(dtype, _rows.row_dtype(_rows.check_floats(np.asarray(bias), "")))
    losses, slopes = of_loss(given | {"logits": logits.astype(dtype), "axis": -1}, [None, None])
    real = _rows.row_dtype(np.dtype(dtype))
    slopes = slopes + TERM_SCALES.get(real, 0) * limits(real)[1] / limits(real)[0]
    rows = slopes.reshape(math.prod(slopes.shape[:-1]), slopes.shape[-1])
    # What is beyond stays so. A NaN shows in all that it counts for, but not in what an ignored row adds nothing to.
    x, w = (np.fmax(abs(bounded(one)), BEYOND**-0.25) for one in (x, w))
    grads = [slopes @ w * len(w), rows.T @ x.reshape(len(rows), w.shape[1]) * len(rows)]  # sums in whatever order
    grads += [] if bias is None else [rows.sum(0) * len(rows)]
    return [losses, *grads][: len(expected)]


SIZES = {
    **dict.fromkeys(
        ("softmax", "log_softmax", "selective_log_softmax", "sparse_softmax_cross_entropy_with_logits"), of_results
    ),
    **dict.fromkeys(("softmax_backward", "log_softmax_backward"), of_backward),
    **dict.fromkeys(LOSSES, of_loss),
    **dict.fromkeys(LINEAR, of_linear),
    "logsumexp": of_logsumexp,
    "score": of_score,
    "softmax_cross_entropy_with_logits": of_dense,
}


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("name", ["default", "numba"])
def test_hostile_arguments(name, function):
    if name == "numba":
        pytest.importorskip("numba")
    backend = pylogits.show_config()["backend"] if name == "default" else name
    share = NUMBA_SHARE if name == "numba" else NUMBA_SHARE / (NUMBA_SHARE - 1)

    @settings(fuzz, max_examples=max(1, int(EXAMPLES / share / len(FUNCTIONS))))
    @given(st.data())
    def run(data):
        check(backend, function, Maker(data.draw))

    run()


# ---- labels that another thread changes ----


@pytest.mark.parametrize("name", ["c", "numba"])
@pytest.mark.parametrize("bad", [5, -1, 2**40, -(2**63)])
def test_labels_that_change_meanwhile(name, bad):
    """The right losses, or NaN in the rows that were hit, or a ValueError."""
    if name not in pylogits.show_config()["backends"]:
        pytest.skip(f"there is no backend {name}")
    logits = np.random.default_rng(0).standard_normal((20_000, 5)).astype(np.float32)
    good = np.arange(20_000) % 5
    labels = good.copy()
    hit = np.s_[7::97]
    done = threading.Event()

    def change():
        for bad_ones in cycle((True, False)):
            labels[hit] = bad if bad_ones else good[hit]
            if done.is_set():
                return

    calls = {
        "sparse": lambda labels: pylogits.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits),
        "selective": lambda labels: pylogits.selective_log_softmax(logits, labels),
        "loss": lambda labels: pylogits.cross_entropy(logits, labels, reduction="none", label_smoothing=0.1),
        "ignored": lambda labels: pylogits.cross_entropy(logits, labels, reduction="none", ignore_index=3),
        "gradient": lambda labels: np.column_stack(pylogits.cross_entropy_value_and_grad(logits, labels, reduction="none")),
        "score": lambda labels: pylogits.score(logits, labels).loss,
        "linear": lambda labels: pylogits.linear_cross_entropy(logits, np.eye(5, dtype=np.float32), labels, reduction="none"),
    }
    with pylogits.use_backend(name):
        expected = {call: function(good) for call, function in calls.items()}
        thread = threading.Thread(target=change)
        thread.start()
        try:
            for call, function in list(calls.items()) * 20:
                try:
                    result = function(labels)
                except ValueError as error:
                    assert "outside [0, 5)" in str(error) or "changed while it was read" in str(error)
                    continue
                rows, right = (one.reshape(len(labels), -1) for one in (result, expected[call]))
                wrong = (rows != right).any(1)
                assert np.isnan(rows[wrong]).any(1).all()  # the loss; not so Numba's gradients
                wrong[hit] = False
                assert not wrong.any()
        finally:
            done.set()
            thread.join()


# ---- what failed here, or elsewhere ----


def test_one_row_of_other_dtypes(backend):
    """Rows that are copied, and labels without dimensions."""
    for dtype in ("float16", ">f4", "int8", "longdouble"):
        logits = np.array([0, 1, 0], dtype)
        loss = pylogits.sparse_softmax_cross_entropy_with_logits(labels=2, logits=logits)
        assert loss == pytest.approx(1.5514447139320511, rel=1e-6)
        assert pylogits.score(logits, 2).loss == loss


def test_longdouble_losses(backend):
    logits = np.array([[0.5, 1.5, 0.1], [2.2, 1.3, 1.7]], np.longdouble)
    loss, grad = pylogits.cross_entropy_value_and_grad(logits, [1, 2])
    assert (loss.dtype, grad.dtype) == (np.longdouble, np.longdouble)
    assert loss == pytest.approx(0.83934333897877922, rel=1e-15)
    p = pylogits.softmax(logits)
    np.testing.assert_allclose(grad, (p - np.eye(3)[[1, 2]]) / 2, rtol=1e-18, atol=1e-19)


def test_integers_beyond_half_precision(backend):
    probs = np.array([0.5, 0.5], np.float16)
    np.testing.assert_array_equal(pylogits.softmax_backward([100_000, 99_000], probs), [250, -250])
    np.testing.assert_array_equal(
        pylogits.softmax_cross_entropy_with_logits(labels=[100_000, 0], logits=np.zeros(2, np.float16)),
        np.float32(100_000 * np.log(2)),
    )


@pytest.mark.parametrize("axis", [2**70, -(2**70), 2**31])
def test_axis_beyond_an_int(axis):
    for function in (pylogits.softmax, pylogits.logsumexp, pylogits.score):
        with pytest.raises(np.exceptions.AxisError):
            function(np.zeros((2, 3)), axis=axis)


def test_weights_without_a_finite_sum():
    with pytest.raises(ValueError, match="a mean needs weights with a finite sum, not inf"):
        pylogits.cross_entropy(np.zeros((2, 2)), [0, 0], sample_weight=[1e308, 1e308])


def test_no_warnings_of_infinities():
    """As tests make errors of warnings."""
    bad = np.array([[np.inf, -np.inf, np.nan], [1, 2, 3]])
    pylogits.check_logits(bad)
    pylogits.cross_entropy([[np.inf, 0, 0], [-np.inf, 0, 0]], [0, 0], reduction="sum")
    pylogits.linear_cross_entropy_value_and_grad(bad, np.ones((4, 3)), [0, 1])
    pylogits.softmax_backward([[1e300, 1]], np.array([[0.5, 0.5]], np.float16))
    pylogits.cross_entropy_value_and_grad(np.zeros((1, 2), np.float32), [0], loss_grad=1e300)


@pytest.mark.parametrize("dtype", ["float16", ">f8", "longdouble"])
def test_a_single_logit(backend, dtype):
    assert pylogits.softmax(np.array(3, dtype), axis=None) == 1


def test_gradients_go_where_the_weights_were(backend, dtype):
    logits, weight = np.array([0.5, 1.5, 0.1], dtype), np.array([0.5, 2.0, 0.25], dtype)
    loss, grad = pylogits.cross_entropy_value_and_grad(logits, 1, weight=weight, label_smoothing=0.1)
    again, result = pylogits.cross_entropy_value_and_grad(logits, 1, weight=weight, label_smoothing=0.1, grad_out=weight)
    assert again == loss
    assert result is weight
    np.testing.assert_array_equal(weight, grad)


def test_linear_inputs_that_are_none():
    with pytest.raises(TypeError, match="inputs must hold real numbers"):
        pylogits.linear_cross_entropy(None, np.ones((4, 3)), [0, 1])


@pytest.mark.parametrize("ignored", [3, -1, 2**31, -(2**63), 2**63 - 1])
def test_ignored_class_outside_the_weights(backend, dtype, ignored):
    logits, weight = np.array([[0.5, 1.5, 0.1], [-np.inf] * 3, [np.nan] * 3], dtype), [0.5, 2.0, 0.25]
    targets = np.array([1, ignored, ignored])
    losses, grad = pylogits.cross_entropy_value_and_grad(
        logits, targets, ignore_index=ignored, weight=weight, label_smoothing=0.1, z_loss=0.1, reduction="none"
    )
    expected = pylogits.cross_entropy_value_and_grad(
        logits[:1], targets[:1], weight=weight, label_smoothing=0.1, z_loss=0.1, reduction="none"
    )
    np.testing.assert_array_equal(losses, [expected[0][0], 0, 0])
    np.testing.assert_array_equal(grad, [expected[1][0], [0, 0, 0], [0, 0, 0]])
    mean = pylogits.cross_entropy(logits, targets, ignore_index=ignored, weight=weight)
    assert mean == pytest.approx(0.47901069674771036, rel=1e-6)  # 2 x that / 2


def test_ignored_class_inside_the_weights(backend, dtype):
    logits, weight = np.array([[0.5, 1.5, 0.1], [-np.inf] * 3], dtype), [0.5, 2.0, np.finfo(dtype).max]
    loss, grad = pylogits.cross_entropy_value_and_grad(logits, [1, 2], ignore_index=2, weight=weight)
    assert loss == pytest.approx(0.47901069674771036, rel=1e-6)
    assert not grad[1].any()


def test_all_rows_ignored(backend, dtype):
    logits = np.array([[-np.inf, -np.inf], [np.nan, np.inf]], dtype)
    with pytest.warns(RuntimeWarning, match="mean of no losses"):
        loss, grad = pylogits.cross_entropy_value_and_grad(logits, [2, 2], ignore_index=2, weight=[1, 1])
    assert np.isnan(loss)
    np.testing.assert_array_equal(grad, np.zeros((2, 2)))
    loss, grad = pylogits.cross_entropy_value_and_grad(logits, [2, 2], ignore_index=2, reduction="sum")
    assert loss == 0
    np.testing.assert_array_equal(grad, np.zeros((2, 2)))


def test_two_large_equal_logits(backend, dtype):
    logits = np.array([1e8, 1e8], dtype)
    np.testing.assert_array_equal(pylogits.softmax(logits), [0.5, 0.5])
    np.testing.assert_allclose(pylogits.log_softmax(logits), [-np.log(2)] * 2, rtol=1e-7)
    np.testing.assert_allclose(pylogits.cross_entropy(logits, 0), np.log(2), rtol=1e-7)
    assert pylogits.logsumexp(logits) == dtype.type(1e8 + np.log(2))


@pytest.mark.parametrize("shape", [(1024, 587), (9, 1017)])
@pytest.mark.parametrize("op", ["softmax", "log_softmax", "logsumexp", "sparse_softmax_cross_entropy_with_logits"])
def test_against_extended_precision(backend, op, shape):
    arguments = Case(op, "float64", shape, spread=30.0).arguments()
    expected, scale = oracle(op, **arguments)
    assert ulp_error(getattr(pylogits, op)(**arguments), expected, scale) <= 3


@pytest.mark.parametrize("shape", [(2**58, 7), (2**52, 2**8), (2**58, 2, 3)])
@pytest.mark.parametrize("dtype", ["int8", "float16", "float32"])
def test_more_elements_than_memory(backend, dtype, shape):
    """Refused at once, also where a result's bytes are more than 64 bits can count."""
    logits = np.broadcast_to(np.zeros((), dtype), shape)
    labels = np.broadcast_to(0, shape[:-1])
    for call in (
        lambda: pylogits.softmax(logits),
        lambda: pylogits.log_softmax(logits, temperature=2),
        lambda: pylogits.softmax_backward(logits, logits),
        lambda: pylogits.logsumexp(logits),
        lambda: pylogits.selective_log_softmax(logits, labels),
        lambda: pylogits.softmax_cross_entropy_with_logits(labels=logits, logits=logits),
        lambda: pylogits.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits),
        lambda: pylogits.score(logits),
        lambda: pylogits.one_hot([0, 0], 2**62),
    ):
        with pytest.raises((MemoryError, ValueError)):
            call()
    assert pylogits.softmax(logits[:, ..., :0]).shape == (*shape[:-1], 0)
