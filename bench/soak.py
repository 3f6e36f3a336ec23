"""Many threads of mixed calls, for long, beside other libraries' threads: every result to the bit, and no memory kept.

Run as ``python bench/soak.py [--seconds N]``, on Linux. NUMBA_THREADING_LAYER picks Numba's threads: workqueue, omp or tbb.
Fails on a result that differs from the one that the same backend computed on one thread beforehand, and on growing memory.
"""

import argparse
import faulthandler
import hashlib
import itertools
import os
import random
import statistics
import sys
import threading
import time
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "tests"))

import numba
import numpy as np
from cases import DTYPES, OPS, Case

import pylogits

try:
    import torch
except ImportError:
    torch = None

CALLERS = 32
# One row, below both backends' thresholds for threads, above both, few long rows, many short ones.
SHAPES = ((1, 10), (30, 100), (70, 2000), (2, 70_000), (15_000, 10))
MOST_GROWTH = 32 << 20  # bytes of resident memory: what the allocator of so many threads comes and goes by


def calls():
    """Yield functions without arguments, for each operation, dtype and shape."""
    for dtype, shape in itertools.product(DTYPES, SHAPES):
        for op in OPS:
            yield partial(getattr(pylogits, op), **Case(op, dtype, shape).arguments())
        given = Case("sparse_softmax_cross_entropy_with_logits", dtype, shape).arguments()
        logits, labels = given["logits"], given["labels"]
        yield partial(pylogits.cross_entropy_value_and_grad, logits, labels, label_smoothing=0.1, z_loss=1e-4)
        yield partial(pylogits.score, logits, labels, top_k=3)


def digest(result):
    """Return a hash of the bits of an array, or of a tuple of arrays."""
    parts = result if isinstance(result, tuple) else (result,)
    return hashlib.blake2b(b"".join(np.asarray(part).tobytes() for part in parts)).digest()


@numba.njit(parallel=True)
def count_even(numbers):
    count = 0
    for i in numba.prange(numbers.size):
        count += numbers[i] % 2 == 0
    return count


class Soak:
    """The calls, their results from one thread of each backend, and what the threads count."""

    def __init__(self, backends):
        self.backends = backends
        self.calls = list(calls())
        self.expected, self.differences, self.count = {}, [], 0
        self.lock = threading.Lock()
        self.stop = threading.Event()
        threads = max(2, pylogits.get_num_threads())
        pylogits.set_num_threads(1)
        for name in backends:
            with pylogits.use_backend(name):
                self.expected[name] = [digest(call()) for call in self.calls]
        pylogits.set_num_threads(threads)
        for name in backends:
            with pylogits.use_backend(name):
                for number in range(len(self.calls)):  # once each: Numba compiles another form for several threads
                    self.check(name, number)

    def check(self, name, number):
        call = self.calls[number]
        if digest(call()) != self.expected[name][number]:
            self.differences.append(f"{name}: {call}")

    def caller(self, seed):
        """Make calls drawn at random, on the backends by turns."""
        draw, done = random.Random(seed), 0
        for name in itertools.cycle(self.backends):
            if self.stop.is_set():
                break
            with pylogits.use_backend(name):
                self.check(name, draw.randrange(len(self.calls)))
            done += 1
        with self.lock:
            self.count += done

    def numba_caller(self):
        """A user's own parallel function."""
        numbers = np.arange(1 << 20)
        while not self.stop.is_set():
            if count_even(numbers) != numbers.size // 2:
                self.differences.append("count_even")

    def torch_caller(self):
        logits = torch.zeros((100, 1000))
        expected = torch.softmax(logits, -1)
        while not self.stop.is_set():
            if not torch.equal(torch.softmax(logits, -1), expected):
                self.differences.append("torch.softmax")

    def run(self, seconds):
        """Run all threads; return the resident memory after a third of the time, and at the end."""
        targets = [*(partial(self.caller, seed) for seed in range(CALLERS)), self.numba_caller]
        if torch:
            targets.append(self.torch_caller)
        threads = [threading.Thread(target=target) for target in targets]
        for thread in threads:
            thread.start()
        samples, end = [], time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(seconds / 300)
            samples.append(resident_bytes())
        self.stop.set()
        for thread in threads:
            thread.join()
        window = len(samples) // 6
        return [statistics.median(part) for part in (samples[2 * window : 3 * window], samples[-window:])]


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600)
    seconds = parser.parse_args().seconds
    faulthandler.enable()
    backends = [name for name in pylogits.show_config()["backends"] if name != "reference"]
    soak = Soak(backends)
    count_even(np.arange(10))
    before, after = soak.run(seconds)
    print(f"Numba's layer {numba.threading_layer()}, torch {'beside' if torch else 'not installed'}")
    print(f"{soak.count} calls, {len(soak.differences)} differences")
    print(f"resident memory {before / 2**20:.0f} MiB after warm-up, {after / 2**20:.0f} MiB at the end")
    for difference in soak.differences[:10]:
        print(difference[:500])
    if soak.differences or after - before > MOST_GROWTH:
        sys.exit(1)


if __name__ == "__main__":
    main()
