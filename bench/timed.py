"""The cases that are timed, from the registry that the tests use."""

import sys
from functools import lru_cache
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "tests"))

import numpy as np
from cases import Case, oracle

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
    rows, classes = case.shape
    return f"{case.op} {case.dtype} {rows} x {classes}"


def moved_bytes(case):
    """Return what a call must read and write at least."""
    logits = arguments(case)["logits"].nbytes
    return 2 * logits if case.op == "softmax" else logits


def check(case, result):
    """Compare the first rows to the oracle: a wrong result is not worth timing."""
    given = arguments(case)
    rows = {name: given[name][:4] for name in ("logits", "labels") if name in given}
    expected, _ = oracle(case.op, **rows)
    np.testing.assert_allclose(result[:4], expected.astype(result.dtype), rtol=1e-4)
