"""Probabilities from a scikit-learn classifier that has none, with the temperature that suits them best.

A ridge classifier gives scores for each class, but no probabilities. A step of a pipeline turns them into some, and a grid
search finds its temperature as it finds any other parameter.
"""

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.datasets import load_wine
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.model_selection import GridSearchCV, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import pylogits


class SoftmaxClassifier(ClassifierMixin, BaseEstimator):
    """A classifier of three or more classes, its scores taken for logits."""

    def __init__(self, classifier, temperature=1.0):
        self.classifier = classifier
        self.temperature = temperature

    def fit(self, X, y):
        self.classifier_ = clone(self.classifier).fit(X, y)
        self.classes_ = self.classifier_.classes_
        return self

    def predict(self, X):
        return self.classifier_.predict(X)

    def predict_proba(self, X):
        return pylogits.softmax(self.classifier_.decision_function(X), temperature=self.temperature)


wines, cultivars = load_wine(return_X_y=True)
X, X_test, y, y_test = train_test_split(wines, cultivars, test_size=0.5, random_state=0, stratify=cultivars)

pipeline = make_pipeline(StandardScaler(), SoftmaxClassifier(RidgeClassifier()))
search = GridSearchCV(
    pipeline, {"softmaxclassifier__temperature": [1.0, 0.5, 0.2, 0.1, 0.05]}, scoring="neg_log_loss", cv=3
).fit(X, y)

print("temperature  log-loss in cross-validation")
for parameters, value in zip(search.cv_results_["params"], search.cv_results_["mean_test_score"], strict=True):
    print(f"{parameters['softmaxclassifier__temperature']:11}  {-value:.4f}")
accuracy = search.best_estimator_.score(X_test, y_test)
print(f"accuracy {accuracy:.4f}, log-loss {-search.score(X_test, y_test):.4f} on the test set")

# Where a classifier has probabilities of its own, from scores that are logits, these are the same.
logistic = make_pipeline(StandardScaler(), LogisticRegression()).fit(X, y)
same = make_pipeline(StandardScaler(), SoftmaxClassifier(LogisticRegression())).fit(X, y)
difference = np.abs(logistic.predict_proba(X_test) - same.predict_proba(X_test)).max()
print(f"largest difference to LogisticRegression's own probabilities {difference:.1e}")
