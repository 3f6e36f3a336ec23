"""The one registry of cases, operation x dtype x shape x layout, and the oracle that judges them.

A case makes its own arguments and knows nothing of backends; tests and benchmarks both run it.
"""

import itertools
import math
import random
import zlib
from dataclasses import dataclass

import numpy as np
import pytest

LOSSES = ("softmax_cross_entropy_with_logits", "sparse_softmax_cross_entropy_with_logits")
OPS = ("softmax", "log_softmax", "logsumexp", "selective_log_softmax", *LOSSES)
DTYPES = ("float32", "float64", "float16", "bfloat16")
LAYOUTS = (
    "contiguous",
    "sliced",
    "reversed",
    "fortran",
    "broadcast",
    "misaligned",
    "byteswapped",
)
ULP = {"float32": 2, "float64": 3}


def dtype_of(name):
    """Return a dtype by name; bfloat16 needs ml_dtypes."""
    if name == "bfloat16":
        return np.dtype(pytest.importorskip("ml_dtypes").bfloat16)
    return np.dtype(name)


def lay_out(x, layout):
    """Return x in another memory layout; the values change under "broadcast" only."""
    match layout:
        case "contiguous":
            return np.asarray(x, order="C")
        case "fortran":
            return np.asarray(x, order="F")
        case "byteswapped":
            return x.astype(x.dtype.newbyteorder())
        case "broadcast":
            return np.broadcast_to(x[:1], x.shape)
        case "sliced":  # between NaN, which a stray read would spread
            around = np.empty([2 * n + 1 for n in x.shape], x.dtype)
            around[...] = np.nan if x.dtype.kind not in "biu" else 1
            view = around[(..., *[slice(1, None, 2)] * x.ndim)]
        case "reversed":
            view = np.empty_like(x)[(..., *[slice(None, None, -1)] * x.ndim)]
        case "misaligned":
            view = np.empty(x.nbytes + 1, np.uint8)[1:].view(x.dtype).reshape(x.shape)
    view[...] = x
    return view


@dataclass(frozen=True)
class Case:
    """One call: an operation and the arrays to give it, drawn from a seed of its own."""

    op: str
    dtype: str
    shape: tuple[int, ...]
    axis: int | tuple[int, ...] | None = -1
    layout: str = "contiguous"
    spread: float = 3.0
    temperature: float = 1.0
    masked: bool = False
    out: str | None = None  # a layout, or "in place"

    def __str__(self):
        options = [f"T{self.temperature}"] * (self.temperature != 1) + ["where"] * self.masked
        parts = (self.op, self.dtype, self.shape, self.axis, self.layout, self.spread, *options)
        return "-".join(map(str, parts)) + f"-out {self.out}" * bool(self.out)

    def arguments(self):
        """Return new arguments for the operation, all but out, by name."""
        rng = np.random.default_rng(zlib.crc32(str(self).encode()))
        dtype = dtype_of(self.dtype)
        logits = (rng.standard_normal(self.shape) * self.spread).astype(dtype)
        logits = lay_out(logits, self.layout)
        apart = "sliced" if self.layout == "broadcast" else self.layout
        arguments = {"logits": logits, "axis": self.axis}
        if self.op == "selective_log_softmax":
            picks = np.moveaxis(np.empty(self.shape, bool), self.axis, -1)[..., :3]
            indices = rng.integers(self.shape[self.axis], size=picks.shape)
            arguments["indices"] = lay_out(np.moveaxis(indices, -1, self.axis), apart)
        elif self.op == "softmax_cross_entropy_with_logits":
            labels = rng.random(self.shape) ** 4
            labels /= labels.sum(self.axis, keepdims=True)
            arguments["labels"] = lay_out(labels.astype(dtype), self.layout)
        elif self.op == "sparse_softmax_cross_entropy_with_logits":
            best = logits.argmax(self.axis)
            drawn = rng.integers(self.shape[self.axis], size=best.shape)
            labels = np.where(rng.random(best.shape) < 0.5, best, drawn)
            arguments["labels"] = lay_out(labels, apart)
        if self.temperature != 1:
            arguments["temperature"] = self.temperature
        if self.masked:
            least = logits.min(self.axis, keepdims=True)  # stays, so that no row is masked whole
            arguments["where"] = lay_out((rng.random(self.shape) < 0.7) | (logits == least), apart)
        return arguments


