"""What scores add up to: sums and counts, added chunk by chunk and file by file, and the metrics that are made of them."""

from base64 import b64decode, b64encode
from typing import Any, Self

import numpy as np
from numpy.typing import DTypeLike, NDArray

import pylogits

Array = NDArray[Any]

# Bins of the confidence, as in Guo et al. (2017).
BINS = 15

# The range of the loss is not known before its end: steps that a reader can tell apart, and all beyond in the last.
LOSS_STEP = 0.25
LOSS_BINS = 129

# How many rows of the largest losses are kept.
WORST = 20

# Pairs of a target and another prediction that are counted exactly: of 128256 classes there may be 10^10.
PAIRS = 2**18


def tally(numbers: Array, bound: int) -> tuple[Array, Array]:
    """Return which numbers in [0, bound) there are, and how often."""
    if bound > len(numbers):
        return np.unique(numbers, return_counts=True)
    counts = np.bincount(numbers, minlength=bound)  # a quarter of the time
    there = np.flatnonzero(counts)
    return there, counts[there]


def to_text(numbers: Array) -> str:
    """Return int64 or float64 numbers as text: a list of 2^18 took JSON 15 ms."""
    return b64encode(numbers.astype(numbers.dtype.newbyteorder("<")).tobytes()).decode()


def from_text(text: str, dtype: DTypeLike) -> Array:
    """Return the numbers that `to_text` was called on."""
    return np.frombuffer(b64decode(text), np.dtype(dtype).newbyteorder("<")).astype(dtype)


class Pairs:
    """Rows by pair of a target and a wrong prediction, each a number.

    They are exact up to PAIRS different pairs. Beyond, the rarest are dropped and the others are too low by at most `error`
    (Misra and Gries 1982, Agarwal et al. 2012).
    """

    def __init__(self) -> None:
        self.error = 0
        self._added: list[tuple[Array, Array]] = []  # joined when there are many: one by one would take most of the time
        self._size = 0

    def add(self, numbers: Array, rows: Array) -> None:
        """Count rows of some pairs."""
        self._added.append((numbers, rows))
        self._size += len(numbers)
        if self._size > 2 * PAIRS:
            self.counts()

    def counts(self) -> tuple[Array, Array]:
        """Return the pairs, ascending, and the rows of each."""
        if not self._added:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        if len(self._added) > 1 or self._size > PAIRS:
            added, added_rows = map(np.concatenate, zip(*self._added, strict=True))
            numbers, places = np.unique(added, return_inverse=True)
            rows = np.bincount(places, added_rows).astype(np.int64)
            if len(rows) > PAIRS:
                rarest = int(np.partition(rows, -PAIRS - 1)[-PAIRS - 1])
                numbers, rows = numbers[rows > rarest], rows[rows > rarest] - rarest
                self.error += rarest
            self._added, self._size = [(numbers, rows)], len(numbers)
        return self._added[0]


