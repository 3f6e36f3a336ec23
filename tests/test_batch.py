"""`pylogits score` at full size: formats, many files, metrics, a fitted temperature, the report, resuming, a cluster."""

import json
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from contextlib import suppress
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from command import COMMAND, refused, run

import pylogits
from pylogits.batch import job, metrics, readers
from pylogits.batch.metrics import Metrics
from pylogits.scoring import score_with_brier

TAKEN = "would take the place of an input or of another output"
ALONE = "-: standard input can't be one of several inputs, nor have its scores in a folder"
NOT_A_FILE = "not a file in an existing folder"

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(50, 4)).astype(np.float32) * 3
TARGETS = RNG.integers(0, 4, 50)


pytestmark = pytest.mark.usefixtures("folder")


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of three rows of four float32 logits."""
    monkeypatch.setattr(readers, "CHUNK_BYTES", 48)
    monkeypatch.setattr(job, "GATHERED_BYTES", 300)


def score(*arguments):
    """Score, and return the summary by name."""
    result = run("score", *arguments)
    assert result.exit_code == 0, result.stderr
    return dict(re.findall(r"^(.*?)  +(\S+) *$", result.stdout, flags=re.MULTILINE))


def read(path):
    """The columns of an output file."""
    table = {".parquet": pq.read_table, ".arrow": pa.ipc.open_file, ".csv": pyarrow.csv.read_csv}[Path(path).suffix](path)
    table = table.read_all() if hasattr(table, "read_all") else table
    return {name: np.array(table[name].to_pylist()) for name in table.column_names}


def assert_scores(path, logits, targets=None, **options):
    """The scores in a file are those of the array, to the bit."""
    scores = pylogits.score(logits, targets, **options)
    columns = read(path)
    for name in job.COLUMNS if targets is not None else job.COLUMNS[:4]:
        wanted = getattr(scores, name)
        np.testing.assert_array_equal(columns[name].astype(wanted.dtype), wanted, err_msg=name)


# ---- formats of logits ----


def save_npz(name, **arrays):
    np.savez(name, **arrays)


def save_compressed(name, **arrays):
    np.savez_compressed(name, **arrays)


def save_safetensors(name, **arrays):
    pytest.importorskip("safetensors.numpy").save_file(arrays, name)


def save_zarr(name, logits, targets):
    group = pytest.importorskip("zarr").open_group(name, mode="w")
    group.create_array("logits", data=logits, chunks=(len(logits) // 7, 2))
    group.create_array("targets", data=targets, chunks=(len(targets) // 5,))


def list_table(logits, targets, fixed):
    flat = pa.array(logits.ravel())
    classes = logits.shape[1]
    lists = (
        pa.FixedSizeListArray.from_arrays(flat, classes)
        if fixed
        else pa.ListArray.from_arrays(pa.array(np.arange(len(logits) + 1) * classes, pa.int32()), flat)
    )
    return pa.table({"id": pa.array(np.arange(len(logits))), "logits": lists, "targets": pa.array(targets)})


def save_fixed_lists(name, logits, targets):
    pq.write_table(list_table(logits, targets, True), name, row_group_size=11)


def save_lists(name, logits, targets):
    pq.write_table(list_table(logits, targets, False), name, row_group_size=11)


def save_class_columns(name, logits, targets):
    columns = {f"class_{i}": pa.array(column) for i, column in enumerate(logits.T)}
    pq.write_table(pa.table(columns | {"targets": pa.array(targets)}), name, row_group_size=11)


def save_ipc(name, logits, targets):
    table = list_table(logits, targets, True)
    with pa.ipc.new_file(name, table.schema) as writer:
        writer.write_table(table, max_chunksize=11)


SAVERS = [
    (save_npz, "npz"),
    (save_compressed, "npz"),
    (save_safetensors, "safetensors"),
    (save_zarr, "zarr"),
    (save_fixed_lists, "parquet"),
    (save_lists, "parquet"),
    (save_class_columns, "parquet"),
    (save_ipc, "arrow"),
    (save_ipc, "feather"),
]


@pytest.mark.parametrize(("save", "suffix"), SAVERS)
def test_formats(save, suffix, small_chunks):
    """Logits and targets side by side in one file, read in chunks that the format knows nothing of."""
    save(f"data.{suffix}", logits=LOGITS, targets=TARGETS)
    score(f"data.{suffix}", "--targets-name", "targets", "--out", "out.parquet")
    assert_scores("out.parquet", LOGITS, TARGETS)


@pytest.mark.parametrize(("save", "suffix"), SAVERS)
def test_targets_of_another_format(save, suffix):
    save(f"data.{suffix}", logits=LOGITS, targets=TARGETS)
    np.save("logits.npy", LOGITS)
    score("logits.npy", "--targets", f"data.{suffix}", "--out", "out.parquet")
    assert_scores("out.parquet", LOGITS, TARGETS)


@pytest.mark.parametrize(("save", "suffix"), SAVERS)
def test_names(save, suffix):
    save(f"data.{suffix}", logits=LOGITS, targets=TARGETS)
    line = refused(f"data.{suffix}", "--logits-name", "absent", "--out", "out.npz")
    assert line.startswith(f"data.{suffix}: no ")
    assert "absent" in line


@pytest.mark.parametrize(("save", "suffix"), SAVERS)
@pytest.mark.parametrize("damage", ["cut", "emptied", "overwritten", "absent"])
def test_damaged_files(save, suffix, damage):
    """One line, whatever a format's library says."""
    path = Path(f"data.{suffix}")
    save(str(path), logits=np.zeros((400, 30), np.float32), targets=np.zeros(400, np.int64))
    if path.is_dir():
        if damage == "cut":
            pytest.skip("Zarr reads a missing chunk as zeros")
        files = [file for file in path.rglob("*") if file.is_file()]
    else:
        files = [path]
    for file in files:
        if damage == "absent":
            file.unlink()
        elif damage == "overwritten":
            file.write_bytes(b"\xa5" * file.stat().st_size)
        else:
            os.truncate(file, file.stat().st_size // 2 if damage == "cut" else 0)
    assert refused(path, "--out", "out.npz").startswith(f"data.{suffix}: ")


def test_class_columns_by_pattern():
    save_class_columns("data.parquet", LOGITS, TARGETS)
    score("data.parquet", "--logits-name", "class_[12]", "--out", "out.parquet")
    assert_scores("out.parquet", LOGITS[:, 1:3])


def test_many_columns_of_parquet_go_through_a_file(monkeypatch):
    monkeypatch.setattr(readers, "CHUNK_BYTES", 2**13)
    logits = np.random.default_rng(0).standard_normal((700, 50))
    columns = {f"class_{i}": logits[:, i].astype(np.float32 if i % 3 else np.float64) for i in range(50)}
    pq.write_table(pa.table(columns), "data.parquet", row_group_size=300)
    score("data.parquet", "--out", "out.parquet")
    assert_scores("out.parquet", np.stack(list(columns.values()), axis=1))
    with monkeypatch.context() as patch:
        patch.setattr(readers, "TemporaryFile", partial(open, "/dev/full", "r+b"))
        place = f"a temporary file in {tempfile.gettempdir()}"
        assert refused("data.parquet", "--out", "out.npz") == f"{place}: No space left on device"
    columns["class_31"] = pa.array([None if row == 450 else 0.0 for row in range(700)])
    pq.write_table(pa.table(columns), "data.parquet", row_group_size=300)
    assert refused("data.parquet", "--out", "out.npz") == "data.parquet: values are missing in column class_31 from row 300 on"


def test_missing_values_and_uneven_rows():
    rows = [[0.5, 1.5], [1.0, None], [2.0, 0.0]]
    pq.write_table(pa.table({"logits": rows}), "data.parquet")
    assert refused("data.parquet", "--out", "out.npz") == "data.parquet: values are missing in column logits from row 0 on"
    pq.write_table(pa.table({"logits": [*rows[::2], [1.0]]}), "data.parquet")
    assert refused("data.parquet", "--out", "out.npz") == "data.parquet: row 2 of column logits has 1 classes, not 2"


def test_a_missing_first_row():
    pq.write_table(pa.table({"logits": [None, [0.5, 1.5]]}), "data.parquet")
    assert refused("data.parquet", "--out", "out.npz") == "data.parquet: values are missing in column logits from row 0 on"


@pytest.mark.parametrize(("save", "suffix"), SAVERS)
def test_damage_of_single_bytes(save, suffix):
    """Whatever a byte changes is scored, or refused."""
    if suffix == "zarr":
        pytest.skip("Zarr has a folder of files, each of another format")
    if suffix in ("arrow", "feather"):
        pytest.skip("Arrow's library ends the process where some bytes are others")
    path = Path(f"data.{suffix}")
    save(str(path), logits=LOGITS, targets=TARGETS)
    whole = path.read_bytes()
    places = np.random.default_rng(0).integers(0, len(whole), 150)
    for place in places:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x5A]) + whole[place + 1 :])
        try:
            with readers.open_logits(path) as logits:
                for chunk in logits.chunks(1):
                    assert chunk.shape[1] == logits.shape[1]
        except readers.FileError as error:
            assert "\n" not in str(error)


