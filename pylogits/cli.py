"""The ``pylogits`` command: scores files of logits of any size in bounded memory."""

import glob
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

import pylogits
from pylogits.batch import cluster, job
from pylogits.batch.readers import FORMATS, STANDARD_INPUT, FileError
from pylogits.batch.report import to_html
from pylogits.batch.writers import WRITERS, replacing

app = typer.Typer(
    help="Probabilities, losses and scores from logits.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Speed(ProgressColumn):
    """Rows and bytes a second."""

    def __init__(self, row_bytes: float) -> None:
        super().__init__()
        self.row_bytes = row_bytes

    def render(self, task: Task) -> Text:
        """Return what the progress bar shows."""
        speed = task.speed or 0.0
        return Text(f"{speed:.4g} rows/s  {speed * self.row_bytes / 1e9:.3g} GB/s")


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End the command with one line on standard error about the file that is wrong."""
    try:
        yield
    except (FileError, OSError) as error:
        line = FileError(error.filename, error) if isinstance(error, OSError) else error
        typer.echo(f"error: {line}", err=True)
        raise typer.Exit(2) from None


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


def expand(patterns: list[str]) -> list[Path]:
    """Return the files of names and patterns, those of a pattern in order."""
    files: list[Path] = []
    for pattern in patterns:
        found = [pattern] if os.path.exists(pattern) or not glob.has_magic(pattern) else sorted(glob.glob(pattern))
        if not found:
            raise FileError(pattern, "no such files")
        files += map(Path, found)
    return files


def make_parts(
    logits: list[str], targets: list[str], targets_name: str | None, folder: Path | None, suffix: str
) -> list[job.Part]:
    """Pair files of logits with those of their targets, and with the files of their scores in a folder."""
    files = expand(logits)
    if STANDARD_INPUT in files and (len(files) > 1 or folder is not None):
        raise FileError(STANDARD_INPUT, "standard input can't be one of several inputs, nor have its scores in a folder")
    labels: list[Path | None] = [*expand(targets)]
    if not labels:
        labels = [*files] if targets_name is not None else [None] * len(files)
    if len(labels) != len(files):
        raise FileError(targets[0], f"{len(labels)} files of targets for {len(files)} of logits")
    outs: list[Path | None] = [None] * len(files)
    if folder is not None:
        # The path from the folder that all share: shards are often told apart by the name of their folder.
        common = os.path.commonpath([os.path.abspath(file.parent) for file in files])
        names = [os.path.relpath(os.path.abspath(file.with_suffix("")), common).replace(os.sep, "-") for file in files]
        outs = [folder / f"{name}{suffix}" for name in names]
    return [job.Part(str(file), file, label, out) for file, label, out in zip(files, labels, outs, strict=True)]


def check_output(out: Path, report: Path | None, folder: Path | None, suffix: str, needs_folder: bool) -> None:
    """Refuse an output that can't be written, or not so."""
    for file in (None if folder else out, report):
        if file and (os.path.isdir(file) or not (os.path.isdir(file.parent) or file.parent == folder)):
            raise FileError(file, "not a file in an existing folder")
    if folder and not os.path.isdir(folder) and (folder.suffix or os.path.lexists(folder)):
        raise FileError(out, f"neither a folder nor a name that ends in {', '.join(WRITERS)}")
    if suffix not in WRITERS:
        raise FileError("--format", f"no format {suffix[1:]}, only {', '.join(name[1:] for name in WRITERS)}")
    if needs_folder and folder is None:
        raise FileError(out, "--resume, --workers and --scheduler need a folder, for a file of scores each")


def check_places(parts: list[job.Part], outputs: list[Path | None]) -> None:
    """Refuse an output that would take the place of an input or of another output."""
    taken = {os.path.realpath(path) for part in parts for path in (part.logits, part.targets) if path}
    of_parts = [path for part in parts if part.out for path in (part.out, part.record)]
    for path in [*of_parts, *outputs]:
        if path is None:
            continue
        place = os.path.realpath(path)
        if place in taken:
            raise FileError(path, "would take the place of an input or of another output")
        taken.add(place)


def to_number(temperature: str) -> float:
    """Return a temperature that is not fitted."""
    try:
        return float(temperature)
    except ValueError:
        raise FileError("--temperature", f"neither a number nor fit: {temperature}") from None


def check_columns(names: str, targets: bool) -> tuple[str, ...]:
    """Return the columns of a list with commas."""
    columns = tuple(name.strip() for name in names.split(","))
    for name in columns:
        if name not in job.COLUMNS + job.TOP_K_COLUMNS:
            raise FileError("--columns", f"no column named {name!r}, only {', '.join(job.COLUMNS + job.TOP_K_COLUMNS)}")
        if name in job.TARGET_COLUMNS and not targets:
            raise FileError("--columns", f"{name} needs targets")
    return columns


def warn_of_probabilities(part: job.Part, options: job.Options) -> None:
    """Say so when the first chunk's rows look like probabilities already."""
    if part.logits == STANDARD_INPUT:  # what is read of it is gone
        return
    with job.open_part(part, options) as (logits, _), warnings.catch_warnings():
        warnings.simplefilter("error", pylogits.DoubleSoftmaxWarning)
        try:
            pylogits.check_logits(next(logits.chunks(1)))
        except pylogits.DoubleSoftmaxWarning as warning:
            typer.echo(f"warning: {part.logits}: {warning}", err=True)


def print_table(lines: dict[str, str]) -> None:
    """Print names and values on standard output."""
    table = Table.grid(padding=(0, 2))
    for name, value in lines.items():
        table.add_row(name, value)
    try:
        Console().print(table)
    except OSError as error:
        sys.stdout = sys.stderr  # what the old one holds would fail once more at exit
        raise FileError("standard output", error) from None


@contextmanager
def progress_bar(survey: job.Survey, quiet: bool) -> Iterator[Callable[[int], None]]:
    """Show on a terminal how far the job is; gives what is to be called with numbers of rows that are done."""
    columns = (TextColumn("scoring"), BarColumn(), Speed(survey.row_bytes), TimeRemainingColumn())
    hidden = quiet or not sys.stderr.isatty()
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=hidden) as progress:
        task = progress.add_task("", total=survey.rows)
        yield lambda rows: progress.advance(task, rows)


