"""The floating-point state that results are computed in: round to nearest, subnormals kept, infinities and NaN no errors.

A caller, or a library built with -ffast-math, may have set another. C kernels take care of their threads by themselves.
"""

import ctypes
import sys
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import numpy as np

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

# Told apart by arithmetic, which takes a tenth of a call of fegetenv. Not literals: those are added when this is compiled.
_ONE, _LITTLE, _SUBNORMAL = 1.0, 1e-20, 5e-324
_Environment = ctypes.c_char * 64  # more than a fenv_t of x86-64 (32) or AArch64 (8)


def _functions() -> tuple[Callable[..., int], Callable[..., int]] | None:
    """fegetenv and fesetenv of C's library, where its default state is known to be the pointer -1: on Linux."""
    if sys.platform != "linux":
        return None
    try:
        libm = ctypes.CDLL("libm.so.6")
        get, put = libm.fegetenv, libm.fesetenv
    except (OSError, AttributeError):
        return None
    get.argtypes = put.argtypes = (ctypes.c_void_p,)
    return get, put


_FUNCTIONS = _functions()


def is_standard() -> bool:
    """Whether this thread rounds to nearest and keeps subnormals."""
    return _ONE + _LITTLE == _ONE == _ONE - _LITTLE and _SUBNORMAL + _SUBNORMAL != 0


def standard_arithmetic(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Run a function in the standard state, and leave the caller's as it was."""

    @wraps(function)
    def wrapper(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        with np.errstate(all="ignore"):
            if _FUNCTIONS is None or is_standard():
                return function(*args, **kwargs)
            get, put = _FUNCTIONS
            saved = _Environment()
            get(saved)
            put(-1)  # FE_DFL_ENV
            try:
                return function(*args, **kwargs)
            finally:
                put(saved)

    return wrapper
