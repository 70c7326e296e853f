"""Checkpoints of a run: how many are kept, which one a stage goes on from, and what a kill leaves of them."""

import pytest

from rto_fast.errors import CheckpointError
from rto_fast.training.checkpoint import Checkpoints
from tests.training.stand_ins import Log, Trainer, flip_a_bit


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
