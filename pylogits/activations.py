"""From logits to probabilities and back: softmax, log_softmax, their gradients, logsumexp and selective_log_softmax."""

from typing import Any, SupportsIndex

import numpy as np

from pylogits import _device, _rows
from pylogits._float_state import standard_arithmetic
from pylogits._rows import Axis


def softmax(logits: Any, axis: Axis = -1, *, where: Any = None, temperature: float = 1.0, out: Any = None) -> Any:
    """Probabilities from logits: exp(x / temperature), divided by its sum over the classes.

    Parameters
    ----------
    logits : array_like of float, shape (..., C, ...)
        Raw scores. float16 and bfloat16 are computed in float32 and rounded once; integers and booleans are taken as
        float64. A torch tensor gives a torch tensor, an array on a GPU one there.
    axis : int, tuple of int or None, optional
        The class axis, the last by default. Several axes, or all of them (None), form one distribution.
    where : array_like of bool, optional
        Broadcasts to the shape of `logits`. Logits where it is False count for nothing and get probability 0.
    temperature : float, optional
        Positive and finite; above 1 the distribution gets flatter.
    out : ndarray, optional
        Where the result goes, of its shape and dtype. It may be `logits` itself.

    Returns
    -------
    ndarray of the shape and dtype of `logits`
        At least 0, at most 1, with sum 1 along `axis`. A row with a NaN, a +inf or nothing but -inf is NaN.

    Raises
    ------
    TypeError, ValueError
        For arguments of a wrong type, shape or value; `out` is then untouched.

    See Also
    --------
    log_softmax : the logarithms, exact where the probabilities vanish.
    softmax_cross_entropy_with_logits : the loss; it takes logits, not probabilities.

    References
    ----------
    J. S. Bridle, "Probabilistic interpretation of feedforward classification network outputs", 1990.

    Examples
    --------
    >>> import pylogits
    >>> pylogits.softmax([[0.5, 1.5, 0.1], [2.2, 1.3, 1.7]]).round(4)
    array([[0.2279, 0.6194, 0.1527],
           [0.4967, 0.202 , 0.3013]])
    """
    result = _rows.run_contiguous("softmax", logits, None, axis, where, temperature, out)
    if result is not None:
        return result
    return _masked("softmax", logits, axis, where, temperature, out)


def log_softmax(logits: Any, axis: Axis = -1, *, where: Any = None, temperature: float = 1.0, out: Any = None) -> Any:
    """Log-probabilities from logits: x / temperature - logsumexp(x / temperature).

    Parameters
    ----------
    logits : array_like of float, shape (..., C, ...)
        Raw scores, as for `softmax`.
    axis : int, tuple of int or None, optional
        The class axis, the last by default; several axes, or all (None), form one distribution.
    where : array_like of bool, optional
        Broadcasts to the shape of `logits`. Logits where it is False count for nothing and get -inf.
    temperature : float, optional
        Positive and finite.
    out : ndarray, optional
        Where the result goes, of its shape and dtype. It may be `logits` itself.

    Returns
    -------
    ndarray of the shape and dtype of `logits`
        In nats, at most 0. Computed from the differences to the maximum and log1p of the other terms, so that values near
        0 keep their digits.

    Raises
    ------
    TypeError, ValueError
        For arguments of a wrong type, shape or value; `out` is then untouched.

    Examples
    --------
    >>> import pylogits
    >>> pylogits.log_softmax([0.0, 40.0])
    array([-4.00000000e+01, -4.24835426e-18])
    """
    result = _rows.run_contiguous("log_softmax", logits, None, axis, where, temperature, out)
    if result is not None:
        return result
    return _masked("log_softmax", logits, axis, where, temperature, out)


@standard_arithmetic
def _masked(operation: str, logits: Any, axis: Axis, where: Any, temperature: Any, out: Any) -> Any:
    array = _rows.to_array(logits, "logits")
    dtype = _rows.check_floats(array, "logits")
    mask = _rows.check_where(where, array.shape, _device.is_on_gpu(array))
    return _rows.run_full(operation, logits, array, mask, axis, out, (_rows.check_temperature(temperature, dtype),))


