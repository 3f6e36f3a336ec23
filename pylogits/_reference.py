"""The definition: every operation in plain NumPy, in a wider type than the logits (float64, or longdouble).

A sum of exponentials is 1 + others, where one maximum is the 1: its logarithm is log1p(others), in which a confident row
keeps its digits.

It is the backend contract in its simplest form, the oracle of the tests, and the fallback for dtypes that no kernel has.

The contract. Arrays have any strides. Logits and outputs of their size are (outer, classes, inner), with at least one
row and one class; a row is logits[i, :, j] and results per row are (outer, inner). A kernel writes to the given outputs
and validates nothing but labels: all of them are checked before anything is written, and the result is -1 or the flat
index of the first one outside [0, classes). `out` may be the logits themselves. `threads` is how many may be used.

cross_entropy has labels or else probabilities, which are like logits; its sample weights and upstream gradients per row and
its class weights are contiguous and in the dtype that is computed in.
"""

import sys
from fractions import Fraction
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


class Scores(NamedTuple):
    """What `score` says of each row.

    Attributes
    ----------
    prediction : ndarray of int64
        The class with the largest logit, the first of equals.
    confidence : ndarray
        Its probability.
    entropy : ndarray
        Of the row's distribution, in nats.
    logsumexp : ndarray
        The log of the sum of the exponentials of the logits / temperature.
    top_k_indices : ndarray of int64
        The K classes with the largest logits, best first, in place of the class axis.
    top_k_probabilities : ndarray
        Their probabilities.
    loss : ndarray or None
        With targets: the cross entropy, in nats.
    correct : ndarray of bool or None
        With targets: whether the prediction is the target.

    Examples
    --------
    >>> import pylogits
    >>> scores = pylogits.score([[0.5, 1.5, 0.1], [2.2, 1.3, 1.7]])
    >>> scores.prediction
    array([1, 0])
    >>> scores.loss is None
    True
    """

    prediction: Array
    confidence: Array
    entropy: Array
    logsumexp: Array
    top_k_indices: Array
    top_k_probabilities: Array
    loss: Array | None
    correct: Array | None


class LossOptions(NamedTuple):
    """What a cross entropy may be given beside logits, targets and arrays of their size; the defaults change nothing."""

    weight: Array | None = None  # (classes), in the dtype that is computed in
    ignore_index: int | None = None
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None
    temperature: float = 1.0
    scale: tuple[float, float] = (1.0, 0.0)  # of gradients, as a pair: all but the derivative for logits / temperature

    @property
    def are_default(self) -> bool:
        """Whether nothing is given but the temperature and the scale."""
        return (
            self.weight is None
            and self.ignore_index is None
            and self.softcap is None
            and self.label_smoothing == self.z_loss == 0
        )


@lru_cache(maxsize=64)
def reciprocal(a: float, b: float, dtype: np.dtype[Any]) -> tuple[float, float]:
    """1 / (a b) as the sum of two numbers of a dtype."""
    greatest = Fraction(min(float(np.finfo(dtype).max), sys.float_info.max))
    number = max(-greatest, min(greatest, 1 / (Fraction(a) * Fraction(b))))
    high = float(dtype.type(float(number)))
    return high, float(dtype.type(float(number - Fraction(high))))


DTYPES: frozenset[np.dtype[Any]] = frozenset({np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.longdouble)})


def _widen(logits: Array) -> Array:
    """A copy in a wider type."""
    return logits.astype(np.float64 if logits.dtype == np.float32 else np.longdouble)


def _shifted(wide: Array, where: Array | None, temperature: float) -> tuple[Array, Array, Array]:
    """x - max and max, both over temperature, and the sum of exp(x - max) over all classes but one maximum; spoils `wide`."""
    if where is not None:
        wide[~where] = -np.inf
    maximum = wide.max(axis=1, keepdims=True)
    with np.errstate(all="ignore"):
        shifted = (wide - maximum) / temperature
        terms = np.exp(shifted)
        first = np.expand_dims(shifted.argmax(axis=1), 1)
        np.put_along_axis(terms, first, np.where(np.isfinite(maximum), 0, np.nan), axis=1)
        return shifted, maximum / temperature, terms.sum(axis=1, keepdims=True)


