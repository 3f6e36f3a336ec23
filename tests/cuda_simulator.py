"""What Numba's CUDA simulator lacks and the kernels need: imported where NUMBA_ENABLE_CUDASIM=1, before they are."""

import ctypes
import ctypes.util
import sys

import numpy as np
from numba import cuda
from numba.cuda.simulator.cudadrv.devicearray import FakeCUDAArray
from numba.cuda.simulator.kernelapi import FakeCUDAModule, FakeCUDAShared
from pylogits.kernels import cuda as kernels

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


def copy_vector(target, target_at, source, source_at):
    """16 bytes, element by element."""

    def along(at, array, step):
        return (at[0], at[1] + step, at[2]) if array.ndim == 3 else at + step

    for step in range(16 // target.dtype.itemsize):
        target[along(target_at, target, step)] = source[along(source_at, source, step)]


def interface_of(array):
    return {**array._ary.__array_interface__, "version": 3}


def as_cuda_array(array, sync):
    return FakeCUDAArray(np.asarray(array).view(np.ndarray))


def install():
    FakeCUDAModule.fma, FakeCUDAShared.array = fma, shared_array
    FakeCUDAArray.__cuda_array_interface__ = property(interface_of)
    cuda.as_cuda_array = as_cuda_array
    cuda.is_available = lambda: True
    kernels.mul, kernels.scale_of, kernels.power_of, kernels.copy_vector = mul, scale_of, power_of, copy_vector
    sys.setswitchinterval(1e-5)  # the threads of a block wait for one another all the time