def softmax_backward(grad: Any, probs: Any, axis: Axis = -1, *, out: Any = None) -> Any:
    """The gradient with respect to logits, from that with respect to their softmax: p (g - sum(g p)).

    Parameters
    ----------
    grad : array_like of float, shape of `probs`
        g, the gradient with respect to the probabilities.
    probs : array_like of float, shape (..., C, ...)
        p, what `softmax` returned.
    axis : int, tuple of int or None, optional
        The class axis or axes, as given to `softmax`.
    out : ndarray, optional
        Where the result goes, of the shape and dtype of `probs`. It may be `grad` or `probs` itself.

    Returns
    -------
    ndarray of the shape and dtype of `probs`
        With a temperature, divide it by that. It is 0 where `probs` is.

    Raises
    ------
    TypeError, ValueError
        For arguments of a wrong type, shape or value; `out` is then untouched.

    See Also
    --------
    cross_entropy_value_and_grad : the gradient of a loss, without probabilities in between.

    References
    ----------
    PyTorch's ``_softmax_backward_data``.

    Examples
    --------
    >>> import pylogits
    >>> pylogits.softmax_backward([1.0, 0.0], [0.75, 0.25])
    array([ 0.1875, -0.1875])
    """
    return _backward("softmax_backward", grad, probs, "probs", axis, out)


def log_softmax_backward(grad: Any, log_probs: Any, axis: Axis = -1, *, out: Any = None) -> Any:
    """The gradient with respect to logits, from that with respect to their log_softmax: g - p sum(g), p = exp(log_probs).

    Parameters
    ----------
    grad : array_like of float, shape of `log_probs`
        g, the gradient with respect to the log-probabilities.
    log_probs : array_like of float, shape (..., C, ...)
        What `log_softmax` returned: at most 0.
    axis : int, tuple of int or None, optional
        The class axis or axes, as given to `log_softmax`.
    out : ndarray, optional
        Where the result goes, of the shape and dtype of `log_probs`. It may be `grad` or `log_probs` itself.

    Returns
    -------
    ndarray of the shape and dtype of `log_probs`
        With a temperature, divide it by that.

    Raises
    ------
    TypeError, ValueError
        For arguments of a wrong type, shape or value; `out` is then untouched.

    References
    ----------
    PyTorch's ``_log_softmax_backward_data``.

    Examples
    --------
    >>> import pylogits
    >>> pylogits.log_softmax_backward([1.0, 0.0], pylogits.log_softmax([0.0, 0.0]))
    array([ 0.5, -0.5])
    """
    return _backward("log_softmax_backward", grad, log_probs, "log_probs", axis, out)


def _backward(operation: str, grad: Any, result: Any, name: str, axis: Axis, out: Any) -> Any:
    plain = _rows.run_contiguous(operation, result, grad, axis, out=out)
    if plain is not None:
        return plain
    return _general_backward(operation, grad, result, name, axis, out)


@standard_arithmetic
def _general_backward(operation: str, grad: Any, result: Any, name: str, axis: Axis, out: Any) -> Any:
    array = _rows.to_array(result, name)
    slopes = _rows.to_array(grad, "grad", _device.is_on_gpu(array))
    dtype = _rows.check_floats(array, name)
    if _rows.check_floats(slopes, "grad") != slopes.dtype.newbyteorder("="):
        slopes = slopes.astype(_rows.row_dtype(dtype))  # integers
    if slopes.shape != array.shape:
        raise ValueError(f"grad must have the shape of {name}, {array.shape}, not {slopes.shape}")
    return _rows.run_full(operation, result, array, slopes, axis, out)


def logsumexp(
    logits: Any,
    axis: Axis = -1,
    *,
    where: Any = None,
    temperature: float = 1.0,
    keepdims: bool = False,
    out: Any = None,
) -> Any:
    """The logarithm of the sum of exp(x / temperature) over the classes.

    Parameters
    ----------
    logits : array_like of float, shape (..., C, ...)
        Raw scores, as for `softmax`.
    axis : int, tuple of int or None, optional
        The axis or axes that are summed, the last by default; None is all.
    where : array_like of bool, optional
        Broadcasts to the shape of `logits`. Logits where it is False count for nothing.
    temperature : float, optional
        Positive and finite.
    keepdims : bool, optional
        Keep the summed axes, with length 1.
    out : ndarray, optional
        Where the result goes, of its shape and dtype.

    Returns
    -------
    ndarray or scalar
        In the dtype of `logits` (float32 for float16 and bfloat16). -inf for a row without classes or with nothing but
        -inf; +inf for one with a +inf.

    Raises
    ------
    TypeError, ValueError
        For arguments of a wrong type, shape or value; `out` is then untouched.

    Examples
    --------
    >>> import pylogits
    >>> pylogits.logsumexp([1000.0, 1000.0])
    np.float64(1000.6931471805599)
    """
    plain = None if keepdims else _rows.run_contiguous("logsumexp", logits, None, axis, where, temperature, out)
    if plain is not None:
        return plain
    return _logsumexp(logits, axis, where, temperature, keepdims, out)


