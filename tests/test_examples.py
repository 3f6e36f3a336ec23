"""The scripts of examples/, run as a reader would run them."""

import json
import os
import re
import shutil
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
    made, shipped = (np.load(folder / "digits.npz") for folder in (tmp_path, EXAMPLES))
    for name, dtype, shape in ("images", np.uint8, (1797, 64)), ("targets", np.int64, (1797,)):
        assert made[name].dtype == shipped[name].dtype == dtype
        assert made[name].shape == shipped[name].shape == shape
        np.testing.assert_array_equal(made[name], shipped[name])


@pytest.mark.parametrize("options, last", [((), 0.1556), (("0.1", "0.001"), 0.6898)])
def test_train_digits(options, last):
    *losses, accuracy = numbers(run("train_digits.py", *options))
    assert len(losses) == 7 and losses == sorted(losses, reverse=True)
    assert losses[0] == 2.3026  # log(10)
    np.testing.assert_allclose(losses[-1], last, atol=1e-3)
    assert 0.96 < accuracy < 0.975


def test_perplexity():
    """The literals are from the counts of pairs as fractions: no logits, no softmax."""
    letters, table, total = re.split("\nlog-probability  |\nmean loss", run("perplexity.py"))
    assert numbers(letters) == [-4.43, -3.3, -3.74, -3.3, -3.3, -4.43, -3.3, -3.5, -3.91, -3.3]
    np.testing.assert_allclose(
        numbers(table),
        [-51.62658144, 10.45063553, -35.60159268, 12.71739709, -36.48701811, 38.42475108],
        atol=1e-4,
    )
    np.testing.assert_allclose(numbers(total), [2.6894607, 14.72373328, 6.51738101], atol=1e-6)


def test_calibrated_pipeline():
    pytest.importorskip("sklearn")
    table, accuracy, difference = re.split("accuracy|largest", run("calibrated_pipeline.py"))
    temperatures, losses = np.reshape(numbers(table), (-1, 2)).T
    assert temperatures.tolist() == [1.0, 0.5, 0.2, 0.1, 0.05]
    np.testing.assert_allclose(losses, [0.4184, 0.2197, 0.1616, 0.2451, 0.4591], atol=2e-4)
    np.testing.assert_allclose(numbers(accuracy), [0.9775, 0.0638], atol=2e-4)
    assert float(difference.split()[-1]) < 1e-14


def test_boosted_trees():
    pytest.importorskip("xgboost")
    pytest.importorskip("lightgbm")
    pytest.importorskip("sklearn")
    for library, text in zip(("XGBoost", "LightGBM"), run("boosted_trees.py").split("LightGBM, own"), strict=True):
        loss, accuracy, *built_in, _ = numbers(text)
        np.testing.assert_allclose(built_in, [loss, accuracy], atol=1e-5)
        assert 0.3 < loss < 0.7 and 0.9 < accuracy < 0.95, library
        assert float(text.split()[-1]) < 1e-4, "largest difference of a logit"


def test_load_test():
    for package in ("fastapi", "uvicorn", "httpx"):
        pytest.importorskip(package)
    answers, times, refused = run("load_test.py", "300").splitlines()
    assert answers == "300 of 300 answers right, 20 rows each"
    p50, p99 = numbers(times)
    assert 0 < p50 <= p99
    assert refused == "a bad request: 422 temperature must be positive and finite in float64, not 0.0"


def test_xarray_scores():
    pytest.importorskip("xarray")
    probabilities, losses = run("xarray_scores.py").split("mean loss")
    logits, targets = (np.load(EXAMPLES / f"digits_{name}.npy").astype(np.float64) for name in ("logits", "targets"))
    powers = np.exp(logits[0] / 2)
    np.testing.assert_allclose(numbers(probabilities), powers / powers.sum(), atol=6e-5)
    each = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(logits)), targets.astype(int)]
    means = [each[targets == digit].mean() for digit in range(10)]
    np.testing.assert_allclose(numbers(losses), means, atol=6e-5)


@pytest.fixture(scope="module")
def benchmarked(tmp_path_factory):
    """Run the benchmarked pipeline's tests in a copy of its folder."""
    folder = tmp_path_factory.mktemp("pipeline") / "benchmarked"
    shutil.copytree(EXAMPLES / "benchmarked_pipeline", folder)

    def run(*options):
        command = [sys.executable, "-m", "pytest", "-q", "--benchmark-max-time=0.05", *options]
        # With it set, pytest-benchmark times nothing.
        environment = {name: value for name, value in os.environ.items() if name != "PYTEST_XDIST_WORKER"}
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)

    done = run("--benchmark-save=base")
    assert done.returncode == 0, done.stdout + done.stderr
    return run, next(folder.glob(".benchmarks/*/0001_base.json"))


@pytest.mark.parametrize("share, expected", [(1000, 0), (0.001, 1)])
def test_the_gate_of_the_pipeline(benchmarked, share, expected):
    """Against a base that took so much of the time, which no machine's noise makes up for."""
    run, base = benchmarked
    kept = json.loads(base.read_text())
    for benchmark in kept["benchmarks"]:
        benchmark["stats"]["median"] *= share
    other = base.with_name("0002_other.json")
    other.write_text(json.dumps(kept))
    done = run("--benchmark-compare=0002", "--benchmark-compare-fail=median:10%")
    assert done.returncode == expected, done.stdout + done.stderr
    assert ("Performance has regressed" in done.stdout + done.stderr) == bool(expected)
