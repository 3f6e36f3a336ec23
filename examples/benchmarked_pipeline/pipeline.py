"""A NumPy pipeline: from features to the classes of a linear classifier, and to its loss on known classes."""

import numpy as np

import pylogits


def standardise(features):
    """Return features of mean 0 and variance 1."""
    return (features - features.mean(axis=0)) / features.std(axis=0)


def logits_of(features, weight, bias):
    """Return the classifier's raw scores, (rows, classes)."""
    return standardise(features) @ weight.T + bias


def classify(features, weight, bias):
    """Return each row's class and the probability that the classifier gives it."""
    probabilities = pylogits.softmax(logits_of(features, weight, bias))
    classes = probabilities.argmax(axis=1)
    return classes, np.take_along_axis(probabilities, classes[:, None], axis=1)[:, 0]


def evaluate(features, weight, bias, targets):
    """Return the mean loss."""
    return pylogits.cross_entropy(logits_of(features, weight, bias), targets)
