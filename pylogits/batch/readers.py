"""Files of logits and targets, read a chunk of rows at a time; the formats' own libraries take them apart."""

import json
import lzma
import math
import os
import stat
import sys
import warnings
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import TemporaryFile, gettempdir
from textwrap import shorten
from typing import IO, Any, TypeVar

import ml_dtypes
import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

Array = NDArray[Any]
Block = tuple[slice, ...]
T = TypeVar("T")

# Large enough that the work outweighs the loop around it, small enough to stay near the cache.
CHUNK_BYTES = 8 * 2**20

# Of few classes: their scores are larger than their logits.
CHUNK_ROWS = 2**17

# Below this, the bytes of a read cost less than its call.
READ_BYTES = 64 * 2**10

# Version 3.0 differs from 2.0 in the names of fields alone, which neither logits nor targets have.
READ_HEADER = {
    (1, 0): npy.read_array_header_1_0,
    (2, 0): npy.read_array_header_2_0,
    (3, 0): npy.read_array_header_2_0,
}

# Reads record batches of so many rows at most, of some columns.
Batches = Callable[[int, list[str]], Iterator[Any]]

# Columns of a Parquet file that are decoded together, and rows of them: of each column, a page and a dictionary are in memory,
# a megabyte or more, and 1000 took 2.6 GiB. More of them go through a temporary file.
COLUMNS = 8
SPOOLED_ROWS = 2**15

# What the formats' libraries raise of damaged files: the one of Arrow has subclasses of ValueError and others among these.
DAMAGE = (
    OSError, ValueError, MemoryError, NotImplementedError, EOFError, zipfile.BadZipFile, zlib.error, lzma.LZMAError
)  # fmt: skip

SAFETENSORS_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "bfloat16", "I64": "<i8", "I32": "<i4"} | {
    "I16": "<i2", "I8": "|i1", "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "|u1", "BOOL": "|b1"
}  # fmt: skip

# A name that ml_dtypes gives to NumPy.
BFLOAT16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)

STANDARD_INPUT = Path("-")


class FileError(Exception):
    """What is wrong with a file, in one line."""

    def __init__(self, name: object, reason: object) -> None:
        if isinstance(reason, OSError):
            reason = reason.strerror or reason
        super().__init__(str(name), str(reason))

    def __str__(self) -> str:
        text = ": ".join(self.args)
        return "".join(c if c.isprintable() else " " for c in text).strip()


def ahead(items: Iterator[T]) -> Iterator[T]:
    """Make each item in another thread, while the one before it is worked on."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = pool.submit(next, items, None)
            yield item


@dataclass
class Source(ABC):
    """An array in a file or a stream, which is read from its first row to its last."""

    path: Path
    dtype: np.dtype[Any]
    shape: tuple[int, ...]  # the first length is -1 where only the end of a stream will tell

    @property
    def row_bytes(self) -> int:
        """The size of what is on the last axis."""
        return self.shape[-1] * self.dtype.itemsize

    def move_last(self, axis: int) -> None:
        """Make an axis the last one."""
        if axis % len(self.shape) != len(self.shape) - 1:
            raise FileError(self.path, "this format has its classes on the last axis")

    @abstractmethod
    def chunks(self, inner: int) -> Iterator[Array]:
        """Read chunks of whole rows, at least one chunk: all axes are rows but the last, if `inner` is 1, which stays."""


def rows_of_chunk(row_bytes: int) -> int:
    """Return how many rows of a size make a chunk."""
    return max(min(CHUNK_BYTES // row_bytes, CHUNK_ROWS), 1)


# ---- arrays of which any part can be read ----


class BlockSource(Source):
    """An array of which any block can be read."""

    @abstractmethod
    def read(self, block: Block) -> Array:
        """Read a part, which is given by slices of the first axes."""

    def chunks(self, inner: int) -> Iterator[Array]:
        """Read chunks of at most CHUNK_BYTES and CHUNK_ROWS, or of a row."""
        rows = self.shape[: len(self.shape) - inner]
        kept = self.shape[len(rows) :]
        limit = rows_of_chunk(self.dtype.itemsize * math.prod(kept))
        for block in blocks(rows, limit):
            yield self.read(block).reshape(-1, *kept)


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


@dataclass
class ByteArray(BlockSource):
    """An array whose elements lie in a file as they lie in memory.

    Read, not mapped: where a file is cut short meanwhile, a read is an error like any other, but a map kills the process.
    """

    file: IO[bytes]
    strides: tuple[int, ...]  # in bytes, as NumPy's
    start: int  # where the first element lies in the file

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
        except DAMAGE as error:
            raise FileError(self.path, error) from None
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
        if self.file.readinto(array.data) < array.nbytes:  # type: ignore[attr-defined]
            raise FileError(self.path, "became shorter while it was read")


def open_file(path: Path) -> IO[bytes]:
    """Open a regular file."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for its writer
            raise FileError(path, "not a regular file")
        return path.open("rb")
    except OSError as error:
        raise FileError(path, error) from None


