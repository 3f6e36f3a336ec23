"""The array boundary: what the user gave, checked and turned into rows for a backend, and the results turned back.

An operand is *full* where it has the class axis (logits, where, dense labels, indices, their outputs) and *per row*
where it has not (labels, losses; trailing dimensions may follow). A backend gets full operands as (outer, classes, inner)
and per-row ones as (outer, inner). Where logits can't be viewed like that, or have a dtype or byte order that the backend
doesn't take, they are copied and computed a piece at a time: never as a whole.
"""

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple, NoReturn, SupportsIndex

import ml_dtypes
import numpy as np
import numpy.typing as npt
from array_api_compat import is_torch_array
from numpy.lib.array_utils import normalize_axis_index, normalize_axis_tuple

from pylogits import _device, _dispatch
from pylogits._device import DeviceArray
from pylogits._float_state import is_standard
from pylogits._reference import LossOptions

Array = npt.NDArray[Any]
Axis = SupportsIndex | tuple[SupportsIndex, ...] | None
Kernel = Callable[..., int | None]

# A piece is small enough to stay in a core's second-level cache and large enough to hide the cost of a call.
PIECE_BYTES = 1 << 20
# Elements that a backend gets at once, a tenth of a second's: Python sees Ctrl-C between two calls only.
CALL_SIZE = 1 << 26

_FLOAT32, _FLOAT64, _INT64 = np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.int64)
# One number a row.
_PER_ROW = frozenset(
    {"logsumexp", "softmax_cross_entropy_with_logits", "sparse_softmax_cross_entropy_with_logits", "cross_entropy"}
)
_OTHERS = {  # what second operands are
    "softmax_cross_entropy_with_logits": "probabilities",
    "sparse_softmax_cross_entropy_with_logits": "labels",
    "cross_entropy": "labels",
    "cross_entropy_value_and_grad": "labels",
    "softmax_backward": "grad",
    "log_softmax_backward": "grad",
}
_FLOAT16, _BFLOAT16 = np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)
_HALVES = frozenset({_FLOAT16, _BFLOAT16})
_FLOATS = _HALVES | {_FLOAT32, _FLOAT64, np.dtype(np.longdouble)}


# ---- into NumPy and back ----


def to_array(array: Any, name: str, on_gpu: bool | None = None) -> Array:
    """`to_numpy`, or the memory of an array on a GPU; `on_gpu` says where it must be, as the logits are there."""
    if type(array) is np.ndarray and not on_gpu:
        return array
    found = _device.is_on_gpu(array)
    if on_gpu and not found:
        raise TypeError(f"{name} is in main memory; beside logits on a GPU, only arrays there are supported")
    if not found or on_gpu is False:
        return to_numpy(array, name)
    _dispatch.on_gpu()
    return _device.view(array)


def to_numpy(array: Any, name: str) -> Array:
    """`array` as a NumPy array, without a copy where it has the memory of one."""
    if type(array) is np.ndarray:
        return array
    if isinstance(array, np.ndarray) and isinstance(array, np.ma.MaskedArray):  # NumPy imports `ma` where it is named
        raise TypeError(f"{name} is a masked array, whose mask would be lost: pass where=~mask instead")
    if is_torch_array(array):
        if array.device.type != "cpu":
            raise TypeError(f"{name} is on device {array.device}; only arrays in main memory are supported")
        array = array.detach()
        if str(array.dtype) == "torch.bfloat16":
            import torch

            return np.asarray(array.view(torch.int16).numpy()).view(ml_dtypes.bfloat16)
    elif not isinstance(array, np.ndarray) and hasattr(array, "__cuda_array_interface__"):
        raise TypeError(f"{name} is on a GPU; only arrays in main memory are supported")
    return np.asarray(array)


def to_host(array: Array) -> Array:
    """An array whose numbers can be read."""
    if isinstance(array, DeviceArray):
        copy: Array = _dispatch.on_gpu().to_host(array)
        return copy
    return array


