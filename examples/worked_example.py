"""From logits to probabilities and losses, and the mistakes on the way."""

import warnings

import numpy as np

import pylogits

logits = np.array([[0.5, 1.5, 0.1], [2.2, 1.3, 1.7]])
classes = np.array([1, 2])
labels = pylogits.one_hot(classes, 3, dtype=np.float64)

probabilities = pylogits.softmax(logits)
dense = pylogits.softmax_cross_entropy_with_logits(labels=labels, logits=logits)
sparse = pylogits.sparse_softmax_cross_entropy_with_logits(labels=classes, logits=logits)

print(f"""\
Logits are a classifier's raw scores, any real numbers: a row per example, a column per class.
{logits}

softmax turns each row into probabilities, which sum to 1:
{probabilities}

The right classes are {classes}. A row's loss is -log of the probability of its right class:
{dense}  softmax_cross_entropy_with_logits, from one-hot labels
{sparse}  sparse_softmax_cross_entropy_with_logits, from class numbers
{sparse.mean():.7f}                their mean
""")

twice = pylogits.sparse_softmax_cross_entropy_with_logits(labels=classes, logits=probabilities)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    pylogits.check_logits(probabilities)

print(f"""\
Mistake 1: softmax twice. The losses take logits; given probabilities, they answer with
{twice}  mean {twice.mean():.7f}: another loss, and no error.
check_logits notices: {caught[0].message}
""")

negative = pylogits.sparse_softmax_cross_entropy_with_logits(labels=classes, logits=logits - 3)

print(f"""\
Mistake 2: the log of logits, which may be negative. The log of a softmax is always defined, and
3 less on every logit changes nothing:
{negative}
""")

confident = np.array([[0.0, 1000.0]])
fused = pylogits.sparse_softmax_cross_entropy_with_logits(labels=np.array([0]), logits=confident)

print(f"""\
Mistake 3: a softmax and then a log. For the logits {confident[0]} and the class 0
{pylogits.softmax(confident)[0]}  is the softmax, and -log(0) is infinite
{fused}   is the loss, from the logits in one step""")
