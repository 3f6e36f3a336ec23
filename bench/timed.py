"""The cases that are timed, from the registry that the tests use."""

import sys
from functools import lru_cache
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "tests"))

import numpy as np
from cases import Case, oracle

FULL_OPS = ("softmax", "log_softmax")  # the result is as large as the logits
SHAPES = ((4096, 1000), (256, 128256), (1_000_000, 10), (16384, 128), (1, 10))


def _case(op, dtype, shape):
    """Return a case; large probabilities go to memory that is there, small ones to a new array."""
    preallocated = op == "softmax" and shape[0] > 1
    return Case(op, dtype, shape, out="contiguous" if preallocated else None)


TIMED = [
    _case(op, dtype, shape)
    for op in ("softmax", "sparse_softmax_cross_entropy_with_logits")
    for dtype, shapes in (("float32", SHAPES), ("float64", SHAPES[:1]))
    for shape in shapes
]


@lru_cache(maxsize=1)
def arguments(case):
    """Return the arguments of a case, drawn once for all who are timed on it."""
    return case.arguments()


def label(case):
    """Return what a person calls a case."""
    sizes = " x ".join(map(str, case.shape))
    return f"{case.op} {case.dtype} {sizes}" + f" axis={case.axis}" * (case.axis != -1)


def moved_bytes(case):
    """Return what a call must read and write at least."""
    given = arguments(case)
    logits = given["logits"].nbytes
    if case.op in FULL_OPS:
        return 2 * logits
    return logits + (given["labels"].nbytes if case.op == "softmax_cross_entropy_with_logits" else 0)


def check(case, result):
    """Compare a few rows to the oracle: a wrong result is not worth timing."""
    given = arguments(case)
    full = [slice(4)] * len(case.shape)
    full[case.axis] = slice(None)
    per_row = list(full)
    del per_row[case.axis]

    def some(array):
        array = array[tuple(full if array.ndim == len(case.shape) else per_row)]
        return array.astype(np.float32) if array.itemsize == 2 else array

    rows = {name: some(given[name]) for name in ("logits", "labels") if name in given}
    expected, _ = oracle(case.op, axis=case.axis, **rows)
    # Some peers compute in half precision, step by step: only what is plainly wrong shows.
    tolerance = {"rtol": 0.1, "atol": 0.1} if result.itemsize == 2 else {"rtol": 1e-4, "atol": 1e-7}
    np.testing.assert_allclose(some(result), expected.astype(np.float64), **tolerance)
