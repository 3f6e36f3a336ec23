"""Arrays on a GPU, tested on a machine without one: what is said there, the kernels in Numba's simulator, and their PTX."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import pylogits

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "bench"))


class OnGpu:
    """What an array of GPU memory looks like."""

    def __init__(self):
        self.__cuda_array_interface__ = {"shape": (2, 3), "typestr": "<f4", "data": (1 << 40, False), "version": 3}


@pytest.fixture(scope="module", autouse=True)
def simulated():
    """The kernels' tests in the simulator, which Numba chooses when it is imported; the tests below go on meanwhile."""
    pytest.importorskip("numba_cuda", reason="numba-cuda is not installed: pip install '.[cuda]'")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(ROOT / "tests/test_cuda_kernels.py")]
    environment = {**os.environ, "NUMBA_ENABLE_CUDASIM": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    yield process
    process.kill()
    process.wait()


@pytest.mark.parametrize("function", [pylogits.softmax, pylogits.logsumexp, pylogits.score])
def test_without_a_driver(function):
    from numba import cuda

    if cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ImportError, match=r'NVIDIA driver.*pip install "pylogits\[cuda\]"'):
        function(OnGpu())


def test_without_the_extra(python):
    code = """
import sys
sys.modules["numba_cuda"] = sys.modules["numba.cuda"] = None  # as if they were not installed
import pylogits
class OnGpu:
    __cuda_array_interface__ = {"shape": (2, 3), "typestr": "<f4", "data": (1 << 40, False), "version": 3}
print(pylogits.softmax([0.0, 0.0]))
try:
    pylogits.cross_entropy(OnGpu(), [0, 1])
except ImportError as error:
    print(error)
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[0.5 0.5]", 'arrays on a GPU need numba-cuda: pip install "pylogits[cuda]"']


def test_operands_in_main_memory_do_not_mix_with_a_gpu():
    with pytest.raises(TypeError, match="labels is on a GPU; only arrays in main memory"):
        pylogits.sparse_softmax_cross_entropy_with_logits(labels=OnGpu(), logits=[[0.5, 1.5, 0.1]])
    with pytest.raises(TypeError, match="inputs is on a GPU; only arrays in main memory"):
        pylogits.linear_cross_entropy(OnGpu(), [[1.0, 2.0, 3.0]], [0, 0])


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16", ""])
def test_ptx(dtype):
    """Every kernel, with few options and with many, for every architecture; `make ptx` assembles them, too."""
    import ptx

    for one in ptx.compiled(ptx.ARCHITECTURES, [dtype]):
        assert f".target sm_{one.architecture}" in one.ptx
        assert not ptx.faults(one), one[:3]
        if dtype:
            assert one.count(r"\.extern \.shared \.align 16\b") == 1, one[:3]  # of the tile, for vectors


def test_an_option_that_is_not_used_is_a_null_pointer():
    from numba import types
    from numba.cuda.dispatcher import _Kernel
    from pylogits.kernels import cuda as kernels

    passed = []
    _Kernel._prepare_args(SimpleNamespace(extensions=kernels.clear.extensions), types.none, None, 0, [], passed)
    assert passed == [0]


def test_in_the_simulator(simulated):
    said, _ = simulated.communicate(timeout=300)
    assert simulated.returncode == 0, said
