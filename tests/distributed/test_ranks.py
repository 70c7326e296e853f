"""Whole runs of two real processes against one of a single process without DeepSpeed: same losses, samples and weights."""

import gc
import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.ranks import run_launched

SETTINGS = """
--threads 1 --data.limit 96 --data.held_out 8 --eval.prompts 4 --rollout.max_new_tokens 12
--sft.max_steps 3 --reward_model.max_steps 2 --dpo.max_steps 2 --dpo.batch_size 16 --rto.iterations 2
--rto.prompts_per_rollout 12 --rto.batch_size 6 --model.micro_batch_tokens 200
--optimizer.weight_decay 0.1
""".split()
LORA = ["--lora.rank", "2", "--sft.lr", "1e-2"]
BFLOAT16 = ["--model.dtype", "bfloat16", "--rto.enabled", "false"]
# Each stage's last step has one item, which one of the ranks is without.
REMAINDERS = """
--sft.max_steps null --sft.epochs 1 --sft.batch_size 19 --reward_model.max_steps null --reward_model.epochs 1
--reward_model.batch_size 29 --dpo.max_steps null --dpo.batch_size 29 --rto.iterations null --rto.prompts_per_rollout 29
--rto.batch_size 29 --rto.ppo_epochs 1
""".split()
# {name: (what it is compared with, options)}
RUNS = {
    "ZeRO 0": ("whole", ["--deepspeed.zero_stage", "0"]),
    "ZeRO 1, optimizer offloaded, activations checkpointed": (
        "whole",
        "--deepspeed.zero_stage 1 --deepspeed.offload optimizer --model.gradient_checkpointing true".split(),
    ),
    "ZeRO 2": ("whole", []),
    "ZeRO 3, frozen models sharded": ("whole", ["--deepspeed.zero_stage", "3", "--deepspeed.frozen", "sharded"]),
    "ZeRO 3, all offloaded": (
        "whole",
        """--deepspeed.zero_stage 3 --deepspeed.offload all
        --deepspeed.frozen offloaded""".split(),
    ),
    "LoRA, ZeRO 2": ("LoRA", LORA),
    "bfloat16, ZeRO 2": ("bfloat16", BFLOAT16),
    "last steps of one item, ZeRO 2": ("last steps", REMAINDERS),
    "last steps of one item, ZeRO 3": ("last steps", [*REMAINDERS, "--deepspeed.zero_stage", "3"]),
}
MODELS = ("sft", "reward_model", "dpo", "rto", "rto_critic")


# Stopped in the RTO stage, and gone on with by as many ranks (those without DeepSpeed's are resumed by one alone).
STOPPED = {"stopped LoRA": LORA, "stopped ZeRO 3": RUNS["ZeRO 3, frozen models sharded"][1], "stopped": []}
STEPS = 3 + 2 + 2 + 1


def run(options):
    from rto_fast.config import load_config
    from rto_fast.train import train
    from rto_fast.training.stop import StopRequest

    with StopRequest() as stop:
        train(load_config([*map(str, options)]), stop)


def run_until_stopped(options):
    """A run that gets SIGTERM after its first RTO iteration."""
    from rto_fast.errors import Interrupted
    from rto_fast.reporting.log import StageLog

    step, steps = StageLog.step, STEPS

    def counted(self, *arguments, **more):
        nonlocal steps
        steps -= 1
        if steps == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *arguments, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StageLog, "step", counted)
        with pytest.raises(Interrupted, match="stopped in rto after step 1"):
            run(options)


def assert_no_engine_is_left():
    """A sharded reward model is used to the end of its run; no other DeepSpeed engine outlives its stage."""
    gc.collect()
    alive = [item for item in gc.get_objects() if type(item).__name__ == "DeepSpeedEngine"]
    assert len(alive) <= 1, alive


def main(folder):
    """One of the ranks: all the runs in turn."""
    from rto_fast.reporting import finish
    from rto_fast.training.launch import joined

    finish.report_run = finish.publish_run = lambda *_: None  # slow, and not what is compared
    with joined():
        for number, (name, (_, options)) in enumerate(RUNS.items()):
            run([*SETTINGS, *options, "--output_dir", folder / name])
            if number == 0:
                assert_no_engine_is_left()
                gc.freeze()  # all is imported: the runs' own collections then take no second each
        assert_no_engine_is_left()
        for name, options in STOPPED.items():
            run_until_stopped([*SETTINGS, *options, "--output_dir", folder / name])
            if options:
                run(["--resume", folder / name])


