"""Train a classifier of handwritten digits with NumPy and one call of pylogits a step.

Run as ``python train_digits.py [LABEL_SMOOTHING [WEIGHT_DECAY]]``; both are 0 by default.
"""

import sys
from pathlib import Path

import numpy as np

import pylogits

label_smoothing, weight_decay = [*map(float, sys.argv[1:]), 0.0, 0.0][:2]
learning_rate = 1.0
epochs = 300

digits = np.load(Path(__file__).parent / "digits.npz")
images = digits["images"].astype(np.float32) / 16
targets = digits["targets"]

# Every third image is for the test. Neighbours in the file mostly share a writer: a cut at its end would ask about other
# hands than those learnt, and cost some 5 points.
test = np.arange(len(images)) % 3 == 0
train_images, train_targets = images[~test], targets[~test]

# Zeros will do as a start: the loss is convex, and the first one is that of a guess, log(10).
weights = np.zeros((64, 10), np.float32)
bias = np.zeros(10, np.float32)

for epoch in range(epochs + 1):
    logits = train_images @ weights + bias
    # The loss and its gradient in one call. Nobody needs the logits afterwards, so the gradient takes their place.
    loss, grad = pylogits.cross_entropy_value_and_grad(logits, train_targets, label_smoothing=label_smoothing, grad_out=logits)
    if epoch % 50 == 0:
        print(f"epoch {epoch:3}  loss {loss:.4f}")
    # From here on it is the chain rule of a linear layer. The bias doesn't decay: it only says how frequent a class is.
    weights -= learning_rate * (train_images.T @ grad + weight_decay * weights)
    bias -= learning_rate * grad.sum(axis=0)

predictions = (images[test] @ weights + bias).argmax(axis=1)
accuracy = np.mean(predictions == targets[test])
print(f"accuracy {accuracy:.4f} on {len(predictions)} images that it has not seen")
