"""Forks: children compute, and the right bits, whatever threads their parent had."""

import hashlib
import os
import socket
import subprocess
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import pylogits

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")

# A backend, and the threads of Numba: with OpenMP's, the user's own functions and the C backend share a library.
CONFIGURATIONS = ("c-omp", "numba-omp", "numba-workqueue", "reference-omp")


@pytest.fixture(params=CONFIGURATIONS)
def environment(request):
    """The environment variables of a configuration."""
    name, layer = request.param.split("-")
    if name not in pylogits.show_config()["backends"]:
        pytest.skip(f"{name} is not available")
    if layer == "omp":
        pytest.importorskip("numba.np.ufunc.omppool", reason="Numba has no OpenMP here", exc_type=ImportError)
    return {"PYLOGITS_BACKEND": name, "NUMBA_THREADING_LAYER": layer}


COMMON = """
import os, signal, threading, time, warnings, zlib
import numpy as np, pylogits

warnings.simplefilter("ignore", DeprecationWarning)  # a fork among threads is the point
logits = np.random.default_rng(0).standard_normal((600, 1000)).astype(np.float32)
pylogits.set_num_threads(2)

def checksum():
    return zlib.crc32(pylogits.softmax(logits))

def in_child(function):
    # what the function returns in a forked child; -1 if it hangs or dies
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        signal.alarm(30)
        os.write(writer, str(function()).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        answer = file.read()
    os.waitpid(child, 0)
    return int(answer or -1)
"""

# Each sets `results`, which are to be the checksum of the parent.
SCENARIOS = {
    "warm": """
checksum()
results = [in_child(checksum) for _ in range(3)]
""",
    "double": """
checksum()
results = [in_child(lambda: in_child(checksum))]
""",
    "from another thread": """
checksum()
results = []
thread = threading.Thread(target=lambda: results.append(in_child(checksum)))
thread.start()
thread.join()
""",
    "beside a running kernel": """
checksum()
stop = threading.Event()
def work():
    while not stop.is_set():
        checksum()
thread = threading.Thread(target=work)
thread.start()
results = [in_child(checksum) for _ in range(10)]
stop.set()
thread.join()
""",
    # Numba's OpenMP layer sends SIGTERM to a child that enters it; where that is handled, it computes nothing.
    "SIGTERM handled": """
signal.signal(signal.SIGTERM, lambda *_: None)
checksum()
results = [in_child(checksum)]
""",
    # The parent's threads are another's, and the child is the first to call pylogits.
    "first call in the child": """
import numba

increment = numba.vectorize(["int64(int64)"], target="parallel")(lambda n: n + 1)
assert increment(np.arange(1000))[-1] == 1000
results = [in_child(checksum)]
""",
    "beside a compilation": """
from numba.core.compiler_lock import global_compiler_lock

held = threading.Event()
def compile():
    with global_compiler_lock:
        held.set()
        time.sleep(0.3)
checksum()
thread = threading.Thread(target=compile)
thread.start()
held.wait()
results = [in_child(checksum)]
thread.join()
""",
    "beside the first call of a backend": """
import sys

thread = threading.Thread(target=checksum)
thread.start()
while "numba" not in sys.modules and thread.is_alive():
    time.sleep(0.001)
results = [in_child(checksum)]
thread.join()
""",
}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_forked_children_work(python, environment, scenario):
    done = python(f"{COMMON}{SCENARIOS[scenario]}\nprint(results == [checksum()] * len(results), results)", **environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("True"), done.stdout + done.stderr


POOLS = """
import multiprocessing, sys, warnings
import numpy as np, pylogits

def parts():
    return np.random.default_rng(0).standard_normal((4, 300, 1000)).astype(np.float32)

if __name__ == "__main__":
    warnings.simplefilter("ignore", DeprecationWarning)  # a fork among threads is the point
    pylogits.set_num_threads(2)
    expected = pylogits.softmax(parts())
    method = sys.argv[1]
    if method == "loky":
        import joblib
        results = joblib.Parallel(n_jobs=2, backend="loky")(joblib.delayed(pylogits.softmax)(part) for part in parts())
    else:
        with multiprocessing.get_context(method).Pool(2) as pool:
            results = pool.map_async(pylogits.softmax, parts()).get(timeout=60)
    assert np.array_equal(results, expected)
    print("done")
"""


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn", "loky"])
def test_pools_of_processes(tmp_path, environment, method):
    if method == "loky":
        pytest.importorskip("joblib")
    script = tmp_path / "pools.py"
    script.write_text(POOLS)
    done = subprocess.run(
        [sys.executable, script, method], env={**os.environ, **environment}, capture_output=True, text=True, timeout=90
    )
    assert (done.stdout, done.returncode) == ("done\n", 0), done.stderr


APPLICATION = """
import hashlib
import numpy as np, pylogits

logits = [np.random.default_rng(seed).standard_normal((200, 1000)).astype(np.float32) for seed in range(10)]

def answer(seed):
    return hashlib.sha256(pylogits.softmax(logits[seed])).hexdigest()

pylogits.set_num_threads(2)
answer(0)  # the server has threads when it forks its workers

def application(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [answer(int(environ["PATH_INFO"][1:])).encode()]
"""


def test_gunicorn_preloaded(tmp_path, environment):
    """A server that is forked with everything loaded, as web servers are, answers 1000 of 1000 requests."""
    pytest.importorskip("gunicorn")
    (tmp_path / "application.py").write_text(APPLICATION)
    expected = []
    for seed in range(10):
        logits = np.random.default_rng(seed).standard_normal((200, 1000)).astype(np.float32)
        with pylogits.use_backend(environment["PYLOGITS_BACKEND"]):
            expected.append(hashlib.sha256(pylogits.softmax(logits)).hexdigest())
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        command = [sys.executable, "-m", "gunicorn", "--preload", "--workers=2", f"--bind=fd://{listener.fileno()}"]
        with open(tmp_path / "log", "w") as log:
            server = subprocess.Popen(
                [*command, "application"],
                cwd=tmp_path,  # where it looks for modules, too
                env={**os.environ, **environment},
                pass_fds=[listener.fileno()],
                stderr=log,
            )

        def request(number):
            with urllib.request.urlopen(f"{address}/{number % 10}", timeout=60) as response:
                return response.read().decode() == expected[number % 10]

        try:
            with ThreadPoolExecutor(8) as clients:
                right = sum(clients.map(request, range(1000)))
        finally:
            server.terminate()
            server.wait(30)
    assert right == 1000, (tmp_path / "log").read_text()
