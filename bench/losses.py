"""The losses, their gradients and their options beside peers and limits, by turns in one run.

Run as ``python bench/losses.py [--only SUBSTRING] [--rounds N]``.

Limits: ``copy`` copies the logits as `limits.py` does, ``matmul`` is NumPy's matrix products alone, ``plain`` is the same
call without the option.
"""

import argparse
import os

# OpenBLAS reads them when NumPy is loaded: set for another processor, they would slow the matrix products down.
os.environ.pop("OPENBLAS_CORETYPE", None)
os.environ.pop("OPENBLAS_L2_SIZE", None)

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from limits import compiled, in_words, judge, limit_call, milliseconds, print_row
from peers import BACKENDS, SPARSE, active
from side_by_side import ROUNDS, cell, medians, versions
from timed import OVER_CLASSES, OVER_ROWS, SHAPES, Case, arguments

import pylogits

COLUMNS = (*BACKENDS, "torch", "jax")
PEERS = {  # who else has the operation; of those with an option, only the plain call is compared
    "cross_entropy": ("torch", "jax"),
    "linear_cross_entropy": ("torch",),
    "softmax_backward": ("torch",),
    "log_softmax_backward": ("torch",),
}
OPTIONS = (
    "weight",
    "sample_weight",
    "ignore_index",
    "label_smoothing",
    "z_loss",
    "softcap",
    "temperature",
    "where by class",
    "where",
    "soft targets",
)
MORE_BYTES = ("where", "soft targets")  # to read than the plain call: no goal
MEDIUM, LONG = SHAPES[:2]


class Loss(NamedTuple):
    """What is timed: a value, or with `gradient` that too. The shape of a linear layer is rows x features x classes."""

    op: str
    shape: tuple[int, ...]
    gradient: bool = False
    dtype: str = "float32"
    option: str = ""

    @property
    def function(self):
        return self.op + "_value_and_grad" * self.gradient

    def __str__(self):
        return f"{self.function} {self.dtype} {' x '.join(map(str, self.shape))} {self.option}".strip()

    @property
    def limit(self):
        """The name of what a call is measured against besides the peers."""
        if self.option:
            return "plain"
        return "matmul" if self.op == "linear_cross_entropy" else "copy" if self.gradient else ""

    @property
    def peers(self):
        return () if self.option else PEERS[self.op]


def option_goals(shape, option):
    """Return the goals of a call with an option."""
    if option == "softcap":
        return {"plain": 2.0} if shape == MEDIUM else {}
    return {"plain": 1.15} if shape == LONG and option not in MORE_BYTES else {}


CASES = {  # and their goals: most of the time of someone else that C may take
    **{Loss("cross_entropy", shape, gradient): {} for shape in SHAPES[:4] for gradient in (False, True)},
    Loss("cross_entropy", MEDIUM, True): {"jax": 0.4},
    Loss("cross_entropy", LONG, True): {"copy": 1.25},
    Loss("cross_entropy", MEDIUM, dtype="bfloat16"): {"torch": 0.6},
    **{
        Loss("cross_entropy", shape, gradient, option=option): option_goals(shape, option)
        for shape in (MEDIUM, LONG)
        for option in OPTIONS
        for gradient in (False, True)
    },
    Loss("softmax_backward", MEDIUM): {},
    Loss("log_softmax_backward", MEDIUM): {},
    Loss("linear_cross_entropy", (512, 768, 50257)): {"matmul": 1.15},
    Loss("linear_cross_entropy", (512, 768, 50257), True): {},
}

SWEEPS = [Loss("cross_entropy", shape, gradient=True) for shape in (*OVER_CLASSES, *OVER_ROWS)]


def plain(case):
    """Return logits and targets."""
    drawn = arguments(Case(SPARSE, case.dtype, case.shape))
    return drawn["logits"], drawn["labels"]


@lru_cache(maxsize=1)
def given(case):
    """Return the arrays of a case and its options."""
    rng = np.random.default_rng(0)
    if case.op == "linear_cross_entropy":
        rows, features, classes = case.shape
        x, w = (rng.standard_normal((count, features), np.float32) for count in (rows, classes))
        return (x, w / 8, rng.integers(classes, size=rows)), {}
    logits, targets = plain(case)
    if case.op != "cross_entropy":
        forward = getattr(pylogits, case.op.removesuffix("_backward"))
        return (rng.standard_normal(case.shape, np.float32), forward(logits)), {}
    rows, classes = case.shape
    match case.option:
        case "":
            return (logits, targets), {}
        case "soft targets":
            soft = rng.random(case.shape, np.float32)
            return (logits, soft / soft.sum(axis=1, keepdims=True)), {}
        case "weight":
            value = rng.random(classes, np.float32)
        case "sample_weight":
            value = rng.random(rows, np.float32)
        case "where by class":
            value = rng.random(classes) < 0.9
            value[targets] = True
            return (logits, targets), {"where": value}
        case "where":
            value = rng.random(case.shape, np.float32) < 0.9
            np.put_along_axis(value, targets[:, None], True, axis=1)
        case scalar:
            value = {"ignore_index": 0, "label_smoothing": 0.1, "z_loss": 1e-4, "softcap": 30.0, "temperature": 0.7}[scalar]
    return (logits, targets), {case.option: value}


def prepare(name, case):
    """Return a function that runs a case, and returns an array or a tuple; ImportError where it can't."""
    if name == "plain":
        return ours(case, plain(case), {})
    arrays, options = given(case._replace(gradient=False))
    if name in BACKENDS:
        try:
            with active(name):
                pass
        except ValueError as error:
            raise ImportError(error) from None
        return ours(case, arrays, options)
    return {"torch": torch, "jax": jax, "matmul": matmul}[name](case, arrays)


