"""Whole RTO iterations through `rto_fast.rto.trainer`: time, FLOPs and launches of each phase, and memory.

Weights are random or read from a folder; prompts are random tokens, and every response has its full length. A model with
random weights does not learn, but each step costs the same: rollout, log-probs of policy, reference and DPO model, values,
and PPO updates of policy and critic.
"""

import contextlib
import copy
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import AutoModelForSequenceClassification

from benchmarks.decoders import LLAMA3_8B, LLAMA_300M, SMOLLM2_135M, TINY, Decoder
from benchmarks.rollout import build_model
from rto_fast.config import Config, LoraConfig, ModelConfig, RolloutConfig, RTOConfig
from rto_fast.data.tokenizing import Prompt
from rto_fast.data.world import build_tokenizer
from rto_fast.models.attention import PACKED
from rto_fast.models.graphs import PassGraphs, takes_graphs
from rto_fast.models.loading import load_model
from rto_fast.models.lora import Adapter, new_adapter
from rto_fast.models.model import Model
from rto_fast.models.placement import lay_side_by_side, projection_groups
from rto_fast.reporting.log import RunLog
from rto_fast.rollout import Sampling
from rto_fast.rto.experience import Models
from rto_fast.rto.trainer import RTOTrainer
from rto_fast.system.progress import Progress, observed

PHASES = {"sampling": "rollout", "rto: score": "score", "rto: update": "update"}


@dataclass(frozen=True)
class Setting:
    """One measurement: a model of these sizes, or that of a folder, and the lengths of its rollout."""

    name: str
    model: Decoder | Path
    responses: int
    prompt_tokens: int
    response_tokens: int
    lora_rank: int = 0
    tokens: int = 65536  # of a pass, as many as the plan gives these models on an H200


SETTINGS = (
    Setting("0.3B Llama", LLAMA_300M, 128, 128, 256),
    Setting("SmolLM2-135M", SMOLLM2_135M, 128, 160, 96),
)
LORA_SETTINGS = (Setting("Llama-3-8B, LoRA of rank 64", LLAMA3_8B, 64, 512, 512, 64, 16384),)
SMALL_SETTINGS = (Setting("tiny", TINY, 8, 8, 8),)
SMALL_LORA_SETTINGS = (Setting("tiny, LoRA of rank 4", TINY, 8, 8, 8, 4),)


def setting_of(path: Path) -> Setting:
    """A model's folder, with the lengths of preference data such as HH."""
    return Setting(path.name, path, 128, 160, 96)


def _policy(setting: Setting, device: torch.device) -> Any:
    if isinstance(setting.model, Path):
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        return load_model("causal_lm", str(setting.model), device=device, dtype=dtype, trainable=True)
    model = build_model(setting.model, device).train()
    model.set_attn_implementation(PACKED)
    return model


def _model(module: Any) -> Model:
    """As a run loads it."""
    lay_side_by_side(projection_groups(module))
    model = Model(module)
    if takes_graphs(module):
        model.graphs = PassGraphs(module)
    return model


def _whole_models(setting: Setting, device: torch.device) -> Models:
    """Four models of one size. The critic has the policy's backbone, with a head for scores."""
    policy = _policy(setting, device)
    scorer = copy.deepcopy(policy.config)
    scorer.num_labels, scorer.pad_token_id = 1, 0
    with torch.device(device):
        critic = AutoModelForSequenceClassification.from_config(scorer, dtype=policy.dtype)
    critic.base_model.load_state_dict(policy.base_model.state_dict())
    critic.set_attn_implementation(PACKED)
    reference, dpo = (copy.deepcopy(policy).requires_grad_(False).eval() for _ in range(2))
    _disturb(dpo.parameters())
    policy, reference, dpo, critic = map(_model, (policy, reference, dpo, critic.train()))
    return Models(policy, reference, dpo, None, critic, _length_scores)


def _adapters(setting: Setting, device: torch.device) -> Models:
    """The same four models as adapters of one base."""
    base, lora = _policy(setting, device).requires_grad_(False), LoraConfig(rank=setting.lora_rank)
    lay_side_by_side(projection_groups(base))
    policy, dpo, critic = (
        new_adapter(base, name, lora, seed, scorer=name == "critic")
        for seed, name in enumerate(("policy", "dpo", "critic"))
    )
    _disturb(parameter for _, parameter in dpo.trainable())
    return Models(Model(policy), Model(Adapter(base)), Model(dpo), None, Model(critic), _length_scores)


@torch.no_grad()
def _disturb(parameters: Any) -> None:
    """Makes the DPO model differ from the reference."""
    for parameter in parameters:
        parameter.add_(0.01 * torch.randn_like(parameter))


