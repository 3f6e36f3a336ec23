"""One job: parts that are scored one after the other here, or beside each other by the workers of a Dask cluster."""

import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial, reduce
from pathlib import Path
from threading import Event
from typing import Any, TypeVar

import numpy as np

import pylogits
from pylogits.batch.metrics import Metrics
from pylogits.batch.readers import (
    STANDARD_INPUT,
    Array,
    FileError,
    Source,
    Targets,
    open_logits,
    open_source,
    standard_input,
)
from pylogits.batch.writers import Chunks, Columns, replacing, write
from pylogits.scoring import score_with_brier

S = TypeVar("S")
T = TypeVar("T")

# Calls a function with every part and gives the results in the parts' order: here, or on a cluster.
Each = Callable[[Callable[["Part"], T], list["Part"]], Iterable[T]]

# The targets of a chunk, its scores, and its Brier scores.
Scored = tuple[Array | None, pylogits.Scores, Array | None]

# Is called with numbers of rows that are done.
Done = Callable[[int], None]

COLUMNS = ("prediction", "confidence", "entropy", "logsumexp", "loss", "correct")
TOP_K_COLUMNS = ("top_k_indices", "top_k_probabilities")
TARGET_COLUMNS = ("loss", "correct")

# Chunks under way at a time, each in memory, however many cores there are.
THREADS = 8

# Of scores that are counted and written together: of long rows, each chunk has so few that calls would take most of the time.
GATHERED_BYTES = 2**20

# A fitted temperature lies between 2 to this power and its inverse.
TEMPERATURES = 10


@dataclass(frozen=True)
class Options:
    """What scores depend on besides the files."""

    logits_name: str | None = None
    targets_name: str | None = None
    axis: int = -1
    top_k: int = 1
    temperature: float = 1.0
    columns: tuple[str, ...] | None = None
    dtype: str = "float32"  # of standard input, as the next
    classes: int = 0


@dataclass(frozen=True)
class Part:
    """A file of logits, and what belongs to it."""

    name: str  # for people
    logits: Path
    targets: Path | None
    out: Path | None = None  # where its scores go, if into a file of their own

    @property
    def record(self) -> Path:
        """The file beside the scores that says what they are of."""
        return self.out.with_name(f"{self.out.name}.json") if self.out else Path()


def here(function: Callable[[Part], T], parts: list[Part]) -> Iterable[T]:
    """Call a function with every part, in this process."""
    return map(function, parts)


def nothing(rows: int) -> None:
    """Do nothing about rows that are done."""


@contextmanager
def open_part(part: Part, options: Options) -> Iterator[tuple[Source, Targets | None]]:
    """Open a part's files."""
    with ExitStack() as stack:
        if part.logits == STANDARD_INPUT:
            logits: Source = standard_input(options.dtype, options.classes)
        else:
            logits = stack.enter_context(open_logits(part.logits, options.logits_name, options.axis))
        targets = None
        if part.targets is not None:
            source = stack.enter_context(open_source(part.targets, options.targets_name, "targets"))
            targets = Targets(source, logits)
        yield logits, targets


def beside(function: Callable[[S], T], items: Iterator[S]) -> Iterator[T]:
    """Make items and call a function with each, in several threads; the results in the items' order.

    One item is made at a time, by the thread that then works on it: so it is in the cache of its core, and no thread waits for
    another at the end of an item, as those that share one do.
    """
    threads = min(pylogits.get_num_threads(), THREADS)

    def call(before: Event, made: Event) -> tuple[T] | None:
        before.wait()
        try:
            item = next(items, None)
        finally:
            made.set()
        return None if item is None else (function(item),)

    with ThreadPoolExecutor(threads) as pool:
        made = Event()
        made.set()
        coming: deque[Future[tuple[T] | None]] = deque()
        while True:
            while len(coming) <= threads:
                before, made = made, Event()
                coming.append(pool.submit(call, before, made))
            if (result := coming.popleft().result()) is None:
                return
            yield result[0]


# ---- scores ----


def score_chunks(part: Part, options: Options, metrics: Metrics, done: Done) -> Chunks:
    """Score a part's rows, chunk by chunk, and count them."""
    with open_part(part, options) as (logits, targets):
        rows = ((chunk, None if targets is None else targets.take(len(chunk))) for chunk in logits.chunks(1))
        for labels, scores, brier in gathered(scored(rows, part, options, done)):
            metrics.add(part.name, scores, brier, labels)
            yield to_columns(scores, options.columns)
        if targets is not None:
            targets.finish()


