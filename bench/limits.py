"""How far pylogits is from what memory allows, and from the best peer; and how its time grows.

Run as ``python bench/limits.py [--only SUBSTRING] [--rounds N] [--growth]``.

The limits are passes over the same memory by as many threads: ``read`` only reads the logits, ``copy`` copies them with
stores that bypass the caches. Backends, peers and limits are timed by turns.
"""

import argparse
import ctypes
import os
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from peers import PEERS, SPARSE, active
from side_by_side import ROUNDS, callers, medians, versions
from timed import FULL_OPS, Case, arguments, label, moved_bytes, timed_case

import pylogits

HERE = Path(__file__).parent
COMPILE = ("-std=gnu11", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", f"-I{HERE.parent / 'c'}")

LARGE = 1 << 20  # bytes of logits; below, a limit measures the start of threads
LONG = 100  # classes
NUMBA_GOALS = {True: 1.3, False: 2.0}  # of C's time: large and long, or not
STEEP = 1.5  # growth of the time per element, step to step
GROWTH_BYTES = 4e9
GROWTH_CLASSES = 1000
GROWTH_ELEMENTS = 4_000_000
# Two steps a decade; and where the kernels change: tiles of short rows, tiles of columns, blocks.
HALF_DECADES = tuple(round(10 ** (n / 2)) for n in range(13))
CLASSES = tuple(sorted({2, 17, 32, 33, 1024, 1025, 4096, 4097, *HALF_DECADES[1:]}))


class Row(NamedTuple):
    """A case and its goals: most of the time of someone else (or of a call in `us`) that C may take."""

    case: Case
    goals: dict[str, float]


def row(op, *shape, dtype="float32", axis=-1, **goals):
    """Return a row of the table."""
    return Row(timed_case(op, shape, dtype, axis), goals)


ROWS = (
    row(SPARSE, 256, 128256, read=1.15),
    row(SPARSE, 1_000_000, 10, jax=0.2),
    row(SPARSE, 4096, 1000, torch=0.35),
    row(SPARSE, 16384, 128),
    row(SPARSE, 1, 10),
    row("softmax", 256, 128256, copy=1.1),
    row("softmax", 1_000_000, 10, onnxruntime=0.33),
    row("softmax", 4096, 1000, onnxruntime=0.75),
    row("softmax", 16384, 128, onnxruntime=0.8),
    row("softmax", 1, 10, us=1.0, torch=0.6),
    row("softmax", 1, 128256, torch=0.6),
    row("softmax", 1000, 4096, axis=0, torch=0.2),
    row("softmax", 8, 19, 256, 256, axis=1, torch=0.45),
    row("softmax", 4096, 1000, dtype="float64", torch=0.6),
    row(SPARSE, 4096, 1000, dtype="float64", torch=0.6),
    row("softmax", 4096, 1000, dtype="bfloat16"),
    row(SPARSE, 4096, 1000, dtype="bfloat16", torch=0.6),
    row("softmax", 4096, 1000, dtype="float16"),
    row("log_softmax", 4096, 1000),
    row("logsumexp", 4096, 1000),
    row("softmax_cross_entropy_with_logits", 4096, 1000),
)


LIMITS = ("read", "copy")


def compiled():
    """Return the functions of limits.c, compiled for this machine."""
    with tempfile.TemporaryDirectory() as directory:
        library = Path(directory) / "limits.so"
        command = [os.environ.get("CC", "cc"), *COMPILE, HERE / "limits.c", "-o", library]
        subprocess.run(command, check=True)
        functions = ctypes.CDLL(str(library))  # stays mapped when the file is gone
    sizes = (ctypes.c_size_t, ctypes.c_int)
    functions.read_all.argtypes = (ctypes.c_void_p, *sizes)
    functions.read_all.restype = ctypes.c_uint64
    functions.copy_all.argtypes = (ctypes.c_void_p, ctypes.c_void_p, *sizes)
    functions.copy_all.restype = None
    return functions


def limit_of(case):
    """Return the name of the limit of an operation."""
    return "copy" if case.op in FULL_OPS else "read"


def limit_call(functions, case):
    """Return a function that does no more with the logits than memory has to, once checked."""
    logits, threads = arguments(case)["logits"], pylogits.get_num_threads()
    size = logits.nbytes
    if limit_of(case) == "read":
        expected = np.bitwise_xor.reduce(logits.ravel().view(np.uint64))
        assert functions.read_all(logits.ctypes.data, size, threads) == expected
        return lambda data=logits.ctypes.data: functions.read_all(data, size, threads)
    target = np.empty_like(logits)
    functions.copy_all(target.ctypes.data, logits.ctypes.data, size, threads)
    assert target.tobytes() == logits.tobytes()

    def call(to=target.ctypes.data, data=logits.ctypes.data):
        functions.copy_all(to, data, size, threads)
        return target  # keeps the memory

    return call


def in_words(name, factor):
    """Return a goal as a person says it."""
    return f"<= {factor:g} us" if name == "us" else f"<= {factor:g} x {name}"


def judge(goals, times):
    """Return "yes", "no", or "?" where someone to compare with is missing."""
    of = {**times, "us": 1e-6}
    verdicts = [times["c"] <= factor * of[name] if name in of else None for name, factor in goals.items()]
    return "no" if False in verdicts else "?" if None in verdicts else "yes"


def milliseconds(seconds):
    return f"{seconds * 1e3:.3g}"


def cells(row, times):
    """Return a line of the table."""
    case = row.case
    ours, numba = times["c"], times.get("numba")
    limit = limit_of(case)
    peers = {name: times[name] for name in PEERS if name in times}
    best = min(peers, key=peers.get, default=None)
    goals = dict(row.goals)
    if best:
        goals["the best peer"] = 1.0
    if numba is None:
        by_numba = "missing"
    else:
        long = arguments(case)["logits"].nbytes >= LARGE and case.shape[case.axis] >= LONG
        by_numba = f"{milliseconds(numba)} ({numba / ours:.2f} x c; goal {NUMBA_GOALS[long]:g})"
    return (
        label(case),
        f"{moved_bytes(case) / ours / 1e9:.3g}",
        milliseconds(ours),
        by_numba,
        f"{ours / times[limit]:.2f} x {limit} ({milliseconds(times[limit])} ms)" if limit in times else "",
        f"{best} {milliseconds(peers[best])}" if best else "none",
        f"{ours / peers[best]:.2f}" if best else "",
        ", ".join(in_words(*goal) for goal in goals.items()),
        judge(goals, {**times, "the best peer": peers.get(best)}),
    )


HEADS = ("case", "GB/s", "c ms", "numba ms", "of the limit", "best peer ms", "of the best peer", "goal", "met")


def print_row(cells):
    print("| " + " | ".join(cells) + " |", flush=True)


def print_table(rows, rounds):
    """Print the table in Markdown, row by row."""
    functions = compiled()
    pylogits.show_config()
    print(f"{'peers':15} {', '.join(versions())}\n")
    print_row(HEADS)
    print_row(["---"] * len(HEADS))
    for row in rows:
        calls = callers(row.case)
        if arguments(row.case)["logits"].nbytes >= LARGE:
            calls[limit_of(row.case)] = limit_call(functions, row.case)
        print_row(cells(row, medians(calls, rounds)))


def growth_call(op, memory, labels, rows, classes):
    """Return a function that runs an operation on rows of `memory`."""
    logits = memory[: rows * classes].reshape(rows, classes)
    if op == "softmax":
        out = np.empty_like(logits)
        return lambda: pylogits.softmax(logits, out=out)
    labels = labels[:rows] % classes
    return lambda: pylogits.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits)


