"""The command line: `pylogits score` and `pylogits config`; test_cli_failures.py holds what breaks in a run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command import refused, run

import pylogits
from pylogits.batch import job, readers, writers

EXAMPLES = Path(__file__).parents[1] / "examples"
FORMATS = ("parquet", "npz")

LOGITS = np.array([[0.5, 1.5, 0.1], [2.2, 1.3, 1.7], [-1.0, 0.0, 1.0]])
TARGETS = np.array([1, 2, 2])


pytestmark = pytest.mark.usefixtures("folder")


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of two rows of three float64 logits."""
    monkeypatch.setattr(readers, "CHUNK_BYTES", 48)
    monkeypatch.setattr(job, "GATHERED_BYTES", 300)


def read(path):
    """The columns of an output file."""
    if path.endswith(".npz"):
        return dict(np.load(path))
    table = pq.read_table(path)
    return {name: np.array(table[name].to_pylist()) for name in table.column_names}


def score(logits, *options, targets=None, out="out.npz"):
    """Save, score, and read back."""
    np.save("logits.npy", logits)
    if targets is not None:
        np.save("targets.npy", targets)
        options = (*options, "--targets", "targets.npy")
    result = run("score", "logits.npy", "--out", out, *options)
    assert result.exit_code == 0, result.stderr
    return read(out)


def expected(logits, targets):
    """The columns for rows of logits, by their definitions, in float64."""
    x = logits.astype(np.float64)
    logsumexp = np.log(np.exp(x).sum(axis=1))
    probabilities = np.exp(x - logsumexp[:, None])
    loss = logsumexp - x[np.arange(len(x)), targets]
    return {
        "prediction": x.argmax(axis=1),
        "confidence": probabilities.max(axis=1),
        "entropy": logsumexp - (probabilities * x).sum(axis=1),
        "logsumexp": logsumexp,
        "loss": loss,
        "correct": x.argmax(axis=1) == targets,
    }


def assert_columns(actual, wanted, rtol=1e-12):
    assert set(actual) == set(wanted)
    for name in wanted:
        np.testing.assert_allclose(actual[name], wanted[name], rtol=rtol, err_msg=name)


@pytest.mark.parametrize("suffix", FORMATS)
def test_three_rows(suffix):
    columns = score(LOGITS, targets=TARGETS, out=f"out.{suffix}")
    wanted = {
        "prediction": [1, 0, 2],
        "confidence": [0.6193958591361254, 0.4967462328313597, 0.6652409557748219],
        "entropy": [0.9207112929479736, 1.0320876435380364, 0.8323955818399389],
        "logsumexp": [1.9790106967477104, 2.8996759812098483, 1.4076059644443804],
        "loss": [0.47901069674771035, 1.199675981209848, 0.4076059644443803],
        "correct": [True, False, True],
    }
    assert_columns(columns, wanted)
    assert columns["prediction"].dtype == np.int64
    assert columns["correct"].dtype == np.bool_


@pytest.mark.parametrize("suffix", FORMATS)
def test_top_k(suffix):
    columns = score(LOGITS, "--top-k", 2, out=f"out.{suffix}")
    assert columns["top_k_indices"].tolist() == [[1, 0], [0, 2], [2, 1]]
    np.testing.assert_allclose(
        columns["top_k_probabilities"],
        [
            [0.6193958591361254, 0.2278630025229032],
            [0.4967462328313597, 0.30129182030896995],
            [0.6652409557748219, 0.24472847105479764],
        ],
        rtol=1e-12,
    )
    assert "loss" not in columns and "correct" not in columns


def test_parquet_schema():
    score(LOGITS.astype(np.float32), "--top-k", 2, targets=TARGETS, out="out.parquet")
    types = {field.name: str(field.type) for field in pq.read_schema("out.parquet")}
    assert types == {
        "prediction": "int64",
        "confidence": "float",
        "entropy": "float",
        "logsumexp": "float",
        "loss": "float",
        "correct": "bool",
        "top_k_indices": "fixed_size_list<element: int64>[2]",
        "top_k_probabilities": "fixed_size_list<element: float>[2]",
    }


