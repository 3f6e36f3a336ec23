"""cross_entropy is what other libraries have, where they are installed: their options, reductions and gradients."""

import numpy as np
import pytest

import pylogits

RNG = np.random.default_rng(0)
X = RNG.standard_normal((12, 5)) * 3
T = RNG.integers(5, size=12)
IGNORED = np.where(RNG.random(12) < 0.3, -100, T)
Q = RNG.dirichlet(np.ones(5), 12)
WEIGHT = RNG.random(5) + 0.1
SAMPLE_WEIGHT = RNG.integers(0, 4, 12) / 2

KINDS = {"labels": T, "ignored": IGNORED, "probabilities": Q}


def options_of(kind, **options):
    return options | ({"ignore_index": -100} if kind == "ignored" else {})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weight", [None, WEIGHT])
def test_torch(backend, kind, reduction, smoothing, weight):
    torch = pytest.importorskip("torch")
    targets = KINDS[kind]
    x = torch.tensor(X, requires_grad=True)
    upstream = np.random.default_rng(1).random(12) if reduction == "none" else 2.0
    expected = torch.nn.functional.cross_entropy(
        x,
        torch.tensor(targets),
        weight=None if weight is None else torch.tensor(weight),
        label_smoothing=smoothing,
        reduction=reduction,
    )
    (expected * torch.tensor(upstream)).sum().backward()
    loss, grad = pylogits.cross_entropy_value_and_grad(
        X,
        targets,
        weight=weight,
        label_smoothing=smoothing,
        reduction=reduction,
        loss_grad=upstream,
        **options_of(kind),
    )
    np.testing.assert_allclose(loss, expected.detach().numpy(), rtol=1e-13, atol=1e-14)
    np.testing.assert_allclose(grad, x.grad.numpy(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_torch_images(backend, kind):
    """Classes on axis 1, a row for each pixel."""
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(1).standard_normal((2, 5, 3, 4))
    targets = (
        np.random.default_rng(1).dirichlet(np.ones(5), (2, 3, 4)).transpose(0, 3, 1, 2)
        if kind == "probabilities"
        else T.reshape(1, 3, 4)
    )
    targets = targets if kind == "probabilities" else np.repeat(targets, 2, 0)
    if kind == "ignored":
        targets[0, 0] = -100
    tensor = torch.tensor(x, requires_grad=True)
    expected = torch.nn.functional.cross_entropy(tensor, torch.tensor(targets), weight=torch.tensor(WEIGHT))
    expected.backward()
    loss, grad = pylogits.cross_entropy_value_and_grad(x, targets, axis=1, weight=WEIGHT, **options_of(kind))
    assert loss == pytest.approx(expected.item(), rel=1e-13)
    np.testing.assert_allclose(grad, tensor.grad.numpy(), rtol=1e-12, atol=1e-15)


def test_torch_softcap_and_z_loss(backend):
    torch = pytest.importorskip("torch")
    x = torch.tensor(X, requires_grad=True)
    capped = 4 * torch.tanh(x / 0.7 / 4)
    losses = torch.nn.functional.cross_entropy(capped, torch.tensor(T), reduction="none")
    losses = losses + 0.01 * torch.logsumexp(capped, -1) ** 2
    losses.sum().backward()
    loss, grad = pylogits.cross_entropy_value_and_grad(X, T, softcap=4, temperature=0.7, z_loss=0.01, reduction="sum")
    assert loss == pytest.approx(losses.sum().item(), rel=1e-13)
    np.testing.assert_allclose(grad, x.grad.numpy(), rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("weight", [None, SAMPLE_WEIGHT])
def test_scikit_learn(backend, weight):
    metrics = pytest.importorskip("sklearn.metrics")
    expected = metrics.log_loss(T, Q, sample_weight=weight, labels=range(5))
    assert pylogits.cross_entropy(np.log(Q), T, sample_weight=weight) == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weight", [None, WEIGHT])
@pytest.mark.parametrize("ignore", [None, -100, 2])
@pytest.mark.parametrize("shape", [(12, 5), (3, 5, 4), (2, 5, 3, 2)])
def test_onnx(backend, reduction, weight, ignore, shape):
    onnx = pytest.importorskip("onnx")
    reference = pytest.importorskip("onnx.reference")
    rows = shape[:1] + shape[2:]
    x, t = X.reshape(-1)[: np.prod(shape)].reshape(shape), T.reshape(rows).copy()
    if ignore is not None:
        t[0] = ignore
    inputs = {"x": x, "t": t} | ({} if weight is None else {"w": weight})
    attributes = {} if ignore is None else {"ignore_index": ignore}
    node = onnx.helper.make_node("SoftmaxCrossEntropyLoss", [*inputs], ["loss"], reduction=reduction, **attributes)
    expected = reference.ReferenceEvaluator(node).run(None, inputs)[0]
    got = pylogits.cross_entropy(x, t, axis=1, weight=weight, ignore_index=ignore, reduction=reduction)
    np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_optax(backend):
    optax = pytest.importorskip("optax")
    jax = pytest.importorskip("jax")
    jax.config.update("jax_enable_x64", True)
    where = np.random.default_rng(1).random((12, 5)) < 0.7
    where[np.arange(12), T] = True
    soft = np.where(where, Q, 0)
    pairs = [
        (optax.softmax_cross_entropy_with_integer_labels, T, {}),
        (optax.softmax_cross_entropy_with_integer_labels, T, {"where": where}),
        (optax.softmax_cross_entropy, Q, {}),
        (optax.softmax_cross_entropy, soft, {"where": where}),
    ]
    for function, targets, options in pairs:
        expected, slopes = jax.value_and_grad(lambda x, f=function, t=targets, o=options: f(x, t, **o).sum())(X)
        loss, grad = pylogits.cross_entropy_value_and_grad(X, targets, reduction="sum", **options)
        np.testing.assert_allclose(loss, expected, rtol=1e-13)
        np.testing.assert_allclose(grad, slopes, rtol=1e-12, atol=1e-14)
    smooth = optax.smooth_labels(np.eye(5)[T], 0.1)
    expected = optax.softmax_cross_entropy(X, smooth)
    got = pylogits.cross_entropy(X, T, label_smoothing=0.1, reduction="none")
    np.testing.assert_allclose(got, expected, rtol=1e-13)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [1.0, SAMPLE_WEIGHT], ids=["ones", "weights"])
def test_tensorflow(backend, smoothing, weights):
    """tf.compat.v1.losses.softmax_cross_entropy and Keras's CategoricalCrossentropy, by the formulas of their documentation."""
    labels = np.eye(5)[T] * (1 - smoothing) + smoothing / 5
    log_p = X - np.log(np.exp(X).sum(1, keepdims=True))
    losses = -(labels * log_p).sum(1) * weights
    denominators = {
        "none": 1,
        "sum": 1,
        "sum_over_batch_size": 12,
        "sum_by_nonzero_weights": np.count_nonzero(np.broadcast_to(weights, 12)),
    }
    for reduction, denominator in denominators.items():
        expected = losses if reduction == "none" else losses.sum() / denominator
        for targets in (T, np.eye(5)[T]):
            got = pylogits.cross_entropy(X, targets, sample_weight=weights, label_smoothing=smoothing, reduction=reduction)
            np.testing.assert_allclose(got, expected, rtol=1e-12)
