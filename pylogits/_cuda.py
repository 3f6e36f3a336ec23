"""The CUDA backend as a backend module: arrays on a GPU into kernels, on the current stream of the arrays' library.

It has the functions of `_reference`, of which none waits for the GPU. Where labels or weights are checked they return a
`Status`, which has what the kernels found.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import array_api_compat
import ml_dtypes
import numpy as np
from numba import cuda
from numpy.lib.array_utils import byte_bounds

from pylogits import _device, _launch
from pylogits._device import DeviceArray
from pylogits._reference import LossOptions, Scores, reciprocal
from pylogits.kernels import cuda as kernels

DTYPES = frozenset(map(np.dtype, (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)))

# Of shared memory for the rows of a block: five blocks fit into a multiprocessor of an H100, which has 228 KiB.
TILE_BYTES = 40960
CLASSES_PER_LANE = 32  # what is done for a row as a whole is done by every lane
FEWEST_LANES = 4  # of a row that has more classes than that
STRIDED_LANES = 8  # of a strided row: 32 rows side by side are whole sectors of memory
CHECKED = 256  # labels a block
VECTOR_BYTES: int = kernels.VECTOR_BYTES


def is_available() -> bool:
    return bool(cuda.is_available())


# ---- arrays, streams, devices ----


def allocate(like: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[Any, DeviceArray]:
    """A new array of the library of `like`, on its GPU, and its memory."""
    if hasattr(like, "__cuda_ndarray__"):  # Numba's own
        made = cuda.device_array(shape, dtype, stream=like.stream)
    else:
        namespace = array_api_compat.array_namespace(like)
        made = namespace.empty(shape, dtype=getattr(namespace, dtype.name), device=array_api_compat.device(like))
    return made, _device.view(made)


def to_host(array: DeviceArray) -> Any:
    """A copy in main memory, as soon as the GPU is done with it."""
    first, end = byte_bounds(array)
    with _launch.on_device(_device.number_of(array.owner)):
        copied = _launch.copy_to_host(first, end - first, _device.stream_of(array.owner))
    return np.ndarray(array.shape, array.dtype, copied, array.__array_interface__["data"][0] - first, array.strides)


def _call(kernel: Any, owner: Any, grid: int, block: tuple[int, int], shared: int, *arguments: Any) -> None:
    if grid > 0:  # CUDA refuses none
        with _launch.on_device(_device.number_of(owner)):
            _launch.launch(kernel, _device.stream_of(owner), grid, block, shared, arguments)


class Status:
    """Two words on the GPU: whether labels or weights are bad, and whether no row counts in a mean."""

    def __init__(self, owner: Any) -> None:
        self.when_empty: Callable[[], None] | None = None
        _, self.words = allocate(owner, (2,), np.dtype(np.int32))
        _call(kernels.clear, owner, 1, (1, 1), 0, self.words)

    def read(self) -> Any:
        return to_host(self.words)

    def check_labels(self, labels: Any, classes: int, ignore_index: int | None, where: DeviceArray | None) -> None:
        """`labels` of shape (outer, K, inner)."""
        grid = -(-labels.size // CHECKED)
        _call(kernels.check_labels, labels.owner, grid, (CHECKED, 1), 0, labels, classes, ignore_index, where, self.words)

    def check_finite(self, numbers: DeviceArray) -> None:
        """`numbers` of shape (outer, inner)."""
        grid = -(-numbers.size // CHECKED)
        _call(kernels.check_finite, numbers.owner, grid, (CHECKED, 1), 0, numbers, self.words)


# ---- rows ----


def _offset(array: DeviceArray | None) -> int:
    """By how many elements an array begins behind a multiple of 16 bytes, or -1 where classes are not side by side."""
    if array is None or array.strides[1] != array.itemsize:
        return -1
    return int(array.__array_interface__["data"][0]) % VECTOR_BYTES // array.itemsize


def _pitch(row_bytes: int, lanes: int, itemsize: int) -> int:
    """Bytes from one tile to the next in shared memory, so that the lanes of a warp read different banks: there are 32 of four
    bytes, or 8 of sixteen. A row begins behind as many bytes as it does in memory."""
    units = -(-row_bytes // VECTOR_BYTES) + 1
    if lanes < kernels.WARP:
        units += (max(1, lanes * itemsize // VECTOR_BYTES) - units) % 8
    return units * VECTOR_BYTES


def _call_rows(
    operation: str, logits: DeviceArray, other: DeviceArray | None, out: DeviceArray | None, *arguments: Any
) -> None:
    """Call a kernel on all rows. How many lanes and which tile a row gets depends on the rows' length and dtype, and on whether
    they are strided."""
    outer, classes, inner = logits.shape
    given = [array for array in (logits, other, out) if array is not None]
    strided = inner > 1 and logits.strides[2] < logits.strides[1]
    lanes = STRIDED_LANES if strided else 1
    while not strided and lanes < kernels.THREADS and lanes * CLASSES_PER_LANE < classes:
        lanes = max(FEWEST_LANES, 2 * lanes)
    size, operands, per = logits.itemsize, 1 if other is None else 2, VECTOR_BYTES // logits.itemsize
    # As one piece the lanes of a warp, each with a row, would read the same few banks where rows are of 32 bytes or a multiple.
    together = lanes == 1 and inner == 1 and classes % (2 * per) > 0 and all(array.flags.c_contiguous for array in given)
    most, rows = TILE_BYTES // operands // size, kernels.THREADS // lanes
    if strided:
        tile = max(1, min(classes, most // rows - 1))
        pitch = tile + 1  # rows side by side are in different banks
    else:
        whole = max(1, kernels.WARP // lanes)
        tile = max(1, min(classes, (most - 2 * per) // per * per))
        pitch = tile if together else _pitch(tile * size, lanes, size) // size
        rows = max(1, min(rows, (most - per) // pitch) // whole) * whole  # in whole warps
    room = -(-(rows * pitch) // per) * per + per
    last = (classes - 1) // tile * tile
    offsets = [-1 if strided else _offset(array) for array in (logits, other, out)]
    plan = kernels.Plan(tile, pitch, room, last, strided, together, *offsets)
    kernel = getattr(kernels.kernels_of(logits.dtype.name), operation)
    block = (rows, lanes) if strided else (lanes, rows)
    _call(kernel, logits.owner, -(-outer * inner // rows), block, room * operands * size, plan, *arguments)


def _real(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def _numbers(dtype: np.dtype[Any], *numbers: float) -> tuple[Any, ...]:
    """As the kernels of a dtype compute with them."""
    return tuple(map(_real(dtype).type, numbers))


def _inverse(temperature: float, dtype: np.dtype[Any]) -> tuple[Any, ...] | None:
    """1 / temperature as a pair; None for 1, as nothing is to be done then."""
    return None if temperature == 1 else _numbers(dtype, *reciprocal(1.0, temperature, _real(dtype)))


def softmax(logits: DeviceArray, where: DeviceArray | None, temperature: float, out: DeviceArray, threads: int) -> None:
    _call_rows("softmax", logits, None, out, logits, where, _inverse(temperature, logits.dtype), None, out, None)


def log_softmax(logits: DeviceArray, where: DeviceArray | None, temperature: float, out: DeviceArray, threads: int) -> None:
    _call_rows("softmax", logits, None, out, logits, where, _inverse(temperature, logits.dtype), True, out, None)


def logsumexp(logits: DeviceArray, where: DeviceArray | None, temperature: float, out: DeviceArray, threads: int) -> None:
    _call_rows("softmax", logits, None, None, logits, where, _inverse(temperature, logits.dtype), None, None, out)


def selective_log_softmax(
    logits: DeviceArray, indices: DeviceArray, temperature: float, out: DeviceArray, threads: int
) -> Status:
    status = Status(logits.owner)
    status.check_labels(indices, logits.shape[1], None, None)
    inverse = _inverse(temperature, logits.dtype)
    _call_rows("selective_log_softmax", logits, None, None, logits, indices, inverse, status.words, out)
    return status


def softmax_backward(probs: DeviceArray, grad: DeviceArray, out: DeviceArray, threads: int) -> None:
    _call_rows("backward", probs, grad, out, probs, grad, None, out)


def log_softmax_backward(log_probs: DeviceArray, grad: DeviceArray, out: DeviceArray, threads: int) -> None:
    _call_rows("backward", log_probs, grad, out, log_probs, grad, True, out)


def score(logits: DeviceArray, targets: DeviceArray | None, temperature: float, scores: Scores, threads: int) -> Status:
    status = Status(logits.owner)
    if targets is not None:
        status.check_labels(targets[:, None], logits.shape[1], None, None)
    inverse = _inverse(temperature, logits.dtype)
    _call_rows("score", logits, None, None, logits, targets, inverse, status.words, scores)
    return status


# ---- losses ----


class Reduction(NamedTuple):
    """What becomes of the losses of rows."""

    result: DeviceArray | None = None  # of one element; None for no reduction
    denominator: float | None = 1.0  # None: made from the weights of the rows
    weighted: bool = True  # whether class weights and the size of sample weights count in it
    mean: bool = False  # whether it is NaN where nothing counts


def softmax_cross_entropy_with_logits(logits: DeviceArray, labels: DeviceArray, out: DeviceArray, threads: int) -> None:
    cross_entropy(logits, None, labels, None, None, None, None, out, LossOptions(), Reduction())


def sparse_softmax_cross_entropy_with_logits(
    logits: DeviceArray, labels: DeviceArray, out: DeviceArray, threads: int
) -> Status | None:
    return cross_entropy(logits, None, None, labels, None, None, None, out, LossOptions(), Reduction())


def cross_entropy(
    logits: DeviceArray,
    where: DeviceArray | None,
    probabilities: DeviceArray | None,
    labels: DeviceArray | None,
    sample_weight: DeviceArray | None,
    loss_grad: DeviceArray | None,
    grad: DeviceArray | None,
    losses: DeviceArray,
    options: LossOptions,
    reduction: Reduction,
) -> Status | None:
    """As in `_reference`, and the reduction. The status is None where there was nothing to check."""
    dtype, owner = logits.dtype, logits.owner
    weight: Any = options.weight
    status = Status(owner)
    if labels is not None:
        status.check_labels(labels[:, None], logits.shape[1], options.ignore_index, where)
    for numbers in (sample_weight, None if weight is None else weight[:, None]):
        if numbers is not None:
            status.check_finite(numbers)
    denominator, inverse = None, None
    if reduction.denominator is None:
        _, denominator = allocate(owner, (1,), np.dtype(np.float64))
        _, inverse = allocate(owner, (2,), _real(dtype))
        row_weights = labels, options.ignore_index, sample_weight, weight if reduction.weighted else None, reduction.weighted
        partial = _sum_rows(kernels.sum_weights, losses, *losses.shape, *row_weights)
        _call(kernels.invert_total, owner, 1, (kernels.THREADS, 1), 0, partial, denominator, inverse, status.words)
    numbers = kernels.LossNumbers(*_numbers(dtype, options.z_loss, *options.scale))
    smoothing = _numbers(dtype, options.label_smoothing)[0] if options.label_smoothing else None
    of_classes = where, probabilities, labels, options.ignore_index, weight, smoothing
    given = kernels.LossOptions(*of_classes, sample_weight, loss_grad, inverse, _cap(options, dtype))
    cooling = _inverse(1.0 if options.softcap else options.temperature, dtype)
    _call_rows("cross_entropy", logits, probabilities, grad, numbers, logits, given, cooling, status.words, losses, grad)
    if reduction.result is not None:
        partial = _sum_rows(kernels.sum_losses, losses, losses)
        closing = partial, reduction.denominator or 0.0, denominator, reduction.mean, reduction.result, status.words
        _call(kernels.reduce_total, owner, 1, (kernels.THREADS, 1), 0, *closing)
    checked = labels is not None or sample_weight is not None or weight is not None
    return status if checked else None


def _sum_rows(kernel: Any, losses: DeviceArray, *arguments: Any) -> DeviceArray:
    """One sum of each kernels.ROWS rows."""
    grid = -(-losses.size // kernels.ROWS)
    _, partial = allocate(losses.owner, (grid,), np.dtype(np.float64))
    _call(kernel, losses.owner, grid, (kernels.THREADS, 1), 0, *arguments, partial)
    return partial


def _cap(options: LossOptions, dtype: np.dtype[Any]) -> Any:
    """2 / (temperature softcap) as a pair, and the least x that is told apart: tanh(-20) is -1."""
    if options.softcap is None:
        return None
    real = _real(dtype)
    inverse, inverse_lo = reciprocal(options.temperature, options.softcap / 2, real)
    lowest = -min(40 / inverse, float(np.finfo(real).max))
    return kernels.Cap(*_numbers(dtype, options.softcap / 2, inverse, inverse_lo, lowest))
