"""cross_entropy and its gradient: literals, an oracle for all options together, special values, bits, errors."""

import warnings

import ml_dtypes
import numpy as np
import pytest

import pylogits

LOGITS = np.array([[0.5, 1.5, 0.1], [2.2, 1.3, 1.7]])
TARGETS = np.array([1, 2])
SOFT = np.array([[0.25, 0.5, 0.25], [0.125, 0.0, 0.5]])  # the second row does not sum to 1
WEIGHT = np.array([0.5, 2.0, 0.25])
MASK = np.array([[True, True, False], [False, True, True]])

value_and_grad = pylogits.cross_entropy_value_and_grad


# ---- literals: from mpmath, by the formulas of docs/losses.md ----


@pytest.mark.parametrize(
    "targets, options, losses",
    [
        (TARGETS, {}, [0.47901069674771036, 1.1996759812098481]),
        (TARGETS, {"weight": WEIGHT}, [0.95802139349542072, 0.29991899530246202]),
        (TARGETS, {"label_smoothing": 0.25}, [0.67901069674771036, 1.1913426478765147]),
        (TARGETS, {"label_smoothing": 0.25, "weight": WEIGHT}, [0.89912266312624916, 0.54569832550410336]),
        (TARGETS, {"z_loss": 0.5}, [2.4372523656686394, 5.4037363792124956]),
        (TARGETS, {"softcap": 2}, [0.57009983389530643, 1.1092980123814873]),
        (TARGETS, {"temperature": 2}, [0.74342003714230979, 1.1322908035085471]),
        (TARGETS, {"sample_weight": [2, 0.5]}, [0.95802139349542072, 0.59983799060492405]),
        (TARGETS, {"ignore_index": 1}, [0, 1.1996759812098481]),
        (TARGETS, {"where": MASK}, [0.31326168751822283, 0.51301525239995262]),
        (TARGETS, {"where": MASK, "label_smoothing": 0.25}, [0.43826168751822283, 0.56301525239995262]),
        (SOFT, {}, [1.0790106967477104, 0.68729748825615504]),
        (SOFT, {"weight": WEIGHT}, [0.78132520238790605, 0.19368924647684651]),
        (
            TARGETS,
            {"weight": WEIGHT, "label_smoothing": 0.25, "z_loss": 0.5, "softcap": 2, "temperature": 2, "where": MASK},
            [1.6342178150914848, 1.3264132648010487],
        ),
    ],
    ids=lambda value: "+".join(value) or "plain" if isinstance(value, dict) else "",
)
def test_losses(backend, dtype, targets, options, losses):
    targets = targets if targets.dtype == int else targets.astype(dtype)
    got = pylogits.cross_entropy(LOGITS.astype(dtype), targets, reduction="none", **options)
    assert got.dtype == dtype
    np.testing.assert_allclose(got, losses, rtol=4 * np.finfo(dtype).eps)
    again, _ = value_and_grad(LOGITS.astype(dtype), targets, reduction="none", **options)
    np.testing.assert_array_equal(got, again)


@pytest.mark.parametrize(
    "reduction, options, expected",
    [
        ("mean", {}, 0.83934333897877922),
        ("sum", {}, 1.6786866779575584),
        ("sum_over_batch_size", {}, 0.83934333897877922),
        # PyTorch's: over the class weights of the targets, 2 + 0.25
        ("mean", {"weight": WEIGHT}, 0.55908461724350344),
        ("sum_over_batch_size", {"weight": WEIGHT}, 1.2579403887978827 / 2),
        # scikit-learn's: over the sample weights
        ("mean", {"sample_weight": [3, 1]}, (3 * 0.47901069674771036 + 1.1996759812098481) / 4),
        ("mean", {"sample_weight": [3, 1], "weight": WEIGHT}, (3 * 0.95802139349542072 + 0.29991899530246202) / 6.25),
        # TensorFlow's
        ("sum_over_batch_size", {"sample_weight": [3, 0]}, 3 * 0.47901069674771036 / 2),
        ("sum_by_nonzero_weights", {"sample_weight": [3, 0]}, 3 * 0.47901069674771036),
        # ignored rows count only for the batch size
        ("mean", {"ignore_index": 2}, 0.47901069674771036),
        ("sum_by_nonzero_weights", {"ignore_index": 2}, 0.47901069674771036),
        ("sum_over_batch_size", {"ignore_index": 2}, 0.47901069674771036 / 2),
    ],
)
def test_reductions(backend, reduction, options, expected):
    got = pylogits.cross_entropy(LOGITS, TARGETS, reduction=reduction, **options)
    assert isinstance(got, np.float64)
    assert got == pytest.approx(expected, rel=1e-15)


