"""Many threads at once, and how many threads there are."""

import io
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from cases import Case

import pylogits
from pylogits import _dispatch

SOAK = Path(__file__).parents[1] / "bench" / "soak.py"
LAYERS = {"workqueue": "workqueue", "omp": "omppool", "tbb": "tbbpool"}
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def test_many_threads_at_once(backend):
    """Calls from Python threads do not disturb one another."""
    case = Case("softmax", "float32", (300, 1000))
    arguments = case.arguments()
    expected = pylogits.softmax(**arguments)
    results = [None] * 8

    def work(i):
        with pylogits.use_backend(backend):
            for _ in range(5):
                results[i] = pylogits.softmax(**arguments)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        np.testing.assert_array_equal(result, expected)


@linux
@pytest.mark.parametrize("layer", LAYERS)
def test_soak(layer):
    """`make soak`, for half a minute."""
    pytest.importorskip(f"numba.np.ufunc.{LAYERS[layer]}", reason=f"Numba has no {layer} here", exc_type=ImportError)
    environment = {**os.environ, "NUMBA_THREADING_LAYER": layer}
    done = subprocess.run([sys.executable, SOAK, "--seconds=30"], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"Numba's layer {layer}" in done.stdout
    calls, differences = map(int, re.search(r"(\d+) calls, (\d+) differences", done.stdout).groups())
    assert calls > 0
    assert differences == 0


COUNT = """
import os, statistics, sys, threading, time
import numpy as np, pylogits

def tasks():
    return os.listdir("/proc/self/task")

def running():
    count = 0
    for task in tasks():
        try:
            with open(f"/proc/self/task/{task}/stat") as file:
                count += file.read().rpartition(")")[2].split()[0] == "R"
        except OSError:  # it has ended
            pass
    return count

logits = np.zeros((2000, 1000), np.float32)
"""

MANY_CALLERS = """
pylogits.set_num_threads(3)
pylogits.softmax(logits)  # compiles, and starts the threads of Numba
before = len(tasks())
stop = threading.Event()
def work():
    while not stop.is_set():
        pylogits.softmax(logits)
threads = [threading.Thread(target=work) for _ in range(16)]
for thread in threads:
    thread.start()
most, active = 0, []
for _ in range(100):
    time.sleep(0.01)
    most = max(most, len(tasks()) - before)
    active.append(running())
stop.set()
for thread in threads:
    thread.join()
print(most, statistics.median(active))
"""


@linux
@pytest.mark.parametrize("name", ["c", "numba"])
def test_many_callers_share_one_team(python, name):
    """OpenMP keeps a team for each thread that ever had one, but only one works at a time."""
    if name not in pylogits.show_config()["backends"]:
        pytest.skip(f"{name} is not available")
    done = python(COUNT + MANY_CALLERS, PYLOGITS_BACKEND=name)
    assert done.returncode == 0, done.stderr
    most, active = map(float, done.stdout.split())
    assert most <= 16 * 3
    assert active <= 16 + 3


LIMITED = """
import threadpoolctl

with threadpoolctl.threadpool_limits(1):
    pylogits.softmax([0.0])  # the first call: loads the backend, and libraries that have threads of their own
    before = len(tasks())
    inside = pylogits.get_num_threads()
    pylogits.softmax(logits)
    print(inside, len(tasks()) - before)
pylogits.softmax(logits)
print(pylogits.get_num_threads(), len(tasks()) - before)
"""


@linux
@pytest.mark.parametrize("name", ["c", "numba"])
def test_threadpoolctl(python, name):
    """Within its limit of 1, a large call starts no thread, be it the first call."""
    pytest.importorskip("threadpoolctl")
    if "c" not in pylogits.show_config()["backends"]:
        pytest.skip("threadpoolctl limits OpenMP, which only the C backend has")
    done = python(COUNT + LIMITED, PYLOGITS_BACKEND=name)
    assert done.returncode == 0, done.stderr
    inside, outside = (tuple(map(int, line.split())) for line in done.stdout.splitlines())
    assert inside == (1, 0)
    if outside[0] > 1:
        assert outside[1] >= 1


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity masks here")
def test_affinity(python):
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); import pylogits; print(pylogits.get_num_threads())"
    )
    assert python(code).stdout == "1\n"


@pytest.mark.parametrize(
    ("quota", "cores"),
    [
        ("max 100000\n", 8),
        ("150000 100000\n", 2),
        ("100000 100000\n", 1),
        ("5000 100000\n", 1),
        ("9900000 100000\n", 8),
        ("", 8),
    ],
)
def test_cgroup_quota(monkeypatch, quota, cores):
    """A process may use 8 cores, and as much of their time as its cgroup has, rounded up."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    opened = []

    def opens(path):
        opened.append(path)
        return io.StringIO(quota)

    monkeypatch.setattr(_dispatch, "open", opens, raising=False)
    assert _dispatch._usable_cores() == cores
    assert opened == ["/sys/fs/cgroup/cpu.max"]


def test_no_cgroup(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)

    def refuses(path):
        raise FileNotFoundError(path)

    monkeypatch.setattr(_dispatch, "open", refuses, raising=False)
    assert _dispatch._usable_cores() == 8