def _length_scores(completions: Any) -> torch.Tensor:
    return torch.tensor([len(c.response_ids) / 100 for c in completions])


@contextlib.contextmanager
def _named(phase: Progress) -> Iterator[None]:
    """Names a phase of the iteration in a profile."""
    with record_function(PHASES[phase.what]) if phase.what in PHASES else contextlib.nullcontext():
        yield


def _launches(trainer: RTOTrainer) -> dict[str, int]:
    """Kernels and graphs that the host launches in each phase of one iteration."""
    with observed(_named), profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        trainer.step()
        torch.cuda.synchronize()
    events = profiled.events()
    launches = [e.time_range.start for e in events if e.name.startswith(("cudaLaunch", "cuLaunch", "cudaGraphLaunch"))]
    phases = [(e.name, e.time_range) for e in events if e.name in PHASES.values() and e.device_type.name == "CPU"]
    return {name: sum(t.start <= at <= t.end for at in launches) for name, t in phases}


def _seconds(trainer: RTOTrainer, iterations: int, wait: Callable[[], None]) -> tuple[float, dict[str, float]]:
    """(seconds of an iteration on average, seconds of each phase of one more, where the host waits for the device)."""
    trainer.step()  # compiles kernels and captures graphs
    trainer.step()
    wait()
    start = time.perf_counter()
    for _ in range(iterations):
        trainer.step()
    wait()
    whole, phases = (time.perf_counter() - start) / iterations, {}

    @contextlib.contextmanager
    def timed(phase: Progress) -> Iterator[None]:
        wait()
        begin = time.perf_counter()
        yield
        wait()
        if phase.what in PHASES:
            phases[PHASES[phase.what]] = time.perf_counter() - begin

    with observed(timed):
        trainer.step()
    return whole, phases


def _flops(setting: Setting, parameters: int) -> dict[str, float]:
    """FLOPs of each phase, 2·parameters·tokens a forward pass; a backward pass has twice that, with frozen weights once."""
    tokens = setting.responses * (setting.prompt_tokens + setting.response_tokens)
    forward = 2.0 * parameters * tokens
    backward = forward if setting.lora_rank else 2 * forward
    # The reference, the DPO model and the critic score; old log-probs are the sampler's.
    return {"rollout": forward, "score": 3 * forward, "update": 2 * (forward + backward)}


def measure(setting: Setting, device: torch.device, rates: dict[str, float], iterations: int = 3) -> dict[str, Any]:
    """A record: seconds of an iteration and of its phases, MFU and launches of the phases, peak memory."""
    is_cuda = device.type == "cuda"
    config = Config(
        output_dir="unused",
        device=device.type,
        model=ModelConfig(path="random weights", micro_batch_tokens=setting.tokens),
        lora=LoraConfig(rank=setting.lora_rank),
        rto=RTOConfig(
            prompts_per_rollout=setting.responses, batch_size=max(1, setting.responses // 2), iterations=iterations + 5
        ),
        rollout=RolloutConfig(max_new_tokens=setting.response_tokens, min_new_tokens=setting.response_tokens),
    )
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
    models = (_adapters if setting.lora_rank else _whole_models)(setting, device)
    tokenizer, vocabulary = build_tokenizer(), models.policy.config.vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, vocabulary, (2 * setting.responses, setting.prompt_tokens), generator=generator)
    prompts = [Prompt(row, "", {}) for row in ids.tolist()]
    sampling = Sampling.of(config.rollout, [tokenizer.eos_token_id])
    with tempfile.TemporaryDirectory() as folder:
        trainer = RTOTrainer(config, models, tokenizer, sampling, prompts, str(device), RunLog(folder))
        seconds, phases = _seconds(trainer, iterations, torch.cuda.synchronize if is_cuda else lambda: None)
        launches = _launches(trainer) if is_cuda else {}
        loss = torch.as_tensor(trainer.step()["policy_loss"])
    parameters = sum(p.numel() for name, p in models.policy.module.named_parameters() if ".lora_" not in name)
    flops = _flops(setting, parameters)
    return {
        "model": setting.name,
        "provider": "ours",
        "parameters": parameters,
        "responses": setting.responses,
        "prompt_tokens": setting.prompt_tokens,
        "response_tokens": setting.response_tokens,
        "iterations": iterations,
        "seconds": seconds,
        "phases": phases,
        "mfu": {phase: flops[phase] / spent / rates["gemm_flops_per_s"] for phase, spent in phases.items()},
        "launches": launches,
        "loss_is_finite": bool(torch.isfinite(loss)),
        "peak_bytes": torch.cuda.max_memory_allocated() if is_cuda else None,
    }
