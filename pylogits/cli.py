"""The ``pylogits`` command: scores files of logits of any size in bounded memory."""

import math
import os
import secrets
import shutil
import signal
import stat
import sys
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from io import BufferedReader
from itertools import chain
from pathlib import Path
from tempfile import TemporaryFile
from textwrap import shorten
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

# Below this, the bytes of a read cost less than its call.
READ_BYTES = 64 * 2**10

# Version 3.0 differs from 2.0 in the names of fields alone, which neither logits nor targets have.
READ_HEADER = {
    (1, 0): npy.read_array_header_1_0,
    (2, 0): npy.read_array_header_2_0,
    (3, 0): npy.read_array_header_2_0,
}

COLUMNS = ("prediction", "confidence", "entropy", "logsumexp", "loss", "correct")
TOP_K_COLUMNS = ("top_k_indices", "top_k_probabilities")

# Of temporary files, which only a killed run leaves.
PREFIX, SUFFIX = ".pylogits-", ".tmp"

app = typer.Typer(
    help="Probabilities, losses and scores from logits.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def fail(name: object, reason: object) -> NoReturn:
    """End the command with one line about a file."""
    if isinstance(reason, OSError):
        reason = reason.strerror or reason
    typer.echo(f"error: {name}: {reason}", err=True)
    raise typer.Exit(2)


@dataclass
class NpyFile:
    """An array in a .npy file, read a block at a time.

    Read, not mapped: where a file is cut short meanwhile, a read is an error like any other, but a map kills the process.
    """

    path: Path
    file: BufferedReader
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in bytes, as NumPy's
    start: int  # where the first element lies in the file

    @property
    def nbytes(self) -> int:
        """The size of the whole array."""
        return math.prod(self.shape) * self.dtype.itemsize

    def move_last(self, axis: int) -> None:
        """Make an axis the last one."""
        order = list(range(len(self.shape)))
        order.append(order.pop(axis))
        self.shape = tuple(self.shape[i] for i in order)
        self.strides = tuple(self.strides[i] for i in order)

    def read(self, block: Block) -> Array:
        """Read a part, which is given by slices of the first axes."""
        ranges = [range(length) for length in self.shape]
        ranges[: len(block)] = [whole[part] for whole, part in zip(ranges, block, strict=False)]
        # In the file's order, so that elements side by side in the file are so in memory.
        order = sorted(range(len(ranges)), key=lambda axis: -self.strides[axis])
        start = self.start + sum(part.start * stride for part, stride in zip(ranges, self.strides, strict=True))
        try:
            array = np.empty([len(ranges[axis]) for axis in order], (np.void, self.dtype.itemsize))
            if array.size:
                self._fill(array, start, [self.strides[axis] for axis in order])
        except (OSError, MemoryError) as error:
            fail(self.path, error)
        return array.view(self.dtype).transpose(np.argsort(order))

    def _fill(self, array: Array, start: int, strides: Sequence[int]) -> None:
        """Read an array's elements, which lie with these strides in the file: in halves while too much lies between them."""
        span = array.itemsize + sum((length - 1) * stride for length, stride in zip(array.shape, strides, strict=True))
        if span == array.nbytes:
            self._read_bytes(array, start)
        elif span <= READ_BYTES:
            buffer = np.empty(span, np.uint8)
            self._read_bytes(buffer, start)
            array[...] = np.ndarray(array.shape, array.dtype, buffer, strides=strides)
        elif len(array) == 1:
            self._fill(array[0], start, strides[1:])
        else:
            half = len(array) // 2
            self._fill(array[:half], start, strides)
            self._fill(array[half:], start + half * strides[0], strides)

    def _read_bytes(self, array: Array, start: int) -> None:
        self.file.seek(start)
        if self.file.readinto(array.data) < array.nbytes:
            fail(self.path, "became shorter while it was read")


@contextmanager
def open_npy(path: Path) -> Iterator[NpyFile]:
    """Open a .npy file; one that is shorter than its header says is refused."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for its writer
            fail(path, "not a regular file")
        file = path.open("rb")
    except OSError as error:
        fail(path, error)
    with file:
        try:
            version = npy.read_magic(file)
            if version not in READ_HEADER:
                raise ValueError(f"its format has the unknown version {version}")
            with warnings.catch_warnings(action="ignore"):  # an old or odd spelling is no concern of the user's
                shape, fortran_order, dtype = READ_HEADER[version](file)
            if dtype.hasobject:
                raise ValueError("it holds Python objects")
            np.broadcast_to(np.empty((), dtype), shape)  # raises for shapes that no array can have
            # From the axis whose elements lie side by side to the outermost one.
            lengths = shape if fortran_order else shape[::-1]
            strides = tuple(dtype.itemsize * math.prod(lengths[:i]) for i in range(len(lengths)))
            array = NpyFile(path, file, dtype, shape, strides if fortran_order else strides[::-1], file.tell())
            missing = array.start + array.nbytes - os.fstat(file.fileno()).st_size
            if missing > 0:
                raise ValueError(f"the last {missing} bytes are missing")
        except OSError as error:
            fail(path, error)
        except Exception as error:  # a damaged header raises anything: TokenError, TypeError, ...
            fail(path, f"not a whole .npy file: {shorten(str(error), 200)}")
        yield array


@contextmanager
def open_logits(path: Path, axis: int) -> Iterator[NpyFile]:
    """Open logits, with their classes on the last axis."""
    with open_npy(path) as logits:
        if logits.dtype == np.dtype("V2"):  # how bfloat16 comes back from a .npy file
            try:
                from ml_dtypes import bfloat16
            except ImportError:
                fail(path, "dtype |V2 is read as bfloat16, which needs the package ml_dtypes")
            logits.dtype = np.dtype(bfloat16)
        elif logits.dtype.kind not in "fiub" or logits.dtype.itemsize > 8:
            fail(path, f"logits must be real numbers of at most 64 bits, not {logits.dtype}")
        if not -len(logits.shape) <= axis < len(logits.shape):
            fail(path, f"no axis {axis} in logits of shape {logits.shape}")
        if logits.shape[axis] == 0:
            fail(path, f"no classes along axis {axis} of logits of shape {logits.shape}")
        logits.move_last(axis)
        yield logits


def check_targets(targets: NpyFile, logits: NpyFile) -> None:
    """Refuse bad targets before the first row is scored, not hours later."""
    path = targets.path
    rows, classes = logits.shape[:-1], logits.shape[-1]
    if targets.dtype.kind not in "iu":
        fail(path, f"targets must be integers, not {targets.dtype}")
    if targets.shape != rows:
        fail(path, f"targets of shape {targets.shape} for rows of shape {rows}")
    first_row = 0
    for block in blocks(rows, CHUNK_BYTES // targets.dtype.itemsize):
        part = targets.read(block).ravel()
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


def row_blocks(logits: NpyFile) -> Iterator[Block]:
    """Cut the rows of logits into chunks of about CHUNK_BYTES, one row at least."""
    row_bytes = logits.shape[-1] * logits.dtype.itemsize
    return blocks(logits.shape[:-1], max(CHUNK_BYTES // row_bytes, 1))


def warn_of_probabilities(logits: NpyFile) -> None:
    """Say so when the first chunk's rows look like probabilities already."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", pylogits.DoubleSoftmaxWarning)
        try:
            pylogits.check_logits(logits.read(next(row_blocks(logits))))
        except pylogits.DoubleSoftmaxWarning as warning:
            typer.echo(f"warning: {logits.path}: {warning}", err=True)


def score_blocks(logits: NpyFile, targets: NpyFile | None, top_k: int, temperature: float) -> Iterator[pylogits.Scores]:
    """Score a file of logits, a chunk of its rows at a time."""
    for block in row_blocks(logits):
        part = logits.read(block)
        labels = None if targets is None else targets.read(block)
        try:
            scores = pylogits.score(part, labels, top_k=top_k, temperature=temperature)
        except ValueError as error:
            fail(logits.path, error)
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
        spools = {name: stack.enter_context(TemporaryFile(dir=folder, prefix=PREFIX, suffix=SUFFIX)) for name in first}
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
def unwinding_on_sigterm() -> Iterator[None]:
    """Let SIGTERM raise an exception, as SIGINT does: temporary files are removed on its way out."""

    def stop(number: int, frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a file beside `path` that takes its place once whole, and is removed on any failure."""
    beside = path.with_name(f"{PREFIX}{secrets.token_hex(8)}{SUFFIX}")
    try:
        with beside.open("xb") as file:
            yield file
            # On the disk before it has the name: after a power cut, a name may else be found with half a file. That the name
            # itself may then be lost is no harm, as the older output is whole, too.
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        fail(path, error)
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

    def print(self, logits: NpyFile, seconds: float, has_targets: bool) -> None:
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
    with (
        unwinding_on_sigterm(),
        open_logits(logits, axis) as rows,
        nullcontext() if targets is None else open_npy(targets) as labels,
    ):
        if labels is not None:
            check_targets(labels, rows)
        warn_of_probabilities(rows)

        summary = Summary()
        start = time.perf_counter()
        with (
            replacing(out) as file,
            Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress,
        ):
            task = progress.add_task("scoring", total=math.prod(rows.shape[:-1]))

            def chunks() -> Iterator[Columns]:
                for scores in score_blocks(rows, labels, top_k, temperature):
                    summary.add(scores)
                    progress.update(task, completed=summary.rows)
                    yield columns(scores)

            WRITERS[out.suffix](file, chunks())
        try:
            summary.print(rows, time.perf_counter() - start, labels is not None)
        except OSError as error:
            sys.stdout = sys.stderr  # what the old one holds would fail once more at exit
            fail("standard output", error)


@app.command()
def config() -> None:
    """Print the backends found and what would be chosen."""
    pylogits.show_config()


@app.command()
def warmup() -> None:
    """Compile all of Numba's kernels into its cache, for later processes to load."""
    from pylogits.kernels import cpu

    for name in cpu.compile_all():
        typer.echo(name)
