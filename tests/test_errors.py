"""Bad input: which error, what it names, and that nothing was written."""

import re

import numpy as np
import pytest
from cases import lay_out

import pylogits

ZEROS = np.zeros((13, 5), np.float32)
HUGE = pytest.param(10**400, id="10**400")  # no float holds it
ELEMENTWISE = (pylogits.softmax, pylogits.log_softmax)
PLAIN = (*ELEMENTWISE, pylogits.logsumexp)


def dense(labels, logits, **options):
    return pylogits.softmax_cross_entropy_with_logits(labels=labels, logits=logits, **options)


def sparse(labels, logits, **options):
    return pylogits.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits, **options)


def selective(logits, **options):
    return pylogits.selective_log_softmax(logits, np.zeros(13, int), **options)


def dense_of(logits, **options):
    return dense(np.zeros((13, 5), np.float32), logits, **options)


def sparse_of(logits, **options):
    return sparse(np.zeros(13, int), logits, **options)


def names(argument, dtype):
    """Return a pattern for a message that names the argument and its dtype."""
    dtype = np.dtype(dtype)
    return rf"{argument}.*({re.escape(dtype.name)}|{re.escape(str(dtype))})"


EVERY = (*PLAIN, selective, dense_of, sparse_of, pylogits.score, pylogits.check_logits)


# Logits.


@pytest.mark.parametrize("function", EVERY)
def test_masked_arrays(function):
    with pytest.raises(TypeError, match=r"logits.*where="):
        function(np.ma.masked_array(ZEROS, mask=ZEROS == 0))


def test_masked_labels():
    with pytest.raises(TypeError, match="labels"):
        dense(np.ma.masked_array(ZEROS), ZEROS)
    with pytest.raises(TypeError, match="labels"):
        sparse(np.ma.masked_array(np.zeros(13, int)), ZEROS)


@pytest.mark.parametrize("function", EVERY)
@pytest.mark.parametrize("dtype", ["complex64", "complex128", "O", "U3", "S3", "M8[s]", "m8[s]"])
def test_dtypes_that_are_not_real_numbers(function, dtype):
    with pytest.raises(TypeError, match=names("logits", dtype)):
        function(np.zeros((13, 5), dtype))


def test_structured_and_ragged_logits():
    with pytest.raises(TypeError, match="logits"):
        pylogits.softmax(np.zeros(3, [("a", float)]))
    with pytest.raises((TypeError, ValueError)):
        pylogits.softmax([[1, 2], [3]])
    with pytest.raises(TypeError, match="logits"):
        pylogits.softmax(None)


# Axis.


@pytest.mark.parametrize("function", EVERY)
@pytest.mark.parametrize("axis", [2, -3, 100])
def test_axis_out_of_range(function, axis):
    with pytest.raises(np.exceptions.AxisError, match=f"axis {axis} .*dimension 2"):
        function(ZEROS, axis=axis)


@pytest.mark.parametrize("function", PLAIN)
@pytest.mark.parametrize("axis", [(0, 0), (1, -1), (0, 1, -2)])
def test_axis_twice(function, axis):
    with pytest.raises(ValueError, match="axis"):
        function(ZEROS, axis=axis)


@pytest.mark.parametrize("function", EVERY)
@pytest.mark.parametrize("axis", [1.0, "1", (0.0,)])
def test_axis_that_is_no_integer(function, axis):
    with pytest.raises(TypeError):
        function(ZEROS, axis=axis)


@pytest.mark.parametrize("function", [selective, dense_of, sparse_of])
@pytest.mark.parametrize("axis", [(0, 1), None])
def test_one_axis_for_losses(function, axis):
    with pytest.raises(TypeError, match="axis"):
        function(ZEROS, axis=axis)


# Options.


@pytest.mark.parametrize("function", [*PLAIN, selective, pylogits.score])
@pytest.mark.parametrize("temperature", [0, 0.0, -1, -0.5, np.nan, np.inf, -np.inf, HUGE])
def test_temperature_value(function, temperature):
    with pytest.raises(ValueError, match=r"temperature.*"):
        function(ZEROS, temperature=temperature)


