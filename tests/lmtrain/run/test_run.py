"""The folder of a run: one writer at a time, rows that survive crashes and full disks, nothing lost."""

import json
import os
import resource
import signal
import socket
import subprocess
from pathlib import Path

import pytest
import torch

from lmtrain.checkpoint import save
from lmtrain.run import RunDirectory, Status, environment, read_metrics, read_status
from lmtrain.run.lock import Holder


def fork(action):
    """Runs `action` in a fork of the test process, which imports nothing; returns its pid."""
    child = os.fork()
    if child == 0:
        try:
            action()
        finally:
            os._exit(0)
    return child


def rows(path):
    """What a strict reader of JSON finds in a file of rows."""

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def events(path):
    return [row["event"] for row in rows(path / "events.jsonl")]


# The folder


@pytest.mark.fault(13)
@pytest.mark.parametrize("name", ["run", "a run with blanks", "läuft", "deep/er/run"])
def test_a_new_run_and_the_same_again(tmp_path, name):
    path = tmp_path / name
    with RunDirectory.open(path) as run:
        assert run.path == path
        assert run.status == Status("running")
        run.log_metrics({"step": 1, "loss": 0.5})
        run.log("first line")
        run.set_status("done", step=1, checkpoint=run.checkpoints / "step-1")
    for folder in ("checkpoints", "eval", "tensorboard"):
        assert (path / folder).is_dir()
    assert read_status(path) == Status("done", 1, "checkpoints/step-1")
    with RunDirectory.open(str(path)) as run:
        assert run.status == Status("running", 1, "checkpoints/step-1")
        run.log("second line")
    assert read_metrics(path) == [{"step": 1, "loss": 0.5}]
    assert events(path) == ["start", "end", "start"]
    assert (path / "log.txt").read_text() == "first line\nsecond line\n"


@pytest.mark.fault(13)
def test_links_are_followed(tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    monkeypatch.chdir(tmp_path)
    with RunDirectory.open("run") as run:
        monkeypatch.chdir("/")
        run.set_status("stopped", step=3, reason="SIGTERM")
    assert read_status(tmp_path / "disk") == Status("stopped", 3, None, "SIGTERM")


def test_the_home_folder_may_be_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    RunDirectory.open("~/run").close()
    assert read_status(tmp_path / "run") is not None


def test_a_folder_with_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match=rf"run.dir {tmp_path}: the folder is not empty and holds no run"):
        RunDirectory.open(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.fault(13)
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("file", "it is a file"),
        ("file/run", "cannot be written: Not a directory"),
        ("dangling", "cannot be written"),
    ],
)
def test_a_path_where_no_folder_can_be(tmp_path, name, reason):
    (tmp_path / "file").write_text("precious")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=rf"run\.dir {tmp_path / name}: {reason}"):
        RunDirectory.open(tmp_path / name)
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.fault(13)
def test_a_file_system_that_refuses_even_root():
    """Missing permissions do not stop root; /proc does."""
    with pytest.raises(ValueError, match=r"run\.dir /proc/run: cannot be written: "):
        RunDirectory.open("/proc/run")


def test_a_file_that_cannot_be_written_frees_the_lock(tmp_path):
    (tmp_path / "status.json").write_text("{}")
    (tmp_path / "metrics.jsonl").mkdir()
    for _ in range(2):
        with pytest.raises(ValueError, match="cannot be written: Is a directory"):
            RunDirectory.open(tmp_path)


@pytest.mark.fault(1)
def test_a_start_killed_anywhere_can_be_repeated(tmp_path):
    """SIGKILL before the n-th file is opened or renamed, for every n of a start."""
    path, n, status = tmp_path / "run", 0, None
    while status != 0:
        n += 1

        def start(limit=n):
            count = iter(range(1, 10_000))

            def counted(really):
                def call(*arguments, **more):
                    if next(count) == limit:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return really(*arguments, **more)

                return call

            os.open, os.replace, os.mkdir = counted(os.open), counted(os.replace), counted(os.mkdir)
            RunDirectory.open(path)

        status = os.waitpid(fork(start), 0)[1]
        RunDirectory.open(path).close()
        assert not [entry for entry in path.iterdir() if ".tmp-" in entry.name]
        for entry in path.iterdir():  # the next one starts from nothing again
            entry.rmdir() if entry.is_dir() else entry.unlink()
    assert n > 10


