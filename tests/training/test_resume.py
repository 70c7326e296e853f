"""A run that is killed at any step of any stage and resumed ends as one that was not, to the last bit."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rto_fast.config import load_config
from rto_fast.errors import ConfigError

OPTIONS = """
--threads 1 --data.limit 64 --data.held_out 8 --eval.prompts 16 --rollout.max_new_tokens 12
--sft.batch_size 40 --reward_model.max_steps 4 --dpo.max_steps 4 --dpo.batch_size 8 --rto.iterations null
--rto.prompts_per_rollout 16 --rto.batch_size 8 --eval.every 2 --eval.keep_best true
""".split()
EVERY_STEP = ["--save_every=1"]
# A run without its report, which takes most of its time.
UNREPORTED = """
from rto_fast.reporting import finish
from rto_fast.train import command
finish.report_run = lambda *_: None
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


def test_the_tokens_of_a_pass_are_kept_unless_the_run_is_given_others(tmp_path):
    folder, killer = tmp_path / "run", KILLER.format(signal=int(signal.SIGKILL))
    assert run(14, *OPTIONS, *EVERY_STEP, "--output_dir", folder, code=killer).returncode == -signal.SIGKILL
    path = folder / "progress.json"
    begun = json.loads(path.read_text())
    assert {(b["training"], b["scoring"], b["bound"]) for b in begun["budgets"].values()} == {(16384, 16384, None)}
    # As a machine with less memory would have chosen.
    path.write_text(json.dumps(begun | {"budgets": {"rto": {"training": 200, "scoring": 300, "bound": None}}}))
    process = run(1, "--resume", folder, code=killer)
    assert "micro-batches of up to 16,384 (sft, reward_model, dpo) or 200 (rto) tokens" in process.stdout
    assert run("--resume", folder, "--model.micro_batch_tokens=100").returncode == 0
    numbers = [r["micro_batch_tokens"] for r in records(folder) if "micro_batch_tokens" in r]
    assert numbers == [16384, 16384, 200, 100]


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


def test_resume_is_an_option_like_others(tmp_path):
    with pytest.raises(ConfigError, match="no run to continue"):
        load_config(["--resume", str(tmp_path)])
    (tmp_path / "progress.json").write_text("{}")
    (tmp_path / "config.yaml").write_text(
        "seed: 5\noutput_dir: elsewhere\nmodel: {path: embedded}\ndata: {preferences: embedded:preferences}\n"
    )
    config = load_config(["--resume", str(tmp_path), "--save_every", "3"])
    assert (config.seed, config.output_dir, config.resume, config.save_every) == (
        5,
        str(tmp_path),
        str(tmp_path),
        3,
    )
