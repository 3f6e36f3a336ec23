"""Which backend and how many threads are fastest, on a grid of calls; and what the dispatcher chooses.

Run as ``python bench/dispatch.py [--write] [--only SUBSTRING]``.

Each call of the grid is timed by turns with every choice: C and Numba, on one thread and on all. With ``--write`` the sizes
from which a second thread pays go to ``pylogits/_crossovers.py``; without, other calls show how good the choices are.
"""

import argparse
import sys
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from statistics import median
from typing import NamedTuple
from unittest import mock

import numpy as np
from peers import BACKENDS
from side_by_side import turn
from timed import Case, arguments

import pylogits
from pylogits import _dispatch

TABLE = Path(__file__).parents[1] / "pylogits" / "_crossovers.py"
THREADS = pylogits.get_num_threads()
OPERATIONS = (
    "softmax",
    "log_softmax",
    "logsumexp",
    "selective_log_softmax",
    "softmax_cross_entropy_with_logits",
    "sparse_softmax_cross_entropy_with_logits",
    "cross_entropy",
    "cross_entropy_value_and_grad",
    "softmax_backward",
    "log_softmax_backward",
    "score",
)
DTYPES = ("bfloat16", "float32", "float64")
CLASSES = (10, 50, 200, 1000, 30_000)  # to tune, and others to check
OTHER_CLASSES = (3, 32, 128, 512, 10_000)
SIZES = tuple(1 << n for n in range(12, 20))
OTHER_SIZES = (3000, 12_000, 25_000, 50_000, 100_000, 400_000, 3_000_000)
# Not below a few microseconds: there is nothing to gain then, and a thread that sleeps takes longer to wake.
CROSSOVERS = tuple(1 << n for n in range(13, 19))
ROUNDS = 5
PASSES = 2  # to tune, over the whole grid: for minutes a thread may take 3 us to wake instead of 1, or wait for a core
SAMPLE_SECONDS = 0.002
WITHIN = 1.1  # times the best time
GOAL = 0.95  # of the calls are within that


class Call(NamedTuple):
    """A call with a last axis of so many classes."""

    operation: str
    dtype: str
    classes: int
    rows: int

    def __str__(self):
        return f"{self.operation} {self.dtype} {self.rows} x {self.classes}"

    @property
    def size(self):
        return self.rows * self.classes

    @property
    def work(self):
        return self.size + _dispatch.ROW_WORK * self.rows

    def prepare(self):
        """Return a function that makes the call; a result of the logits' size goes to memory that is there."""
        shape, function = (self.rows, self.classes), getattr(pylogits, self.operation)
        drawn = Case("sparse_softmax_cross_entropy_with_logits", self.dtype, shape)
        logits, labels = (arguments(drawn)[name] for name in ("logits", "labels"))
        out = np.empty_like(logits)
        match self.operation:
            case "softmax" | "log_softmax":
                return lambda: function(logits, out=out)
            case "softmax_backward" | "log_softmax_backward":
                results = getattr(pylogits, self.operation.removesuffix("_backward"))(logits)
                return lambda: function(logits, results, out=out)
            case "selective_log_softmax" | "score":
                return lambda: function(logits, labels)
            case "softmax_cross_entropy_with_logits":
                probabilities = pylogits.softmax(logits)
                return lambda: function(labels=probabilities, logits=logits)
            case "sparse_softmax_cross_entropy_with_logits":
                return lambda: function(labels=labels, logits=logits)
            case "cross_entropy":
                return lambda: function(logits, labels, reduction="none")
            case "cross_entropy_value_and_grad":
                return lambda: function(logits, labels, grad_out=out)
        return lambda: function(logits)


def grid(classes, sizes, only):
    """Return the calls of all operations and dtypes, with rows of about `sizes` elements together."""
    calls = (
        Call(operation, dtype, count, max(1, round(size / count)))
        for operation, dtype, count, size in product(OPERATIONS, DTYPES, classes, sizes)
    )
    return [call for call in dict.fromkeys(calls) if only in str(call)]


@contextmanager
def forced(backend, threads):
    """Leave the dispatcher no choice."""
    with pylogits.use_backend(backend), mock.patch.multiple(_dispatch, ALWAYS_SERIAL=0, threads_for=lambda *_: threads):
        yield


