"""The cases that are timed, from the registry that the tests use."""

import sys
from functools import lru_cache
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "tests"))

import numpy as np
from cases import LOSSES, Case, oracle, ulp_error

FULL_OPS = ("softmax", "log_softmax")  # the result is as large as the logits
SHAPES = ((4096, 1000), (256, 128256), (1_000_000, 10), (16384, 128), (1, 10))
# Four million logits in ever longer rows, and ever more rows of a thousand.
OVER_CLASSES = [(4_000_000 // n, n) for n in (2, 10, 32, 100, 316, 1000, 3162, 10_000, 31_623, 128_256)]
OVER_ROWS = [(n, 1000) for n in (1, 10, 100, 1000, 4000, 10_000, 30_000)]
CHECKED = 100_000  # logits, about


def timed_case(op, shape, dtype="float32", axis=-1):
    """Return a case; a large result goes to memory that is there, a small one to a new array."""
    return Case(op, dtype, shape, axis, out="contiguous" if op in FULL_OPS and shape != (1, 10) else None)


SWEEPS = [timed_case(op, shape) for op in (*FULL_OPS, "logsumexp", *LOSSES) for shape in (*OVER_CLASSES, *OVER_ROWS)]


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


def some_rows(case, result):
    """Return a few rows of a result, what the oracle says of them, and the magnitude whose ulp counts."""
    given = arguments(case)
    each = (CHECKED / case.shape[case.axis]) ** (1 / (len(case.shape) - 1))
    full = [slice(max(4, round(each)))] * len(case.shape)
    full[case.axis] = slice(None)
    per_row = list(full)
    del per_row[case.axis]

    def some(array):
        array = array[tuple(full if array.ndim == len(case.shape) else per_row)]
        return array.astype(np.float32) if array.itemsize == 2 else array

    rows = {name: some(given[name]) for name in ("logits", "labels") if name in given}
    return some(result), *oracle(case.op, axis=case.axis, **rows)


def worst_ulp(case, result):
    """Return the largest error of a few rows in ulp."""
    return ulp_error(*some_rows(case, result))


def check(case, result):
    """Compare a few rows to the oracle: a wrong result is not worth timing."""
    got, expected, _ = some_rows(case, result)
    expected = expected.astype(np.float64)
    # Some peers compute in half precision, step by step, or lose all digits of a small loss: only what is plainly wrong shows.
    tolerance = {"rtol": 0.1, "atol": 0.1} if result.itemsize == 2 else {"rtol": 1e-4, "atol": 1e-6 * abs(expected).max()}
    np.testing.assert_allclose(got, expected, **tolerance)