def scored(rows: Iterator[tuple[Array, Array | None]], part: Part, options: Options, done: Done) -> Iterator[Scored]:
    """Score chunks of a part's rows, several at a time, and say how far it is."""
    for result in beside(partial(score_rows, part, options), rows):
        done(len(result[1].prediction))
        yield result


def gathered(results: Iterator[Scored]) -> Iterator[Scored]:
    """Join results until they have GATHERED_BYTES."""
    waiting: list[Scored] = []
    size = 0
    for result in results:
        waiting.append(result)
        size += sum(array.nbytes for array in result[1] if array is not None)
        if size >= GATHERED_BYTES:
            yield joined(waiting)
            waiting, size = [], 0
    if waiting:
        yield joined(waiting)


def joined(results: list[Scored]) -> Scored:
    """Return the results of some chunks as those of one."""

    def join(arrays: tuple[Any, ...]) -> Any:
        return arrays[0] if len(arrays) == 1 or arrays[0] is None else np.concatenate(arrays)

    labels, scores, brier = zip(*results, strict=True)
    return join(labels), pylogits.Scores(*map(join, zip(*scores, strict=True))), join(brier)


def score_rows(part: Part, options: Options, rows: tuple[Array, Array | None]) -> Scored:
    """Score a chunk of a part's rows in this thread: the targets, the scores and the Brier scores."""
    logits, targets = rows
    try:
        return targets, *score_with_brier(logits, targets, -1, options.top_k, options.temperature, threads=1)
    except (TypeError, ValueError) as error:
        raise FileError(part.logits, error) from None


def to_columns(scores: pylogits.Scores, names: tuple[str, ...] | None) -> Columns:
    """Return the fields of these names; without names all, but top-k only where it is more than the prediction."""
    if names is None:
        names = COLUMNS if scores.top_k_indices.shape[-1] == 1 else COLUMNS + TOP_K_COLUMNS
    fields = {name: getattr(scores, name) for name in names}
    return {name: values for name, values in fields.items() if values is not None}


def check_targets(part: Part, options: Options) -> None:
    """Refuse bad targets of a part."""
    with open_part(part, options) as (_, targets):
        if targets is not None:
            targets.check()


def count_part(part: Part, options: Options, done: Done = nothing) -> Metrics:
    """Count a part's rows without writing their scores."""
    check_targets(part, options)
    metrics = Metrics(options.classes)
    for _ in score_chunks(part, options, metrics, done):
        pass
    return metrics


def score_part(part: Part, options: Options, resume: bool, done: Done = nothing) -> Metrics:
    """Score a part into a file of its own, and record beside it what it is of; on resuming, only where that isn't there."""
    assert part.out is not None
    identity = identify(part, options)
    if resume and part.out.exists() and (record := read_record(part.record)) and record["of"] == identity:
        metrics = Metrics.from_json(record["metrics"])
        done(metrics.rows)
        return metrics
    check_targets(part, options)
    # The record is there only while it is of the scores that are.
    part.record.unlink(missing_ok=True)
    metrics = Metrics(options.classes)
    write(part.out, score_chunks(part, options, metrics, done))
    with replacing(part.record) as file:
        file.write(json.dumps({"of": identity, "metrics": metrics.to_json()}).encode())
    return metrics


def score_parts(parts: list[Part], options: Options, resume: bool, each: Each[Metrics], done: Done) -> Iterator[Metrics]:
    """Score every part into a file of its own."""
    function = partial(score_part, options=options, resume=resume)
    if each is here:
        yield from each(partial(function, done=done), parts)
    else:  # from elsewhere, only whole parts are heard of
        for metrics in each(function, parts):
            done(metrics.rows)
            yield metrics


def identify(part: Part, options: Options) -> dict[str, Any]:
    """Return what a part's scores are of, as JSON gives it back."""
    files = [stamp(path) for path in (part.logits, part.targets) if path]
    identity: dict[str, Any] = json.loads(
        json.dumps({"version": pylogits.__version__, "files": files, "options": asdict(options)})
    )
    return identity


