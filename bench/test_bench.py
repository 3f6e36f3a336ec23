"""Every timed case on every backend and peer, for pytest-benchmark."""

import pytest
from peers import BACKENDS, PEERS, active, prepare
from timed import TIMED, check, label, moved_bytes

import pylogits


@pytest.mark.parametrize("name", [*BACKENDS, *PEERS])
@pytest.mark.parametrize("case", TIMED, ids=label)
def test_time(benchmark, case, name):
    try:
        call = prepare(name, case)
    except ImportError as error:
        pytest.skip(f"{name}: {error}")
    benchmark.group = label(case)
    benchmark.name = name
    config = pylogits.show_config()
    benchmark.extra_info |= {"threads": config["num_threads"], "isa": config["isa"]}
    with active(name):
        check(case, call())  # and warm up: compilers, threads, memory
        benchmark(call)
    if benchmark.stats:  # --benchmark-disable runs each call once, untimed
        benchmark.extra_info["GB/s"] = moved_bytes(case) / benchmark.stats.stats.median / 1e9
