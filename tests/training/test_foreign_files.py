"""What others have in a run's folder, or where its links lead, stays as it is."""

import json
import os
import shutil
from pathlib import Path

import pytest

from rto_fast.data.world import build_model, build_tokenizer
from rto_fast.errors import CheckpointError
from rto_fast.models.model import Model
from rto_fast.reporting.log import RunLog
from rto_fast.training.checkpoint import Checkpoints
from rto_fast.training.saving import save_model
from tests.training.stand_ins import Log, Trainer


def content(folder):
    """{path: bytes} of all files."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def make(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("somebody's")
    return content(folder)


def begin(folder):
    """A run that can be resumed from its beginning."""
    folder.mkdir(exist_ok=True)
    with Checkpoints(folder, Log()).resumable():
        pass


def save_steps(folder, *steps):
    """A run in `folder` that kept the last checkpoint of SFT's steps."""
    checkpoints, trainer = Checkpoints(folder, Log(), keep=2), Trainer()
    for trainer.step_count in steps:
        checkpoints.save("sft", trainer)
    return checkpoints


@pytest.mark.parametrize("linked", ["checkpoints", "checkpoints/sft-00000001"])
def test_what_others_have_where_a_link_of_the_run_leads_stays(tmp_path, linked):
    """Also what has a checkpoint's name, through every end that removes checkpoints."""
    run, other = tmp_path / "run", tmp_path / "other"
    names = ["a.png", "photos/a.png", ".sft-00000002.part/state.json", "dpo-00000003/state.json", "rto-00000001/run"]
    if linked == "checkpoints":
        names += ["sft-00000001/state.json", "sft-00000001/state-00000.safetensors"]
    before = make(other, *names, "state.json")
    begin(run)
    (run / linked).parent.mkdir(exist_ok=True)
    (run / linked).symlink_to(other)
    resumed = Checkpoints(run, Log(), resume=True)
    assert content(other) == before
    trainer = Trainer()
    for trainer.step_count in (7, 8, 9):
        resumed.save("sft", trainer)
    again = Trainer()
    Checkpoints(run, Log(), resume=True).restore("sft", again)
    assert again.step_count == 9
    resumed.finish("sft")
    assert content(other) == before
    assert (run / linked).is_symlink() and len([*other.iterdir()]) == len({name.partition("/")[0] for name in before})


def test_two_runs_with_one_folder_of_checkpoints_do_not_take_each_others(tmp_path):
    shared, one, two = tmp_path / "shared", tmp_path / "one", tmp_path / "two"
    for folder in (shared, one, two):
        folder.mkdir()
    for run in (one, two):
        (run / "checkpoints").symlink_to(shared)
    save_steps(one, 3, 4)
    before = content(shared)
    with pytest.raises(CheckpointError, match="sft-00000004 was written by another run; make .* of this run alone"):
        save_steps(two, 4)
    save_steps(two, 5).finish("sft")
    assert content(shared) == before
    Checkpoints(one, Log(), resume=True).finish("sft")
    assert not content(shared)


def test_files_that_others_put_into_a_checkpoint_or_a_model_stay(tmp_path):
    checkpoints = save_steps(tmp_path, 1, 2)
    (tmp_path / "checkpoints" / "sft-00000002" / "notes.txt").write_text("mine")
    save_steps_again, trainer = Checkpoints(tmp_path, Log(), resume=True), Trainer()
    trainer.step_count = 2
    save_steps_again.save("sft", trainer)
    checkpoints.finish("sft")
    assert content(tmp_path / "checkpoints") == {"sft-00000002/notes.txt": b"mine"}
    model, tokenizer = build_model(0), build_tokenizer()
    for _ in range(2):
        save_model(Model(model), tokenizer, tmp_path / "rto_best")
        make(tmp_path / "rto_best", "notes.txt", "more/a.txt")
    save_model(Model(model), tokenizer, tmp_path / "rto_best")
    assert {"notes.txt", "more/a.txt", "model.safetensors"} < content(tmp_path / "rto_best").keys()
    assert not [path.name for path in tmp_path.glob(".*")]


@pytest.mark.parametrize("name", ["rto", ".rto.part", ".rto.old"])
def test_a_model_is_not_written_or_deleted_through_a_link(tmp_path, name):
    before = make(tmp_path / "other", "model.safetensors", "config.json", "notes.txt")
    (tmp_path / name).symlink_to(tmp_path / "other")
    for _ in range(2):
        save_model(Model(build_model(0)), build_tokenizer(), tmp_path / "rto")
    assert content(tmp_path / "other") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "rto"] and not (tmp_path / "rto").is_symlink()


