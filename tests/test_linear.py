"""linear_cross_entropy is cross_entropy of inputs @ weight.T + bias, whatever the tiles, and never holds the logits."""

import warnings

import numpy as np
import pytest

import pylogits
from pylogits import linear

INPUTS = np.array([[1.0, 0.5], [0.0, 2.0]])
WEIGHT = np.array([[0.5, 0.0], [1.0, 1.0], [0.0, 0.2]])


def test_by_hand(backend):
    # logits [[0.5, 1.5, 0.1], [0, 2, 0.4]]: the first row is the worked example's
    losses = pylogits.linear_cross_entropy(INPUTS, WEIGHT, [1, 2], reduction="none")
    np.testing.assert_allclose(losses, [0.47901069674771, 1.8906016572368], rtol=1e-13)
    loss, (d_inputs, d_weight, d_bias) = pylogits.linear_cross_entropy_value_and_grad(INPUTS, WEIGHT, [1, 2])
    assert loss == pytest.approx(1.1848061769923, rel=1e-13)
    p = pylogits.softmax(INPUTS @ WEIGHT.T)
    slopes = (p - [[0, 1, 0], [0, 0, 1]]) / 2
    np.testing.assert_allclose(d_inputs, slopes @ WEIGHT, rtol=1e-13, atol=1e-16)
    np.testing.assert_allclose(d_weight, slopes.T @ INPUTS, rtol=1e-13, atol=1e-16)
    assert d_bias is None


def problem(rng, dtype, classes, features, hard):
    lead = (7, 3)
    x, w, bias = (rng.standard_normal(shape).astype(dtype) for shape in ((*lead, features), (classes, features), (classes,)))
    where = rng.random(classes) < 0.9
    where[0] = True
    options = {
        "weight": rng.random(classes),
        "sample_weight": rng.random(lead),
        "label_smoothing": 0.1,
        "z_loss": 0.01,
        "softcap": 5.0,
        "temperature": 0.7,
        "where": where,
    }
    chosen = {name: value for name, value in options.items() if rng.random() < 0.5}
    if hard:
        targets = rng.choice(np.flatnonzero(where), lead)
        targets[rng.random(lead) < 0.3] = -100
        return x, w, bias, targets, chosen | {"ignore_index": -100}
    return x, w, bias, rng.random((*lead, classes)).astype(dtype), chosen


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "options",
    [{}, {"label_smoothing": 0.1, "weight": True}, {"z_loss": 0.01, "where": True}, {"softcap": 5.0, "temperature": 0.7}],
    ids=" ".join,
)
def test_a_row_in_parts_has_the_bits_of_the_whole(backend, dtype, options):
    rng = np.random.default_rng(1)
    # of whole numbers, whose products are exact however they are cut
    x, w, bias = (rng.integers(-3, 4, shape).astype(dtype) for shape in ((1, 4), (9001, 4), (9001,)))
    arrays = {"weight": rng.random(9001), "where": np.arange(9001) % 7 != 1}
    options = {name: arrays.get(name, value) for name, value in options.items()} | {"reduction": "none"}
    loss, (_, _, slopes) = pylogits.linear_cross_entropy_value_and_grad(x, w, [4098], linear_bias=bias, **options)
    expected, grad = pylogits.cross_entropy_value_and_grad(x @ w.T + bias, [4098], **options)
    np.testing.assert_array_equal(loss, expected)
    np.testing.assert_array_equal(slopes, grad[0])


@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("classes", [5, 4096, 9001])
def test_equals_the_loss_of_the_logits(backend, dtype, classes, reduction, hard, monkeypatch):
    rng = np.random.default_rng(classes)
    for tile_bytes in (linear.TILE_BYTES, 1 << 17):
        monkeypatch.setattr(linear, "TILE_BYTES", tile_bytes)
        x, w, bias, targets, options = problem(rng, dtype, classes, 6, hard)
        upstream = rng.standard_normal(x.shape[:-1]) if reduction == "none" else 3.0
        logits = x @ w.T + bias
        options["reduction"] = reduction
        loss, slopes = pylogits.cross_entropy_value_and_grad(logits, targets, loss_grad=upstream, **options)
        value = pylogits.linear_cross_entropy(x, w, targets, linear_bias=bias, **options)
        again, (d_x, d_w, d_bias) = pylogits.linear_cross_entropy_value_and_grad(
            x, w, targets, linear_bias=bias, loss_grad=upstream, **options
        )
        np.testing.assert_array_equal(value, again)
        # The logits' own rounding errors, other from tile to tile, are a few eps times their size, here up to 10.
        eps = 100 * np.finfo(dtype).eps
        np.testing.assert_allclose(value, loss, rtol=eps, atol=eps)
        slopes = slopes.reshape(-1, classes).astype(float)
        expected = (slopes @ w).reshape(x.shape), slopes.T @ x.reshape(-1, 6), slopes.sum(0)
        for got, want in zip((d_x, d_w, d_bias), expected, strict=True):
            assert got.dtype == dtype
            np.testing.assert_allclose(got, want, rtol=0, atol=eps * np.abs(want).max())
        if hard:
            assert not d_x[targets == -100].any()