def softmax(logits: Array, where: Array | None, temperature: float, out: Array, threads: int) -> None:
    shifted, _, others = _shifted(_widen(logits), where, temperature)
    with np.errstate(all="ignore"):
        result = np.exp(shifted) / (1 + others)
        out[...] = result if where is None else np.where(where, result, 0)


def log_softmax(logits: Array, where: Array | None, temperature: float, out: Array, threads: int) -> None:
    shifted, _, others = _shifted(_widen(logits), where, temperature)
    with np.errstate(all="ignore"):
        result = shifted - np.log1p(others)
        out[...] = result if where is None else np.where(where, result, -np.inf)


def logsumexp(logits: Array, where: Array | None, temperature: float, out: Array, threads: int) -> None:
    _, maximum, others = _shifted(_widen(logits), where, temperature)
    with np.errstate(all="ignore"):
        out[...] = np.where(np.isfinite(maximum), maximum + np.log1p(others), maximum)[:, 0]


def find_bad_label(labels: Array, classes: int) -> int:
    """The flat index of the first label outside [0, classes), or -1."""
    bad = ((labels < 0) | (labels >= classes)).ravel()
    return int(bad.argmax()) if bad.any() else -1


def selective_log_softmax(logits: Array, indices: Array, temperature: float, out: Array, threads: int) -> int:
    bad = find_bad_label(indices, logits.shape[1])
    if bad == -1:
        shifted, _, others = _shifted(_widen(logits), None, temperature)
        with np.errstate(all="ignore"):
            out[...] = np.take_along_axis(shifted - np.log1p(others), indices, axis=1)
    return bad


def softmax_cross_entropy_with_logits(logits: Array, labels: Array, out: Array, threads: int) -> None:
    shifted, _, others = _shifted(_widen(logits), None, 1.0)
    with np.errstate(all="ignore"):
        losses = labels * (np.log1p(others) - shifted)
        out[...] = np.where(labels == 0, 0, losses).sum(axis=1)
        # 0 x NaN is NaN all the same: only an impossible class (probability 0) may be left out
        out[np.isnan(others[:, 0])] = np.nan


def sparse_softmax_cross_entropy_with_logits(logits: Array, labels: Array, out: Array, threads: int) -> int:
    bad = find_bad_label(labels, logits.shape[1])
    if bad == -1:
        shifted, _, others = _shifted(_widen(logits), None, 1.0)
        with np.errstate(all="ignore"):
            out[...] = (np.log1p(others) - np.take_along_axis(shifted, labels[:, None], axis=1))[:, 0]
    return bad