def allocate(like: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[Any, Array]:
    """A new array of the library of `like`, and the same memory as a NumPy array."""
    if _device.is_on_gpu(like):
        answer, memory = _dispatch.on_gpu().allocate(like, shape, dtype)
        return answer, memory
    if is_torch_array(like):
        import torch

        name = "bfloat16" if dtype == ml_dtypes.bfloat16 else dtype.name
        tensor = torch.empty(shape, dtype=getattr(torch, name))
        return tensor, to_numpy(tensor, "out")
    array = np.empty(shape, dtype)
    return array, array


# ---- checks; each error names the argument, the value and the place ----


def check_floats(array: Array, name: str) -> np.dtype[Any]:
    """The dtype that results have: the array's own; float64 for integers and booleans."""
    native = array.dtype.newbyteorder("=")
    if native in _FLOATS:
        return native
    if native.kind in "iub":
        return np.dtype(np.float64)
    raise TypeError(f"{name} must hold real numbers, not {array.dtype}")


def row_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype of one number per row: a loss in half precision would be good for two digits."""
    return np.dtype(np.float32) if dtype in _HALVES else dtype


def check_axis(axis: Axis, ndim: int) -> tuple[int, ...]:
    """The class axes, as NumPy's reductions understand `axis`: one, several or (None) all."""
    if axis is None:
        return tuple(range(ndim))
    axes = axis if isinstance(axis, tuple) else (axis,)
    return normalize_axis_tuple([_axis_number(one) for one in axes], ndim, "axis")


def check_single_axis(axis: SupportsIndex, ndim: int) -> int:
    try:
        number = _axis_number(axis)
    except TypeError:
        raise TypeError(f"axis must be an int, not {axis!r}") from None
    return normalize_axis_index(number, ndim, "axis")


def _axis_number(axis: SupportsIndex) -> int:
    """An axis as an int. NumPy has an OverflowError for one beyond C's int, whose bounds are out of bounds, too."""
    return max(-(2**31), min(operator.index(axis), 2**31 - 1))


def check_real(value: Any, name: str, dtype: np.dtype[Any], bounds: str = "finite") -> float:
    """A number that is "finite", "positive and finite" or "in [0, 1]", rounded to a dtype."""
    if isinstance(value, bool) or not isinstance(value, float | int | np.floating | np.integer):
        raise TypeError(f"{name} must be a real number, not {value!r}")
    if value == 0 or value == 1:  # as most are: the other way takes a microsecond
        rounded = float(value)
    else:
        try:
            rounded = float(dtype.type(value))
        except OverflowError:  # an int beyond every float
            rounded = math.inf
    allowed = bounds == "finite" or (rounded > 0 if bounds == "positive and finite" else 0 <= value <= 1)
    if not (math.isfinite(rounded) and allowed):
        raise ValueError(f"{name} must be {bounds} in {dtype}, not {value!r}")
    return rounded


def check_temperature(temperature: Any, dtype: np.dtype[Any]) -> float:
    return check_real(temperature, "temperature", row_dtype(dtype), "positive and finite")


def check_where(where: Any, shape: tuple[int, ...], on_gpu: bool = False) -> Array | None:
    if where is None:
        return None
    mask = to_array(where, "where", on_gpu)
    if mask.dtype != np.bool_:
        raise TypeError(f"where must be boolean, not {mask.dtype}")
    try:
        return np.broadcast_to(mask, shape, subok=True)
    except ValueError:
        raise ValueError(f"where of shape {mask.shape} does not broadcast to the logits' {shape}") from None


def check_integers(labels: Any, name: str, on_gpu: bool = False) -> Array:
    array = to_array(labels, name, on_gpu)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} must be integers, not {array.dtype}")
    return array


