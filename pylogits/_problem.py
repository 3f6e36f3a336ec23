"""What a cross entropy is given, checked; and its losses reduced. Shared by `losses` and `linear`."""

import math
import operator
import warnings
from fractions import Fraction
from typing import Any, NamedTuple, SupportsIndex

import numpy as np

from pylogits import _dispatch, _reference, _rows
from pylogits._reference import LossOptions
from pylogits._rows import Array

REDUCTIONS = ("none", "sum", "mean", "sum_over_batch_size", "sum_by_nonzero_weights")


class Problem(NamedTuple):
    """The losses of rows of logits, whose shape without the class axis is `rows`; `dtype` is that of the losses."""

    rows: tuple[int, ...]
    axis: int
    dtype: np.dtype[Any]
    where: Array | None  # in the shape of the logits
    labels: Array | None  # int64, C-contiguous, in the shape of the rows; or else
    probabilities: Array | None  # in the shape of the logits
    counted: Array | None  # the rows that are not ignored, if any may be
    sample_weight: Array | None  # C-contiguous, in the shape of the rows, as is
    loss_grad: Array | None
    options: LossOptions
    reduction: str
    denominator: float

    @property
    def result_shape(self) -> tuple[int, ...]:
        return self.rows if self.reduction == "none" else ()

    def arrays(self) -> tuple[Array | None, ...]:
        """All that is read while results are written."""
        return self.where, self.labels, self.probabilities, self.sample_weight, self.loss_grad, self.options.weight

    def run(self, logits: Array, grad: Array | None, losses: Array) -> None:
        module, threads = _dispatch.select(logits.dtype, logits.size)

        def kernel(logits: Array, where: Array, probabilities: Array, *rest: Array) -> Any:
            labels, sample_weight, loss_grad, *grads, losses = rest
            grad = grads[0] if grads else None
            return getattr(module, "cross_entropy", _reference.cross_entropy)(
                logits, where, probabilities, labels, sample_weight, loss_grad, grad, losses, self.options, threads
            )

        good = _rows.run(
            kernel,
            module.DTYPES,
            (self.axis,),
            _rows.Operands(
                [logits, self.where, self.probabilities],
                [self.labels, self.sample_weight, self.loss_grad],
                [] if grad is None else [grad],
                [losses],
            ),
        )
        if not good:
            raise ValueError("a target changed while it was read")

    def reduce(self, losses: Array) -> Array:
        """The sum of the losses over the denominator, in float64 (longdouble for longdouble); or the losses themselves."""
        if self.reduction == "none":
            return losses
        wide = np.result_type(losses.dtype, np.float64)
        total = losses.sum(dtype=wide)
        if self.denominator:
            return np.asarray(total / wide.type(self.denominator), losses.dtype)
        if self.reduction == "mean":
            message = "the mean of no losses is NaN: all rows are ignored or have weight 0"
            warnings.warn(message, RuntimeWarning, stacklevel=4)
            return np.asarray(np.nan, losses.dtype)
        return np.zeros((), losses.dtype)


def check_problem(
    shape: tuple[int, ...],
    axis: int,
    dtype: np.dtype[Any],
    targets: Any,
    *,
    weight: Any,
    sample_weight: Any,
    ignore_index: SupportsIndex | None,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    temperature: float,
    where: Any,
    reduction: str,
    loss_grad: Any = None,
) -> Problem:
    """The arguments of `cross_entropy` for logits of this shape and dtype, checked."""
    real = _rows.row_dtype(dtype)
    rows, classes = shape[:axis] + shape[axis + 1 :], shape[axis]
    check_classes(classes)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, not {reduction!r}")
    mask = _rows.check_where(where, shape)
    given = _rows.to_numpy(targets, "targets")
    hard = given.dtype.kind in "iu"
    if not hard and _rows.check_floats(given, "targets") != given.dtype.newbyteorder("="):
        raise TypeError("targets must be class numbers (integers) or probabilities (floats), not bool")
    if given.shape != (rows if hard else shape):
        kind, wanted = ("class numbers", rows) if hard else ("probabilities", shape)
        raise ValueError(f"targets that are {kind} must have shape {wanted} for logits of shape {shape}, not {given.shape}")
    ignored = None
    if ignore_index is not None:
        try:
            ignored = operator.index(ignore_index)
        except TypeError:
            raise TypeError(f"ignore_index must be an int, not {ignore_index!r}") from None
        if not hard:
            raise ValueError(f"ignore_index is {ignored}, but targets are probabilities: leave rows out by sample_weight")
        if not np.iinfo(given.dtype).min <= ignored <= np.iinfo(given.dtype).max:
            ignored = None  # no target of this dtype can be it
    counted = None if ignored is None else given != ignored
    if hard:
        _check_labels(given, counted, mask, axis, classes)
    samples = (
        None if sample_weight is None else _check_finite(_as_real(sample_weight, "sample_weight", rows, real), "sample_weight")
    )
    above_zero = np.nextafter(real.type(0), real.type(1))
    options = LossOptions(
        weight=None if weight is None else _check_weight(weight, classes, real),
        # uint64 targets become int64: what does not fit is outside [0, C), or ignored, and wraps like this
        ignore_index=None if ignored is None else (ignored + 2**63) % 2**64 - 2**63,
        label_smoothing=_check_real(label_smoothing, "label_smoothing", real, least=0, most=1),
        z_loss=_check_real(z_loss, "z_loss", real),
        softcap=None if softcap is None else _check_real(softcap, "softcap", real, least=above_zero),
        temperature=_rows.check_temperature(temperature, dtype),
    )
    upstream = None if loss_grad is None else _as_real(loss_grad, "loss_grad", rows if reduction == "none" else (), real)
    denominator = _denominator(reduction, given, hard, counted, samples, options.weight, rows)
    scale = Fraction(1) / (Fraction(denominator or 1.0) * Fraction(options.temperature))
    return Problem(
        rows,
        axis,
        real,
        mask,
        labels=np.ascontiguousarray(given, np.int64).reshape(rows) if hard else None,
        probabilities=None if hard else given,
        counted=counted,
        sample_weight=samples,
        loss_grad=None if upstream is None else np.ascontiguousarray(np.broadcast_to(upstream, rows)).reshape(rows),
        options=options._replace(scale=_as_pair(scale, real)),
        reduction=reduction,
        denominator=denominator,
    )


