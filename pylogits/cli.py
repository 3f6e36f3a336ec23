"""The ``pylogits`` command: scores files of logits of any size in bounded memory."""

import math
import os
import secrets
import shutil
import sys
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Annotated, Any, NoReturn

import numpy as np
import typer
from numpy.lib import format as npy
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import pylogits

Array = NDArray[Any]
Columns = dict[str, Array]
Block = tuple[slice, ...]

# Large enough that the work outweighs the loop around it, small enough to stay near the cache.
CHUNK_BYTES = 16 * 2**20

COLUMNS = ("prediction", "confidence", "entropy", "logsumexp", "loss", "correct")
TOP_K_COLUMNS = ("top_k_indices", "top_k_probabilities")

app = typer.Typer(
    help="Probabilities, losses and scores from logits.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def fail(path: Path, reason: object) -> NoReturn:
    """End the command with one line about a file."""
    typer.echo(f"error: {path}: {reason}", err=True)
    raise typer.Exit(2)


def read_npy(path: Path) -> Array:
    """Map a .npy file; one that is shorter than its header says is refused, never touched."""
    try:
        return np.asarray(npy.open_memmap(path, mode="r"))
    except OSError as error:
        fail(path, error.strerror or error)
    except Exception as error:  # a damaged header raises anything: TokenError, TypeError, ...
        fail(path, f"not a whole .npy file: {error}")


def read_logits(path: Path, axis: int) -> Array:
    """Map logits with their classes on the last axis."""
    logits = read_npy(path)
    if logits.dtype == np.dtype("V2"):  # how bfloat16 comes back from a .npy file
        try:
            from ml_dtypes import bfloat16
        except ImportError:
            fail(path, "dtype |V2 is read as bfloat16, which needs the package ml_dtypes")
        logits = logits.view(bfloat16)
    elif logits.dtype.kind not in "fiub" or logits.dtype.itemsize > 8:
        fail(path, f"logits must be real numbers of at most 64 bits, not {logits.dtype}")
    if not -logits.ndim <= axis < logits.ndim:
        fail(path, f"no axis {axis} in logits of shape {logits.shape}")
    if logits.shape[axis] == 0:
        fail(path, f"no classes along axis {axis} of logits of shape {logits.shape}")
    return np.moveaxis(logits, axis, -1)


def check_targets(path: Path, targets: Array, logits: Array) -> None:
    """Refuse bad targets before the first row is scored, not hours later."""
    rows, classes = logits.shape[:-1], logits.shape[-1]
    if targets.dtype.kind not in "iu":
        fail(path, f"targets must be integers, not {targets.dtype}")
    if targets.shape != rows:
        fail(path, f"targets of shape {targets.shape} for rows of shape {rows}")
    first_row = 0
    for block in blocks(rows, CHUNK_BYTES // targets.dtype.itemsize):
        part = targets[block].ravel()
        bad = np.flatnonzero((part < 0) | (part >= classes))
        if bad.size:
            row = first_row + bad[0]
            fail(path, f"target {part[bad[0]]} at row {row} is outside [0, {classes})")
        first_row += part.size


def blocks(shape: tuple[int, ...], limit: int) -> Iterator[Block]:
    """Cut a shape, in C order, into slices of at most `limit` elements; at least one slice."""
    if not shape:
        yield ()
        return
    length, *inner = shape
    length = max(length, 1)  # an empty shape has one empty block: it still gives the columns
    step = limit // max(math.prod(inner), 1)
    if step:
        yield from ((slice(start, start + step),) for start in range(0, length, step))
    else:
        for i in range(length):
            yield from ((slice(i, i + 1), *rest) for rest in blocks(tuple(inner), limit))


def row_blocks(logits: Array) -> Iterator[Block]:
    """Cut the rows of logits into chunks of about CHUNK_BYTES, one row at least."""
    row_bytes = logits.shape[-1] * logits.itemsize
    return blocks(logits.shape[:-1], max(CHUNK_BYTES // row_bytes, 1))


def warn_of_probabilities(path: Path, logits: Array) -> None:
    """Say so when the first chunk's rows look like probabilities already."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", pylogits.DoubleSoftmaxWarning)
        try:
            pylogits.check_logits(logits[next(row_blocks(logits))])
        except pylogits.DoubleSoftmaxWarning as warning:
            typer.echo(f"warning: {path}: {warning}", err=True)


def score_blocks(path: Path, axis: int, targets: Array | None, top_k: int, temperature: float) -> Iterator[pylogits.Scores]:
    """Score a file of logits, a chunk of its rows at a time."""
    for block in row_blocks(read_logits(path, axis)):
        # Mapped anew for each chunk, so that the pages already read leave the process.
        part = read_logits(path, axis)[block]
        try:
            scores = pylogits.score(
                part,
                None if targets is None else targets[block],
                top_k=top_k,
                temperature=temperature,
            )
        except ValueError as error:
            fail(path, error)
        yield scores


def columns(scores: pylogits.Scores) -> Columns:
    """One entry per row for each field; top-k only where it says more than the prediction."""
    fields = {name: getattr(scores, name) for name in COLUMNS}
    table = {name: np.ravel(value) for name, value in fields.items() if value is not None}
    k = scores.top_k_indices.shape[-1]
    if k > 1:
        table |= {name: getattr(scores, name).reshape(-1, k) for name in TOP_K_COLUMNS}
    return table


def write_parquet(file: IO[bytes], chunks: Iterator[Columns]) -> None:
    """Write columns in row groups of about one chunk's bytes."""
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    def arrow(values: Array) -> Any:
        flat = pa.array(values.ravel())
        if values.ndim == 1:
            return flat
        return pa.FixedSizeListArray.from_arrays(flat, values.shape[1])

    def batch(table: Columns) -> Any:
        return pa.record_batch({name: arrow(values) for name, values in table.items()})

    first = batch(next(chunks))
    # Real numbers hardly repeat: a dictionary of them costs three times the time, and space.
    with ParquetWriter(file, first.schema, use_dictionary=["prediction"]) as writer:
        group: list[Any] = []
        group_bytes = 0
        for part in chain([first], map(batch, chunks)):
            group.append(part)
            group_bytes += part.nbytes
            if group_bytes >= CHUNK_BYTES:
                writer.write_table(pa.Table.from_batches(group))
                group, group_bytes = [], 0
        if group:
            writer.write_table(pa.Table.from_batches(group))


def write_npz(file: IO[bytes], chunks: Iterator[Columns]) -> None:
    """Write columns as arrays; an archive takes them one by one, so they are spooled to disk."""
    first = next(chunks)
    folder = Path(file.name).parent
    with ExitStack() as stack:
        spools = {name: stack.enter_context(TemporaryFile(dir=folder)) for name in first}
        rows = 0
        for table in chain([first], chunks):
            rows += len(table["prediction"])
            for name, spool in spools.items():
                spool.write(table[name].tobytes())
        with zipfile.ZipFile(file, "w") as archive:
            for name, spool in spools.items():
                header = npy.header_data_from_array_1_0(first[name])
                header |= {"shape": (rows, *first[name].shape[1:]), "fortran_order": False}
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    npy.write_array_header_1_0(member, header)
                    spool.seek(0)
                    shutil.copyfileobj(spool, member)


WRITERS: dict[str, Callable[[IO[bytes], Iterator[Columns]], None]] = {
    ".parquet": write_parquet,
    ".npz": write_npz,
}


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a file beside `path` that takes its place once whole, and is removed on any failure."""
    beside = path.with_name(f".pylogits-{secrets.token_hex(8)}.tmp")
    try:
        with beside.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        fail(path, error.strerror or error)
    finally:
        with suppress(OSError):
            beside.unlink()


@dataclass
class Summary:
    """What a run adds up to."""

    rows: int = 0
    loss: float = 0.0
    correct: int = 0

    def add(self, scores: pylogits.Scores) -> None:
        """Count one chunk in."""
        self.rows += scores.prediction.size
        if scores.loss is not None and scores.correct is not None:
            self.loss += float(np.sum(scores.loss, dtype=np.float64))
            self.correct += int(np.count_nonzero(scores.correct))

    def print(self, logits: Array, seconds: float, has_targets: bool) -> None:
        """Print the totals and the speed, as a table on standard output."""
        lines = {
            "rows": f"{self.rows}",
            "classes": f"{logits.shape[-1]}",
            "rows/s": f"{self.rows / seconds:.4g}",
            "GB/s": f"{logits.nbytes / seconds / 1e9:.4g}",
        }
        if has_targets and self.rows:
            mean = self.loss / self.rows
            with np.errstate(over="ignore"):
                perplexity = np.exp(mean)
            lines["mean loss"] = f"{mean:.7g}"
            lines["accuracy"] = f"{self.correct / self.rows:.7g}"
            lines["perplexity"] = f"{perplexity:.7g}"
        table = Table.grid(padding=(0, 2))
        for name, value in lines.items():
            table.add_row(name, value)
        Console().print(table)


@app.command()
def score(
    logits: Annotated[Path, typer.Argument(metavar="LOGITS.npy", help="Logits, of any shape.")],
    out: Annotated[Path, typer.Option(metavar="OUT", help="Where to: .parquet or .npz.")],
    targets: Annotated[
        Path | None,
        typer.Option(metavar="TARGETS.npy", help="The right class of each row, for the loss."),
    ] = None,
    axis: Annotated[int, typer.Option(help="The axis of the classes.")] = -1,
    top_k: Annotated[int, typer.Option(help="How many classes to list per row.")] = 1,
    temperature: Annotated[float, typer.Option(help="Divides the logits.")] = 1.0,
) -> None:
    """Score each row of logits: prediction, confidence, entropy, logsumexp, top-k and loss."""
    if out.suffix not in WRITERS:
        fail(out, f"the output must end in {' or '.join(WRITERS)}")
    if not os.path.isdir(out.parent) or os.path.isdir(out):
        fail(out, "not a file in an existing folder")
    mapped = read_logits(logits, axis)
    rows = mapped.shape[:-1]
    labels = None
    if targets is not None:
        labels = read_npy(targets)
        check_targets(targets, labels, mapped)
    warn_of_probabilities(logits, mapped)

    summary = Summary()
    start = time.perf_counter()
    with (
        replacing(out) as file,
        Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress,
    ):
        task = progress.add_task("scoring", total=math.prod(rows))

        def chunks() -> Iterator[Columns]:
            for scores in score_blocks(logits, axis, labels, top_k, temperature):
                summary.add(scores)
                progress.update(task, completed=summary.rows)
                yield columns(scores)

        WRITERS[out.suffix](file, chunks())
    summary.print(mapped, time.perf_counter() - start, labels is not None)


@app.command()
def config() -> None:
    """Print the backends found and what would be chosen."""
    pylogits.show_config()
