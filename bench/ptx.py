"""What the CUDA kernels are compiled to, on a machine without a GPU: a line for each kernel, dtype and architecture.

python bench/ptx.py --arch 90
"""

import argparse
import importlib.util
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest.mock import patch

from numba import cuda, types
from pylogits.kernels import cuda as kernels

from pylogits import Scores

ARCHITECTURES = (80, 90, 100)  # as in sm_90
DTYPES = ("float32", "float64", "float16", "bfloat16")


class Compiled(NamedTuple):
    kernel: str
    dtype: str
    architecture: int
    ptx: str

    def count(self, pattern):
        return len(re.findall(pattern, self.ptx))


def signatures(dtype):
    """Return the kernels with their arguments' types: rows of a dtype, with as few and as many options as there are; and where
    that is "" those that see a number or two a row."""
    if not dtype:
        return signatures_over_rows()
    real = types.float64 if dtype == "float64" else types.float32
    element = {"float16": types.float16, "bfloat16": types.uint16}.get(dtype, real)
    no, yes, integer = types.none, types.boolean, types.int64

    def array(kind, dimensions):
        return types.Array(kind, dimensions, "A")

    full, rows, ones, status = array(element, 3), array(real, 2), array(real, 1), array(types.int32, 1)
    mask, labels, picks = array(yes, 3), array(integer, 2), array(integer, 3)
    plan = types.NamedTuple([integer] * 4 + [yes] * 2 + [integer] * 3, kernels.Plan)
    numbers, pair = types.NamedUniTuple(real, 3, kernels.LossNumbers), types.UniTuple(real, 2)
    cap = types.NamedUniTuple(real, 4, kernels.Cap)
    scores = types.NamedTuple([labels, rows, rows, rows, picks, array(real, 3), rows, array(yes, 2)], Scores)

    def options(**given):
        return types.NamedTuple([given.get(name, no) for name in kernels.LossOptions._fields], kernels.LossOptions)

    few = options(labels=labels)
    many = {"where": mask, "weight": ones, "label_smoothing": real, "sample_weight": rows, "loss_grad": rows}
    many |= {"inverse": ones, "cap": cap}
    hard, soft = options(labels=labels, ignore_index=integer, **many), options(probabilities=full, **many)
    of = kernels.kernels_of(dtype)
    return {
        "softmax": (of.softmax, (plan, full, no, no, no, full, no)),
        "softmax, log, all options": (of.softmax, (plan, full, mask, pair, yes, full, no)),
        "softmax, sums": (of.softmax, (plan, full, no, no, no, no, rows)),
        "selective_log_softmax": (of.selective_log_softmax, (plan, full, picks, pair, status, full)),
        "cross_entropy": (of.cross_entropy, (plan, numbers, full, few, no, status, rows, no)),
        "cross_entropy, grad": (of.cross_entropy, (plan, numbers, full, few, no, status, rows, full)),
        "cross_entropy, hard, all options": (of.cross_entropy, (plan, numbers, full, hard, pair, status, rows, full)),
        "cross_entropy, soft, all options": (of.cross_entropy, (plan, numbers, full, soft, pair, status, rows, full)),
        "backward": (of.backward, (plan, full, full, yes, full)),
        "score": (of.score, (plan, full, labels, pair, status, scores)),
    }


def signatures_over_rows():
    integer, no = types.int64, types.none

    def array(kind, dimensions):
        return types.Array(kind, dimensions, "A")

    status, sums, rows = array(types.int32, 1), array(types.float64, 1), array(types.float32, 2)
    labels, weights = array(integer, 2), array(types.float32, 1)
    return {
        "clear": (kernels.clear, (status,)),
        "check_labels": (kernels.check_labels, (array(integer, 3), integer, no, array(types.boolean, 3), status)),
        "check_finite": (kernels.check_finite, (rows, status)),
        "sum_losses": (kernels.sum_losses, (rows, sums)),
        "sum_weights": (kernels.sum_weights, (integer, integer, labels, integer, rows, weights, types.boolean, sums)),
        "invert_total": (kernels.invert_total, (sums, sums, weights, status)),
        "reduce_total": (kernels.reduce_total, (sums, types.float64, sums, types.boolean, weights, status)),
    }


def compile_ptx(kernel, signature, architecture):
    capability = divmod(architecture, 10)
    # Numba compiles device functions for the GPU that is there, and would look for one.
    with patch("numba.cuda.dispatcher.get_current_device", lambda: SimpleNamespace(compute_capability=capability)):
        return cuda.compile_ptx(kernel.py_func, signature, cc=capability)[0]


def compiled(architectures, dtypes):
    """Yield every kernel of dtypes, for architectures."""
    for dtype in dtypes:
        for name, (kernel, signature) in signatures(dtype).items():
            for architecture in architectures:
                yield Compiled(name, dtype, architecture, compile_ptx(kernel, signature, architecture))


def faults(one):
    """Return what must not be in a kernel: local memory, no vectors, or float64 where rows are of another dtype."""
    found = []
    if one.count(r"\.local\b|__local_depot"):
        found.append("local memory")
    if one.dtype and not one.count(r"ld\.global\.v4"):
        found.append("no vector loads")
    if one.dtype not in ("", "float64") and one.count(r"\.f64\b"):
        found.append("float64 arithmetic")
    return found


def assemble(one):
    """Return what ptxas says: registers, and bytes of spills and shared memory."""
    ptxas = Path(importlib.util.find_spec("nvidia.cu13").submodule_search_locations[0], "bin", "ptxas")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(one.ptx)
        command = [ptxas, f"-arch=sm_{one.architecture}", "-v", "-o", Path(folder, "kernel.cubin"), source]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    found = [re.search(pattern, said) for pattern in (r"Used (\d+) reg", r"(\d+) bytes spill st", r"(\d+) bytes spill lo")]
    return [int(match[1]) for match in found]


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES)
    parser.add_argument("--dtype", nargs="+", default=DTYPES, choices=DTYPES)
    chosen = parser.parse_args()
    print(f"{'kernel':34} {'dtype':9} {'arch':>6} {'registers':>9} {'spilled':>7} {'16-byte':>7} {'f64':>5}")
    bad = False
    for one in compiled(chosen.arch, [*chosen.dtype, ""]):
        registers, stores, loads = assemble(one)
        wide, doubles = one.count(r"global\.v4"), one.count(r"\.f64\s")
        line = f"{one.kernel:34} {one.dtype:9} {one.architecture:6} {registers:9} {stores + loads:7} {wide:7} {doubles:5}"
        print(line, *faults(one), flush=True)
        bad = bad or bool(stores or loads or faults(one))
    sys.exit(bad)


if __name__ == "__main__":
    main()
