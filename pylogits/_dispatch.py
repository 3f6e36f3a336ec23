"""Which backend and how many threads a call gets, and the switches that force them.

A backend is a module with the functions of `pylogits._reference`, on the same arguments; `DTYPES` names the dtypes it
takes as they are, and `_rows` converts the others piece by piece.
"""

import importlib
import importlib.util
import math
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from pylogits._crossovers import MACHINE, SERIAL_BELOW


class Backend(NamedTuple):
    """A row of the dispatch table."""

    name: str
    module: str
    requires: str  # the package or extension without which it is not there


# In order of preference: the first that is there and is not ruled out by a forced choice runs the call.
TABLE = (
    Backend("c", "pylogits._simd", "pylogits._c"),
    Backend("numba", "pylogits.kernels.cpu", "numba"),
    Backend("reference", "pylogits._reference", "numpy"),
)
# The work of a call is its logits, and for each row what so many logits take: a call of 1000 rows of 3 takes three times as
# long as one of 6 rows of 512. With 8 to 24 a grid of calls was served equally well, with 0 a quarter worse.
ROW_WORK = 16
# Work that no crossover lies below: so small calls need not look it up.
ALWAYS_SERIAL = min(min(sizes.values()) for operations in SERIAL_BELOW.values() for sizes in operations.values())
C_MODULE, REFERENCE_MODULE = TABLE[0].module, TABLE[-1].module
MAX_THREADS = 1024
NAMES = tuple(backend.name for backend in TABLE)
LONGDOUBLE = np.dtype(np.longdouble).char  # no other backend than the reference has it

_forced: ContextVar[str | None] = ContextVar("pylogits_backend", default=None)
_num_threads: int | None = None


def is_available(backend: Backend) -> bool:
    """Whether the backend can be imported, without importing it (numba takes half a second)."""
    return importlib.util.find_spec(backend.requires) is not None


def select(operation: str, dtype: np.dtype[Any], elements: int, classes: int) -> tuple[ModuleType, int]:
    """The backend module and the number of threads for so many logits of this dtype, in rows of so many classes."""
    name = choose_backend(dtype)
    work = elements + ROW_WORK * (elements // classes)
    return load(name), 1 if work < ALWAYS_SERIAL else threads_for(name, operation, dtype, work)


def choose_backend(dtype: np.dtype[Any]) -> str:
    """The backend that was forced, or the first that is there."""
    return "reference" if dtype.char == LONGDOUBLE else _forced.get() or _default


def threads_for(name: str, operation: str, dtype: np.dtype[Any], work: int) -> int:
    """One thread below the work from which, as `make tune` has measured, a second one pays; above, all."""
    if name not in SERIAL_BELOW or work < SERIAL_BELOW[name][operation][dtype.itemsize]:
        return 1
    return get_num_threads()


@cache
def on_gpu() -> ModuleType:
    """The backend module for arrays on a GPU."""
    try:
        module = importlib.import_module("pylogits._cuda")
    except ImportError as error:
        raise ImportError('arrays on a GPU need numba-cuda: pip install "pylogits[cuda]"') from error
    if not module.is_available():
        raise ImportError('arrays on a GPU need an NVIDIA driver beside what pip install "pylogits[cuda]" installs')
    return module


_loaded: dict[str, ModuleType] = {}
_loading = threading.RLock()


def load(name: str) -> ModuleType:
    """The module of a backend."""
    if name not in _loaded:
        with _loading:
            _loaded[name] = importlib.import_module(TABLE[NAMES.index(name)].module)
    return _loaded[name]


# No thread but the forking one survives a fork. A child that entered a team of OpenMP's or Numba's threads would wait for them
# for ever; that is watched from here, as the backend may be imported in the child only. And a child could not finish what
# another thread was importing or compiling at the fork: the fork waits instead.
_forked = False


def _before_fork() -> None:
    _loading.acquire()  # so that none is loaded until it is released
    if "numba" in _loaded:
        _loaded["numba"].compiling.acquire()


def _after_fork() -> None:
    if "numba" in _loaded:
        _loaded["numba"].compiling.release()
    _loading.release()


def _in_child() -> None:
    global _forked
    _forked = True
    _after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_in_child)


