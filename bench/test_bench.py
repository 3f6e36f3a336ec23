"""Every timed case on every backend and peer, for pytest-benchmark."""

import losses
import peers
import pytest
import timed

import pylogits


def time(benchmark, module, name, case, group, check):
    """Time a case as `module` prepares it, once its result is checked."""
    try:
        call = module.prepare(name, case)
    except ImportError as error:
        pytest.skip(f"{name}: {error}")
    benchmark.group = group
    benchmark.name = name
    config = pylogits.show_config()
    benchmark.extra_info |= {"threads": config["num_threads"], "isa": config["isa"]}
    with peers.active(name):
        check(call())  # and warm up: compilers, threads, memory
        benchmark(call)


@pytest.mark.parametrize("name", [*peers.BACKENDS, *peers.PEERS])
@pytest.mark.parametrize("case", timed.TIMED, ids=timed.label)
def test_time(benchmark, case, name):
    time(benchmark, peers, name, case, timed.label(case), lambda result: timed.check(case, result))
    if benchmark.stats:  # --benchmark-disable runs each call once, untimed
        benchmark.extra_info["GB/s"] = timed.moved_bytes(case) / benchmark.stats.stats.median / 1e9


@pytest.mark.parametrize("case, name", [(case, name) for case in losses.CASES for name in losses.names(case)], ids=str)
def test_loss(benchmark, case, name):
    time(benchmark, losses, name, case, str(case), lambda result: losses.check(case, name, result))
