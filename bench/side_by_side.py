"""Calls by turns, in one run: only so do their times compare."""

from importlib.metadata import PackageNotFoundError, version
from statistics import median
from time import perf_counter
from timeit import repeat

from peers import BACKENDS, PEERS, active, prepare
from timed import check

ROUNDS = 15
REPEATS = 3  # in a round
SAMPLE_SECONDS = 0.002  # calls that are shorter are timed by the batch
SETTLE_SECONDS = 0.02  # of untimed calls first: threads of the one before may still spin


def turn(call, number):
    """Return seconds a call, several times, once the caches and cores are its own."""
    settled = perf_counter() + SETTLE_SECONDS
    while perf_counter() < settled:
        call()
    return [seconds / number for seconds in repeat(call, number=number, repeat=REPEATS)]


def callers(case):
    """Return the calls for a case by name, of those who can run it."""
    calls = {}
    for name in (*BACKENDS, *PEERS):
        try:
            calls[name] = prepare(name, case)
        except ImportError:
            continue
        with active(name):
            check(case, calls[name]())
    return calls


def medians(calls, rounds=ROUNDS):
    """Return the median seconds of calls by name."""
    times, numbers = {}, {}
    for name, call in calls.items():
        times[name] = []
        with active(name):
            numbers[name] = max(1, round(SAMPLE_SECONDS / min(turn(call, 1))))
    for _ in range(rounds):
        for name, call in calls.items():
            with active(name):
                times[name] += turn(call, numbers[name])
    return {name: median(seconds) for name, seconds in times.items()}


def cell(seconds, of):
    """Return milliseconds, and the ratio to those of `of`."""
    return f"{seconds * 1e3:.3g}" + (f" ({seconds / of:.2f})" if of else "")


def versions():
    """Return the peers found, with their versions."""
    for name in PEERS:
        try:
            yield f"{name} {version(name)}"
        except PackageNotFoundError:
            yield f"{name} missing"
