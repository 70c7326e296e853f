"""When a signal ends a run, and how."""

import os
import shlex
import signal
import subprocess
import sys
import time

import pytest

from rto_fast.errors import Interrupted
from rto_fast.system.command_line import exit_code
from rto_fast.training.stop import ECHO, StopRequest


@pytest.fixture(autouse=True)
def hangup():
    """As where nobody ignores it, as `nohup pytest` would."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    "number, code",
    [(signal.SIGTERM, 0), (signal.SIGINT, 130), (signal.SIGHUP, 129)],
    ids=["SIGTERM", "Ctrl-C", "SIGHUP"],
)
def test_where_nothing_would_be_lost_the_run_ends_at_once(number, code):
    before = signal.getsignal(number)
    with pytest.raises(Interrupted) as stopped, StopRequest() as stop:
        stop.folder = "runs/a"
        os.kill(os.getpid(), number)
    assert str(stopped.value) == "stopped; go on with: python -m rto_fast.train --resume runs/a"
    assert exit_code(stopped.value) == code and not stopped.value.together
    assert signal.getsignal(number) is before


def test_a_hangup_that_is_ignored_stays_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(0.01)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    assert stop.signal is None and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


@pytest.mark.parametrize("folder", ["a  b", "it's", "$(id)", "-x", "--resume", "a;b"])
def test_how_to_go_on_is_a_line_for_a_shell(folder):
    stop = StopRequest()
    stop.folder = folder
    words = shlex.split(str(stop.interrupted("stopped")).partition("go on with: ")[2])
    assert words[:-1] == "python -m rto_fast.train --resume".split()
    assert os.path.normpath(words[-1]) == folder and not words[-1].startswith("-")


def test_before_there_is_a_run_it_says_so():
    with pytest.raises(Interrupted, match="stopped before the first step; start it again"), StopRequest():
        os.kill(os.getpid(), signal.SIGTERM)


# What a stage may be doing when the first signal comes, and goes on doing.
BUSY = {
    "Python": "while True: pass",
    # A mutex that is locked already: the call lets other threads run, and signals do not end it.
    "foreign code": "mutex = ctypes.create_string_buffer(64); [ctypes.CDLL(None).pthread_mutex_lock(mutex) for _ in 'ab']",
    # Never lets another thread run, nor Python look for signals; entered after the first signal.
    "foreign code with Python's lock": "wait(); print('ready', flush=True); deque(itertools.repeat(0), maxlen=0)",
    "an except clause that takes everything": "\nwhile True:\n  try: time.sleep(9)\n  except BaseException: pass",
}
SCRIPT = """
import ctypes, itertools, multiprocessing, os, signal, sys, time
from collections import deque
from rto_fast.training.stop import ECHO, StopRequest

def wait():
    while not stop.signal:
        time.sleep(0.01)
    time.sleep(2 * ECHO)

with StopRequest() as stop:
    stop.waits = True
    print("ready", flush=True)
    exec(sys.argv[1])
    print("whole", flush=True)
"""


class Process:
    def __init__(self, busy):
        command = [sys.executable, "-c", SCRIPT, busy]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.wait_until_ready()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()

    def wait_until_ready(self):
        assert self.process.stdout.readline() == "ready\n"

    def end(self):
        """(exit code, stdout, stderr)"""
        stdout, stderr = self.process.communicate(timeout=20)
        return self.process.returncode, stdout, stderr


@pytest.mark.parametrize("busy", BUSY)
@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_at_once_whatever_is_running(busy, first, second):
    with Process(BUSY[busy]) as run:
        run.process.send_signal(first)
        if "lock" in busy:
            run.wait_until_ready()
        else:
            time.sleep(2 * ECHO)
        assert run.process.poll() is None  # the first alone does not
        run.process.send_signal(second)
        code, _, said = run.end()
    assert code == -second
    assert "rto_fast: stopping: the present step ends first and is saved; a second signal ends the run at once" in said


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_terminal_that_is_closed_ends_no_step(first):
    """A stage goes on to the end of its step after SIGHUP, be it the first signal or a later one; SIGTERM still ends it."""
    with Process("wait(); print('ready', flush=True); time.sleep(60)") as run:
        run.process.send_signal(first)
        run.wait_until_ready()
        run.process.send_signal(signal.SIGHUP)
        time.sleep(0.2)
        assert run.process.poll() is None
        run.process.send_signal(signal.SIGTERM)
        assert run.end()[0] == -signal.SIGTERM


def test_an_echo_of_the_first_signal_is_no_second_one():
    with Process("wait()") as run:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):  # `timeout` and launchers do this
            run.process.send_signal(number)
            time.sleep(0.02)
        code, stdout, _ = run.end()
    assert code == 0 and stdout == "whole\n"


def test_a_worker_that_the_run_forks_takes_signals_of_its_own():
    pool = "\npool = multiprocessing.get_context('fork').Pool(2)\npool.terminate()\npool.join()\n"  # by SIGTERM
    with Process(pool + "assert not stop.signal\nprint('ready', flush=True)\nwait()") as run:
        run.wait_until_ready()
        time.sleep(2 * ECHO)
        run.process.send_signal(signal.SIGTERM)  # the run's first one, still
        code, stdout, _ = run.end()
    assert code == 0 and stdout == "whole\n"
