"""pylogits' functions inside a user's own ``@njit`` code. Numba calls `init` through the entry point ``numba_extensions``.

Results have the bits that they have outside. One call is one thread's work: rows in a ``prange`` use more.
"""

from typing import Any

import numpy as np
from numba import njit, types
from numba.core.errors import TypingError
from numba.core.imputils import impl_ret_borrowed
from numba.extending import intrinsic, overload

import pylogits
from pylogits import _dispatch


def init() -> None:
    """Tell Numba. The kernels are imported when the first call is compiled: other code of Numba's users needs none."""
    overload(pylogits.softmax)(_full("softmax", log=False))
    overload(pylogits.log_softmax)(_full("log_softmax", log=True))
    overload(pylogits.logsumexp)(_logsumexp)
    overload(pylogits.sparse_softmax_cross_entropy_with_logits)(_sparse_softmax_cross_entropy_with_logits)
    overload(pylogits.cross_entropy, prefer_literal=True)(_cross_entropy)


def _check_logits(logits: Any, name: str) -> None:
    is_array = isinstance(logits, types.Array) and logits.ndim in (1, 2) and logits.layout == "C"
    if not (is_array and logits.dtype in (types.float32, types.float64)):
        wanted = "C-contiguous logits of float32 or float64 with one or two dimensions"
        raise TypingError(f"{name} in compiled code takes {wanted}, not {logits}")


def _kernel(name: str, logits: Any) -> Any:
    """An operation on (rows, classes, 1), not of half precision, in as many pieces as it is told, of so many rows."""
    cpu = _dispatch.load("numba")
    return cpu.callable_from_jit(getattr(cpu, name), np.dtype(logits.dtype.name))


def _one(logits: Any) -> Any:
    """The temperature."""
    return np.dtype(logits.dtype.name).type(1)


def _check_labels(labels: Any, logits: Any, name: str) -> None:
    if logits.ndim == 1:
        good = isinstance(labels, types.Integer)
    else:
        good = isinstance(labels, types.Array) and labels.ndim == 1 and isinstance(labels.dtype, types.Integer)
    if not good:
        raise TypingError(f"{name} in compiled code takes an integer label a row, not {labels} for logits {logits}")


@njit
def _check_axis(axis, ndim):  # type: ignore[no-untyped-def]
    if axis != -1 and axis != ndim - 1:
        raise ValueError("axis must be the last in compiled code")


@intrinsic
def _as_writeable(typingctx, array):  # type: ignore[no-untyped-def]
    """The same array as the type that kernels are compiled for, whether or not it may be written: they only read logits."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return impl_ret_borrowed(context, builder, signature.return_type, args[0])

    return array.copy(readonly=False)(array), codegen


@njit
def _as_rows(logits):  # type: ignore[no-untyped-def]
    """Shape (rows, classes, 1), for logits that have any."""
    return _as_writeable(logits).reshape(logits.size // logits.shape[-1], logits.shape[-1], 1)


@njit
def _no_mask(rows):  # type: ignore[no-untyped-def]
    return np.empty((rows.shape[0], 0, 1), np.uint8)


def _full(name: str, log: bool) -> Any:
    def typed(logits, axis=-1):  # type: ignore[no-untyped-def]
        _check_logits(logits, name)
        kernel, temperature = _kernel("softmax_pieces", logits), _one(logits)

        def run(logits, axis=-1):  # type: ignore[no-untyped-def]
            _check_axis(axis, logits.ndim)
            out = np.empty_like(logits)
            if logits.size:
                rows = _as_rows(logits)
                kernel(rows, _no_mask(rows), temperature, log, _as_rows(out), False, 1, len(rows))
            return out

        return run

    return typed


def _logsumexp(logits, axis=-1):  # type: ignore[no-untyped-def]
    _check_logits(logits, "logsumexp")
    kernel, temperature = _kernel("logsumexp_pieces", logits), _one(logits)

    @njit
    def sums(logits):  # type: ignore[no-untyped-def]
        out = np.full(logits.shape[0], -np.inf, logits.dtype)
        if logits.size:
            rows = _as_rows(logits)
            kernel(rows, _no_mask(rows), temperature, out.reshape(len(rows), 1), False, 1, len(rows))
        return out

    def of_rows(logits, axis=-1):  # type: ignore[no-untyped-def]
        _check_axis(axis, logits.ndim)
        return sums(logits)

    def of_one(logits, axis=-1):  # type: ignore[no-untyped-def]
        _check_axis(axis, logits.ndim)
        return sums(logits.reshape(1, logits.size))[0]

    return of_rows if logits.ndim == 2 else of_one


def _losses(logits: Any) -> Any:
    """The losses of logits (rows, classes) with as many labels."""
    kernel, temperature = _kernel("pick_pieces", logits), _one(logits)

    @njit
    def losses(logits, labels):  # type: ignore[no-untyped-def]
        count, classes = logits.shape
        if len(labels) != count:
            raise ValueError("labels must be as many as the rows of logits")
        if classes == 0:
            raise ValueError("logits have no classes: the class axis has length 0")
        for n in range(count):
            if not 0 <= labels[n] < classes:
                raise ValueError(f"label {labels[n]} at index ({n},) is outside [0, {classes})")
        out = np.empty(count, logits.dtype)
        if count:
            rows, indices = _as_rows(logits), labels.astype(np.int64).reshape(count, 1, 1)
            kernel(rows, _no_mask(rows), indices, temperature, True, out.reshape(count, 1, 1), False, 1, count)
        return out

    return losses


def _sparse_softmax_cross_entropy_with_logits(labels, logits):  # type: ignore[no-untyped-def]
    _check_logits(logits, "sparse_softmax_cross_entropy_with_logits")
    _check_labels(labels, logits, "sparse_softmax_cross_entropy_with_logits")
    losses = _losses(logits)

    def of_rows(labels, logits):  # type: ignore[no-untyped-def]
        return losses(logits, labels)

    def of_one(labels, logits):  # type: ignore[no-untyped-def]
        return losses(logits.reshape(1, logits.size), np.full(1, labels))[0]

    return of_rows if logits.ndim == 2 else of_one


def _cross_entropy(logits, targets, reduction="mean"):  # type: ignore[no-untyped-def]
    _check_logits(logits, "cross_entropy")
    _check_labels(targets, logits, "cross_entropy")
    if getattr(reduction, "literal_value", reduction) != "none":
        raise TypingError('cross_entropy in compiled code has reduction="none" only')
    losses = _losses(logits)

    def of_rows(logits, targets, reduction="mean"):  # type: ignore[no-untyped-def]
        return losses(logits, targets)

    def of_one(logits, targets, reduction="mean"):  # type: ignore[no-untyped-def]
        return losses(logits.reshape(1, logits.size), np.full(1, targets))[0]

    return of_rows if logits.ndim == 2 else of_one
