"""The row-wise functions for Dask arrays: lazy, a chunk of rows at a time, with the bits that they have on NumPy arrays.

Dask divides the rows; the classes of a row stay together. Logits that are chunked along their classes are rechunked, with
`dask.array.PerformanceWarning`. What is wrong with the shapes, dtypes and options of arguments is an error at once; a label
outside [0, C) is a ValueError when its chunk is computed. (Of a label that `where` masks out, or a sample weight that is not
finite, the place that the error names is that in the chunk.)
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, SupportsIndex

import dask.array as da
import numpy as np

import pylogits
from pylogits._chunked_rows import ChunkedRows, fit
from pylogits._problem import ROWS_AT_A_TIME, Problem, check_denominator, check_problem
from pylogits._rows import Array, Axis
from pylogits.losses import run_cross_entropy

__all__ = [
    "cross_entropy",
    "cross_entropy_value_and_grad",
    "log_softmax",
    "logsumexp",
    "score",
    "selective_log_softmax",
    "softmax",
    "softmax_cross_entropy_with_logits",
    "sparse_softmax_cross_entropy_with_logits",
]


def softmax(logits: Any, axis: Axis = -1, *, where: Any = None, temperature: float = 1.0) -> Any:
    """`pylogits.softmax` of a Dask array.

    Parameters
    ----------
    logits : dask.array.Array of float, shape (..., C, ...)
        Raw scores.
    axis, where, temperature
        As for `pylogits.softmax`; `where` may be a Dask array.

    Returns
    -------
    dask.array.Array of the shape and dtype of `logits`

    Raises
    ------
    TypeError, ValueError
        As `pylogits.softmax`, before anything is computed.

    Examples
    --------
    >>> import dask.array as da
    >>> import pylogits.dask
    >>> logits = da.from_array([[0.5, 1.5, 0.1], [2.2, 1.3, 1.7]], chunks=(1, 3))
    >>> pylogits.dask.softmax(logits).compute().round(4)
    array([[0.2279, 0.6194, 0.1527],
           [0.4967, 0.202 , 0.3013]])
    """
    rows = ChunkedRows(logits, axis, several=True)
    return rows.apply(pylogits.softmax, where=rows.full("where", where, broadcast=True), temperature=temperature)


def log_softmax(logits: Any, axis: Axis = -1, *, where: Any = None, temperature: float = 1.0) -> Any:
    """`pylogits.log_softmax` of a Dask array.

    Parameters
    ----------
    logits, axis, where, temperature
        As for `softmax`.

    Returns
    -------
    dask.array.Array of the shape and dtype of `logits`

    Raises
    ------
    TypeError, ValueError
        As `pylogits.log_softmax`, before anything is computed.

    Examples
    --------
    >>> import dask.array as da
    >>> import pylogits.dask
    >>> pylogits.dask.log_softmax(da.from_array([[0.0, 40.0]], chunks=(1, 2))).compute()
    array([[-4.00000000e+01, -4.24835426e-18]])
    """
    rows = ChunkedRows(logits, axis, several=True)
    return rows.apply(pylogits.log_softmax, where=rows.full("where", where, broadcast=True), temperature=temperature)


def logsumexp(logits: Any, axis: Axis = -1, *, where: Any = None, temperature: float = 1.0, keepdims: bool = False) -> Any:
    """`pylogits.logsumexp` of a Dask array.

    Parameters
    ----------
    logits, axis, where, temperature
        As for `softmax`.
    keepdims : bool, optional
        Keep the summed axes, with length 1.

    Returns
    -------
    dask.array.Array
        In the dtype of `logits` (float32 for float16 and bfloat16).

    Raises
    ------
    TypeError, ValueError
        As `pylogits.logsumexp`, before anything is computed.

    Examples
    --------
    >>> import dask.array as da
    >>> import pylogits.dask
    >>> pylogits.dask.logsumexp(da.full((4, 2), 1000.0, chunks=2)).compute()
    array([1000.69314718, 1000.69314718, 1000.69314718, 1000.69314718])
    """
    rows = ChunkedRows(logits, axis, several=True)
    result = rows.apply(pylogits.logsumexp, where=rows.full("where", where, broadcast=True), temperature=temperature)
    return da.expand_dims(result, rows.axes) if keepdims else result


def selective_log_softmax(logits: Any, indices: Any, axis: SupportsIndex = -1, *, temperature: float = 1.0) -> Any:
    """`pylogits.selective_log_softmax` of a Dask array.

    Parameters
    ----------
    logits : dask.array.Array of float, shape (..., C, ...)
        Raw scores.
    indices : array_like or dask.array.Array of int
        The classes: one a row, in the shape of `logits` without `axis`; or K a row, with K in the place of C.
    axis, temperature
        As for `pylogits.selective_log_softmax`.

    Returns
    -------
    dask.array.Array of the shape of `indices` and the dtype of `logits`

    Raises
    ------
    TypeError, ValueError
        As `pylogits.selective_log_softmax`; for an index outside [0, C) when its chunk is computed.

    Examples
    --------
    >>> import dask.array as da
    >>> import pylogits.dask
    >>> logits = da.from_array([[0.5, 1.5, 0.1], [2.2, 1.3, 1.7]], chunks=(1, 3))
    >>> pylogits.dask.selective_log_softmax(logits, [1, 2]).compute()
    array([-0.4790107 , -1.19967598])
    """
    rows = ChunkedRows(logits, axis)
    picks = da.asarray(indices)
    several = picks.ndim == rows.logits.ndim
    picks = rows.full("indices", picks, picks.shape[rows.axes[0]]) if several else rows.per_row("indices", picks)
    return rows.apply(pylogits.selective_log_softmax, indices=rows.checked("index", picks), temperature=temperature)


def softmax_cross_entropy_with_logits(*, labels: Any, logits: Any, axis: SupportsIndex = -1) -> Any:
    """`pylogits.softmax_cross_entropy_with_logits` of Dask arrays.

    Parameters
    ----------
    labels : array_like or dask.array.Array of float
        Probabilities or one-hot rows; broadcasts to the shape of `logits`.
    logits : dask.array.Array of float, shape (..., C, ...)
        Raw scores, not probabilities.
    axis : int, optional
        The class axis, the last by default.

    Returns
    -------
    dask.array.Array
        One loss a row, in the dtype of `logits` (float32 for float16 and bfloat16).

    Raises
    ------
    TypeError, ValueError
        As `pylogits.softmax_cross_entropy_with_logits`, before anything is computed.

    Examples
    --------
    >>> import dask.array as da
    >>> import pylogits.dask
    >>> labels = [[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    >>> logits = da.from_array([[0.5, 1.5, 0.1], [2.2, 1.3, 1.7]], chunks=(1, 3))
    >>> pylogits.dask.softmax_cross_entropy_with_logits(labels=labels, logits=logits).compute()
    array([0.4790107 , 1.19967598])
    """
    rows = ChunkedRows(logits, axis)
    return rows.apply(pylogits.softmax_cross_entropy_with_logits, labels=rows.full("labels", labels, broadcast=True))


def sparse_softmax_cross_entropy_with_logits(*, labels: Any, logits: Any, axis: SupportsIndex = -1) -> Any:
    """`pylogits.sparse_softmax_cross_entropy_with_logits` of Dask arrays.

    Parameters
    ----------
    labels : array_like or dask.array.Array of int, shape of `logits` without `axis`
        The class of each row, in [0, C).
    logits : dask.array.Array of float, shape (..., C, ...)
        Raw scores, not probabilities.
    axis : int, optional
        The class axis, the last by default.

    Returns
    -------
    dask.array.Array
        One loss a row, in the dtype of `logits` (float32 for float16 and bfloat16).

    Raises
    ------
    TypeError, ValueError
        As `pylogits.sparse_softmax_cross_entropy_with_logits`; for a label outside [0, C) when its chunk is computed.

    Examples
    --------
    >>> import dask.array as da
    >>> import pylogits.dask
    >>> logits = da.from_array([[0.5, 1.5, 0.1], [2.2, 1.3, 1.7]], chunks=(1, 3))
    >>> pylogits.dask.sparse_softmax_cross_entropy_with_logits(labels=[1, 2], logits=logits).compute()
    array([0.4790107 , 1.19967598])
    """
    rows = ChunkedRows(logits, axis)
    checked = rows.checked("label", rows.per_row("labels", labels))
    return rows.apply(pylogits.sparse_softmax_cross_entropy_with_logits, labels=checked)


def cross_entropy(
    logits: Any,
    targets: Any,
    *,
    axis: SupportsIndex = -1,
    weight: Any = None,
    sample_weight: Any = None,
    ignore_index: SupportsIndex | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    where: Any = None,
    reduction: str = "mean",
) -> Any:
    """`pylogits.cross_entropy` of Dask arrays, with its options and reductions.

    A sum is taken over the same rows in the same order as that of a NumPy array, so that a mean has the same bits, too.

    Parameters
    ----------
    logits : dask.array.Array of float, shape (..., C, ...)
        Raw scores, not probabilities.
    targets : array_like or dask.array.Array
        Integers, in the shape of `logits` without `axis`, or probabilities in the shape of `logits`.
    sample_weight, where : array_like or dask.array.Array, optional
        As for `pylogits.cross_entropy`.
    axis, weight, ignore_index, label_smoothing, z_loss, softcap, temperature, reduction
        As for `pylogits.cross_entropy`; `weight` is a NumPy array.

    Returns
    -------
    dask.array.Array
        One loss a row with reduction="none", else without dimensions; in the dtype of `logits` (float32 for float16 and
        bfloat16).

    Raises
    ------
    TypeError, ValueError
        As `pylogits.cross_entropy`; for a bad target or sample weight when its chunk is computed.

    Examples
    --------
    >>> import dask.array as da
    >>> import pylogits.dask
    >>> logits = da.from_array([[0.5, 1.5, 0.1], [2.2, 1.3, 1.7]], chunks=(1, 3))
    >>> pylogits.dask.cross_entropy(logits, [1, 2]).compute().round(7)
    np.float64(0.8393433)
    """
    return _cross_entropy(
        ChunkedRows(logits, axis),
        targets,
        sample_weight,
        where,
        differentiate=False,
        weight=weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        temperature=temperature,
        reduction=reduction,
    )[0]


def cross_entropy_value_and_grad(
    logits: Any,
    targets: Any,
    *,
    axis: SupportsIndex = -1,
    weight: Any = None,
    sample_weight: Any = None,
    ignore_index: SupportsIndex | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    where: Any = None,
    reduction: str = "mean",
    loss_grad: Any = None,
) -> tuple[Any, Any]:
    """`pylogits.cross_entropy_value_and_grad` of Dask arrays: the loss and its gradient with respect to the logits.

    The gradient of a weighted mean needs the sum of the weights, so targets and sample weights are all read before it begins.

    Parameters
    ----------
    logits, targets, axis, weight, sample_weight, ignore_index, label_smoothing, z_loss, softcap, temperature, where, reduction
        As for `cross_entropy`.
    loss_grad : array_like or dask.array.Array, optional
        The gradient of what follows with respect to the loss: broadcasts to the shape of the result. Ones by default.

    Returns
    -------
    loss : dask.array.Array
        That of `cross_entropy`.
    grad : dask.array.Array of the shape and dtype of `logits`

    Raises
    ------
    TypeError, ValueError
        As `cross_entropy`.

    Examples
    --------
    >>> import dask
    >>> import dask.array as da
    >>> import pylogits.dask
    >>> logits = da.from_array([[0.5, 1.5, 0.1], [2.2, 1.3, 1.7]], chunks=(1, 3))
    >>> loss, grad = dask.compute(*pylogits.dask.cross_entropy_value_and_grad(logits, [1, 2]))
    >>> grad.round(4)
    array([[ 0.1139, -0.1903,  0.0764],
           [ 0.2484,  0.101 , -0.3494]])
    """
    return _cross_entropy(
        ChunkedRows(logits, axis),
        targets,
        sample_weight,
        where,
        differentiate=True,
        loss_grad=loss_grad,
        weight=weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        temperature=temperature,
        reduction=reduction,
    )


def score(
    logits: Any,
    targets: Any = None,
    *,
    axis: SupportsIndex = -1,
    top_k: SupportsIndex = 1,
    temperature: float = 1.0,
) -> pylogits.Scores:
    """`pylogits.score` of Dask arrays.

    Parameters
    ----------
    logits : dask.array.Array of float, shape (..., C, ...)
        Raw scores.
    targets : array_like or dask.array.Array of int, shape of `logits` without `axis`, optional
        The true classes, in [0, C).
    axis, top_k, temperature
        As for `pylogits.score`.

    Returns
    -------
    pylogits.Scores
        Of Dask arrays; `dask.compute` gets all of them in one pass over the logits.

    Raises
    ------
    TypeError, ValueError
        As `pylogits.score`; for a target outside [0, C) when its chunk is computed.

    Examples
    --------
    >>> import dask
    >>> import dask.array as da
    >>> import pylogits.dask
    >>> logits = da.from_array([[0.5, 1.5, 0.1], [2.2, 1.3, 1.7]], chunks=(1, 3))
    >>> scores, = dask.compute(pylogits.dask.score(logits, [1, 2]))
    >>> scores.prediction, scores.correct
    (array([1, 0]), array([ True, False]))
    """
    rows = ChunkedRows(logits, axis)
    labels = rows.checked("target", rows.per_row("targets", targets))
    results = rows.apply(pylogits.score, targets=labels, top_k=top_k, temperature=temperature)
    return pylogits.Scores(*results, *[None] * (8 - len(results)))


# ---- the reductions of losses ----


def _cross_entropy(
    rows: ChunkedRows,
    targets: Any,
    sample_weight: Any,
    where: Any,
    *,
    differentiate: bool,
    reduction: str,
    loss_grad: Any = None,
    **options: Any,
) -> tuple[Any, Any]:
    given = da.asarray(targets)
    hard = given.dtype.kind in "iu"
    arrays = {
        "targets": rows.per_row("targets", given) if hard else rows.full("targets", given),
        "sample_weight": rows.per_row("sample_weight", sample_weight, broadcast=True),
        "where": rows.full("where", where, broadcast=True),
    }
    counting = options | {"reduction": reduction}
    if hard:
        labels = arrays["targets"] = rows.checked("target", arrays["targets"], options["ignore_index"])
    else:  # of probabilities, the mean's denominator has only the sample weights
        labels, counting["weight"] = da.zeros(rows.shape, dtype=np.int64, chunks=rows.chunks), None
    problem, denominator = _division(rows, labels, arrays["sample_weight"], counting)
    if differentiate:
        if reduction != "none":
            loss_grad = fit("loss_grad", loss_grad, (), (), broadcast=True)
        upstream = rows.per_row("loss_grad", loss_grad, broadcast=True)
        lazy = {"denominator": denominator}
        losses, grad = rows.apply(_losses_and_grad, lazy=lazy, loss_grad=upstream, **arrays, **options)
    else:
        losses, grad = rows.apply(pylogits.cross_entropy, reduction="none", **arrays, **options), None
    if reduction == "none":
        return losses, grad
    divide = partial(_divide, problem)
    return da.apply_gufunc(divide, "()->()", _total(losses), denominator=denominator, output_dtypes=losses.dtype), grad


def _losses_and_grad(logits: Array, targets: Array, *, axis: int, denominator: float = 1.0, **options: Any) -> tuple[Any, Any]:
    """The losses of a chunk, and its part of the gradient of their sum over all chunks, divided by `denominator`."""
    options = dict.fromkeys(("sample_weight", "where", "loss_grad")) | options
    return run_cross_entropy(
        logits, targets, axis, None, differentiate=True, reduction="none", denominator=float(denominator), **options
    )


def _division(rows: ChunkedRows, labels: Any, sample_weight: Any, options: dict[str, Any]) -> tuple[Problem, Any]:
    """What knows how the sum of the losses is divided, and what by: a number, or a Dask array of one."""
    classes = rows.logits.shape[rows.axes[0]]
    problem_of = partial(_problem_of, classes, rows.dtype, options)
    weights = None if sample_weight is None else np.empty(0, sample_weight.dtype)
    problem = problem_of(np.empty(0, labels.dtype), weights)
    denominator = problem.known_denominator(math.prod(rows.shape))
    if denominator is not None:
        return problem, denominator
    numbers = da.map_blocks(partial(_count, problem_of), labels, sample_weight, dtype=np.float64)
    return problem, da.apply_gufunc(check_denominator, "()->()", _total(numbers), output_dtypes=np.float64)


def _problem_of(
    classes: int, dtype: np.dtype[Any], options: dict[str, Any], labels: Array, sample_weight: Array | None
) -> Problem:
    shape = (*labels.shape, classes)
    return check_problem(shape, labels.ndim, dtype, labels, sample_weight=sample_weight, where=None, denominator=1.0, **options)


def _count(problem_of: Callable[..., Problem], labels: Array, sample_weight: Array | None) -> Array:
    """What each row of a chunk adds to the denominator."""
    numbers = np.empty(labels.shape)
    problem_of(labels, sample_weight).count_rows(numbers)
    return numbers


def _total(numbers: Any) -> Any:
    """The sum of a Dask array, of the same parts in the same order as that of a NumPy array in `_problem.Total`."""
    wide = np.result_type(numbers.dtype, np.float64)
    flat = numbers.ravel().rechunk(ROWS_AT_A_TIME)
    sums = flat.map_blocks(partial(np.sum, dtype=wide, keepdims=True), dtype=wide, chunks=((1,) * flat.numblocks[0],))
    return da.apply_gufunc(_add_up, "(n)->()", sums.rechunk(-1), output_dtypes=wide)


def _add_up(sums: Array) -> Any:
    """The sum from first to last, an order that np.sum does not keep."""
    return np.add.accumulate(sums, axis=-1)[..., -1]


def _divide(problem: Problem, total: Any, denominator: float) -> Array:
    return problem._replace(denominator=float(denominator)).reduce(total)
