"""Times one run of `suite.py` with one installation of pylogits: a turn for each line that it reads. For `compare.py`."""

import sys
from pathlib import Path

from peers import active
from side_by_side import SAMPLE_SECONDS, turn
from suite import runs

import pylogits


def main(installation, name):
    """Print a line when ready, and for each line of input the seconds of a call."""
    assert Path(pylogits.__file__).is_relative_to(installation), pylogits.__file__
    run = next(run for run in runs() if str(run) == name)
    pylogits.set_num_threads(run.threads)
    call = run.prepare()
    with active(run.by):
        call()
        number = max(1, round(SAMPLE_SECONDS / min(turn(call, 1))))
        print("ready", flush=True)
        for _ in sys.stdin:
            print(min(turn(call, number)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