def test_temperature():
    columns = score(LOGITS, "--temperature", 2, targets=TARGETS)
    wanted = {
        "prediction": [1, 0, 2],
        "confidence": [0.4754849553487675, 0.4138338130465125, 0.506480391055654],
        "entropy": [1.0529013276679486, 1.0816067681052066, 1.0201913367268314],
        "logsumexp": [1.4934200371423099, 1.9822908035085471, 1.1802696706417346],
        "loss": [0.7434200371423098, 1.1322908035085473, 0.6802696706417346],
        "correct": [True, False, True],
    }
    assert_columns(columns, wanted)


def test_summary():
    np.save("logits.npy", LOGITS)
    np.save("targets.npy", TARGETS)
    result = run("score", "logits.npy", "--targets", "targets.npy", "--out", "out.npz")
    summary = dict(re.findall(r"^(.*?)  +(\S+) *$", result.stdout, flags=re.MULTILINE))
    assert float(summary.pop("rows/s")) > 0
    assert float(summary.pop("GB/s")) > 0
    assert summary == {
        "rows": "3",
        "classes": "3",
        "mean loss": "0.6954309",
        "accuracy": "0.6666667",
        "perplexity": "2.004573",
        "expected calibration error": "0.4040365",  # (1 - 0.6193959 + 0.4967462 + 1 - 0.6652410) / 3
        "Brier score": "0.3919702",
    }
    assert result.stderr == ""

    result = run("score", "logits.npy", "--out", "out.npz")
    assert re.findall(r"^\S+", result.stdout, flags=re.MULTILINE) == [
        "rows",
        "classes",
        "rows/s",
        "GB/s",
    ]


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5])
def test_chunk_boundaries(suffix, rows, small_chunks):
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(size=(rows, 3)), rng.integers(0, 3, rows)
    columns = score(logits, targets=targets, out=f"out.{suffix}")
    assert_columns(columns, expected(logits, targets))


def test_row_wider_than_a_chunk(monkeypatch):
    monkeypatch.setattr(readers, "CHUNK_BYTES", 8)
    assert_columns(score(LOGITS, targets=TARGETS), expected(LOGITS, TARGETS))


def test_row_groups_span_chunks(monkeypatch):
    """Chunks hold 8 rows, whose columns are far smaller than their logits: few groups result."""
    monkeypatch.setattr(readers, "CHUNK_BYTES", 8 * 100 * 8)
    monkeypatch.setattr(job, "GATHERED_BYTES", 8 * 100 * 4)
    monkeypatch.setattr(writers, "GROUP_BYTES", 8 * 100 * 8)
    score(np.random.default_rng(0).normal(size=(1000, 100)), out="out.parquet")
    metadata = pq.read_metadata("out.parquet")
    assert metadata.num_rows == 1000
    assert 4 <= metadata.num_row_groups <= 6


def test_formats_hold_the_same_bits(small_chunks):
    logits = np.random.default_rng(1).normal(size=(7, 3)).astype(np.float32)
    targets = np.arange(7) % 3
    npz = score(logits, "--top-k", 3, targets=targets, out="out.npz")
    parquet = score(logits, "--top-k", 3, targets=targets, out="out.parquet")
    assert list(npz) == list(parquet)
    for name in npz:
        np.testing.assert_array_equal(parquet[name].astype(npz[name].dtype), npz[name])


@pytest.mark.parametrize(
    ("shape", "axis"),
    [((3, 5), 0), ((5, 3), 1), ((2, 3, 4), 1), ((2, 4, 3), -1), ((3, 2, 4), 0), ((1, 5, 3, 2), -2)],
)
@pytest.mark.parametrize("order", ["C", "F"])
def test_any_axis_and_order(shape, axis, order, small_chunks):
    logits = np.random.default_rng(2).normal(size=shape)
    rows = np.moveaxis(logits, axis, -1)
    targets = np.random.default_rng(3).integers(0, 3, rows.shape[:-1])
    columns = score(
        np.asarray(logits, order=order),
        "--axis",
        axis,
        targets=np.asarray(targets, order=order),
    )
    assert_columns(columns, expected(rows.reshape(-1, 3), targets.ravel()))


def test_one_row_without_a_row_axis():
    columns = score(LOGITS[1], targets=np.array(2))
    np.testing.assert_allclose(columns["loss"], [1.199675981209848], rtol=1e-12)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f4", "int8", "int64", "uint16", "bool"])