def check_out(out: Any, shape: tuple[int, ...], dtype: np.dtype[Any], name: str = "out", on_gpu: bool = False) -> Array:
    if not isinstance(out, np.ndarray) and not is_torch_array(out) and not _device.is_on_gpu(out):
        raise TypeError(f"{name} must be an array, not {type(out).__name__}")
    array = to_array(out, name, on_gpu)
    if array.dtype != dtype:
        raise TypeError(f"{name} must have dtype {dtype}, not {array.dtype}")
    if array.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, not {array.shape}")
    if not array.flags.writeable:
        raise ValueError(f"{name} is read-only")
    return array


def raise_bad_label(labels: Array, name: str, classes: int, start: Sequence[int] | int = 0) -> NoReturn:
    """The ValueError for the first of `labels`, as the user gave them, that is outside [0, classes).

    They may be a part of what the user gave, from the index `start` on.
    """
    labels = to_host(labels)
    bad = np.argwhere((labels < 0) | (labels >= classes))
    if not len(bad):
        raise ValueError(f"a {name} changed while it was read")
    index = tuple(int(i) for i in bad[0] + start)
    place = f" at index {index}" if index else ""
    raise ValueError(f"{name} {labels[tuple(bad[0])]}{place} is outside [0, {classes})")


# ---- rows ----


def _as_full(array: Array, axes: tuple[int, ...]) -> Array:
    """A view of shape (outer, classes, inner); ValueError where there is none."""
    if len(axes) != 1:
        array = np.moveaxis(array, axes, range(array.ndim - len(axes), array.ndim))
    shape = array.shape
    first = axes[0] if len(axes) == 1 else array.ndim - len(axes)
    last = first + len(axes)
    return array.reshape(math.prod(shape[:first]), math.prod(shape[first:last]), math.prod(shape[last:]), copy=False)