def test_gradient_of_the_question(backend, dtype):
    expected = [[0.113931500, -0.190302089, 0.076370569], [0.248373117, 0.100980973, -0.349354090]]
    _, grad = value_and_grad(LOGITS.astype(dtype), TARGETS)
    assert grad.dtype == dtype
    np.testing.assert_allclose(grad, expected, atol=1e-8)
    _, grad = value_and_grad(LOGITS.astype(dtype), SOFT.astype(dtype), reduction="sum")
    p = pylogits.softmax(LOGITS)
    np.testing.assert_allclose(grad, p * SOFT.sum(1, keepdims=True) - SOFT, rtol=0, atol=2 * np.finfo(dtype).eps)


def test_mean_of_probabilities_is_over_the_rows(backend):
    got = pylogits.cross_entropy(LOGITS, SOFT, weight=WEIGHT)
    assert got == pytest.approx((0.78132520238790605 + 0.19368924647684651) / 2, rel=1e-15)


@pytest.mark.parametrize("where", [None, np.zeros((2, 3), bool)])
@pytest.mark.parametrize("options", [{"ignore_index": 5}, {"sample_weight": 0}])
def test_nothing_counted(backend, options, where):
    targets = np.array([5, 5]) if "ignore_index" in options else TARGETS
    with pytest.warns(RuntimeWarning, match="mean of no losses is NaN"):
        loss, grad = value_and_grad(LOGITS, targets, where=where, **options)
    assert np.isnan(loss)
    assert not grad.any()
    loss, grad = value_and_grad(LOGITS, targets, where=where, reduction="sum_by_nonzero_weights", **options)
    assert loss == 0
    assert not grad.any()


# ---- all options together, against an oracle ----


def oracle(x, targets, axis, ignore_index, weight, sample_weight, label_smoothing, z_loss, softcap, temperature, where):
    """Losses and gradients (for loss_grad 1) in longdouble, and the size of the gradient's terms, classes last."""
    x = np.moveaxis(x, axis, -1).astype(np.longdouble) / temperature
    slope = 1 / np.longdouble(temperature)
    if softcap is not None:
        slope = slope / np.cosh(x / softcap) ** 2
        x = softcap * np.tanh(x / softcap)
    mask = np.ones(x.shape, bool) if where is None else np.moveaxis(where, axis, -1)
    x = np.where(mask, x, -np.inf)
    top = x.max(-1, keepdims=True)
    log_sum = top + np.log(np.exp(x - top).sum(-1, keepdims=True))
    if targets.dtype.kind in "iu":
        ignored = targets == ignore_index if ignore_index is not None else np.zeros(targets.shape, bool)
        q = np.eye(x.shape[-1], dtype=np.longdouble)[np.where(ignored, 0, targets)]
    else:
        ignored = np.zeros(x.shape[:-1], bool)
        q = np.moveaxis(targets, axis, -1).astype(np.longdouble)
    a = np.where(mask, (1 - label_smoothing) * q + label_smoothing / mask.sum(-1, keepdims=True), 0)
    a = a if weight is None else a * weight
    scale = np.ones(x.shape[:-1]) if sample_weight is None else np.broadcast_to(sample_weight, x.shape[:-1])
    scale = np.where(ignored, 0, scale)
    losses = np.where(a == 0, 0, a * (log_sum - np.where(mask, x, 0))).sum(-1) + z_loss * log_sum[..., 0] ** 2
    terms = (a.sum(-1, keepdims=True) + 2 * z_loss * log_sum) * np.exp(x - log_sum), a
    factor = scale[..., None] * slope * mask
    size = np.maximum(np.abs(terms[0]), np.abs(terms[1])) * np.abs(factor)
    return losses * scale, np.moveaxis((terms[0] - terms[1]) * factor, -1, axis), np.moveaxis(size, -1, axis)


