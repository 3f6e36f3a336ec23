"""`pylogits score`, killed, interrupted, on full disks and bad files: a whole output or none, and one clear line."""

import os
import random
import re
import resource
import signal
import socket
import subprocess
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from command import COMMAND, refused, run

from pylogits.batch import job, readers

FORMATS = ("parquet", "npz")
pytestmark = pytest.mark.usefixtures("folder")


def temporary_files():
    return list(Path().glob(".pylogits-*.tmp"))


def wait_for_temporary_file(process):
    """Wait until a run has begun to write."""
    while not temporary_files():
        assert process.poll() is None
        time.sleep(0.001)


def read(path):
    """The columns of an output file."""
    if path.endswith(".npz"):
        with np.load(path) as archive:
            return dict(archive)
    table = pq.read_table(path)
    return {name: table[name].to_numpy() for name in table.column_names}


def same(columns, wanted):
    return list(columns) == list(wanted) and all(columns[name].tobytes() == wanted[name].tobytes() for name in wanted)


def save_endless(path="logits.npy"):
    """A sparse file of 64 GiB of logits, whose scoring outlasts what a test does meanwhile."""
    header = {"descr": "<f4", "fortran_order": False, "shape": (2**24, 2**10)}
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + 2**36)


# ---- killed, interrupted ----


@pytest.mark.parametrize("suffix", FORMATS)
def test_killed_at_any_moment(suffix):
    """The output is the old one, the new one, or not there; a temporary file at most lies beside it."""
    rng = np.random.default_rng(0)
    np.save("old.npy", rng.normal(size=(1000, 8)))
    np.save("new.npy", rng.normal(size=(200_000, 8)))
    out = Path(f"out.{suffix}")
    run_old, run_new = ((*COMMAND, name, "--out", out) for name in ("old.npy", "new.npy"))
    subprocess.run(run_old, check=True, stdout=subprocess.DEVNULL)
    old, old_bytes = read(str(out)), out.read_bytes()
    start = time.perf_counter()
    subprocess.run(run_new, check=True, stdout=subprocess.DEVNULL)
    duration = time.perf_counter() - start
    new = read(str(out))

    moments = random.Random(0)
    for attempt in range(10):
        had_output = attempt % 2 == 0
        out.unlink(missing_ok=True)
        if had_output:
            out.write_bytes(old_bytes)
        left_before = len(temporary_files())
        with subprocess.Popen(run_new, stdout=subprocess.DEVNULL) as process:
            time.sleep(moments.uniform(0, duration))
            process.kill()
        assert len(temporary_files()) <= left_before + 1
        assert set(Path().iterdir()) <= {Path("old.npy"), Path("new.npy"), out, *temporary_files()}
        if out.exists():
            columns = read(str(out))
            assert same(columns, new) or (had_output and same(columns, old))
        else:
            assert not had_output


@pytest.mark.parametrize("suffix", FORMATS)
def test_killed_while_writing(suffix):
    """What a killed run leaves does not disturb the next one."""
    save_endless()
    out = Path(f"out.{suffix}")
    out.write_bytes(b"old")
    with subprocess.Popen((*COMMAND, "logits.npy", "--out", out)) as process:
        wait_for_temporary_file(process)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert out.read_bytes() == b"old"
    left = temporary_files()
    assert len(left) == 1

    np.save("logits.npy", np.array([[0.0, 1.0]]))
    assert run("score", "logits.npy", "--out", out).exit_code == 0
    assert read(str(out))["prediction"].tolist() == [1]
    assert temporary_files() == left


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals(suffix, number, code):
    save_endless()
    out = Path(f"out.{suffix}")
    out.write_bytes(b"old")
    with subprocess.Popen((*COMMAND, "logits.npy", "--out", out), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        wait_for_temporary_file(process)
        process.send_signal(number)
        assert process.communicate() == (b"", b"")
    assert process.returncode == code
    assert out.read_bytes() == b"old"
    assert sorted(os.listdir()) == ["logits.npy", out.name]


def test_the_callers_signal_handler_is_back():
    before = signal.getsignal(signal.SIGTERM)
    np.save("logits.npy", np.zeros((3, 3)))
    assert run("score", "logits.npy", "--out", "out.npz").exit_code == 0
    assert signal.getsignal(signal.SIGTERM) is before


def test_whole_on_the_disk_before_it_has_its_name(monkeypatch):
    """The last size that is synced is the output's."""
    np.save("logits.npy", np.zeros((3, 3)))
    events = []
    monkeypatch.setattr(os, "fsync", lambda file: events.append(os.fstat(file).st_size))
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda *paths: (events.append("replace"), replace(*paths)))
    assert run("score", "logits.npy", "--out", "out.npz").exit_code == 0
    assert events == [os.path.getsize("out.npz"), "replace"]


