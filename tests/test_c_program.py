"""The C backend's own test program, on this machine and, emulated, on 64-bit Arm: right, and the same bits everywhere."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def hashes(target: str, build: Path) -> dict[str, list[str]]:
    """The lines of each instruction set: operation, dtype, classes, hash of the results' bits."""
    output = subprocess.run(
        ["make", "--silent", target, f"BUILD={build}"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
    ).stdout
    sections = (section.splitlines() for section in output.split("# ") if section)
    return {name: lines for name, *lines in sections}


needs_x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="the target is for x86-64")


@needs_x86
@pytest.mark.skipif(not shutil.which("gcc"), reason="gcc is not installed")
def test_every_instruction_set_gives_the_same_bits(tmp_path):
    found = hashes("c-test", tmp_path)
    assert "scalar" in found
    assert len(found["scalar"]) == 288
    assert all(lines == found["scalar"] for lines in found.values())


@needs_x86
@pytest.mark.skipif(
    not (shutil.which("aarch64-linux-gnu-gcc") and shutil.which("qemu-aarch64")),
    reason="gcc-aarch64-linux-gnu or qemu-user is not installed",
)
def test_neon_gives_the_bits_of_x86(tmp_path):
    neon = hashes("neon", tmp_path)
    assert list(neon) == ["neon", "scalar"]
    assert neon["neon"] == neon["scalar"] == hashes("c-test", tmp_path)["scalar"]
