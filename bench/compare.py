"""Two revisions by turns: fails on what has become more than 5 % slower than at a base, and not by chance.

Run as ``python bench/compare.py BASE [--only SUBSTRING] [--runs N]``.

The base and the working tree are installed into folders of their own, and run in processes of their own: two copies of the
extension in one process would share the first. Both processes of a case time it by turns, so that whatever else the machine
does meets both. A case that seems slower is measured again, three times, each in new processes: it is slower if all agree.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from ratios import SLOWER, ratio_of, verdict
from suite import PROMISED, runs

ROOT = Path(__file__).parents[1]
FOLDERS = {name: ROOT / "build-compare" / name for name in ("base", "work")}  # of one length: so is the environment then
LEAST_ROUNDS, MOST_ROUNDS = 20, 100
PRECISION = 0.04  # of an interval, which ends a measurement, as one does that lies below a slowdown


def install(source, folder):
    """Install pylogits alone."""
    shutil.rmtree(folder, ignore_errors=True)
    command = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", f"--target={folder}", source]
    subprocess.run([sys.executable, *command], check=True)


def install_base(revision, folder):
    """Install a revision, if it is not the one that is there."""
    commit = subprocess.run(
        ["git", "rev-parse", "--verify", f"{revision}^{{commit}}"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    stamp = folder / "commit"
    if stamp.exists() and stamp.read_text() == commit:
        return
    with tempfile.TemporaryDirectory() as source:
        archive = subprocess.run(["git", "archive", commit.strip()], cwd=ROOT, check=True, capture_output=True).stdout
        subprocess.run(["tar", "-x", "-C", source], input=archive, check=True)
        install(source, folder)
    stamp.write_text(commit)


class Worker:
    """A process that times a run with one installation, when told to."""

    def __init__(self, folder, run):
        # Without `site`, which would load an editable installation from the environment that this runs in.
        command = [sys.executable, "-S", Path(__file__).with_name("worker.py"), folder, str(run)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *sys.path]), "PYTHONSAFEPATH": "1"}
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        self.process.stderr.close()

    def wait_until_ready(self):
        """Raise RuntimeError, with the process's last words, if it can't run its case."""
        if self.process.stdout.readline() != "ready\n":
            raise RuntimeError(self.process.stderr.read().strip().rpartition("\n")[2])

    def seconds(self):
        """Return the seconds of a call, of the best of a turn."""
        print(file=self.process.stdin, flush=True)
        return float(self.process.stdout.readline())


def measure(run):
    """Return how the working tree compares with the base, from two new processes."""
    times = {name: [] for name in FOLDERS}
    with ExitStack() as stack:
        workers = {name: stack.enter_context(Worker(folder, run)) for name, folder in FOLDERS.items()}
        for worker in workers.values():
            worker.wait_until_ready()
        for n in range(MOST_ROUNDS):
            for name in sorted(workers, reverse=n % 2):
                times[name].append(workers[name].seconds())
            if n + 1 >= LEAST_ROUNDS:
                ratio = ratio_of(times["work"], times["base"])
                if ratio.high < SLOWER or ratio.high - ratio.low < PRECISION:
                    break
    return ratio


def is_compared(run, only):
    """Return whether a run is compared: what has `only` in its name or, by default, C on one thread without options.

    The linear losses take five minutes, for calls that are mostly NumPy's matmul around kernels that the others time.
    """
    if only:
        return only in str(run)
    return run.by == "c" and run.threads == 1 and run.case in PROMISED and not run.option and "linear" not in run.case.op


def compare(only):
    """Print a line for each case, and return how many are slower."""
    slower = 0
    for run in runs():
        if not is_compared(run, only):
            continue
        try:
            ratio = verdict(lambda run=run: measure(run))
        except RuntimeError as error:
            print(f"{run}: not compared: {error}", flush=True)
            continue
        slower += ratio.is_slower
        print(f"{run}: {ratio}" + " SLOWER" * ratio.is_slower + " unclear" * ratio.is_unclear, flush=True)
    return slower


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("base", metavar="BASE", help="the revision to compare the working tree with")
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="what has this in its name, of all of suite.py")
    parser.add_argument("--runs", type=int, default=1, help="so many comparisons of all: two equal revisions prove the method")
    options = parser.parse_args()
    install_base(options.base, FOLDERS["base"])
    install(ROOT, FOLDERS["work"])
    print(f"time of the working tree / time of {options.base}, with an interval of 99 %")
    slower = [compare(options.only) for _ in range(options.runs)]
    print("slower cases, by run:", *slower)
    sys.exit(any(slower))


if __name__ == "__main__":
    main()