def _check_name(name: object, source: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{source} must be one of {', '.join(NAMES)}, not {name!r}")
    backend = TABLE[NAMES.index(name)]
    if not is_available(backend):
        raise ValueError(f"{source} {name!r} is not available: {backend.requires} is missing")
    return backend.name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force a backend for the calls inside a `with` block, in this thread or task.

    Parameters
    ----------
    name : {"c", "numba", "reference"}
        The backend; see `show_config` for those that are available.

    Raises
    ------
    ValueError
        If there is no such backend, or it is not available here.

    Examples
    --------
    >>> import pylogits
    >>> with pylogits.use_backend("reference"):
    ...     pylogits.softmax([0.0, 0.0])
    array([0.5, 0.5])
    """
    token = _forced.set(_check_name(name, "backend"))
    try:
        yield
    finally:
        _forced.reset(token)


def _usable_cores() -> int:
    """Cores that this process may use: its affinity mask and its cgroup's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        with open("/sys/fs/cgroup/cpu.max") as file:
            quota, period = file.read().split()
        if quota != "max":
            cores = min(cores, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):
        pass  # no cgroup v2, no quota
    return cores


def get_num_threads() -> int:
    """The number of threads that a large call uses.

    It is what `set_num_threads` or the environment variable PYLOGITS_NUM_THREADS set; else the number of cores that the
    process may use, lowered by OMP_NUM_THREADS or by `threadpoolctl`. In a forked child it is always 1.

    Returns
    -------
    int
        At least 1.

    Examples
    --------
    >>> import pylogits
    >>> pylogits.get_num_threads() >= 1
    True
    """
    if _forked:
        return 1
    if _num_threads is not None:
        return _num_threads
    if "c" in _loaded:
        return min(_cores, int(load("c").max_threads()))
    return _cores


def set_num_threads(n: int) -> None:
    """Set the number of threads that a large call uses. It never changes a result.

    Parameters
    ----------
    n : int
        Between 1 and 1024.

    Raises
    ------
    TypeError, ValueError
        If `n` is not an integer, or out of range.

    Examples
    --------
    >>> import pylogits
    >>> before = pylogits.get_num_threads()
    >>> pylogits.set_num_threads(1)
    >>> pylogits.get_num_threads()
    1
    >>> pylogits.set_num_threads(before)
    """
    global _num_threads
    if isinstance(n, bool) or not isinstance(n, int | np.integer):
        raise TypeError(f"n must be an int, not {type(n).__name__}")
    if not 1 <= n <= MAX_THREADS:
        raise ValueError(f"n must be between 1 and {MAX_THREADS}, not {n}")
    _num_threads = int(n)


def show_config() -> dict[str, Any]:
    """Print what was found and what would be chosen, and return it.

    Returns
    -------
    dict
        `isa`: the instruction set of the C backend (None without it); `available_isas`: those that this machine can run,
        best first; `backends`: the available ones, in order of preference; `backend`: the one that calls from here use;
        `num_threads`; `serial_below`: by backend, operation and bytes of a logit, the number of logits below which a call stays
        on one thread, where a row counts for 16 logits more; `measured_on`: the machine that this was measured on.

    Examples
    --------
    >>> import pylogits
    >>> config = pylogits.show_config()  # doctest: +ELLIPSIS
    backend         ...
    >>> "reference" in config["backends"]
    True
    """
    has_c = is_available(TABLE[0])
    simd = load("c") if has_c else None
    backends = [backend.name for backend in TABLE if is_available(backend)]
    config: dict[str, Any] = {
        "backend": _forced.get() or _default,
        "backends": backends,
        "isa": simd.isa() if simd else None,
        "available_isas": simd.available_isas() if simd else [],
        "num_threads": get_num_threads(),
        "measured_on": MACHINE,
        "serial_below": {name: operations for name, operations in SERIAL_BELOW.items() if name in backends},
    }
    for key, value in config.items():
        if isinstance(value, dict):
            for name, operations in value.items():
                print(f"{key:15} {name}, logits of 2, 4 and 8 bytes")
                for operation, sizes in operations.items():
                    print(f"{'':17} {operation:42}", *(f"{size:7}" for size in sizes.values()))
        else:
            print(f"{key:15} {', '.join(value) if isinstance(value, list) else value}")
    return config


def _from_environment() -> str:
    """Apply PYLOGITS_* once, at import: a wrong value should fail there, with its name."""
    global _num_threads
    threads = os.environ.get("PYLOGITS_NUM_THREADS")
    if threads is not None:
        if not threads.isdecimal() or not 1 <= int(threads) <= MAX_THREADS:
            raise ValueError(f"PYLOGITS_NUM_THREADS must be an integer between 1 and {MAX_THREADS}, not {threads!r}")
        _num_threads = int(threads)
    if is_available(TABLE[0]):
        load("c")  # and with it OpenMP: `threadpoolctl` limits the libraries that are there
    isa = os.environ.get("PYLOGITS_ISA")
    if isa is not None:
        if "c" not in _loaded:
            raise ValueError(f"PYLOGITS_ISA is {isa!r}, but this build has no C backend")
        try:
            load("c").use_isa(isa)
        except ValueError as error:
            raise ValueError(f"PYLOGITS_ISA: {error}") from None
    backend = os.environ.get("PYLOGITS_BACKEND")
    if backend is not None:
        return _check_name(backend, "PYLOGITS_BACKEND")
    return next(backend.name for backend in TABLE if is_available(backend))


_cores = _usable_cores()
_default = _from_environment()
