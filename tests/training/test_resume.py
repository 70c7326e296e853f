"""A run that is killed at any step of any stage and resumed ends as one that was not, to the last bit."""

import functools
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rto_fast.config import load_config
from rto_fast.data.world import build_model, build_tokenizer
from rto_fast.errors import CheckpointError, ConfigError
from rto_fast.models.model import Model
from rto_fast.reporting.log import RunLog
from rto_fast.training import ranks, state_files
from rto_fast.training.checkpoint import Checkpoints
from rto_fast.training.order import ShuffledIndices
from rto_fast.training.saving import save_model
from rto_fast.training.state_files import find_damage, load_state, save_state
from rto_fast.training.supervised import SupervisedTrainer

OPTIONS = [
    "--threads",
    "1",
    "--data.limit",
    "64",
    "--data.held_out",
    "8",
    "--eval.prompts",
    "16",
    "--rollout.max_new_tokens",
    "12",
    "--sft.batch_size",
    "40",
    "--reward_model.max_steps",
    "4",
    "--dpo.max_steps",
    "4",
    "--dpo.batch_size",
    "8",
    "--rto.iterations",
    "null",
    "--rto.prompts_per_rollout",
    "16",
    "--rto.batch_size",
    "8",
    "--eval.every",
    "2",
    "--eval.keep_best",
    "true",
]
EVERY_STEP = [f"--{stage}.save_every=1" for stage in ("sft", "reward_model", "dpo", "rto")]
# A run without its report, which takes most of its time.
UNREPORTED = """
from rto_fast.run import Run
from rto_fast.train import command
Run.report = lambda self: None
"""
# Kills the process with SIGKILL after so many steps of all stages together; the run's own code is unchanged.
KILLER = """
import os, signal, sys
from rto_fast.reporting.log import StageLog
steps, step = int(sys.argv.pop(1)), StageLog.step
def counted(self, *args, **options):
    global steps
    if not steps:
        os.kill(os.getpid(), {signal})
    steps -= 1
    return step(self, *args, **options)
StageLog.step = counted
"""


def run(*arguments, code=""):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, "-c", f"{UNREPORTED}{code}command()", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=150,
    )


def weights(folder):
    return {path.parent.name: load_file(path) for path in sorted(Path(folder).glob("*/model.safetensors"))}


def records(folder, name="metrics.jsonl"):
    """Without what is measured in seconds."""
    lines = [json.loads(line) for line in (Path(folder) / name).read_text().splitlines()]
    return [{k: v for k, v in line.items() if "second" not in k} for line in lines]


def assert_same_run(found, expected):
    ours, theirs = weights(found), weights(expected)
    assert ours.keys() == theirs.keys() >= {"sft", "reward_model", "dpo", "rto", "rto_critic", "rto_best"}
    for name, tensors in theirs.items():
        assert all(torch.equal(ours[name][key], value) for key, value in tensors.items()), name
    for name in ("metrics.jsonl", "samples.jsonl", "warnings.jsonl"):
        assert records(found, name) == records(expected, name)
    assert (Path(found) / "results.json").read_text() == (Path(expected) / "results.json").read_text()
    assert not (Path(found) / "checkpoints").exists()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "whole"
    process = run(*OPTIONS, "--output_dir", folder)
    assert process.returncode == 0, process.stderr
    return folder


# Together these kill in every stage: SFT has steps 1–4, the reward model 5–8, DPO 9–12, RTO 13–16. The last steps of SFT
# (8 of 128 examples, in steps of 40) and of RTO (10 of 58 prompts, in rollouts of 16) are smaller than the others.
@pytest.mark.parametrize("steps", [(2, 5), (6,), (10, 4)], ids=str)
def test_killed_and_resumed_is_the_same_run(steps, uninterrupted, tmp_path):
    folder, killer = tmp_path / "killed", KILLER.format(signal=int(signal.SIGKILL))
    process = run(steps[0], *OPTIONS, *EVERY_STEP, "--output_dir", folder, code=killer)
    assert process.returncode == -signal.SIGKILL
    for more in steps[1:]:
        assert run(more, "--resume", folder, code=killer).returncode == -signal.SIGKILL
    process = run("--resume", folder)
    assert process.returncode == 0, process.stderr
    assert_same_run(folder, uninterrupted)


