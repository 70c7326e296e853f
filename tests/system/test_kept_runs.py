"""Faults on the way of a run through the command line: one line that says how to go on, and the run is kept."""

import asyncio
import contextlib
import json
import os
import resource
import shlex
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rto_fast import train
from rto_fast.config import load_config
from rto_fast.data.tokenizing import Prompt
from rto_fast.errors import ConfigError, RewardError
from rto_fast.models.forward import causal_logps
from rto_fast.rewards import Completion, RewardFunction
from rto_fast.stages import SupervisedTrainer
from rto_fast.system.command_line import as_command
from rto_fast.training.optimizer import ScheduledOptimizer
from tests.system.faulty_inputs import LENGTHS, RTO, SFT, how_to_go_on

pytestmark = pytest.mark.usefixtures("inside")


@pytest.mark.parametrize(
    "function, message",
    [
        ("raises", "KeyError: 'colour' ({cwd}/faulty_rewards.py:9)"),
        ("ends", "SystemExit: 0 ({cwd}/faulty_rewards.py:10)"),
        ("cancelled", "CancelledError ({cwd}/faulty_rewards.py:12)"),
        ("hangs", "no scores for 8 responses within 0.2 s (reward_model.timeout)"),
        ("nan", "score nan for the response '"),
        ("short", "returned (1,) scores for 8 responses"),
    ],
)
def test_reward_functions(refused, tmp_path, function, message):
    path, started = f"faulty_rewards:{function}", time.perf_counter()
    options = ["--reward_model.function", path, "--reward_model.timeout", "0.2", "--rto.normalize_scores", "false"]
    line = refused(*RTO, *options)
    assert f"rto_fast: {path}: {message.format(cwd=os.getcwd())}" in line
    assert line.endswith(how_to_go_on(tmp_path / "out")) and time.perf_counter() - started < 20


@pytest.mark.parametrize("timeout", [None, 9.0], ids=["here", "in a thread"])
@pytest.mark.parametrize("function", ["ends", "cancelled", "interrupted", "closed", "greedy"])
def test_no_end_of_a_reward_function_is_the_runs(function, timeout):
    reward = RewardFunction(f"faulty_rewards:{function}", "reward_model.function", timeout=timeout)
    kind = {
        "ends": "SystemExit",
        "cancelled": "CancelledError",
        "interrupted": "KeyboardInterrupt",
        "closed": "GeneratorExit",
        "greedy": "MemoryError",
    }[function]
    with pytest.raises(RewardError, match=f"faulty_rewards:{function}: {kind}.* .*faulty_rewards.py"):
        reward([Completion(Prompt([1], "a", {}, "", None), [1], "b", True)])


