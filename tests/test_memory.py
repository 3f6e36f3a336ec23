"""What is allocated, what is not, and what happens where nothing can be."""

import shutil
import subprocess

import pytest

needs_compiler = pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")

# Once FAIL is "threads", no thread can be started; once it is "memory", the extension gets no memory.
SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

static int failing(const char *what)
{
  const char *fail = getenv("FAIL");
  return fail && strcmp(fail, what) == 0;
}

int pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*run)(void *), void *argument)
{
  int (*real)(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *) = dlsym(RTLD_NEXT, "pthread_create");
  return failing("threads") ? EAGAIN : real(thread, attributes, run, argument);
}

void *malloc(size_t size)
{
  static void *(*real)(size_t);
  Dl_info caller;
  if (!real) real = dlsym(RTLD_NEXT, "malloc");
  if (failing("memory") && dladdr(__builtin_return_address(0), &caller) && strstr(caller.dli_fname, "_c.abi3")) return NULL;
  return real(size);
}
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shim")
    source, library = folder / "shim.c", folder / "shim.so"
    source.write_text(SHIM)
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", source, "-o", library, "-ldl"], check=True)
    return str(library)


@needs_compiler
def test_no_threads_to_be_had(python, shim, simd):
    """Where no thread can be started, a call is serial, and later ones have threads again."""
    done = python(
        """
import ctypes, os, threading
import numpy as np, pylogits
pylogits.set_num_threads(4)
threads = lambda: len(os.listdir("/proc/self/task"))
x, row = np.random.default_rng(0).standard_normal((2000, 1000)), np.zeros((1, 300_000))
setenv = ctypes.CDLL(None).setenv
setenv(b"FAIL", b"threads", 1)
alone = pylogits.softmax(x), pylogits.logsumexp(row)
before = threads()
setenv(b"FAIL", b"", 1)
together = pylogits.softmax(x), pylogits.logsumexp(row)
print(before, threads(), all(map(np.array_equal, alone, together)))
""",
        LD_PRELOAD=shim,
        OMP_NUM_THREADS="4",
        OPENBLAS_NUM_THREADS="1",
    )
    assert (done.stdout, done.returncode) == ("1 4 True\n", 0), done.stderr


@needs_compiler
def test_no_memory_to_be_had(python, shim, simd):
    """A MemoryError, from whatever needs memory for blocks; small rows need none."""
    done = python(
        """
import ctypes
import numpy as np, pylogits
x, labels = np.random.default_rng(0).standard_normal((10, 40_000)), np.arange(10)
calls = {
    "softmax": lambda x: pylogits.softmax(x),
    "temperature": lambda x: pylogits.softmax(x, temperature=2.0),
    "log_softmax": lambda x: pylogits.log_softmax(x),
    "logsumexp": lambda x: pylogits.logsumexp(x),
    "axis 0": lambda x: pylogits.softmax(np.ascontiguousarray(x.T), axis=0),
    "sparse": lambda x: pylogits.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=x),
    "gradient": lambda x: pylogits.cross_entropy_value_and_grad(x, labels)[1],
    "score": lambda x: pylogits.score(x, labels, top_k=3).loss,
}
setenv = ctypes.CDLL(None).setenv
for threads in (1, 2):
    pylogits.set_num_threads(threads)
    for name, call in calls.items():
        expected = call(x)
        setenv(b"FAIL", b"memory", 1)
        try:
            call(x)
            print(threads, name, "no error")
        except MemoryError:
            pass
        setenv(b"FAIL", b"", 1)
        if not np.array_equal(call(x), expected):
            print(threads, name, "differs")
setenv(b"FAIL", b"memory", 1)
print(pylogits.softmax(x[:, :30]).shape)
""",
        LD_PRELOAD=shim,
        OPENBLAS_NUM_THREADS="1",
    )
    assert (done.stdout, done.returncode) == ("(10, 30)\n", 0), done.stderr


def test_small_calls_leak_nothing(python):
    """10^6 calls, in three turns: a leak would show in each, what an allocator keeps in one or two."""
    done = python("""
import os
import numpy as np, pylogits
x, labels, grad = np.zeros((2, 10), np.float32), np.zeros(2, int), np.zeros((2, 10), np.float32)
def call_all(times):
    for _ in range(times):
        for _ in range(16):
            pylogits.softmax(x)
            pylogits.softmax(x, out=grad)
            pylogits.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=x)
        pylogits.logsumexp(x, axis=0)
        pylogits.cross_entropy_value_and_grad(x, labels, label_smoothing=0.1)
        pylogits.score(x, labels)
        try:
            pylogits.cross_entropy(x, labels + 10)
        except ValueError:
            pass
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
call_all(1000)
growth = []
for _ in range(3):
    before = resident()
    call_all(6500)
    growth.append(resident() - before)
print(min(growth))
""")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 35_000  # a byte for ten calls