def draw(rng, dtype):
    """Return random logits, targets and options, exact in the dtype that is computed in."""
    classes = int(rng.choice([2, 3, 10, 16, 33, 130, 1000, 5000], p=[0.2, 0.2, 0.2, 0.1, 0.1, 0.1, 0.05, 0.05]))
    shape = [int(n) for n in rng.choice([1, 2, 3, 9, 17], rng.integers(1, 3))] if classes < 500 else [3]
    axis = int(rng.integers(len(shape) + 1))
    rows = tuple(shape)
    shape.insert(axis, classes)
    x = (rng.standard_normal(shape) * rng.choice([0.1, 3, 10])).astype(dtype)
    if rng.random() < 0.3:
        x = np.asfortranarray(x)
    options = dict.fromkeys(("weight", "sample_weight", "softcap", "where", "ignore_index"))
    options |= {"label_smoothing": 0.0, "z_loss": 0.0, "temperature": 1.0}
    drawn = {
        "weight": rng.integers(0, 5, classes) / 4,
        "sample_weight": rng.integers(0, 5, rows) / 2,
        "softcap": 4.0,
        "where": rng.random(shape) < 0.7,
        "label_smoothing": 0.25,
        "z_loss": 0.125,
        "temperature": float(rng.choice([0.5, 0.7])),
    }
    options |= {name: value for name, value in drawn.items() if rng.random() < 0.35}
    options["temperature"] = float(np.dtype("f" if x.itemsize < 8 else "d").type(options["temperature"]))
    if rng.random() < 0.5:
        targets = rng.random(shape).astype(dtype) * (rng.random(shape) < 0.5)
        if options["where"] is not None:
            np.put_along_axis(options["where"], np.zeros_like(x[:1] if axis == 0 else x.take([0], axis), int), True, axis)
        return x, targets.astype(dtype), axis, options
    targets = rng.integers(0, min(classes, 120), rows).astype(rng.choice(["int8", "uint8", "int32", "uint64", "int64"]))
    if options["where"] is not None:
        np.put_along_axis(options["where"], np.expand_dims(targets.astype(int), axis), True, axis)
    if rng.random() < 0.5:
        options["ignore_index"] = int(rng.choice([-1, 1, 127, 255]))
        if 0 <= options["ignore_index"] <= np.iinfo(targets.dtype).max:
            targets[rng.random(rows) < 0.3] = options["ignore_index"]
        else:
            options["ignore_index"] = None
    return x, targets, axis, options


@pytest.mark.parametrize("name", ["float32", "float64", "float16", "bfloat16"])
def test_all_options(backend, name):
    dtype = np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
    rng = np.random.default_rng(1)
    eps = np.finfo(np.float64 if name == "float64" else np.float32).eps
    for _ in range(80):
        x, targets, axis, options = draw(rng, dtype)
        losses, grad, size = oracle(x, targets, axis, **options)
        loss_grad = rng.integers(1, 5, losses.shape) / 2
        got, slopes = value_and_grad(x, targets, axis=axis, reduction="none", loss_grad=loss_grad, **options)
        # A capped logit is good to 2 ulp: an absolute error in an exponential.
        slack = 20 if options["softcap"] else 4
        np.testing.assert_allclose(got, losses.astype(float), rtol=slack * eps, atol=slack * eps, err_msg=str(options))
        want, bound = grad * np.expand_dims(loss_grad, axis), slack * eps * size * np.expand_dims(loss_grad, axis)
        if dtype.itemsize == 2:
            rounding = ml_dtypes.finfo(dtype)
            bound = bound + np.maximum(np.abs(want) * float(rounding.eps), float(rounding.smallest_subnormal)) * 0.51
        assert slopes.dtype == dtype
        worst = np.abs(slopes.astype(np.longdouble) - want) - bound
        assert worst.max() <= 0, (options, axis, x.shape)
        for reduction in ("sum", "mean"):
            if reduction == "mean" and targets.dtype.kind == "f" and options["sample_weight"] is None:
                scalar, slopes = value_and_grad(x, targets, axis=axis, reduction=reduction, **options)
                np.testing.assert_allclose(scalar, losses.mean().astype(float), rtol=slack * eps, atol=slack * eps)
            if reduction == "sum":
                scalar = pylogits.cross_entropy(x, targets, axis=axis, reduction=reduction, **options)
                np.testing.assert_allclose(scalar, losses.sum().astype(float), rtol=slack * eps, atol=slack * eps)