def test_a_reward_is_found_in_the_present_folder_by_any_command(tmp_path, monkeypatch):
    """The script `rto-fast` has its own folder on the path of modules, and not the present one."""
    (tmp_path / "rewards_from_here.py").write_text("def score(prompts, responses): return [1.0] * len(responses)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path and path != str(tmp_path)])
    monkeypatch.setattr(sys, "argv", ["rto-fast"])
    found = []
    with as_command():
        found.append(RewardFunction("rewards_from_here:score", "reward_model.function"))
    assert found


def test_a_module_of_rewards_that_ends_is_refused(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    for kind in ("SystemExit", "GeneratorExit", "KeyboardInterrupt"):
        (tmp_path / f"ends_by_{kind}.py").write_text(f"raise {kind}")
        with pytest.raises(ConfigError, match=f"reward_model.function: cannot import .* {kind}"):
            RewardFunction(f"ends_by_{kind}:f", "reward_model.function")


ENDS = {
    SystemExit(0): "the run was ended by SystemExit: 0",
    GeneratorExit(): "the run was ended by GeneratorExit",
    asyncio.CancelledError("late"): "the run was ended by CancelledError: late",
    MemoryError(): "sft: out of memory: of the CPU. Lower model.micro_batch_tokens",
}


@pytest.mark.parametrize("end", ENDS, ids=lambda end: type(end).__name__)
def test_whatever_ends_a_step_the_run_says_what_is_lost_and_how_to_go_on(refused, tmp_path, monkeypatch, end):
    def step(self):
        raise end

    monkeypatch.setattr(SupervisedTrainer, "step", step)
    line = refused(*SFT)
    assert line.startswith(f"rto_fast: {ENDS[end]}")
    assert "; what sft trained after its last checkpoint is not saved: a step was under way; " in line
    assert line.endswith(f"go on with: python -m rto_fast.train --resume {tmp_path / 'out'}\n")


def test_a_traceback_ends_with_how_to_go_on(start, tmp_path, monkeypatch):
    def step(self):
        raise RuntimeError("a fault of the program")

    monkeypatch.setattr(SupervisedTrainer, "step", step)
    with pytest.raises(RuntimeError) as fault:
        start(*SFT, "--output_dir", tmp_path / "out")
    assert fault.value.__notes__[-1] == f"go on with: python -m rto_fast.train --resume {tmp_path / 'out'}"


def test_ctrl_c_that_a_library_has_taken_over_ends_as_ours_does(start, tmp_path, monkeypatch, capsys):
    def step(self):
        raise KeyboardInterrupt  # as its handler does

    monkeypatch.setattr(SupervisedTrainer, "step", step)
    monkeypatch.setattr("rto_fast.system.command_line._end_at_next_signal", lambda: None)
    with pytest.raises(SystemExit) as end:
        start(*SFT, "--output_dir", tmp_path / "out")
    said = capsys.readouterr().err
    assert end.value.code == 130 and said.startswith(
        "rto_fast: stopped; what sft trained after its last checkpoint is not"
    )
    assert (
        said.endswith(f"go on with: python -m rto_fast.train --resume {tmp_path / 'out'}\n") and said.count("\n") == 1
    )


def test_the_line_that_says_how_to_go_on_is_one_for_a_shell(refused, folder):
    odd = "-it's  a $HOME run"
    line = refused(*RTO, "--reward_model.function", "faulty_rewards:raises", "--output_dir", odd)
    words = shlex.split(line.partition("go on with: ")[2])
    assert words[:3] == ["python", "-m", "rto_fast.train"]
    assert load_config(words[3:]).resume.endswith(odd) and (folder / odd / "progress.json").exists()


def test_a_judge_that_fails_between_iterations_of_rto(refused, tmp_path):
    line = refused(*RTO, *LENGTHS, "--eval.function", "faulty_rewards:raises", "--eval.every", "1")
    assert "rto_fast: faulty_rewards:raises: KeyError" in line and line.endswith(how_to_go_on(tmp_path / "out"))
    assert (tmp_path / "out" / "checkpoints" / "rto-00000001").is_dir()


@pytest.fixture(scope="module")
def stopped(folder, tmp_path_factory):
    """The folder of a run whose reward function failed in the third iteration of RTO."""
    output = tmp_path_factory.mktemp("stopped") / "out"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Exception, match="server gone") as fault:
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        train.main([*RTO, "--reward_model.function", "faulty_rewards:flaky", "--output_dir", str(output)])
    assert fault.value.__notes__ == [how_to_go_on(output)[2:-1]]
    return output


@pytest.mark.parametrize("option", ["--output_dir", "--resume"])
def test_a_second_run_of_a_folder_while_the_first_lives(start, refused, tmp_path, monkeypatch, option):
    """It begins in the middle of the first one's step."""
    step, lines = SupervisedTrainer.step, []

    def step_and_second_run(self):
        if not lines:
            lines.append("")
            arguments = SFT if option == "--output_dir" else []
            before = sorted((str(path), path.stat().st_mtime_ns) for path in (tmp_path / "out").rglob("*"))
            lines.append(refused(*arguments, option, tmp_path / "out"))
            assert before == sorted((str(path), path.stat().st_mtime_ns) for path in (tmp_path / "out").rglob("*"))
        return step(self)

    monkeypatch.setattr(SupervisedTrainer, "step", step_and_second_run)
    start(*SFT, "--output_dir", tmp_path / "out")
    assert lines[1].startswith(
        f"rto_fast: {tmp_path / 'out'} is in use: process {os.getpid()} on {os.uname().nodename} "
    )
    steps = [(r["stage"], r["step"]) for r in map(json.loads, open(tmp_path / "out" / "metrics.jsonl")) if "lr" in r]
    assert steps == [("sft", 1), ("sft", 2), ("dpo", 1), ("dpo", 2)] and not (tmp_path / "out" / "run.lock").exists()


def test_a_folder_with_somebodys_model_and_configuration_is_no_place_for_a_run(refused, tmp_path):
    """Though a run that ends before its first step leaves files of these names."""
    for name in ("config.yaml", "base/model.safetensors"):
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_text("somebody's")
    assert "out exists and is not empty; give another one with --output_dir" in refused(*SFT)
    assert {path.read_text() for path in (tmp_path / "out").rglob("*") if path.is_file()} == {"somebody's"}


def test_a_new_run_in_a_runs_folder_is_refused_with_the_command_that_resumes_it(refused, tmp_path):
    (tmp_path / "out").mkdir()
    for name in ("config.yaml", "progress.json"):
        (tmp_path / "out" / name).write_text("{}")
    resume = f"go on with: python -m rto_fast.train --resume {tmp_path / 'out'}"
    assert f"out exists and is not empty; give another one with --output_dir, or {resume}\n" in refused(*SFT)


def test_what_was_trained_before_a_reward_function_failed_is_kept(start, stopped, tmp_path):
    resumed, whole = tmp_path / "resumed", tmp_path / "whole"
    shutil.copytree(stopped, resumed)
    start("--resume", resumed)
    start(*RTO, *LENGTHS, "--output_dir", whole)
    ours, theirs = (load_file(path / "rto" / "model.safetensors") for path in (resumed, whole))
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    steps = [(r["stage"], r["step"]) for r in map(json.loads, open(resumed / "metrics.jsonl"))]
    assert steps[:3] == [("rto", 1), ("rto", 2), ("rto", 3)]


def damage_checkpoint(folder):
    (path,) = folder.glob("checkpoints/rto-*/state-00000.safetensors")
    path.write_bytes(path.read_bytes()[:-100])


DAMAGES = {
    "progress": (lambda folder: (folder / "progress.json").write_text('{"done": ['), "progress.json cannot be read"),
    "configuration": (lambda folder: (folder / "config.yaml").write_text("rto: [\n"), "config.yaml:2: not valid YAML"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_run(refused, stopped, tmp_path, name):
    damage, message = DAMAGES[name]
    shutil.copytree(stopped, tmp_path / "out")
    damage(tmp_path / "out")
    assert message in refused("--resume", tmp_path / "out")


@pytest.mark.parametrize(
    "damage, said",
    [
        (
            damage_checkpoint,
            "checkpoint rto-00000002 is damaged (state-00000.safetensors is not as it was written); goes on "
            "from the beginning of the stage",
        ),
        (lambda folder: shutil.rmtree(folder / "checkpoints"), "checkpoint rto-00000002 is damaged (FileNotFoundError"),
        (lambda folder: (folder / "metrics.jsonl").unlink(), "goes on after step 2"),
    ],
    ids=["checkpoint", "no checkpoint", "log"],
)
def test_a_damaged_run_goes_on(start, stopped, tmp_path, capsys, damage, said):
    shutil.copytree(stopped, tmp_path / "out")
    damage(tmp_path / "out")
    start("--resume", tmp_path / "out")
    assert said in capsys.readouterr().out


def test_a_checkpoint_of_another_run(refused, stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "out")
    line = refused("--resume", tmp_path / "out", "--rto.advantage", "gae")
    assert (
        "not a checkpoint of this run's rto stage (KeyError: 'critic_optimizer'); resume with the options it was begun with"
        in line
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            [*SFT, "--sft.lr", "1", "--sft.max_steps", "30", "--sft.epochs", "9", "--sft.batch_size", "4"],
            "sft: the gradient was not finite in 10 steps in a row: lower the learning rate",
        ),
        ([*SFT, "--dpo.lr", "1", "--dpo.max_steps", "4"], "dpo: the gradient was not finite in 2 steps in a row"),
        ([*RTO, "--reward_model.lr", "1"], "reward_model: the gradient was not finite in 10 steps in a row"),
        (
            [*RTO, *LENGTHS, "--rto.advantage", "gae", "--rto.critic_lr", "1", "--rto.iterations", "20"],
            "rto: the gradient was not finite in 11 steps in a row",  # an iteration's steps are checked together
        ),
        ([*RTO, *LENGTHS, "--rto.lr", "1"], "the policy's logits are NaN: response 0 "),
        ([*RTO, *LENGTHS, "--rto.lr", "1", "--rollout.engine", "hf"], "the policy's logits are NaN: sequence "),
    ],
    ids=["SFT", "DPO", "reward model", "critic", "policy", "policy, hf"],
)
def test_training_that_diverges(refused, monkeypatch, tmp_path, arguments, message):
    begin = ScheduledOptimizer.__init__

    def begin_too_fast(self, *arguments):
        begin(self, *arguments)
        self.peak_lr = 1e30 if self.peak_lr == 1 else self.peak_lr

    monkeypatch.setattr(
        ScheduledOptimizer, "__init__", begin_too_fast
    )  # no option can: 1 is the most, and a little model bears it
    line = refused(*arguments)
    assert message in line and "lower the learning rate" in line and line.endswith(how_to_go_on(tmp_path / "out"))
    records = [json.loads(line) for line in open(tmp_path / "out" / "metrics.jsonl")]
    assert sum(r.get("skipped", 0) + r.get("critic_skipped", 0) for r in records) > 0


def test_a_step_that_is_skipped_is_counted(start, monkeypatch, capsys, tmp_path):
    factors = [torch.nan]

    def logps(*arguments):
        return causal_logps(*arguments) * (factors.pop() if factors else 1.0)

    monkeypatch.setattr("rto_fast.training.supervised.causal_logps", logps)
    start(*SFT, "--sft.max_steps", "4", "--sft.batch_size", "4", "--output_dir", tmp_path / "out")
    assert "\nsft: optimizer steps skipped for a gradient that was not finite: 1\n" in capsys.readouterr().out


def test_no_memory(refused, monkeypatch):
    def step(self):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.\nmore")

    monkeypatch.setattr(SupervisedTrainer, "step", step)
    assert "sft: out of memory: CUDA out of memory. Tried to allocate 1 GiB. Lower model.micro_batch" in refused(*SFT)


@contextlib.contextmanager
def full_disk(size):
    """No file may grow beyond `size` bytes: what writes more is told by the system, as it is of a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


FULL = {  # a model has 450 KB, a checkpoint 1.4 MB
    "model": (200_000, [], "out/sft: the model could not be written: "),
    "checkpoint": (600_000, ["--save_every", "1"], "sft-00000001: the checkpoint could not be written: "),
    "log": (6_000, ["--sft.max_steps", "100", "--sft.epochs", "99"], "metrics.jsonl could not be written: "),
}


@pytest.mark.parametrize("name", FULL)
def test_a_full_disk_costs_no_run(start, refused, tmp_path, name):
    size, options, message = FULL[name]
    with full_disk(size):
        line = refused(*SFT, *options, "--sft.batch_size", "2")
    assert message in line and "File too large" in line and line.endswith(how_to_go_on(tmp_path / "out"))
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left <= {"config.yaml", "progress.json", "metrics.jsonl", "tensorboard", "checkpoints"}  # no halves
    start("--resume", tmp_path / "out", "--sft.max_steps", "2")
    records = [json.loads(line) for line in open(tmp_path / "out" / "metrics.jsonl")]
    assert [r["step"] for r in records if r["stage"] == "sft"] == [1, 2] and (tmp_path / "out" / "dpo").is_dir()


def test_a_disk_that_is_full_from_the_beginning(refused, tmp_path):
    with full_disk(1_000):
        line = refused(*SFT)
    assert line == f"rto_fast: {tmp_path / 'out' / 'config.yaml'} could not be written: File too large\n"
    assert not Path(tmp_path / "out" / ".config.yaml.part").exists()
