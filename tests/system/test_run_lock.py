"""Two runs for one folder: one has it, and a dead one's claim is recognised."""

import errno
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from rto_fast import push, train
from rto_fast.errors import CheckpointError, ConfigError
from rto_fast.system import run_lock
from rto_fast.system.run_lock import PATIENCE, RunLock, release_all
from rto_fast.training.checkpoint import Checkpoints

OTHER_HOST = {
    "host": "elsewhere",
    "boot": "another",
    "namespace": "pid:[1]",
    "pid": 7,
    "start": 1,
    "since": "yesterday",
}
HOLDER = """
import os, sys, time
from rto_fast.system.run_lock import RunLock
RunLock(sys.argv[1]).take()
print(os.getpid(), flush=True)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def released():
    yield
    release_all()


@pytest.fixture
def holder(tmp_path):
    """A process that has the lock of `tmp_path`."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    yield process
    process.kill()
    process.communicate()


def taken(folder):
    lock = RunLock(folder)
    lock.take()
    return lock


def refusal(folder):
    before = sorted((path.name, path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir())
    with pytest.raises(ConfigError) as refused:
        RunLock(folder).take()
    after = sorted((path.name, path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir())
    assert before == after
    return str(refused.value)


def test_the_second_is_told_who_has_the_folder_and_a_killed_one_has_it_no_more(tmp_path, holder, capsys):
    (tmp_path / "config.yaml").write_text("seed: 1")
    (tmp_path / "progress.json").write_text("{}")
    who = f"{tmp_path} is in use: process {holder.pid} on {os.uname().nodename} has been running there since 20"
    assert refusal(tmp_path).startswith(who)
    holder.send_signal(signal.SIGSTOP)  # it lives, and may go on
    assert refusal(tmp_path).startswith(who)
    holder.kill()
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # a zombie, of which the parent takes no notice
    assert json.loads(taken(tmp_path).content)["pid"] == os.getpid()
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", "progress.json", "run.lock"}


@pytest.mark.parametrize("option", ["--output_dir", "--resume"])
def test_a_second_run_is_refused_by_the_command(tmp_path, holder, option, capsys, monkeypatch):
    if option == "--resume":
        (tmp_path / "config.yaml").write_text("model: {path: embedded}\ndata: {preferences: embedded:preferences}\n")
        (tmp_path / "progress.json").write_text("{}")
    before = sorted(path.name for path in tmp_path.iterdir())
    monkeypatch.setattr(sys, "argv", ["train", option, str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        train.command()
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1
    assert said.startswith(f"rto_fast: {tmp_path} is in use: process {holder.pid} on {os.uname().nodename} ")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_run_is_not_pushed_while_it_is_under_way(tmp_path, holder):
    with pytest.raises(ConfigError, match=f"is in use: process {holder.pid} on "):
        push.push(tmp_path, "owner/name", dry_run=True)


def test_a_lock_is_gone_when_the_run_is_over(tmp_path):
    lock = taken(tmp_path)
    process = os.fork()
    if not process:
        release_all()  # of a worker that somebody forks: not its own
        os._exit(0)
    os.waitpid(process, 0)
    assert lock.path.exists()
    lock.release()
    lock.release()
    assert not list(tmp_path.iterdir())


def left(folder, seconds=0.0, **changes):
    """A lock of another host, with a heartbeat so long ago."""
    path = folder / "run.lock"
    path.write_text(json.dumps(OTHER_HOST | changes))
    moment = time.time() - seconds
    os.utime(path, (moment, moment))
    return path


def test_another_host_lives_while_its_heart_beats(tmp_path):
    path = left(tmp_path, 20.0)
    with pytest.raises(ConfigError) as refused:
        RunLock(tmp_path).take()
    said = str(refused.value)
    assert "process 7 on elsewhere has been running there since yesterday (its last sign of life: " in said
    assert "s ago; it counts as gone 120 s after it)" in said and said.endswith(f"no longer in use, delete {path}")
    left(tmp_path, PATIENCE + 5)
    taken(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["run.lock"]


def test_clocks_of_hosts_may_differ(tmp_path, monkeypatch):
    """Only the file system's is asked."""
    left(tmp_path, 20.0)
    monkeypatch.setattr(time, "time", lambda: 4e9)
    with pytest.raises(ConfigError, match="process 7 on elsewhere"):
        RunLock(tmp_path).take()
    left(tmp_path, 4e9 - 5e9)  # the file system's own clock was set back: nothing tells how old it is
    with pytest.raises(ConfigError, match="in the future, by the file system's clock.*delete .*run.lock"):
        RunLock(tmp_path).take()


def mine(**changes):
    return json.loads(RunLock("anywhere").content) | changes


ELSEWHERE = {
    "another container": {"namespace": "pid:[2]"},
    "before the last boot": {"boot": "another"},
    "a copy of this machine": {"host": "clone"},
}


@pytest.mark.parametrize("where", ELSEWHERE)
def test_a_number_of_a_process_means_something_in_its_own_place_only(tmp_path, where):
    """Its number is of a process that lives here, and it is judged by its heartbeat; or of none, and it may live."""
    gone = mine(pid=2**22 + 1, start=1)
    for changes in (mine(), gone):
        left(tmp_path, 20.0, **changes | ELSEWHERE[where])
        with pytest.raises(ConfigError, match="its last sign of life"):
            RunLock(tmp_path).take()
    left(tmp_path, PATIENCE + 5, **mine() | ELSEWHERE[where])
    taken(tmp_path)


@pytest.mark.parametrize("changes", [{"start": 1}, {"pid": 2**22 + 1}], ids=["a number used again", "no such process"])
def test_a_dead_process_of_this_host_is_known_at_once(tmp_path, changes):
    left(tmp_path, **mine(**changes))
    taken(tmp_path)


DAMAGES = {
    "empty": b"",
    "no JSON": b"\xff{",
    "a list": b"[1]",
    "deep": b"[" * 3000,
    "huge": b"1" * 100_000,
    "fields of other types": json.dumps(OTHER_HOST | {"pid": "7", "host": None}).encode(),
    "all processes": json.dumps(mine(pid=-1)).encode(),
    "no number": json.dumps(mine(pid=float("nan"))).encode(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_lock_is_judged_by_its_age(tmp_path, damage):
    path = tmp_path / "run.lock"
    path.write_bytes(DAMAGES[damage])
    with pytest.raises(ConfigError, match=f"{path} names no process; .* delete that file"):
        RunLock(tmp_path).take()
    os.utime(path, (1e9, 1e9))
    taken(tmp_path)


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: os.symlink("nowhere", path)])
def test_what_is_no_file_is_no_lock(tmp_path, make):
    make(tmp_path / "run.lock")
    with pytest.raises(ConfigError, match="no lock of a run; (remove|delete) it"):
        RunLock(tmp_path).take()


def test_a_heart_beats(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "BEAT", 0.01)
    lock = taken(tmp_path)
    os.utime(lock.path, (1e9, 1e9))
    end = time.monotonic() + 20
    while lock.path.stat().st_mtime == 1e9 and time.monotonic() < end:
        time.sleep(0.01)
    assert lock.path.stat().st_mtime > 1e9


def test_a_lock_that_somebody_deletes_is_there_again(tmp_path):
    lock = taken(tmp_path)
    lock.path.unlink()
    assert lock.check() == f"{lock.path} was deleted while this run lives; it is there again"
    assert lock.check() is None and lock.path.read_bytes() == lock.content


class Log:
    start = 0.0
    said: list = []

    def say(self, text):
        self.said.append(text)

    def seconds(self):
        return 1.0


def test_a_run_whose_folder_was_taken_writes_nothing_more(tmp_path):
    lock = taken(tmp_path)
    checkpoints = Checkpoints(tmp_path, Log(), lock=lock)
    other = left(tmp_path, 0.0)
    for write in (lambda: checkpoints.save("sft", None), lambda: checkpoints.finish("sft")):
        with pytest.raises(CheckpointError, match="process 7 on elsewhere has taken this run's lock"):
            write()
    lock.release()
    assert [path.name for path in tmp_path.iterdir()] == ["run.lock"] and "elsewhere" in other.read_text()


def no_links(*_):
    raise PermissionError(errno.EPERM, "Operation not permitted")


@pytest.fixture(params=[True, False], ids=["links", "no links"])
def dead(request, tmp_path, monkeypatch):
    """A folder with a dead lock, on a file system with hard links or without."""
    if not request.param:
        monkeypatch.setattr(os, "link", no_links)
    left(tmp_path, **mine(start=1))
    return tmp_path


@pytest.mark.parametrize("owner, name", [(run_lock, "_refuse"), (os, "replace")], ids=["judged", "about to replace it"])
def test_of_two_that_find_a_dead_lock_one_takes_it(dead, monkeypatch, owner, name):
    """The second comes while the first has read that it is dead, and before that one has replaced it."""
    outcomes, function = [], getattr(owner, name)

    def interrupted(*arguments):
        result = function(*arguments) if owner is run_lock else None
        monkeypatch.setattr(owner, name, function)
        take()
        return result if owner is run_lock else function(*arguments)

    def take():
        lock = RunLock(dead)
        try:
            lock.take()
            outcomes.append(lock)
        except ConfigError as error:
            assert f"is in use: process {os.getpid()} on " in str(error)
            outcomes.append(None)

    monkeypatch.setattr(owner, name, interrupted)
    take()
    (lock,) = filter(None, outcomes)
    assert len(outcomes) == 2 and lock.path.read_bytes() == lock.content
    assert [path.name for path in dead.iterdir()] == ["run.lock"]


def take_and_die(folder, name, calls):
    """Takes the lock in a process that is killed at so many calls of a system function."""
    if process := os.fork():
        os.waitpid(process, 0)
        return
    function, left_over = getattr(os, name), iter(range(calls))

    def killed(*arguments, **options):
        if next(left_over, None) is None:
            os._exit(9)
        return function(*arguments, **options)

    setattr(os, name, killed)
    try:
        RunLock(folder).take()
    finally:
        os._exit(0)


@pytest.mark.parametrize("name", ["link", "open", "replace", "unlink"])
def test_one_that_is_killed_while_it_takes_a_dead_lock_is_in_nobodys_way(dead, name):
    for calls in range(3):
        take_and_die(dead, name, calls)
    taken(dead)
    assert [path.name for path in dead.iterdir()] == ["run.lock"]
