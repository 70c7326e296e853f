"""TensorBoard's event files, and services that speak wandb's interface."""

import sys
import time
import types

import pytest

from rto_fast.errors import ConfigError
from rto_fast.reporting.log import RunLog, Service, TensorBoard


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_gets_every_finite_number_of_a_stage(tmp_path):
    log = RunLog(tmp_path, [TensorBoard(tmp_path / "tensorboard", tmp_path / "metrics.jsonl", "run")])
    log.metrics("sft", 1, {"loss": 2.0, "grad_norm": float("nan")})
    log.metrics("sft", 2, {"loss": 1.5, "tokens": 7})
    log.metrics("dpo", 1, {"accuracy": 0.5})
    log.close()
    assert scalars(tmp_path / "tensorboard" / "sft") == {"loss": [(1, 2.0), (2, 1.5)], "tokens": [(2, 7.0)]}
    assert scalars(tmp_path / "tensorboard" / "dpo") == {"accuracy": [(1, 0.5)]}


def test_a_resumed_run_shows_each_step_once_whatever_the_clock_says(tmp_path, monkeypatch):
    record = tmp_path / "metrics.jsonl"

    def run(steps):
        log = RunLog(tmp_path, [TensorBoard(tmp_path / "tensorboard", record, "run")])
        for step, value in steps.items():
            log.metrics("rto", step, {"kl": value})
        log.close()

    run({1: 1.0, 2: 2.0, 3: 3.0})
    record.write_text(record.read_text().splitlines(keepends=True)[0])  # the checkpoint was after step 1
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now - 3600)  # the clock was set back
    run({2: 20.0, 3: 30.0})
    assert scalars(tmp_path / "tensorboard" / "rto") == {"kl": [(1, 1.0), (2, 20.0), (3, 30.0)]}


def test_event_files_of_others_stay(tmp_path):
    """Where `tensorboard` is a link to a folder in which another run writes, say."""
    names = ["rto/events.out.tfevents.1.host.7", "rto/events.out.tfevents.1.host.7.another", "rto/notes.txt", "x.txt"]
    for name in names:
        (tmp_path / "other" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "other" / name).write_text("somebody's")
    (tmp_path / "tensorboard").symlink_to(tmp_path / "other")
    for _ in range(2):
        log = RunLog(tmp_path, [TensorBoard(tmp_path / "tensorboard", tmp_path / "metrics.jsonl", "one")])
        log.metrics("rto", 1, {"kl": 1.0})
        log.close()
    assert all((tmp_path / "other" / name).read_text() == "somebody's" for name in names)
    assert len(list((tmp_path / "other" / "rto").iterdir())) == 4


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_service_is_started_told_and_ended(name, monkeypatch, tmp_path):
    said = []
    module = types.ModuleType(name)
    module.init = lambda **options: said.append(("init", options))
    module.log = lambda values: said.append(("log", values))
    module.finish = lambda: said.append(("finish",))
    monkeypatch.setitem(sys.modules, name, module)
    log = RunLog(tmp_path, [Service(name, "project", "run", {"seed": 0})])
    log.metrics("sft", 3, {"loss": 2.0})
    log.close()
    assert said == [
        ("init", {"project": "project", "name": "run", "config": {"seed": 0}}),
        ("log", {"sft/loss": 2.0, "sft/step": 3}),
        ("finish",),
    ]


def test_a_service_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(ConfigError, match="track.service: trackio cannot be imported .*pip install trackio"):
        Service("trackio", "project", "run", {})