@pytest.mark.fault(4)
def test_leftovers_of_a_crash_go_at_the_start(tmp_path):
    RunDirectory.open(tmp_path).close()
    (tmp_path / "status.json.tmp-0a1b2c3d").write_text("{")
    (tmp_path / "checkpoints" / "step-5.tmp-0a1b2c3d").mkdir()
    RunDirectory.open(tmp_path).close()
    assert not list(tmp_path.rglob("*tmp-*"))
    assert rows(tmp_path / "events.jsonl")[-1]["removed"] == ["step-5.tmp-0a1b2c3d"]


# The lock


@pytest.mark.fault(13)
def test_a_second_process_is_refused_and_told_who_is_at_work(tmp_path):
    ready, go = os.pipe()

    def work():
        RunDirectory.open(tmp_path)
        os.write(go, b".")
        signal.pause()

    child = fork(work)
    try:
        os.read(ready, 1)
        with pytest.raises(ValueError, match=f"in use by process {child} on {socket.gethostname()}$"):
            RunDirectory.open(tmp_path)
        assert Holder.read(tmp_path / "lock").alive()
        assert read_status(tmp_path).state == "running"  # whoever only reads needs no lock
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert read_status(tmp_path).state == "running"
    assert not Holder.read(tmp_path / "lock").alive()
    RunDirectory.open(tmp_path).close()
    assert events(tmp_path) == ["start", "start", "took over"]
    assert rows(tmp_path / "events.jsonl")[-1]["holder"] == f"process {child} on {socket.gethostname()}"


def test_the_same_process_is_refused_too(tmp_path):
    with RunDirectory.open(tmp_path):
        for _ in range(2):  # a refusal must not free the lock
            with pytest.raises(ValueError, match=f"in use by process {os.getpid()}"):
                RunDirectory.open(tmp_path)
    RunDirectory.open(tmp_path).close()
    assert events(tmp_path) == ["start", "start"]


@pytest.mark.fault(13)
def test_a_child_that_outlives_the_holder_is_told_apart(tmp_path):
    ready, go = os.pipe()

    def work():
        RunDirectory.open(tmp_path)
        grandchild = fork(signal.pause)
        os.write(go, str(grandchild).encode())

    child = fork(work)
    os.waitpid(child, 0)
    try:
        grandchild = int(os.read(ready, 20))
        with pytest.raises(ValueError, match=f"in use by a child of process {child} on .*, which has ended itself"):
            RunDirectory.open(tmp_path)
    finally:
        os.kill(grandchild, signal.SIGKILL)


@pytest.mark.fault(13)
@pytest.mark.parametrize("content", ["", "{", "[]", '{"host": 1}', "\0\0\0"])
def test_a_lock_file_of_any_content_is_taken(tmp_path, content):
    (tmp_path / "lock").write_text(content)
    RunDirectory.open(tmp_path).close()


def holder_on(path, **changes):
    own = Holder.of(os.getpid())
    values = {"host": own.host, "pid": own.pid, "started": own.started} | changes
    (path / "lock").write_text(json.dumps(values))


CHANGES = {
    "alive": ({}, False),
    "a later process of that pid": ({"started": "another boot:1"}, True),
    "gone": ({"pid": 2**22 + 1}, True),
    "elsewhere": ({"host": "elsewhere"}, False),
}