@pytest.mark.parametrize("softcap, temperature", [(1.0, 1.0), (30.0, 1.0), (50.0, 1.0), (3.9, 1.3), (1.9999, 0.7)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_softcap_is_within_2_ulp(backend, dtype, softcap, temperature):
    rng = np.random.default_rng(0)
    softcap, temperature = dtype(softcap), dtype(temperature)
    scales = softcap * temperature * np.array([[1e-7], [0.05], [0.3], [2], [50]])
    x = (scales * rng.standard_normal((5, 3000))).astype(dtype).ravel()
    # one class has no loss of its own, and a z-loss that is the square of its capped logit
    options = {"softcap": softcap, "temperature": temperature, "z_loss": 1.0, "reduction": "none"}
    squares = pylogits.cross_entropy(x[:, None], np.zeros(len(x), int), **options)
    capped = np.sqrt(squares.astype(np.longdouble)).astype(dtype)
    exact = np.abs(softcap * np.tanh(x.astype(np.longdouble) / (np.longdouble(softcap) * temperature)))
    assert (np.abs(capped - exact) <= 2 * np.spacing(exact.astype(dtype))).all()


@pytest.mark.parametrize("option", ["weight", "label_smoothing", "z_loss", "softcap", "temperature", "where", "soft", "all"])
def test_finite_differences(backend, option):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 5))
    targets = rng.random((3, 5)) if option == "soft" else np.array([1, 4, 0])
    mask = rng.random((3, 5)) < 0.7
    mask[np.arange(3), [1, 4, 0]] = True
    every = {
        "weight": rng.random(5),
        "label_smoothing": 0.1,
        "z_loss": 0.1,
        "softcap": 2.0,
        "temperature": 0.7,
        "where": mask,
        "sample_weight": [1, 2, 0.5],
        "ignore_index": 0,
    }
    options = every if option == "all" else {option: every[option]} if option in every else {}
    _, grad = value_and_grad(x, targets, loss_grad=3.0, **options)
    step = 1e-5
    for index in np.ndindex(x.shape):
        moved = np.zeros_like(x)
        moved[index] = step
        above, below = (pylogits.cross_entropy(x + sign * moved, targets, **options) for sign in (1, -1))
        assert grad[index] == pytest.approx(3 * (above - below) / (2 * step), rel=5e-6, abs=1e-10)


# ---- special values ----


def test_ignored_rows_are_0_whatever_is_in_them(backend, dtype):
    x = np.array([[np.nan, np.inf, 0], [-np.inf, -np.inf, -np.inf], [0.5, 1.5, 0.1]], dtype)
    loss, grad = value_and_grad(x, [7, 7, 1], ignore_index=7, label_smoothing=0.1, z_loss=0.1)
    expected, slopes = value_and_grad(x[2:], [1], label_smoothing=0.1, z_loss=0.1)
    assert loss == expected
    np.testing.assert_array_equal(grad, np.vstack([np.zeros((2, 3), dtype), slopes]))


def test_masked_classes_count_for_nothing(backend, dtype):
    x = np.array([[0.5, np.nan, 1.5], [np.inf, 1.0, 2.0], [0.0, 0.0, 0.0]], dtype)
    where = np.array([[True, False, True], [False, True, True], [False, False, False]])
    for targets in ([0, 2, 1], np.array([[1, 9, 0], [9, 0, 1], [1, 1, 1]], dtype)):
        losses, grad = value_and_grad(x, targets, where=where, label_smoothing=0.1, z_loss=0.1, reduction="none")
        assert np.isfinite(losses).all()
        assert losses[2] == 0
        assert not grad[~where].any()
        _, narrow = value_and_grad(x[:1, ::2], [0], label_smoothing=0.1, z_loss=0.1, reduction="none")
        if isinstance(targets, list):
            np.testing.assert_allclose(grad[0, ::2], narrow[0], rtol=4 * np.finfo(dtype).eps)
    # a row without classes counts in a mean
    mean = pylogits.cross_entropy(x, [0, 2, 1], where=where)
    assert mean == pytest.approx((np.log1p(np.exp(1.0)) + np.log1p(np.exp(-1.0))) / 3, rel=1e-6)