def stamp(path: Path) -> tuple[str, int, int]:
    """Return the name, size and time of a file; of a Zarr store, the sums of those of its files."""
    size, time = 0, 0
    for file in path.rglob("*") if path.is_dir() else [path]:
        status = file.stat()
        size += status.st_size
        time += status.st_mtime_ns
    return path.name, size, time


def read_record(path: Path) -> dict[str, Any] | None:
    """Return a record, if there is a whole one."""
    try:
        record: dict[str, Any] = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and {"of", "metrics"} <= set(record) else None


def score_into(out: Path, parts: list[Part], options: Options, done: Done) -> Metrics:
    """Score all parts into one file."""
    for part in parts:
        check_targets(part, options)
    total = Metrics(options.classes)

    def chunks() -> Chunks:
        for part in parts:
            metrics = Metrics(options.classes)
            yield from score_chunks(part, options, metrics, done)
            total.merge(metrics)

    write(out, chunks())
    return total


def merged(every: Iterable[Metrics]) -> Metrics:
    """Add up metrics in their order, so that the sums have the same bits whoever made them."""
    return reduce(Metrics.merge, every)


@dataclass(frozen=True)
class Survey:
    """What the parts hold together."""

    classes: int
    rows: int | None  # None for a stream
    row_bytes: float  # in the files' dtypes, on average


def survey(parts: list[Part], options: Options) -> Survey:
    """Open every file once, before the first is scored: they must exist and fit together, and the options fit them."""
    classes, rows, nbytes = 0, 0, 0
    for part in parts:
        with open_part(part, options) as (logits, _):
            if classes and logits.shape[-1] != classes:
                raise FileError(part.logits, f"{logits.shape[-1]} classes, but {classes} in the files before it")
            classes = logits.shape[-1]
            score_rows(part, options, (np.empty((0, classes), logits.dtype), None))
            if part.logits == STANDARD_INPUT:
                return Survey(classes, None, logits.row_bytes)
            rows += math.prod(logits.shape[:-1])
            nbytes += math.prod(logits.shape) * logits.dtype.itemsize
    return Survey(classes, rows, nbytes / max(rows, 1))


# ---- the temperature ----


def loss_slope(part: Part, options: Options, done: Done = nothing) -> float:
    """Return the derivative of a part's total loss by the logarithm of the temperature.

    That of logsumexp(x / T) - x_target / T is x_target / T - sum(p x / T): a row's entropy less its loss, which one pass gives.
    """
    slope = 0.0
    with open_part(part, options) as (logits, targets):
        assert targets is not None
        rows = ((chunk, targets.take(len(chunk))) for chunk in logits.chunks(1))
        for _, scores, _ in scored(rows, part, replace(options, top_k=1), done):
            assert scores.loss is not None
            slope += float(np.subtract(scores.entropy, scores.loss, dtype=np.float64).sum())
    return slope


def fit_temperature(parts: list[Part], options: Options, each: Each[float]) -> float:
    """Find the temperature of the least mean loss (Guo et al. 2017), to four digits.

    The loss is convex in 1 / temperature, so that its derivative has one zero at most: it is enclosed between powers of two,
    then found by the Illinois method.
    """

    def slope(logarithm: float) -> float:
        at = replace(options, temperature=math.exp(logarithm))
        total = math.fsum(each(partial(loss_slope, options=at), parts))
        if not math.isfinite(total):
            raise FileError(parts[0].logits, "no temperature minimises the loss: it is not finite")
        return total

    low, at_low = 0.0, slope(0.0)
    if at_low == 0:
        return 1.0
    step = math.copysign(math.log(2), -at_low)
    high, at_high = low, at_low
    while (at_high > 0) == (at_low > 0):
        low, at_low, high = high, at_high, high + step
        at_high = slope(high)
        if at_high == 0 or abs(high) > TEMPERATURES * math.log(2):
            raise FileError(parts[0].logits, f"no temperature minimises the loss: it still falls at {math.exp(low):.4g}")
    while abs(high - low) > 1e-4 and at_high:
        middle = high - at_high * (high - low) / (at_high - at_low)
        at_middle = slope(middle)
        if (at_middle > 0) != (at_high > 0):
            low, at_low = high, at_high
        else:
            at_low /= 2
        if abs(middle - high) < 1e-5:
            return math.exp(middle)
        high, at_high = middle, at_middle
    return math.exp(high)