def alone(options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rto_fast.reporting.finish.report_run", lambda *_: None)
        patch.setattr("rto_fast.reporting.finish.publish_run", lambda *_: None)
        run(options)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    run_launched(__file__, folder)
    for name, options in {"whole": [], "LoRA": LORA, "bfloat16": BFLOAT16, "last steps": REMAINDERS}.items():
        alone([*SETTINGS, *options, "--output_dir", folder / name])
    return folder


def records(folder):
    return [json.loads(line) for line in open(folder / "metrics.jsonl")]


def assert_same(found, expected, tolerance=2e-4):
    """Float32 sums in another order, and what Adam makes of them where a gradient is nearly 0."""
    for name in MODELS:
        ours, theirs = (load_file(folder / name / "model.safetensors") for folder in (found, expected))
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert (ours[key] - value).norm() <= tolerance * value.norm() + 1e-6, (name, key)
    ours, theirs = records(found), records(expected)
    assert [(r["stage"], r["step"]) for r in ours] == [(r["stage"], r["step"]) for r in theirs]
    for record, other in zip(ours, theirs):
        for key in ("loss", "grad_norm", "score", "dpo_reward", "length", "policy_loss", "value_loss", "tokens"):
            if key in other:
                assert record[key] == pytest.approx(other[key], rel=1e-3, abs=1e-5), (record["stage"], key)
    ours, theirs = ((folder / "samples.jsonl").read_text() for folder in (found, expected))
    assert ours == theirs  # the same seed draws the same responses on any number of ranks


def test_bfloat16_weights_have_float32_masters_on_two_ranks_too(runs):
    """Rounded gradients differ from those of one rank; an optimizer without masters would not move the weights at all."""
    two, one = runs / "bfloat16, ZeRO 2", runs / "bfloat16"
    for name in ("sft", "dpo"):
        ours, theirs = (load_file(run / name / "model.safetensors") for run in (two, one))
        for key, value in theirs.items():
            assert (ours[key].float() - value.float()).norm() <= 1e-2 * value.float().norm()
    losses, expected = ([r["loss"] for r in records(run) if "loss" in r] for run in (two, one))
    assert losses == pytest.approx(expected, rel=2e-2)


@pytest.mark.parametrize("name", [name for name in RUNS if not name.startswith("bfloat16")])
def test_two_ranks_train_what_one_does(name, runs):
    assert_same(runs / name, runs / RUNS[name][0])


def test_the_last_steps_have_one_item(runs):
    found = records(runs / "last steps of one item, ZeRO 2")
    last = {r["stage"]: r for r in found if "tokens" in r}
    steps = {"sft": 6, "reward_model": 4, "dpo": 4, "rto": 4}  # of 96 = 5 × 19 + 1 and 88 = 3 × 29 + 1 items
    assert {stage: record["step"] for stage, record in last.items()} == steps
    assert all(record["imbalance"] == 2 for record in last.values())  # all the work is one rank's


def test_ranks_are_given_alike_work(runs):
    for record in records(runs / "ZeRO 2"):
        if record["stage"] in ("sft", "rto"):
            assert 1.0 <= record["imbalance"] < 1.25
    assert all("imbalance" not in record for record in records(runs / "whole"))


def test_a_run_of_two_ranks_goes_on_with_one(runs):
    alone(["--resume", runs / "stopped"])
    assert_same(runs / "stopped", runs / "whole")


@pytest.mark.parametrize(
    "name, whole", [("stopped LoRA", "LoRA, ZeRO 2"), ("stopped ZeRO 3", "ZeRO 3, frozen models sharded")]
)
def test_a_run_of_two_ranks_goes_on_with_two_to_the_bit(name, whole, runs):
    for model in MODELS:
        ours, theirs = (load_file(runs / run / model / "model.safetensors") for run in (name, whole))
        assert all(torch.equal(ours[key], value) for key, value in theirs.items()), model


if __name__ == "__main__":
    main(Path(sys.argv[1]))