def test_infinities(backend, dtype):
    x = np.array([[np.nan, 0, 0], [np.inf, 0, 0], [-np.inf, 0, 0], [-np.inf] * 3], dtype)
    losses, grad = value_and_grad(x, [1, 1, 0, 0], reduction="none")
    np.testing.assert_array_equal(losses, [np.nan, np.nan, np.inf, np.nan])
    assert np.isnan(grad[[0, 1, 3]]).all()
    np.testing.assert_array_equal(grad[2], [-1, 0.5, 0.5])
    # 0 x infinity: a class with probability or weight 0 counts for nothing
    losses, grad = value_and_grad(x[2:3], np.array([[0, 0.5, 0.5]], dtype), reduction="none")
    np.testing.assert_allclose(losses, np.log(2), rtol=1e-6)
    assert pylogits.cross_entropy(x[2:3], [0], weight=[0, 1, 1], reduction="none") == 0
    assert pylogits.cross_entropy(x[2:3], [1], label_smoothing=0.1, reduction="none") == np.inf
    np.testing.assert_array_equal(
        pylogits.cross_entropy(np.array([[np.inf, -np.inf]], dtype), [0], softcap=1, reduction="none"),
        pylogits.cross_entropy(np.array([[1, -1]], dtype), [0], reduction="none"),
    )


def test_large_logits(backend, dtype):
    x = np.array([[1e8, 1e8], [3e38, -3e38], [1e30, 0]], dtype)
    losses, grad = value_and_grad(x, [0, 0, 0], reduction="none")
    np.testing.assert_allclose(losses, [np.log(2), 0, 0], rtol=1e-6)
    np.testing.assert_allclose(grad, [[-0.5, 0.5], [0, 0], [0, 0]], rtol=1e-6)


def test_certain_rows_keep_their_digits(backend, dtype):
    # the losses are log1p(9 exp(-15)) and log1p(9 exp(-18)); other libraries say 3.2e-6 and 0
    x = np.zeros((2, 10), dtype)
    x[:, 0] = 15, 18
    losses, grad = value_and_grad(x, [0, 0], reduction="none")
    np.testing.assert_allclose(losses, [2.7531171e-06, 1.3706980e-07], rtol=2e-7)
    np.testing.assert_allclose(grad[:, 1], np.exp([-15.0, -18.0]) / (1 + 9 * np.exp([-15.0, -18.0])), rtol=2e-7)


def test_empty(backend, dtype):
    x = np.empty((0, 3), dtype)
    losses, grad = value_and_grad(x, np.empty(0, int), reduction="none")
    assert (losses.shape, grad.shape) == ((0,), (0, 3))
    assert pylogits.cross_entropy(x, np.empty(0, int), reduction="sum") == 0
    with pytest.warns(RuntimeWarning, match="mean of no losses"):
        assert np.isnan(pylogits.cross_entropy(x, np.empty(0, int)))
    with pytest.raises(ValueError, match="no classes"):
        pylogits.cross_entropy(np.empty((2, 0), dtype), [0, 0])


# ---- bits ----


def test_labels_and_one_hot_rows_have_the_same_bits(backend, dtype):
    if backend == "reference":
        pytest.skip("NumPy's sums are not exact")
    rng = np.random.default_rng(0)
    for classes in (2, 10, 33, 1000, 9000):
        x = (rng.standard_normal((20, classes)) * 5).astype(dtype)
        targets = rng.integers(classes, size=20)
        for options in ({}, {"label_smoothing": 0.1, "z_loss": 0.1, "temperature": 0.7}):
            hard = value_and_grad(x, targets, reduction="none", **options)
            soft = value_and_grad(x, np.eye(classes, dtype=dtype)[targets], reduction="none", **options)
            np.testing.assert_array_equal(hard[0], soft[0])
            np.testing.assert_array_equal(hard[1], soft[1])
        plain = pylogits.sparse_softmax_cross_entropy_with_logits(labels=targets, logits=x)
        np.testing.assert_array_equal(value_and_grad(x, targets, reduction="none")[0], plain)
        np.testing.assert_array_equal(pylogits.cross_entropy(x, targets, reduction="none"), plain)
        np.testing.assert_allclose(pylogits.cross_entropy(x, targets), plain.astype(float).mean(), rtol=1e-7)


@pytest.mark.parametrize("kind", ["plain", "all", "soft"])
def test_bits_of_a_row_are_its_own(backend, dtype, kind):
    if backend == "reference":
        pytest.skip("NumPy's sums depend on the layout")
    rng = np.random.default_rng(0)
    every = {"label_smoothing": 0.1, "z_loss": 0.1, "temperature": 0.7, "softcap": 9.0}
    for classes in (3, 17, 40, 1000, 1400, 4100):
        x = (rng.standard_normal((37, classes)) * 5).astype(dtype)
        targets = rng.random(x.shape).astype(dtype) if kind == "soft" else rng.integers(classes, size=37)
        options = {} if kind == "plain" else every | {"weight": rng.random(classes)}
        losses, grad = value_and_grad(x, targets, reduction="none", **options)
        turned = targets.T.copy() if kind == "soft" else targets
        others = [
            (value_and_grad(x[5:6], targets[5:6], reduction="none", **options), slice(5, 6)),
            (value_and_grad(np.asfortranarray(x), targets, reduction="none", **options), slice(None)),
        ]
        for_columns = value_and_grad(x.T.copy(), turned, axis=0, reduction="none", **options)
        others.append(((for_columns[0], for_columns[1].T), slice(None)))
        for (some_losses, some_grad), rows in others:
            np.testing.assert_array_equal(some_losses, losses[rows])
            np.testing.assert_array_equal(some_grad, grad[rows])


