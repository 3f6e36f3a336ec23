"""What importing pylogits loads, and which module may import which."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "pylogits"
KERNELS = ROOT / "kernels"

# A module imports from layers below its own.
LAYERS = (
    ("__main__", "_numba_extension"),
    ("cli",),
    ("batch",),
    ("__init__", "dask"),
    ("activations", "losses", "linear", "scoring"),
    ("_problem", "_chunked_rows"),
    ("_rows",),
    ("_dispatch",),
    ("_simd", "_cuda"),
    ("kernels", "_reference", "_launch"),
    ("_c", "_crossovers", "_float_state", "_device"),  # the compiled extension; what any may use
)
# The same in pylogits/batch.
BATCH_LAYERS = (("cluster",), ("job", "report"), ("metrics", "writers"), ("readers",))
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}

HEAVY = ("numba", "llvmlite", "torch", "pyarrow", "typer", "rich", "setuptools", "cffi", "jax", "dask")


def imported(path):
    """Return the names of the modules that a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            if node.module == "pylogits":
                names |= {f"pylogits.{alias.name}" for alias in node.names}
            else:
                names.add(node.module)
    return names


def siblings(path):
    """Return the modules of pylogits that a file imports."""
    return {name.split(".")[1] for name in imported(path) if name.startswith("pylogits.")}


def test_import_loads_nothing_heavy(python):
    done = python("import sys, pylogits; print(*sys.modules)")
    assert done.returncode == 0, done.stderr
    assert not {name.partition(".")[0] for name in done.stdout.split()} & set(HEAVY)


def test_a_call_on_c_loads_nothing_heavy(python):
    pytest.importorskip("pylogits._simd")
    code = """
import sys, pylogits
for operation in (pylogits.softmax, pylogits.log_softmax, pylogits.logsumexp, pylogits.score):
    operation([[1.0, 2.0]])
pylogits.sparse_softmax_cross_entropy_with_logits(labels=[0], logits=[[1.0, 2.0]])
print(*sys.modules)
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert not {name.partition(".")[0] for name in done.stdout.split()} & set(HEAVY)


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.stem)
def test_imports_run_one_way(path):
    for name in siblings(path):
        assert RANK[name] > RANK[path.stem], f"{path.stem} imports {name}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "batch").glob("[!_]*.py")), ids=lambda path: path.stem)
def test_imports_of_batch_run_one_way(path):
    rank = {name: rank for rank, names in enumerate(BATCH_LAYERS) for name in names}
    others = {name.split(".")[2] for name in imported(path) if name.startswith("pylogits.batch.")}
    for name in others:
        assert rank[name] > rank[path.stem], f"{path.stem} imports {name}"
    assert siblings(path) <= {"batch", "scoring"}


def test_only_the_backend_module_knows_the_extension():
    assert [path.stem for path in PACKAGE.glob("*.py") if "_c" in siblings(path)] == ["_simd"]


def test_api_modules_know_no_backend():
    for name in LAYERS[4]:
        assert siblings(PACKAGE / f"{name}.py") <= {"_problem", "_rows", "_dispatch", "_reference", "_float_state", "_device"}


@pytest.mark.parametrize("path", sorted(KERNELS.rglob("*.py")), ids=lambda path: path.stem)
def test_kernels_import_numba_and_numpy_only(path):
    """And the standard library, and one another: nothing of pylogits, no other package."""
    others = {name for name in imported(path) if not name.startswith("pylogits.kernels")}
    packages = {name.partition(".")[0] for name in others} - sys.stdlib_module_names
    assert packages <= {"numba", "llvmlite", "numpy"}


def test_every_public_name_is_there():
    import pylogits

    promised = {
        "softmax",
        "log_softmax",
        "logsumexp",
        "selective_log_softmax",
        "softmax_cross_entropy_with_logits",
        "sparse_softmax_cross_entropy_with_logits",
        "cross_entropy",
        "cross_entropy_value_and_grad",
        "linear_cross_entropy",
        "linear_cross_entropy_value_and_grad",
        "softmax_backward",
        "log_softmax_backward",
        "one_hot",
        "score",
        "Scores",
        "check_logits",
        "deferred_checks",
        "DoubleSoftmaxWarning",
        "get_num_threads",
        "set_num_threads",
        "use_backend",
        "show_config",
    }
    assert promised <= set(pylogits.__all__)
    for name in pylogits.__all__:
        assert getattr(pylogits, name).__doc__, name
