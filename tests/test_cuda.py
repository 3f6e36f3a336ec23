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


# Every kernel, with few options and with many; `make ptx` compiles all signatures for all, and assembles them.
FEW = ("softmax, sums", "selective_log_softmax", "cross_entropy", "backward", "score")
MANY = ("softmax, where", "cross_entropy, soft, all options")


@pytest.mark.parametrize(
    ("dtype", "architectures", "names"),
    [
        ("float32", (80, 90, 100), FEW),
        ("float32", (90,), MANY),
        ("float64", (90,), MANY[:1]),
        ("float16", (90,), MANY[:1]),
        ("bfloat16", (90,), MANY[:1]),
    ],
)
def test_ptx(dtype, architectures, names):
    import ptx

    for name in names:
        kernel, signature = ptx.signatures(dtype)[name]
        for architecture in architectures:
            one = ptx.Compiled(name, dtype, architecture, ptx.compile_ptx(kernel, signature, architecture))
            assert f".target sm_{architecture}" in one.ptx
            assert one.count(r"\.extern \.shared \.align 16\b") == 1  # of the tile, for vectors
            assert not ptx.faults(one), (name, architecture)


def test_an_option_that_is_not_used_is_a_null_pointer():
    from numba import types
    from numba.cuda.dispatcher import _Kernel
    from pylogits.kernels import cuda as kernels

    passed = []
    _Kernel._prepare_args(SimpleNamespace(extensions=kernels.clear.extensions), types.none, None, 0, [], passed)
    assert passed == [0]


def test_ptx_over_rows():
    import ptx

    for name, (kernel, signature) in ptx.signatures_over_rows().items():
        for architecture in ptx.ARCHITECTURES:
            one = ptx.Compiled(name, "", architecture, ptx.compile_ptx(kernel, signature, architecture))
            assert not ptx.faults(one), (name, architecture)


def test_in_the_simulator(simulated):
    said, _ = simulated.communicate(timeout=300)
    assert simulated.returncode == 0, said