def test_damaged_lzma():
    np.save("logits.npy", LOGITS)
    with zipfile.ZipFile("data.npz", "w", zipfile.ZIP_LZMA) as archive:
        archive.write("logits.npy")
    data = Path("data.npz").read_bytes()
    Path("data.npz").write_bytes(data[:200] + bytes(200) + data[400:])
    assert refused("data.npz", "--out", "out.npz") == "data.npz: not a whole .npy file: Corrupt input data"


@pytest.mark.parametrize("shape", [(4,), (50, 4)])
def test_a_zarr_array_itself(shape):
    zarr = pytest.importorskip("zarr")
    logits = np.resize(LOGITS, shape)
    zarr.create_array("data.zarr", data=logits, chunks=(2,) * len(shape))
    score("data.zarr", "--out", "out.parquet")
    assert_scores("out.parquet", np.atleast_2d(logits))


def test_an_array_deep_in_a_zarr_store():
    pytest.importorskip("zarr").open_group("data.zarr", mode="w").create_group("model").create_array("logits", data=LOGITS)
    score("data.zarr", "--logits-name", "model/logits", "--out", "out.parquet")
    assert_scores("out.parquet", LOGITS)


def test_text_columns_are_no_logits():
    pq.write_table(pa.table({"text": ["a", "b"]}), "data.parquet")
    assert refused("data.parquet", "--out", "out.npz") == "data.parquet: no column of logits"
    line = refused("data.parquet", "--logits-name", "text", "--out", "out.npz")
    assert line == "data.parquet: logits must be real numbers, which column text of string are not"