def test_the_inputs_of_ignored_rows_are_not_read(backend):
    x = np.array([[1.0, 0.5], [np.nan, np.inf]], np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss, (d_x, d_w, _) = pylogits.linear_cross_entropy_value_and_grad(x, WEIGHT.astype("f"), [1, -1], ignore_index=-1)
    assert loss == pytest.approx(0.4790107, rel=1e-6)
    assert np.isfinite(d_w).all()
    assert not d_x[1].any()


def test_nothing_counted(backend):
    with pytest.warns(RuntimeWarning, match="mean of no losses"):
        loss, grads = pylogits.linear_cross_entropy_value_and_grad(
            INPUTS, WEIGHT, [9, 9], linear_bias=np.zeros(3), ignore_index=9
        )
    assert np.isnan(loss)
    assert not any(grad.any() for grad in grads)
    empty = pylogits.linear_cross_entropy(INPUTS[:0], WEIGHT, np.empty(0, int), reduction="none")
    assert empty.shape == (0,)


def test_dtypes(backend):
    x, w = INPUTS.astype(np.float16), WEIGHT.astype(np.float32)
    loss, (d_x, d_w, _) = pylogits.linear_cross_entropy_value_and_grad(x, w, [1, 2])
    assert (loss.dtype, d_x.dtype, d_w.dtype) == (np.float32, np.float16, np.float32)
    assert loss == pytest.approx(1.1848062, rel=1e-6)
    out = np.empty(2, np.float32)
    assert pylogits.linear_cross_entropy(x, w, [1, 2], reduction="none", out=out) is out
    np.testing.assert_allclose(out, [0.4790107, 1.8906018], rtol=1e-6)
    # one input, and integers
    assert pylogits.linear_cross_entropy([1, 2], [[0, 0], [0, 0]], 1) == pytest.approx(np.log(2), rel=1e-15)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((INPUTS, WEIGHT[0], [1, 2]), ValueError, r"linear_weight must have shape \(classes, features\), not \(2,\)"),
        ((INPUTS[:, :1], WEIGHT, [1, 2]), ValueError, r"inputs must have shape \(\.\.\., 2\).*not \(2, 1\)"),
        ((INPUTS * 1j, WEIGHT, [1, 2]), TypeError, "inputs must hold real numbers, not complex128"),
        ((INPUTS, WEIGHT, [1, 3]), ValueError, r"target 3 at index \(1,\) is outside \[0, 3\)"),
        ((INPUTS, WEIGHT, [[1, 2]]), ValueError, r"targets that are class numbers must have shape \(2,\)"),
        ((INPUTS, WEIGHT[:0], [1, 2]), ValueError, "logits have no classes"),
    ],
)
def test_errors(arguments, error, message):
    out = np.full(2, 7.0)
    with pytest.raises(error, match=message):
        pylogits.linear_cross_entropy(*arguments, reduction="none", out=out)
    assert (out == 7).all()


def test_bias_of_another_length():
    with pytest.raises(ValueError, match=r"linear_bias must have one entry a class, shape \(3,\), not \(2,\)"):
        pylogits.linear_cross_entropy(INPUTS, WEIGHT, [1, 2], linear_bias=[0.0, 0.0])


def test_never_holds_the_logits(python):
    """2048 x 50257 logits are 393 MiB; a tenth of them, and the gradients, twice while they are added, must do."""
    done = python(
        """
import numpy as np, pylogits
rng = np.random.default_rng(0)
x, w = rng.standard_normal((2048, 16), np.float32), rng.standard_normal((50257, 16), np.float32)
targets = rng.integers(0, 50257, 2048)

def memory(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(name))

def peak(function):
    function(x[:8], w, targets[:8])
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts here
    before = memory("VmRSS")
    function(x, w, targets)
    return memory("VmHWM") - before

print(peak(pylogits.linear_cross_entropy), peak(pylogits.linear_cross_entropy_value_and_grad))
"""
    )
    assert done.returncode == 0, done.stderr
    value, grad = map(int, done.stdout.split())
    tenth, grads = 2048 * 50257 * 4 // 10, (2048 + 50257) * 16 * 4
    assert value <= tenth
    assert grad <= tenth + 2 * grads