@pytest.mark.parametrize("suffix", FORMATS)
def test_dtypes(dtype, suffix):
    logits = np.array([[0, 1, 0], [1, 0, 0], [0, 0, 1]]).astype(dtype)
    columns = score(logits, targets=TARGETS, out=f"out.{suffix}")
    # softmax([1, 0, 0]) = [e, 1, 1] / (e + 2)
    np.testing.assert_allclose(columns["confidence"], 0.5761168847658291, rtol=1e-3)
    np.testing.assert_allclose(columns["loss"], [0.5514447139320511, 1.5514447139320511, 0.5514447139320511], rtol=1e-6)


@pytest.mark.parametrize("suffix", FORMATS)
def test_bfloat16(suffix):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    columns = score(LOGITS.astype(ml_dtypes.bfloat16), out=f"out.{suffix}")
    rounded = LOGITS.astype(ml_dtypes.bfloat16).astype(np.float64)
    wanted = np.log(np.exp(rounded).sum(axis=1))
    np.testing.assert_allclose(columns["logsumexp"], wanted, rtol=1e-6)


@pytest.mark.parametrize("suffix", FORMATS)
def test_no_rows(suffix):
    logits, targets = np.zeros((0, 5), np.float32), np.zeros(0, np.int64)
    columns = score(logits, "--top-k", 2, targets=targets, out=f"out.{suffix}")
    assert {name: len(values) for name, values in columns.items()} == dict.fromkeys((*job.COLUMNS, *job.TOP_K_COLUMNS), 0)


def test_warns_of_probabilities():
    np.save("probabilities.npy", pylogits.softmax(LOGITS))
    result = run("score", "probabilities.npy", "--out", "out.npz")
    assert result.exit_code == 0
    assert result.stderr.startswith("warning: probabilities.npy: ")
    assert "probabilities" in result.stderr.removeprefix("warning: probabilities.npy: ")
    assert result.stderr.count("\n") == 1


