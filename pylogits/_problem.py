"""What a cross entropy is given, checked; and its losses reduced. Shared by `losses` and `linear`."""

import math
import operator
import warnings
from collections.abc import Iterator
from types import EllipsisType
from typing import Any, NamedTuple, NoReturn, SupportsIndex

import numpy as np

from pylogits import _dispatch, _rows
from pylogits._reference import LossOptions, reciprocal
from pylogits._rows import Array

REDUCTIONS = ("none", "sum", "mean", "sum_over_batch_size", "sum_by_nonzero_weights")


# Losses are summed so many at a time. Of more rows than these, half as many are taken at a time, for what is made of each (a
# loss, a label as int64, ...) not to add up to arrays: all of them came to 1.25 MiB.
ROWS_AT_A_TIME = 1 << 16

Index = tuple[slice | int | EllipsisType, ...]


class Total:
    """A sum in float64 (longdouble for longdouble), of ROWS_AT_A_TIME numbers at a time, however they come."""

    def __init__(self, count: int, dtype: np.dtype[Any]) -> None:
        self._pending = np.empty(min(count, ROWS_AT_A_TIME + ROWS_AT_A_TIME // 2), dtype)
        self._filled = 0
        self._sum = np.zeros((), np.result_type(dtype, np.float64))

    @classmethod
    def of(cls, numbers: Array) -> "Total":
        total = cls(numbers.size, numbers.dtype)
        for start in range(0, numbers.size, ROWS_AT_A_TIME // 2):
            some = numbers.reshape(-1)[start : start + ROWS_AT_A_TIME // 2]
            total.room(some.shape)[...] = some
            total.add(some)
        return total

    def room(self, shape: tuple[int, ...]) -> Array:
        """Where the next numbers go, all or at most ROWS_AT_A_TIME // 2, before they are counted by `add`."""
        return self._pending[self._filled : self._filled + math.prod(shape)].reshape(shape)

    def add(self, numbers: Array) -> None:
        """Count what has been put into the room that was given last."""
        self._filled += numbers.size
        if self._filled >= ROWS_AT_A_TIME:
            self._sum += self._pending[:ROWS_AT_A_TIME].sum(dtype=self._sum.dtype)
            self._filled -= ROWS_AT_A_TIME
            self._pending[: self._filled] = self._pending[ROWS_AT_A_TIME : ROWS_AT_A_TIME + self._filled]

    def sum(self) -> Any:
        return self._sum + self._pending[: self._filled].sum(dtype=self._sum.dtype)


class Problem(NamedTuple):
    """The losses of rows of logits, whose shape without the class axis is `rows`; `dtype` is that of the losses."""

    rows: tuple[int, ...]
    axis: int
    dtype: np.dtype[Any]
    where: Array | None  # in the shape of the logits
    targets: Array  # class numbers in the shape of the rows, or probabilities in that of the logits
    ignore_index: int | None
    sample_weight: Array | None  # in the shape of the rows, as is
    loss_grad: Array | None
    options: LossOptions
    reduction: str
    denominator: float | None = 1.0  # None: to be made on a GPU

    @property
    def hard(self) -> bool:
        return self.targets.dtype.kind in "iu"

    @property
    def result_shape(self) -> tuple[int, ...]:
        return self.rows if self.reduction == "none" else ()

    def arrays(self) -> tuple[Array | None, ...]:
        """All of the caller's that is read while results are written."""
        return self.where, self.targets, self.sample_weight, self.loss_grad, self.options.weight

    def counted(self) -> Array | None:
        """The rows that are not ignored; None for all."""
        return None if self.ignore_index is None else self.targets != self.ignore_index

    def part(self, index: Any, full: Any) -> "Problem":
        """The problem of some rows: an index of the rows, and the same of the logits."""
        return self._replace(
            where=None if self.where is None else self.where[full],
            targets=self.targets[index if self.hard else full],
            sample_weight=None if self.sample_weight is None else self.sample_weight[index],
            loss_grad=None if self.loss_grad is None else self.loss_grad[index],
        )

    def parts(self) -> Iterator[tuple[Index, Index, "Problem"]]:
        """Problems of consecutive rows, with the indices of their rows and of their logits: all, or ROWS_AT_A_TIME // 2."""
        if math.prod(self.rows) <= ROWS_AT_A_TIME:
            yield (...,), (...,), self
            return
        for index in _rows.pieces(self.rows, ROWS_AT_A_TIME // 2):
            full = index if len(index) <= self.axis else (*index[: self.axis], slice(None), *index[self.axis :])
            part = self.part(index, full)
            below = sum(isinstance(one, int) for one in full[: self.axis])
            rows = np.broadcast_to(False, self.rows)[index].shape
            yield index, full, part._replace(rows=rows, axis=self.axis - below)

    def per_row(self, array: Array | None) -> Array | None:
        """An array over the rows as a kernel takes it."""
        return None if array is None else np.asarray(array, self.dtype, order="C")

    def labels(self) -> Array | None:
        return _rows.as_labels(self.targets) if self.hard else None

    def run(self, logits: Array, grad: Array | None, losses: Array) -> None:
        operation = "cross_entropy" if grad is None else "cross_entropy_value_and_grad"
        classes, dtype = logits.shape[self.axis], _rows.check_floats(logits, "logits")
        module, threads = _dispatch.select(operation, dtype, logits.size, classes)

        def kernel(logits: Array, where: Array, probabilities: Array, *rest: Array) -> Any:
            labels, sample_weight, loss_grad, *grads, losses = rest
            grad = grads[0] if grads else None
            return module.cross_entropy(
                logits, where, probabilities, labels, sample_weight, loss_grad, grad, losses, self.options, threads
            )

        row_inputs = [self.labels(), self.per_row(self.sample_weight), self.per_row(self.loss_grad)]
        _rows.run(kernel, module, (self.axis,), self._operands(logits, row_inputs, grad, losses), _raise_changed)

    def run_on_gpu(self, logits: Any, grad: Array | None, result: Array) -> None:
        """The losses, or what they are reduced to, and the gradient."""
        module, losses, reduced = _dispatch.on_gpu(), result, None
        mean = self.reduction == "mean"
        if mean and self.denominator == 0:
            _warn_of_nothing()
        if self.reduction != "none":
            _, losses = _rows.allocate(logits.owner, self.rows, self.dtype)
            reduced = result.reshape(1)
        reduction = module.Reduction(reduced, self.denominator, weighted=mean, mean=mean)

        def kernel(logits: Array, where: Array, probabilities: Array, *rest: Array) -> Any:
            labels, sample_weight, loss_grad, *grads, losses = rest
            grad = grads[0] if grads else None
            rows = labels, sample_weight, loss_grad
            status = module.cross_entropy(logits, where, probabilities, *rows, grad, losses, self.options, reduction)
            if status is not None and mean:
                status.when_empty = _warn_of_nothing
            return status

        row_inputs = [self.targets if self.hard else None, self.sample_weight, self.loss_grad]
        operands = self._operands(logits, row_inputs, grad, losses)
        _rows.run(kernel, module, (self.axis,), operands, lambda: self._raise_bad_values(logits.shape[self.axis]))

    def _operands(self, logits: Array, row_inputs: list[Array | None], grad: Array | None, losses: Array) -> _rows.Operands:
        inputs = [logits, self.where, None if self.hard else self.targets]
        return _rows.Operands(inputs, row_inputs, [] if grad is None else [grad], [losses])

    def _raise_bad_values(self, classes: int) -> NoReturn:
        """What the check of values that are on a GPU would have raised."""
        weight = None if self.options.weight is None else _rows.to_host(self.options.weight)
        found = self._replace(
            targets=_rows.to_host(self.targets),
            where=None if self.where is None else _rows.to_host(self.where),
            sample_weight=None if self.sample_weight is None else _rows.to_host(self.sample_weight),
            options=self.options._replace(weight=weight),
        )
        _check_values(found, classes)
        _raise_changed()

    def known_denominator(self, rows: int) -> float | None:
        """What the sum of the losses is divided by, where that depends on the number of rows alone."""
        if self.reduction in ("none", "sum"):
            return 1.0
        weight = self.options.weight if self.reduction == "mean" and self.hard else None
        weights = (self.sample_weight, self.ignore_index, weight)
        if self.reduction == "sum_over_batch_size" or all(one is None for one in weights):
            return float(rows)
        return None

    def count_rows(self, numbers: Array) -> None:
        """Set what each row adds to the denominator."""
        weighted = self.reduction == "mean"
        counted = self.counted()
        numbers[...] = 1 if counted is None else counted
        if self.sample_weight is not None:
            numbers *= self.sample_weight.astype(self.dtype) if weighted else self.sample_weight != 0
        if weighted and self.hard and self.options.weight is not None:
            numbers *= self.options.weight[self.targets if counted is None else np.where(counted, self.targets, 0)]

    def reduce(self, total: Any) -> Array:
        """The sum of the losses over the denominator."""
        if self.denominator:
            return np.asarray(total / self.denominator, self.dtype)
        if self.reduction == "mean":
            _warn_of_nothing()
            return np.asarray(np.nan, self.dtype)
        return np.zeros((), self.dtype)


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
    denominator: float | None = None,
    on_gpu: bool = False,
) -> Problem:
    """The arguments of `cross_entropy` for logits of this shape and dtype, checked; values on a GPU are so by its kernels.

    A `denominator` is given where these rows are a part of those whose losses are summed.
    """
    real = _rows.row_dtype(dtype)
    rows, classes = shape[:axis] + shape[axis + 1 :], shape[axis]
    check_classes(classes)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, not {reduction!r}")
    mask = _rows.check_where(where, shape, on_gpu)
    given = _rows.to_array(targets, "targets", on_gpu)
    hard = given.dtype.kind in "iu"
    if not hard and _rows.check_floats(given, "targets") != given.dtype.newbyteorder("="):
        raise TypeError("targets must be class numbers (integers) or probabilities (floats), not bool")
    if given.shape != (rows if hard else shape):
        kind, wanted = ("class numbers", rows) if hard else ("probabilities", shape)
        raise ValueError(f"targets that are {kind} must have shape {wanted} for logits of shape {shape}, not {given.shape}")
    options = LossOptions(
        weight=None if weight is None else _check_weight(weight, classes, real, on_gpu),
        label_smoothing=_rows.check_real(label_smoothing, "label_smoothing", real, "in [0, 1]"),
        z_loss=_rows.check_real(z_loss, "z_loss", real),
        softcap=None if softcap is None else _rows.check_real(softcap, "softcap", real, "positive and finite"),
        temperature=_rows.check_temperature(temperature, dtype),
    )
    ignored = None if ignore_index is None else _check_ignore_index(ignore_index, given, hard)
    if ignored is not None:
        # uint64 targets become int64: what does not fit is outside [0, C), or ignored, and wraps like this
        options = options._replace(ignore_index=(ignored + 2**63) % 2**64 - 2**63)
    upstream = None
    if loss_grad is not None:
        upstream = np.broadcast_to(
            _check_rows(loss_grad, "loss_grad", rows if reduction == "none" else (), real, on_gpu), rows, subok=True
        )
    problem = Problem(
        rows,
        axis,
        real,
        mask,
        given,
        ignored,
        None if sample_weight is None else _check_rows(sample_weight, "sample_weight", rows, real, on_gpu),
        upstream,
        options,
        reduction,
    )
    known = problem.known_denominator(math.prod(rows))
    denominator = known if on_gpu else _check_values(problem, classes, denominator)
    scale = reciprocal(denominator or 1.0, options.temperature, real)
    return problem._replace(options=options._replace(scale=scale), denominator=denominator)


def _check_values(problem: Problem, classes: int, denominator: float | None = None) -> float:
    """Check targets and weights; what the sum of the losses is divided by, unless it is given."""
    real, weight = problem.dtype, problem.options.weight
    if weight is not None and not _all_finite(weight, real):
        _raise_not_finite(weight, "weight", real)
    try:
        for _, _, part in problem.parts():
            if problem.hard and not _labels_are_good(part, classes):
                _raise_bad_label(problem, classes)
            if part.sample_weight is not None and not _all_finite(part.sample_weight, real):
                _raise_not_finite(problem.sample_weight, "sample_weight", real)
        return _denominator(problem) if denominator is None else denominator
    except IndexError:  # by another thread, after it was checked
        _raise_changed()


def _raise_changed() -> NoReturn:
    raise ValueError("a target changed while it was read") from None


def _warn_of_nothing() -> None:
    message = "the mean of no losses is NaN: all rows are ignored or have weight 0"
    warnings.warn(message, RuntimeWarning, stacklevel=6)


def check_classes(classes: int) -> None:
    if classes == 0:
        raise ValueError("logits have no classes: the class axis has length 0")


def _denominator(problem: Problem) -> float:
    rows = math.prod(problem.rows)
    known = problem.known_denominator(rows)
    if known is not None:
        return known
    total = Total(rows, np.dtype(np.float64))
    for _, _, part in problem.parts():
        numbers = total.room(part.rows)
        part.count_rows(numbers)
        total.add(numbers)
    return check_denominator(total.sum())


def check_denominator(total: Any) -> float:
    denominator = float(total)
    if not math.isfinite(denominator):
        raise ValueError(f"a mean needs weights with a finite sum, not {denominator}")
    return denominator


def _check_ignore_index(ignore_index: SupportsIndex, targets: Array, hard: bool) -> int | None:
    try:
        ignored = operator.index(ignore_index)
    except TypeError:
        raise TypeError(f"ignore_index must be an int, not {ignore_index!r}") from None
    if not hard:
        raise ValueError(f"ignore_index is {ignored}, but targets are probabilities: leave rows out by sample_weight")
    limits = np.iinfo(targets.dtype)
    return ignored if limits.min <= ignored <= limits.max else None  # else no target of this dtype can be it


def _labels_are_good(part: Problem, classes: int) -> bool:
    """Whether all that count are in [0, classes), and not masked out unless their whole row is."""
    counted, targets = part.counted(), part.targets
    if counted is not None:
        targets = np.where(counted, targets, 0)
    if targets.size and not (targets.min() >= 0 and targets.max() < classes):
        return False
    return part.where is None or not _masked_labels(part, targets).any()


def _masked_labels(problem: Problem, targets: Array) -> Array:
    """Where a label that counts is masked out, in a row with other classes."""
    assert problem.where is not None
    known = np.expand_dims(np.asarray(targets, np.int64), problem.axis)
    masked = ~np.take_along_axis(problem.where, known, problem.axis).squeeze(problem.axis)
    counted = problem.counted()
    if counted is not None:
        masked &= counted
    return masked & problem.where.any(axis=problem.axis) if masked.any() else masked


def _raise_bad_label(problem: Problem, classes: int) -> NoReturn:
    counted, targets = problem.counted(), problem.targets
    bad = (targets < 0) | (targets >= classes)
    if counted is not None:
        bad &= counted
    complaint = f"is outside [0, {classes})"
    if problem.where is not None and not bad.any():
        bad = _masked_labels(problem, targets if counted is None else np.where(counted, targets, 0))
        complaint = "is masked out by where, in a row with other classes"
    index = tuple(int(i) for i in np.argwhere(bad)[0])
    place = f" at index {index}" if index else ""
    raise ValueError(f"target {targets[index]}{place} {complaint}")


def _check_numbers(values: Any, name: str, dtype: np.dtype[Any], on_gpu: bool) -> Array:
    """Real numbers; on a GPU, where nothing is converted, in the dtype that is computed in."""
    array = _rows.to_array(values, name, on_gpu)
    _rows.check_floats(array, name)
    if on_gpu and array.dtype != dtype:
        raise TypeError(f"{name} must have dtype {dtype} on a GPU, not {array.dtype}")
    return array


def _check_rows(values: Any, name: str, shape: tuple[int, ...], dtype: np.dtype[Any], on_gpu: bool) -> Array:
    """Real numbers, broadcast to a shape."""
    array = _check_numbers(values, name, dtype, on_gpu)
    try:
        return np.broadcast_to(array, shape, subok=True)
    except ValueError:
        raise ValueError(f"{name} of shape {array.shape} does not broadcast to the losses' shape {shape}") from None


def _check_weight(weight: Any, classes: int, dtype: np.dtype[Any], on_gpu: bool) -> Array:
    array = _check_numbers(weight, "weight", dtype, on_gpu)
    if array.shape != (classes,):
        raise ValueError(f"weight must have one entry a class, shape ({classes},), not {array.shape}")
    return array if on_gpu else np.array(array, dtype)  # a copy: gradients may go where it was


def _all_finite(array: Array, dtype: np.dtype[Any]) -> bool:
    return bool(np.isfinite(array.astype(dtype, copy=False)).all())


def _raise_not_finite(array: Array | None, name: str, dtype: np.dtype[Any]) -> NoReturn:
    assert array is not None
    bad = ~np.isfinite(array.astype(dtype, copy=False))
    index = tuple(int(i) for i in np.argwhere(bad)[0])
    place = f" at index {index}" if index else ""
    raise ValueError(f"{name} {array[index]}{place} is not finite in {dtype}")
