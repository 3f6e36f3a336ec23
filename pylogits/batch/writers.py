"""Files of scores: columns that come in chunks, in any of four formats, whole or not there at all."""

import os
import secrets
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import chain
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy

from pylogits.batch.readers import Array, FileError, ahead

Columns = dict[str, Array]
Chunks = Iterator[Columns]

# Of a Parquet row group, about: readers take one at a time.
GROUP_BYTES = 8 * 2**20

# Of temporary files, which only a killed run leaves.
PREFIX, SUFFIX = ".pylogits-", ".tmp"


def batches(chunks: Chunks) -> Iterator[Any]:
    """Turn columns into Arrow's record batches; a column of several numbers a row is one of lists."""
    import pyarrow as pa

    def arrow(values: Array) -> Any:
        # Not by pa.array, which imports pandas where it is installed: 0.2 s.
        data = np.packbits(values, bitorder="little") if values.dtype == np.bool_ else np.ascontiguousarray(values)
        flat = pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), values.size, [None, pa.py_buffer(data)])
        return flat if values.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, values.shape[1])

    for columns in chunks:
        yield pa.record_batch({name: arrow(values) for name, values in columns.items()})


def groups(chunks: Chunks) -> Iterator[Any]:
    """Gather record batches into tables of about GROUP_BYTES: scores are far smaller than their logits."""
    import pyarrow as pa

    group: list[Any] = []
    size = 0
    for batch in batches(chunks):
        group.append(batch)
        size += batch.nbytes
        if size >= GROUP_BYTES:
            yield pa.Table.from_batches(group)
            group, size = [], 0
    if group:
        yield pa.Table.from_batches(group)


def write_tables(chunks: Chunks, open_writer: Callable[[Any], Any]) -> None:
    """Write tables with one of Arrow's writers, which wants to know the columns first."""
    tables = groups(chunks)
    first = next(tables)
    with open_writer(first.schema) as writer:
        for table in ahead(chain([first], tables)):
            writer.write_table(table)


def write_parquet(file: IO[bytes], chunks: Chunks) -> None:
    """Write Parquet."""
    from pyarrow.parquet import ParquetWriter

    # Real numbers hardly repeat: a dictionary of them costs three times the time, and space.
    write_tables(chunks, lambda schema: ParquetWriter(file, schema, use_dictionary=["prediction"]))


def write_arrow(file: IO[bytes], chunks: Chunks) -> None:
    """Write Arrow's own format, its IPC file."""
    import pyarrow as pa

    write_tables(chunks, lambda schema: pa.ipc.new_file(file, schema))


def write_csv(file: IO[bytes], chunks: Chunks) -> None:
    """Write text: a column of several numbers a row becomes several."""
    from pyarrow.csv import CSVWriter

    def flat(columns: Columns) -> Columns:
        table = {}
        for name, values in columns.items():
            if values.ndim == 1:
                table[name] = values
            else:
                table |= {f"{name}_{i + 1}": values[:, i] for i in range(values.shape[1])}
        return table

    write_tables(map(flat, chunks), lambda schema: CSVWriter(file, schema))


def write_npz(file: IO[bytes], chunks: Chunks) -> None:
    """Write columns as arrays; an archive takes them one by one, so they are spooled to disk."""
    first = next(chunks)
    folder = Path(file.name).parent
    with ExitStack() as stack:
        spools = {name: stack.enter_context(TemporaryFile(dir=folder, prefix=PREFIX, suffix=SUFFIX)) for name in first}
        rows = 0
        for table in chain([first], chunks):
            rows += len(next(iter(table.values())))
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


WRITERS: dict[str, Callable[[IO[bytes], Chunks], None]] = {
    ".parquet": write_parquet,
    ".arrow": write_arrow,
    ".npz": write_npz,
    ".csv": write_csv,
}


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
        raise FileError(path, error) from None
    finally:
        with suppress(OSError):
            beside.unlink()


def write(path: Path, chunks: Chunks) -> None:
    """Write columns to a file, in the format of its name."""
    with replacing(path) as file:
        WRITERS[path.suffix](file, chunks)