def oracle(op, logits, axis=-1, *, labels=None, indices=None, where=True, temperature=1.0):
    """Return op in extended precision and the magnitude whose ulp counts, for finite logits.

    The maximum stays out of the sum, so that what is left of a confident row's loss is exact.
    """
    axes = np.lib.array_utils.normalize_axis_tuple(range(logits.ndim) if axis is None else axis, logits.ndim)
    order = [d for d in range(logits.ndim) if d not in axes] + list(axes)
    x = np.where(where, logits.astype(np.longdouble), -np.inf).transpose(order)
    rows = x.reshape(*x.shape[: -len(axes)], -1) / logits.dtype.type(temperature)
    best = rows.argmax(-1)[..., None]
    top = np.take_along_axis(rows, best, -1)
    e = np.exp(rows - top)
    np.put_along_axis(e, best, 0, -1)
    log_sum = np.log1p(e.sum(-1, keepdims=True))
    log_p = rows - top - log_sum
    if op == "softmax":
        result = np.exp(log_p).reshape(x.shape).transpose(np.argsort(order))
    elif op == "log_softmax":
        result = log_p.reshape(x.shape).transpose(np.argsort(order))
    elif op == "logsumexp":
        result = (top + log_sum)[..., 0]
        return result, np.maximum(abs(result), np.maximum(abs(top), log_sum)[..., 0])
    elif op == "selective_log_softmax":
        picked = np.take_along_axis(log_p, np.moveaxis(indices, axis, -1), -1)
        result = np.moveaxis(picked, -1, axis)
    elif op == "softmax_cross_entropy_with_logits":
        q = np.broadcast_to(labels, logits.shape).transpose(order)
        result = -(q * log_p).sum(-1)
    else:
        result = -np.take_along_axis(log_p, labels[..., None], -1)[..., 0]
    return result, abs(result)


def promised(op, dtype):
    """Return how many ulp an operation may be off."""
    return ULP[str(dtype)] - (op == "logsumexp")


def ulp_error(got, expected, scale):
    """Return the largest error in ulp of scale, in smallest subnormals below the normal range."""
    wide = np.longdouble
    unit = np.spacing(scale.astype(got.dtype)).astype(wide)
    with np.errstate(invalid="ignore"):  # equal infinities have no difference
        error = np.where(got == expected, 0, abs(got.astype(wide) - expected) / unit)
    return error.max(initial=0)


def pairwise(factors, valid, seed=0):
    """Return a few valid combinations that hold every pair of values that a valid one can hold."""
    rng = random.Random(seed)
    values = [[(factor, value) for value in factors[factor]] for factor in factors]
    pairs = [p for f, g in itertools.combinations(values, 2) for p in itertools.product(f, g)]
    rng.shuffle(pairs)
    wanted = set(pairs)
    chosen = []
    for pair in pairs:
        if pair not in wanted:
            continue
        drawn = [dict([*map(rng.choice, values), *pair]) for _ in range(100)]
        candidates = [set(itertools.combinations(c.items(), 2)) for c in drawn if valid(**c)]
        if candidates:
            best = max(candidates, key=lambda pairs: len(pairs & wanted))
            wanted -= best
            chosen.append(dict(itertools.chain.from_iterable(best)))
    return chosen


# How rows of classes lie in an array: shape and axis.
ARRANGEMENTS = {
    "last": lambda rows, classes: ((rows, classes), -1),
    "first": lambda rows, classes: ((classes, rows), 0),
    "middle": lambda rows, classes: ((2, classes, rows), 1),
    "negative": lambda rows, classes: ((2, classes, rows), -2),
    "deep": lambda rows, classes: ((2, 2, rows, classes), 3),
    "deep middle": lambda rows, classes: ((2, rows, classes, 2, 3), 2),
    "tuple": lambda rows, classes: ((2, rows, classes), (0, -1)),
    "none": lambda rows, classes: ((rows, classes), None),
}


def _possible(op, dtype, arrangement, rows, classes, layout, option, out, spread):
    shape, axis = ARRANGEMENTS[arrangement](rows, classes)
    return (
        math.prod(shape) <= 150_000
        and (op in OPS[:3] or isinstance(axis, int))
        and (op not in LOSSES or option == "plain")
        and (op != "selective_log_softmax" or "where" not in option)
        and (out != "in place" or (op in OPS[:2] and layout not in ("broadcast", "byteswapped")))
        and (dtype != "bfloat16" or layout != "byteswapped")
    )


CLASSES = (1, 2, 3, 15, 16, 17, 31, 33, 63, 64, 65, 100, 127, 129, 1000, 4095, 4096, 4097, 10007)
FACTORS = {
    "op": OPS,
    "dtype": DTYPES,
    "arrangement": tuple(ARRANGEMENTS),
    "rows": (1, 2, 7, 8, 9, 16, 17, 33),
    "classes": CLASSES,
    "layout": LAYOUTS,
    "option": ("plain", "temperature", "where", "temperature where"),
    "out": (None, "contiguous", "sliced", "reversed", "fortran", "misaligned", "in place"),
    "spread": (0.1, 3.0, 30.0),
}


def cases():
    """Return the cases that pair every factor with every other."""
    for chosen in pairwise(FACTORS, _possible):
        shape, axis = ARRANGEMENTS[chosen["arrangement"]](chosen["rows"], chosen["classes"])
        yield Case(
            op=chosen["op"],
            dtype=chosen["dtype"],
            shape=shape,
            axis=axis,
            layout=chosen["layout"],
            spread=chosen["spread"],
            temperature=0.7 if "temperature" in chosen["option"] else 1.0,
            masked="where" in chosen["option"],
            out=chosen["out"],
        )
