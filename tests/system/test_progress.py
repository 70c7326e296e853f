"""Whatever lasts longer than five seconds says what is done and what is left."""

import contextlib
import io
import math
import os
import pty
import re
import select
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from rto_fast import stages
from rto_fast.config import RolloutConfig
from rto_fast.data.tokenizing import Prompt, stop_token_ids
from rto_fast.data.world import build_model, build_tokenizer
from rto_fast.evaluation.policies import evaluate
from rto_fast.models.loading import load_model
from rto_fast.models.model import Model
from rto_fast.reporting.log import RunLog
from rto_fast.rollout import Sampling, build_engine
from rto_fast.system import progress as progress_module
from rto_fast.system.terminal import say
from rto_fast.training.accumulate import Accumulator
from rto_fast.training.saving import save_model


@pytest.fixture
def quick(monkeypatch):
    """A fiftieth of the time."""
    monkeypatch.setattr(progress_module, "PATIENCE", 0.1)
    monkeypatch.setattr(progress_module, "INTERVAL", 0.01)
    with progress_module.shown():
        yield progress_module.progress


def test_a_file_gets_lines_at_growing_intervals(quick, capsys):
    with quick("counting", 100, "sheep", done=50) as phase:
        for _ in range(25):
            time.sleep(0.05)
            phase.advance()
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) <= 5 and all(
        re.match(r"counting: [567]\d of 100 sheep, .* s, about .* s left", x) for x in lines
    )
    seconds = [float(re.search(r"sheep, ([\d.]+) s", line)[1]) for line in lines]
    assert all(later >= 1.8 * earlier for earlier, later in zip(seconds, seconds[1:], strict=False))


def test_a_terminal_gets_one_line_that_is_removed(quick, monkeypatch):
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        with quick("thinking \x1b[31m"):
            time.sleep(0.3)
        time.sleep(0.05)
        written = os.read(ours, 10_000).decode()
    os.close(ours)
    assert written.count("\n") == 0 and written.count("\rthinking \\x1b[31m: ") > 2 and written.endswith("\r\x1b[K")


@contextlib.contextmanager
def on_a_terminal(monkeypatch):
    """Both streams are a terminal of 60 columns; yields a function that reads what was written there."""
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as stream, monkeypatch.context() as patch:
        patch.setenv("COLUMNS", "60")
        patch.setattr(sys, "stdout", stream)
        patch.setattr(sys, "stderr", stream)
        yield lambda: b"".join(_waiting(ours)).decode()
    os.close(ours)


def _waiting(descriptor):
    while select.select([descriptor], [], [], 0.1)[0]:
        yield os.read(descriptor, 100_000)


@pytest.mark.parametrize("err", [False, True], ids=["stdout", "stderr"])
def test_what_is_said_meanwhile_has_a_line_of_its_own(quick, monkeypatch, err):
    with on_a_terminal(monkeypatch) as written:
        with quick("thinking"):
            for number in range(3):
                time.sleep(0.25)
                say(f"thought {number}", err=err)
        lines = written().split("\n")
    assert any("\rthinking: " in line for line in lines)
    assert [line.rpartition("\r\x1b[K")[2].strip() for line in lines[:3]] == [f"thought {i}" for i in range(3)]


def test_a_line_in_wide_characters_fits_the_terminal(quick, monkeypatch):
    with on_a_terminal(monkeypatch) as written:
        with quick("数据" * 40):
            time.sleep(0.25)
        drawn = [line for line in written().split("\r") if "数" in line]
    assert drawn and all(2 * (line.count("数") + line.count("据")) < 60 for line in drawn)


def test_the_innermost_phase_that_lasts_is_shown(quick, monkeypatch, capsys):
    monkeypatch.setattr(progress_module, "LONGEST_SILENCE", 0.1)
    with quick("outer"):
        with quick("inner", 3):
            time.sleep(0.25)
        for _ in range(8):
            with quick("brief"):
                time.sleep(0.05)
        with quick(unit="parts") as phase:
            phase.advance(7)
            time.sleep(0.2)
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith("inner: 0 of 3 items, ") for line in lines) and any(
        line.startswith("outer: 7 parts, ") for line in lines
    )
    assert any(re.match(r"outer: [\d.]+ s$", line) for line in lines) and not any("brief" in line for line in lines)


def test_the_lines_of_a_file_grow_rarer_over_all_phases(quick, capsys):
    """A stage of many long steps, each of them a phase, does not fill a file."""
    start = time.monotonic()
    with quick("rto", 40, "steps") as stage:
        for _ in range(8):
            with quick("sampling"):
                time.sleep(0.2)
            stage.advance()
    lines = capsys.readouterr().err.splitlines()
    assert 3 <= len(lines) <= math.log2((time.monotonic() - start) / 0.1) + 1, lines  # after .1, .2, .4, .8 … s


def test_a_file_that_is_told_otherwise_gets_no_line(quick, monkeypatch, capsys):
    monkeypatch.setattr(progress_module, "PATIENCE", 0.5)
    with quick("sft", 60, "steps"):
        for _ in range(60):
            time.sleep(0.02)
            say("sft 1/60")
    assert not capsys.readouterr().err