@standard_arithmetic
def _logsumexp(logits: Any, axis: Axis, where: Any, temperature: Any, keepdims: bool, out: Any) -> Any:
    array = _rows.to_array(logits, "logits")
    dtype = _rows.check_floats(array, "logits")
    axes = _rows.check_axis(axis, array.ndim)
    mask = _rows.check_where(where, array.shape, _device.is_on_gpu(array))
    temperature = _rows.check_temperature(temperature, dtype)
    shape = tuple(size for number, size in enumerate(array.shape) if number not in axes)
    kept = tuple(1 if number in axes else size for number, size in enumerate(array.shape))
    if out is not None:
        _rows.check_out(out, kept if keepdims else shape, _rows.row_dtype(dtype), on_gpu=_device.is_on_gpu(array))
    result = _rows.empty(logits, kept if keepdims else shape, _rows.row_dtype(dtype), out)
    if not array.size and not _device.is_on_gpu(array):
        result[...] = -np.inf
    elif result.size:
        module, threads = _rows.backend("logsumexp", array, dtype, axes)
        _rows.run(
            lambda logits, where, out: module.logsumexp(logits, where, temperature, out, threads),
            module,
            axes,
            _rows.Operands([array, mask], row_outputs=[result.reshape(shape)]),
        )
    return _rows.deliver(logits, result, out)


@standard_arithmetic
def selective_log_softmax(
    logits: Any,
    indices: Any,
    axis: SupportsIndex = -1,
    *,
    temperature: float = 1.0,
    out: Any = None,
) -> Any:
    """The log-probabilities of chosen classes only: ``take_along_axis(log_softmax(logits), indices)`` in one pass.

    Parameters
    ----------
    logits : array_like of float, shape (..., C, ...)
        Raw scores, as for `softmax`.
    indices : array_like of int
        The classes: one a row, in the shape of `logits` without `axis`; or K a row, with K in the place of C.
    axis : int, optional
        The class axis, the last by default.
    temperature : float, optional
        Positive and finite.
    out : ndarray, optional
        Where the result goes, of its shape and dtype.

    Returns
    -------
    ndarray of the shape of `indices` and the dtype of `logits`
        Log-probabilities in nats, to the bit those of `log_softmax`, without an array of its size.

    Raises
    ------
    TypeError, ValueError
        For arguments of a wrong type, shape or value, and for an index outside [0, C); `out` is then untouched.

    References
    ----------
    The name and its use for per-token log-probabilities come from Hugging Face TRL.

    Examples
    --------
    >>> import pylogits
    >>> pylogits.selective_log_softmax([[0.5, 1.5, 0.1], [2.2, 1.3, 1.7]], [1, 2])
    array([-0.4790107 , -1.19967598])
    """
    array = _rows.to_array(logits, "logits")
    dtype = _rows.check_floats(array, "logits")
    number = _rows.check_single_axis(axis, array.ndim)
    picks = _rows.check_integers(indices, "indices", _device.is_on_gpu(array))
    temperature = _rows.check_temperature(temperature, dtype)
    single = array.shape[:number] + array.shape[number + 1 :]
    shape = picks.shape
    if shape == single:
        several = np.expand_dims(picks, number)
    elif picks.ndim == array.ndim and shape[:number] + shape[number + 1 :] == single:
        several = picks
    else:
        raise ValueError(f"indices must have shape {single}, or that with K at axis {number}, not {shape}")
    if out is not None:
        _rows.check_out(out, shape, dtype, on_gpu=_device.is_on_gpu(array))
    result = _rows.empty(logits, shape, dtype, out)
    if picks.size:
        if not array.size:
            _rows.raise_bad_label(picks, "index", array.shape[number])
        module, threads = _rows.backend("selective_log_softmax", array, dtype, (number,))
        _rows.run(
            lambda logits, indices, out: module.selective_log_softmax(logits, indices, temperature, out, threads),
            module,
            (number,),
            _rows.Operands([array, _rows.as_labels(several)], outputs=[result.reshape(several.shape)]),
            lambda: _rows.raise_bad_label(picks, "index", array.shape[number]),
        )
    return _rows.deliver(logits, result, out)
