"""A Dask cluster that computes the parts of a job: processes of this machine, or workers anywhere."""

import logging
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from pylogits.batch.job import Each, Part, T
from pylogits.batch.readers import FileError


def stop_with(worker: Any, rows: int) -> None:
    """End a part once its worker is told to close: what it wrote is removed before the process is killed."""
    from dask.distributed import Reschedule

    if worker.status.name == "closing":
        raise Reschedule


def on_this_worker(function: Callable[..., T], part: Part) -> T:
    """Call a function with a part, in a worker's task."""
    from dask.distributed import get_worker

    return function(part, done=partial(stop_with, get_worker()))


def absolute(part: Part) -> Part:
    """Return a part with the same files by their absolute paths."""
    targets, out = (path and path.absolute() for path in (part.targets, part.out))
    return replace(part, logits=part.logits.absolute(), targets=targets, out=out)


@contextmanager
def deaf_children() -> Iterator[None]:
    """Keep Ctrl-C from the processes that start meanwhile: a terminal sends it to all, but only this one shall act on it."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which a new process takes over, unlike a handler
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def on_workers(count: int, address: str | None) -> Iterator[Each[Any]]:
    """Call functions on a cluster: the one at `address`, or `count` processes that live as long as this context.

    A part whose worker dies is given to another one. As a part's file is whole or not there, nothing else is lost. Workers at
    an address were started in folders of their own: they are told where files are from the root on.
    """
    try:
        from dask.distributed import Client, LocalCluster
    except ImportError:
        raise FileError("--workers", 'needs the package dask: pip install "pylogits[dask]"') from None
    remote = address is not None
    with ExitStack() as stack:
        if address is None:
            threads = max(len(os.sched_getaffinity(0)) // count, 1)
            with deaf_children():
                address = stack.enter_context(
                    LocalCluster(
                        n_workers=count,
                        threads_per_worker=1,
                        dashboard_address=None,
                        # else 8787, with a warning where another cluster has it, and for all the network
                        scheduler_kwargs={"dashboard_address": "localhost:0"},
                        silence_logs=logging.CRITICAL,  # an error is one line, a run that is stopped says nothing
                        env={"PYLOGITS_NUM_THREADS": str(threads)},
                    )
                )
        try:
            client = stack.enter_context(Client(address, set_as_default=False))
        except (OSError, ValueError) as error:
            raise FileError(address, f"no Dask scheduler there: {error}") from None

        def each(function: Callable[[Part], T], parts: list[Part]) -> Iterable[T]:
            if remote:
                parts = [absolute(part) for part in parts]
            # Not pure: a file is written. Its own key would else be taken for the result of an earlier run.
            return (future.result() for future in client.map(partial(on_this_worker, function), parts, pure=False))

        yield each