def test_bfloat16_tensors():
    pytest.importorskip("safetensors")
    logits = LOGITS.astype(ml_dtypes.bfloat16)
    header = json.dumps({"logits": {"dtype": "BF16", "shape": logits.shape, "data_offsets": [0, logits.nbytes]}}).encode()
    Path("data.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + logits.tobytes())
    score("data.safetensors", "--out", "out.parquet")
    assert_scores("out.parquet", logits)


def test_three_axes_of_a_tensor():
    save_safetensors("data.safetensors", logits=LOGITS.reshape(5, 4, 10), targets=np.zeros((5, 10), np.int64))
    score("data.safetensors", "--targets-name", "targets", "--axis", 1, "--out", "out.parquet")
    assert_scores("out.parquet", LOGITS.reshape(5, 4, 10).swapaxes(1, 2).reshape(50, 4), np.zeros(50, np.int64))


def test_a_format_without_its_library(monkeypatch):
    Path("data.zarr").mkdir()
    monkeypatch.setitem(sys.modules, "zarr", None)
    line = refused("data.zarr", "--out", "out.npz")
    assert line == 'data.zarr: needs the package zarr: pip install "pylogits[formats]"'


# ---- standard input ----


def score_bytes(data, *options):
    return subprocess.run((*COMMAND, "-", "--out", "out.parquet", *options), input=data, capture_output=True)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_standard_input(dtype):
    logits = LOGITS.astype(dtype)
    np.save("targets.npy", TARGETS)
    done = score_bytes(logits.tobytes(), "--dtype", dtype, "--classes", "4", "--targets", "targets.npy")
    assert (done.returncode, done.stderr) == (0, b"")
    assert_scores("out.parquet", logits, TARGETS)


@pytest.mark.parametrize(
    ("data", "options", "reason"),
    [
        (LOGITS.tobytes()[:-1], ["--classes", "4"], "standard input: ends in the middle of row 49"),
        (b"", [], "--classes: standard input needs the number of classes"),
        (b"", ["--classes", "4", "--dtype", "text"], "--dtype: no dtype is named text"),
        (
            LOGITS.tobytes(),
            ["--classes", "2", "--targets", "targets.npy"],
            "targets.npy: has fewer targets than there are rows of logits",
        ),
        (
            LOGITS[:9].tobytes(),
            ["--classes", "4", "--targets", "targets.npy"],
            "targets.npy: has more targets than there are rows of logits",
        ),
    ],
)
def test_bad_standard_input(data, options, reason):
    np.save("targets.npy", np.zeros(50, np.int64))
    done = score_bytes(data, *options)
    assert (done.returncode, done.stderr.decode()) == (2, f"error: {reason}\n")
    assert os.listdir() == ["targets.npy"]


def test_closed_standard_input():
    done = subprocess.run(
        (*COMMAND, "-", "--classes", "4", "--out", "out.npz"), preexec_fn=lambda: os.close(0), capture_output=True
    )
    assert (done.returncode, done.stderr) == (2, b"error: standard input: is closed\n")


def test_nothing_on_standard_input():
    assert score_bytes(b"", "--classes", "4").returncode == 0
    assert len(read("out.parquet")["prediction"]) == 0


# ---- formats of scores ----


@pytest.mark.parametrize("suffix", ["parquet", "arrow", "csv"])
def test_output_formats(suffix, small_chunks):
    np.save("logits.npy", LOGITS)
    score("logits.npy", "--top-k", 2, "--out", f"out.{suffix}")
    assert_scores(f"out.{suffix}", LOGITS)
    columns = read(f"out.{suffix}")
    wanted = pylogits.score(LOGITS, top_k=2).top_k_indices
    if suffix == "csv":
        np.testing.assert_array_equal(columns["top_k_indices_1"], wanted[:, 0])
        np.testing.assert_array_equal(columns["top_k_indices_2"], wanted[:, 1])
    else:
        np.testing.assert_array_equal(columns["top_k_indices"], wanted)


def test_columns():
    np.save("logits.npy", LOGITS)
    score("logits.npy", "--columns", "entropy, prediction", "--out", "out.parquet")
    assert list(read("out.parquet")) == ["entropy", "prediction"]
    assert refused("logits.npy", "--columns", "loss", "--out", "out.npz") == "--columns: loss needs targets"
    assert refused("logits.npy", "--columns", "label", "--out", "out.npz").startswith("--columns: no column named 'label', ")


# ---- many files ----


@pytest.fixture
def shards(folder):
    """Three files of logits and of targets; the metrics of all together."""
    for i, rows in enumerate((slice(0, 20), slice(20, 21), slice(21, 50))):
        Path(f"shards/{i}").mkdir(parents=True)
        np.save(f"shards/{i}/logits.npy", LOGITS[rows])
        np.save(f"shards/{i}/targets.npy", TARGETS[rows])
    return "shards/*/logits.npy", "--targets", "shards/*/targets.npy"


def test_many_files_into_one(shards):
    summary = score(*shards, "--out", "out.parquet")
    assert_scores("out.parquet", LOGITS, TARGETS)
    assert summary["rows"] == "50"
    assert summary["mean loss"] == f"{pylogits.cross_entropy(LOGITS.astype(np.float64), TARGETS):.7g}"


def test_a_folder_of_scores(shards):
    score(*shards, "--out", "scores", "--format", "csv")
    assert sorted(os.listdir("scores")) == sorted(f"{i}-logits.csv{suffix}" for i in range(3) for suffix in ("", ".json"))
    assert_scores("scores/2-logits.csv", LOGITS[21:], TARGETS[21:])


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["absent*.npy", "--out", "out.npz"], "absent*.npy: no such files"),
        (
            ["logits.npy", "-", "--out", "out.npz"],
            ALONE,
        ),
        (
            ["logits.npy", "other.npy", "--targets", "targets.npy", "--out", "o.npz"],
            "targets.npy: 1 files of targets for 2 of logits",
        ),
        (["logits.npy", "wide.npy", "--out", "out.npz"], "wide.npy: 5 classes, but 4 in the files before it"),
        (["logits.npy", "logits.npy", "--out", "scores"], f"scores/logits.parquet: {TAKEN}"),
        (["data.npz", "--out", "data.npz"], f"data.npz: {TAKEN}"),
        (["data.npz", "--out", ".", "--format", "npz"], f"data.npz: {TAKEN}"),
        (["logits.npy", "--targets", "targets.npy", "--out", "out.npz", "--report", "targets.npy"], f"targets.npy: {TAKEN}"),
        (["logits.npy", "--out", "out.npz", "--report", "out.npz"], f"out.npz: {TAKEN}"),
        (["logits.npy", "--out", "out.npz", "--report", "absent/report.html"], f"absent/report.html: {NOT_A_FILE}"),
        (["logits.npy", "--out", "out.npz", "--report", "/"], f"/: {NOT_A_FILE}"),
        (["logits.npy", "--out", "targets/scores"], "targets/scores: Not a directory"),
        (
            ["-", "--classes", "4", "--out", "scores"],
            ALONE,
        ),
        (
            ["logits.npy", "--top-k", "5", "--out", "scores"],
            "logits.npy: top_k must be between 1 and the number of classes, 4, not 5",
        ),
        (["logits.npy", "--top-k", str(2**70), "--out", "scores"], f"logits.npy: top_k must be an int, not {2**70}"),
        (["no\nsuch.npy", "--out", "out.npz"], "no such.npy: No such file or directory"),
        (
            ["logits.npy", "--resume", "--out", "out.npz"],
            "out.npz: --resume, --workers and --scheduler need a folder, for a file of scores each",
        ),
        (["logits.npy", "--out", "scores", "--format", "xls"], "--format: no format xls, only parquet, arrow, npz, csv"),
        (["logits.npy", "--out", "targets"], "targets: neither a folder nor a name that ends in .parquet, .arrow, .npz, .csv"),
        (["logits.npy", "--temperature", "warm", "--out", "out.npz"], "--temperature: neither a number nor fit: warm"),
        (
            ["logits.npy", "--temperature", "fit", "--out", "out.npz"],
            "--temperature: fit needs targets, and files that can be read more than once",
        ),
        (
            ["logits.txt", "--out", "out.npz"],
            "logits.txt: the name must end in .npy, .npz, .parquet, .arrow, .feather, .safetensors, .zarr",
        ),
    ],
)
def test_refusals(arguments, reason):
    for name, logits in (("logits", LOGITS), ("other", LOGITS), ("wide", np.zeros((3, 5)))):
        np.save(f"{name}.npy", logits)
    np.save("targets.npy", TARGETS)
    np.savez("data.npz", LOGITS)
    Path("targets").touch()
    assert refused(*arguments) == reason