def open_npy(path: Path, name: str | None, role: str, stack: ExitStack) -> ByteArray:
    """Open a .npy file; one that is shorter than its header says is refused."""
    file = stack.enter_context(open_file(path))
    return read_header(path, file, os.fstat(file.fileno()).st_size)


def open_npz(path: Path, name: str | None, role: str, stack: ExitStack) -> ByteArray:
    """Open one array of a .npz archive."""
    file = stack.enter_context(open_file(path))
    try:
        archive = stack.enter_context(zipfile.ZipFile(file))
        arrays = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
        member = arrays[pick(path, arrays, name, role)]
        return read_header(path, stack.enter_context(archive.open(member)), member.file_size)
    except (RuntimeError, *DAMAGE) as error:  # RuntimeError: a password is needed
        raise FileError(path, f"not a whole .npz file: {error}") from None


def read_header(path: Path, file: IO[bytes], size: int) -> ByteArray:
    """Read what a .npy file of `size` bytes says of its array."""
    try:
        version = npy.read_magic(file)
        if version not in READ_HEADER:
            raise ValueError(f"its format has the unknown version {version}")
        with warnings.catch_warnings(action="ignore"):  # an old or odd spelling is no concern of the user's
            shape, fortran_order, dtype = READ_HEADER[version](file)
        if dtype.hasobject:
            raise ValueError("it holds Python objects")
        np.broadcast_to(np.empty((), dtype), shape)  # raises for shapes that no array can have
        strides = c_strides(shape[::-1] if fortran_order else shape, dtype)
        array = ByteArray(path, dtype, shape, file, strides[::-1] if fortran_order else strides, file.tell())
        missing = array.start + math.prod(shape) * dtype.itemsize - size
        if missing > 0:
            raise ValueError(f"the last {missing} bytes are missing")
    except OSError as error:
        raise FileError(path, error) from None
    except Exception as error:  # a damaged header raises anything: TokenError, TypeError, ...
        raise FileError(path, f"not a whole .npy file: {shorten(str(error) or 'damaged header', 200)}") from None
    return array


def c_strides(shape: Sequence[int], dtype: np.dtype[Any]) -> tuple[int, ...]:
    """Return the strides of a contiguous array."""
    return tuple(dtype.itemsize * math.prod(shape[i + 1 :]) for i in range(len(shape)))