def test_ctrl_c_saves_and_says_how_to_go_on(uninterrupted, tmp_path):
    folder = tmp_path / "stopped"
    process = run(9, *OPTIONS, "--output_dir", folder, code=KILLER.format(signal=int(signal.SIGINT)))
    assert process.returncode == 130
    command = f"python -m rto_fast.train --resume {folder}"
    assert f"rto_fast: stopped in dpo after step 2; go on with: {command}" in process.stderr
    assert "Traceback" not in process.stderr
    process = run(3, "--resume", folder, code=KILLER.format(signal=int(signal.SIGTERM)))
    assert process.returncode == 0 and "stopped in rto after step 2" in process.stderr
    assert run("--resume", folder).returncode == 0
    assert_same_run(folder, uninterrupted)


def test_every_stage_goes_on_with_other_data(tmp_path):
    """Killed in each stage, and gone on with fewer or more examples than that session had, or with responses cut shorter."""
    folder, killer = tmp_path / "run", KILLER.format(signal=int(signal.SIGKILL))
    sizes = ["--sft.batch_size=32", "--rto.prompts_per_rollout=20"]
    sizes += [f"--{stage}.max_steps=null" for stage in ("reward_model", "dpo")]
    options = [*OPTIONS, *sizes, *EVERY_STEP]
    assert run(3, *options, "--output_dir", folder, code=killer).returncode == -signal.SIGKILL
    # Steps of the session: none of SFT and 3 of the reward model; 3 and 3 of DPO; 5 and 2 of RTO; 1.
    sessions = [
        (3, "--data.limit=40", "sft, step 3", "40 items, it had 64", 0),
        (6, "--data.limit=64", "reward_model, step 3", "58 items, it had 36", 3),
        (7, "--data.max_response_tokens=20", "dpo, step 3", "its items are not those of the checkpoint", 5),
        (99, "--data.limit=60", "rto, step 2", "54 items, it had 58", 1),
    ]
    for steps, change, place, what, left in sessions:
        process = run(steps, "--resume", folder, change, code=killer)
        assert process.returncode == (0 if steps == 99 else -signal.SIGKILL), process.stderr
        (line,) = [line for line in process.stdout.splitlines() if "the data has changed" in line]
        assert line.startswith(f"warning: {place}: the data has changed: {what}") and f"steps to go: {left})" in line
    recorded = [json.loads(line) for line in open(folder / "warnings.jsonl")]
    assert [r["stage"] for r in recorded if r["name"] == "data"] == ["sft", "reward_model", "dpo", "rto"]


# What others have in the run's folder


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


def test_a_rank_that_comes_later_finds_what_the_main_one_has_begun(tmp_path, monkeypatch):
    """Each rank of a new run has drawn a name for it; the main one's is the run's."""
    begun = tmp_path / ".sft-00000001.part"
    begun.mkdir()
    (begun / "run").write_text("a" * 16)
    for name, value in {"is_main": False, "rank": 1, "world_size": 2, "barrier": None}.items():
        monkeypatch.setattr(ranks, name, lambda value=value: value)
    save_state(tmp_path / "sft-00000001", STATE, "b" * 16)
    assert (begun / "run").read_text() == "a" * 16 and (begun / "state-00001.safetensors").is_file()


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


def test_a_digest_that_somebody_has_blown_up_is_damage_and_takes_no_memory(tmp_path):
    save_state(tmp_path / "state", STATE)
    with open(tmp_path / "state" / "state.json.sha256", "r+b") as file:
        file.truncate(2**40)
    assert find_damage(tmp_path / "state") == "state.json is not as it was written"


# The files


STATE = {
    "a": torch.arange(6.0).view(2, 3).t(),
    "b": [torch.zeros(0), 3, None, ("x", 1.5)],
    "adam": {0: {"step": torch.tensor(2)}, 1: {}},
    "half": torch.ones(3, dtype=torch.bfloat16),
}


def assert_state(found):
    assert torch.equal(found["a"], STATE["a"]) and found["half"].dtype == torch.bfloat16
    assert found["b"][1:] == STATE["b"][1:] and found["adam"].keys() == {0, 1}
    assert torch.equal(found["adam"][0]["step"], torch.tensor(2))


def test_a_state_comes_back_as_it_was(tmp_path):
    shared = torch.arange(8.0)
    save_state(tmp_path / "state", STATE | {"views": [shared[:4], shared[2:]]})
    found = load_state(tmp_path / "state")
    assert_state(found)
    assert torch.equal(found["views"][1], shared[2:])
    with pytest.raises(TypeError, match="cannot hold a set"):
        save_state(tmp_path / "odd", {"x": {1}})


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    save_state(tmp_path / "state", STATE)

    def full(*_):
        raise OSError(28, "No space left on device")

    for name in ("save_file", "sync"):
        with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="No space left on device"):
            patch.setattr(state_files, name, full)
            save_state(tmp_path / "state", {"other": 1})
        assert_state(load_state(tmp_path / "state"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state"]


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:50]),
    "gone": lambda path: path.unlink(),
    "a bit": flip_a_bit,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["state-00000.safetensors", "state.json"])
