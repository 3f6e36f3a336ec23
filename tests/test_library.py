"""The compiled extension as it is installed: which instructions it has, and that loading it changes no arithmetic."""

import platform
import re
import shutil
import subprocess

import pytest

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="about x86-64's instructions and floating-point state")

INSTRUCTION = re.compile(r" +([0-9a-f]+):\t((?:[0-9a-f]{2} )+) *\t")
FILE = re.compile(r".* df \*ABS\*\t[0-9a-f]+ *(.*)")
FUNCTION = re.compile(r"([0-9a-f]+) (.).{5}F \.text\S*\t")
VEX = {"c4", "c5", "62"}  # what no other instruction of 64-bit code begins with
AVX_KERNELS = 2  # avx2, avx512


@pytest.fixture(scope="module")
def extension():
    return pytest.importorskip("pylogits._c").__file__


@pytest.fixture(scope="module")
def objdump(extension):
    if not shutil.which("objdump"):
        pytest.skip("objdump is not installed")

    def run(option):
        return subprocess.run(["objdump", option, extension], check=True, capture_output=True, text=True).stdout

    if "*ABS*" not in run("--syms"):
        pytest.skip("the extension has no symbols")
    return run


def functions_by_file(symbols):
    """The addresses of the functions that each source file has of its own. kernel.c comes once for each instruction set, and
    what is not one file's has the name ""."""
    files, current = [("", set())], set()
    for line in symbols.splitlines():
        if file := FILE.match(line):
            current = set()
            files.append((file[1], current))
        elif function := FUNCTION.match(line):
            (files[0][1] if function[2] == "g" else current).add(int(function[1], 16))
    return files


def avx_functions(disassembly):
    """The addresses of the functions with a VEX or EVEX instruction."""
    found, function = set(), None
    for line in disassembly.splitlines():
        if line.endswith(">:"):
            function = int(line.split()[0], 16)
        elif instruction := INSTRUCTION.match(line):
            encoding = instruction[2].split()
            if next(byte for byte in encoding if byte not in ("64", "65", "67")) in VEX:
                found.add(function)
    return found


def test_only_the_avx_kernels_have_avx_instructions(objdump):
    avx = avx_functions(objdump("--disassemble"))
    files = functions_by_file(objdump("--syms"))
    assert {"dispatch.c", "kernel.c"} <= {name for name, _ in files}
    with_avx = [name for name, functions in files if functions & avx]
    assert with_avx == ["kernel.c"] * AVX_KERNELS
    assert len([name for name, _ in files if name == "kernel.c"]) == AVX_KERNELS + 1
    assert avx <= set().union(*(functions for _, functions in files))


def test_no_start_up_code_flushes_subnormals(objdump):
    symbols = objdump("--syms")
    assert "set_fast_math" not in symbols
    assert "crtfastmath" not in symbols


def test_subnormals_are_kept_after_the_import(python):
    done = python(
        "import threading, numpy as np, pylogits\n"
        "def halved():\n"
        "    print(float(np.float32(1e-40) * np.float32(0.5)))\n"
        "pylogits.softmax(np.zeros((4096, 100), np.float32))\n"  # which starts OpenMP's threads
        "halved()\n"
        "thread = threading.Thread(target=halved)\n"
        "thread.start()\n"
        "thread.join()\n"
    )
    assert done.returncode == 0, done.stderr
    assert [float(line) for line in done.stdout.split()] == [pytest.approx(5e-41, rel=1e-4)] * 2