@pytest.mark.fault(13)
@pytest.mark.parametrize("case", CHANGES)
def test_a_file_system_without_flock_goes_by_the_content(tmp_path, monkeypatch, case):
    def unsupported(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", unsupported)
    changes, is_free = CHANGES[case]
    holder_on(tmp_path, **changes)
    if is_free:
        RunDirectory.open(tmp_path).close()
    else:
        with pytest.raises(ValueError, match=rf"in use by .*; if that has ended, remove {tmp_path}/lock"):
            RunDirectory.open(tmp_path)


def test_a_flock_that_was_granted_outweighs_the_content(tmp_path):
    """The host of the last holder died, and the run goes on elsewhere."""
    holder_on(tmp_path, host="elsewhere")
    RunDirectory.open(tmp_path).close()
    assert rows(tmp_path / "events.jsonl")[1]["holder"] == f"process {os.getpid()} on elsewhere"


def test_a_zombie_is_not_alive():
    child = fork(lambda: None)
    holder = Holder.of(child)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    assert not Holder(holder.host, child, Holder.of(os.getpid()).started).alive()
    os.waitpid(child, 0)


# The rows


@pytest.fixture
def run(tmp_path):
    with RunDirectory.open(tmp_path) as run:
        yield run


def test_rows_are_there_at_once_and_exact(run):
    run.log_metrics({"step": 1, "loss": 0.1 + 0.2, "split": "väl"})
    assert (
        read_metrics(run.path) == rows(run.path / "metrics.jsonl") == [{"step": 1, "loss": 0.1 + 0.2, "split": "väl"}]
    )


def test_numbers_that_are_not_finite_are_null(run):
    run.log_metrics({"step": 1, "loss": float("nan"), "by_position": [1.0, float("-inf")], "x": {"y": float("inf")}})
    assert rows(run.path / "metrics.jsonl") == [{"step": 1, "loss": None, "by_position": [1.0, None], "x": {"y": None}}]


def test_rows_beyond_the_resumed_step_are_cut(run):
    for step in (1, 2, 2, 3, 4):
        run.log_metrics({"step": step, "loss": step / 3})
    before = (run.path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    assert run.truncate_metrics(2) == 2
    assert (run.path / "metrics.jsonl").read_bytes() == b"".join(before[:3])
    assert run.truncate_metrics(2) == 0
    run.log_metrics({"step": 3, "loss": 7.0})
    assert [row["step"] for row in read_metrics(run.path)] == [1, 2, 2, 3]
    assert run.truncate_metrics(0) == 4
    assert read_metrics(run.path) == []


WHOLE = b'{"step": 1, "loss": 1e-05}\n{"step":2}\n'


@pytest.mark.parametrize(
    "torn", [b"", b"{", b'{"step": 3, "lo', b"\0\0\0\0", b"\xff", b"3", b"[1]", b"\n", b"[" * 100_000]
)
@pytest.mark.parametrize("name", ["metrics.jsonl", "events.jsonl"])
def test_a_torn_last_line_is_cut(tmp_path, name, torn):
    RunDirectory.open(tmp_path).close()
    (tmp_path / name).write_bytes(WHOLE + torn)
    if name == "metrics.jsonl":
        assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    with RunDirectory.open(tmp_path) as run:
        run.log_metrics({"step": 3})
    content = (tmp_path / name).read_bytes()
    assert content.startswith(WHOLE)
    assert rows(tmp_path / name)[2].keys() >= ({"step"} if name == "metrics.jsonl" else {"event"})


def test_a_last_row_that_lacks_only_its_line_end_stays(tmp_path):
    RunDirectory.open(tmp_path).close()
    (tmp_path / "metrics.jsonl").write_bytes(WHOLE.rstrip())
    RunDirectory.open(tmp_path).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == WHOLE


def test_every_length_of_a_torn_file_can_be_read_and_repaired(tmp_path):
    RunDirectory.open(tmp_path).close()
    for length in range(len(WHOLE)):
        (tmp_path / "metrics.jsonl").write_bytes(WHOLE[:length])
        found = read_metrics(tmp_path)
        assert len(found) == (length >= len(WHOLE.splitlines()[0])) + (length >= len(WHOLE) - 1)


@pytest.mark.fault(1)
def test_truncation_killed_before_the_rename_changes_nothing(tmp_path):
    with RunDirectory.open(tmp_path) as run:
        for step in range(100):
            run.log_metrics({"step": step})
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def truncate():
        run = RunDirectory.open(tmp_path)
        os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        run.truncate_metrics(50)

    assert os.waitpid(fork(truncate), 0)[1] == signal.SIGKILL
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


@pytest.mark.fault(12)
def test_a_full_disk_delays_rows_but_loses_none(tmp_path):
    """The limit on the size of files leaves room for a part of a row; later there is room again."""

    def work():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        run = RunDirectory.open(tmp_path)
        run.log_metrics({"step": 1})
        size = (tmp_path / "metrics.jsonl").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 5, resource.RLIM_INFINITY))
        for step in (2, 3):
            run.log_metrics({"step": step})
        run.set_status("running", step=3)  # refused too, and no reason to end
        assert (tmp_path / "metrics.jsonl").stat().st_size == size + 5
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        run.log_metrics({"step": 4})
        run.set_status("done", step=4)
        run.close()

    assert os.waitpid(fork(work), 0)[1] == 0
    assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert not list(tmp_path.glob("*.tmp-*"))
    assert read_status(tmp_path).state == "done"