def test_many_rows_are_summed_alike_however_they_lie(backend, monkeypatch):
    """Rows are computed some at a time; where the cuts fall follows their order, not their layout."""
    from pylogits import _problem

    monkeypatch.setattr(_problem, "ROWS_AT_A_TIME", 37)
    rng = np.random.default_rng(0)
    x, targets = rng.standard_normal((3, 5, 50, 4)), rng.integers(5, size=(3, 50, 4))
    weight = rng.random((3, 50, 4))
    whole = value_and_grad(x, targets, axis=1, sample_weight=weight, ignore_index=3)
    last = np.moveaxis(x, 1, -1)
    for logits, labels, weights in (
        (last, targets, weight),
        (last.reshape(600, 5), targets.reshape(600), weight.reshape(600)),
    ):
        loss, grad = value_and_grad(logits, labels, sample_weight=weights, ignore_index=3)
        assert loss == whole[0] or backend == "reference"
        np.testing.assert_allclose(grad.reshape(last.shape), np.moveaxis(whole[1], 1, -1), rtol=1e-14)
    monkeypatch.undo()
    again = value_and_grad(x, targets, axis=1, sample_weight=weight, ignore_index=3)
    assert again[0] == pytest.approx(whole[0], rel=1e-15)


def alike(a, b):
    same_type = type(a) is type(b) and np.asarray(a).dtype == np.asarray(b).dtype
    return same_type and np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "sum_over_batch_size", "sum_by_nonzero_weights"])
@pytest.mark.parametrize("shape", [(3,), (1, 10), (37, 129), (4, 5, 6), (70000, 2)])
def test_the_common_case_is_no_exception(backend, dtype, shape, reduction):
    """Contiguous logits with int64 labels take a shorter way. Labels of another dtype don't, nor does an `out`."""
    rng = np.random.default_rng(0)
    x = (rng.standard_normal(shape) * 5).astype(dtype)
    x[..., 1] += 100 * rng.integers(2, size=shape[:-1])  # losses near 0
    targets = rng.integers(shape[-1], size=shape[:-1])
    few = np.asarray(targets, np.uint8)
    plain, grad = value_and_grad(x, np.asarray(targets), reduction=reduction)
    assert isinstance(plain, np.ndarray) == (reduction == "none" and len(shape) > 1)
    for got in (
        value_and_grad(x, few, reduction=reduction),
        value_and_grad(x, np.asarray(targets), reduction=reduction, grad_out=np.full_like(x, 7)),
        value_and_grad(in_place := x.copy(), np.asarray(targets), reduction=reduction, grad_out=in_place),
        (pylogits.cross_entropy(x, np.asarray(targets), reduction=reduction), grad),
        (pylogits.cross_entropy(x, few, reduction=reduction), grad),
    ):
        assert alike(got[0], plain)
        assert alike(got[1], grad)
    out = np.empty(np.shape(plain), dtype)
    assert pylogits.cross_entropy(x, np.asarray(targets), reduction=reduction, out=out) is out
    np.testing.assert_array_equal(out, plain)


def test_a_bad_target_leaves_grad_out_alone(backend, dtype):
    x, grad = np.zeros((3, 4), dtype), np.full((3, 4), 7, dtype)
    for targets in (np.array([0, 4, 1]), np.array([0, 4, 1], np.int32)):
        with pytest.raises(ValueError, match=r"target 4 at index \(1,\) is outside \[0, 4\)"):
            value_and_grad(x, targets, grad_out=grad)
        assert (grad == 7).all()


# ---- memory ----


