"""The scripts of examples/, run as a reader would run them."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(script, *arguments):
    command = [sys.executable, EXAMPLES / script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def numbers(text):
    return [float(number) for number in re.findall(r"-?\d+\.\d*", text)]


def test_worked_example():
    intro, twice, negative, unfused = run("worked_example.py").split("Mistake")
    softmax = [0.227863, 0.61939586, 0.15274114, 0.49674623, 0.20196195, 0.30129182]
    losses = [0.4790107, 1.19967598]
    np.testing.assert_allclose(
        numbers(intro),
        [0.5, 1.5, 0.1, 2.2, 1.3, 1.7, *softmax, *losses, *losses, 0.8393433],
        rtol=1e-7,
    )
    twice, _, notice = twice.partition("check_logits notices: ")
    np.testing.assert_allclose(numbers(twice), [0.83426317, 1.13825193, 0.9862576], rtol=1e-7)
    assert "probabilities" in notice
    np.testing.assert_allclose(numbers(negative), losses, rtol=1e-7)
    assert numbers(unfused) == [0, 1000, 0, 1, 1000]


def test_digits_are_those_that_the_script_makes(tmp_path):
    pytest.importorskip("sklearn")
    assert "899 rows of 10 logits, accuracy 0.9611" in run("make_digits.py", tmp_path)
    made, shipped = (np.load(folder / "digits_logits.npy") for folder in (tmp_path, EXAMPLES))
    assert made.dtype == shipped.dtype == np.float32
    assert made.shape == shipped.shape == (899, 10)
    np.testing.assert_allclose(made, shipped, atol=1e-3)
    made, shipped = (np.load(folder / "digits_targets.npy") for folder in (tmp_path, EXAMPLES))
    assert made.dtype == shipped.dtype == np.int64
    np.testing.assert_array_equal(made, shipped)
    assert np.bincount(shipped).tolist() == [89, 91, 88, 92, 91, 91, 91, 89, 87, 90]
