"""The fused cross entropies under TensorFlow's names, and one_hot."""

from typing import Any, SupportsIndex

import numpy as np
import numpy.typing as npt

from pylogits import _dispatch, _rows


def softmax_cross_entropy_with_logits(*, labels: Any, logits: Any, axis: SupportsIndex = -1, out: Any = None) -> Any:
    """Cross entropy between label distributions and softmax(logits): -sum(labels * log_softmax(logits)).

    Parameters
    ----------
    labels : array_like of float, shape (..., C, ...)
        Probabilities (soft labels) or one-hot rows, used as given; a row need not sum to 1. Broadcasts against `logits`.
        For class numbers use `sparse_softmax_cross_entropy_with_logits`.
    logits : array_like of float, shape (..., C, ...)
        Raw scores, not probabilities: only the fusion with the softmax is sound for large ones.
    axis : int, optional
        The class axis, the last by default.
    out : ndarray, optional
        Where the losses go, of their shape and dtype.

    Returns
    -------
    ndarray or scalar
        One loss a row, in nats, in the dtype of `logits` (float32 for float16 and bfloat16). A class with label 0 adds
        nothing, even where its logit is -inf.

    Raises
    ------
    TypeError, ValueError
        For arguments of a wrong type, shape or value, and for rows without classes; `out` is then untouched.

    References
    ----------
    TensorFlow's ``tf.nn.softmax_cross_entropy_with_logits``.

    Examples
    --------
    >>> import pylogits
    >>> labels = [[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    >>> logits = [[0.5, 1.5, 0.1], [2.2, 1.3, 1.7]]
    >>> pylogits.softmax_cross_entropy_with_logits(labels=labels, logits=logits)
    array([0.4790107 , 1.19967598])
    """
    array = _rows.to_numpy(logits, "logits")
    dtype = _rows.check_floats(array, "logits")
    weights = _rows.to_numpy(labels, "labels")
    if _rows.check_floats(weights, "labels") != weights.dtype.newbyteorder("="):
        weights = weights.astype(dtype)  # a one-hot array of integers
    number = _rows.check_single_axis(axis, array.ndim) - array.ndim
    try:
        shape = np.broadcast_shapes(array.shape, weights.shape)
    except ValueError:
        raise ValueError(f"labels of shape {weights.shape} do not broadcast against logits of shape {array.shape}") from None
    number += len(shape)
    _check_classes(shape[number])
    rows = shape[:number] + shape[number + 1 :]
    if out is not None:
        _rows.check_out(out, rows, _rows.row_dtype(dtype))
    result = np.empty(rows, _rows.row_dtype(dtype))
    if result.size:
        module, threads = _dispatch.select(dtype, result.size * shape[number])
        _rows.run(
            lambda logits, labels, out: module.softmax_cross_entropy_with_logits(logits, labels, out, threads),
            module.DTYPES,
            (number,),
            _rows.Operands(
                [np.broadcast_to(array, shape), np.broadcast_to(weights, shape)],
                row_outputs=[result],
            ),
        )
    return _rows.deliver(logits, result, out)


