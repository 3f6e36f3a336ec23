"""What the pipeline returns, and how long it takes: each benchmark is a test of the result, too."""

import numpy as np
import pytest
from pipeline import classify, evaluate

import pylogits

ROWS, FEATURES, CLASSES = 4096, 64, 100


@pytest.fixture(scope="module")
def model():
    rng = np.random.default_rng(0)
    return rng.standard_normal((ROWS, FEATURES)), rng.standard_normal((CLASSES, FEATURES)) / 8, np.zeros(CLASSES)


@pytest.fixture(autouse=True)
def one_thread():
    """What one core does depends less on what else the machine does."""
    before = pylogits.get_num_threads()
    pylogits.set_num_threads(1)
    yield
    pylogits.set_num_threads(before)


def test_classify(benchmark, model):
    classes, confidence = benchmark(classify, *model)
    assert classes.shape == confidence.shape == (ROWS,)
    assert (confidence >= 1 / CLASSES).all()


def test_evaluate(benchmark, model):
    targets, confidence = classify(*model)
    loss = benchmark(evaluate, *model, targets)
    np.testing.assert_allclose(loss, -np.log(confidence).mean())