@app.command()
def score(
    logits: Annotated[
        list[str],
        typer.Argument(
            metavar="LOGITS...", help=f"Files or patterns: {', '.join(FORMATS)}; - is standard input.", show_default=False
        ),
    ],
    out: Annotated[
        Path, typer.Option(metavar="OUT", help=f"A file ({', '.join(WRITERS)}), or a folder for a file of scores each.")
    ],
    targets: Annotated[
        list[str] | None,
        typer.Option(metavar="TARGETS", help="The right class of each row, in as many files; may be given several times."),
    ] = None,
    logits_name: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The array, tensor or column (one a class: a pattern) in the files of logits."),
    ] = None,
    targets_name: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The same of the targets; in the files of logits, if there are no others."),
    ] = None,
    axis: Annotated[int, typer.Option(help="The axis of the classes.")] = -1,
    top_k: Annotated[int, typer.Option(help="How many classes to list per row.")] = 1,
    temperature: Annotated[
        str, typer.Option(metavar="NUMBER|fit", help="Divides the logits; fit finds the one of the least loss.")
    ] = "1",
    columns: Annotated[str | None, typer.Option(metavar="NAME,...", help="The columns to write.")] = None,
    suffix: Annotated[str, typer.Option("--format", metavar="FORMAT", help="Of the files in a folder.")] = "parquet",
    dtype: Annotated[str, typer.Option(help="Of standard input.")] = "float32",
    classes: Annotated[int, typer.Option(help="Of standard input: how many numbers make a row.", min=0)] = 0,
    report: Annotated[
        Path | None, typer.Option(metavar="REPORT.html", help="A page with charts of how good the logits are.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep the scores in the folder that are whole and of these files.")
    ] = False,
    workers: Annotated[int, typer.Option(help="Share the files among so many Dask workers on this machine.", min=0)] = 0,
    scheduler: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Share them among the workers of this Dask cluster.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print neither progress nor a summary.")] = False,
) -> None:
    """Score each row of logits: prediction, confidence, entropy, logsumexp, top-k and loss."""
    with one_line_errors(), unwinding_on_sigterm():
        folder = None if out.suffix in WRITERS else out
        check_output(out, report, folder, f".{suffix}", resume or workers > 0 or scheduler is not None)
        parts = make_parts(logits, targets or [], targets_name, folder, f".{suffix}")
        check_places(parts, [None if folder else out, report])
        names = None if columns is None else check_columns(columns, parts[0].targets is not None)
        fit = temperature == "fit"
        options = job.Options(
            logits_name, targets_name, axis, top_k, 1.0 if fit else to_number(temperature), names, dtype, classes
        )
        if fit and (parts[0].targets is None or parts[0].logits == STANDARD_INPUT):
            raise FileError("--temperature", "fit needs targets, and files that can be read more than once")
        survey = job.survey(parts, options)
        options = replace(options, classes=survey.classes)
        warn_of_probabilities(parts[0], options)

        start = time.perf_counter()
        with cluster.on_workers(workers, scheduler) if workers or scheduler else nullcontext(job.here) as each:
            if fit:
                unfitted = job.merged(each(partial(job.count_part, options=options), parts)).summary(top_k)
                options = replace(options, temperature=job.fit_temperature(parts, options, each))
            with progress_bar(survey, quiet) as done:
                if folder is None:
                    metrics = job.score_into(out, parts, options, done)
                else:
                    folder.mkdir(parents=True, exist_ok=True)
                    metrics = job.merged(job.score_parts(parts, options, resume, each, done))
        seconds = time.perf_counter() - start

        lines = {
            "rows": f"{metrics.rows}",
            "classes": f"{metrics.classes}",
            "rows/s": f"{metrics.rows / seconds:.4g}",
            "GB/s": f"{metrics.rows * survey.row_bytes / seconds / 1e9:.4g}",
        }
        lines |= {name: f"{value:.7g}" for name, value in metrics.summary(top_k).items()}
        if fit:
            lines["temperature"] = f"{options.temperature:.4g}"
            lines |= {f"{name} before": f"{value:.7g}" for name, value in unfitted.items() if lines[name] != f"{value:.7g}"}
        if report is not None:
            others = f" and {len(parts) - 1} more" if len(parts) > 1 else ""
            with replacing(report) as file:
                file.write(to_html(parts[0].name + others, lines, metrics).encode(errors="replace"))
        if not quiet:
            print_table(lines)


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