@pytest.mark.parametrize("at", [("replace", 0), ("replace", 1), ("replace", 2), ("rmtree", 0)], ids=str)
def test_a_kill_while_a_model_is_replaced_costs_no_file_of_others(tmp_path, monkeypatch, at):
    model, tokenizer, (name, calls) = build_model(0), build_tokenizer(), at
    save_model(Model(model), tokenizer, tmp_path / "rto")
    make(tmp_path / "rto", "notes.txt")
    function, left = getattr(os if name == "replace" else shutil, name), iter(range(calls))

    def killed(*arguments, **options):
        if Path(arguments[0]).name in ("rto", ".rto.part", ".rto.old", "notes.txt") and next(left, None) is None:
            raise KeyboardInterrupt
        return function(*arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(f"{'os' if name == 'replace' else 'shutil'}.{name}", killed)
        save_model(Model(model), tokenizer, tmp_path / "rto")
    save_model(Model(model), tokenizer, tmp_path / "rto")
    assert (tmp_path / "rto" / "notes.txt").read_text() == "somebody's" and (tmp_path / "rto" / "config.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["rto"]


def test_a_log_that_the_run_has_not_written_is_not_cut_through_a_link(tmp_path):
    begin(tmp_path / "run")
    before = make(tmp_path / "other", "samples.jsonl")
    (tmp_path / "run" / "samples.jsonl").symlink_to(tmp_path / "other" / "samples.jsonl")
    Checkpoints(tmp_path / "run", Log(), resume=True)
    assert content(tmp_path / "other") == before and not (tmp_path / "run" / "samples.jsonl").exists()


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_what_a_log_shares_with_another_name_is_neither_cut_nor_added_to(tmp_path, link):
    """A log on another disk, or in a copy of the folder that was made of hard links."""
    (tmp_path / "run").mkdir()
    log = RunLog(tmp_path / "run")
    log.metrics("sft", 1, {"loss": 1.0})
    begin(tmp_path / "run")
    kept = (tmp_path / "run" / "metrics.jsonl").read_text()
    log.metrics("sft", 2, {"loss": 2.0})
    (tmp_path / "run" / "metrics.jsonl").rename(tmp_path / "elsewhere")
    link(tmp_path / "elsewhere", tmp_path / "run" / "metrics.jsonl")
    before = (tmp_path / "elsewhere").read_text()
    Checkpoints(tmp_path / "run", Log(), resume=True)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == kept
    log.metrics("sft", 2, {"loss": 2.0})
    assert (tmp_path / "elsewhere").read_text() == before and not (tmp_path / "run" / "metrics.jsonl").is_symlink()


def test_the_runs_memory_is_not_written_through_a_link(tmp_path):
    begin(tmp_path / "run")
    (tmp_path / "run" / "progress.json").rename(tmp_path / "elsewhere")
    (tmp_path / "run" / "progress.json").symlink_to(tmp_path / "elsewhere")
    before = (tmp_path / "elsewhere").read_text()
    Checkpoints(tmp_path / "run", Log(), resume=True).finish("sft")
    assert (tmp_path / "elsewhere").read_text() == before
    assert json.loads((tmp_path / "run" / "progress.json").read_text())["done"] == ["sft"]


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
@pytest.mark.parametrize("name", ["metrics.jsonl", "warnings.jsonl", "progress.json"])
def test_what_is_no_file_of_a_run_is_refused_by_name(tmp_path, limited, name, make):
    begin(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    make(tmp_path / name)
    with limited(10), pytest.raises(CheckpointError, match=f"{name}.*(is not a file|is a folder|is a pipe)"):
        Checkpoints(tmp_path, Log(), resume=True)


def test_a_pipe_instead_of_a_checkpoints_owner_is_damage(tmp_path, limited):
    save_steps(tmp_path, 1)
    owner = tmp_path / "checkpoints" / "sft-00000001" / "run"
    owner.unlink()
    os.mkfifo(owner)
    log = Log()
    with limited(10):
        resumed = Checkpoints(tmp_path, log, resume=True)
    assert resumed.points[-1]["checkpoint"] is None and any("run is not a file" in text for text in log.said)


@pytest.mark.parametrize("harm", ["flipped", "cut", "gone", "empty"])
def test_a_checkpoint_whose_name_of_the_run_is_damaged_is_still_this_runs(tmp_path, harm):
    save_steps(tmp_path, 1, 2)
    owner = tmp_path / "checkpoints" / "sft-00000002" / "run"
    text = owner.read_bytes()
    harmed = {"flipped": bytes([text[0] ^ 1]) + text[1:], "cut": text[:9], "empty": b"", "gone": b""}[harm]
    owner.write_bytes(harmed)
    if harm == "gone":
        owner.unlink()
    log, trainer = Log(), Trainer()
    resumed = Checkpoints(tmp_path, log, resume=True)
    assert any(
        "sft-00000002 is damaged (run is not as it was written); goes on from sft-00000001" in t for t in log.said
    )
    resumed.restore("sft", trainer)
    trainer.step_count += 1
    resumed.save("sft", trainer)
    resumed.finish("sft")
    assert not (tmp_path / "checkpoints").exists()


def test_what_a_kill_leaves_of_the_runs_own_files_is_removed(tmp_path):
    save_steps(tmp_path, 1)
    left = [tmp_path / f".{name}.4711.part" for name in ("progress.json", "results.json", "config.yaml", "mine.txt")]
    for path in left:
        path.write_text("{")
    Checkpoints(tmp_path, Log(), resume=True)
    assert [path.exists() for path in left] == [False, False, False, True]  # the last one is somebody else's
