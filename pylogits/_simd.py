"""The C backend as a backend module: arguments into a task, one call into C."""

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from pylogits._c import ffi, lib
from pylogits._reference import LossOptions, Scores

Array = npt.NDArray[Any]

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_CODES: dict[np.dtype[Any], int] = {
    np.dtype(np.float16): lib.PL_FLOAT16,
    _BFLOAT16: lib.PL_BFLOAT16,
    np.dtype(np.float32): lib.PL_FLOAT32,
    np.dtype(np.float64): lib.PL_FLOAT64,
}
DTYPES = frozenset(_CODES)
_TASK, _VOID, _BYTES, _INTEGERS = map(ffi.typeof, ("struct pl_task *", "void *", "char[]", "int64_t[]"))
_SCORE_TYPES = {"prediction": _INTEGERS, "top_k_indices": _INTEGERS, "correct": ffi.typeof("unsigned char[]")}
_SCORES = [(name, _SCORE_TYPES.get(name, _BYTES)) for name in Scores._fields]
_NO_OPTIONS = LossOptions()
# Looked up once: a small call is little more than its look-ups.
_from_buffer = ffi.from_buffer
_run_contiguous = lib.pl_run_contiguous
NULL = ffi.NULL
OUT_OF_MEMORY = -2
# Elements of a row at a time, a tenth of a second's: Python sees Ctrl-C between two calls only.
PART_SIZE = 1 << 26
NO_MEMORY = "no memory for the blocks of a long row"
OPERATIONS = {
    "softmax": lib.PL_SOFTMAX,
    "log_softmax": lib.PL_LOG_SOFTMAX,
    "logsumexp": lib.PL_LOGSUMEXP,
    "softmax_cross_entropy_with_logits": lib.PL_CROSS_ENTROPY,
    "sparse_softmax_cross_entropy_with_logits": lib.PL_SPARSE_SOFTMAX_CROSS_ENTROPY,
    "cross_entropy": lib.PL_SPARSE_SOFTMAX_CROSS_ENTROPY,
    "cross_entropy_value_and_grad": lib.PL_CROSS_ENTROPY,
    "softmax_backward": lib.PL_SOFTMAX_BACKWARD,
    "log_softmax_backward": lib.PL_LOG_SOFTMAX_BACKWARD,
}


def _task(
    operation: int,
    logits: Array,
    *,
    out: Array | None = None,
    labels: Array | None = None,
    where: Array | None = None,
    temperature: float = 1.0,
    picks: int = 1,
    grad: Array | None = None,
    scores: Scores | None = None,
    brier: Array | None = None,
    losses: Mapping[str, Any] | None = None,
) -> Any:
    """The arguments of one call. It has the arrays' addresses only: they must be kept."""
    task = ffi.new(_TASK)  # filled in field by field: from a dict it takes half as long again
    task.operation, task.dtype, task.picks, task.temperature = operation, _CODES[logits.dtype], picks, temperature
    task.outer, task.classes, task.inner = logits.shape
    task.logits = _view(logits)
    if out is not None:
        task.out_dtype, task.out = _CODES[out.dtype], _view(out)
    if where is not None:
        task.where = _view(where)
    if labels is not None:
        task.labels = _view(labels)
    if grad is not None:
        task.grad = _view(grad)
    if losses is not None:
        fields = task.losses
        for name, value in losses.items():
            setattr(fields, name, _loss_field(name, value))
    if scores is not None:
        for (name, kind), array in zip(_SCORES, scores, strict=True):
            if array is not None:
                setattr(task, name, _from_buffer(kind, array))
    if brier is not None:
        task.brier = _from_buffer(_BYTES, brier)
    return task


def _run(
    operation: int,
    logits: Array,
    threads: int,
    *,
    where: Array | None = None,
    picks: int = 1,
    scores: Scores | None = None,
    **arguments: Any,
) -> int:
    if where is None and picks == 1 and scores is None:
        status = _run_simple(operation, logits, threads, **arguments)
        if status is not None:
            return status
    return _run_task(_task(operation, logits, where=where, picks=picks, scores=scores, **arguments), threads)


