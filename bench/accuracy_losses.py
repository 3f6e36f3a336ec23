"""Worst errors in ulp of cross_entropy's losses and gradients, option by option, against longdouble.

Run as ``python bench/accuracy_losses.py``. A loss is measured in ulp of itself, a gradient in ulp of the larger of its two
terms, factor * p and the target's coefficient, which may cancel. (Softcap's tanh is measured by itself: one class, z_loss 1.)
"""

import numpy as np

import pylogits

CLASSES = (2, 3, 10, 100, 1000, 5000, 50000)
SPREADS = (0.1, 1, 3, 10, 30)
LOGITS = 400_000  # of each kind of row
CASES = {
    "labels": {},
    "probabilities": {},
    "label_smoothing": {"label_smoothing": 0.125},
    "z_loss": {"z_loss": 0.0078125},
    "weight": {"weight": True},
    "temperature": {"temperature": 0.75},
}  # numbers that are exact in every dtype


def exact(x, q, weight, label_smoothing=0.0, z_loss=0.0, temperature=1.0):
    """Return losses, gradients and the size of their larger terms."""
    x = x.astype(np.longdouble) / np.longdouble(temperature)
    top = x.argmax(1)[:, None]
    distance = np.take_along_axis(x, top, 1) - x
    terms = np.exp(-distance)
    np.put_along_axis(terms, top, 0, 1)
    others = terms.sum(1, keepdims=True)
    np.put_along_axis(terms, top, 1, 1)
    p, surprise = terms / (1 + others), distance + np.log1p(others)
    log_sum = np.take_along_axis(x, top, 1) + np.log1p(others)
    a = ((1 - label_smoothing) * q + np.longdouble(label_smoothing) / x.shape[1]) * weight
    factor = a.sum(1, keepdims=True) + 2 * z_loss * log_sum
    losses = (a * surprise).sum(1) + z_loss * log_sum[:, 0] ** 2
    return losses, (factor * p - a) / temperature, np.maximum(np.abs(factor * p), a) / temperature


def ulp(size, dtype):
    return np.spacing(np.maximum(size, np.finfo(dtype).tiny).astype(dtype)).astype(np.longdouble)


def worst(name, dtype):
    """Return the worst error of a case's losses, and of its gradients."""
    rng = np.random.default_rng(0)
    options = dict(CASES[name])
    of_losses = of_gradients = 0.0
    for classes in CLASSES:
        for spread in SPREADS:
            x = (rng.standard_normal((LOGITS // classes, classes)) * spread).astype(dtype)
            targets = rng.integers(classes, size=len(x))
            q = np.zeros(x.shape, np.longdouble)
            np.put_along_axis(q, targets[:, None], 1, 1)
            if name == "probabilities":
                targets = rng.random(x.shape).astype(dtype)
                q = targets.astype(np.longdouble)
            weight = rng.random(classes).astype(dtype) if "weight" in options else np.ones(classes, dtype)
            given = options | ({"weight": weight} if "weight" in options else {})
            losses, grad = pylogits.cross_entropy_value_and_grad(x, targets, reduction="none", **given)
            want, slopes, size = exact(
                x, q, weight.astype(np.longdouble), **{k: v for k, v in options.items() if k != "weight"}
            )
            of_losses = max(of_losses, float((np.abs(losses - want) / ulp(np.abs(want), dtype)).max()))
            of_gradients = max(of_gradients, float((np.abs(grad - slopes) / ulp(size, dtype)).max()))
    return of_losses, of_gradients


def worst_tanh(dtype):
    """Return the worst error of softcap * tanh(x / softcap), in ulp: with one class and no loss of its own, the z-loss is its
    square, whose root is less than half an ulp off."""
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.standard_normal(LOGITS) * spread for spread in (0.01, 1, 10, 100)]).astype(dtype)
    found = 0.0
    for softcap in (1.0, 30.0, 50.0):
        squares = pylogits.cross_entropy(x[:, None], np.zeros(len(x), int), softcap=softcap, z_loss=1.0, reduction="none")
        capped = np.abs(np.tanh(x.astype(np.longdouble) / softcap) * softcap)
        ours = np.sqrt(squares.astype(np.longdouble)).astype(dtype)
        error = np.abs(ours - capped) / ulp(capped, dtype)
        found = max(found, float(error[capped > 1e-6].max()))
    return found


def main():
    print("| case | loss, float32 | gradient | loss, float64 | gradient |\n| --- | --- | --- | --- | --- |")
    for name in CASES:
        figures = [f"{figure:.2f}" for dtype in (np.float32, np.float64) for figure in worst(name, dtype)]
        print(f"| {name} | {' | '.join(figures)} |", flush=True)
    print(f"\ntanh: {worst_tanh(np.float32):.2f} ulp in float32, {worst_tanh(np.float64):.2f} in float64")


if __name__ == "__main__":
    main()