def sparse_softmax_cross_entropy_with_logits(*, labels: Any, logits: Any, axis: SupportsIndex = -1, out: Any = None) -> Any:
    """Cross entropy between class numbers and softmax(logits): -log_softmax(logits)[label].

    Parameters
    ----------
    labels : array_like of int, shape of `logits` without `axis`
        The class of each row, of any integer dtype, in [0, C).
    logits : array_like of float, shape (..., C, ...)
        Raw scores, not probabilities.
    axis : int, optional
        The class axis, the last by default.
    out : ndarray, optional
        Where the losses go, of their shape and dtype.

    Returns
    -------
    ndarray or scalar
        One loss a row, in nats, in the dtype of `logits` (float32 for float16 and bfloat16): to the bit that of
        `softmax_cross_entropy_with_logits` with one-hot labels.

    Raises
    ------
    TypeError, ValueError
        For arguments of a wrong type, shape or value, for a label outside [0, C) and for rows without classes; `out` is
        then untouched.

    References
    ----------
    TensorFlow's ``tf.nn.sparse_softmax_cross_entropy_with_logits``.

    Examples
    --------
    >>> import pylogits
    >>> logits = [[0.5, 1.5, 0.1], [2.2, 1.3, 1.7]]
    >>> pylogits.sparse_softmax_cross_entropy_with_logits(labels=[1, 2], logits=logits)
    array([0.4790107 , 1.19967598])
    """
    operation = "sparse_softmax_cross_entropy_with_logits"
    plain = None if labels is None else _rows.run_contiguous(operation, logits, labels, axis, out=out)
    if plain is not None:
        return plain
    array = _rows.to_numpy(logits, "logits")
    dtype = _rows.check_floats(array, "logits")
    number = _rows.check_single_axis(axis, array.ndim)
    classes = _rows.check_integers(labels, "labels")
    rows = array.shape[:number] + array.shape[number + 1 :]
    if classes.shape != rows:
        raise ValueError(f"labels must have the shape of logits without axis {number}, {rows}, not {classes.shape}")
    _check_classes(array.shape[number])
    if out is not None:
        _rows.check_out(out, rows, _rows.row_dtype(dtype))
    result = np.empty(rows, _rows.row_dtype(dtype))
    if result.size:
        module, threads = _dispatch.select(dtype, array.size)
        good = _rows.run(
            lambda logits, labels, out: module.sparse_softmax_cross_entropy_with_logits(logits, labels, out, threads),
            module.DTYPES,
            (number,),
            _rows.Operands(
                [array],
                row_inputs=[np.ascontiguousarray(classes, np.int64)],
                row_outputs=[result],
            ),
        )
        if not good:
            _rows.raise_bad_label(classes, "label", array.shape[number])
    return _rows.deliver(logits, result, out)


def _check_classes(classes: int) -> None:
    if classes == 0:
        raise ValueError("logits have no classes: the class axis has length 0")


def one_hot(
    labels: Any,
    num_classes: SupportsIndex,
    *,
    dtype: npt.DTypeLike = np.float32,
    axis: SupportsIndex = -1,
) -> Any:
    """Rows with a 1 at the label and 0 elsewhere.

    Parameters
    ----------
    labels : array_like of int, any shape
        Class numbers in [0, num_classes), of any integer dtype.
    num_classes : int
        The number of classes C, at least 0.
    dtype : dtype, optional
        Of the result, float32 by default.
    axis : int, optional
        Where the class axis goes in the result, the last by default.

    Returns
    -------
    ndarray
        The shape of `labels` with C inserted at `axis`.

    Raises
    ------
    TypeError, ValueError
        For labels that are not integers, and for one outside [0, num_classes). (Peers give a row of zeros, whose loss is
        0: the mistake then goes unseen.)

    Examples
    --------
    >>> import pylogits
    >>> pylogits.one_hot([1, 2], 3)
    array([[0., 1., 0.],
           [0., 0., 1.]], dtype=float32)
    """
    classes = _rows.check_integers(labels, "labels")
    try:
        count = int(np.asarray(num_classes).__index__())
    except TypeError:
        raise TypeError(f"num_classes must be an int, not {num_classes!r}") from None
    if count < 0:
        raise ValueError(f"num_classes must be at least 0, not {count}")
    number = _rows.check_single_axis(axis, classes.ndim + 1)
    if ((classes < 0) | (classes >= count)).any():
        _rows.raise_bad_label(classes, "label", count)
    shape = (*classes.shape[:number], count, *classes.shape[number:])
    out, target = _rows.allocate(labels, shape, np.dtype(dtype))
    target[...] = 0
    if count:
        np.put_along_axis(target, np.expand_dims(np.asarray(classes, np.int64, order="C"), number), 1, axis=number)
    return out