class TestRefusals:
    @pytest.fixture(autouse=True)
    def files(self, folder):
        np.save("logits.npy", LOGITS)
        np.save("targets.npy", TARGETS)

    def test_missing_logits(self):
        line = refused("absent.npy", "--out", "out.npz")
        assert line == "absent.npy: No such file or directory"

    @pytest.mark.parametrize("kept", [0, 5, 60, 128, 199])
    def test_truncated_logits(self, kept):
        whole = Path("logits.npy").read_bytes()
        assert len(whole) == 200
        Path("logits.npy").write_bytes(whole[:kept])
        line = refused("logits.npy", "--out", "out.npz")
        assert line.startswith("logits.npy: not a whole .npy file: ")

    def test_damaged_header(self):
        whole = Path("logits.npy").read_bytes()
        Path("logits.npy").write_bytes(whole.replace(b"'shape': (3", b"'shape': ((", 1))
        line = refused("logits.npy", "--out", "out.npz")
        assert line.startswith("logits.npy: not a whole .npy file: ")

    def test_archive_instead_of_an_array(self):
        np.savez("logits.npz", LOGITS)
        Path("logits.npz").rename("logits.npy")
        line = refused("logits.npy", "--out", "out.npz")
        assert line.startswith("logits.npy: not a whole .npy file: ")

    def test_pickled_objects(self):
        np.save("logits.npy", np.array([{}], dtype=object))
        line = refused("logits.npy", "--out", "out.npz")
        assert line.startswith("logits.npy: not a whole .npy file: ")

    @pytest.mark.parametrize("dtype", ["complex64", "U3", "M8[s]", "V1"])
    def test_dtype(self, dtype):
        np.save("logits.npy", np.zeros((3, 3), dtype))
        line = refused("logits.npy", "--out", "out.npz")
        dtype = np.dtype(dtype)
        assert line == f"logits.npy: logits must be real numbers of at most 64 bits, not {dtype}"

    @pytest.mark.parametrize("axis", [2, -3])
    def test_axis(self, axis):
        line = refused("logits.npy", "--axis", axis, "--out", "out.npz")
        assert line == f"logits.npy: no axis {axis} in logits of shape (3, 3)"

    def test_scalar(self):
        np.save("logits.npy", np.float64(1))
        line = refused("logits.npy", "--out", "out.npz")
        assert line == "logits.npy: no axis -1 in logits of shape ()"

    def test_no_classes(self):
        np.save("logits.npy", np.zeros((3, 0)))
        line = refused("logits.npy", "--out", "out.npz")
        assert line == "logits.npy: no classes along axis -1 of logits of shape (3, 0)"

    @pytest.mark.parametrize(("option", "value"), [("top_k", 0), ("top_k", 4), ("temperature", 0), ("temperature", -1)])
    def test_options(self, option, value):
        flag = "--" + option.replace("_", "-")
        line = refused("logits.npy", flag, value, "--out", "out.npz")
        assert line.startswith("logits.npy: ")
        assert option in line

    def test_missing_targets(self):
        line = refused("logits.npy", "--targets", "absent.npy", "--out", "out.npz")
        assert line == "absent.npy: No such file or directory"

    def test_targets_of_another_length(self):
        np.save("targets.npy", np.array([0, 1]))
        line = refused("logits.npy", "--targets", "targets.npy", "--out", "out.npz")
        assert line == "targets.npy: targets of shape (2,) for rows of shape (3,)"

    @pytest.mark.parametrize("dtype", ["float32", "bool"])
    def test_targets_of_another_dtype(self, dtype):
        np.save("targets.npy", TARGETS.astype(dtype))
        line = refused("logits.npy", "--targets", "targets.npy", "--out", "out.npz")
        assert line == f"targets.npy: targets must be integers, not {dtype}"

    @pytest.mark.parametrize("suffix", FORMATS)
    @pytest.mark.parametrize("bad", [7, 3, -1])
    def test_target_out_of_range(self, suffix, bad, small_chunks):
        """The row is the file's, not the chunk's; the first bad one is named."""
        targets = np.zeros(40, np.int16)
        targets[[25, 31]] = bad
        np.save("logits.npy", np.zeros((40, 3)))
        np.save("targets.npy", targets)
        line = refused("logits.npy", "--targets", "targets.npy", "--out", f"out.{suffix}")
        assert line == f"targets.npy: target {bad} at row 25 is outside [0, 3)"

    def test_target_beyond_int64(self):
        np.save("targets.npy", np.array([0, 2**64 - 1, 0], np.uint64))
        line = refused("logits.npy", "--targets", "targets.npy", "--out", "out.npz")
        assert line == f"targets.npy: target {2**64 - 1} at row 1 is outside [0, 3)"

    def test_unknown_suffix(self):
        line = refused("logits.npy", "--out", "out.txt")
        assert line == "out.txt: neither a folder nor a name that ends in .parquet, .arrow, .npz, .csv"

    def test_missing_folder(self):
        line = refused("logits.npy", "--out", "absent/out.npz")
        assert line == "absent/out.npz: not a file in an existing folder"

    def test_folder_as_output(self):
        Path("out.npz").mkdir()
        line = refused("logits.npy", "--out", "out.npz")
        assert line == "out.npz: not a file in an existing folder"


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("failure", [KeyboardInterrupt, MemoryError])
def test_a_run_cut_short_keeps_the_old_output(suffix, failure, small_chunks, monkeypatch):
    """Whatever ends the run, and after the first chunk has been written."""
    wanted = score(LOGITS, targets=TARGETS, out=f"out.{suffix}")
    before = sorted(os.listdir())
    whole_score = job.score_with_brier
    calls = []

    def failing_score(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 2:
            raise failure
        return whole_score(*arguments, **options)

    monkeypatch.setattr(job, "score_with_brier", failing_score)
    result = run("score", "logits.npy", "--out", f"out.{suffix}")
    assert len(calls) >= 2
    assert result.exit_code != 0
    assert sorted(os.listdir()) == before
    assert_columns(read(f"out.{suffix}"), wanted)


def test_overwrites_an_older_output():
    score(LOGITS, out="out.npz")
    assert len(score(LOGITS[:2], out="out.npz")["prediction"]) == 2


def test_output_has_the_permissions_of_any_new_file():
    score(LOGITS)
    Path("plain").touch()
    assert Path("out.npz").stat().st_mode == Path("plain").stat().st_mode


@pytest.mark.parametrize("suffix", FORMATS)
def test_memory_is_bounded(suffix):
    """A file of 512 MiB takes far less memory than its size."""
    np.save("small.npy", LOGITS.astype(np.float32))
    header = {"descr": "<f4", "fortran_order": False, "shape": (2**17, 2**10)}
    with open("large.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + 2**29)
    assert peak_memory("large.npy", f"out.{suffix}") - peak_memory("small.npy", f"out.{suffix}") < 2**28


def peak_memory(logits, out):
    """The most bytes that a run holds."""
    program = (
        "import resource, sys; from pylogits.cli import app; app(standalone_mode=False);"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    command = [sys.executable, "-c", program, "score", logits, "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.splitlines()[-1]) * 2**10


def test_memory_of_large_row_groups():
    """A Parquet file of 160 MB in four groups of rows."""
    lists = pa.FixedSizeListArray.from_arrays(pa.array(np.random.default_rng(0).normal(size=10**7).astype(np.float32)), 1000)
    for name, groups in (("small", 0), ("large", 4)):
        with pq.ParquetWriter(f"{name}.parquet", pa.schema({"logits": lists.type}), use_dictionary=False) as writer:
            for _ in range(groups):
                writer.write_table(pa.table({"logits": lists}))
    assert peak_memory("large.parquet", "out.npz") - peak_memory("small.parquet", "out.npz") < 2**28


@pytest.mark.parametrize(
    ("shape", "limit"),
    [((), 1), ((5,), 2), ((2, 3), 2), ((2, 3), 4), ((3, 2, 4), 8), ((3, 2, 4), 9), ((2, 3, 2), 1)],
)
def test_blocks_cover_a_shape_once_in_order(shape, limit):
    numbers = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    parts = [numbers[block] for block in readers.blocks(shape, limit)]
    assert max(part.size for part in parts) <= limit
    assert np.concatenate([part.ravel() for part in parts]).tolist() == numbers.ravel().tolist()


@pytest.mark.parametrize("suffix", FORMATS)
def test_digits(suffix):
    """Real logits: 899 images of handwritten digits, of which 864 are recognised."""
    logits, targets = EXAMPLES / "digits_logits.npy", EXAMPLES / "digits_targets.npy"
    result = run("score", logits, "--targets", targets, "--out", f"out.{suffix}")
    assert result.exit_code == 0
    columns = read(f"out.{suffix}")
    assert columns["correct"].sum() == 864
    np.testing.assert_allclose(columns["loss"].mean(), 0.1916541, rtol=1e-6)
    np.testing.assert_allclose(columns["confidence"].mean(), 0.8770379, rtol=1e-6)
    assert columns["prediction"][:3].tolist() == [6, 5, 9]
    np.testing.assert_allclose(columns["loss"][:3], [0.04955462, 0.38341486, 0.05138221], rtol=1e-6)
    for line in (r"mean loss +0\.191654", r"accuracy +0\.9610679", r"perplexity +1\.21125"):
        assert re.search(line, result.stdout)


def test_as_a_module():
    """A real process: the exit code, and one line on standard error."""
    np.save("logits.npy", LOGITS)
    command = [sys.executable, "-m", "pylogits", "score", "logits.npy", "--out"]
    done = subprocess.run([*command, "out.npz"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    done = subprocess.run([*command, "out.txt"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: out.txt: neither a folder nor a name that ends in .parquet, .arrow, .npz, .csv\n"


def test_config(capsys):
    result = run("config")
    assert result.exit_code == 0
    pylogits.show_config()
    assert result.stdout == capsys.readouterr().out != ""


def test_warmup(monkeypatch):
    """Each operation for both dtypes and the bits of halves, two steps of rows in parts for both dtypes; serial and parallel.

    Compiled elsewhere, as it takes minutes.
    """
    cpu = pytest.importorskip("pylogits.kernels.cpu")
    compiled = []
    monkeypatch.setattr(cpu, "compiled", lambda *arguments: compiled.append(arguments))
    result = run("warmup")
    assert (result.exit_code, len(set(compiled))) == (0, 50)
    assert result.stdout.splitlines()[:2] == ["softmax float32, serial", "softmax float32, threads"]
