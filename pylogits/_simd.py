"""The C backend as a backend module: arguments into a task, one call into C."""

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from pylogits._c import ffi, lib
from pylogits._reference import LossOptions, Scores

Array = npt.NDArray[Any]

_CODES: dict[np.dtype[Any], int] = {
    np.dtype(np.float16): lib.PL_FLOAT16,
    np.dtype(ml_dtypes.bfloat16): lib.PL_BFLOAT16,
    np.dtype(np.float32): lib.PL_FLOAT32,
    np.dtype(np.float64): lib.PL_FLOAT64,
}
DTYPES = frozenset(_CODES)
# Looked up once: a small call is little more than its look-ups.
_from_buffer = ffi.from_buffer
_run_contiguous = lib.pl_run_contiguous
NULL = ffi.NULL
_OPERATIONS = {
    "softmax": lib.PL_SOFTMAX,
    "log_softmax": lib.PL_LOG_SOFTMAX,
    "logsumexp": lib.PL_LOGSUMEXP,
    "sparse_softmax_cross_entropy_with_logits": lib.PL_SPARSE_SOFTMAX_CROSS_ENTROPY,
}


def _run(
    operation: int,
    logits: Array,
    threads: int,
    *,
    out: Array | None = None,
    labels: Array | None = None,
    where: Array | None = None,
    temperature: float = 1.0,
    picks: int = 1,
    grad: Array | None = None,
    scores: Scores | None = None,
    losses: Mapping[str, Any] | None = None,
) -> int:
    task = ffi.new("struct pl_task *")
    task.operation = operation
    task.dtype = _CODES[logits.dtype]
    task.outer, task.classes, task.inner = logits.shape
    task.picks = picks
    task.temperature = temperature
    _view(task.logits, logits)
    if out is not None:
        task.out_dtype = _CODES[out.dtype]
        _view(task.out, out)
    if where is not None:
        _view(task.where, where)
    if labels is not None:
        _view(task.labels, labels)
    if grad is not None:
        _view(task.grad, grad)
    for name, value in (losses or {}).items():
        if not isinstance(value, np.ndarray):
            setattr(task.losses, name, value)
        elif name in ("probabilities", "grad"):
            _view(getattr(task.losses, name), value)
        else:
            setattr(task.losses, name, ffi.cast("void *", value.ctypes.data))
    if scores is not None:
        for name in Scores._fields:
            array = getattr(scores, name)
            if array is not None:
                pointer = ffi.cast("void *", array.ctypes.data)
                setattr(task, name, ffi.cast(ffi.typeof(getattr(task, name)), pointer))
    status = lib.pl_run(task, threads)
    if status == -2:
        raise MemoryError("no memory for the blocks of a long row")
    return int(status)


def _view(view: Any, array: Array) -> None:
    """Fill a pl_view; an array of shape (outer, inner) has no stride along the classes."""
    view.data = ffi.cast("void *", array.ctypes.data)
    if array.ndim == 3:
        view.outer, view.classes, view.inner = array.strides
    else:
        view.outer, view.inner = array.strides


def softmax(logits: Array, where: Array | None, temperature: float, out: Array, threads: int) -> None:
    _run(lib.PL_SOFTMAX, logits, threads, out=out, where=where, temperature=temperature)


def log_softmax(logits: Array, where: Array | None, temperature: float, out: Array, threads: int) -> None:
    _run(lib.PL_LOG_SOFTMAX, logits, threads, out=out, where=where, temperature=temperature)


def logsumexp(logits: Array, where: Array | None, temperature: float, out: Array, threads: int) -> None:
    _run(lib.PL_LOGSUMEXP, logits, threads, out=out, where=where, temperature=temperature)


def selective_log_softmax(logits: Array, indices: Array, temperature: float, out: Array, threads: int) -> int:
    return _run(
        lib.PL_SELECTIVE_LOG_SOFTMAX,
        logits,
        threads,
        out=out,
        labels=indices,
        picks=indices.shape[1],
        temperature=temperature,
    )


def softmax_cross_entropy_with_logits(logits: Array, labels: Array, out: Array, threads: int) -> None:
    cross_entropy(logits, None, labels, None, None, None, None, out, LossOptions(), threads)


def sparse_softmax_cross_entropy_with_logits(logits: Array, labels: Array, out: Array, threads: int) -> int:
    return _run(lib.PL_SPARSE_SOFTMAX_CROSS_ENTROPY, logits, threads, out=out, labels=labels)


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
    given = {
        "probabilities": probabilities,
        "sample_weight": sample_weight,
        "loss_grad": loss_grad,
        "grad": grad,
        "weight": options.weight,
        "softcap": options.softcap,
        "ignore_index": options.ignore_index,
        "has_ignore_index": None if options.ignore_index is None else 1,
        "label_smoothing": options.label_smoothing or None,
        "z_loss": options.z_loss or None,
    }
    losses = {name: value for name, value in given.items() if value is not None}
    plain = labels is not None and where is None and not losses
    losses["scale"], losses["scale_lo"] = options.scale
    return _run(
        # without options, the kernel that is made for it, with the same bits
        lib.PL_SPARSE_SOFTMAX_CROSS_ENTROPY if plain else lib.PL_CROSS_ENTROPY,
        logits,
        threads,
        out=out,
        labels=labels,
        where=where,
        temperature=options.temperature,
        losses=losses,
    )


def softmax_backward(probs: Array, grad: Array, out: Array, threads: int) -> None:
    _run(lib.PL_SOFTMAX_BACKWARD, probs, threads, out=out, grad=grad)


def log_softmax_backward(log_probs: Array, grad: Array, out: Array, threads: int) -> None:
    _run(lib.PL_LOG_SOFTMAX_BACKWARD, log_probs, threads, out=out, grad=grad)


def score(logits: Array, targets: Array | None, temperature: float, scores: Scores, threads: int) -> int:
    return _run(
        lib.PL_SCORE,
        logits,
        threads,
        labels=targets,
        temperature=temperature,
        picks=scores.top_k_indices.shape[-1],
        scores=scores,
    )


def run_contiguous(
    operation: str,
    dtype: np.dtype[Any],
    logits: Array,
    labels: Array | None,
    out: Array,
    size: int,
    classes: int,
    threads: int,
) -> int:
    """An operation on C-contiguous arrays, `size` logits in all, without the views and the task of the general way."""
    return _run_contiguous(  # type: ignore[no-any-return]
        _OPERATIONS[operation],
        _CODES[dtype],
        _from_buffer(logits),
        NULL if labels is None else _from_buffer(labels),
        _from_buffer(out),
        size,
        classes,
        threads,
    )


def max_threads() -> int:
    return int(lib.pl_max_threads())


def isa() -> str:
    return str(ffi.string(lib.pl_isa()).decode())


def available_isas() -> list[str]:
    names = (lib.pl_isa_name(index) for index in range(lib.pl_isa_count()))
    return [ffi.string(name).decode() for name in names]


def use_isa(name: str) -> None:
    """Force an instruction set, for all threads of the process."""
    if lib.pl_use_isa(name.encode()) != 0:
        raise ValueError(f"instruction set {name!r} is not available; available: {', '.join(available_isas())}")
