"""A multi-class objective of one's own for XGBoost and LightGBM, beside the one that each has built in.

The results are the same. What the built-in ones lack may be added here: label smoothing, say, is one more argument.
"""

import lightgbm
import numpy as np
import xgboost
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import pylogits

CLASSES = 10
ROUNDS = 10


def slopes(logits, labels, factor):
    """The gradient, p - q, and the diagonal of the Hessian, p (1 - p), by logits of shape (rows, classes).

    Both libraries take a multiple of the Hessian: with more than two classes the diagonal alone is too steep a step.
    """
    _, gradient = pylogits.cross_entropy_value_and_grad(logits, labels.astype(np.int64), reduction="sum")
    probabilities = pylogits.softmax(logits)
    return gradient, factor * probabilities * (1 - probabilities)


def xgboost_objective(logits, data):
    return slopes(logits, data.get_label(), factor=2)


def lightgbm_objective(logits, data):
    return slopes(logits, data.get_label(), factor=CLASSES / (CLASSES - 1))


images, digits = load_digits(return_X_y=True)
X, X_test, y, y_test = train_test_split(images, digits, test_size=0.5, random_state=0, stratify=digits)


def train_xgboost(objective=None):
    parameters = {"objective": "multi:softprob", "num_class": CLASSES, "max_depth": 4, "base_score": 0, "nthread": 2}
    data = xgboost.DMatrix(X, y)
    booster = xgboost.train(parameters, data, ROUNDS, obj=objective)
    return booster.predict(xgboost.DMatrix(X_test), output_margin=True)


def train_lightgbm(objective="multiclass"):
    parameters = {
        "objective": objective,
        "num_class": CLASSES,
        "boost_from_average": False,
        "num_threads": 2,
        "verbose": -1,
    }
    booster = lightgbm.train(parameters, lightgbm.Dataset(X, y), ROUNDS)
    return booster.predict(X_test, raw_score=True)


for name, own, built_in in (
    ("XGBoost", train_xgboost(xgboost_objective), train_xgboost()),
    ("LightGBM", train_lightgbm(lightgbm_objective), train_lightgbm()),
):
    for title, logits in ((f"{name}, own", own), (f"{name}, built in", built_in)):
        loss = pylogits.cross_entropy(logits, y_test)
        accuracy = np.mean(logits.argmax(axis=1) == y_test)
        print(f"{title:18}  loss {loss:.6f}  accuracy {accuracy:.4f}")
    print(f"{'':18}  largest difference of a logit {np.abs(own - built_in).max():.1e}")
