"""Start score_server.py with two workers, ask it from eight threads at once, and check each answer.

Run as ``python load_test.py [REQUESTS]``; 1000 by default.
"""

import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np

import pylogits

requests = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
rows_each = 20
folder = Path(__file__).parent
logits = np.load(folder / "digits_logits.npy").astype(np.float64)
scores = pylogits.score(logits)


def ask(client, number):
    """The time of one request, once its answer is the right one, to the last bit."""
    first = number * rows_each % (len(logits) - rows_each)
    part = slice(first, first + rows_each)
    body = {"logits": logits[part].tolist()}
    start = time.perf_counter()
    response = client.post("/score", json=body)
    seconds = time.perf_counter() - start
    answer = response.raise_for_status().json()
    for name, values in answer.items():
        np.testing.assert_array_equal(values, getattr(scores, name)[part])
    return seconds


with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:  # requests wait here until the workers are up
    command = [sys.executable, "-m", "uvicorn", "score_server:app", "--workers=2", f"--fd={listener.fileno()}"]
    server = subprocess.Popen([*command, "--log-level=error"], cwd=folder, pass_fds=[listener.fileno()])
    address = f"http://127.0.0.1:{listener.getsockname()[1]}"

try:
    with httpx.Client(base_url=address, timeout=60) as client, ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda number: ask(client, number), range(16)))  # until the workers have started
        start = time.perf_counter()
        seconds = list(threads.map(lambda number: ask(client, number), range(requests)))
        elapsed = time.perf_counter() - start
        refused = client.post("/score", json={"logits": [[1.0, 2.0]], "temperature": 0})
finally:
    server.terminate()
    server.wait()

p50, p99 = np.percentile(seconds, [50, 99]) * 1000
print(f"{len(seconds)} of {requests} answers right, {rows_each} rows each")
print(f"p50 {p50:.1f} ms, p99 {p99:.1f} ms, {requests / elapsed:.0f} requests/s")
print(f"a bad request: {refused.status_code} {refused.json()['detail']}")
