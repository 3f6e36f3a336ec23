"""The pictures of docs/logits.md, as SVG files in docs/figures/: `make docs` runs this."""

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import pyplot as plt

import pylogits

FOLDER = Path(__file__).parent / "figures"
# All three are readable on a light and on a dark page.
GREY, BLUE, ORANGE = "#808080", "#4c8ed9", "#e07b39"
LOGITS = np.array([[0.5, 1.5, 0.1], [2.2, 1.3, 1.7]])
LABELS = np.array([1, 2])
PROBABILITIES = pylogits.softmax(LOGITS)
LOSSES = pylogits.sparse_softmax_cross_entropy_with_logits(labels=LABELS, logits=LOGITS)

matplotlib.use("svg")
plt.rcParams |= {
    "svg.fonttype": "none",  # text stays text, in the page's own sans-serif
    "svg.hashsalt": "pylogits",  # the same picture is the same file
    "font.family": "sans-serif",
    "font.size": 11,
    "text.color": GREY,
    "axes.edgecolor": GREY,
    "axes.labelcolor": GREY,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "legend.frameon": False,
    "lines.linewidth": 2,
}


def draw_softmax():
    """Two rows of logits, and what softmax makes of them."""
    figure, rows = plt.subplots(2, 2, figsize=(4.6, 3.8), sharex=True, sharey="col", layout="constrained")
    for (left, right), logits, probabilities, label, loss in zip(rows, LOGITS, PROBABILITIES, LABELS, LOSSES, strict=True):
        colours = [ORANGE if number == label else BLUE for number in range(3)]
        left.bar_label(left.bar(range(3), logits, color=colours), fmt="%.1f")
        right.bar_label(right.bar(range(3), probabilities, color=colours), fmt="%.3f")
        right.set_xlabel(f"loss = -log {probabilities[label]:.3f} = {loss:.3f}", color=ORANGE)
        left.set(xticks=range(3), ylim=(0, 2.8))
        right.set(ylim=(0, 0.78))
        for axes in (left, right):
            axes.yaxis.set_visible(False)
            axes.spines.left.set_visible(False)
    rows[0, 0].set_title("logits", color=GREY)
    rows[0, 1].set_title("softmax(logits)", color=GREY)
    for left, _ in rows:
        left.set_xlabel("class")
    return figure


def draw_loss():
    """The loss against the probability of the right class."""
    figure, axes = plt.subplots(figsize=(4.6, 3.0), layout="constrained")
    p = np.linspace(0.01, 1, 200)
    axes.plot(p, -np.log(p), color=BLUE)
    for row, (label, loss) in enumerate(zip(LABELS, LOSSES, strict=True)):
        point = (PROBABILITIES[row, label], loss)
        axes.plot(*point, "o", color=ORANGE)
        axes.annotate(f"row {row}: {loss:.3f}", point, (8, 8), textcoords="offset points", color=ORANGE)
    axes.set(xlabel="probability of the right class", ylabel="loss = -log p", xlim=(0, 1.02), ylim=(0, 4.7))
    return figure


def draw_twice():
    """The loss of the logits [x, 0, 0] for class 0, and what becomes of it after a softmax too many."""
    figure, axes = plt.subplots(figsize=(4.6, 3.0), layout="constrained")
    x = np.linspace(-2, 10, 200)
    logits = np.stack([x, 0 * x, 0 * x], axis=-1)
    labels = np.zeros(len(x), np.int64)
    for given, name, colour in ((logits, "logits", BLUE), (pylogits.softmax(logits), "softmax(logits), by mistake", ORANGE)):
        losses = pylogits.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=given)
        axes.plot(x, losses, color=colour, label=name)
    floor = np.log1p(2 / np.e)  # of the probabilities [1, 0, 0], taken for logits
    axes.annotate(f"never below {floor:.3f}", (7, floor), (0, 8), textcoords="offset points", ha="center", color=ORANGE)
    axes.set(xlabel="x, of the logits [x, 0, 0] with label 0", ylabel="loss", xlim=(-2, 10), ylim=(0, 2.6))
    axes.legend(title="the loss is given")
    return figure


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for draw in (draw_softmax, draw_loss, draw_twice):
        path = FOLDER / f"{draw.__name__.removeprefix('draw_')}.svg"
        draw().savefig(path, transparent=True, metadata={"Date": None, "Creator": None})