def test_a_long_step_says_how_much_of_it_is_done(capsys):
    said = []
    with progress_module.progress("sft", 2, "steps") as phase:
        phase.advance()
        for _ in Accumulator(10, print).step(range(4), [6, 6, 6, 6], []):
            said.append(phase.line())
        phase.start -= 60
        said.append(phase.line())
        phase.advance()
        said.append(phase.line())
    assert [line[: line.index(" steps")] for line in said] == [
        "sft: 1 of 2",
        "sft: 1.2 of 2",
        "sft: 1.5 of 2",
        "sft: 1.8 of 2",
        "sft: 2.0 of 2",
        "sft: 2 of 2",
    ]
    assert said[2].endswith(" left")


def test_a_phase_with_a_line_of_its_own_is_shown_where_that_stands_still(quick, monkeypatch):
    monkeypatch.setattr(progress_module, "is_live", lambda err: True)
    monkeypatch.setattr(sys, "stderr", written := io.StringIO())
    with quick("dpo", 9, "steps", has_line=True) as phase:
        for _ in range(10):
            time.sleep(0.03)
            phase.advance()
        assert not written.getvalue()
        time.sleep(0.2)
    assert "\rdpo: 10 of 9 steps, " in written.getvalue()


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_what_is_printed_goes_above_the_live_lines(quick, tmp_path, monkeypatch):
    """Those of a phase and of a stage are one: each takes the place of what was drawn before."""
    monkeypatch.setattr(sys, "stdout", written := Terminal())
    monkeypatch.setattr(sys, "stderr", written)
    log = RunLog(tmp_path)
    with quick("数" * 99):
        time.sleep(0.2)
        log.say("said")
    with log.stage("sft", 2) as stage, quick("sft", 2, "steps", has_line=True):
        stage.step({}, ())
        log.say("said")
        time.sleep(0.2)
        stage.step({}, ())
    log.say("said")
    drawn = [
        line.split("\r") for line in written.getvalue().replace("\r\x1b[K", "\r\r").replace("\x1b[K", "").split("\n")
    ]
    assert [line[-2:] for line in drawn[:2]] == [["", "said"], ["", "said"]]  # on a line that was cleared
    assert drawn[2][-1].startswith("sft              2/2 ") and drawn[3:] == [["said"], [""]]
    assert {text[:3] for line in drawn for text in line} == {"数数数", "sft", "sai", ""}
    assert max(len(text) for text in drawn[0]) * 2 < 80


class Broken(io.StringIO):
    def write(self, text):
        raise BrokenPipeError


@pytest.mark.parametrize("stream", [Broken(), None], ids=["broken", "none"])
def test_a_stream_that_is_gone_costs_nothing(quick, monkeypatch, stream):
    monkeypatch.setattr(sys, "stderr", stream)
    with quick("working"):
        time.sleep(0.2)


def test_nothing_is_shown_unasked_and_no_thread_is_left(monkeypatch, capsys):
    monkeypatch.setattr(progress_module, "PATIENCE", 0.0)
    monkeypatch.setattr(progress_module, "INTERVAL", 0.01)
    before = threading.active_count()
    with progress_module.progress("a library's call"):
        time.sleep(0.05)
        assert threading.active_count() == before
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")  # of several processes, one speaks
    with progress_module.shown(), progress_module.progress("working"):
        time.sleep(0.05)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(KeyboardInterrupt), progress_module.shown(), progress_module.progress("interrupted"):
        raise KeyboardInterrupt
    assert threading.active_count() == before and not capsys.readouterr().err


def test_work_of_models_is_a_phase(tmp_path):
    """Loading, sampling, judging, log-probs, writing: each with its count where it has one."""
    phases = []

    @contextlib.contextmanager
    def record(phase):
        yield
        phases.append((phase.what, phase.count, phase.total))

    folder, tokenizer = tmp_path / "model", build_tokenizer()
    build_model(0).save_pretrained(folder)
    with progress_module.observed(record):
        model = load_model("causal_lm", str(folder), device="cpu", dtype=torch.float32, trainable=False)
        engine = build_engine(model, tokenizer, RolloutConfig(engine="hf"))
        items = [Prompt([3, 4, 5], "p", {})] * 3
        stops = stop_token_ids(tokenizer)
        evaluate(
            engine, items, Sampling(max_new_tokens=4, stop_ids=tuple(stops)), lambda c: torch.zeros(len(c)), tokenizer
        )
        stages.pair_logps(
            Model(model), [SimpleNamespace(prompt_ids=[3], chosen_ids=[4], rejected_ids=[5], num_tokens=4)] * 5, 8
        )
        save_model(Model(model), tokenizer, tmp_path / "saved")
    assert [(what.partition(f" {tmp_path}")[0], count, total) for what, count, total in phases] == [
        ("loading and checking", 0, None),
        ("sampling", 3, 3),
        ("judging 3 responses", 0, None),
        ("working", 5, 5),
        ("writing", 0, None),
    ]