class Metrics:
    """Sums over scored rows."""

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self.rows = 0
        self.labelled_rows = 0
        self.nan_rows = 0  # which have no confidence
        self.loss = 0.0
        self.brier = 0.0
        self.top_k_correct = 0
        self.bin_rows = np.zeros(BINS, np.int64)
        self.bin_confidence = np.zeros(BINS)
        self.bin_correct = np.zeros(BINS, np.int64)
        self.loss_rows = np.zeros(LOSS_BINS, np.int64)
        self.prediction_rows = np.zeros(classes, np.int64)
        self.target_rows = np.zeros(classes, np.int64)
        self.correct_rows = np.zeros(classes, np.int64)
        self.pairs = Pairs()  # by target * classes + prediction
        self.worst: list[tuple[float, str, int, int, int, float]] = []  # loss, file, row, target, prediction, confidence

    def add(self, name: str, scores: pylogits.Scores, brier: Array | None, targets: Array | None) -> None:
        """Count in a chunk of rows of the file `name`, which follow on those counted before; `brier` has a score a row."""
        finite = ~np.isnan(scores.confidence)
        kept = slice(None) if finite.all() else finite
        confidence = scores.confidence[kept]
        # Bins are open to the left and closed to the right: a confidence of 1 is in the last.
        bins = np.minimum(np.ceil(confidence * BINS), BINS).astype(np.int64) - 1
        self.bin_rows += np.bincount(bins, minlength=BINS)
        self.bin_confidence += np.bincount(bins, confidence, BINS)
        self.nan_rows += len(finite) - len(bins)
        predicted, rows = tally(scores.prediction, self.classes)
        self.prediction_rows[predicted] += rows
        if targets is not None and scores.loss is not None and scores.correct is not None and brier is not None:
            self.bin_correct += np.bincount(bins, scores.correct[kept], BINS).astype(np.int64)
            self._add_targets(name, scores, scores.loss.astype(np.float64), targets.astype(np.int64))
            self.brier += float(brier.sum(dtype=np.float64))
        self.rows += len(scores.prediction)

    def _add_targets(self, name: str, scores: pylogits.Scores, loss: Array, targets: Array) -> None:
        self.labelled_rows += len(targets)
        self.loss += float(loss.sum())
        numbers = np.flatnonzero(~np.isnan(loss))
        self.top_k_correct += int((scores.top_k_indices == targets[:, None]).any(axis=1).sum())
        steps = np.minimum(loss[numbers] / LOSS_STEP, LOSS_BINS - 1).astype(np.int64)
        self.loss_rows += np.bincount(steps, minlength=LOSS_BINS)
        pairs, rows = tally(targets * self.classes + scores.prediction, self.classes**2)
        target, predicted = np.divmod(pairs, self.classes)
        correct = target == predicted
        np.add.at(self.target_rows, target, rows)
        self.correct_rows[target[correct]] += rows[correct]
        self.pairs.add(pairs[~correct], rows[~correct])
        # The chunk's largest, and of equal ones the first; sorting all of them would take most of the time.
        candidates = numbers
        if len(self.worst) == WORST:
            candidates = np.flatnonzero(loss > self.worst[-1][0])
        if len(candidates) > WORST:
            least = np.partition(loss[candidates], -WORST)[-WORST]
            candidates = candidates[loss[candidates] >= least]
        candidates = candidates[np.argsort(-loss[candidates], kind="stable")[:WORST]]
        self._add_worst(
            (float(loss[i]), name, self.rows + int(i), int(targets[i]), int(scores.prediction[i]), float(scores.confidence[i]))
            for i in candidates
        )

    def _add_worst(self, worst: Any) -> None:
        self.worst = sorted([*self.worst, *worst], key=lambda row: -row[0])[:WORST]

    def merge(self, other: Self) -> Self:
        """Count in the rows of another file, and return the sums of both."""
        for name, value in vars(other).items():
            if name not in ("classes", "pairs", "worst"):
                setattr(self, name, getattr(self, name) + value)
        self.pairs.add(*other.pairs.counts())
        self.pairs.error += other.pairs.error
        self._add_worst(other.worst)
        return self

    def to_json(self) -> dict[str, Any]:
        """Return the sums as what JSON can hold, to the last bit; of arrays what is not 0."""
        table: dict[str, Any] = {}
        for name, value in vars(self).items():
            if isinstance(value, np.ndarray):
                where = np.flatnonzero(value)
                table[name] = [to_text(where), to_text(value[where])]
            elif isinstance(value, Pairs):
                table[name] = [*map(to_text, value.counts()), value.error]
            else:
                table[name] = value
        return table

    @classmethod
    def from_json(cls, table: dict[str, Any]) -> Self:
        """Return the sums that `to_json` was called on."""
        metrics = cls(table["classes"])
        for name, value in table.items():
            old = getattr(metrics, name)
            if isinstance(old, np.ndarray):
                old[from_text(value[0], np.int64)] = from_text(value[1], old.dtype)
            elif isinstance(old, Pairs):
                old.add(from_text(value[0], np.int64), from_text(value[1], np.int64))
                old.error = value[2]
            else:
                setattr(metrics, name, value)
        metrics.worst = [tuple(row) for row in table["worst"]]
        return metrics

    # ---- the metrics ----

    @property
    def mean_loss(self) -> float:
        """The mean cross entropy, in nats."""
        return self.loss / self.labelled_rows

    @property
    def calibration_error(self) -> float:
        """The expected calibration error: how far confidence is from accuracy, over bins (Guo et al. 2017)."""
        return float(abs(self.bin_correct - self.bin_confidence).sum()) / self.labelled_rows

    def summary(self, top_k: int) -> dict[str, float]:
        """Return the metrics by name; those of targets where there are any."""
        if not self.labelled_rows:
            return {}
        with np.errstate(over="ignore"):
            perplexity = float(np.exp(self.mean_loss))
        summary = {
            "mean loss": self.mean_loss,
            "accuracy": float(self.correct_rows.sum()) / self.labelled_rows,
            "perplexity": perplexity,
            "expected calibration error": self.calibration_error,
            "Brier score": self.brier / self.labelled_rows,
        }
        if top_k > 1:
            summary[f"top-{top_k} accuracy"] = self.top_k_correct / self.labelled_rows
        return summary

    def confusions(self, count: int) -> list[tuple[int, int, int]]:
        """Return the commonest pairs: rows, target, wrong prediction."""
        numbers, rows = self.pairs.counts()
        commonest = np.argsort(-rows, kind="stable")[:count]
        return [(int(rows[i]), *divmod(int(numbers[i]), self.classes)) for i in commonest]
