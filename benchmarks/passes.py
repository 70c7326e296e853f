"""Scoring and training passes of whole models with random weights, by the layers that they run.

A scoring pass computes log-probs without gradients, a training pass PPO's loss and its gradients. 16,384 tokens are packed
in sequences of 128 to 384, and half of them have a label, as in RTO. All layers compute the same weights and batch.
"""

import contextlib
import gc
import sys
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

from benchmarks.costs import Device
from benchmarks.decoders import TINY, Decoder
from benchmarks.pass_costs import MEASURED_MODELS, TOKENS, scoring_pass, training_pass
from benchmarks.rollout import build_model
from rto_fast.batch import PackedBatch, pack
from rto_fast.config import OptimizerConfig, RTOConfig
from rto_fast.models.attention import PACKED
from rto_fast.models.forward import causal_logps
from rto_fast.models.graphs import PassGraphs, takes_graphs
from rto_fast.models.model import Model
from rto_fast.models.placement import lay_side_by_side, projection_groups
from rto_fast.rto.update import MicroBatch, policy_loss
from rto_fast.training.optimizer import Optimizer

FAST, SLOW = ("ours", "transformers", "Liger"), ("torch.compile",)
ROUNDS = 5


def _ours(model: nn.Module) -> None:
    pass


def _transformers(model: nn.Module) -> None:
    """Our decoder leaves a model alone whose layers have hooks."""
    model.base_model.layers[0].register_forward_hook(lambda *_: None)


def _liger(model: nn.Module) -> None:
    if next(model.parameters()).device.type == "cpu":
        raise RuntimeError("Liger's kernels need a GPU")
    from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

    _apply_liger_kernel_to_instance(model=model, fused_linear_cross_entropy=False, cross_entropy=False)


def _compiled(model: nn.Module) -> None:
    _transformers(model)
    torch.compiler.reset()
    for layer in model.base_model.layers:
        layer.compile(dynamic=True)


@contextlib.contextmanager
def _put_back(model: nn.Module) -> Iterator[None]:
    """Undoes what Liger changes for all models of a kind: functions and classes of transformers' module."""
    module = vars(sys.modules[type(model).__module__])
    before = dict(module)
    try:
        yield
    finally:
        module.update(before)


PREPARE = {"ours": _ours, "transformers": _transformers, "Liger": _liger, "torch.compile": _compiled}


def batch_of(decoder: Decoder, tokens: int, device: torch.device) -> PackedBatch:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(64, 193, (max(1, tokens // 256), 2), generator=generator).tolist()
    prompts, responses = (
        [torch.randint(5, decoder.vocab_size, (pair[side],), generator=generator).tolist() for pair in sizes]
        for side in (0, 1)
    )
    return pack(prompts, responses, device)


def _passes(module: PreTrainedModel, batch: PackedBatch) -> dict[str, Callable[[], Tensor]]:
    """A scoring and a training pass as the trainer runs them, as CUDA graphs where it does."""
    model, rto = Model(module), RTOConfig()
    if takes_graphs(module):
        model.graphs = PassGraphs(module)
    optimizer = Optimizer(model, rto, OptimizerConfig(), total_steps=1)
    advantages = torch.linspace(-1, 1, batch.num_tokens, device=batch.labels.device)
    old_logps, zeros = torch.full_like(advantages, -8.0), torch.zeros_like(advantages)
    micro_batch = MicroBatch(batch, float(len(batch.rows)), old_logps, zeros, advantages, zeros)

    def score() -> Tensor:
        with torch.no_grad():
            return model.forward(causal_logps, batch)

    def train() -> Tensor:
        metrics = model.learn(policy_loss, micro_batch, rto, 1.0, backward=optimizer.backward)
        optimizer.zero_grad()
        return metrics["policy_loss"]

    return {"score": score, "train": train}


def _timed(run: Callable[[], Tensor], is_cuda: bool) -> dict[str, float | int | None]:
    """Seconds of a pass, of its host's part, kernels, and the most memory at once."""

    def wait() -> None:
        if is_cuda:
            torch.cuda.synchronize()

    for _ in range(3):  # compiles, and captures CUDA graphs when a size comes for the second time
        run()
    wait()
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    for _ in range(ROUNDS):
        run()
    host = (time.perf_counter() - start) / ROUNDS
    wait()
    seconds, kernels = (time.perf_counter() - start) / ROUNDS, None
    if is_cuda:
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            run()
            wait()
        kernels = sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiled.events())
    peak = torch.cuda.max_memory_allocated() if is_cuda else None
    return {"seconds": seconds, "host_seconds": host, "kernels": kernels, "peak_bytes": peak}


def measure(decoder: Decoder, layers: str, device: torch.device, rates: dict, tokens: int) -> list[dict]:
    """The records of both passes of a model, or one with the reason why there is none."""
    record = {"model": decoder.name, "layers": layers}
    is_cuda, found, stack = device.type == "cuda", [], contextlib.ExitStack()
    try:
        model = build_model(decoder, device).train()
        model.set_attn_implementation(PACKED)
        lay_side_by_side(projection_groups(model))
        stack.enter_context(_put_back(model))
        PREPARE[layers](model)
        batch = batch_of(decoder, tokens, device)
        lengths, labelled = batch.cu_seqlens.diff().tolist(), len(batch.rows)
        here = Device("here", rates["copy_bytes_per_s"], rates["gemm_flops_per_s"])
        for name, run in _passes(model, batch).items():
            least = (scoring_pass if name == "score" else training_pass)(decoder, lengths, labelled)
            value = run().float()
            timed = _timed(run, is_cuda)
            flops = least.gemm_flops + least.attention_flops
            found.append(
                record
                | {"phase": name, "tokens": batch.num_tokens, "labelled": labelled, "value": value.mean().item()}
                | timed
                | {"flops_per_second": flops / timed["seconds"], "predicted_seconds": least.seconds(here)}
            )
    # A peer that is not installed, or fails for reasons of its own, is a result.
    except Exception as error:
        found.append(record | {"phase": "", "error": f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}"})
    stack.close()
    model = None
    gc.collect()
    if is_cuda:
        torch.cuda.empty_cache()
    return found


def run(device: torch.device, rates: dict, deadline: float, small: bool, providers: tuple[str, ...] = FAST):
    """Yields records, model by model with all layers, so that what was measured side by side can be compared."""
    for decoder in (TINY,) if small else MEASURED_MODELS:
        for layers in providers:
            if time.perf_counter() > deadline:
                yield {"model": decoder.name, "layers": layers, "phase": "", "error": "out of time"}
                continue
            yield from measure(decoder, layers, device, rates, 300 if small else TOKENS)