def _run_simple(operation: int, logits: Array, threads: int, **arguments: Any) -> int | None:
    """`run_contiguous` where that can be, in a third of the time that a task takes; else None."""
    _, classes, inner = logits.shape
    if inner != 1 or classes > PART_SIZE:
        return None
    try:
        return run_contiguous(operation, logits.dtype, logits, logits.size, classes, threads, **arguments)
    except ValueError:  # an array is not contiguous
        return None


def _bits(value: Any) -> Any:
    """An array of bfloat16, which is no buffer, as one."""
    return value.view(np.uint16) if isinstance(value, np.ndarray) and value.dtype == _BFLOAT16 else value


def run_contiguous(
    operation: int,
    dtype: np.dtype[Any],
    logits: Array,
    size: int,
    classes: int,
    threads: int,
    out: Array,
    labels: Array | None = None,
    probabilities: Array | None = None,
    grad: Array | None = None,
    temperature: float = 1.0,
    scale: tuple[float, float] = (1.0, 0.0),
) -> int:
    """An operation on contiguous arrays, `size` logits in all: the last axis are the classes. ValueError for other arrays."""
    if dtype is _BFLOAT16:
        logits, out, probabilities, grad = _bits(logits), _bits(out), _bits(probabilities), _bits(grad)
    return _checked(
        _run_contiguous(
            operation,
            _CODES[dtype],
            _from_buffer(logits),
            NULL if labels is None else _from_buffer(labels),
            NULL if probabilities is None else _from_buffer(probabilities),
            NULL if grad is None else _from_buffer(grad),
            _from_buffer(out),
            size,
            classes,
            temperature,
            *scale,
            threads,
        )
    )


def _run_task(task: Any, threads: int) -> int:
    long = task.classes > PART_SIZE and lib.pl_has_parts(task)
    return _checked(_run_in_parts(task, threads) if long else lib.pl_run(task, threads))


def _checked(status: int) -> int:
    if status == OUT_OF_MEMORY:
        raise MemoryError(NO_MEMORY)
    return status


def _run_in_parts(task: Any, threads: int) -> int:
    """What `pl_run` does for few long rows, in calls that end soon."""
    bad = int(lib.pl_find_bad_label(task))
    if bad != -1:
        return bad
    room = _numbers(task)
    numbers = _from_buffer(room)
    blocks, step = _block_count(task), PART_SIZE // lib.pl_block(task.dtype)
    parts = [(first, min(first + step, blocks)) for first in range(0, blocks, step)]
    for part in parts:
        lib.pl_reduce_part(task, *part, numbers, threads)
    lib.pl_join_parts(task, numbers)
    return max(int(lib.pl_write_part(task, *part, numbers, threads)) for part in parts)