def test_grad_out_may_be_an_input(backend, dtype):
    rng = np.random.default_rng(0)
    for shape in ((40, 7), (3, 9000), (40, 9000), (2, 7, 33)):
        x = rng.standard_normal(shape).astype(dtype)
        for targets in (rng.integers(7, size=np.delete(shape, 1)), rng.random(shape).astype(dtype)):
            options = {"softcap": 3.0, "label_smoothing": 0.1, "axis": 1}
            loss, grad = value_and_grad(x, targets, **options)
            for place in ("logits", "targets") if targets.dtype == dtype else ("logits",):
                given = {"logits": x.copy(), "targets": targets.copy()}
                buffer = given[place]
                again, result = value_and_grad(**given, grad_out=buffer, **options)
                assert result is buffer
                assert again == loss
                np.testing.assert_array_equal(buffer, grad)


def test_outputs_that_overlap_inputs(backend):
    rng = np.random.default_rng(0)
    buffer = rng.standard_normal(90)
    x, targets = buffer[:60].reshape(20, 3), rng.integers(3, size=20)
    losses, grad = value_and_grad(x, targets, reduction="none")
    shifted = buffer[30:].reshape(20, 3)
    got, _ = value_and_grad(x, targets, grad_out=shifted, reduction="none")
    np.testing.assert_array_equal(shifted, grad)
    np.testing.assert_array_equal(got, losses)
    x = rng.standard_normal((20, 3))
    losses, grad = value_and_grad(x, targets, reduction="none")
    soft = np.eye(3)[targets]
    got, slopes = value_and_grad(x, soft, grad_out=soft, reduction="none", out=x[:, 0])
    np.testing.assert_allclose(got, losses, rtol=1e-15)
    np.testing.assert_allclose(slopes, grad, rtol=1e-15, atol=1e-17)


def test_out_and_strided_grad_out(backend, dtype):
    x = LOGITS.astype(dtype)
    losses, grad = value_and_grad(x, TARGETS, reduction="none")
    out, around = np.zeros(4, dtype)[::2], np.full((4, 6), 7, dtype)
    result, slopes = value_and_grad(x, TARGETS, reduction="none", out=out, grad_out=around[::2, ::2])
    assert result is out
    np.testing.assert_array_equal(out, losses)
    np.testing.assert_array_equal(slopes, grad)
    assert (around[1::2] == 7).all()
    assert (around[:, 1::2] == 7).all()
    scalar = np.zeros((), dtype)
    assert pylogits.cross_entropy(x, TARGETS, out=scalar) is scalar
    assert scalar == pylogits.cross_entropy(x, TARGETS)


def test_no_temporaries(python):
    """The peak beside the outputs is 1 MiB and 256 KiB a thread; the logits have 40 MB."""
    done = python(
        """
import numpy as np, pylogits
rng = np.random.default_rng(0)

def memory(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(name))

for shape in ((1000, 10000), (1000000, 10)):
    x, targets = rng.standard_normal(shape, np.float32), rng.integers(10, size=shape[0], dtype=np.int32)
    grad, soft, where = np.ones_like(x), np.ones_like(x), np.ones(shape, bool)
    options = dict(label_smoothing=0.1, z_loss=0.1, softcap=9.0, where=where, grad_out=grad)
    for targets, options in ((targets, {"grad_out": grad}), (targets, options | {"ignore_index": 3}), (soft, options)):
        pylogits.cross_entropy_value_and_grad(x[:9], targets[:9], grad_out=grad[:9])
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak starts here
        before = memory("VmRSS")
        pylogits.cross_entropy_value_and_grad(x, targets, **options)
        print(memory("VmHWM") - before - pylogits.get_num_threads() * (256 << 10))
"""
    )
    assert done.returncode == 0, done.stderr
    assert max(map(int, done.stdout.split())) <= 1 << 20


