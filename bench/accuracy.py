"""Worst errors in ulp against extended precision, of pylogits and of its peers, on the same rows.

Run as ``python bench/accuracy.py``; ``--help`` lists the options. It needs a C compiler. Exits with 1 where an error is
above what is promised, and names the row.
"""

import argparse
import ctypes
import itertools
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import ml_dtypes
import numpy as np

import pylogits

CLASSES = (1, 2, 3, 5, 7, 10, 16, 17, 31, 33, 63, 64, 65, 100, 127, 128, 1000, 1023, 4096, 4097, 5001, 50257, 128256, 262144)
SHARES = {1.0: 0.5, 0.7: 0.25, 3.3: 0.25}  # of the logits, by temperature
CHUNK = 1 << 20  # logits at a time
BOUNDS = {  # in ulp, of float32 and float64
    "softmax": (2, 3),
    "log_softmax": (2, 3),
    "logsumexp": (1, 2),
    "sparse cross entropy": (2, 3),
    "dense cross entropy": (2, 3),
}
KINDS = ("", ", temperature", ", subnormal", ", temperature, subnormal")
SHORT = {"float32": "f32", "float64": "f64"}


# ---- rows, each family's as hard as it can be in its own way ----


def normal(rng, rows, classes, dtype):
    """Standard deviations from 0.1 to 30."""
    return rng.standard_normal((rows, classes)) * rng.choice([0.1, 0.3, 1, 3, 10, 30], (rows, 1))


def offset(rng, rows, classes, dtype):
    """A common offset up to 1e8, either sign: neighbours in float32 are 8 apart there."""
    far = 10 ** rng.uniform(0, 8, (rows, 1)) * rng.choice([-1, 1], (rows, 1))
    return normal(rng, rows, classes, dtype) + far


def edge(rng, rows, classes, dtype):
    """Maxima about 256 and 2048, where the kernels change the way that they reduce the exponent."""
    x = normal(rng, rows, classes, dtype)
    near = rng.choice([256, 2048], (rows, 1)) * (1 + rng.integers(-3, 4, (rows, 1)) * np.finfo(dtype).eps)
    return x - x.max(axis=1, keepdims=True) + near * rng.choice([-1, 1], (rows, 1))


def confident(rng, rows, classes, dtype):
    """One logit ahead of all others by 1 to 80; the others random, or equal."""
    x = rng.standard_normal((rows, classes)) * rng.choice([0, 0.1, 1], (rows, 1))
    x[np.arange(rows), rng.integers(classes, size=rows)] = x.max(axis=1) + rng.uniform(1, 80, rows)
    return x


def ties(rng, rows, classes, dtype):
    """Few different values, so that the maximum is met many times."""
    return np.round(normal(rng, rows, classes, dtype)) / rng.choice([1, 3, 4], (rows, 1))


def near_ties(rng, rows, classes, dtype):
    """The maximum and its neighbours, at random places."""
    x = normal(rng, rows, classes, dtype).astype(dtype)
    top = x.max(axis=1, keepdims=True)
    for value in (top, np.nextafter(top, dtype(-np.inf)), np.nextafter(np.nextafter(top, dtype(-np.inf)), dtype(-np.inf))):
        np.put_along_axis(x, rng.integers(classes, size=(rows, 3)), value, axis=1)
    np.put_along_axis(x, rng.integers(classes, size=(rows, 1)), top, axis=1)
    return x


def ascending(rng, rows, classes, dtype):
    """Sorted: every block of a long row has a larger maximum than the one before."""
    return np.sort(normal(rng, rows, classes, dtype), axis=1)


def descending(rng, rows, classes, dtype):
    """Sorted the other way."""
    return -ascending(rng, rows, classes, dtype)