@pytest.mark.fault(12)
def test_rows_the_disk_never_took_are_reported_at_the_end(tmp_path):
    run = RunDirectory.open(tmp_path)
    full, metrics = os.open("/dev/full", os.O_WRONLY), run._metrics._descriptor
    os.dup2(full, metrics)
    os.close(full)
    run.log_metrics({"step": 1})
    with pytest.raises(OSError, match="No space left"):
        run.close()
    RunDirectory.open(tmp_path).close()  # the lock is free all the same


# Status and environment


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"state": "dead", "step": 1, "checkpoint": null, "reason": ""}']
)
def test_a_status_that_cannot_be_read_is_none(tmp_path, content):
    (tmp_path / "status.json").write_text(content)
    assert read_status(tmp_path) is None
    assert read_status(tmp_path / "nowhere") is None
    with RunDirectory.open(tmp_path) as run:
        assert run.status == Status("running")


def test_a_status_keeps_its_checkpoint_until_the_next(run):
    run.set_status("running", step=5, checkpoint=save(run.checkpoints, 5, {"model": {"w": torch.ones(1)}}, {}))
    run.set_status("failed", step=7, reason="3 updates in a row were not finite")
    assert read_status(run.path) == Status("failed", 7, "checkpoints/step-5", "3 updates in a row were not finite")
    assert (run.path / read_status(run.path).checkpoint).is_dir()


def test_the_environment_is_kept_for_every_start(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("HUB_TOKEN", "very-secret")
    monkeypatch.setattr("sys.argv", ["lmtrain", "train", "demo"])
    RunDirectory.open(tmp_path).close()
    described = json.loads((tmp_path / "environment.json").read_text())
    assert described["command"] == ["lmtrain", "train", "demo"]
    assert described["versions"]["torch"] == torch.__version__
    assert described["threads"] == torch.get_num_threads()
    assert described["variables"]["OMP_NUM_THREADS"] == "3"
    assert described["hardware"]["memory"] > 1 << 28
    monkeypatch.setattr("sys.argv", ["lmtrain", "train", "other"])
    RunDirectory.open(tmp_path).close()
    commands = [row["environment"]["command"][-1] for row in rows(tmp_path / "events.jsonl")]
    assert commands == ["demo", "other"]
    assert not any("very-secret" in path.read_text() for path in tmp_path.iterdir() if path.is_file())


def test_commit_and_changes_of_the_checkout_that_tracks_the_code(tmp_path):
    def git(*arguments):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", "-C", str(tmp_path), *who, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    code = Path(tmp_path) / "code.py"
    code.write_text("1")
    assert environment._git(code) is None  # no checkout
    git("init", "-q")
    assert environment._git(code) is None  # one that does not track it, as of somebody else's site-packages
    git("add", "code.py")
    git("commit", "-q", "-m", "first")
    (tmp_path / "notes").write_text("untracked files change nothing")
    assert environment._git(code) == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    code.write_text("2")
    assert environment._git(code) == {"commit": git("rev-parse", "HEAD"), "dirty": True}
