"""The code of README.md, docs/ and the docstrings, run as a reader would run it."""

import doctest
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import pylogits

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def page_id(page):
    return str(page.relative_to(ROOT))


def blocks(page, language):
    return [code for name, code in FENCE.findall(page.read_text()) if name == language]


def failures(test):
    report = []
    doctest.DocTestRunner(verbose=False).run(test, out=report.append)
    return "".join(report)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_python_blocks(page):
    code = blocks(page, "python")
    for module in re.findall(r"^>>> (?:import|from) (\w+)", "\n".join(code), re.MULTILINE):
        pytest.importorskip(module)
    assert all(">>>" in block for block in code), "a block without >>> would not be run"
    test = doctest.DocTestParser().get_doctest("\n".join(code), {}, page.name, str(page), 0)
    assert failures(test) == ""


@pytest.mark.parametrize("name", pylogits.__all__)
def test_docstring(name):
    test, *members = doctest.DocTestFinder().find(getattr(pylogits, name), name, globs={})
    assert test.examples
    assert [failures(test) for test in (test, *members)] == [""] * (1 + len(members))


def test_commands(tmp_path):
    """All that are of files which the repository has."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    commands = [
        shlex.split(line)
        for page in PAGES
        for block in blocks(page, "sh")
        for line in block.replace("\\\n", "").splitlines()
        if line.startswith("pylogits ") and "shards" not in line
    ]
    assert commands
    for command in commands:
        done = subprocess.run([sys.executable, "-m", *command], cwd=tmp_path, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links(page):
    targets = re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text())
    assert all((page.parent / target).exists() for target in targets)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_files_and_make_targets(page):
    text = page.read_text()
    files = re.findall(r"`((?:bench|c|docs|examples|kernels|pylogits|tests)/[a-z_0-9./]+\.[a-z]+)`", text)
    assert [name for name in files if not (ROOT / name).exists()] == []
    makefile = (ROOT / "Makefile").read_text()
    assert [name for name in re.findall(r"`make ([a-z-]+)`", text) if f"\n{name}:" not in makefile] == []


def test_site(tmp_path):
    """A page that is in no table of contents, a reference that leads nowhere or a bad docstring is a warning, and an error."""
    pytest.importorskip("furo")
    sphinx = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q"]
    done = subprocess.run(
        [*sphinx, "-d", tmp_path / "doctrees", ROOT / "docs", tmp_path / "html"], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "0.4790107" in (tmp_path / "html" / "logits.html").read_text()
