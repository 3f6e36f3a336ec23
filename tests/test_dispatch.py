"""Choosing a backend, an instruction set and threads: switches, environment."""

import json
import threading

import numpy as np
import pytest
from cases import OPS, Case

import pylogits
from pylogits import _crossovers, _dispatch

NAMES = ("c", "numba", "reference")


def current():
    return pylogits.show_config()["backend"]


def configured(python, **environment):
    """Return the configuration that a fresh interpreter finds in this environment."""
    code = "import json, pylogits; c = pylogits.show_config(); print(json.dumps(c))"
    done = python(code, **environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def refusal(python, **environment):
    """Return the last line of the error with which the import fails."""
    done = python("import pylogits", **environment)
    assert done.returncode == 1
    return done.stderr.splitlines()[-1]


# use_backend.


@pytest.mark.parametrize("name", NAMES)
def test_use_backend_and_restore(name):
    if name not in pylogits.show_config()["backends"]:
        pytest.skip(f"{name} is not available")
    before = current()
    with pylogits.use_backend(name):
        assert current() == name
        np.testing.assert_allclose(pylogits.softmax([0.0, 0.0]), [0.5, 0.5])
    assert current() == before


def test_use_backend_nests_and_restores_after_an_error():
    before = current()
    with pylogits.use_backend("numba"):
        with pylogits.use_backend("reference"):
            assert current() == "reference"
        assert current() == "numba"
        with pytest.raises(KeyError), pylogits.use_backend("reference"):
            raise KeyError
        assert current() == "numba"
    assert current() == before


@pytest.mark.parametrize("name", ["cuda9", "", "C", None, 3])
def test_unknown_backend(name):
    before = current()
    with pytest.raises(ValueError, match=r"c, numba, reference"), pylogits.use_backend(name):
        pytest.fail("the block must not run")
    assert current() == before


def test_backends_of_threads_are_their_own():
    seen = {}
    inside, checked = threading.Event(), threading.Event()

    def other():
        with pylogits.use_backend("numba"):
            inside.set()
            checked.wait(10)
            seen["other"] = current()

    thread = threading.Thread(target=other)
    with pylogits.use_backend("reference"):
        thread.start()
        inside.wait(10)
        seen["main"] = current()
        checked.set()
        thread.join()
    assert seen == {"main": "reference", "other": "numba"}


# Instruction sets.


def test_use_isa(simd):
    for isa in pylogits.show_config()["available_isas"]:
        assert simd.use_isa(isa) is None
        assert pylogits.show_config()["isa"] == isa
    with pytest.raises(ValueError, match=r"sse9.*scalar"):
        simd.use_isa("sse9")
    assert pylogits.show_config()["isa"] == isa


def test_scalar_is_always_there(simd):
    isas = pylogits.show_config()["available_isas"]
    assert "scalar" in isas
    assert set(isas) <= {"scalar", "avx2", "avx512", "neon"}


# show_config.


def test_show_config(capsys):
    config = pylogits.show_config()
    printed = capsys.readouterr().out
    assert {"isa", "available_isas", "backends", "num_threads"} <= set(config)
    for key in config:
        assert key in printed
    assert "reference" in config["backends"]
    assert set(config["backends"]) <= set(NAMES)
    assert config["num_threads"] == pylogits.get_num_threads()
    if "c" in config["backends"]:
        assert config["isa"] in config["available_isas"]
        assert config["isa"] in printed


# Threads.


@pytest.fixture
def threads():
    before = pylogits.get_num_threads()
    yield
    pylogits.set_num_threads(before)


@pytest.mark.parametrize("name", ["c", "numba"])
def test_crossovers_of_every_operation(name):
    operations = {*OPS, "cross_entropy", "cross_entropy_value_and_grad", "softmax_backward", "log_softmax_backward", "score"}
    assert set(_crossovers.SERIAL_BELOW[name]) == operations
    assert all(set(sizes) == {2, 4, 8} for sizes in _crossovers.SERIAL_BELOW[name].values())


def test_threads_from_the_crossover_on(threads):
    pylogits.set_num_threads(3)
    below = _crossovers.SERIAL_BELOW["c"]["softmax"][4]
    for size, expected in ((below - 1, 1), (below, 3)):
        assert _dispatch.threads_for("c", "softmax", np.dtype(np.float32), size) == expected
        assert _dispatch.threads_for("reference", "softmax", np.dtype(np.float32), size) == 1


def test_rows_count_as_work(threads):
    pylogits.set_num_threads(3)
    rows = _crossovers.SERIAL_BELOW["c"]["softmax"][4] // (3 + _dispatch.ROW_WORK) + 1
    for classes, expected in ((3, 3), (3 * rows, 1)):
        with pylogits.use_backend("c"):
            assert _dispatch.select("softmax", np.dtype(np.float32), 3 * rows, classes)[1] == expected


@pytest.mark.parametrize("n", [1, 2, 3, np.int64(5)])
def test_set_num_threads(threads, n):
    assert pylogits.set_num_threads(n) is None
    assert pylogits.get_num_threads() == n
    assert pylogits.show_config()["num_threads"] == n


@pytest.mark.parametrize("n", [0, -1])
def test_set_num_threads_value(n):
    before = pylogits.get_num_threads()
    with pytest.raises(ValueError, match=f"{n}"):
        pylogits.set_num_threads(n)
    assert pylogits.get_num_threads() == before


def test_more_threads_than_can_be(threads, backend):
    """Refused, or as good as fewer."""
    for n in (1000, 2**31, 2**40):
        try:
            pylogits.set_num_threads(n)
        except ValueError as error:
            assert str(n) in str(error)
        assert pylogits.softmax(np.zeros((1000, 1000), np.float32))[-1, -1] == np.float32(1e-3)


@pytest.mark.parametrize("n", [1.0, "2", None])
def test_set_num_threads_type(n):
    with pytest.raises(TypeError):
        pylogits.set_num_threads(n)


@pytest.mark.parametrize("op", OPS)
def test_results_do_not_depend_on_threads(threads, op, backend):
    for shape in ((1, 300_001), (301, 1000), (40_000, 10)):
        arguments = Case(op, "float32", shape).arguments()
        pylogits.set_num_threads(1)
        expected = getattr(pylogits, op)(**arguments)
        for n in (2, 3):
            pylogits.set_num_threads(n)
            result = getattr(pylogits, op)(**arguments)
            assert np.asarray(result).tobytes() == np.asarray(expected).tobytes()


@pytest.mark.parametrize("dtype", [bool, np.int8, np.int16, np.uint32, np.int64])
def test_integer_logits_for_threads(dtype, backend):
    """They are taken as float64, whatever their own size."""
    logits = (np.arange(20_000).reshape(-1, 2) % 3).astype(dtype)
    labels = np.zeros(len(logits), int)
    for one, other in zip(
        pylogits.cross_entropy_value_and_grad(logits, labels),
        pylogits.cross_entropy_value_and_grad(logits.astype(np.float64), labels),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)


# The environment.


@pytest.mark.parametrize("name", NAMES)
def test_environment_backend(python, name):
    assert configured(python, PYLOGITS_BACKEND=name)["backend"] == name


def test_environment_isa(python, simd):
    for isa in pylogits.show_config()["available_isas"]:
        assert configured(python, PYLOGITS_ISA=isa)["isa"] == isa


def test_environment_num_threads(python):
    for n in (1, 3):
        assert configured(python, PYLOGITS_NUM_THREADS=str(n))["num_threads"] == n


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("PYLOGITS_BACKEND", "fortran"),
        ("PYLOGITS_ISA", "sse9"),
        ("PYLOGITS_NUM_THREADS", "0"),
        ("PYLOGITS_NUM_THREADS", "-2"),
        ("PYLOGITS_NUM_THREADS", "many"),
        ("PYLOGITS_NUM_THREADS", "1.5"),
    ],
)
def test_environment_mistakes(python, variable, value):
    line = refusal(python, **{variable: value})
    assert line.startswith("ValueError")
    assert variable in line
    assert value in line


def test_environment_names_what_there_is(python):
    assert "c, numba, reference" in refusal(python, PYLOGITS_BACKEND="fortran")
    if "c" in pylogits.show_config()["backends"]:
        assert "scalar" in refusal(python, PYLOGITS_ISA="sse9")