def test_a_bad_target_in_the_last_file_ends_the_run_before_the_first_row(shards, monkeypatch):
    np.save("shards/2/targets.npy", np.full(29, 4))

    def failing_score(logits, *rest, **options):
        assert not len(logits), "a row was scored"
        return None, None

    monkeypatch.setattr(job, "score_with_brier", failing_score)
    assert refused(*shards, "--out", "out.npz") == "shards/2/targets.npy: target 4 at row 0 is outside [0, 4)"


# ---- resuming ----


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_resume_after_a_stop(shards, monkeypatch):
    """The scores, and what is printed of them, are those of a run that nothing stopped."""
    wanted_summary = score(*shards, "--out", "whole")
    whole_score = job.score_with_brier
    calls = []

    def stopping_score(logits, *arguments, **options):
        if len(logits):  # without rows, the options are checked
            calls.append(len(logits))
            if len(calls) == 2:
                raise KeyboardInterrupt
        return whole_score(logits, *arguments, **options)

    monkeypatch.setattr(job, "score_with_brier", stopping_score)
    assert run("score", *shards, "--out", "scores").exit_code != 0
    assert sorted(contents("scores")) == ["0-logits.parquet", "0-logits.parquet.json"]
    summary = score(*shards, "--out", "scores", "--resume")
    assert calls == [20, 1, 1, 29]
    assert contents("scores") == contents("whole")
    for name in wanted_summary.keys() - {"rows/s", "GB/s"}:
        assert summary[name] == wanted_summary[name]