def many_tiny(rng, rows, classes, dtype):
    """One big term and many tiny ones, which only together can be seen."""
    x = rng.uniform(-0.01, 0.01, (rows, classes)) - rng.uniform(1, 40, (rows, 1))
    x[np.arange(rows), rng.choice([0, classes // 2, classes - 1], rows)] = 0
    return x


def runner_up(rng, rows, classes, dtype):
    """The maximum, one other term that can be seen, and the rest far below it: its rounding errors are those of the sum."""
    x = -rng.uniform(3, 25, (rows, classes))
    x[np.arange(rows), rng.integers(classes, size=rows)] = -rng.uniform(0.1, 6, rows)
    x[np.arange(rows), rng.integers(classes, size=rows)] = 0
    return x


def copies(rng, rows, classes, dtype):
    """The maximum, another value, and many copies of a third: their errors do not average out in the sum."""
    x = np.broadcast_to(rng.uniform(-8, 0, (rows, 1)), (rows, classes)).copy()
    x[np.arange(rows), rng.integers(classes, size=rows)] = rng.uniform(-8, 0, rows)
    x[np.arange(rows), rng.integers(classes, size=rows)] = 0
    return x


def underflow(rng, rows, classes, dtype):
    """Probabilities about the smallest normal and the smallest subnormal number."""
    lowest = np.log(np.finfo(dtype).smallest_subnormal.astype(np.longdouble)).astype(float)
    x = rng.uniform(lowest - 3, lowest + 40, (rows, classes)) + rng.uniform(-20, 20, (rows, 1)) * rng.choice([0, 1], (rows, 1))
    x[np.arange(rows), rng.integers(classes, size=rows)] = rng.uniform(-1, 1, rows)
    return x


def cancelling(rng, rows, classes, dtype):
    """The maximum is about -log C, so that logsumexp is about 0."""
    return rng.standard_normal((rows, classes)) * rng.choice([1e-6, 1e-3, 0.1], (rows, 1)) - np.log(classes)


def magnitudes(rng, rows, classes, dtype):
    """Logits of all sizes, either sign."""
    return np.exp2(rng.uniform(-30, 7, (rows, classes))) * rng.choice([-1, 1], (rows, classes))


FAMILIES = {
    draw.__name__: draw
    for draw in (
        normal,
        offset,
        edge,
        confident,
        ties,
        near_ties,
        ascending,
        descending,
        many_tiny,
        runner_up,
        copies,
        underflow,
        cancelling,
        magnitudes,
    )
}


def chunks(dtype, options):
    """Yield rows of all families by turns, their families' names, labels and temperature."""
    turn = options.seed
    names = np.array(options.family)
    for classes in CLASSES:
        for temperature, share in SHARES.items():
            rng = np.random.default_rng([options.seed, classes, int(temperature * 10), np.dtype(dtype).num])
            wanted = max(1, round(options.outputs * share / len(CLASSES) / classes))
            count = -(-wanted * classes // CHUNK)
            for _ in range(count):
                rows = -(-wanted // count)
                family = names[(np.arange(rows) + turn) % len(names)]
                turn += rows
                x = np.empty((rows, classes), dtype)
                for name in options.family:
                    mine = family == name
                    if mine.any():
                        x[mine] = FAMILIES[name](rng, mine.sum(), classes, dtype)
                x[family == "underflow"] *= dtype(temperature)
                labels = np.where(rng.random(rows) < 0.5, x.argmax(axis=1), rng.integers(classes, size=rows))
                yield x, family, labels, temperature


# ---- who is measured: each gives a function for some of the quantities ----


def one_hot(x, labels):
    """Return the labels as rows of x's dtype."""
    q = np.zeros_like(x)
    np.put_along_axis(q, labels[:, None], 1, axis=1)
    return q


def ours():
    """Pylogits itself."""
    loss, dense = pylogits.sparse_softmax_cross_entropy_with_logits, pylogits.softmax_cross_entropy_with_logits
    return {
        "softmax": lambda x, labels, temperature=1.0: pylogits.softmax(x, temperature=temperature),
        "log_softmax": lambda x, labels, temperature=1.0: pylogits.log_softmax(x, temperature=temperature),
        "logsumexp": lambda x, labels, temperature=1.0: pylogits.logsumexp(x, temperature=temperature),
        "sparse cross entropy": lambda x, labels: loss(labels=labels, logits=x),
        "dense cross entropy": lambda x, labels: dense(labels=one_hot(x, labels), logits=x),
    }


def torch():
    """PyTorch, on the CPU."""
    import torch

    wrap, loss = torch.from_numpy, torch.nn.functional.cross_entropy
    return {
        "softmax": lambda x, labels: torch.softmax(wrap(x), 1).numpy(),
        "log_softmax": lambda x, labels: torch.log_softmax(wrap(x), 1).numpy(),
        "logsumexp": lambda x, labels: torch.logsumexp(wrap(x), 1).numpy(),
        "sparse cross entropy": lambda x, labels: loss(wrap(x), wrap(labels), reduction="none").numpy(),
        "dense cross entropy": lambda x, labels: loss(wrap(x), wrap(one_hot(x, labels)), reduction="none").numpy(),
    }


def jax():
    """JAX, on the CPU; it has no losses of its own."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_x64", True)  # changes nothing for float32
    logs = jax.jit(jax.nn.log_softmax)
    sparse = jax.jit(lambda x, labels: -jax.numpy.take_along_axis(jax.nn.log_softmax(x), labels[:, None], 1)[:, 0])
    dense = jax.jit(lambda x, q: -(q * jax.nn.log_softmax(x)).sum(1))
    sums = jax.jit(lambda x: jax.nn.logsumexp(x, 1))
    soft = jax.jit(jax.nn.softmax)
    return {
        "softmax": lambda x, labels: np.asarray(soft(x)),
        "log_softmax": lambda x, labels: np.asarray(logs(x)),
        "logsumexp": lambda x, labels: np.asarray(sums(x)),
        "sparse cross entropy": lambda x, labels: np.asarray(sparse(x, labels)),
        "dense cross entropy": lambda x, labels: np.asarray(dense(x, one_hot(x, labels))),
    }


def scipy():
    """SciPy; its losses by way of log_softmax."""
    from scipy.special import log_softmax, logsumexp, softmax

    return {
        "softmax": lambda x, labels: softmax(x, 1),
        "log_softmax": lambda x, labels: log_softmax(x, 1),
        "logsumexp": lambda x, labels: logsumexp(x, 1),
        "sparse cross entropy": lambda x, labels: -np.take_along_axis(log_softmax(x, 1), labels[:, None], 1)[:, 0],
        "dense cross entropy": lambda x, labels: -(one_hot(x, labels) * log_softmax(x, 1)).sum(1),
    }


def onnxruntime():
    """ONNX Runtime, on the CPU; it has no dense loss."""
    import onnx
    import onnxruntime
    from onnx import helper

    @lru_cache
    def session(operator, attributes, dtype, inputs):
        info, real = helper.make_tensor_value_info, helper.np_dtype_to_tensor_dtype(dtype)
        named = [info("x", real, ["rows", "classes"]), info("labels", onnx.TensorProto.INT64, ["rows"])][:inputs]
        node = helper.make_node(operator, [given.name for given in named], ["result"], **dict(attributes))
        graph = helper.make_graph([node], "one", named, [info("result", real, None)])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
        return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])

    def run(operator, inputs=1, **attributes):
        def call(x, labels):
            feed = {"x": x, "labels": labels} if inputs == 2 else {"x": x}
            return session(operator, tuple(attributes.items()), x.dtype, inputs).run(None, feed)[0]

        return call

    return {
        "softmax": run("Softmax", axis=1),
        "log_softmax": run("LogSoftmax", axis=1),
        "logsumexp": run("ReduceLogSumExp", axes=(1,), keepdims=0),
        "sparse cross entropy": run("SoftmaxCrossEntropyLoss", 2, reduction="none"),
    }


PEERS = {"torch": torch, "jax": jax, "scipy": scipy, "onnxruntime": onnxruntime}


# ---- the judge ----


class Worst(ctypes.Structure):
    """An error in ulp, where it was met, and what would have been right."""

    _fields_ = (("ulp", ctypes.c_double), ("place", ctypes.c_int64), ("expected", ctypes.c_double))


def compile_judge(folder, *flags):
    """Return accuracy.c as a library."""
    source, library = Path(__file__).with_suffix(".c"), Path(folder) / f"accuracy{len(flags)}.so"
    command = ["cc", "-std=gnu11", "-O2", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-shared", *flags, str(source)]
    quad = [] if np.finfo(np.longdouble).nmant == 112 else ["-lquadmath"]
    subprocess.run([*command, "-o", str(library), *quad, "-lm"], check=True)
    return ctypes.CDLL(str(library))


def address(array):
    """Return a pointer to the elements of a contiguous array."""
    assert array.flags.c_contiguous
    return ctypes.c_void_p(array.ctypes.data)


class Judge:
    """Knows the right results of some rows."""

    def __init__(self, library, x, labels, temperature):
        self.library, self.type = library, SHORT[x.dtype.name]
        rows, classes = x.shape
        wide = np.dtype("V16")
        softmax, log_softmax = np.empty(x.shape, wide), np.empty(x.shape, wide)
        logsumexp, magnitude = np.empty(rows, wide), np.empty(rows, wide)
        real = ctypes.c_float if self.type == "f32" else ctypes.c_double
        getattr(library, f"reference_{self.type}")(
            address(x),
            ctypes.c_int64(rows),
            ctypes.c_int64(classes),
            real(temperature),
            *map(address, (softmax, log_softmax, logsumexp, magnitude)),
        )
        picked = np.ascontiguousarray(log_softmax[np.arange(rows), labels])
        self.right = {
            "softmax": (softmax, softmax),
            "log_softmax": (log_softmax, log_softmax),
            "logsumexp": (logsumexp, magnitude),
            "sparse cross entropy": (picked, picked),
            "dense cross entropy": (picked, picked),
        }

    def worst(self, quantity, got):
        """Return the worst of the normal and of the subnormal results."""
        worst = (Worst * 2)()
        sign = -1 if "cross entropy" in quantity else 1  # the right results are log-probabilities
        got = np.ascontiguousarray(sign * got)
        right, magnitude = self.right[quantity]
        assert got.shape == right.shape
        function = getattr(self.library, f"worst_{self.type}")
        function(address(got), address(right), address(magnitude), ctypes.c_int64(got.size), worst)
        return worst


@dataclass
class Record:
    """The worst of one quantity, dtype and library so far."""

    ulp: float = -1
    row: str = ""

    def note(self, worst, x, family, labels, temperature, got):
        """Keep a worse error, and say where it is."""
        if worst.ulp <= self.ulp:
            return
        self.ulp = worst.ulp
        rows, classes = x.shape
        r, c = divmod(worst.place, classes) if got.size == x.size and got.ndim == 2 else (worst.place, int(labels[worst.place]))
        self.row = (
            f"family {family[r]}, shape {rows} x {classes}, temperature {temperature}, row {r}, class {c}: "
            f"got {abs(got.flat[worst.place])!s}, not {abs(worst.expected)!r}; logit {x[r, c]!s}, maximum {x[r].max()!s}"
        )


def measure(library, dtype, options, people, missing):
    """Return the records by quantity and library, and the number of results by quantity."""
    records, counts = {}, {}
    for x, family, labels, temperature in chunks(dtype, options):
        judge = Judge(library, x, labels, temperature)
        for name, quantities in people.items():
            if temperature != 1 and name != "pylogits":
                continue
            for quantity, function in quantities.items():
                if temperature != 1 and "cross entropy" in quantity:
                    continue
                given = {} if temperature == 1 else {"temperature": temperature}
                try:
                    with np.errstate(all="ignore"):
                        got = np.asarray(function(x, labels, **given))
                except Exception as error:
                    if name == "pylogits":
                        raise
                    missing.setdefault((name, quantity, x.dtype.name), str(error).splitlines()[0])
                    continue
                warmed = "" if temperature == 1 else ", temperature"
                for worst, small in zip(judge.worst(quantity, got), ("", ", subnormal"), strict=True):
                    record = records.setdefault((quantity, warmed + small, name), Record())
                    record.note(worst, x, family, labels, temperature, got)
                if name == "pylogits":
                    counts[quantity + warmed] = counts.get(quantity + warmed, 0) + got.size
    return records, counts


def table(heading, rows):
    """Print a table in Markdown."""
    for row in (heading, ["---"] * len(heading), *rows):
        print("| " + " | ".join(row) + " |")
    print(flush=True)


def number(ulp):
    """Return an error as text."""
    return f"{ulp:.3f}" if ulp < 10 else f"{ulp:.4g}"


def wide(dtypes, options, folder):
    """Print the errors of float32 and float64; return what is above its bound."""
    library = compile_judge(folder)
    people, missing, exceeded, where, rows = {"pylogits": ours()}, {}, [], [], []
    for name in options.peers:
        try:
            people[name] = PEERS[name]()
        except ImportError as error:
            print(f"{name} is left out: {error}\n")
    print(", ".join(f"{name} {version(name)}" for name in people) + f"; backend {options.backend}, seed {options.seed}\n")
    for name in dtypes:
        records, counts = measure(library, np.dtype(name).type, options, people, missing)
        for quantity, kind in itertools.product(BOUNDS, KINDS):
            mine = records.get((quantity, kind, "pylogits"))
            small = "subnormal" in kind
            if mine is None or mine.ulp < 0 or (small and mine.ulp < 1e-3):
                continue
            # Nothing is promised of subnormal probabilities but that they are there.
            bound = None if small and quantity == "softmax" else BOUNDS[quantity][name == "float64"]
            others = [records.get((quantity, kind, other), Record()).ulp for other in people if other != "pylogits"]
            cells = [number(ulp) if ulp >= 0 else "-" for ulp in (mine.ulp, *others)]
            count = "" if small else f"{counts[quantity + kind]:,}"
            rows.append([quantity + kind, name, count, str(bound or "-"), *cells])
            where.append(f"{quantity}{kind} {name} {number(mine.ulp)}: {mine.row}")
            if bound and not mine.ulp <= bound:
                exceeded.append(where[-1])
    table(["worst error in ulp", "dtype", "results", "promised", *people], rows)
    for (name, quantity, dtype), error in missing.items():
        print(f"{name} has no {quantity} for {dtype}: {error}")
    print("The worst of pylogits:", *where, sep="\n  ", end="\n\n", flush=True)
    return exceeded


def narrow(dtypes, options):
    """Print how many results differ from the float32 result rounded once; return what does."""
    exceeded, rows = [], []
    for name in dtypes:
        dtype = np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
        counts, wrong = {}, {}
        for x, family, labels, temperature in chunks(np.float32, options):
            with np.errstate(over="ignore"):
                x = x.astype(dtype)
            for quantity, function in ours().items():
                if temperature != 1 and "cross entropy" in quantity:
                    continue
                given = {} if temperature == 1 else {"temperature": float(dtype.type(temperature))}
                got = function(x, labels, **given)
                with np.errstate(all="ignore"):
                    expected = function(x.astype(np.float32), labels, **given).astype(got.dtype)
                differ = (got != expected) & ~(np.isnan(got) & np.isnan(expected))
                counts[quantity] = counts.get(quantity, 0) + got.size
                wrong[quantity] = wrong.get(quantity, 0) + np.count_nonzero(differ)
                if differ.any() and wrong[quantity] == np.count_nonzero(differ):
                    r = np.argwhere(differ)[0][0]
                    exceeded.append(
                        f"{quantity} {name}: family {family[r]}, shape {x.shape[0]} x {x.shape[1]}, "
                        f"temperature {temperature}, row {r}: got {got[differ][0]}, not {expected[differ][0]}"
                    )
        rows += [[quantity, name, f"{counts[quantity]:,}", "0", str(wrong[quantity])] for quantity in counts]
    table(["results that are not float32's, rounded once", "dtype", "results", "promised", "pylogits"], rows)
    return exceeded


# ---- the two elementary functions ----


def floats(first, last):
    """Yield all float32 from first to last, of one sign, by the number of their bits."""
    begin, end = (int(np.float32(value).view(np.uint32)) for value in (first, last))
    for start in range(begin, end + 1, 1 << 22):
        yield np.minimum(np.arange(start, start + (1 << 22), dtype=np.int64), end).astype(np.uint32).view(np.float32)


def doubles(lowest, highest, sign, seed, count=1 << 21):
    """Yield random doubles, as many in each power of two from 2^lowest to 2^highest."""
    yield sign * np.exp2(np.random.default_rng(seed).uniform(lowest, highest, count))


def elementary(options, folder):
    """Print the worst errors of exp and log1p: for all float32, and for random float64."""
    try:
        from pylogits._simd import available_isas

        flags = ["-mavx2", "-mfma", "-DPL_ISA=avx2"] if "avx2" in available_isas() else ["-DPL_ISA=scalar"]
    except ImportError:
        flags = ["-DPL_ISA=scalar"]
    library = compile_judge(folder, f"-I{Path(__file__).parents[1] / 'c'}", "-w", *flags)
    exp = {"float32": lambda: floats(-0.0, -104.0), "float64": lambda: doubles(-60, np.log2(745.1), -1, options.seed)}
    # A sum of exponentials: from one that is hardly there to 2^31 classes.
    log1p = {"float32": lambda: floats(0.0, 2.0**31), "float64": lambda: doubles(-1073, 31, 1, options.seed)}
    tested = {"exp, rounded": ("exp", exp), "exp, as a pair": ("exp_pair", exp), "log1p, as a pair": ("log1p_pair", log1p)}
    rows = []
    for title, (function, inputs) in tested.items():
        for name in SHORT.keys() & options.dtype:
            check = getattr(library, f"worst_{function}_{SHORT[name]}")
            worst, at, count = Worst(ulp=-1), 0.0, 0
            for x in inputs[name]():
                found = Worst()
                check(address(x), ctypes.c_int64(x.size), ctypes.byref(found))
                count += x.size
                if found.ulp > worst.ulp:
                    worst, at = found, x[found.place]
            rows.append([title, name, "random" if name == "float64" else "all", f"{count:,}", f"{worst.ulp:.3g}", f"{at:.9g}"])
    table(["elementary function", "dtype", "inputs", "number", "worst error in ulp", "at"], rows)


def main():
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--outputs",
        type=float,
        default=1e6,
        help="logits for each dtype, at least one row of each length (default 1e6; 1e8 takes minutes)",
    )
    parser.add_argument("--exhaustive", action="store_true", help="check exp and log1p too, for all float32 (minutes)")
    parser.add_argument("--dtype", nargs="+", default=["float32", "float64", "float16", "bfloat16"])
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=[*PEERS], help="who else is measured; none without names")
    parser.add_argument("--backend", choices=("c", "numba"), default="c")
    parser.add_argument("--family", nargs="+", choices=FAMILIES, default=[*FAMILIES], help="kinds of rows")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.outputs = int(options.outputs)
    exceeded = []
    with tempfile.TemporaryDirectory() as folder, pylogits.use_backend(options.backend):
        if options.exhaustive:
            elementary(options, folder)
        if dtypes := [name for name in options.dtype if name in SHORT]:
            exceeded += wide(dtypes, options, folder)
        if dtypes := [name for name in options.dtype if name not in SHORT]:
            exceeded += narrow(dtypes, options)
    print(*(f"EXCEEDED {line}" for line in exceeded), sep="\n")
    sys.exit(bool(exceeded))


if __name__ == "__main__":
    main()
