"""The cross entropy of a linear layer's outputs, which are never there as a whole: linear_cross_entropy and its gradients."""

from collections.abc import Iterator
from typing import Any, SupportsIndex

import numpy as np

from pylogits import _dispatch, _rows
from pylogits._float_state import standard_arithmetic
from pylogits._problem import Problem, Total, check_problem
from pylogits._rows import Array

# Of logits that are there at a time. Measured at 2048 x 768 x 50257: tiles of 512 rows took 1.1 times as long in the matrix
# products, and tiles of whole rows, of the same size, 1.3 times.
TILE_BYTES = 16 << 20
# The kernels are a twentieth of the work. On two threads they took ten times as long, and doubled the whole: after a product
# BLAS's threads wait actively for the next one, and so do OpenMP's.
KERNEL_THREADS = 1


def linear_cross_entropy(
    inputs: Any,
    linear_weight: Any,
    targets: Any,
    *,
    linear_bias: Any = None,
    weight: Any = None,
    sample_weight: Any = None,
    ignore_index: SupportsIndex | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    where: Any = None,
    reduction: str = "mean",
    out: Any = None,
) -> Any:
    """Cross entropy of the logits ``inputs @ linear_weight.T + linear_bias``, which are made and used a tile at a time.

    Parameters
    ----------
    inputs : array_like of float, shape (..., D)
        What goes into a model's last layer. With float16 or bfloat16, products are made in float32.
    linear_weight : array_like of float, shape (C, D)
        The layer's weight, as PyTorch's ``Linear`` has it.
    targets : array_like
        Integers, in the shape of `inputs` without its last axis; or probabilities, floats of shape (..., C).
    linear_bias : array_like of float, shape (C,), optional
        The layer's bias.
    weight, sample_weight, ignore_index, label_smoothing, z_loss, softcap, temperature, where, reduction, out
        As for `cross_entropy` of logits of shape (..., C). The inputs of ignored rows are not read.

    Returns
    -------
    scalar, or with reduction="none" ndarray in the shape of `inputs` without its last axis
        In nats, in the wider dtype of `inputs` and `linear_weight`, at least float32.

    Raises
    ------
    TypeError, ValueError
        For arguments of a wrong type, shape or value; `out` is then untouched.

    See Also
    --------
    cross_entropy : the same from logits.

    Notes
    -----
    At most 16 MiB of logits are there at a time. The products are NumPy's, and so in its BLAS library: on other machines, or
    with other tiles, logits may differ in their last bits; the losses are exact for the logits.

    References
    ----------
    Wijmans et al., "Cut your losses in large-vocabulary language models", 2024; Liger's ``FusedLinearCrossEntropy``.

    Examples
    --------
    >>> import numpy as np
    >>> import pylogits
    >>> inputs = np.array([[1.0, 0.5], [0.0, 2.0]])
    >>> linear_weight = np.array([[0.5, 0.0], [1.0, 1.0], [0.0, 0.2]])
    >>> pylogits.linear_cross_entropy(inputs, linear_weight, [1, 2]).round(7)
    np.float64(1.1848062)
    >>> pylogits.cross_entropy(inputs @ linear_weight.T, [1, 2]).round(7)
    np.float64(1.1848062)
    """
    return _linear_cross_entropy(
        inputs,
        linear_weight,
        linear_bias,
        targets,
        out,
        differentiate=False,
        weight=weight,
        sample_weight=sample_weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        temperature=temperature,
        where=where,
        reduction=reduction,
    )[0]