@pytest.mark.parametrize("change", ["logits", "options", "record", "scores"])
def test_resume_scores_again_what_has_changed(change, shards, monkeypatch):
    score(*shards, "--out", "scores")
    options = ["--out", "scores", "--resume"]
    again = [1]
    if change == "logits":
        np.save("shards/1/logits.npy", LOGITS[:1])
    elif change == "options":
        options += ["--top-k", 2]
        again = [20, 1, 29]
    elif change == "record":
        os.truncate("scores/1-logits.parquet.json", 100)
    else:
        os.remove("scores/1-logits.parquet")
    whole_score = job.score_with_brier
    calls = []
    monkeypatch.setattr(
        job,
        "score_with_brier",
        lambda logits, *rest, **options: (calls.append(len(logits)), whole_score(logits, *rest, **options))[1],
    )
    score(*shards, *options)
    assert [rows for rows in calls if rows] == again


def test_resume_tells_files_of_one_name_apart():
    """Logits and targets of the same name, in folders of their own: each of them is looked at."""
    for folder, array in (("logits", LOGITS), ("targets", TARGETS)):
        Path(folder).mkdir()
        np.save(f"{folder}/0.npy", array)
    run = ("logits/0.npy", "--targets", "targets/0.npy", "--out", "scores", "--resume")
    score(*run)
    np.save("logits/0.npy", -LOGITS)
    score(*run)
    assert_scores("scores/0.parquet", -LOGITS, TARGETS)


def test_resume_sees_a_changed_chunk_of_a_zarr_store():
    save_zarr("data.zarr", LOGITS, TARGETS)
    run = ("data.zarr", "--targets-name", "targets", "--out", "scores", "--resume")
    score(*run)
    pytest.importorskip("zarr").open_group("data.zarr")["logits"][:] = -LOGITS
    score(*run)
    assert_scores("scores/data.parquet", -LOGITS, TARGETS)


def test_resume_in_another_format(shards):
    """Scores of one format say nothing of those of another, which may be older."""
    score(*shards, "--out", "scores")
    np.save("shards/1/logits.npy", -LOGITS[20:21])
    score(*shards, "--out", "scores", "--format", "csv")
    score(*shards, "--out", "scores", "--resume")
    assert_scores("scores/1-logits.parquet", -LOGITS[20:21], TARGETS[20:21])


@pytest.mark.parametrize("record", ["5", "[{}]", "{}"])
def test_resume_beside_a_file_that_is_no_record(record, shards):
    score(*shards, "--out", "scores")
    Path("scores/1-logits.parquet.json").write_text(record)
    score(*shards, "--out", "scores", "--resume")
    assert_scores("scores/1-logits.parquet", LOGITS[20:21], TARGETS[20:21])


# ---- metrics ----


