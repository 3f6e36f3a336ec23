"""A job of `pylogits score` on files in the page cache, beside reading them: GB/s of logits, and the ratio.

Run as ``python bench/job.py [--megabytes N]``. The job is scored and written in this process, so that starting one does not
count; `command` is the time of the whole command, in seconds.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter

import numpy as np

from pylogits.batch.job import Options, Part, score_part

CLASSES = (10, 1000, 128256)
ROUNDS = 7
BUFFER_BYTES = 1 << 20  # of the reader, which uses it again and again


def seconds(call, *arguments):
    """Return how long a call takes."""
    start = perf_counter()
    call(*arguments)
    return perf_counter() - start


def read(path):
    """Read a file into one buffer, over and over."""
    buffer = bytearray(BUFFER_BYTES)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def make(folder, classes, megabytes):
    """Write logits and targets, a piece at a time."""
    rng = np.random.default_rng(classes)
    rows = megabytes * 1_000_000 // (4 * classes)
    logits, targets = folder / f"logits{classes}.npy", folder / f"targets{classes}.npy"
    array = np.lib.format.open_memmap(logits, "w+", np.float32, (rows, classes))
    for piece in np.array_split(array, 100):
        piece[...] = rng.standard_normal(piece.shape, np.float32) * 3
    np.save(targets, rng.integers(0, classes, rows))
    return Part(str(logits), logits, targets, folder / "scores.parquet")


def main():
    """Print a line for each number of classes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--megabytes", type=int, default=1000, help="of logits, for each number of classes")
    options = parser.parse_args()
    print("| classes | rows | read, GB/s | job, GB/s | of reading | command, s |\n| --- | --- | --- | --- | --- | --- |")
    for classes in CLASSES:
        with TemporaryDirectory() as folder:
            part = make(Path(folder), classes, options.megabytes)
            reading, scoring = zip(
                *(
                    (seconds(read, part.logits), seconds(score_part, part, Options(classes=classes), False))
                    for _ in range(ROUNDS)
                ),
                strict=True,
            )
            command = [sys.executable, "-m", "pylogits", "score", "--quiet", str(part.logits)]
            command += ["--targets", str(part.targets), "--out", str(part.out)]
            whole = median(seconds(lambda run=command: subprocess.run(run, check=True, capture_output=True)) for _ in range(3))
            size = part.logits.stat().st_size / 1e9
            rates = size / median(reading), size / median(scoring)
            rows = np.load(part.targets, mmap_mode="r").size
            print(
                f"| {classes:,} | {rows:,} | {rates[0]:.1f} | {rates[1]:.2f} | {rates[1] / rates[0]:.2f} | {whole:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
