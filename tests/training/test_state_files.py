"""A checkpoint's files: what was saved is read again, and damage or a value that nobody saved is found."""

import functools
import hashlib
import json
import os
import time

import pytest
import torch

from rto_fast.config import load_config
from rto_fast.errors import CheckpointError
from rto_fast.models.model import Model
from rto_fast.stages import SupervisedTrainer
from rto_fast.training import ranks, state_files
from rto_fast.training.checkpoint import Checkpoints
from rto_fast.training.order import ShuffledIndices
from rto_fast.training.state_files import find_damage, load_state, save_state
from tests.training.stand_ins import STATE, Log, flip_a_bit


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


def test_a_digest_that_somebody_has_blown_up_is_damage_and_takes_no_memory(tmp_path):
    save_state(tmp_path / "state", STATE)
    with open(tmp_path / "state" / "state.json.sha256", "r+b") as file:
        file.truncate(2**40)
    assert find_damage(tmp_path / "state") == "state.json is not as it was written"


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


def test_a_rank_that_comes_later_finds_what_the_main_one_has_begun(tmp_path, monkeypatch):
    """Each rank of a new run has drawn a name for it; the main one's is the run's."""
    begun = tmp_path / ".sft-00000001.part"
    begun.mkdir()
    (begun / "run").write_text("a" * 16)
    for name, value in {"is_main": False, "rank": 1, "world_size": 2, "barrier": None}.items():
        monkeypatch.setattr(ranks, name, lambda value=value: value)
    save_state(tmp_path / "sft-00000001", STATE, "b" * 16)
    assert (begun / "run").read_text() == "a" * 16 and (begun / "state-00001.safetensors").is_file()


def trainer():
    """A stage of the real trainer on a model of one matrix."""
    model = torch.nn.Linear(3, 2, bias=False)
    config = load_config(["--data.cache_dir", "null", "--sft.batch_size", "2", "--sft.epochs", "1"])

    def loss(module, chosen):
        return module(torch.ones(3)).square().sum(), {}

    order = ShuffledIndices(20, config.seed, config.sft.epochs, "data")
    return SupervisedTrainer(
        Model(model), config.sft, order, [5] * 20, lambda rows, items: (loss, rows), config, 16384, print
    )


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
    from rto_fast.training.checkpoint_checks import find_misfit

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