def linear_cross_entropy_value_and_grad(
    inputs: Any,
    linear_weight: Any,
    targets: Any,
    *,
    linear_bias: Any = None,
    weight: Any = None,
    sample_weight: Any = None,
    ignore_index: SupportsIndex | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    where: Any = None,
    reduction: str = "mean",
    out: Any = None,
    loss_grad: Any = None,
) -> tuple[Any, tuple[Any, Any, Any]]:
    """`linear_cross_entropy` and its gradients.

    Parameters
    ----------
    inputs, linear_weight, targets, linear_bias, weight, sample_weight, ignore_index, label_smoothing, z_loss, softcap, \
temperature, where, reduction, out
        As for `linear_cross_entropy`.
    loss_grad : array_like of float, optional
        The gradient of what follows with respect to the loss: broadcasts to the shape of the result. Ones by default.

    Returns
    -------
    loss : scalar or ndarray
        That of `linear_cross_entropy`.
    grads : tuple of ndarray
        With respect to `inputs`, `linear_weight` and `linear_bias` (None without one), each in the shape and dtype of its
        argument. Exactly 0 for the inputs of ignored rows.

    Raises
    ------
    TypeError, ValueError
        As `linear_cross_entropy`.

    Examples
    --------
    >>> import numpy as np
    >>> import pylogits
    >>> inputs = np.array([[1.0, 0.5], [0.0, 2.0]])
    >>> linear_weight = np.array([[0.5, 0.0], [1.0, 1.0], [0.0, 0.2]])
    >>> loss, (d_inputs, d_weight, d_bias) = pylogits.linear_cross_entropy_value_and_grad(inputs, linear_weight, [1, 2])
    >>> d_inputs.round(4)
    array([[-0.1333, -0.175 ],
           [ 0.3992,  0.289 ]])
    """
    return _linear_cross_entropy(
        inputs,
        linear_weight,
        linear_bias,
        targets,
        out,
        differentiate=True,
        weight=weight,
        sample_weight=sample_weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        temperature=temperature,
        where=where,
        reduction=reduction,
        loss_grad=loss_grad,
    )


@standard_arithmetic
def _linear_cross_entropy(
    inputs: Any, linear_weight: Any, linear_bias: Any, targets: Any, out: Any, differentiate: bool, **options: Any
) -> tuple[Any, Any]:
    given = {"inputs": inputs, "linear_weight": linear_weight, "linear_bias": linear_bias}
    arrays = {name: _rows.to_numpy(value, name) for name, value in given.items() if name != "linear_bias" or value is not None}
    dtypes = {name: _rows.check_floats(array, name) for name, array in arrays.items()}
    x, w, bias = arrays["inputs"], arrays["linear_weight"], arrays.get("linear_bias")
    if w.ndim != 2:
        raise ValueError(f"linear_weight must have shape (classes, features), not {w.shape}")
    if x.ndim == 0 or x.shape[-1] != w.shape[1]:
        raise ValueError(f"inputs must have shape (..., {w.shape[1]}) for linear_weight of shape {w.shape}, not {x.shape}")
    if bias is not None and bias.shape != w.shape[:1]:
        raise ValueError(f"linear_bias must have one entry a class, shape {w.shape[:1]}, not {bias.shape}")
    dtype = np.result_type(*(_rows.row_dtype(one) for one in dtypes.values()))
    problem = check_problem((*x.shape[:-1], w.shape[0]), x.ndim - 1, dtype, targets, **options)
    if out is not None:
        _rows.check_out(out, problem.result_shape, dtype)

    grads = {name: np.zeros(array.shape, dtype) for name, array in arrays.items()} if differentiate else {}
    losses = np.zeros(problem.rows, dtype)
    layer = _Layer(x.reshape(losses.size, w.shape[1]), w, bias, dtype, problem)
    for rows in layer.row_tiles():
        losses.reshape(-1)[rows] = layer.run(rows, grads)
    if not problem.denominator:
        for grad in grads.values():
            grad[...] = 0
    answers = {name: _rows.deliver(given[name], grad.astype(dtypes[name], copy=False), None) for name, grad in grads.items()}
    if problem.reduction != "none":
        losses = problem.reduce(Total.of(losses).sum())
    result = _rows.deliver(inputs, losses, out)
    return result, (answers.get("inputs"), answers.get("linear_weight"), answers.get("linear_bias"))