def test_damage_to_a_state_is_found(tmp_path, name, damage):
    save_state(tmp_path / "state", STATE)
    assert find_damage(tmp_path / "state") is None
    DAMAGES[damage](tmp_path / "state" / name)
    assert find_damage(tmp_path / "state")
    if damage != "a bit":
        with pytest.raises(CheckpointError, match="not a checkpoint that can be read"):
            load_state(tmp_path / "state")


POINT = {"checkpoint": None, "logs": {}, "seconds": 1.0, "best": None}
NASTY = [None, True, -1, 10**30, 1e400, float("nan"), "text", "../../other", [], [[]], {}, {"a": 1}]
PROGRESS = {
    "empty": b"",
    "no UTF-8": b"\xff",
    "half": b'{"done": [',
    "deep": b"[" * 100_000,
    "digits": b"9" * 6000,
    "large": b'{"done": []}' + b" " * 2**25,
    "a list": b"[]",
    "nothing": b"{}",
}
PROGRESS |= {
    f"{key}: {value!r}": json.dumps({"run": "0" * 16, "done": [], "points": [POINT]} | {key: value}).encode()
    for key in ("run", "done", "points")
    for value in [*NASTY, [None], ["other"], [POINT | {"checkpoint": "sft-00000001"}], [POINT, POINT]]
    if not (key == "done" and value == [])
}
PROGRESS |= {
    f"point, {key}: {value!r}": json.dumps({"done": [], "points": [POINT | {key: value}]}).encode()
    for key in POINT
    for value in [*NASTY, {"metrics.jsonl": -1}, {"metrics.jsonl": 1.5}, {"other": 1}]
    if not (key in ("checkpoint", "best") and value is None or key == "logs" and value == {})
    and not (key == "best" and value == -1)
}


@pytest.mark.parametrize("damage", PROGRESS)
def test_a_damaged_memory_of_the_run_is_one_line(tmp_path, damage):
    (tmp_path / "progress.json").write_bytes(PROGRESS[damage])
    with pytest.raises(
        CheckpointError, match=r"^--resume: .*progress.json cannot be read \(.*\): nothing to go on from$"
    ):
        Checkpoints(tmp_path, Log(), resume=True)


STATES = {
    "files": [{"files": value, "state": {"dict": []}} for value in (10**18, 0, *NASTY)],
    "state": [
        {"files": 1, "state": v}
        for v in (
            {"tensor": "9"},
            {"tensor": []},
            {"dict": 1},
            {"dict": [1]},
            {"odd": []},
            {"dict": [[[], 1]]},
            {"a": 1, "b": 2},
            {},
            {"list": "abc"},
        )
    ],
    "all": [[], 1, "text", {}],
}


@pytest.mark.parametrize("kind", STATES)
def test_a_state_that_nobody_wrote_is_one_line(tmp_path, kind):
    """With the right digests: a disk that fails does not make these, and nothing hangs or ends in a traceback."""
    for value in STATES[kind]:
        save_state(tmp_path / "state", {"a": torch.zeros(2)})
        text = json.dumps(value)
        (tmp_path / "state" / "state.json").write_text(text)
        (tmp_path / "state" / "state.json.sha256").write_text(hashlib.sha256(text.encode()).hexdigest())
        started = time.perf_counter()
        if kind != "state":
            assert find_damage(tmp_path / "state"), value
        with pytest.raises(CheckpointError, match="not a checkpoint that can be read"):
            load_state(tmp_path / "state")
        assert time.perf_counter() - started < 5


def test_a_file_of_a_state_that_never_ends_is_damage(tmp_path):
    save_state(tmp_path / "state", STATE)
    (tmp_path / "state" / "state-00000.safetensors").unlink()
    os.mkfifo(tmp_path / "state" / "state-00000.safetensors")
    assert find_damage(tmp_path / "state") == "state-00000.safetensors is not a file"


def trainer():
    """A stage of the real trainer on a model of one matrix."""
    model = torch.nn.Linear(3, 2, bias=False)
    config = load_config(["--data.cache_dir", "null", "--sft.batch_size", "2", "--sft.epochs", "1"])

    def loss(run, chosen):
        return model(torch.ones(3)).square().sum(), {}

    return SupervisedTrainer(Model(model), config.sft, [5] * 20, loss, config, print, "data")