def pieces(rows: Sequence[int], most: int) -> Iterator[tuple[slice | int, ...]]:
    """Indices that cut rows of this shape into pieces of consecutive ones, `most` of them (one where that is 0)."""
    if not rows:
        yield ()
        return
    below = math.prod(rows[1:])
    if below <= most:
        step = max(1, most // max(below, 1))
        yield from ((slice(start, start + step),) for start in range(0, rows[0], step))
        return
    for index in range(rows[0]):
        yield from ((index, *rest) for rest in pieces(rows[1:], most))


class Operands(NamedTuple):
    """The arrays of one call. inputs[0] are the logits; others may be None where an option is not used.

    `inputs` and `outputs` have the class axis, or K elements in its place; the per-row ones lack it and are C-contiguous.
    """

    inputs: Sequence[Array | None]
    row_inputs: Sequence[Array | None] = ()
    outputs: Sequence[Array] = ()
    row_outputs: Sequence[Array] = ()

    def call(self, kernel: Kernel) -> Any:
        """Call ``kernel(*inputs, *row_inputs, *outputs, *row_outputs)``."""
        return kernel(*self.inputs, *self.row_inputs, *self.outputs, *self.row_outputs)

    def parts(self) -> Iterator["Operands"]:
        """The rows of views, at most CALL_SIZE elements at a time."""
        logits = self.inputs[0]
        assert logits is not None
        if logits.size <= CALL_SIZE:
            yield self
            return
        outer, classes, inner = logits.shape
        for first, *rest in pieces((outer, inner), max(1, CALL_SIZE // classes)):
            i = first if isinstance(first, slice) else slice(first, first + 1)
            j = rest[0] if rest else slice(None)
            yield Operands(
                [None if array is None else array[i, :, j] for array in self.inputs],
                [None if array is None else array[i, j] for array in self.row_inputs],
                [array[i, :, j] for array in self.outputs],
                [array[i, j] for array in self.row_outputs],
            )


def run(
    kernel: Kernel,
    module: ModuleType,
    axes: tuple[int, ...],
    operands: Operands,
    complain: Callable[[], None] | None = None,
) -> None:
    """Run a kernel of a backend module on all rows, and `complain` where it met a bad label."""
    whole = _as_whole(operands, module.DTYPES, axes)
    if isinstance(operands.inputs[0], DeviceArray):
        _run_on_gpu(kernel, whole, operands.inputs[0], module.DTYPES, complain)
        return
    if whole is not None:
        good = all(part.call(kernel) in (None, -1) for part in whole.parts())
    else:
        good = all(_run_piece(kernel, *piece) for piece in _as_pieces(operands, module.DTYPES, axes))
    if not good and complain is not None:
        complain()


def _run_on_gpu(
    kernel: Kernel,
    whole: Operands | None,
    logits: Array,
    dtypes: frozenset[np.dtype[Any]],
    complain: Callable[[], None] | None,
) -> None:
    """In one call, without copies."""
    if logits.dtype not in dtypes:
        raise TypeError(
            f"logits on a GPU must be of one of the dtypes {', '.join(sorted(map(str, dtypes)))}, not {logits.dtype}"
        )
    if whole is None:
        raise ValueError("arrays on a GPU are not copied: all must have the logits' dtype, and strides that have rows")
    status = whole.call(kernel)
    if status is not None and complain is not None:
        _device.settle(status, complain)


def _as_whole(operands: Operands, dtypes: frozenset[np.dtype[Any]], axes: tuple[int, ...]) -> Operands | None:
    """The operands as views for one call, or None where a backend can't take this memory as it is."""
    logits = operands.inputs[0]
    assert logits is not None
    dtype = logits.dtype
    if dtype not in dtypes:
        return None
    for array in (*operands.inputs, *operands.outputs):
        if array is not None and not (
            array.flags.aligned and (array.dtype == dtype or (array.dtype.kind in "bi" and array.dtype.isnative))
        ):
            return None
    lead = logits.ndim - len(axes)
    try:
        inputs = [None if array is None else _as_full(array, axes) for array in operands.inputs]
        outer, _, inner = inputs[0].shape  # type: ignore[union-attr]
        return Operands(
            inputs,
            [None if array is None else array.reshape(outer, inner, copy=False) for array in operands.row_inputs],
            [_as_full(array, axes) for array in operands.outputs],
            [array.reshape(outer, inner, *array.shape[lead:], copy=False) for array in operands.row_outputs],
        )
    except ValueError:
        return None


def _as_pieces(
    operands: Operands, dtypes: frozenset[np.dtype[Any]], axes: tuple[int, ...]
) -> Iterator[tuple[Operands, list[Array]]]:
    """Copies of consecutive rows as (rows, classes, 1), all in the same memory, and where their outputs belong."""
    logits = operands.inputs[0]
    assert logits is not None
    lead = logits.ndim - len(axes)
    work = row_dtype(logits.dtype.newbyteorder("="))
    if work not in dtypes:
        work = np.dtype(np.float64)

    def last(array: Array) -> Array:
        return np.moveaxis(array, axes, range(lead, array.ndim))

    def width(array: Array) -> int:
        return math.prod(array.shape[axis] for axis in axes)

    shape = last(logits).shape[:lead]
    most = min(math.prod(shape), max(1, PIECE_BYTES // (width(logits) * work.itemsize)))

    def room(array: Array) -> Array:
        dtype = array.dtype if array is not logits and array.dtype.kind in "bi" else work
        return np.empty((most, width(array), 1), dtype)

    inputs = [None if array is None else (array, room(array)) for array in operands.inputs]
    outputs = [(array, room(array)) for array in operands.outputs]
    stop = 0
    for index in pieces(shape, most):
        start, stop = stop, stop + last(logits)[index].size // width(logits)
        rows = slice(stop - start)

        def copy(array: Array, room: Array, index: Any = (*index, ...), rows: slice = rows) -> Array:
            part = last(array)[index]  # never a scalar
            room[rows].reshape(part.shape)[...] = part
            return room[rows]

        def per_row(array: Array, rows: slice = slice(start, stop)) -> Array:
            return array.reshape(-1, 1, *array.shape[lead:])[rows]

        piece = Operands(
            [None if pair is None else copy(*pair) for pair in inputs],
            [None if array is None else per_row(array) for array in operands.row_inputs],
            [room[rows] for _, room in outputs],
            [per_row(array) for array in operands.row_outputs],
        )
        yield piece, [last(array)[(*index, ...)] for array, _ in outputs]


def _run_piece(kernel: Kernel, piece: Operands, targets: list[Array]) -> bool:
    good = piece.call(kernel) in (None, -1)
    if good:
        for target, result in zip(targets, piece.outputs, strict=True):
            target[...] = result.reshape(target.shape)
    return good


# ---- whole calls ----


def run_contiguous(
    operation: str,
    logits: Any,
    other: Any = None,
    axis: Any = -1,
    where: Any = None,
    temperature: Any = 1.0,
    out: Any = None,
    losses: Array | None = None,
    scale: tuple[float, float] = (1.0, 0.0),
) -> Any:
    """The common case of an operation, straight into a compiled backend; None where it isn't the common case.

    That is C-contiguous arrays of one dtype (float32, float64 or half precision), class axis last, no options, and int64
    labels. What may be wrong with anything else, the general way says. `other` is the operation's second operand, where it has
    one. An operation with two outputs has gradients, by `scale`, in the one that is given or made here, and `losses` where the
    caller wants them.
    """
    if where is not None or type(axis) is not int or type(temperature) is not float:
        return None
    if axis != -1 or temperature != 1.0 or type(logits) is not np.ndarray:
        return None
    dtype = logits.dtype
    number = dtype  # of one number a row
    if dtype is _FLOAT16 or dtype is _BFLOAT16:
        number = _FLOAT32
    elif dtype is not _FLOAT32 and dtype is not _FLOAT64:
        return None
    # `carray`: C-contiguous, aligned, in native byte order (as these dtypes are) and writeable, in one look-up.
    if not logits.flags.carray:
        return None
    shape, size = logits.shape, logits.size
    if not (shape and 0 < size <= CALL_SIZE):
        return None
    result_shape, result_dtype = (shape[:-1], number) if operation in _PER_ROW else (shape, dtype)
    name = _OTHERS.get(operation)
    if name is not None:
        wanted, likewise = (_INT64, shape[:-1]) if name == "labels" else (dtype, shape)
        if not (type(other) is np.ndarray and other.dtype is wanted and other.flags.carray and other.shape == likewise):
            return None
    if out is not None and not (
        type(out) is np.ndarray
        and out.dtype is result_dtype
        and out.flags.carray
        and out.shape == result_shape
        and (out is logits or not clashes(out, logits))
        and (out is other or not clashes(out, other))
    ):
        return None
    module, threads = _dispatch.select(operation, dtype, size, shape[-1])
    if module.__name__ == _dispatch.REFERENCE_MODULE:
        return None
    result = np.empty(result_shape, result_dtype) if out is None else out
    if module.__name__ == _dispatch.C_MODULE:
        labels = other if name == "labels" else None
        probabilities = other if name == "probabilities" else None
        target, grad = (result, other if name == "grad" else None) if losses is None else (losses, result)
        code = module.OPERATIONS[operation]  # by position: a dict of names took a sixth of a microsecond
        status = module.run_contiguous(
            code, dtype, logits, size, shape[-1], threads, target, labels, probabilities, grad, 1.0, scale
        )
    elif is_standard():
        status = _run_rows(module, operation, logits, other, result, losses, scale, threads)
    else:
        return None
    if status != -1 and name == "labels":
        raise_bad_label(other, "label" if operation == "sparse_softmax_cross_entropy_with_logits" else "target", shape[-1])
    return result if result_shape or out is not None else result[()]


def _run_rows(
    module: ModuleType,
    operation: str,
    logits: Array,
    other: Array | None,
    result: Array,
    losses: Array | None,
    scale: tuple[float, float],
    threads: int,
) -> Any:
    """What `run_contiguous` does, by a backend that takes rows."""
    classes = logits.shape[-1]
    full, per_row = (logits.size // classes, classes, 1), (logits.size // classes, 1)
    rows = logits.reshape(full)
    target = result.reshape(per_row if operation in _PER_ROW else full)
    if operation == "cross_entropy_value_and_grad":
        assert other is not None and losses is not None
        labels, losses = other.reshape(per_row), losses.reshape(per_row)
        return module.cross_entropy(rows, None, None, labels, None, None, target, losses, LossOptions(scale=scale), threads)
    if operation == "cross_entropy":
        operation = "sparse_softmax_cross_entropy_with_logits"
    kernel = getattr(module, operation)
    if other is None:
        return kernel(rows, None, 1.0, target, threads)
    return kernel(rows, other.reshape(per_row if _OTHERS[operation] == "labels" else full), target, threads)


def backend(operation: str, array: Array, dtype: np.dtype[Any], axes: tuple[int, ...]) -> tuple[ModuleType, int]:
    """The backend module and the number of threads for an array that is not empty, as logits of this dtype."""
    if isinstance(array, DeviceArray):
        return _dispatch.on_gpu(), 1
    return _dispatch.select(operation, dtype, array.size, math.prod(array.shape[axis] for axis in axes))


def empty(like: Any, shape: tuple[int, ...], dtype: np.dtype[Any], out: Any = None) -> Array:
    """Room for results that `deliver` gives to the user: on a GPU already what the user gets."""
    if not _device.is_on_gpu(like):
        return np.empty(shape, dtype)
    return allocate(like, shape, dtype)[1] if out is None else _device.view(out)


def as_labels(labels: Array) -> Array:
    """Integers as kernels take them."""
    return labels if isinstance(labels, DeviceArray) else np.asarray(labels, np.int64, order="C")


def same_memory(a: Array, b: Array) -> bool:
    """Whether two arrays are the same elements at the same places."""
    return (
        a.__array_interface__["data"] == b.__array_interface__["data"]
        and a.strides == b.strides
        and a.shape == b.shape
        and a.dtype == b.dtype
    )


def clashes(target: Array, given: Array | None) -> bool:
    """Whether writing an output may spoil an input before it is read: they overlap, and not element by element."""
    return given is not None and bool(np.may_share_memory(target, given)) and not same_memory(target, given)


def apart(target: Array, name: str, *inputs: Array | None) -> Array:
    """An output, or room for it where it overlaps with an input."""
    if not any(clashes(target, given) for given in inputs):
        return target
    if isinstance(target, DeviceArray):
        raise ValueError(f"{name} overlaps with an input without being the same: on a GPU it can't")
    return np.empty_like(target)


def run_full(
    operation: str, like: Any, array: Array, other: Array | None, axis: Axis, out: Any, options: tuple[Any, ...] = ()
) -> Any:
    """An operation with an output as large as the logits: ``kernel(array, other, *options, out, threads)``.

    `other` has the shape of `array`; the result is in `out`, or in an array of the library of `like`.
    """
    dtype = check_floats(array, "logits")
    axes = check_axis(axis, array.ndim)
    if out is None:
        answer, target = allocate(like, array.shape, dtype)
    else:
        answer, target = out, check_out(out, array.shape, dtype, on_gpu=_device.is_on_gpu(array))
    if not array.size:
        return answer
    result = apart(target, "out", array, other)
    module, threads = backend(operation, array, dtype, axes)
    kernel = getattr(module, operation)
    run(
        lambda array, other, out: kernel(array, other, *options, out, threads),
        module,
        axes,
        Operands([array, other], outputs=[result]),
    )
    if result is not target:
        target[...] = result
    return answer if out is not None or answer.ndim or isinstance(target, DeviceArray) else answer[()]


def deliver(like: Any, result: Array, out: Any) -> Any:
    """A computed array as the user wants it: in `out`, or in an array of the library of `like`; a scalar if it is 0-d."""
    if isinstance(result, DeviceArray):
        return result.owner if out is None else out
    if out is not None:
        check_out(out, result.shape, result.dtype)[...] = result
        return out
    if is_torch_array(like):
        tensor, target = allocate(like, result.shape, result.dtype)
        target[...] = result
        return tensor
    return result if result.ndim else result[()]
