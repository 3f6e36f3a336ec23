"""The C backend's programs without Python: right, the same bits on every CPU that can be had or emulated, and no complaint of a
checker. What takes long is cut short here: `make qemu`, `make valgrind` and `make fuzz-c` run all of it."""

import os
import platform
import shutil
import subprocess
from itertools import islice
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

CASES = 288  # the test program's lines for each instruction set
FIRST_CASES = 96  # softmax, log_softmax and logsumexp


def needs(*tools):
    missing = [tool for tool in tools if not shutil.which(tool)]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


def has_libfuzzer():
    if not shutil.which("clang"):
        return False
    found = subprocess.run(["clang", "--print-resource-dir"], check=True, capture_output=True, text=True).stdout
    return any(Path(found.strip()).glob("lib/*/libclang_rt.fuzzer*"))


needs_x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="the target is for x86-64")


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """Run make's targets in a folder that the tests share, and return what they print.

    The programs' own optimisation is less than the library's, whose results the other tests look at: the compiler takes a third
    of the time.
    """
    build = tmp_path_factory.mktemp("build")

    def run(*targets):
        command = ["make", "--silent", "--jobs=2", f"BUILD={build}", "OPTIMISE=-O1", "ROUNDS=1"]
        named = [target.replace("BUILD", str(build)) for target in targets]
        return check(*command, *named), build

    return run


def check(*command, **environment):
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def sections(output):
    """The lines of each instruction set: operation, dtype, classes, hash of the results' bits."""
    parts = (part.splitlines() for part in output.split("# ") if part)
    return {name: lines for name, *lines in parts}


@needs_x86
@needs("gcc", "make")
def test_every_instruction_set_gives_the_same_bits(make):
    found = sections(make("c-test")[0])
    assert "scalar" in found
    assert len(found["scalar"]) == CASES
    assert all(lines == found["scalar"] for lines in found.values())


@needs_x86
@needs("gcc", "make", "aarch64-linux-gnu-gcc", "qemu-aarch64")
def test_neon_gives_the_bits_of_x86(make):
    neon = sections(make("neon")[0])
    assert list(neon) == ["neon", "scalar"]
    assert neon["neon"] == neon["scalar"] == sections(make("c-test")[0])["scalar"]


@needs_x86
@needs("gcc", "make", "aarch64-linux-gnu-gcc", "qemu-aarch64")
def test_neon_stays_in_its_arrays(make):
    """The other instruction sets: test_over_read.py."""
    assert "neon: 3648 calls" in make("guard-neon", "STEP=50")[0]


@needs_x86
@needs("gcc", "make", "qemu-x86_64")
@pytest.mark.parametrize(("cpu", "isa"), [("Nehalem", "scalar"), ("Haswell", "avx2")])
def test_an_emulated_cpu_gets_its_kernels_and_the_same_bits(make, cpu, isa):
    output, build = make("c-test")
    program = ["qemu-x86_64", "-cpu", cpu, build / "native/test_kernels"]
    environment = {**os.environ, "OMP_THREAD_LIMIT": "1"}  # teams may hang in the emulator
    with subprocess.Popen(program, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as emulated:
        heading, *lines = (line.strip() for line in islice(emulated.stdout, 1 + FIRST_CASES))
        emulated.kill()
    assert heading == f"# {isa}"
    assert lines == sections(output)["scalar"][:FIRST_CASES]


@needs_x86
@needs("gcc", "make")
@pytest.mark.parametrize("target", ["sanitize", "tsan"])
def test_sanitizers_find_nothing(make, target):
    assert "the same bits" in make(target)[0]


@needs_x86
@needs("gcc", "make", "valgrind")
@pytest.mark.parametrize("isa", ["avx2", "scalar"])
def test_valgrind_finds_nothing(make, isa):
    output, build = make("BUILD/native/stress", "c-test")
    if f"# {isa}" not in output:
        pytest.skip(f"this machine has no {isa}")
    memcheck = ["valgrind", "--quiet", "--leak-check=full", "--error-exitcode=99"]
    assert "the same bits" in check(*memcheck, build / "native/stress", "1", isa, OMP_THREAD_LIMIT="1")


@needs_x86
@needs("make")
@pytest.mark.skipif(not has_libfuzzer(), reason="not installed: Clang with libFuzzer")
def test_random_tasks_give_the_same_bits_and_stay_in_their_arrays(make, tmp_path):
    _, build = make("BUILD/fuzz/fuzz")
    options = ["-runs=1000", "-seed=1", "-max_len=64", "-len_control=0", f"-artifact_prefix={tmp_path}/"]
    check(build / "fuzz/fuzz", *options)