def test_temperature_in_the_message():
    with pytest.raises(ValueError, match=r"temperature.*-0\.5"):
        pylogits.softmax(ZEROS, temperature=-0.5)
    with pytest.raises(ValueError, match=r"temperature.*nan"):
        pylogits.softmax(ZEROS, temperature=np.nan)


@pytest.mark.parametrize("function", [*PLAIN, selective, pylogits.score])
@pytest.mark.parametrize("temperature", ["1", None, 1j, [1.0, 2.0], np.ones(3)])
def test_temperature_type(function, temperature):
    with pytest.raises(TypeError, match="temperature"):
        function(ZEROS, temperature=temperature)


@pytest.mark.parametrize("temperature", [1e-60, 1e60])
def test_temperature_that_the_dtype_cannot_hold(temperature):
    """Rounded to float32 it is 0 or infinite: refused, or as good as the limit."""
    logits = np.array([1, 2], np.float32)
    try:
        result = pylogits.softmax(logits, temperature=temperature)
    except ValueError as error:
        assert "temperature" in str(error)
    else:
        assert result.tolist() == ([0, 1] if temperature < 1 else [0.5, 0.5])


@pytest.mark.parametrize("function", PLAIN)
@pytest.mark.parametrize("where", [1, 0.0, np.ones((13, 5)), np.ones(5, int), [1, 0, 1, 0, 1], "x"])
def test_where_type(function, where):
    with pytest.raises(TypeError, match="where"):
        function(ZEROS, where=where)


@pytest.mark.parametrize("function", PLAIN)
@pytest.mark.parametrize("shape", [(13,), (4,), (5, 13), (2, 13, 5), (1, 13, 5)])
def test_where_shape(function, shape):
    with pytest.raises(ValueError, match="where"):
        function(ZEROS, where=np.ones(shape, bool))


def test_options_are_keyword_only():
    for call in (
        lambda: pylogits.softmax(ZEROS, -1, True),
        lambda: pylogits.logsumexp(ZEROS, -1, True),
        lambda: pylogits.softmax_cross_entropy_with_logits(ZEROS, ZEROS),
        lambda: pylogits.sparse_softmax_cross_entropy_with_logits(np.zeros(13, int), ZEROS),
    ):
        with pytest.raises(TypeError):
            call()


# Labels.


@pytest.mark.parametrize("label", [5, 7, -1, 127, -128])
@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "int64", ">i4"])
def test_sparse_label_outside(backend, label, dtype):
    labels = np.zeros(13, dtype)
    labels[12] = label
    out = np.full(13, 9, np.float32)
    with pytest.raises(ValueError, match=rf"label {label} at index \(12,\) is outside \[0, 5\)"):
        sparse(labels, ZEROS, out=out)
    assert (out == 9).all()


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "uint64", ">u8"])
def test_sparse_label_outside_unsigned(backend, dtype):
    largest = np.iinfo(dtype).max
    labels = np.zeros(13, dtype)
    labels[3] = largest
    with pytest.raises(ValueError, match=rf"label {largest} at index \(3,\) is outside \[0, 5\)"):
        sparse(labels, ZEROS)


@pytest.mark.parametrize("label", [2**32, 2**32 + 1, -(2**32), 2**63 - 1, -(2**63)])
def test_sparse_label_that_wraps_in_32_bits(backend, label):
    with pytest.raises(ValueError, match=rf"label {label} at index \(1,\) is outside \[0, 5\)"):
        sparse([0, label], ZEROS[:2])


def test_place_of_a_label(backend):
    logits = np.zeros((3, 5, 4), np.float64)
    labels = np.zeros((3, 4), int)
    labels[2, 1] = 5
    with pytest.raises(ValueError, match=r"label 5 at index \(2, 1\) is outside \[0, 5\)"):
        sparse(labels, logits, axis=1)
    with pytest.raises(ValueError, match=r"label 5 at index \(1, 2\) is outside \[0, 5\)"):
        sparse(labels.T, logits.transpose(2, 0, 1))
    with pytest.raises(ValueError, match=r"label -2 .*is outside \[0, 5\)"):
        sparse(-2, np.zeros(5))


