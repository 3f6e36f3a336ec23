"""The CUDA kernels beside torch, torch.compile and a copy, on the GPU of this machine: a table, and a JSON with the numbers.

Run as ``python bench/gpu.py --json gpu.json``.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from statistics import median
from time import perf_counter
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch.nn import functional

import pylogits

SHAPES = ((262144, 1000), (2048, 128256), (25_000_000, 10), (4096, 1000))  # a gigabyte of float32, but for the last
DTYPES = (torch.float32, torch.bfloat16)
ROUNDS = 30
FLUSH_BYTES = 1 << 30  # written before every call: it empties the cache, and takes longer than Python takes to launch the call
SMALL, CALLS = (32, 1000), 300  # what is launched so often, to time Python
COPY_BYTES = 1 << 30


EAGER = SimpleNamespace(softmax=torch.softmax, cross_entropy=functional.cross_entropy)
COMPILED = SimpleNamespace(softmax=torch.compile(torch.softmax), cross_entropy=torch.compile(functional.cross_entropy))


class Operation(NamedTuple):
    ours: Callable
    torchs: Callable  # its first argument is EAGER or COMPILED
    logits: int  # how often as many bytes as the logits have are read or written at least


def losses(x, labels):
    with pylogits.deferred_checks():  # as torch, which checks labels in the kernel only
        return pylogits.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=x)


def value_and_grad(x, labels):
    with pylogits.deferred_checks():
        return pylogits.cross_entropy_value_and_grad(x, labels)


def torch_value_and_grad(functions, x, labels):
    x = x.detach().requires_grad_()
    loss = functions.cross_entropy(x, labels)
    return loss.detach(), torch.autograd.grad(loss, x)[0]


OPERATIONS = {
    "softmax": Operation(lambda x, labels: pylogits.softmax(x), lambda functions, x, labels: functions.softmax(x, -1), 2),
    "sparse cross entropy": Operation(
        losses, lambda functions, x, labels: functions.cross_entropy(x, labels, reduction="none"), 1
    ),
    "cross entropy and gradient": Operation(value_and_grad, torch_value_and_grad, 2),
}


def seconds(flush, call, *arguments):
    """Return the median time of a call on the GPU, the cache empty at its start; compilation is in the third left out."""
    times = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        call(*arguments)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return median(times[ROUNDS // 3 :])


def python_seconds(call, *arguments):
    """Return the time that Python takes for a call, which does not wait for the GPU."""
    call(*arguments)
    torch.cuda.synchronize()
    start = perf_counter()
    for _ in range(CALLS):
        call(*arguments)
    found = (perf_counter() - start) / CALLS
    torch.cuda.synchronize()
    return found


def times_of(measure, operation, *arguments):
    """Return what `measure` says of an operation: of ours, of torch's, and of that compiled."""
    return {
        "pylogits": measure(operation.ours, *arguments),
        "torch": measure(operation.torchs, EAGER, *arguments),
        "compile": measure(operation.torchs, COMPILED, *arguments),
    }


def copy_bandwidth(flush):
    """Return the bytes a second, read and written, of a copy."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / seconds(flush, target.copy_, source)


def check(result, expected):
    """Compare to torch in float64: a wrong result is not worth timing."""
    results, wanted = (one if isinstance(one, tuple) else (one,) for one in (result, expected))
    for got, want in zip(results, wanted, strict=True):
        tolerance = 1e-2 if got.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance * want.abs().max().item())


def measured():
    """Yield a record for each operation, dtype and shape; the last ones are the times of Python."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    bandwidth = copy_bandwidth(flush)
    for name, operation in OPERATIONS.items():
        for dtype in DTYPES:
            for rows, classes in SHAPES:
                x = torch.randn(rows, classes, device="cuda", dtype=dtype) * 3
                labels = torch.randint(classes, (rows,), device="cuda")
                check(operation.ours(x, labels), operation.torchs(EAGER, x.double(), labels))
                torch.compiler.reset()  # it compiles so many shapes only
                times = times_of(partial(seconds, flush), operation, x, labels)
                limit = operation.logits * x.numel() * x.element_size() / bandwidth
                shape = f"{rows} x {classes}"
                yield {"operation": name, "dtype": str(dtype)[6:], "shape": shape, **times, "copy limit": limit}
    x, labels = torch.randn(SMALL, device="cuda"), torch.randint(SMALL[1], SMALL[:1], device="cuda")
    for name, operation in OPERATIONS.items():
        times = times_of(python_seconds, operation, x, labels)
        shape = f"{SMALL[0]} x {SMALL[1]}, launch"
        yield {"operation": name, "dtype": "float32", "shape": shape, **times, "copy limit": 0.0}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", help="where the numbers go, in seconds")
    path = parser.parse_args().json
    records = []
    print(f"median ms on {torch.cuda.get_device_name()}, torch {torch.__version__}\n")
    for record in measured():
        if not records:
            print("| " + " | ".join(record) + " |\n" + "| --- " * len(record) + "|")
        cells = (f"{value * 1e3:.4f}" if isinstance(value, float) else value for value in record.values())
        print("| " + " | ".join(cells) + " |", flush=True)
        records.append(record)
    if path:
        with open(path, "w") as file:
            json.dump({"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "cases": records}, file, indent=1)


if __name__ == "__main__":
    main()