# ---- full disks ----


@pytest.fixture
def disk(folder):
    """Mount a file system of 1 MiB and 8 files in the folder `disk`, with an older output."""
    path = folder / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m,nr_inodes=8", "pylogits-test", str(path)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("a small disk needs the command mount")
    if done.returncode:
        pytest.skip("a small disk needs the right to mount one")
    try:
        for suffix in FORMATS:
            Path(f"disk/out.{suffix}").write_bytes(b"old")
        yield Path("disk")
    finally:
        subprocess.run(["umount", str(path)], check=True)


def fill(disk):
    """Leave no byte free."""
    with (disk / "filler").open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(bytes(4096))


@pytest.mark.parametrize(("suffix", "rows"), [("parquet", 100_000), ("npz", 100_000), ("npz", 20_000)])
def test_disk_full_while_writing(suffix, rows, disk):
    """The columns of 20,000 rows fit, but not beside the archive that they go into."""
    np.save("logits.npy", np.random.default_rng(0).normal(size=(rows, 3)))
    assert refused("logits.npy", "--out", disk / f"out.{suffix}") == f"disk/out.{suffix}: No space left on device"


@pytest.mark.parametrize("suffix", FORMATS)
def test_disk_full_at_the_flush(suffix, disk):
    """Three rows stay in the buffer until the end."""
    np.save("logits.npy", np.zeros((3, 3)))
    fill(disk)
    assert refused("logits.npy", "--out", disk / f"out.{suffix}") == f"disk/out.{suffix}: No space left on device"


@pytest.mark.parametrize(("suffix", "free"), [("parquet", 0), ("npz", 0), ("npz", 1)])
def test_no_room_for_another_file(suffix, free, disk):
    """None for the temporary file, or one but none for an archive's columns."""
    np.save("logits.npy", np.zeros((3, 3)))
    for number in range(os.statvfs(disk).f_favail - free):
        (disk / f"filler{number}").touch()
    assert refused("logits.npy", "--out", disk / f"out.{suffix}") == f"disk/out.{suffix}: No space left on device"


@pytest.mark.parametrize("suffix", FORMATS)
def test_output_larger_than_the_limit(suffix):
    """A limit on a file's size, which needs no right to mount a disk."""
    Path(f"out.{suffix}").write_bytes(b"old")
    np.save("logits.npy", np.random.default_rng(0).normal(size=(20_000, 3)))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        line = refused("logits.npy", "--out", f"out.{suffix}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert line == f"out.{suffix}: File too large"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_no_room_for_the_summary(unbuffered):
    """The output is whole all the same."""
    np.save("logits.npy", np.array([[0.0, 2.0]]))
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            (*COMMAND, "logits.npy", "--out", "out.npz"),
            stdout=full,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )
    assert (done.returncode, done.stderr) == (2, b"error: standard output: No space left on device\n")
    assert read("out.npz")["prediction"].tolist() == [1]


# ---- inputs and outputs that can't be read or written ----


@pytest.fixture
def unprivileged(folder):
    """Act as a user without rights: root may read and write everything."""
    Path().chmod(0o777)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    yield
    os.seteuid(user)