def places(state, before=()):
    """The keys that lead to each value of a state."""
    for key, value in state.items():
        yield from places(value, (*before, key)) if isinstance(value, dict) else [(*before, key)]


TENSORS = [torch.full((2, 3), torch.nan), torch.zeros(3, 2), torch.zeros(1), torch.zeros(2, 3, dtype=torch.int64)]


def replaced(state, keys, value):
    functools.reduce(lambda part, key: part[key], keys[:-1], state)[keys[-1]] = value
    return state


def test_no_value_of_a_state_can_be_another(tmp_path):
    """Each value of a stage's state, replaced by each that the trainer cannot have written."""
    from rto_fast.training.state_match import find_misfit

    whole = trainer()
    for _ in range(3):
        whole.step()
    found = list(places(whole.state_dict()))
    assert len(found) > 10
    for keys in found:
        own = functools.reduce(lambda part, key: part[key], keys, whole.state_dict())
        for value in [None, -1, 10**30, float("inf"), float("nan"), [], {}, 7, "text", *TENSORS, torch.tensor(1.0)]:
            could_be = value == 7 if isinstance(own, int) else isinstance(own, str) and isinstance(value, str)
            misfit = find_misfit(replaced(whole.state_dict(), keys, value), trainer().state_dict())
            assert could_be if misfit is None else misfit.startswith(f"{'.'.join(keys)}: "), (keys, value)
    assert find_misfit(whole.state_dict(), trainer().state_dict()) is None


@pytest.mark.parametrize(
    "keys, value, said",
    [
        ("order", [], "order: expected names and values, got list"),
        ("order.position", float("nan"), "order.position: expected a count, got nan"),
        ("optimizer.steps", "text", "optimizer.steps: expected a count, got 'text'"),
        ("optimizer.exp_avg.weight", TENSORS[1], "optimizer.exp_avg.weight: expected shape (2, 3), got (3, 2)"),
        ("accumulator.tokens", 0, "accumulator.tokens: expected 1 to 16384, got 0"),
        ("order.epoch", 2**62, "Overflow"),
    ],
)
def test_a_checkpoint_with_such_a_value_is_one_line(tmp_path, keys, value, said):
    whole = trainer()
    for _ in range(3):
        whole.step()
    state = replaced(whole.state_dict(), keys.split("."), value)
    whole.state_dict = lambda: state
    Checkpoints(tmp_path, Log()).save("sft", whole)
    with pytest.raises(CheckpointError) as refused:
        Checkpoints(tmp_path, Log(), resume=True).restore("sft", trainer())
    assert f"sft-00000003: not a checkpoint of this run's sft stage ({said}" in str(refused.value)


class Trainer:
    """Steps of ten items."""

    def __init__(self, size=100, data="one"):
        self.step_count, self.steps = 0, 10
        self.order = ShuffledIndices(size, 0, epochs=1, fingerprint=data)

    def state_dict(self):
        return {"steps": self.step_count, "order": self.order.state_dict()}

    def load_state_dict(self, state):
        self.step_count = state["steps"]
        self.order.load_state_dict(state["order"])
        self.steps = self.step_count + self.order.remaining // 10


class Log:
    start = 0.0

    def __init__(self):
        self.said = []

    def say(self, text):
        self.said.append(text)

    def warning(self, stage, step, name, what, remedy):
        self.said.append(f"{name}: {stage}, step {step}: {what}; {remedy}")

    def seconds(self):
        return time.perf_counter() - self.start


def test_so_many_checkpoints_are_kept_as_asked(tmp_path):
    checkpoints, trainer = Checkpoints(tmp_path, Log(), keep=2), Trainer()
    for trainer.step_count in range(1, 6):
        checkpoints.save("sft", trainer)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["sft-00000004", "sft-00000005"]
    again, other = Trainer(), Trainer()
    resumed = Checkpoints(tmp_path, Log(), keep=2, resume=True)
    resumed.restore("sft", again)
    resumed.restore("dpo", other)
    assert (again.step_count, other.step_count) == (5, 0)
    with pytest.raises(CheckpointError, match="nothing to go on from"):
        Checkpoints(tmp_path / "nowhere", Log(), resume=True)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path):
    checkpoints, trainer, log = Checkpoints(tmp_path, Log(), keep=2), Trainer(), Log()
    for trainer.step_count in range(1, 4):
        (tmp_path / "metrics.jsonl").write_text("line\n" * trainer.step_count)
        checkpoints.save("sft", trainer)
    for step, then in ((3, 2), (2, 0)):
        flip_a_bit(tmp_path / "checkpoints" / f"sft-{step:08d}" / "state-00000.safetensors")
        again = Trainer()
        Checkpoints(tmp_path, log, resume=True).restore("sft", again)
        assert again.step_count == then and (tmp_path / "metrics.jsonl").read_text() == "line\n" * then
    assert log.said[0].startswith(
        "checkpoint sft-00000003 is damaged (state-00000.safetensors is not as it was written)"
    )
    assert any("goes on from the beginning of the stage" in text for text in log.said)


