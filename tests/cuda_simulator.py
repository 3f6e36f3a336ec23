"""What Numba's CUDA simulator lacks and the kernels need: imported where NUMBA_ENABLE_CUDASIM=1, before they are."""

import ctypes
import ctypes.util
import sys
import threading
from contextlib import nullcontext

import ml_dtypes
import numpy as np
from numba import cuda
from numba.cuda.simulator.cudadrv.devicearray import FakeCUDAArray
from numba.cuda.simulator.kernelapi import FakeCUDAModule, FakeCUDAShared
from pylogits.kernels import cuda as kernels

from pylogits import _launch
from pylogits._device import DeviceArray

_libm = ctypes.CDLL(ctypes.util.find_library("m"))
_FMA = {np.float32: (_libm.fmaf, ctypes.c_float), np.float64: (_libm.fma, ctypes.c_double)}
for _function, _number in _FMA.values():
    _function.argtypes, _function.restype = [_number] * 3, _number


def fma(self, a, b, c):
    """a * b + c, rounded once: the simulator's is rounded twice."""
    kind = type(a)
    return kind(_FMA[kind][0](a, b, c))


_dynamic_array = FakeCUDAShared.array


def shared_array(self, shape, dtype, alignment=None):
    """One array for all threads: of the simulator's, two that come at once may get one each."""
    if shape == 0:
        return _dynamic_array(self, shape, dtype)
    caller = sys._getframe(1)
    return self._allocations.setdefault((caller.f_code, caller.f_lineno), np.empty(shape, str(dtype)))


def mul(a, b):
    return a * b


def scale_of(shifted):
    bits, mantissa = (np.uint32, 23) if shifted.dtype == np.float32 else (np.uint64, 52)
    return (shifted.view(bits) << bits(mantissa)).view(shifted.dtype)


def power_of(x):
    fraction, power = np.frexp(x)  # in [1/2, 1)
    return type(x)(power - (fraction < np.sqrt(0.5)))


def number(like, integer):
    return type(like)(integer)


def from_here(array, at, count):
    """So many elements from an index on, side by side in memory: at the end of a row the next one begins."""
    item = vars(array).get("_item", array) if hasattr(array, "__dict__") else array
    numbers = getattr(item, "_ary", item)
    first, step = at, numbers.strides[0]
    if isinstance(at, tuple):
        outer, first, inner = at
        numbers, step = numbers[int(outer) :, :, int(inner) :], numbers.strides[1]
    return np.lib.stride_tricks.as_strided(numbers, (int(first) + count,), (step,))[int(first) :]


def copy_vector(target, target_at, source, source_at, v):
    """16 bytes, element by element."""
    per = 16 // target.dtype.itemsize
    to, of = (from_here(array, at, (int(v) + 1) * per) for array, at in ((target, target_at), (source, source_at)))
    for part, at in ((to, target_at), (of, source_at)):  # a tile begins at a multiple of 16 bytes
        place = part.ctypes.data if isinstance(at, tuple) else int(at) * part.itemsize
        assert place % 16 == 0, "a vector is not aligned"
    to[-per:] = of[-per:]


def move_element(into_tile, tile, at, x, x_at):
    target, source = (tile, at), (x, x_at)
    if not into_tile:
        target, source = source, target
    from_here(*target, 1)[0] = from_here(*source, 1)[0]


_exchanged = {}


def exchange(value, step):
    """What the thread of a warp has whose number differs by a bit; all threads of a block come here together."""
    thread = threading.current_thread()
    _exchanged[thread.thread_id] = value
    thread.syncthreads()
    other = _exchanged[thread.thread_id ^ int(step)]
    thread.syncthreads()
    return other


def wait(row):
    threading.current_thread().syncthreads()


def interface_of(array):
    return {**array._ary.__array_interface__, "version": 3}


def argument(value):
    """As a simulated kernel takes it."""
    if isinstance(value, DeviceArray):
        value = value.view(np.uint16) if value.dtype == ml_dtypes.bfloat16 else value
        return FakeCUDAArray(np.asarray(value).view(np.ndarray))
    return value._make(map(argument, value)) if hasattr(value, "_make") else value


def launch(kernel, stream, grid, block, shared, arguments):
    kernel[grid, block, 0, shared](*map(argument, arguments))


def copy_to_host(address, count, stream):
    return np.frombuffer(ctypes.string_at(address, count), np.uint8)


def on_device(number):
    return nullcontext()


def install():
    FakeCUDAModule.fma, FakeCUDAShared.array = fma, shared_array
    FakeCUDAArray.__cuda_array_interface__ = property(interface_of)
    for twin in (launch, copy_to_host, on_device):
        setattr(_launch, twin.__name__, twin)
    cuda.is_available = lambda: True
    for twin in (mul, number, scale_of, power_of, copy_vector, move_element, exchange, wait):
        setattr(kernels, twin.__name__, twin)
    sys.setswitchinterval(1e-5)  # the threads of a block wait for one another all the time