def test_logits_without_permission(unprivileged):
    Path("logits.npy").touch(mode=0)
    assert refused("logits.npy", "--out", "out.npz") == "logits.npy: Permission denied"


@pytest.mark.parametrize("mode", [0o555, 0o444])
def test_folder_without_permission(unprivileged, mode):
    np.save("logits.npy", np.zeros((3, 3)))
    Path("locked").mkdir(mode=mode)
    result = run("score", "logits.npy", "--out", "locked/out.npz")
    assert (result.exit_code, result.stderr) == (2, "error: locked/out.npz: Permission denied\n")


@pytest.mark.parametrize("kind", ["folder", "pipe", "socket", "device"])
@pytest.mark.parametrize("argument", ["logits", "targets"])
def test_not_a_regular_file(kind, argument):
    """A pipe above all must not be waited for."""
    np.save("logits.npy", np.zeros((3, 3)))
    name = f"{argument}.npy"
    Path(name).unlink(missing_ok=True)
    if kind == "folder":
        Path(name).mkdir()
    elif kind == "pipe":
        os.mkfifo(name)
    elif kind == "device":
        Path(name).symlink_to("/dev/zero")
    else:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(name)
    line = refused("logits.npy", "--targets", "targets.npy", "--out", "out.npz")
    assert line == f"{name}: not a regular file"


def test_path_through_a_file():
    np.save("logits.npy", np.zeros((3, 3)))
    assert refused("logits.npy/part.npy", "--out", "out.npz") == "logits.npy/part.npy: Not a directory"
    assert refused("logits.npy", "--out", "logits.npy/out.npz") == "logits.npy/out.npz: not a file in an existing folder"


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="no /proc/self/mem here")
def test_input_error():
    """The first page of a process's memory can't be read: a real error of a regular file."""
    Path("logits.npy").symlink_to("/proc/self/mem")
    assert refused("logits.npy", "--out", "out.npz") == "logits.npy: Input/output error"


# ---- a file that changes while it is read ----


@pytest.mark.parametrize("suffix", FORMATS)
def test_cut_short_by_another_process(suffix):
    """A memory map of it would end the run with SIGBUS."""
    save_endless()
    out = Path(f"out.{suffix}")
    out.write_bytes(b"old")
    with subprocess.Popen((*COMMAND, "logits.npy", "--out", out), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        wait_for_temporary_file(process)
        os.truncate("logits.npy", 2**20)
        stdout, stderr = process.communicate()
    # The temporary file is there before the logits are opened: they may already be too short then.
    assert stdout == b""
    assert re.fullmatch(
        rb"error: logits.npy: (became shorter while it was read|not a whole .npy file: the last \d+ bytes are missing)\n",
        stderr,
    )
    assert process.returncode == 2
    assert out.read_bytes() == b"old"
    assert sorted(os.listdir()) == ["logits.npy", out.name]


@pytest.fixture
def when_scored(monkeypatch):
    """Do something after the first chunk of two rows has been scored, and before the next one is read."""
    monkeypatch.setattr(readers, "CHUNK_BYTES", 48)
    monkeypatch.setattr(job, "THREADS", 1)
    whole_score = job.score_with_brier

    def prepare(action):
        actions = [action]

        def score(logits, *arguments, **options):
            scores = whole_score(logits, *arguments, **options)
            if actions and len(logits):  # without rows, the options are checked
                actions.pop()()
            return scores

        monkeypatch.setattr(job, "score_with_brier", score)

    return prepare


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("argument", ["logits", "targets"])
def test_cut_short_after_the_first_chunk(order, argument, when_scored):
    """Rows too long for the file's buffer, so that each chunk is read from the file."""
    rng = np.random.default_rng(0)
    shape = (4, 2000) if argument == "logits" else (40_000, 3)
    np.save("logits.npy", np.asarray(rng.normal(size=shape), order=order))
    np.save("targets.npy", np.zeros(shape[0], np.int64))
    when_scored(lambda: os.truncate(f"{argument}.npy", 200))
    line = refused("logits.npy", "--targets", "targets.npy", "--out", "out.npz")
    assert line == f"{argument}.npy: became shorter while it was read"


def test_replaced_after_the_first_chunk(when_scored):
    """The rows are those of one file, the one that was opened."""
    logits = np.random.default_rng(0).normal(size=(6, 3))
    np.save("logits.npy", logits)
    np.save("other.npy", -logits)
    when_scored(lambda: os.replace("other.npy", "logits.npy"))
    assert run("score", "logits.npy", "--out", "out.npz").exit_code == 0
    assert read("out.npz")["prediction"].tolist() == logits.argmax(axis=1).tolist()


# ---- inputs that lie ----


def save_header(shape, descr="<f8", size=0):
    """A file of any header that is well-formed, with `size` bytes after it."""
    with open("logits.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
        file.write(bytes(size))


@pytest.mark.parametrize("argument", ["logits", "targets"])
@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ((4, 3), "the last 24 bytes are missing"),
        ((2**62, 2**62), ""),
        ((2**32, 2**32), ""),  # as 64-bit integers their product is 0
        ((2**70,), ""),
        ((0, 2**62), ""),
        ((-3, 3), ""),
        ((-3, -3), ""),
        ((1,) * 65, ""),
        ((True, 3), ""),
    ],
)
def test_shape_that_is_not_the_files(argument, shape, reason):
    save_header(shape, size=72)
    if argument == "targets":
        os.rename("logits.npy", "targets.npy")
        np.save("logits.npy", np.zeros((3, 3)))
    line = refused("logits.npy", "--targets", "targets.npy", "--out", "out.npz")
    assert line.startswith(f"{argument}.npy: not a whole .npy file: {reason}")


