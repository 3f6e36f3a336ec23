"""Arrays on a GPU, tested on a machine without one: what is said there, the kernels in Numba's simulator, and their PTX."""

import ctypes
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

import pylogits
from pylogits import Scores, _device
from pylogits._reference import LossOptions

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
    process.communicate()


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


def on_gpu(dtype, *shape):
    """An array somewhere on a GPU."""
    return _device.memory(None, (1 << 40, False), shape, dtype)


def test_arguments_are_passed_as_kernels_take_them(monkeypatch):
    """Their number and sizes, for calls with few options and with many."""
    import ptx

    from pylogits import _cuda, _launch

    calls = []
    monkeypatch.setattr(
        _launch, "launch", lambda kernel, stream, grid, block, shared, arguments: calls.append((kernel, arguments))
    )
    monkeypatch.setattr(_launch, "on_device", lambda number: nullcontext())
    monkeypatch.setattr(_device, "stream_of", lambda owner: 0)
    monkeypatch.setattr(_cuda, "allocate", lambda like, shape, dtype: (None, on_gpu(dtype.str, *shape)))
    x, where, rows, labels = on_gpu("<f4", 5, 40, 1), on_gpu("|b1", 5, 40, 1), on_gpu("<f4", 5, 1), on_gpu("<i8", 5, 1)
    few = LossOptions()
    many = LossOptions(on_gpu("<f4", 40), 3, label_smoothing=0.1, z_loss=0.1, softcap=5.0, temperature=0.7)
    mean = _cuda.Reduction(on_gpu("<f4", 1), denominator=None, mean=True)
    _cuda.softmax(on_gpu("<V2", 5, 40, 1), None, 1.0, on_gpu("<V2", 5, 40, 1), 1)
    _cuda.log_softmax(x, where, 2.0, x, 1)
    _cuda.cross_entropy(x, None, None, labels, None, None, None, rows, few, _cuda.Reduction())
    _cuda.cross_entropy(x, where, x, None, rows, rows, x, rows, many, mean)
    _cuda.score(
        x,
        labels,
        1.0,
        Scores(labels, rows, rows, rows, on_gpu("<i8", 5, 1, 3), on_gpu("<f4", 5, 1, 3), rows, on_gpu("|b1", 5, 1)),
        1,
    )
    sizes = {bool: 1, int: ctypes.sizeof(ctypes.c_void_p)}
    for kernel, arguments in calls:
        kinds, passed = [], []
        _launch._flatten(arguments, kinds, passed)
        text = ptx.compile_ptx(kernel, tuple(map(_launch._type_of, arguments)), 90)
        taken = [
            int(bits) // 8 for bits in re.findall(r"\.param [^,)]*?\.[ubf](\d+)\s[^,)]*_param_\d+", text.partition("{")[0])
        ]
        assert [sizes.get(type(value)) or ctypes.sizeof(value) for value in passed] == taken, kernel


def test_in_the_simulator(simulated):
    said, _ = simulated.communicate(timeout=300)
    assert simulated.returncode == 0, said