@pytest.mark.parametrize("layout", ["contiguous", "sliced", "byteswapped", "misaligned"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "longdouble"])
def test_label_outside_in_a_long_array(backend, layout, dtype):
    """Many rows, on threads or piece by piece: nothing is written, the place is exact."""
    logits = lay_out(np.zeros((2, 50_000, 5), dtype), layout)
    labels = np.zeros((2, 50_000), np.int64)
    labels[1, 49_998] = 5
    place = r"5 at index \(1, 49998\) is outside \[0, 5\)"
    out = np.full((2, 50_000), 9, np.float32 if dtype == "float16" else dtype)
    with pytest.raises(ValueError, match=place):
        sparse(labels, logits, out=out)
    assert (out == 9).all()
    out = np.full((2, 50_000), 9, dtype)
    with pytest.raises(ValueError, match=place):
        pylogits.selective_log_softmax(logits, labels, out=out)
    assert (out == 9).all()
    with pytest.raises(ValueError, match=place):
        pylogits.score(logits, labels)


def test_selective_index_outside(backend):
    indices = np.zeros((13, 3), int)
    indices[4, 2] = 5
    out = np.full((13, 3), 9, np.float32)
    with pytest.raises(ValueError, match=r"5 at index \(4, 2\) is outside \[0, 5\)"):
        pylogits.selective_log_softmax(ZEROS, indices, out=out)
    assert (out == 9).all()
    with pytest.raises(ValueError, match=r"-1 at index \(12,\) is outside \[0, 5\)"):
        pylogits.selective_log_softmax(ZEROS, [0] * 12 + [-1])
    with pytest.raises(ValueError, match=r"5 at index \(2, 4\) is outside \[0, 5\)"):
        pylogits.selective_log_softmax(ZEROS.T, indices.T, axis=0)


@pytest.mark.parametrize("dtype", [float, "float32", "float16", bool, complex, "O", "U1", "m8[s]"])
def test_labels_that_are_no_integers(dtype):
    labels = np.zeros(13, dtype)
    with pytest.raises(TypeError, match=names("labels", dtype)):
        sparse(labels, ZEROS)
    with pytest.raises(TypeError, match=names("indices", dtype)):
        pylogits.selective_log_softmax(ZEROS, labels)
    with pytest.raises(TypeError, match=names("labels", dtype)):
        pylogits.one_hot(labels, 3)
    with pytest.raises(TypeError, match=names("targets", dtype)):
        pylogits.score(ZEROS, labels)


@pytest.mark.parametrize("dtype", [complex, "O", "U1", "m8[s]"])
def test_dense_labels_that_are_no_numbers(dtype):
    with pytest.raises(TypeError, match="labels"):
        dense(np.zeros((13, 5), dtype), ZEROS)


def test_class_indices_given_as_dense_labels():
    with pytest.raises((TypeError, ValueError), match="labels"):
        dense(np.zeros(13, int), ZEROS)


def test_one_hot_labels_given_as_sparse():
    with pytest.raises(TypeError, match="labels"):
        sparse(np.zeros((13, 5)), ZEROS)
    with pytest.raises(ValueError, match="labels"):
        sparse(np.zeros((13, 5), int), ZEROS)


@pytest.mark.parametrize("shape", [(), (1,), (12,), (13, 1), (1, 13), (5,)])
def test_sparse_labels_shape(shape):
    with pytest.raises(ValueError, match=r"labels.*shape"):
        sparse(np.zeros(shape, int), ZEROS)


@pytest.mark.parametrize("shape", [(13,), (4,), (12, 5), (5, 13), (2, 1, 1, 2)])
def test_dense_labels_shape(shape):
    with pytest.raises(ValueError, match="labels"):
        dense(np.zeros(shape, np.float32), ZEROS)


@pytest.mark.parametrize("shape", [(), (1,), (12,), (12, 3), (1, 3), (13, 2, 1), (5, 13)])
def test_indices_shape(shape):
    with pytest.raises(ValueError, match="indices"):
        pylogits.selective_log_softmax(ZEROS, np.zeros(shape, int))


def test_losses_of_no_classes():
    empty = np.empty((13, 0), np.float32)
    with pytest.raises(ValueError, match=r"logits.*class"):
        dense(empty, empty)
    with pytest.raises(ValueError, match=r"logits.*class"):
        sparse(np.zeros(13, int), empty)
    with pytest.raises(ValueError):
        pylogits.selective_log_softmax(empty, np.zeros(13, int))


