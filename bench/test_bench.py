"""The registry of `suite.py` under pytest-benchmark. `-m "not peer"` leaves out all but pylogits; `-k` selects by name:
`-k "[softmax-float32-4096x1000-c"`."""

import pytest
import suite
from peers import BACKENDS, active

import pylogits


def parameter(run):
    return pytest.param(run, id=str(run), marks=[] if run.by in BACKENDS else pytest.mark.peer)


@pytest.fixture(autouse=True)
def threads(run):
    pylogits.set_num_threads(run.threads)
    yield
    pylogits.set_num_threads(suite.ALL_THREADS)


@pytest.mark.parametrize("run", [parameter(run) for run in suite.runs()])
def test_time(benchmark, run):
    try:
        call = run.prepare()
    except ImportError as error:
        pytest.skip(f"{run.by}: {error}")
    benchmark.group = run.label
    benchmark.name = f"{run.by}-{run.threads}"
    with active(run.by):
        result = call()  # and warm up: compilers, threads, memory
        run.check(result)
        benchmark(call)
    benchmark.extra_info |= {"op": run.op, "option": run.option, "dtype": run.case.dtype, "shape": run.case.shape, "by": run.by}
    benchmark.extra_info |= {"threads": run.threads, "isa": pylogits.show_config()["isa"] if run.by == "c" else None}
    if benchmark.stats:  # --benchmark-disable runs each call once, untimed
        benchmark.extra_info |= run.facts(benchmark.stats.stats.median, result)
