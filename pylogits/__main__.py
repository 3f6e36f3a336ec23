"""``python -m pylogits``: the command line."""

from pylogits.cli import app

app(prog_name="pylogits")