def print_growth(only, rounds):
    """Print the time per element on the C backend, as rows become more, and longer."""
    rng = np.random.default_rng(0)
    drawn = rng.standard_normal(GROWTH_ELEMENTS, np.float32) * 3
    labels = rng.integers(HALF_DECADES[-1], size=GROWTH_ELEMENTS)
    growths = {
        f"rows of {GROWTH_CLASSES}": [(rows, GROWTH_CLASSES) for rows in HALF_DECADES],
        f"classes at {GROWTH_ELEMENTS} elements": [(GROWTH_ELEMENTS // classes, classes) for classes in CLASSES],
    }
    for op in ("softmax", SPARSE):
        for title, shapes in growths.items():
            if only not in f"{op} {title}":
                continue
            print(f"\n{op}, {title}\n")
            print_row(["shape", "ms", "ns an element", "of the step before"])
            print_row(["---"] * 4)
            before = None
            for rows, classes in shapes:
                size = rows * classes
                if 4 * size * (2 if op == "softmax" else 1) > GROWTH_BYTES:
                    break
                call = growth_call(op, np.resize(drawn, size), labels, rows, classes)
                with active("c"):
                    call()
                seconds = medians({"c": call}, rounds)["c"]
                each = seconds / size
                ratio = each / before if before else 1
                step = f"{ratio:.2f}" + " STEEP" * (ratio > STEEP)
                print_row([f"{rows} x {classes}", milliseconds(seconds), f"{each * 1e9:.3g}", step])
                before = each


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="only what has this in its name")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"of all by turns ({ROUNDS})")
    parser.add_argument("--growth", action="store_true", help="time per element as rows become more, and longer")
    options = parser.parse_args()
    if options.growth:
        print_growth(options.only, options.rounds)
    else:
        print_table([row for row in ROWS if options.only in label(row.case)], options.rounds)


if __name__ == "__main__":
    main()
