"""Arrays on a GPU, as the array boundary sees them: shapes, strides and addresses, but no numbers.

They are NumPy arrays of memory that the CPU can't read, so that axes, views and overlaps are worked out by the code that does
so for arrays in main memory. Numbers are touched by kernels only, and checked by them; what they found is read once, at the
end of a call or of a block of `deferred_checks`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import ml_dtypes
import numpy as np
from array_api_compat import is_torch_array

_deferred: ContextVar[list[tuple[Any, Callable[[], None]]] | None] = ContextVar("pylogits_deferred", default=None)


class _Memory:
    def __init__(self, owner: Any, interface: dict[str, Any]) -> None:
        self.owner = owner
        self.__array_interface__ = interface


class DeviceArray(np.ndarray[Any, Any]):
    """A view of GPU memory. `owner` is the array of the user's library that the memory belongs to."""

    owner: Any = None
    __array_ufunc__ = None  # type: ignore[assignment]  # arithmetic is a TypeError, not a segmentation fault

    __repr__ = __str__ = object.__repr__  # those of NumPy read numbers

    def __array_finalize__(self, parent: Any) -> None:
        self.owner = getattr(parent, "owner", None)

    def astype(self, dtype: Any, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"arrays on a GPU are not converted: pass {dtype}, not {self.dtype}")

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {**self.__array_interface__, "version": 3}


def is_on_gpu(array: Any) -> bool:
    if isinstance(array, np.ndarray):
        return isinstance(array, DeviceArray)
    if is_torch_array(array):
        return bool(array.device.type == "cuda")
    return hasattr(array, "__cuda_array_interface__")


def view(array: Any) -> DeviceArray:
    """The memory of an array on a GPU."""
    if is_torch_array(array):
        array = array.detach()
    interface = array.__cuda_array_interface__
    if interface.get("mask") is not None:
        raise TypeError("arrays with a mask are not supported on a GPU: pass where= instead")
    return memory(array, interface["data"], interface["shape"], interface["typestr"], interface.get("strides"))


def memory(
    owner: Any, data: tuple[int, bool], shape: tuple[int, ...], typestr: str, strides: tuple[int, ...] | None = None
) -> DeviceArray:
    """Some of an array's memory."""
    interface = {"version": 3, "data": data, "shape": shape, "typestr": typestr, "strides": strides}
    found = np.asarray(_Memory(owner, interface)).view(DeviceArray)
    if found.dtype.kind == "V" and found.itemsize == 2:  # bfloat16 has no code of its own there
        found = found.view(ml_dtypes.bfloat16)
    found.owner = owner
    return found


def stream_of(owner: Any) -> int:
    """The current stream of an array's library, as a handle; 0 is the default stream."""
    if is_torch_array(owner):
        import torch

        return int(torch.cuda.current_stream(owner.device).cuda_stream)
    return int(owner.__cuda_array_interface__.get("stream") or 0)


def number_of(owner: Any) -> int | None:
    """The number of the GPU that an array lies on; None for the current one."""
    device = getattr(owner, "device", None)
    found = getattr(device, "index", getattr(device, "id", None))
    return found if isinstance(found, int) else None


def settle(status: Any, complain: Callable[[], None]) -> None:
    """Read what the kernels of a call found, and `complain` if it is bad; or leave that for the end of `deferred_checks`."""
    pending = _deferred.get()
    if pending is not None:
        pending.append((status, complain))
        return
    bad, empty = status.read()
    if bad:
        complain()
    elif empty and status.when_empty is not None:
        status.when_empty()


@contextmanager
def deferred_checks() -> Iterator[None]:
    """Calls on GPU arrays inside a `with` block don't wait for the GPU; what is wrong with their labels is raised at its end.

    Without it, a call that has labels or weights to check waits for its own kernels. A call with bad labels writes nothing:
    until the block has ended, its result may be anything. Calls on arrays in main memory are not affected.

    Raises
    ------
    ValueError
        At the end of the block, what the first of the calls with a bad label would have raised.

    Examples
    --------
    >>> import pylogits
    >>> with pylogits.deferred_checks():
    ...     pylogits.softmax([0.0, 0.0])
    array([0.5, 0.5])
    """
    pending: list[tuple[Any, Callable[[], None]]] = []
    token = _deferred.set(pending)
    try:
        yield
    finally:
        _deferred.reset(token)
    for status, complain in pending:
        settle(status, complain)
