"""What a comparison of two revisions concludes from its times."""

from typing import NamedTuple

import numpy as np

CONFIDENCE = 0.99
RESAMPLES = 10_000
SLOWER = 1.05


class Ratio(NamedTuple):
    """The median ratio of paired times, and where it may lie."""

    median: float
    low: float
    high: float

    def __str__(self):
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"

    @property
    def is_slower(self):
        """Whether it is a slowdown that matters, and not by chance."""
        return self.median > SLOWER and self.low > 1


def ratio_of(present, base, seed=0):
    """Return the `Ratio` of times that were taken by turns, with a bootstrap interval.

    A pair of times of one round has the noise of that moment in common, so that rounds are resampled, not times.
    """
    ratios = np.asarray(present) / np.asarray(base)
    drawn = np.random.default_rng(seed).choice(ratios, (RESAMPLES, len(ratios)))
    low, high = np.quantile(np.median(drawn, axis=1), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Ratio(float(np.median(ratios)), float(low), float(high))


def verdict(measure, again=3):
    """Return the `Ratio` of `measure()`; one that is slower is measured again, and the mildest counts.

    Each call should start afresh: where a process has its memory may make it slower, whatever it runs.
    """
    mildest = measure()
    for _ in range(again):
        if not mildest.is_slower:
            break
        mildest = min(mildest, measure())
    return mildest