def definitions(logits, targets):
    """The metrics by their definitions, row by row."""
    x = logits.astype(np.float64)
    p = np.exp(x - x.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    confidence, correct = p.max(axis=1), p.argmax(axis=1) == targets
    error = 0.0
    for i in range(15):
        rows = (confidence > i / 15) & (confidence <= (i + 1) / 15)
        if rows.any():
            error += rows.mean() * abs(correct[rows].mean() - confidence[rows].mean())
    mean_loss = -np.log(p[np.arange(len(x)), targets]).mean()
    return {
        "mean loss": mean_loss,
        "accuracy": correct.mean(),
        "perplexity": np.exp(mean_loss),
        "expected calibration error": error,
        "Brier score": ((p - np.eye(x.shape[1])[targets]) ** 2).sum(axis=1).mean(),
        "top-2 accuracy": (np.argsort(-x, axis=1)[:, :2] == targets[:, None]).any(axis=1).mean(),
    }


def count(logits, targets, top_k=2, name="logits.npy"):
    counted = Metrics(logits.shape[1])
    counted.add(name, *score_with_brier(logits, targets, -1, top_k, 1.0), targets)
    return counted


def test_metrics_are_their_definitions():
    logits = RNG.normal(size=(1000, 7)) * 2
    targets = RNG.integers(0, 7, 1000)
    summary = count(logits, targets).summary(2)
    wanted = definitions(logits, targets)
    assert list(summary) == list(wanted)
    for name, value in wanted.items():
        assert summary[name] == pytest.approx(value, rel=1e-12), name


def test_counts_by_class():
    counted = count(LOGITS, TARGETS)
    prediction = LOGITS.argmax(axis=1)
    np.testing.assert_array_equal(counted.target_rows, np.bincount(TARGETS, minlength=4))
    np.testing.assert_array_equal(counted.prediction_rows, np.bincount(prediction, minlength=4))
    np.testing.assert_array_equal(counted.correct_rows, np.bincount(TARGETS[prediction == TARGETS], minlength=4))
    confusion = np.zeros((4, 4), np.int64)
    np.add.at(confusion, (TARGETS, prediction), 1)
    np.fill_diagonal(confusion, 0)
    assert sum(rows for rows, _, _ in counted.confusions(99)) == confusion.sum()
    for rows, target, wrong in counted.confusions(99):
        assert rows == confusion[target, wrong]
    assert counted.confusions(1)[0][0] == confusion.max()


def test_worst_rows():
    loss = pylogits.score(LOGITS, TARGETS).loss
    worst = count(LOGITS, TARGETS).worst
    assert [row[2] for row in worst] == np.argsort(-loss, kind="stable")[:20].tolist()
    assert worst[0][:2] == (float(loss.max()), "logits.npy")


def test_rows_without_a_number():
    logits = LOGITS.copy()
    logits[3, 1] = np.nan
    counted = count(logits, TARGETS)
    assert (counted.rows, counted.nan_rows, counted.bin_rows.sum(), counted.loss_rows.sum()) == (50, 1, 49, 49)
    assert np.isnan(counted.mean_loss)
    assert len(counted.worst) == 20
    assert not any(np.isnan(row[0]) for row in counted.worst)


@pytest.mark.parametrize("row", [np.inf, -np.inf])
def test_rows_of_infinities(row):
    """No warning of their sums."""
    counted = count(np.full((3, 4), row), np.zeros(3, np.int64))
    assert (counted.nan_rows, counted.worst) == (3, [])


def test_sums_survive_json_and_merging():
    first, second = count(LOGITS[:20], TARGETS[:20], name="a"), count(LOGITS[20:], TARGETS[20:], name="b")
    again = Metrics.from_json(json.loads(json.dumps(first.to_json())))
    assert again.to_json() == first.to_json()
    again.merge(second)
    whole = count(LOGITS, TARGETS)
    assert again.summary(2) == pytest.approx(whole.summary(2), rel=1e-6)
    assert again.confusions(99) == whole.confusions(99)
    assert [row[0] for row in again.worst] == [row[0] for row in whole.worst]


def test_pairs_in_bounded_memory(monkeypatch):
    """The commonest pair is found, and its count is too low by no more than is said."""
    monkeypatch.setattr(metrics, "PAIRS", 10)
    targets = RNG.integers(0, 30, 2000)
    targets[::3] = 5
    predictions = RNG.integers(0, 30, 2000)
    predictions[::3] = 7
    counted = Metrics(30)
    for rows in np.split(np.arange(2000), 20):
        logits = np.eye(30)[predictions[rows]] * 9
        counted.add("logits", *score_with_brier(logits, targets[rows], -1, 1, 1.0), targets[rows])
    assert len(counted.pairs.counts()[0]) <= 10
    rows, target, prediction = counted.confusions(1)[0]
    exact = int(((targets == 5) & (predictions == 7)).sum())
    assert (target, prediction) == (5, 7)
    assert exact - counted.pairs.error <= rows <= exact


# ---- the temperature ----


@pytest.mark.parametrize("scale", [0.05, 0.7, 1.0, 3.0, 40.0])
def test_fitted_temperature(scale, shards):
    """Against SciPy's minimum of the mean loss."""
    optimize = pytest.importorskip("scipy.optimize")
    # Logits that know something of the targets, or the best temperature were infinite.
    logits = (LOGITS + 2 * np.eye(4)[TARGETS]) * scale
    for i, rows in enumerate((slice(0, 20), slice(20, 21), slice(21, 50))):
        np.save(f"shards/{i}/logits.npy", logits[rows])
    least = optimize.minimize_scalar(lambda t: pylogits.cross_entropy(logits / np.exp(t), TARGETS), bracket=(-1, 1), tol=1e-9)
    summary = score(*shards, "--temperature", "fit", "--out", "out.parquet")
    assert float(summary["temperature"]) == pytest.approx(np.exp(least.x), rel=1e-3)
    assert float(summary["mean loss"]) == pytest.approx(least.fun, rel=1e-6)
    if scale != 1.0:
        assert float(summary["mean loss before"]) > least.fun


def test_no_best_temperature():
    """Where every row is right, the loss falls to 0 with the temperature."""
    np.save("logits.npy", 2 * np.eye(4) - 1)
    np.save("targets.npy", np.arange(4))
    line = refused("logits.npy", "--targets", "targets.npy", "--temperature", "fit", "--out", "out.npz")
    assert line.startswith("logits.npy: no temperature minimises the loss: it still falls at ")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_no_temperature_of_rows_without_a_number(value):
    np.save("logits.npy", np.vstack([LOGITS, np.full(4, value)]))
    np.save("targets.npy", [*TARGETS, 0])
    line = refused("logits.npy", "--targets", "targets.npy", "--temperature", "fit", "--out", "out.npz")
    assert line == "logits.npy: no temperature minimises the loss: it is not finite"


def test_a_bad_target_ends_the_fit():
    np.save("logits.npy", LOGITS)
    np.save("targets.npy", TARGETS + 1)
    line = refused("logits.npy", "--targets", "targets.npy", "--temperature", "fit", "--out", "out.npz")
    assert line == f"targets.npy: target 4 at row {(TARGETS == 3).argmax()} is outside [0, 4)"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_fitted_temperature_of_few_digits(dtype):
    """The sums of the fit have the digits of float32: it is that of the same logits in float64."""
    logits = (LOGITS + 2 * np.eye(4)[TARGETS]).astype(dtype)
    np.save("logits.npy", logits)
    np.save("wide.npy", logits.astype(np.float64))
    np.save("targets.npy", TARGETS)
    fitted = [
        score(f"{name}.npy", "--targets", "targets.npy", "--temperature", "fit", "--out", "out.npz")["temperature"]
        for name in ("logits", "wide")
    ]
    assert float(fitted[0]) == pytest.approx(float(fitted[1]), rel=3e-4)


# ---- the report ----


def test_report(shards):
    score(*shards, "--report", "report.html", "--out", "out.parquet", "--top-k", 2)
    page = Path("report.html").read_text()
    summary = count(LOGITS, TARGETS).summary(2)
    for name in ("accuracy", "top-2 accuracy"):
        assert f"<dt>{name}</dt><dd>{summary[name]:.7g}</dd>" in page
    for title in ("Reliability", "Confidence", "Loss", "Commonest confusions", "Rows of the largest losses", "Classes"):
        assert f"<h2>{title}</h2>" in page
    assert not re.search(r"(src|href)=", page)  # nothing is fetched from elsewhere


def test_report_of_a_name_that_is_no_text():
    name = os.fsdecode(b"\xff.npy")
    np.save(name, LOGITS)
    np.save("targets.npy", TARGETS)
    score(name, "--targets", "targets.npy", "--report", "scores/report.html", "--out", "scores")
    assert "<h1>?.npy</h1>" in Path("scores/report.html").read_text()


def test_report_without_targets():
    np.save("<logits>.npy", LOGITS)
    score("<logits>.npy", "--report", "report.html", "--out", "out.parquet")
    page = Path("report.html").read_text()
    assert "<h1>&lt;logits&gt;.npy</h1>" in page
    assert "Reliability" not in page


@pytest.mark.parametrize("width", [1200, 500])
def test_report_in_a_browser(width, shards):
    """Nothing is wider than the window: Chromium says so of the page that it has laid out."""
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("a browser's layout needs chromium")
    score(*shards, "--report", "report.html", "--out", "out.parquet")
    page = Path("report.html").read_text()
    probe = "<script>document.title = document.documentElement.scrollWidth + ' of ' + window.innerWidth</script>"
    Path("report.html").write_text(page.replace("</html>", probe + "</html>"))
    options = ("--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},2000")
    for more in (("--dump-dom",), ("--screenshot=report.png",)):
        done = subprocess.run((browser, *options, *more, "report.html"), capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        if more == ("--dump-dom",):
            needed, given = re.search(r"<title>(\d+) of (\d+)</title>", done.stdout).groups()
            assert int(needed) <= int(given)
    assert Path("report.png").stat().st_size > 10_000
    artefacts = Path(__file__).parents[1] / "build" / "artefacts"
    artefacts.mkdir(parents=True, exist_ok=True)
    shutil.copy("report.png", artefacts / f"report-{width}.png")


# ---- what is shown meanwhile ----


@pytest.mark.parametrize("quiet", [False, True])
def test_progress_on_a_terminal(quiet):
    np.save("logits.npy", np.zeros((3_000_000, 4), np.float32))
    controller, terminal = pty.openpty()
    options = ["--quiet"] if quiet else []
    done = subprocess.run(
        (*COMMAND, "logits.npy", "--out", "out.parquet", *options),
        stderr=terminal,
        stdout=subprocess.PIPE,
        env={**os.environ, "COLUMNS": "100"},
    )
    os.close(terminal)
    shown = b""
    try:
        while part := os.read(controller, 4096):
            shown += part
    except OSError:  # how Linux says that nobody writes to it any more
        pass
    os.close(controller)
    assert done.returncode == 0
    assert (b"rows/s" in shown and b"GB/s" in shown) == (not quiet)
    assert (done.stdout == b"") == quiet


# ---- a cluster ----


def test_workers(shards):
    """Two processes write the same bytes as this one, and count the same."""
    pytest.importorskip("distributed")
    wanted = score(*shards, "--out", "alone")
    done = subprocess.run((*COMMAND, *shards, "--out", "shared", "--workers", "2"), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert contents("shared") == contents("alone")
    assert f"mean loss                   {wanted['mean loss']}" in done.stdout


def test_a_killed_worker_costs_nothing_but_time():
    pytest.importorskip("distributed")
    for i in range(4):
        np.save(f"{i}.npy", RNG.normal(size=(500_000, 8)).astype(np.float32))
    score(*(f"{i}.npy" for i in range(4)), "--out", "alone")
    command = (*COMMAND, *(f"{i}.npy" for i in range(4)), "--out", "shared", "--workers", "2")
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while not list(Path().glob("shared/.pylogits-*")):
            assert process.poll() is None
            time.sleep(0.01)
        writer = next(pid for pid in writers_below(Path("shared").resolve()) if pid != process.pid)
        os.kill(writer, signal.SIGKILL)
        assert process.wait(120) == 0, process.stderr.read()
    left = {name: data for name, data in contents("shared").items() if not name.startswith(".pylogits-")}
    assert left == contents("alone")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_with_workers_is_stopped(number, code):
    """To a terminal's Ctrl-C the workers belong as well. Nothing is said, and no temporary file or process is left."""
    pytest.importorskip("distributed")
    header = {"descr": "<f4", "fortran_order": False, "shape": (2**24, 2**10)}
    with open("logits.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + 2**36)
    command = (*COMMAND, "logits.npy", "--out", "scores", "--workers", "1")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, start_new_session=True, **pipes) as process:
        while not list(Path().glob("scores/.pylogits-*")):
            assert process.poll() is None
            time.sleep(0.01)
        (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
        assert process.communicate(timeout=60) == (b"", b"")  # only once no process holds the pipes any more
    assert process.returncode == code
    assert os.listdir("scores") == []


def writers_below(folder):
    """The processes that have a file open in a folder."""
    while True:
        for process in Path("/proc").glob("[0-9]*"):
            try:
                files = [os.readlink(file) for file in (process / "fd").iterdir()]
            except OSError:
                continue
            if any(file.startswith(str(folder)) for file in files):
                yield int(process.name)


def test_an_error_on_a_worker_is_one_line(shards):
    pytest.importorskip("distributed")
    np.save("shards/1/targets.npy", [4])
    done = subprocess.run((*COMMAND, *shards, "--out", "shared", "--workers", "2"), capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "error: shards/1/targets.npy: target 4 at row 0 is outside [0, 4)"


def test_workers_beside_another_cluster(shards):
    pytest.importorskip("distributed")
    with socket.socket() as taken:
        with suppress(OSError):  # then another has it
            taken.bind(("", 8787))
            taken.listen()
        command = (*COMMAND, *shards, "--out", "shared", "--quiet", "--workers", "1")
        assert subprocess.run(command, capture_output=True, timeout=120).stderr == b""


def test_workers_that_were_started_elsewhere(shards, monkeypatch):
    """The files are named as seen from here."""
    distributed = pytest.importorskip("distributed")
    wanted = score(*shards, "--out", "alone")
    with monkeypatch.context() as patch:
        patch.chdir(os.sep)
        port = {"dashboard_address": "localhost:0"}  # not 8787, which two tests would have at a time
        cluster = distributed.LocalCluster(n_workers=1, dashboard_address=None, scheduler_kwargs=port)
    with cluster:
        found = score(*shards, "--out", "shared", "--scheduler", cluster.scheduler_address)
    assert found["mean loss"] == wanted["mean loss"]
    assert contents("shared") == contents("alone")


def test_an_address_of_no_kind(shards):
    pytest.importorskip("distributed")
    assert refused(*shards, "--out", "shared", "--scheduler", "no://one").startswith("no://one: no Dask scheduler there: ")


def test_no_scheduler(shards):
    dask = pytest.importorskip("dask")
    pytest.importorskip("distributed")
    with dask.config.set({"distributed.comm.timeouts.connect": "1s"}):
        line = refused(*shards, "--out", "shared", "--scheduler", "tcp://127.0.0.1:9")
    assert line.startswith("tcp://127.0.0.1:9: no Dask scheduler there")
