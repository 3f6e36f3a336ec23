"""One row, one answer: a row's bits come from the row alone."""

import numpy as np
import pytest
from cases import LAYOUTS, OPS, lay_out

import pylogits

CLASSES = (1, 10, 37, 1000, 9001)


@pytest.fixture(autouse=True)
def c_backend(simd):
    threads = pylogits.get_num_threads()
    with pylogits.use_backend("c"):
        yield simd
    pylogits.set_num_threads(threads)


def draw(op, rows, classes, dtype):
    """Return random logits, and labels or indices, row by row."""
    rng = np.random.default_rng(classes)
    logits = (rng.standard_normal((rows, classes)) * 5).astype(dtype)
    if op == "softmax_cross_entropy_with_logits":
        return {"logits": logits, "labels": rng.random((rows, classes)).astype(dtype)}
    if op == "sparse_softmax_cross_entropy_with_logits":
        return {"logits": logits, "labels": rng.integers(classes, size=rows)}
    if op == "selective_log_softmax":
        return {"logits": logits, "indices": rng.integers(classes, size=(rows, 3))}
    return {"logits": logits}


def run(op, arguments, **options):
    return getattr(pylogits, op)(**arguments, **options)


def one_by_one(op, arguments):
    """Return the results of each row alone."""
    count = len(arguments["logits"])
    rows = [{name: value[i : i + 1] for name, value in arguments.items()} for i in range(count)]
    return np.concatenate([run(op, row) for row in rows])


def same_bits(got, expected):
    assert got.dtype == expected.dtype
    assert got.tobytes() == expected.tobytes()


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("op", OPS)
def test_batch_and_position(op, classes, dtype):
    arguments = draw(op, 37, classes, dtype)
    expected = one_by_one(op, arguments)
    for rows in (1, 2, 7, 16, 17, 33, 37):
        batch = {name: value[:rows] for name, value in arguments.items()}
        same_bits(run(op, batch), expected[:rows])
        batch = {name: value[-rows:] for name, value in arguments.items()}
        same_bits(run(op, batch), expected[-rows:])


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("op", OPS)
def test_instruction_set(op, classes, dtype, simd):
    arguments = draw(op, 37, classes, dtype)
    simd.use_isa("scalar")
    expected = run(op, arguments)
    for isa in simd.available_isas():
        simd.use_isa(isa)
        same_bits(run(op, arguments), expected)


@pytest.mark.parametrize("op", OPS)
def test_numba(op, dtype):
    pytest.importorskip("numba")
    for classes in CLASSES:
        arguments = draw(op, 37, classes, dtype)
        expected = run(op, arguments)
        with pylogits.use_backend("numba"):
            same_bits(run(op, arguments), expected)


@pytest.mark.parametrize("op", OPS)
def test_threads(op, dtype):
    for rows, classes in ((1, 500_000), (3, 200_001), (40_000, 10), (500, 1000)):
        arguments = draw(op, rows, classes, dtype)
        pylogits.set_num_threads(1)
        expected = run(op, arguments)
        for threads in (2, 3, 5):
            pylogits.set_num_threads(threads)
            same_bits(run(op, arguments), expected)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "broadcast"])
@pytest.mark.parametrize("op", OPS)
def test_layout(op, layout, dtype):
    for classes in CLASSES:
        arguments = draw(op, 18, classes, dtype)
        expected = run(op, arguments)
        logits = lay_out(arguments["logits"], layout)
        same_bits(run(op, {**arguments, "logits": logits}), expected)


@pytest.mark.parametrize("op", OPS)
def test_axis(op, dtype):
    for classes in CLASSES:
        arguments = draw(op, 35, classes, dtype)
        expected = run(op, arguments)
        turned = {name: np.ascontiguousarray(value.T) for name, value in arguments.items()}
        result = run(op, turned, axis=0)
        same_bits(np.ascontiguousarray(result.T), expected)


@pytest.mark.parametrize("op", OPS)
def test_half_precision_rounds_the_same_bits(op):
    for classes in CLASSES:
        arguments = draw(op, 18, classes, np.float16)
        expected = run(op, {**arguments, "logits": arguments["logits"].astype(np.float32)})
        result = run(op, arguments)
        same_bits(result, expected.astype(result.dtype))