def cross_entropy(
    logits: Array,
    where: Array | None,
    probabilities: Array | None,
    labels: Array | None,
    sample_weight: Array | None,
    loss_grad: Array | None,
    grad: Array | None,
    out: Array,
    options: LossOptions,
    threads: int,
) -> int:
    """The losses and, where `grad` is given, their gradients, from `labels` or else from `probabilities`.

    With coefficients a (the targets, smoothed and weighted), A their sum and L the log of the sum of exponentials, a loss is
    sum(a (L - x)) + z_loss L^2, and its derivative for x is (A + 2 z_loss L) p - a.
    """
    classes = logits.shape[1]
    ignored = np.zeros(out.shape, np.bool_)
    if labels is not None:
        if options.ignore_index is not None:
            ignored = labels == options.ignore_index
        bad = find_bad_label(np.where(ignored, 0, labels), classes)
        if bad != -1:
            return bad
    x = _widen(logits)
    wide = x.dtype
    with np.errstate(all="ignore"):
        slope: Array | None = None
        temperature = options.temperature
        if options.softcap is not None:
            x /= wide.type(temperature) * wide.type(options.softcap)
            slope = 1 / np.cosh(x) ** 2
            x, temperature = options.softcap * np.tanh(x), 1.0
        shifted, maximum, others = _shifted(x, where, temperature)
        log_sum = maximum + np.log1p(others)
        losses = np.log1p(others) - shifted
        weight = np.ones(1, wide) if options.weight is None else options.weight.astype(wide)
        unmasked = np.ones(logits.shape, np.bool_) if where is None else where
        count = unmasked.sum(axis=1, keepdims=True)
        a = np.where(unmasked, wide.type(options.label_smoothing) / np.maximum(count, 1), 0)
        if labels is not None:
            label = np.where(ignored, 0, labels)[:, None]
            np.put_along_axis(a, label, np.take_along_axis(a, label, 1) + (1 - wide.type(options.label_smoothing)), 1)
        elif probabilities is not None:
            a += np.where(unmasked, (1 - wide.type(options.label_smoothing)) * probabilities, 0)
        a *= weight[:, None]
        total = a.sum(axis=1, keepdims=True)
        empty = ignored | (count[:, 0] == 0)
        # NaN x 0 is NaN all the same: only an impossible class (probability 0) may be left out
        loss = np.where(a == 0, 0, a * losses).sum(axis=1) + 0 * others[:, 0] + options.z_loss * log_sum[:, 0] ** 2
        scale = np.asarray(wide.type(options.scale[0]) + wide.type(options.scale[1]))
        if sample_weight is not None:
            loss *= sample_weight
            scale = scale * sample_weight
        if grad is not None:
            if loss_grad is not None:
                scale = scale * loss_grad
            slopes = (total + 2 * options.z_loss * log_sum) * (np.exp(shifted) / (1 + others)) - a
            slopes = slopes * (scale[:, None] if scale.ndim else scale)
            if slope is not None:
                slopes *= slope
            grad[...] = np.where(unmasked & ~empty[:, None], slopes, 0)
        out[...] = np.where(empty, 0, loss)
    return -1


def softmax_backward(probs: Array, grad: Array, out: Array, threads: int) -> None:
    p, g = _widen(probs), _widen(grad)
    with np.errstate(all="ignore"):
        out[...] = p * (g - (p * g).sum(axis=1, keepdims=True))


def log_softmax_backward(log_probs: Array, grad: Array, out: Array, threads: int) -> None:
    g = _widen(grad)
    with np.errstate(all="ignore"):
        out[...] = g - np.exp(_widen(log_probs)) * g.sum(axis=1, keepdims=True)


def score(
    logits: Array, targets: Array | None, temperature: float, scores: Scores, threads: int, brier: Array | None = None
) -> int:
    if targets is not None:
        bad = find_bad_label(targets, logits.shape[1])
        if bad != -1:
            return bad
    k = scores.top_k_indices.shape[-1]
    shifted, maximum, others = _shifted(_widen(logits), None, temperature)
    with np.errstate(all="ignore"):
        probabilities = np.exp(shifted) / (1 + others)
        # NaN first, then descending; equal logits keep their order
        order = np.lexsort((-logits, ~np.isnan(logits)), axis=1)
        top = order[:, :k]
        scores.top_k_indices[...] = top.transpose(0, 2, 1)
        scores.top_k_probabilities[...] = np.take_along_axis(probabilities, top, 1).transpose(0, 2, 1)
        scores.prediction[...] = top[:, 0]
        scores.confidence[...] = scores.top_k_probabilities[..., 0]
        scores.logsumexp[...] = np.where(np.isfinite(maximum), maximum + np.log1p(others), maximum)[:, 0]
        products = np.where(probabilities == 0, 0, -probabilities * shifted)
        scores.entropy[...] = (np.log1p(others) + products.sum(axis=1, keepdims=True))[:, 0]
        if targets is not None and scores.loss is not None and scores.correct is not None:
            losses = np.log1p(others) - np.take_along_axis(shifted, targets[:, None], axis=1)
            scores.loss[...] = losses[:, 0]
            scores.correct[...] = scores.prediction == targets
            if brier is not None:
                differences = probabilities.copy()
                np.put_along_axis(differences, targets[:, None], np.expm1(-losses), axis=1)
                brier[...] = (differences**2).sum(axis=1)
    return -1
