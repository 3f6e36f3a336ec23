"""What every test file shares: the backends to run on, and a fresh interpreter."""

import os
import subprocess
import sys

import numpy as np
import pytest

import pylogits

# Subprocesses, too, import the installed package and not the source folder that they are started in.
os.environ["PYTHONSAFEPATH"] = "1"

BACKENDS = ("c-scalar", "c-avx2", "c-avx512", "c-neon", "numba", "reference")


@pytest.fixture
def simd():
    """The C backend's module; its instruction set is restored afterwards."""
    module = pytest.importorskip("pylogits._simd")
    isa = pylogits.show_config()["isa"]
    yield module
    module.use_isa(isa)


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Run the test on every backend, and on every instruction set of the C backend."""
    name, _, isa = request.param.partition("-")
    if name == "c":
        simd = request.getfixturevalue("simd")
        if isa not in pylogits.show_config()["available_isas"]:
            pytest.skip(f"this machine has no {isa}")
        simd.use_isa(isa)
    elif name == "numba":
        pytest.importorskip("numba")
    with pylogits.use_backend(name):
        yield name


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    return np.dtype(request.param)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Work in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def python():
    """Run code in a fresh interpreter and return the finished process."""

    def run(code, *arguments, **environment):
        return subprocess.run(
            [sys.executable, "-c", code, *arguments],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run
