"""Launches of CUDA kernels: Numba compiles one when it is first called with arguments of some types, cuda.core launches it.

Numba's own launch looks at every argument anew: on the host of an H200 softmax of 32 x 1000 took 0.46 ms so, and the three
kernels of a loss 1.6 ms; it is 0.13 and 0.28 here. A kernel is found by the types of its arguments, and these are passed as
Numba passes them: an array as two null pointers, its size, item size, address, shape and strides; a tuple as its elements.
"""

import ctypes
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import ml_dtypes
import numba
import numpy as np
from cuda.bindings import driver
from cuda.core import LaunchConfig, Stream
from cuda.core import launch as launch_core
from numba import cuda, types

from pylogits._device import DeviceArray

_PASSED_AS = {
    bool: bool,
    int: ctypes.c_int64,
    float: ctypes.c_double,
    np.float32: ctypes.c_float,
    np.float64: ctypes.c_double,
}
_kernels: dict[tuple[Any, ...], Any] = {}


def current_device() -> int:
    """The number of the GPU that this thread uses; -1 where it uses none yet."""
    error, device = driver.cuCtxGetDevice()
    return -1 if error else int(device)


def on_device(number: int | None) -> AbstractContextManager[Any]:
    """A context in which this thread uses a GPU; None is the one that it uses, or the first."""
    current = current_device()
    if current >= 0 and number in (None, current):
        return nullcontext()
    return cuda.gpus[number or 0]  # type: ignore[no-any-return]


def _flatten(value: Any, kinds: list[Any], passed: list[Any]) -> None:
    """Add what stands for the type of an argument, and what is passed for it."""
    if isinstance(value, DeviceArray):
        kinds.append((value.dtype, value.ndim))
        address = value.__array_interface__["data"][0]
        passed += (0, 0, value.size, value.itemsize, address, *value.shape, *value.strides)
    elif isinstance(value, tuple):
        kinds.append((type(value), len(value)))
        for one in value:
            _flatten(one, kinds, passed)
    elif value is None:
        kinds.append(None)
        passed.append(0)
    else:
        kinds.append(type(value))
        passed.append(_PASSED_AS[type(value)](value))


def _type_of(value: Any) -> Any:
    if isinstance(value, DeviceArray):
        dtype = np.dtype(np.uint16) if value.dtype == ml_dtypes.bfloat16 else value.dtype  # Numba has no bfloat16 array
        return types.Array(numba.from_dtype(dtype), value.ndim, "A")
    if isinstance(value, tuple):
        return types.BaseTuple.from_types([_type_of(one) for one in value], type(value) if hasattr(value, "_make") else None)
    return numba.typeof(value)


@lru_cache(maxsize=64)
def _stream(device: int, handle: int) -> Stream:
    return Stream.from_handle(handle)


def launch(kernel: Any, stream: int, grid: int, block: tuple[int, int], shared: int, arguments: tuple[Any, ...]) -> None:
    """Call a kernel on the GPU that this thread uses."""
    kinds: list[Any] = []
    passed: list[Any] = []
    _flatten(arguments, kinds, passed)
    device = current_device()
    key = (kernel, device, *kinds)
    compiled = _kernels.get(key)
    if compiled is None:
        # The one thing that Numba has no public name for: its kernel as cuda.core knows it.
        library = kernel.compile(tuple(map(_type_of, arguments)))._codelibrary
        compiled = _kernels[key] = library.get_cufunc().kernel
    launch_core(_stream(device, stream), LaunchConfig(grid=grid, block=block, shmem_size=shared), compiled, *passed)


def copy_to_host(address: int, count: int, stream: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """So many bytes of the GPU's memory, once all that was launched on the stream is done."""
    copied = np.empty(count, np.uint8)
    for (error,) in (
        driver.cuMemcpyDtoHAsync(copied.ctypes.data, address, count, stream),
        driver.cuStreamSynchronize(stream),
    ):
        if error:
            raise RuntimeError(f"reading {count} bytes from the GPU failed: {error!r}")
    return copied