def test_row_larger_than_memory():
    """A sparse file may hold what its header says, and still be too much."""
    save_header((1, 2**42), "|i1")
    os.truncate("logits.npy", os.path.getsize("logits.npy") + 2**42)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (2**41, limits[1]))
    try:
        line = refused("logits.npy", "--out", "out.npz")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert line.startswith("logits.npy: Unable to allocate 4.00 TiB")


@pytest.mark.parametrize("descr", ["|O", [("name", "|O")]])
def test_objects_are_never_unpickled(descr):
    """Unpickling these bytes would make a folder."""
    save_header((1,), descr)
    with open("logits.npy", "ab") as file:
        file.write(b"cos\nmkdir\n(S'unpickled'\ntR.")
    line = refused("logits.npy", "--out", "out.npz")
    assert line == "logits.npy: not a whole .npy file: it holds Python objects"


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"{'descr': '<f8', 'fortran_order': False, 'shape': (3, 3)",
        b"{'descr': '<f8', 'fortran_order': False}",
        b"{'descr': '<f8', 'fortran_order': False, 'shape': (3L, 4L)}",  # as Python 2 wrote it, which NumPy warns of
        rb"{'descr': '\d', 'fortran_order': False, 'shape': (3, 3)}",
        b"(" * 5000,
        b"-" * 9000 + b"1",
        b"[" + b"1," * 10_000,  # longer than NumPy reads
        b"\xff" * 100,
    ],
)
@pytest.mark.parametrize("version", [1, 2, 3])
def test_damaged_header(header, version):
    length = len(header).to_bytes(2 if version == 1 else 4, "little")
    Path("logits.npy").write_bytes(b"\x93NUMPY" + bytes([version, 0]) + length + header + bytes(72))
    line = refused("logits.npy", "--out", "out.npz")
    assert line.startswith("logits.npy: not a whole .npy file: ")
    assert len(line) < 300


def test_unknown_version():
    np.save("logits.npy", np.zeros((3, 3)))
    Path("logits.npy").write_bytes(Path("logits.npy").read_bytes().replace(b"NUMPY\x01", b"NUMPY\x09"))
    line = refused("logits.npy", "--out", "out.npz")
    assert line == "logits.npy: not a whole .npy file: its format has the unknown version (9, 0)"
