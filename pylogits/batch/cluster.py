"""A Dask cluster that computes the parts of a job: processes of this machine, or workers anywhere."""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from pylogits.batch.job import Each, Part, T
from pylogits.batch.readers import FileError


@contextmanager
def on_workers(count: int, address: str | None) -> Iterator[Each[Any]]:
    """Call functions on a cluster: the one at `address`, or `count` processes that live as long as this context.

    A part whose worker dies is given to another one. As a part's file is whole or not there, nothing else is lost.
    """
    try:
        from dask.distributed import Client, LocalCluster
    except ImportError:
        raise FileError("--workers", 'needs the package dask: pip install "pylogits[dask]"') from None
    with ExitStack() as stack:
        if address is None:
            threads = max(len(os.sched_getaffinity(0)) // count, 1)
            address = stack.enter_context(
                LocalCluster(
                    n_workers=count,
                    threads_per_worker=1,
                    dashboard_address=None,
                    env={"PYLOGITS_NUM_THREADS": str(threads)},
                )
            )
        try:
            client = stack.enter_context(Client(address, set_as_default=False))
        except OSError as error:
            raise FileError(address, f"no Dask scheduler there: {error}") from None

        def each(function: Callable[[Part], T], parts: list[Part]) -> Iterable[T]:
            # Not pure: a file is written. Its own key would else be taken for the result of an earlier run.
            return (future.result() for future in client.map(function, parts, pure=False))

        yield each
