"""`python -m benchmarks.peak_memory`: predicted beside measured peaks of memory, on a small model of random weights.

A run trains every stage in a process of its own. Its peaks are read at the bounds of the phases whose progress it reports
(see `rto_fast.system.progress`). On a GPU, a peak is the most that torch has allocated. On a CPU, it is the growth of
resident memory since before the first model was loaded; Linux's high-water mark is reset before each phase. glibc keeps
freed blocks of up to 32 MB, so the run is measured twice: in the column `measured` glibc returns them to the system, in
`with kept` it does not. All options of `python -m rto_fast.train` work.
"""

import contextlib
import gc
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from rto_fast.config import Config, load_config
from rto_fast.config.load import DEFAULT
from rto_fast.data.world import build_tokenizer
from rto_fast.planning.machine import GIB, local_machine
from rto_fast.planning.memory import Items
from rto_fast.planning.phases import make_plan
from rto_fast.preflight.room import data_items
from rto_fast.system import terminal
from rto_fast.system.progress import Progress, observed

# A Llama of 61 million parameters: large enough that its weights make the peak, and not the interpreter.
SIZES = {
    "vocab_size": 16000,
    "hidden_size": 640,
    "intermediate_size": 1728,
    "num_hidden_layers": 8,
    "num_attention_heads": 10,
    "num_key_value_heads": 5,
}
# Two steps of every stage: the first one makes the optimizer's state.
OPTIONS = {
    "sft.batch_size": 32,
    "sft.max_steps": 2,
    "reward_model.batch_size": 16,
    "reward_model.max_steps": 2,
    "dpo.batch_size": 16,
    "dpo.max_steps": 2,
    "rto.batch_size": 16,
    "rto.prompts_per_rollout": 32,
    "rto.iterations": 2,
    "rollout.max_new_tokens": 40,
    "data.limit": 600,
    "eval.function": "null",
    "eval.prompts": 1,
}
STAGE_PHASES = {"sft": "sft step", "reward_model": "reward_model step", "dpo": "dpo step"}
RTO_PHASES = {"sampling": "rto rollout", "rto: score": "rto score", "rto: update": "rto update"}


class Peaks:
    """The peak of each phase of a plan, in bytes above the memory in use before the first model is loaded."""

    def __init__(self, is_gpu: bool):
        self.is_gpu = is_gpu
        self.base: int | None = 0 if is_gpu else None
        self.bytes: dict[str, int] = {}
        self.open: list[str] = []  # phases that are under way

    @contextlib.contextmanager
    def observe(self, phase: Progress) -> Iterator[None]:
        if self.base is None and phase.what.startswith("loading and checking"):
            gc.collect()
            self.base = _status("VmRSS")
        titles = RTO_PHASES if "rto" in self.open else STAGE_PHASES
        title = titles.get(phase.what) if phase.what not in self.open else None
        self.open.append(phase.what)
        if title:
            self._set_back()
        try:
            yield
        finally:
            self.open.pop()
        if title:
            self.bytes[title] = max(self.bytes.get(title, 0), self._peak())

    def _set_back(self) -> None:
        if self.is_gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")

    def _peak(self) -> int:
        return torch.cuda.max_memory_allocated() if self.is_gpu else _status("VmHWM") - (self.base or 0)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024


def measure(arguments: list[str]) -> dict[str, dict[str, float]]:
    """Runs `rto_fast.train`; returns {phase: {"predicted", "measured"}} in bytes."""
    from rto_fast import train

    config = load_config(arguments)
    for name in ["deepspeed"] * bool(config.deepspeed.zero_stage) + ["peft"] * bool(config.lora.rank):
        importlib.import_module(name)  # its code is not counted as part of the models
    machine = local_machine(config.device, 1)
    peaks = Peaks(is_gpu=machine.gpu is not None)
    with observed(peaks.observe):
        train.main(arguments)
    plan = make_plan(config, machine, _items(config))
    predicted = {phase.title: phase.memory.total for phase in plan.phases}
    return {title: {"predicted": predicted[title], "measured": value} for title, value in peaks.bytes.items()}


def _items(config: Config) -> dict[str, Items]:
    """The lengths of the run's data, as the run itself has planned with."""
    from rto_fast.models.supplied import supplied_models
    from rto_fast.session import open_session, prepare_process

    models = supplied_models(config, config.model.path or "")
    session = open_session(config, models, prepare_process(config), say=lambda text: None)
    return data_items(config, session.data)


def write_model(folder: Path, sizes: dict[str, int]) -> None:
    """Writes a Llama of random weights that reads the embedded tokenizer's ids."""
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(LlamaConfig(max_position_embeddings=256, **sizes)).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)


def compare(options: list[str], sizes: dict[str, int], gives_back: bool = True) -> dict[str, dict[str, float]]:
    """`measure` in a process of its own.

    Args:
        options: further options of the run.
        sizes: the model's, see `SIZES`.
        gives_back: glibc gives back what is freed.
    """
    with tempfile.TemporaryDirectory() as folder:
        model, output, result = (Path(folder) / name for name in ("model", "run", "result.json"))
        write_model(model, sizes)
        given = {"config": DEFAULT} | OPTIONS | {"model.path": model, "output_dir": output}
        arguments = [f"--{key}={value}" for key, value in given.items()] + options
        environment = os.environ | ({"MALLOC_MMAP_THRESHOLD_": "262144"} if gives_back else {})
        command = [sys.executable, "-m", "benchmarks.peak_memory", "--into", str(result), *arguments]
        subprocess.run(command, env=environment, check=True)
        return json.loads(result.read_text())


def table(needed: dict[str, dict[str, float]], as_it_is: dict[str, dict[str, float]]) -> str:
    lines = [f"{'GiB':<20}{'predicted':>10}{'measured':>10}{'error':>8}{'with kept':>12}"]
    for title, row in needed.items():
        error, kept = row["predicted"] / row["measured"] - 1, as_it_is[title]["measured"]
        lines.append(
            f"{title:<20}{row['predicted'] / GIB:>10.3f}{row['measured'] / GIB:>10.3f}{error:>+8.1%}{kept / GIB:>12.3f}"
        )
    return "\n".join(lines)


def main() -> None:
    if sys.argv[1:2] == ["--into"]:
        Path(sys.argv[2]).write_text(json.dumps(measure(sys.argv[3:])))
        return
    needed, as_it_is = (compare(sys.argv[1:], SIZES, gives_back) for gives_back in (True, False))
    terminal.say(table(needed, as_it_is))


if __name__ == "__main__":
    terminal.protect()
    main()