def _block_count(task: Any) -> int:
    return -(-int(task.classes) // int(lib.pl_block(task.dtype)))


def _numbers(task: Any) -> Array:
    """Room for what the blocks of rows are reduced to."""
    return np.empty(lib.pl_numbers_size(task), np.uint8)


def _view(array: Array) -> tuple[Any, int, int, int]:
    """A pl_view; an array of shape (outer, inner) has no stride along the classes."""
    # A buffer is had in a third of the time. Only contiguous arrays are one.
    data = _from_buffer(_bits(array)) if array.flags.c_contiguous else ffi.cast(_VOID, array.ctypes.data)
    if array.ndim == 3:
        return data, *array.strides
    outer, inner = array.strides
    return data, outer, 0, inner


def _loss_field(name: str, value: Any) -> Any:
    if not isinstance(value, np.ndarray):
        return value
    return _view(value) if name in ("probabilities", "grad") else _from_buffer(value)


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
    cross_entropy(logits, None, labels, None, None, None, None, out, _NO_OPTIONS, threads)


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
    arrays: dict[str, Any] = {"probabilities": probabilities, "grad": grad}
    common: dict[str, Any] = {"out": out, "labels": labels, "temperature": options.temperature}
    operation = lib.PL_CROSS_ENTROPY
    if options.are_default and where is None and sample_weight is None and loss_grad is None:
        if labels is not None and grad is None:
            operation = lib.PL_SPARSE_SOFTMAX_CROSS_ENTROPY  # the kernel that is made for it, with the same bits
        status = _run_simple(operation, logits, threads, **common, **arrays, scale=options.scale)
        if status is not None:
            return status
    losses = _given(options, sample_weight, loss_grad, **arrays)
    return _run_task(_task(operation, logits, where=where, losses=losses, **common), threads)


def _given(
    options: LossOptions, sample_weight: Array | None, loss_grad: Array | None, **arrays: Array | None
) -> dict[str, Any]:
    """The fields of a struct pl_loss that are not as by default."""
    fields = {
        "sample_weight": sample_weight,
        "loss_grad": loss_grad,
        "weight": options.weight,
        "softcap": options.softcap,
        "ignore_index": options.ignore_index,
        "has_ignore_index": None if options.ignore_index is None else 1,
        "label_smoothing": options.label_smoothing or None,
        "z_loss": options.z_loss or None,
        "scale": options.scale[0],
        "scale_lo": options.scale[1],
        **arrays,
    }
    return {name: value for name, value in fields.items() if value is not None}


class TiledCrossEntropy:
    """`cross_entropy` with labels, of rows whose logits are made a tile of classes at a time and are never there as a whole.

    A tile has the logits of classes [first, first + n), where first is a multiple of `block`, and n is too but for the last.
    `reduce` takes each, in any order. Then, after `join`, `write` gives the losses and, where tiles come a second time, turns
    their logits into gradients.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        where: Array | None,
        labels: Array,
        sample_weight: Array | None,
        loss_grad: Array | None,
        out: Array,
        options: LossOptions,
        threads: int,
    ) -> None:
        self._threads = threads
        self._itemsize = out.dtype.itemsize
        self._arrays = where, labels, sample_weight, loss_grad, out, options
        logits = np.broadcast_to(np.zeros((), out.dtype), (*shape, 1))
        self._task = _task(
            lib.PL_CROSS_ENTROPY,
            logits,
            out=out[:, None],
            labels=labels[:, None],
            where=None if where is None else where[:, :, None],
            temperature=options.temperature,
            losses=_given(options, sample_weight, loss_grad),
        )
        self.block = tile_classes(out.dtype)
        self._numbers = _numbers(self._task)

    def _place(self, view: Any, tile: Array, first: int) -> tuple[int, int]:
        """Lay a view of the whole rows so that the tile is where it belongs; its blocks."""
        view.data = ffi.cast(_VOID, tile.ctypes.data - first * self._itemsize)
        view.outer, view.classes = tile.strides
        return first // self.block, -(-(first + tile.shape[1]) // self.block)

    def reduce(self, tile: Array, first: int) -> None:
        blocks = self._place(self._task.logits, tile, first)
        lib.pl_reduce_part(self._task, *blocks, _from_buffer(self._numbers), self._threads)

    def join(self) -> None:
        lib.pl_join_parts(self._task, _from_buffer(self._numbers))

    def write(self, tile: Array | None = None, first: int = 0) -> int:
        blocks = (0, 1)
        if tile is not None:
            self._place(self._task.logits, tile, first)
            blocks = self._place(self._task.losses.grad, tile, first)
        return int(lib.pl_write_part(self._task, *blocks, _from_buffer(self._numbers), self._threads))


def tile_classes(dtype: np.dtype[Any]) -> int:
    return int(lib.pl_block(_CODES[dtype]))


def softmax_backward(probs: Array, grad: Array, out: Array, threads: int) -> None:
    _run(lib.PL_SOFTMAX_BACKWARD, probs, threads, out=out, grad=grad)


def log_softmax_backward(log_probs: Array, grad: Array, out: Array, threads: int) -> None:
    _run(lib.PL_LOG_SOFTMAX_BACKWARD, log_probs, threads, out=out, grad=grad)


def score(
    logits: Array, targets: Array | None, temperature: float, scores: Scores, threads: int, brier: Array | None = None
) -> int:
    return _run(
        lib.PL_SCORE,
        logits,
        threads,
        labels=targets,
        temperature=temperature,
        picks=scores.top_k_indices.shape[-1],
        scores=scores,
        brier=brier,
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