def open_safetensors(path: Path, name: str | None, role: str, stack: ExitStack) -> ByteArray:
    """Open one tensor of a .safetensors file."""
    library = format_library("safetensors", path)
    file = stack.enter_context(open_file(path))
    try:
        # The library checks all that the header says, but would map the file to read it.
        with library.safe_open(path, framework="numpy") as tensors:
            key = pick(path, tensors.keys(), name, role)
        header_bytes = int.from_bytes(file.read(8), "little")
        tensor = json.loads(file.read(header_bytes))[key]
    except (OSError, library.SafetensorError) as error:
        raise FileError(path, f"not a whole .safetensors file: {error}") from None
    if tensor["dtype"] not in SAFETENSORS_DTYPES:
        raise FileError(path, f"{role} must be real numbers of at most 64 bits, not {tensor['dtype']}")
    dtype = np.dtype(SAFETENSORS_DTYPES[tensor["dtype"]])
    start = 8 + header_bytes + tensor["data_offsets"][0]
    return ByteArray(path, dtype, tuple(tensor["shape"]), file, c_strides(tensor["shape"], dtype), start)


@dataclass
class ZarrArray(BlockSource):
    """An array of a Zarr store."""

    array: Any

    def read(self, block: Block) -> Array:
        """Read a part, which is given by slices of the first axes."""
        try:
            return np.asarray(self.array[block])
        except Exception as error:  # each codec has errors of its own
            raise FileError(self.path, f"can't be read: {error}") from None

    def chunks(self, inner: int) -> Iterator[Array]:
        """Read chunks of whole chunks of the store, so that none is decompressed twice."""
        if len(self.shape) == inner:  # one row
            yield from super().chunks(inner)
            return
        step = self.array.chunks[0] * max(
            CHUNK_BYTES // (self.array.chunks[0] * math.prod(self.shape[1:]) * self.dtype.itemsize), 1
        )
        for start in range(0, max(self.shape[0], 1), step):
            yield self.read((slice(start, start + step),))


def open_zarr(path: Path, name: str | None, role: str, stack: ExitStack) -> ZarrArray:
    """Open an array of a Zarr store, or of a group in it."""
    zarr = format_library("zarr", path)
    try:
        node = zarr.open(path, mode="r")
        if isinstance(node, zarr.Group):
            arrays = {key: member for key, member in node.members(max_depth=None) if isinstance(member, zarr.Array)}
            node = arrays[pick(path, arrays, name, role)]
    except FileError:
        raise
    except Exception as error:
        raise FileError(path, f"not a Zarr store: {error}") from None
    if node.ndim > 2 or not node.ndim:
        raise FileError(path, f"a Zarr array must have one or two axes, not shape {node.shape}")
    return ZarrArray(path, np.dtype(node.dtype), tuple(node.shape), node)


# ---- tables and streams ----