def test_losses_of_a_scalar():
    with pytest.raises(np.exceptions.AxisError):
        sparse(0, 1.5)
    with pytest.raises(np.exceptions.AxisError):
        dense(1.0, 1.5)


def test_one_hot_errors():
    with pytest.raises(ValueError, match=r"label 7 at index \(0, 1\) is outside \[0, 5\)"):
        pylogits.one_hot([[1, 7]], 5)
    with pytest.raises(ValueError, match=r"label -1 at index \(1,\) is outside \[0, 5\)"):
        pylogits.one_hot([0, -1], 5)
    with pytest.raises(ValueError, match=r"label 18446744073709551615 at index \(0,\)"):
        pylogits.one_hot(np.array([2**64 - 1], np.uint64), 5)
    with pytest.raises(ValueError, match=r"num_classes.*-1"):
        pylogits.one_hot([0], -1)
    with pytest.raises(TypeError, match="num_classes"):
        pylogits.one_hot([0], 5.0)
    with pytest.raises(np.exceptions.AxisError):
        pylogits.one_hot([0], 5, axis=2)


# Out.


CALLS = {
    "softmax": (lambda out: pylogits.softmax(ZEROS, out=out), (13, 5)),
    "log_softmax": (lambda out: pylogits.log_softmax(ZEROS, out=out), (13, 5)),
    "logsumexp": (lambda out: pylogits.logsumexp(ZEROS, out=out), (13,)),
    "keepdims": (lambda out: pylogits.logsumexp(ZEROS, keepdims=True, out=out), (13, 1)),
    "selective": (lambda out: selective(ZEROS, out=out), (13,)),
    "dense": (lambda out: dense_of(ZEROS, out=out), (13,)),
    "sparse": (lambda out: sparse_of(ZEROS, out=out), (13,)),
}


@pytest.fixture(params=CALLS)
def call(request):
    """A call that takes out, and the shape of its result."""
    return CALLS[request.param]


@pytest.mark.parametrize("dtype", ["float64", "float16", "int32", "complex64", "bool", "O"])
def test_out_dtype(call, dtype):
    function, shape = call
    out = np.zeros(shape, dtype)
    with pytest.raises(TypeError, match=names("out", dtype)):
        function(out)
    assert (out == 0).all()


def test_out_shape(call):
    function, shape = call
    for wrong in ((*shape, 1), (1, *shape), shape[:-1], (shape[0] + 1, *shape[1:]), ()):
        out = np.full(wrong, 9, np.float32)
        with pytest.raises(ValueError, match=r"out.*shape"):
            function(out)
        assert (out == 9).all()


def test_out_read_only(call):
    function, shape = call
    out = np.full(shape, 9, np.float32)
    out.flags.writeable = False
    with pytest.raises(ValueError, match=r"out.*read-only"):
        function(out)
    assert (out == 9).all()


def test_out_is_no_array(call):
    function, shape = call
    for out in ([0.0] * 13, 1.0, "out", np.ma.zeros(shape, np.float32)):
        with pytest.raises(TypeError, match="out"):
            function(out)


OVERLAPS = ["shifted down", "shifted right", "transposed", "reversed rows", "reversed classes"]


def overlapping(kind, dtype):
    """Return logits of (13, 13), and an out that shares part of their memory."""
    buffer = np.random.default_rng(0).standard_normal((14, 13)).astype(dtype)
    logits = buffer[:-1]
    outs = {
        "shifted down": buffer[1:],
        "shifted right": buffer.ravel()[1:170].reshape(13, 13),
        "transposed": logits.T,
        "reversed rows": logits[::-1],
        "reversed classes": logits[:, ::-1],
    }
    return logits, outs[kind]


@pytest.mark.parametrize("function", ELEMENTWISE)
@pytest.mark.parametrize("kind", OVERLAPS)
def test_out_overlaps_logits(backend, dtype, function, kind):
    """Right, or refused before anything is written."""
    logits, out = overlapping(kind, dtype)
    expected, before = function(logits.copy()), logits.copy()
    try:
        function(logits, out=out)
    except ValueError as error:
        assert "out" in str(error)
        np.testing.assert_array_equal(logits, before)
    else:
        np.testing.assert_array_equal(out, expected)


