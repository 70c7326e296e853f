"""Predicted beside measured peaks: real phases of a run with random weights, in a process of their own.

On a CPU a phase's peak is the growth of resident memory since before the models (Linux: the high-water mark, set back
before each phase); on a GPU what torch has allocated at most. glibc keeps freed blocks of up to 32 MB for itself; what is
needed shows where it is told to give them back, and how much a run as it is keeps besides is measured too.
"""

import contextlib
import gc
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from rto_fast.config import Config, load_config
from rto_fast.config.shipped import DEFAULT
from rto_fast.errors import TrainingError
from rto_fast.planning.hardware import GIB, local_machine
from rto_fast.planning.phases import make_plan
from rto_fast.preflight.room import data_items
from rto_fast.system.progress import progress

# A Llama of 61 million parameters: large enough that weights, not the interpreter, make the peak.
SIZES = {
    "vocab_size": 16000,
    "hidden_size": 640,
    "intermediate_size": 1728,
    "num_hidden_layers": 8,
    "num_attention_heads": 10,
    "num_key_value_heads": 5,
}
OPTIONS = {
    "sft.batch_size": 32,
    "reward_model.batch_size": 16,
    "dpo.batch_size": 16,
    "rto.batch_size": 16,
    "rto.prompts_per_rollout": 32,
    "rto.iterations": 2,
    "rollout.max_new_tokens": 40,
    "data.limit": 600,
}


def write_model(folder: Path, **sizes) -> None:
    """A Llama of random weights that reads the embedded tokenizer's ids."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from rto_fast.data.world import build_tokenizer

    LlamaForCausalLM(LlamaConfig(max_position_embeddings=256, **sizes)).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)


def arguments(model: Path, output: Path, extra: list[str]) -> list[str]:
    """Options of a run with all stages, two steps each: the first makes the optimizer's state. The model reads nothing but
    the embedded world."""
    named = any(option.partition("=")[0] == "--config" for option in extra)
    options: dict[str, object] = {} if named else {"config": DEFAULT}
    options |= OPTIONS
    options |= {f"{stage}.max_steps": 2 for stage in ("sft", "reward_model", "dpo")}
    options |= {"model.path": model, "output_dir": output, "eval.function": "null", "eval.prompts": 1}
    return [part for key, value in options.items() for part in (f"--{key}", str(value))] + extra


STEP = re.compile(r"\w+ +(\d+)/(\d+) ")  # the live line of a stage, as a file gets it


class Peaks:
    """Peaks of phases, in bytes above those of the beginning."""

    def __init__(self, device: str):
        self.is_gpu, self.bytes = device != "cpu", {}
        gc.collect()
        self.base = 0 if self.is_gpu else _status("VmRSS")

    @contextlib.contextmanager
    def phase(self, title: str):
        self._set_back()
        yield
        self.bytes[title] = max(self.bytes.get(title, 0), self._peak() - self.base)

    def _set_back(self):
        if self.is_gpu:
            import torch

            return torch.cuda.reset_peak_memory_stats()
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError as error:
            raise TrainingError(f"peaks of phases cannot be measured here: /proc/self/clear_refs: {error}") from error

    def _peak(self):
        if self.is_gpu:
            import torch

            return torch.cuda.max_memory_allocated()
        return _status("VmHWM")


def _status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024


@contextlib.contextmanager
def _wrapped(owner, name, around):
    """`owner.name` with a context manager around each call."""
    function = getattr(owner, name)

    def call(*args, **options):
        with around():
            return function(*args, **options)

    setattr(owner, name, call)
    try:
        yield
    finally:
        setattr(owner, name, function)


def measure(config) -> dict[str, dict[str, float]]:
    """Runs the stages of `config`; {phase: {"predicted", "measured"}} in bytes."""
    from rto_fast.rto import trainer as rto
    from rto_fast.run import Run
    from rto_fast.training.stop import StopRequest
    from rto_fast.training.supervised import SupervisedTrainer

    run = Run(config, StopRequest())
    items, device = data_items(config, run.data), run.placement["device"]
    for name in ["deepspeed"] * bool(config.deepspeed.zero_stage) + ["peft"] * bool(config.lora.rank):
        importlib.import_module(name)  # its code is no part of what the models take
    peaks, stage = Peaks(device), ""
    with contextlib.ExitStack() as stack:
        stack.enter_context(_wrapped(SupervisedTrainer, "step", lambda: peaks.phase(f"{stage} step")))
        for function, title in (("generate_shared", "rollout"), ("collect", "score"), ("update", "update")):
            stack.enter_context(_wrapped(rto, function, lambda title=title: peaks.phase(f"rto {title}")))
        stack.enter_context(run.checkpoints.resumable())
        stage = "sft"
        sft = run.train_sft()
        stage = "reward_model"
        reward_model = run.train_reward_model(sft)
        stage = "dpo"
        dpo = run.train_dpo(sft)
        if config.rto.enabled:
            run.train_rto("RTO", sft, dpo, reward_model, run.scorer(sft, reward_model), None)
    plan = make_plan(config, local_machine(device, 1), items)
    predicted = {phase.title: phase.memory.total for phase in plan.phases}
    return {title: {"predicted": predicted[title], "measured": value} for title, value in peaks.bytes.items()}


def compare(
    extra: list[str], sizes: dict | None = None, give_back: bool = True, what: str = "measuring"
) -> dict[str, dict[str, float]]:
    """`measure` in a process of its own, on a model written for it.

    Args:
        extra: options of the run. give_back: tell glibc to give back what is freed. what: the name of its progress.
    """
    with tempfile.TemporaryDirectory() as folder:
        model, output, result = (Path(folder) / name for name in ("model", "run", "result.json"))
        write_model(model, **(SIZES if sizes is None else sizes))
        options = arguments(model, output, extra)
        command = [sys.executable, "-m", __name__, str(result), *options]
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}  # its lines come when they are written
        environment |= {"MALLOC_MMAP_THRESHOLD_": "262144"} if give_back else {}
        said = []
        with (
            progress(what, _stages(load_config(options)), "stages") as phase,
            subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=environment
            ) as process,
        ):
            for line in process.stdout or ():
                said.append(line)
                if step := STEP.match(line):
                    phase.advance(step[1] == step[2])
                    phase.note = " ".join(line.split())
        if process.returncode:
            raise TrainingError(f"--measure: the run failed:\n{''.join(said)}")
        return json.loads(result.read_text())


def _stages(config: Config) -> int:
    """How many stages a run trains."""
    reward = config.needs_reward_model and not (config.reward_model.model or config.reward_model.function)
    return sum([not config.sft.model, reward, config.needs_dpo_model and not config.dpo.model, config.rto.enabled])


def table(needed: dict[str, dict[str, float]], as_it_is: dict[str, dict[str, float]] | None = None) -> str:
    lines = [f"{'GiB':<20}{'predicted':>10}{'measured':>10}{'error':>8}" + f"{'with kept':>12}" * bool(as_it_is)]
    for title, row in needed.items():
        error = row["predicted"] / row["measured"] - 1
        kept = f"{as_it_is[title]['measured'] / GIB:>12.3f}" if as_it_is else ""
        lines.append(f"{title:<20}{row['predicted'] / GIB:>10.3f}{row['measured'] / GIB:>10.3f}{error:>+8.1%}{kept}")
    return "\n".join(lines)


def main() -> None:
    from rto_fast.training.launch import joined

    config = load_config(sys.argv[2:])
    with joined(use_deepspeed=bool(config.deepspeed.zero_stage)):
        Path(sys.argv[1]).write_text(json.dumps(measure(config)))


if __name__ == "__main__":
    main()