def check_classes(classes: int) -> None:
    if classes == 0:
        raise ValueError("logits have no classes: the class axis has length 0")


def _denominator(
    reduction: str,
    targets: Array,
    hard: bool,
    counted: Array | None,
    samples: Array | None,
    weight: Array | None,
    rows: tuple[int, ...],
) -> float:
    """What the sum of the losses is divided by; `counted` are the rows that are not ignored."""
    if reduction in ("none", "sum"):
        return 1.0
    if reduction == "sum_over_batch_size":
        return float(math.prod(rows))
    if reduction == "sum_by_nonzero_weights":
        weights = np.ones(rows, np.bool_) if samples is None else samples != 0
        return float(np.count_nonzero(weights if counted is None else weights & counted))
    numbers = samples
    if hard and weight is not None:
        known = targets if counted is None else np.where(counted, targets, 0)
        numbers = weight[known] if samples is None else weight[known] * samples
    if numbers is None:
        return float(math.prod(rows) if counted is None else np.count_nonzero(counted))
    return float(numbers.sum(dtype=np.float64, where=True if counted is None else counted))


def _as_pair(number: Fraction, dtype: np.dtype[Any]) -> tuple[float, float]:
    """A number as the sum of two of a dtype."""
    greatest = Fraction(float(np.finfo(dtype).max))
    number = max(-greatest, min(greatest, number))
    high = float(dtype.type(float(number)))
    return high, float(dtype.type(float(number - Fraction(high))))


def _check_labels(targets: Array, counted: Array | None, mask: Array | None, axis: int, classes: int) -> None:
    """Every class number that counts must be in [0, classes), and not masked out unless its whole row is."""
    outside = (targets < 0) | (targets >= classes)
    if counted is not None:
        outside &= counted
    if outside.any():
        _raise_at(targets, outside, f"is outside [0, {classes})")
    if mask is not None:
        known = np.asarray(targets if counted is None else np.where(counted, targets, 0), np.int64)
        masked = ~np.take_along_axis(mask, np.expand_dims(known, axis), axis).squeeze(axis)
        if counted is not None:
            masked &= counted
        if masked.any():
            masked &= mask.any(axis=axis)
        if masked.any():
            _raise_at(targets, masked, "is masked out by where, in a row with other classes")


def _raise_at(targets: Array, bad: Array, complaint: str) -> None:
    index = tuple(int(i) for i in np.argwhere(bad)[0])
    place = f" at index {index}" if index else ""
    raise ValueError(f"target {targets[index]}{place} {complaint}")


def _check_real(value: Any, name: str, dtype: np.dtype[Any], least: Any = -math.inf, most: Any = math.inf) -> float:
    """A finite number within bounds, rounded to a dtype."""
    if isinstance(value, bool) or not isinstance(value, float | int | np.floating | np.integer):
        raise TypeError(f"{name} must be a real number, not {value!r}")
    with np.errstate(over="ignore", under="ignore"):
        rounded = float(dtype.type(value)) if abs(value) <= np.finfo(dtype).max else math.inf
    if not (math.isfinite(rounded) and least <= rounded <= most and least <= value <= most):
        bounds = "finite" if least == -math.inf else "positive and finite" if most == math.inf else f"in [{least}, {most}]"
        raise ValueError(f"{name} must be {bounds} in {dtype}, not {value!r}")
    return rounded


def _as_real(values: Any, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Real numbers, broadcast to a shape and in a dtype."""
    array = _rows.to_numpy(values, name)
    _rows.check_floats(array, name)
    try:
        return np.ascontiguousarray(np.broadcast_to(array, shape), dtype).reshape(shape)
    except ValueError:
        raise ValueError(f"{name} of shape {array.shape} does not broadcast to the losses' shape {shape}") from None


def _check_weight(weight: Any, classes: int, dtype: np.dtype[Any]) -> Array:
    array = _rows.to_numpy(weight, "weight")
    _rows.check_floats(array, "weight")
    if array.shape != (classes,):
        raise ValueError(f"weight must have one entry a class, shape ({classes},), not {array.shape}")
    with np.errstate(over="ignore"):
        array = np.ascontiguousarray(array, dtype)
    return _check_finite(array, "weight")


def _check_finite(array: Array, name: str) -> Array:
    if not np.isfinite(array).all():
        index = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
        raise ValueError(f"{name} {array[index]} at index {index} is not finite")
    return array