# ---- errors ----


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"targets": [1, 3]}, ValueError, r"target 3 at index \(1,\) is outside \[0, 3\)"),
        ({"targets": [-1, 3]}, ValueError, r"target -1 at index \(0,\) is outside \[0, 3\)"),
        ({"targets": [-1, 3], "ignore_index": -1}, ValueError, r"target 3 at index \(1,\) is outside"),
        ({"targets": np.array([2**64 - 1, 0], np.uint64)}, ValueError, r"target 18446744073709551615 at index \(0,\)"),
        ({"where": MASK, "targets": [1, 0]}, ValueError, r"target 0 at index \(1,\) is masked out by where"),
        ({"where": MASK[:, :2]}, ValueError, r"where of shape \(2, 2\) does not broadcast"),
        ({"where": [[1, 1, 0]]}, TypeError, "where must be boolean"),
        ({"targets": [1, 2, 0]}, ValueError, r"targets that are class numbers must have shape \(2,\).*not \(3,\)"),
        ({"targets": SOFT[0]}, ValueError, r"targets that are probabilities must have shape \(2, 3\).*not \(3,\)"),
        ({"targets": [True, False]}, TypeError, "not bool"),
        ({"targets": SOFT * 1j}, TypeError, "targets must hold real numbers, not complex128"),
        ({"logits": LOGITS * 1j}, TypeError, "logits must hold real numbers, not complex128"),
        ({"logits": np.ma.array(LOGITS)}, TypeError, "where=~mask"),
        ({"targets": SOFT, "ignore_index": 1}, ValueError, "ignore_index is 1, but targets are probabilities"),
        ({"ignore_index": 1.0}, TypeError, r"ignore_index must be an int, not 1\.0"),
        ({"weight": [1, 2]}, ValueError, r"weight must have one entry a class, shape \(3,\), not \(2,\)"),
        ({"weight": [1, np.nan, 1]}, ValueError, r"weight nan at index \(1,\) is not finite"),
        ({"sample_weight": [1, 2, 3]}, ValueError, r"sample_weight of shape \(3,\) does not broadcast.*\(2,\)"),
        ({"sample_weight": [1, np.inf]}, ValueError, r"sample_weight inf at index \(1,\) is not finite"),
        ({"label_smoothing": 1.5}, ValueError, r"label_smoothing must be in \[0, 1\].*1\.5"),
        ({"label_smoothing": "0"}, TypeError, "label_smoothing must be a real number, not '0'"),
        ({"label_smoothing": None}, TypeError, "label_smoothing must be a real number, not None"),
        ({"label_smoothing": 10**400}, ValueError, r"label_smoothing must be in \[0, 1\]"),
        ({"z_loss": 10**400}, ValueError, "z_loss must be finite"),
        ({"z_loss": np.nan}, ValueError, "z_loss must be finite"),
        ({"softcap": 0}, ValueError, "softcap must be positive and finite.*not 0"),
        ({"softcap": np.inf}, ValueError, "softcap must be positive and finite"),
        ({"temperature": np.nan}, ValueError, "temperature must be positive and finite"),
        ({"temperature": 0}, ValueError, "temperature must be positive and finite"),
        ({"reduction": "avg"}, ValueError, "reduction must be one of mean|none|.*'avg'"),
        ({"axis": 2}, ValueError, "axis 2 is out of bounds"),
        ({"loss_grad": [1, 2, 3]}, ValueError, r"loss_grad of shape \(3,\) does not broadcast"),
        ({"loss_grad": [1, 2], "reduction": "mean"}, ValueError, r"loss_grad of shape \(2,\) does not broadcast.*\(\)"),
        ({"grad_out": np.zeros((2, 3), np.float32)}, TypeError, "grad_out must have dtype float64, not float32"),
        ({"grad_out": np.zeros((3, 2))}, ValueError, r"grad_out must have shape \(2, 3\), not \(3, 2\)"),
        ({"out": np.zeros(3)}, ValueError, r"out must have shape \(2,\), not \(3,\)"),
    ],
)
def test_errors(options, error, message):
    out, grad_out = np.full(2, 7.0), np.full((2, 3), 7.0)
    given = {"logits": LOGITS, "targets": TARGETS, "reduction": "none", "out": out, "grad_out": grad_out} | options
    if given["reduction"] != "none":
        del given["out"]
    logits, targets = given.pop("logits"), given.pop("targets")
    with pytest.raises(error, match=message):
        value_and_grad(logits, targets, **given)
    if "out" not in options:
        given.pop("out", None)
        with pytest.raises(error, match=message):
            value_and_grad(logits, targets, **given)
    assert (out == 7).all()
    assert (grad_out == 7).all()


def test_ignore_index_may_be_any_integer(backend):
    for dtype, ignored in (("uint64", 2**64 - 1), ("int64", -(2**63)), ("uint8", 255), ("int64", 1)):
        targets = np.array([ignored, 2], dtype)
        got = pylogits.cross_entropy(LOGITS, targets, ignore_index=ignored)
        assert got == pytest.approx(1.1996759812098481, rel=1e-15)
    # no target can be it
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = pylogits.cross_entropy(LOGITS, TARGETS.astype(np.uint8), ignore_index=-100)
    assert got == pytest.approx(0.83934333897877922, rel=1e-15)
