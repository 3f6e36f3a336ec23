"""The registry of what is timed: each case, by whom and on how many threads. `make bench` and its kin all run it.

What is promised is in `limits.py` (one operation) and `losses.py` (losses, gradients and options); the sweeps are for charts.
"""

from dataclasses import dataclass
from functools import lru_cache

import losses
import peers
from limits import LARGE, LIMITS, ROWS, compiled, limit_call, limit_of
from side_by_side import medians
from timed import SWEEPS, Case, arguments, check, label, moved_bytes, worst_ulp

import pylogits

ALL_THREADS = pylogits.get_num_threads()
PROMISED = {*(row.case for row in ROWS), *losses.CASES}


@dataclass(frozen=True)
class Run:
    """A case of `timed.py` or of `losses.py`, a backend or peer, and a number of threads."""

    case: Case | losses.Loss
    by: str
    threads: int

    def __str__(self):
        return f"{self.label.replace(' x ', 'x').replace(' ', '-')}-{self.by}-{self.threads}"

    @property
    def is_loss(self):
        return isinstance(self.case, losses.Loss)

    @property
    def label(self):
        return str(self.case) if self.is_loss else label(self.case)

    @property
    def op(self):
        return self.case.function if self.is_loss else self.case.op

    @property
    def option(self):
        return self.case.option if self.is_loss else ""

    def prepare(self):
        """Return a function that computes the case; ImportError where it can't be."""
        return (losses if self.is_loss else peers).prepare(self.by, self.case)

    def check(self, result):
        """Raise where a result is wrong."""
        if self.is_loss:
            losses.check(self.case, self.by, result)
        else:
            check(self.case, result)

    def facts(self, seconds, result):
        """Return what belongs beside a time: the speed, the share of the limit, the error."""
        moved = losses.moved_bytes(self.case) if self.is_loss else moved_bytes(self.case)
        facts = {"GB/s": moved / seconds / 1e9}
        limit = self.case.limit if self.is_loss else limit_of(self.case)
        like = Case("softmax", self.case.dtype, self.case.shape) if self.is_loss else self.case
        if limit in LIMITS and arguments(like)["logits"].nbytes >= LARGE:
            facts |= {"limit": limit, "of the limit": seconds / limit_seconds(like, self.threads)}
        if not self.is_loss and result.itemsize > 2:
            facts["worst ulp"] = float(worst_ulp(self.case, result))
        return facts


library = lru_cache(compiled)


@lru_cache(maxsize=2)
def limit_seconds(case, threads):
    """Return the time of a case's limit, on the threads that are set."""
    assert threads == pylogits.get_num_threads()
    return medians({"limit": limit_call(library(), case)})["limit"]


def runs():
    """Yield all, case by case. Only what is promised is timed on one thread too."""
    for case in dict.fromkeys([*(row.case for row in ROWS), *losses.CASES, *SWEEPS, *losses.SWEEPS]):
        names = losses.names(case) if isinstance(case, losses.Loss) else (*peers.BACKENDS, *peers.PEERS)
        for name in names:
            if name in peers.BACKENDS and case in PROMISED and ALL_THREADS > 1:
                yield Run(case, name, 1)
            yield Run(case, name, ALL_THREADS)
