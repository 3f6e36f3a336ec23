"""Dask arrays as chunks of whole rows of logits, with what belongs to the rows in chunks that match."""

import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, SupportsIndex

import dask.array as da
import numpy as np

from pylogits import _rows
from pylogits._rows import Array


class ChunkedRows:
    """Logits whose rows are whole within each chunk.

    `axis` is an int, or with `several` what a reduction of NumPy's takes.
    """

    def __init__(self, logits: Any, axis: Any, several: bool = False) -> None:
        array = da.asarray(logits)
        self.dtype = _rows.check_floats(array, "logits")
        self.axes = _rows.check_axis(axis, array.ndim) if several else (_rows.check_single_axis(axis, array.ndim),)
        if any(len(array.chunks[number]) > 1 for number in self.axes):
            warnings.warn(
                f"logits are chunked along their class axis, {axis}: all chunks of a row are brought together",
                da.PerformanceWarning,
                stacklevel=3,  # the caller of a public function
            )
            array = array.rechunk({number: -1 if number in self.axes else "auto" for number in range(array.ndim)})
        self.logits = array
        self.shape, self.chunks = (
            tuple(one for number, one in enumerate(of) if number not in self.axes) for of in (array.shape, array.chunks)
        )

    def per_row(self, name: str, values: Any, broadcast: bool = False) -> Any:
        """An array in the shape of the rows; None for None."""
        return fit(name, values, self.shape, self.chunks, broadcast)

    def full(self, name: str, values: Any, count: int | None = None, broadcast: bool = False) -> Any:
        """An array in the shape of the logits, or with `count` entries a row in place of the classes; None for None."""
        shape, chunks = list(self.logits.shape), list(self.logits.chunks)
        if count is not None:
            shape[self.axes[0]], chunks[self.axes[0]] = count, (count,)
        return fit(name, values, tuple(shape), tuple(chunks), broadcast)

    def checked(self, name: str, labels: Any, ignore_index: SupportsIndex | None = None) -> Any:
        """Class numbers, lazily refused when they are outside [0, C): by their place among all, which a chunk does not know."""
        if labels is None:
            return None
        check = partial(_check_labels, name=name, classes=self.logits.shape[self.axes[0]], ignore_index=ignore_index)
        return labels.map_blocks(check, dtype=labels.dtype, meta=labels._meta)

    def apply(self, operation: Callable[..., Any], *, lazy: dict[str, Any] | None = None, **given: Any) -> Any:
        """What a NumPy operation on logits returns for each chunk of rows, as one Dask array, or a list of several.

        Of what it is given, Dask arrays are divided into chunks, and the rest are options. `lazy` holds options that are
        Dask arrays.
        """
        arrays = {"logits": self.logits} | {name: value for name, value in given.items() if isinstance(value, da.Array)}
        options = {name: value for name, value in given.items() if name not in arrays}
        axis = tuple(range(-len(self.axes), 0))
        options["axis"] = axis if len(axis) != 1 else axis[0]
        chunk = partial(_compute_chunk, operation, tuple(arrays), options)
        axes = [self.axes if array.ndim == self.logits.ndim else () for array in arrays.values()]
        cores = [tuple(array.shape[number] for number in own) for array, own in zip(arrays.values(), axes, strict=True)]
        # Without rows, it checks the options, and shows the dtypes and shapes of the results.
        empty = chunk(*(np.empty((0, *core), array.dtype) for core, array in zip(cores, arrays.values(), strict=True)))
        results = empty if isinstance(empty, tuple) else (empty,)
        found = [result.shape[1:] for result in results]
        return da.apply_gufunc(
            chunk,
            ",".join(map(_dimensions, cores)) + "->" + ",".join(map(_dimensions, found)),
            *arrays.values(),
            axes=axes + [self.axes if core else () for core in found],
            output_dtypes=[result.dtype for result in results],
            output_sizes={_dimension(size, place): size for core in found for place, size in enumerate(core)},
            **(lazy or {}),
        )


def _check_labels(
    labels: Array, name: str, classes: int, ignore_index: SupportsIndex | None, block_info: dict[int, Any]
) -> Array:
    counted = labels if ignore_index is None else np.where(labels == ignore_index, 0, labels)
    if ((counted < 0) | (counted >= classes)).any():
        _rows.raise_bad_label(counted, name, classes, [start for start, _ in block_info[0]["array-location"]])
    return labels


def _compute_chunk(
    operation: Callable[..., Any], names: tuple[str, ...], options: dict[str, Any], *arrays: Array, **lazy: Any
) -> Any:
    results = operation(**dict(zip(names, arrays, strict=True)), **options, **lazy)
    return tuple(result for result in results if result is not None) if isinstance(results, tuple) else results


def _dimensions(core: tuple[int, ...]) -> str:
    return "(" + ",".join(_dimension(size, place) for place, size in enumerate(core)) + ")"


def _dimension(size: int, place: int) -> str:
    """A name for a gufunc's signature, where the same name means the same size."""
    return f"n{size}_{place}"


def fit(name: str, values: Any, shape: tuple[int, ...], chunks: tuple[tuple[int, ...], ...], broadcast: bool) -> Any:
    """An array of a shape, or one that broadcasts to it, in the given chunks."""
    if values is None:
        return None
    array = da.asarray(values)
    if any(math.isnan(size) for size in (*array.shape, *shape)):
        raise ValueError(f"{name} and logits need chunks of known sizes: call their compute_chunk_sizes() first")
    if array.shape != shape and not broadcast:
        raise ValueError(f"{name} must have shape {shape}, not {array.shape}")
    own = shape[len(shape) - array.ndim :]
    if array.ndim > len(shape) or any(size not in (1, wanted) for size, wanted in zip(array.shape, own, strict=True)):
        raise ValueError(f"{name} of shape {array.shape} does not broadcast to {shape}")
    parts = zip(array.shape, chunks[len(shape) - array.ndim :], strict=True)
    array = array.rechunk(tuple((1,) if size == 1 else part for size, part in parts))
    return da.broadcast_to(array, shape, chunks=chunks)
