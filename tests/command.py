"""The command `pylogits`, run as its tests run it: in this process, or in one of its own."""

import sys
from pathlib import Path

from typer.testing import CliRunner

from pylogits import cli

COMMAND = (sys.executable, "-m", "pylogits", "score")


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def refused(*arguments):
    """The one line with which a run of `pylogits score` ends, leaving everything as it was."""
    before = _contents()
    result = run("score", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ")
    assert result.stderr.endswith("\n")
    assert result.stderr.count("\n") == 1
    assert _contents() == before
    return result.stderr.removeprefix("error: ").rstrip("\n")


def _contents():
    """The files of the folder and of those in it, with the bytes of the outputs."""
    paths = sorted(Path().rglob("*"))
    return {path: path.read_bytes() if path.stem == "out" and path.is_file() else None for path in paths}
