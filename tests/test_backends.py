"""Every backend and instruction set against the oracle: dtypes, shapes, layouts, options."""

import numpy as np
import pytest
from cases import LOSSES, OPS, ULP, Case, cases, dtype_of, lay_out, oracle, promised, ulp_error

import pylogits

LENGTHS = (*range(1, 68), 96, 127, 128, 129, 255, 257, 1000, 4095, 4096, 4097, 8193, 10007)


def run(op, **arguments):
    return getattr(pylogits, op)(**arguments)


def widened(arguments):
    """Return the arguments with half-precision arrays in float32."""
    return {
        name: value.astype(np.float32) if getattr(value, "itemsize", 0) == 2 else value for name, value in arguments.items()
    }


def check(case):
    """Run a case in float32 or float64 against the oracle; half precision is that, rounded once."""
    arguments = case.arguments()
    arrays = {name: value for name, value in arguments.items() if isinstance(value, np.ndarray)}
    before = {name: value.copy() for name, value in arrays.items()}

    wide = widened(arguments)
    expected, scale = oracle(case.op, **wide)
    exact = run(case.op, **wide)
    assert exact.dtype == ("float64" if case.dtype == "float64" else "float32")
    assert ulp_error(exact, expected, scale) <= promised(case.op, exact.dtype)
    if case.op != "logsumexp" and case.op not in LOSSES:
        exact = exact.astype(dtype_of(case.dtype))

    out = None
    if case.out == "in place":
        out = arrays.pop("logits")
    elif case.out:
        out = lay_out(np.zeros(expected.shape, exact.dtype), case.out)
    result = run(case.op, **arguments, out=out)
    assert result.dtype == exact.dtype
    if case.dtype in ULP:
        assert ulp_error(result, expected, scale) <= promised(case.op, case.dtype)
    else:
        np.testing.assert_array_equal(result, exact)
    assert out is None or result is out
    for name, value in arrays.items():
        np.testing.assert_array_equal(value, before[name], err_msg=f"{name} was overwritten")


@pytest.mark.parametrize("case", list(cases()), ids=str)
def test_case(case, backend):
    check(case)


@pytest.mark.parametrize("op", OPS)
def test_every_tail(op, backend, dtype):
    """Rows of every length around a vector, a block and a tile of columns."""
    for classes in LENGTHS:
        check(Case(op, dtype.name, (3, classes)))
        check(Case(op, dtype.name, (classes, 3), axis=0))


@pytest.mark.parametrize("op", OPS)
def test_a_runner_up_far_ahead_of_the_rest(op, backend, dtype):
    """The maximum, another term just above a power of two, and small ones that are added to it: the sum's logarithm lies below
    the power of two, where an ulp is half as large, so that all errors of the term and of the additions count double."""
    rng = np.random.default_rng(0)
    for classes in (65, 128, 129, 1000):
        rows = 4000 if classes < 129 else 300
        x = np.full((rows, classes), -200.0)
        x[:, 0] = 0
        x[:, 1] = np.log((1 + rng.random(rows) * 0.06) * 2.0 ** -rng.integers(1, 6, rows))
        x[:, 17:65:16] = x[:, 1:2] - rng.uniform(2, 17 if dtype == np.float32 else 37, (rows, 3))
        x = x.astype(dtype)
        for logits, axis in ((x, 1), (np.ascontiguousarray(x.T), 0)):
            arguments = {"logits": logits, "axis": axis}
            if op == "selective_log_softmax":
                arguments["indices"] = np.zeros((rows, 1), int) if axis else np.zeros((1, rows), int)
            elif op == "softmax_cross_entropy_with_logits":
                arguments["labels"] = np.eye(1, classes, dtype=dtype) if axis else np.eye(classes, 1, dtype=dtype)
            elif op in LOSSES:
                arguments["labels"] = np.zeros(rows, int)
            expected, scale = oracle(op, **arguments)
            assert ulp_error(run(op, **arguments), expected, scale) <= promised(op, dtype)


def test_probabilities_at_the_smallest_normal_number(backend, dtype):
    rng = np.random.default_rng(0)
    tiny = np.log(np.finfo(dtype).smallest_normal)
    for rows, classes in ((20_000, 10), (200, 1000)):
        x = (tiny + rng.uniform(2.5, 4, (rows, classes))).astype(dtype)
        x[:, :5] = rng.uniform(0, 1, (rows, 5))
        expected, scale = oracle("softmax", x)
        assert ulp_error(run("softmax", logits=x), expected, scale) <= promised("softmax", dtype)


def test_blocks_far_apart(backend, dtype):
    """In rows longer than 16 KiB the maximum of each part is as far from the others as makes a difference."""
    rng = np.random.default_rng(0)
    steps = [0, 12, 25, 30, 35, 38, 40, 45, 60, 75, 90, 103, 140, 340, 360, 380, 600, 700, 745, 800, np.inf]
    x = rng.standard_normal((2 * len(steps), 9001)) * 3
    x[: len(steps), :5000] -= np.array(steps)[:, None]
    x[len(steps) :, 5000:] -= np.array(steps)[:, None]
    x = x.astype(dtype)
    expected, scale = oracle("softmax", x)
    for logits, axis in ((x, 1), (np.ascontiguousarray(x.T), 0)):
        result = np.moveaxis(run("softmax", logits=logits, axis=axis), axis, 1)
        assert ulp_error(result, expected, scale) <= promised("softmax", dtype)


@pytest.mark.parametrize("op", OPS)
def test_every_number_of_rows(op, backend, dtype):
    for rows in range(1, 36):
        check(Case(op, dtype.name, (rows, 10)))
        check(Case(op, dtype.name, (10, rows), axis=0))


@pytest.mark.parametrize("op", OPS)
def test_large(op, backend):
    """Above the size from which a call runs on several threads; one row, a few, many."""
    for shape in ((1, 300_001), (3, 100_003), (30_011, 10), (301, 1000)):
        check(Case(op, "float32", shape))
    check(Case(op, "float32", (1000, 301), axis=0))
    check(Case(op, "float32", (2, 19, 90, 90), axis=1))


@pytest.mark.parametrize("op", OPS)
def test_nothing_is_written_around_out(op, backend, dtype):
    """A guard value between and around the elements of out stays."""
    for classes in (1, 5, 16, 17, 100):
        case = Case(op, dtype.name, (3, classes, 5), axis=1)
        expected = run(op, **case.arguments())
        memory = np.empty([2 * n + 2 for n in expected.shape], dtype)
        for step in (1, 2):
            memory[...] = 77
            out = memory[tuple(slice(1, 1 + step * n, step) for n in expected.shape)]
            run(op, **case.arguments(), out=out)
            np.testing.assert_array_equal(out, expected)
            out[...] = 77
            assert (memory == 77).all()


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_soft_labels_keep_their_digits(name, backend):
    """Half-precision logits do not make half-precision labels."""
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((7, 37)).astype(dtype_of(name))
    labels = rng.random((7, 37), np.float32)
    result, expected = (
        pylogits.softmax_cross_entropy_with_logits(labels=labels, logits=x) for x in (logits, logits.astype(np.float32))
    )
    np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("op", OPS[:3])
def test_longdouble(op, backend):
    case = Case(op, "longdouble", (7, 100))
    arguments = case.arguments()
    expected, _ = oracle(op, **arguments)
    result = run(op, **arguments)
    assert result.dtype == np.longdouble
    error = 16 * np.finfo(np.longdouble).eps
    np.testing.assert_allclose(result, expected, rtol=error, atol=error)