def test_what_a_kill_left_of_checkpoints_is_removed(tmp_path):
    checkpoints = Checkpoints(tmp_path, Log())
    checkpoints.save("sft", Trainer())
    left = [tmp_path / "checkpoints" / name for name in (".sft-00000001.part", "dpo-00000003")]
    for path in left:
        path.mkdir()
    Checkpoints(tmp_path, Log(), resume=True)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["sft-00000000"]
    checkpoints.finish("sft")
    left[1].mkdir(parents=True)  # killed before all of it was gone
    Checkpoints(tmp_path, Log(), resume=True)
    assert not (tmp_path / "checkpoints").exists()


def test_what_followed_a_step_and_failed_is_done_by_the_resumed_run(tmp_path):
    Checkpoints(tmp_path, Log()).save("sft", Trainer(), unfinished={})
    resumed = Checkpoints(tmp_path, Log(), resume=True)
    assert resumed.restore("sft", Trainer()) and not resumed.restore("dpo", Trainer())
    resumed.save("sft", Trainer())
    assert not Checkpoints(tmp_path, Log(), resume=True).restore("sft", Trainer())


def goes_on(folder, trainer):
    """What is said when `trainer` goes on from the checkpoint in `folder`."""
    log = Log()
    Checkpoints(folder, log, resume=True).restore("sft", trainer)
    return log.said


def test_a_checkpoint_tells_that_the_data_is_another(tmp_path):
    trainer = Trainer()
    trainer.order.take(30)
    trainer.step_count = 3
    Checkpoints(tmp_path, Log()).save("sft", trainer)
    begins = "sft: goes on after step 3"
    assert goes_on(tmp_path, Trainer()) == [begins]
    assert goes_on(tmp_path, Trainer(size=50, data="other")) == [
        begins,
        "data: sft, step 3: the data has changed: 50 items, it had 100 when the checkpoint was made; the stage goes on as "
        "if this had been its data from the beginning (trained on 30 examples, steps to go: 2); for the run as it was "
        "begun, give it its own data",
    ]
    (said,) = goes_on(tmp_path, Trainer(size=20, data="other"))[1:]
    assert "20 items, it had 100 when" in said and "steps to go: 0)" in said
    (said,) = goes_on(tmp_path, Trainer(data="other"))[1:]
    assert "its items are not those of the checkpoint, or in another order" in said and "steps to go: 7)" in said


def test_a_checkpoint_of_an_older_version_is_taken_with_a_line(tmp_path):
    trainer = Trainer()
    state = {"steps": 3, "order": {"epoch": 0, "position": 30}}
    trainer.state_dict = lambda: state
    Checkpoints(tmp_path, Log()).save("sft", trainer)
    line = "sft: the checkpoint's version did not record its data; it is taken to be the same"
    assert goes_on(tmp_path, Trainer()) == ["sft: goes on after step 3", line]
    assert "20 items, which is fewer than when the checkpoint was made" in goes_on(tmp_path, Trainer(size=20))[1]


def test_logs_are_cut_to_what_they_were_at_the_checkpoint(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("one\n")
    Checkpoints(tmp_path, Log()).save("sft", Trainer())
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write("two\nthr")
    (tmp_path / "samples.jsonl").write_text("late\n")
    Checkpoints(tmp_path, Log(), resume=True)
    assert (tmp_path / "metrics.jsonl").read_text() == "one\n" and (tmp_path / "samples.jsonl").read_text() == ""


def test_resume_is_an_option_like_others(tmp_path):
    with pytest.raises(ConfigError, match="no run to go on with"):
        load_config(["--resume", str(tmp_path)])
    (tmp_path / "progress.json").write_text("{}")
    (tmp_path / "config.yaml").write_text(
        "seed: 5\noutput_dir: elsewhere\nmodel: {path: embedded}\ndata: {preferences: embedded:preferences}\n"
    )
    config = load_config(["--resume", str(tmp_path), "--rto.save_every", "3"])
    assert (config.seed, config.output_dir, config.resume, config.rto.save_every) == (
        5,
        str(tmp_path),
        str(tmp_path),
        3,
    )