def times(call):
    """Return the median seconds of a call by choice, (backend, threads)."""
    function, seconds, numbers = call.prepare(), {}, {}
    choices = list(product(BACKENDS, (1, THREADS)))
    for choice in choices:
        with forced(*choice):
            numbers[choice] = max(1, round(SAMPLE_SECONDS / min(turn(function, 1))))
    for _ in range(ROUNDS):
        for choice in choices:
            with forced(*choice):
                seconds.setdefault(choice, []).append(min(turn(function, numbers[choice])))
    return {choice: median(values) for choice, values in seconds.items()}


def chosen(call):
    """Return what the dispatcher chooses."""
    module, threads = _dispatch.select(call.operation, np.dtype(call.dtype), call.size, call.classes)
    return next(backend.name for backend in _dispatch.TABLE if backend.module == module.__name__), threads


def measured(calls):
    """Yield each call with its times by choice, and print them, a star at the dispatcher's."""
    for call in calls:
        seconds = times(call)
        best = min(seconds.values())
        words = (
            f"{'*' * (choice == chosen(call))}{choice[0]}-{choice[1]} {value / best:.2f}" for choice, value in seconds.items()
        )
        print(f"{call}: {best * 1e6:.1f} us; {' '.join(words)}", flush=True)
        yield call, seconds


def least_regret(found):
    """Return the work, of CROSSOVERS, that loses least on (work, time on one thread, on all) if threads are used from it on."""

    def regret(below):
        return sum(np.log((serial if work < below else threads) / min(serial, threads)) for work, serial, threads in found)

    return min(CROSSOVERS, key=regret)


def tune(only):
    """Return the crossovers by backend, operation and bytes of a logit, by the least times of the passes."""
    times_of = {}
    for call, seconds in measured(PASSES * grid(CLASSES, SIZES, only)):
        for name in BACKENDS:
            found = times_of.setdefault((name, call.operation, np.dtype(call.dtype).itemsize), {})
            now = seconds[name, 1], seconds[name, THREADS]
            found[call] = tuple(map(min, now, found.get(call, now)))
    table = {}
    for (name, operation, itemsize), found in times_of.items():
        below = least_regret([(call.work, *least) for call, least in found.items()])
        table.setdefault(name, {}).setdefault(operation, {})[itemsize] = below
    return table


def write(table):
    """Write the module that the dispatcher reads."""
    lines = [
        '"""From how much work on a second thread pays: measured, and written by `make tune`."""',
        "",
        f'MACHINE = "{machine()}"',
        "# By backend, operation and bytes of a logit: logits, and ROW_WORK for each row.",
        "SERIAL_BELOW = {",
    ]
    for name, operations in table.items():
        lines.append(f'    "{name}": {{')
        for operation, sizes in operations.items():
            lines.append(f'        "{operation}": {sizes},')
        lines.append("    },")
    TABLE.write_text("\n".join([*lines, "}", ""]))


def machine():
    """Return what the times are of."""
    with open("/proc/cpuinfo") as file:
        model = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "unknown")
    return f"{model}, {_dispatch.load('c').isa()}, {THREADS} threads"


def check(only):
    """Print how good the choices are, and return whether they are good enough."""
    calls = grid(OTHER_CLASSES, OTHER_SIZES, only)
    ratios = {str(call): seconds[chosen(call)] / min(seconds.values()) for call, seconds in measured(calls)}
    worst = sorted(ratios, key=ratios.get, reverse=True)[:20]
    print("worst choices:", *(f"{ratios[name]:.2f} {name}" for name in worst), sep="\n")
    good = sum(ratio <= WITHIN for ratio in ratios.values()) / len(ratios)
    print(f"within 10 % of the best, of {' and '.join(BACKENDS)} on 1 and {THREADS} threads: {good:.1%} of {len(calls)} calls")
    return good >= GOAL


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="measure the crossovers and write them for the dispatcher")
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="calls with this in their names")
    options = parser.parse_args()
    if options.write:
        write(tune(options.only))
    else:
        sys.exit(not check(options.only))


if __name__ == "__main__":
    main()