def test_small_out_overlaps_logits(backend, dtype):
    def check(call, logits, out):
        expected, before = call(logits.copy(), None), logits.copy()
        try:
            call(logits, out)
        except ValueError as error:
            assert "out" in str(error)
            np.testing.assert_array_equal(logits, before)
        else:
            np.testing.assert_array_equal(out, expected)

    labels = np.arange(13)
    for place in (np.s_[:, 0], np.s_[:, -1], np.s_[0], np.s_[5], np.s_[-1]):
        for call in (
            lambda x, out: pylogits.logsumexp(x, out=out),
            lambda x, out: sparse(labels, x, out=out),
            lambda x, out: dense(np.eye(13, dtype=dtype), x, out=out),
            lambda x, out: pylogits.selective_log_softmax(x, labels, out=out),
        ):
            logits, _ = overlapping("transposed", dtype)
            check(call, logits, logits[place])


@pytest.mark.parametrize("place", [np.s_[:, 0], np.s_[0]])
def test_out_overlaps_labels(backend, dtype, place):
    logits, _ = overlapping("transposed", dtype)
    labels = abs(logits)[::-1].copy()
    expected, before = dense(labels, logits), labels.copy()
    try:
        dense(labels, logits, out=labels[place])
    except ValueError as error:
        assert "out" in str(error)
        np.testing.assert_array_equal(labels, before)
    else:
        np.testing.assert_array_equal(labels[place], expected)


@pytest.mark.parametrize("kind", OVERLAPS)
def test_out_overlaps_grad(backend, dtype, kind):
    grad, out = overlapping(kind, dtype)
    probs = pylogits.softmax(grad)
    expected = pylogits.softmax_backward(grad.copy(), probs)
    np.testing.assert_array_equal(pylogits.softmax_backward(grad, probs, out=out), expected)


def test_out_overlaps_where(backend):
    """An integer view of the mask's memory is a float array: right, or refused."""
    memory = np.zeros(13 * 5, np.float32)
    where = memory.view(bool)[: 13 * 5].reshape(13, 5)
    where[:, 1:3] = True
    expected = pylogits.softmax(ZEROS, where=where.copy())
    try:
        result = pylogits.softmax(ZEROS, where=where, out=memory.reshape(13, 5))
    except ValueError as error:
        assert "out" in str(error)
    else:
        np.testing.assert_array_equal(result, expected)


def test_out_overlaps_grad_out(backend):
    memory = np.full(13 * 6, 7.0, np.float32).reshape(13, 6)
    labels = np.zeros(13, int)
    options = {"reduction": "none", "grad_out": memory[:, :5]}
    with pytest.raises(ValueError, match="out and grad_out overlap"):
        pylogits.cross_entropy_value_and_grad(ZEROS, labels, out=memory[:, 4], **options)
    assert (memory == 7).all()
    losses, grad = pylogits.cross_entropy_value_and_grad(ZEROS, labels, out=memory[:, 5], **options)
    expected = pylogits.cross_entropy_value_and_grad(ZEROS, labels, reduction="none")
    np.testing.assert_array_equal(losses, expected[0])
    np.testing.assert_array_equal(grad, expected[1])


# score and check_logits.


@pytest.mark.parametrize("top_k", [-1, 6, 100])
def test_top_k_value(top_k):
    with pytest.raises(ValueError, match=rf"top_k.*{top_k}"):
        pylogits.score(ZEROS, top_k=top_k)


@pytest.mark.parametrize("top_k", [1.0, "1", None])
def test_top_k_type(top_k):
    with pytest.raises(TypeError, match="top_k"):
        pylogits.score(ZEROS, top_k=top_k)


def test_score_targets(backend):
    with pytest.raises(ValueError, match=r"7 at index \(12,\) is outside \[0, 5\)"):
        pylogits.score(ZEROS, [0] * 12 + [7])
    with pytest.raises(ValueError, match=r"targets.*shape"):
        pylogits.score(ZEROS, [0] * 12)


def test_score_of_no_classes():
    with pytest.raises(ValueError, match="classes"):
        pylogits.score(np.empty((3, 0)))