def ours(case, arrays, options):
    """Return a call of pylogits; a gradient of the size of the logits goes to memory that is there."""
    function = getattr(pylogits, case.function)
    if case.op != "linear_cross_entropy" and case.function != "cross_entropy":
        options = options | {"grad_out" if case.gradient else "out": np.empty_like(arrays[0])}
    return lambda: function(*arrays, **options)


def torch(case, arrays):
    """Return a call of PyTorch, eager."""
    import torch

    torch.set_num_threads(pylogits.get_num_threads())
    if case.dtype == "bfloat16":
        logits, targets = arrays
        tensors = torch.from_numpy(logits.view(np.int16)).view(torch.bfloat16), torch.from_numpy(targets)
    else:
        tensors = [torch.from_numpy(array) for array in arrays]
    if case.op.endswith("_backward"):
        function = getattr(torch.ops.aten, f"_{case.op}_data").out
        out = {"grad_input" if case.op == "softmax_backward" else "out": torch.empty_like(tensors[0])}
        return lambda: function(*tensors, -1, torch.float32, **out).numpy()
    function, inputs = getattr(torch.nn.functional, case.op), tensors[:-1]
    if not case.gradient:
        return lambda: function(*tensors).item()
    for tensor in inputs:
        tensor.requires_grad_()

    def call():
        loss = function(*tensors)
        return loss.item(), *(grad.numpy() for grad in torch.autograd.grad(loss, inputs))

    return call


def jax(case, arrays):
    """Return a call of JAX, compiled."""
    import jax
    from jax import numpy as jnp

    jax.config.update("jax_enable_x64", True)

    def loss(x, targets):
        return (jax.nn.logsumexp(x, 1) - jnp.take_along_axis(x, targets[:, None], 1)[:, 0]).mean()

    compiled = jax.jit(jax.value_and_grad(loss) if case.gradient else loss)
    on_device = [jax.device_put(array) for array in arrays]
    return lambda: jax.tree.map(np.asarray, compiled(*on_device))


def moved_bytes(case):
    """Return what a call must read and write at least, but for single numbers a row."""
    arrays, options = given(case._replace(gradient=False))
    read = sum(array.nbytes for array in (*arrays, *options.values()) if isinstance(array, np.ndarray))
    grads = arrays[:1] if case.op != "linear_cross_entropy" else arrays[:2]
    return read + (sum(array.nbytes for array in grads) if case.gradient or case.op.endswith("_backward") else 0)


def matmul(case, arrays):
    """Return NumPy's products for the logits and, from slopes of their size, the gradients."""
    x, w, _ = arrays
    logits = np.empty((len(x), len(w)), x.dtype)

    def call():
        np.matmul(x, w.T, out=logits)
        return (logits @ w, logits.T @ x) if case.gradient else logits

    return call


def some(result):
    """Return what is checked of a result: values, and the first rows of gradients."""
    if isinstance(result, tuple):
        return [array for part in result if part is not None for array in some(part)]
    return [np.atleast_1d(result)[:4].astype(np.float64)]


@lru_cache(maxsize=1)
def expected(case):
    """Return what is right of a case, by the definition."""
    arrays, options = given(case._replace(gradient=False))
    with pylogits.use_backend("reference"):
        return some(ours(case, arrays, options)())


def check(case, name, result):
    """Compare a result to what is right: a wrong one is not worth timing. Limits are something else."""
    if name == case.limit:
        return
    # Computed once for the value and the gradient: the value alone is the beginning of both.
    right = expected(case._replace(gradient=not case.op.endswith("_backward")))
    tolerance = 0.1 if case.dtype == "bfloat16" else 1e-4
    for got, want in zip(some(result), right, strict=case.gradient):
        np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance / 10 * np.abs(want).max())


def callers(case):
    """Return the checked calls for a case by name, of those who can run it."""
    calls = {}
    for name in names(case):
        try:
            calls[name] = prepare(name, case)
        except ImportError:
            continue
        with active(name):
            check(case, name, calls[name]())
    return calls


def names(case):
    """Return who can be timed on a case; `copy`, which needs a compiler, is not among them."""
    return [*BACKENDS, *case.peers, *([case.limit] if case.limit in ("plain", "matmul") else [])]


def main():
    """Print a table in Markdown: median milliseconds and, in brackets, the ratio to the best peer."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="only what has this in its name")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"of all by turns ({ROUNDS})")
    options = parser.parse_args()
    functions = compiled()
    pylogits.show_config()
    print(f"{'peers':15} {', '.join(versions())}\n")
    heads = ("median ms (of the best peer's)", *COLUMNS, "c of the limit", "goal", "met")
    print_row(heads)
    print_row(["---"] * len(heads))
    for case, goals in CASES.items():
        if options.only not in str(case):
            continue
        calls = callers(case)
        if case.limit == "copy":
            calls["copy"] = limit_call(functions, Case("softmax", case.dtype, case.shape))
        times = medians(calls, options.rounds)
        best = min((times[name] for name in case.peers if name in times), default=None)
        if case.peers:
            goals = {**goals, "the best peer": 1.0}
        limit = times.get(case.limit)
        print_row(
            (
                str(case),
                *(cell(times[name], best) if name in times else "" for name in COLUMNS),
                f"{times['c'] / limit:.2f} x {case.limit} ({milliseconds(limit)} ms)" if limit else "",
                ", ".join(in_words(*goal) for goal in goals.items()),
                judge(goals, times | ({"the best peer": best} if best else {})) if goals else "",
            )
        )


if __name__ == "__main__":
    main()