class _Layer:
    """A linear layer, its inputs as (rows, features), and the losses of its outputs."""

    def __init__(self, x: Array, w: Array, bias: Array | None, dtype: np.dtype[Any], problem: Problem) -> None:
        self.x, self.w, self.bias, self.dtype, self.problem = x, w, bias, dtype, problem
        self.module = _dispatch.load(_dispatch.choose_backend(dtype))
        # The reference does not take rows in parts, and none does for probabilities, of which there are rows x classes anyway.
        self.classes = w.shape[0]
        if problem.hard and self.module.__name__ != _dispatch.REFERENCE_MODULE:
            self.classes = min(self.classes, self.module.tile_classes(dtype))
        self.by_class = self.classes < w.shape[0]

    def row_tiles(self) -> Iterator[Array]:
        """The numbers of the rows that count, so many that a tile of their logits is of TILE_BYTES."""
        counted = self.problem.counted()
        rows = np.arange(len(self.x)) if counted is None else np.flatnonzero(counted)
        step = max(1, TILE_BYTES // (self.classes * self.dtype.itemsize))
        yield from (rows[start : start + step] for start in range(0, len(rows), step))

    def part(self, rows: Array) -> Problem:
        """The problem of these rows alone, (rows) x (classes)."""
        problem, where = self.problem, self.problem.where
        index: Any = np.unravel_index(rows, problem.rows) if problem.rows else (np.newaxis,)
        if where is not None and not any(where.strides[:-1]):  # the same for all rows: not to be copied for each
            where = np.broadcast_to(where[(0,) * (where.ndim - 1)], (len(rows), where.shape[-1]))
        elif where is not None:
            where = where[index]
        return problem._replace(where=None).part(index, index)._replace(rows=rows.shape, axis=1, where=where)

    def logits(self, x: Array, first: int, tile: Array) -> tuple[Array, Array]:
        """Those of the classes from `first` on, in (the beginning of) `tile`; and their weights."""
        w = np.asarray(self.w[first : first + self.classes], self.dtype)
        logits = tile[: len(x) * len(w)].reshape(len(x), len(w))
        np.matmul(x, w.T, out=logits)
        if self.bias is not None:
            logits += self.bias[first : first + self.classes].astype(self.dtype, copy=False)
        return logits, w

    def run(self, rows: Array, grads: dict[str, Array]) -> Array:
        """The losses of these rows; what they add to the gradients is added."""
        consecutive = rows[-1] - rows[0] == len(rows) - 1  # not to be copied
        x = np.asarray(self.x[rows[0] : rows[-1] + 1] if consecutive else self.x[rows], self.dtype)
        part = self.part(rows)
        found = np.empty(len(rows), self.dtype)
        tile = np.empty(len(rows) * self.classes, self.dtype)
        starts = range(0, len(self.w), self.classes)
        if not self.by_class:
            logits, w = self.logits(x, 0, tile)
            part.run(logits, logits if grads else None, found)
            if grads:
                self.add_grads(grads, rows, x, w, logits, 0)
        else:
            labels = part.labels()
            assert labels is not None
            tiled = self.module.TiledCrossEntropy(
                (len(rows), len(self.w)),
                part.where,
                labels,
                part.per_row(part.sample_weight),
                part.per_row(part.loss_grad),
                found,
                part.options,
                KERNEL_THREADS,
            )
            for first in starts:
                tiled.reduce(self.logits(x, first, tile)[0], first)
            tiled.join()
            for first in starts if grads else ():
                logits, w = self.logits(x, first, tile)
                tiled.write(logits, first)
                self.add_grads(grads, rows, x, w, logits, first)
            if not grads:
                tiled.write()
        return found

    def add_grads(self, grads: dict[str, Array], rows: Array, x: Array, w: Array, slopes: Array, first: int) -> None:
        """Those of the classes from `first` on, from the gradients of their logits."""
        classes = slice(first, first + len(w))
        grads["inputs"].reshape(self.x.shape)[rows] += slopes @ w
        grads["linear_weight"][classes] += slopes.T @ x
        if self.bias is not None:
            grads["linear_bias"][classes] += slopes.sum(axis=0)
