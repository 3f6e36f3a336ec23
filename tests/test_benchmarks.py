"""What the benchmarks conclude from times and counts, and the names in their registry: nothing is timed here."""

import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[1] / "bench"))

import instructions
import suite
from ratios import Ratio, ratio_of, verdict

RNG = np.random.default_rng(0)
LOAD = 1 + RNG.exponential(2, 20)  # a machine that is slower now and then, by up to several times
FASTER, SAME, SLOWER, MUCH_SLOWER = Ratio(0.9, 0.89, 0.91), Ratio(1, 0.99, 1.01), Ratio(1.06, 1.02, 1.1), Ratio(1.2, 1.1, 1.3)


def test_the_median_ratio_and_its_interval():
    assert ratio_of([1.0, 3.0], [1.0, 3.0]) == (1, 1, 1)
    assert ratio_of([2.0, 6.0, 2.0], [2.0, 4.0, 1.0]) == (1.5, 1.0, 2.0)


@pytest.mark.parametrize("slowdown, is_slower", [(1.0, False), (1.03, False), (1.1, True), (0.9, False)])
def test_load_that_both_meet_is_no_difference(slowdown, is_slower):
    jitter = RNG.normal(1, 0.01, (2, 20))
    ratio = ratio_of(LOAD * slowdown * jitter[0], LOAD * jitter[1])
    assert ratio.low < slowdown < ratio.high
    assert ratio.high - ratio.low < 0.05
    assert ratio.is_slower == is_slower


def test_load_that_one_meets_is_not_taken_for_a_slowdown():
    present = np.ones(20)
    present[:8] = 3
    assert ratio_of(present, np.ones(20)) == (1, 1, 3)
    assert not Ratio(1.3, 0.99, 1.6).is_slower


@pytest.mark.parametrize(
    "measured, mildest",
    [
        ([SAME], SAME),
        ([FASTER], FASTER),
        ([MUCH_SLOWER, SAME], SAME),
        ([MUCH_SLOWER, SLOWER, MUCH_SLOWER, FASTER], FASTER),
        ([MUCH_SLOWER, SLOWER, MUCH_SLOWER, MUCH_SLOWER], SLOWER),
    ],
)
def test_what_seems_slower_is_measured_again(measured, mildest):
    left = list(measured)
    assert verdict(lambda: left.pop(0)) == mildest
    assert not left


@pytest.mark.parametrize("counted, failed", [(100, False), (102, False), (103, True), (50, False)])
def test_more_instructions_fail(counted, failed, capsys):
    assert instructions.compare({"avx2": {"softmax": counted}}, {"avx2": {"softmax": 100}}) == failed
    assert ("MORE" in capsys.readouterr().out) == failed


def test_a_call_that_was_never_counted_fails():
    assert instructions.compare({"avx2": {"softmax": 1}}, {})


def test_names_in_the_registry():
    names = Counter(map(str, suite.runs()))
    assert set(names.values()) == {1}
    for shape in "4096x1000", "256x128256", "1000000x10", "16384x128", "1x10", "1000x4096-axis=0":
        for name in "c", "numba", "torch", "jax", "scipy", "onnxruntime", "numpy":
            assert f"softmax-float32-{shape}-{name}-{suite.ALL_THREADS}" in names
