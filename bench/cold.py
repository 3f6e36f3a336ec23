"""What a new process waits for: the import, and the first call with each backend.

Run as ``python bench/cold.py [--runs N]``. Medians of new processes; Numba's cache is empty, then as a process before left it.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from statistics import median

CALLS = {
    "softmax": "pylogits.softmax(logits)",
    "cross_entropy_value_and_grad": "pylogits.cross_entropy_value_and_grad(logits, labels)",
    "softmax inside @njit": "inside(logits)",
}
CHILD = """
from time import perf_counter
import numpy as np

logits, labels = np.zeros((32, 1000), np.float32), np.zeros(32, np.int64)
start = perf_counter()
import pylogits
imported = perf_counter()
if {inside}:
    import numba
    inside = numba.njit(lambda x: pylogits.softmax(x))
ready = perf_counter()
{call}
first = perf_counter()
{call}
print(imported - start, first - ready, perf_counter() - first)
"""


def seconds(call, backend, cache):
    """Return the times of the import, the first call and the second, in a new process."""
    environment = {**os.environ, "PYLOGITS_BACKEND": backend, "NUMBA_CACHE_DIR": cache}
    code = CHILD.format(call=CALLS[call], inside="njit" in call)
    done = subprocess.run([sys.executable, "-P", "-c", code], env=environment, check=True, capture_output=True, text=True)
    return [float(word) for word in done.stdout.split()]


def row(name, call, backend, runs, cache=None):
    """Print the medians of so many processes; without a `cache` each has an empty one."""
    times = []
    for _ in range(runs):
        with tempfile.TemporaryDirectory() as empty:
            times.append(seconds(call, backend, cache or empty))
    cells = (f"{median(column) * 1e3:.3g}" for column in zip(*times, strict=True))
    print(f"| {name} | {call} | {' | '.join(cells)} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=5, help="processes for each row")
    runs = parser.parse_args().runs
    print("| backend | call | import ms | first call ms | second call ms |\n| --- | --- | --- | --- | --- |")
    for call in CALLS:
        if "njit" not in call:
            row("C", call, "c", runs)
    for call in CALLS:
        row("Numba, cache empty", call, "numba", max(1, runs // 2))
    with tempfile.TemporaryDirectory() as cache:
        for call in CALLS:
            seconds(call, "numba", cache)
            row("Numba, cache filled", call, "numba", runs, cache)


if __name__ == "__main__":
    main()