@dataclass
class ArrowTable(Source):
    """Columns of an Arrow IPC file: one of lists, or one a class."""

    columns: list[str]
    read: Batches

    def chunks(self, inner: int) -> Iterator[Array]:
        """Read chunks of at most CHUNK_BYTES."""
        row = 0
        try:
            # A quarter of a chunk: Parquet's decoder holds lists several times.
            for chunk in self._chunks(max(CHUNK_BYTES // (4 * self.row_bytes), 1)):
                row += len(chunk)
                yield chunk
        except DAMAGE as error:
            raise FileError(self.path, error) from None
        if not row:
            yield np.empty((0, *self.shape[1:]), self.dtype)

    def _chunks(self, rows: int) -> Iterator[Array]:
        return self._arrays(self.read(rows, self.columns), self.columns)

    def _arrays(self, batches: Iterator[Any], columns: list[str], first_row: int = 0) -> Iterator[Array]:
        """Return the numbers of record batches, columns side by side if the table has several."""
        for batch in batches:
            arrays = [self._values(batch.column(name), name, first_row) for name in columns]
            first_row += len(batch)
            one = len(self.columns) == 1
            yield arrays[0].reshape(len(batch), *self.shape[1:]) if one else np.stack(arrays, axis=1, dtype=self.dtype)

    def _values(self, column: Any, name: str, first_row: int) -> Array:
        """Return a column's numbers, of which none may be missing."""
        values = column
        if hasattr(column, "flatten"):
            lengths = np.from_dlpack(column.value_lengths()) if column.null_count == 0 else None
            if lengths is not None and (lengths != self.shape[1]).any():
                row = int(np.flatnonzero(lengths != self.shape[1])[0])
                raise FileError(
                    self.path, f"row {first_row + row} of column {name} has {lengths[row]} classes, not {self.shape[1]}"
                )
            values = column.flatten()
        if column.null_count or values.null_count:
            raise FileError(self.path, f"values are missing in column {name} from row {first_row} on")
        # Of booleans, which are bits there, to_numpy makes an array; it imports pandas where that is installed: 0.3 s.
        bits = values.type.bit_width == 1
        return np.asarray(values.to_numpy(zero_copy_only=False)) if bits else np.from_dlpack(values)


def write_whole(spool: IO[bytes], array: Array) -> None:
    """Write an array to a temporary file, of which the user knows no more than the folder."""
    rest = array.data.cast("B")
    try:
        while rest:
            rest = rest[spool.write(rest) :]
    except OSError as error:
        raise FileError(f"a temporary file in {gettempdir()}", error) from None


@dataclass
class ParquetTable(ArrowTable):
    """The same of a Parquet file."""

    file: Any

    def _chunks(self, rows: int) -> Iterator[Array]:
        counts = [self.file.metadata.row_group(group).num_rows for group in range(self.file.num_row_groups)]
        if len(self.columns) <= COLUMNS or max(counts, default=0) * self.row_bytes <= 4 * CHUNK_BYTES:
            yield from super()._chunks(rows)
            return
        for group, count in enumerate(counts):
            with TemporaryFile(buffering=0) as spool:
                parts = self._spooled(group, count, spool, sum(counts[:group]))
                for start in range(0, count, rows):
                    yield np.concatenate([part.read((slice(start, start + rows),)) for part in parts], axis=1)

    def _spooled(self, group: int, count: int, spool: IO[bytes], first_row: int) -> list[ByteArray]:
        """Write a row group to a temporary file, COLUMNS after COLUMNS, and return those."""
        parts = []
        for first in range(0, len(self.columns), COLUMNS):
            columns = self.columns[first : first + COLUMNS]
            shape = count, len(columns)
            parts.append(ByteArray(self.path, self.dtype, shape, spool, c_strides(shape, self.dtype), spool.tell()))
            batches = self.file.iter_batches(SPOOLED_ROWS, row_groups=[group], columns=columns, use_threads=False)
            for array in self._arrays(batches, columns, first_row):
                write_whole(spool, array)
        return parts


def is_list(kind: Any) -> bool:
    """Tell whether a column of this Arrow type holds several numbers a row."""
    from pyarrow import types

    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def is_number(kind: Any) -> bool:
    """Tell whether an Arrow type is of numbers that logits or targets can be."""
    from pyarrow import types

    return bool(types.is_floating(kind) or types.is_integer(kind) or types.is_boolean(kind))


def pick_columns(path: Path, schema: Any, name: str | None, role: str) -> list[str]:
    """Return the names of the columns of a role."""
    from pyarrow import types

    lists = [field.name for field in schema if is_list(field.type)]
    if role == "targets":
        return [pick(path, [field.name for field in schema if types.is_integer(field.type)], name, role)]
    if name is not None:
        columns = [field.name for field in schema if fnmatchcase(field.name, name)]
    elif lists:
        columns = [pick(path, lists, name, role)]
    else:
        columns = [field.name for field in schema if types.is_floating(field.type)]
    if not columns:
        raise FileError(path, f"no column of {role}{f' is named {name}' if name else ''}")
    return columns


def layout(
    path: Path, schema: Any, rows: int, read: Batches, name: str | None, role: str
) -> tuple[np.dtype[Any], tuple[int, ...], list[str]]:
    """Return the dtype, the shape and the columns of a role."""
    columns = pick_columns(path, schema, name, role)
    kinds = [schema.field(column).type for column in columns]
    shape: tuple[int, ...] = (rows,) if role == "targets" else (rows, len(columns))
    if len(columns) == 1 and is_list(kinds[0]):
        width = getattr(kinds[0], "list_size", 0)
        if rows and not width:
            first = next(read(1, columns)).column(0)[0]
            if not first.is_valid:
                raise FileError(path, f"values are missing in column {columns[0]} from row 0 on")
            width = len(first)
        shape, kinds = (rows, width), [kinds[0].value_type]
    for column, kind in zip(columns, kinds, strict=True):
        if not is_number(kind):
            raise FileError(path, f"{role} must be real numbers, which column {column} of {kind} are not")
    return np.result_type(*(kind.to_pandas_dtype() for kind in kinds)), shape, columns


def open_arrow(path: Path, name: str | None, role: str, stack: ExitStack) -> ArrowTable:
    """Open columns of a Parquet or Arrow IPC file."""
    open_file(path).close()  # for one kind of message about files that can't be opened
    try:
        if path.suffix == ".parquet":
            return open_parquet(path, name, role, stack)
        from pyarrow import dataset

        table = dataset.dataset(path, format="ipc")

        def read(rows: int, columns: list[str]) -> Iterator[Any]:
            return iter(table.to_batches(columns, batch_size=rows, batch_readahead=0, fragment_readahead=0, use_threads=False))

        return ArrowTable(path, *layout(path, table.schema, table.count_rows(), read, name, role), read)
    except DAMAGE as error:
        raise FileError(path, f"not a whole {path.suffix} file: {shorten(str(error), 200)}") from None


def open_parquet(path: Path, name: str | None, role: str, stack: ExitStack) -> ParquetTable:
    """Open columns of a Parquet file: not as a dataset, which holds several row groups as a whole, and imports pandas."""
    from pyarrow.parquet import ParquetFile

    file = stack.enter_context(ParquetFile(path, buffer_size=READ_BYTES, pre_buffer=False))

    def read(rows: int, columns: list[str]) -> Iterator[Any]:
        return iter(file.iter_batches(rows, columns=columns, use_threads=False))

    return ParquetTable(path, *layout(path, file.schema_arrow, file.metadata.num_rows, read, name, role), read, file)


@dataclass
class RawStream(Source):
    """Rows of numbers, one after the other, without a header."""

    file: IO[bytes]

    def chunks(self, inner: int) -> Iterator[Array]:
        """Read chunks of at most CHUNK_BYTES and CHUNK_ROWS, or of a row, to the end of the stream."""
        rows = rows_of_chunk(self.row_bytes)
        row, size = 0, -1
        while size:
            buffer = np.empty((rows, *self.shape[1:]), self.dtype)
            size = self._fill(memoryview(buffer.view(np.uint8).data).cast("B"))
            count, rest = divmod(size, self.row_bytes)
            if rest:
                raise FileError("standard input", f"ends in the middle of row {row + count}")
            if count or not row:
                yield buffer[:count]
            row += count

    def _fill(self, buffer: memoryview) -> int:
        """Read until a buffer is full or the stream ends: a pipe gives less at a time."""
        size = 0
        while size < len(buffer) and (count := self.file.readinto(buffer[size:])):  # type: ignore[attr-defined]
            size += count
        return size


# ---- any of them ----

Opener = Callable[[Path, str | None, str, ExitStack], Source]

FORMATS: dict[str, Opener] = {
    ".npy": open_npy,
    ".npz": open_npz,
    ".parquet": open_arrow,
    ".arrow": open_arrow,
    ".feather": open_arrow,
    ".safetensors": open_safetensors,
    ".zarr": open_zarr,
}


def format_library(name: str, path: Path) -> Any:
    """Import the library of a format that not everyone needs."""
    from importlib import import_module

    try:
        return import_module(name)
    except ImportError:
        raise FileError(path, f'needs the package {name}: pip install "pylogits[formats]"') from None


def pick(path: Path, names: Any, name: str | None, role: str) -> str:
    """Return the name asked for, or the only one, or that of the role."""
    names = list(names)
    wanted = role if name is None else name
    if wanted in names:
        return wanted
    if name is None and len(names) == 1:
        return str(names[0])
    raise FileError(path, f"no {role} named {wanted}, only {', '.join(names) or 'nothing'}")


@contextmanager
def open_source(path: Path, name: str | None, role: str) -> Iterator[Source]:
    """Open the array of a role, logits or targets, in a file."""
    if path.suffix not in FORMATS:
        raise FileError(path, f"the name must end in {', '.join(FORMATS)}")
    with ExitStack() as stack:
        yield FORMATS[path.suffix](path, name, role, stack)


@contextmanager
def open_logits(path: Path, name: str | None = None, axis: int = -1) -> Iterator[Source]:
    """Open logits, with their classes on the last axis."""
    with open_source(path, name, "logits") as logits:
        if logits.dtype == np.dtype("V2"):  # how bfloat16 comes back from a .npy file
            logits.dtype = BFLOAT16
        check_dtype(path, logits.dtype)
        if not -len(logits.shape) <= axis < len(logits.shape):
            raise FileError(path, f"no axis {axis} in logits of shape {logits.shape}")
        if logits.shape[axis] == 0:
            raise FileError(path, f"no classes along axis {axis} of logits of shape {logits.shape}")
        logits.move_last(axis)
        yield logits


def check_dtype(path: object, dtype: np.dtype[Any]) -> None:
    """Refuse what can't be logits."""
    if (dtype.kind not in "fiub" and dtype != BFLOAT16) or dtype.itemsize > 8:
        raise FileError(path, f"logits must be real numbers of at most 64 bits, not {dtype}")


def standard_input(dtype: str, classes: int) -> RawStream:
    """Return the logits that come in as bytes."""
    try:
        number = np.dtype(dtype).newbyteorder("<")
    except TypeError:
        raise FileError("--dtype", f"no dtype is named {dtype}") from None
    check_dtype("standard input", number)
    if not classes:
        raise FileError("--classes", "standard input needs the number of classes")
    if sys.stdin is None:
        raise FileError("standard input", "is closed")
    return RawStream(STANDARD_INPUT, number, (-1, classes), sys.stdin.buffer)


class Targets:
    """The targets of logits, in the order of their rows."""

    def __init__(self, source: Source, logits: Source) -> None:
        rows = logits.shape[:-1]
        if source.dtype.kind not in "iu":
            raise FileError(source.path, f"targets must be integers, not {source.dtype}")
        if source.shape != rows and -1 not in rows:
            raise FileError(source.path, f"targets of shape {source.shape} for rows of shape {rows}")
        self.source = source
        self.classes = logits.shape[-1]
        self._chunks = source.chunks(0)
        self._rest = np.empty(0, source.dtype)

    def check(self) -> None:
        """Refuse bad targets before the first row is scored, not hours later."""
        first_row = 0
        for part in self.source.chunks(0):
            bad = np.flatnonzero((part < 0) | (part >= self.classes))
            if bad.size:
                row = first_row + bad[0]
                raise FileError(self.source.path, f"target {part[bad[0]]} at row {row} is outside [0, {self.classes})")
            first_row += part.size

    def take(self, count: int) -> Array:
        """Return the next targets."""
        parts = [self._rest]
        while sum(map(len, parts)) < count:
            try:
                parts.append(next(self._chunks))
            except StopIteration:
                raise FileError(self.source.path, "has fewer targets than there are rows of logits") from None
        taken = np.concatenate(parts) if len(parts) > 1 else self._rest
        self._rest = taken[count:]
        return taken[:count]

    def finish(self) -> None:
        """Refuse targets that are left when a stream of logits has ended."""
        if len(self._rest) or next(self._chunks, self._rest).size:
            raise FileError(self.source.path, "has more targets than there are rows of logits")
