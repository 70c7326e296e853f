"""Rollouts of whole models with random weights: tokens/s and time a step, as a share of what the hardware allows.

256 sequences have prompts and responses of 100 to 1024 tokens (seed 0), or of log-normal lengths; only `limits` end
responses. All providers run on the same weights. What they compile or capture before the timed run is not counted.
`benchmarks/gpu.py` runs `plan()` as far as time allows, `pytest benchmarks/test_rollout.py` runs all of it.
"""

import gc
import time
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config
from transformers.initialization import no_init_weights

from benchmarks.costs import Device, rollout_seconds, step_seconds
from benchmarks.decoders import (
    DECODERS,
    EMBEDDED,
    LLAMA3_8B,
    LLAMA_20M,
    QWEN3_06B,
    TINY,
    Decoder,
    Workload,
    equal,
    workloads,
)
from benchmarks.rollout_providers import PROVIDERS
from rto_fast.config import RolloutConfig
from rto_fast.data import world
from rto_fast.rollout import Sampling

STEP = "step"  # name of the workloads whose decode steps are timed, with equal prompts and 32 steps
STEP_BUCKETS, STEP_CONTEXT, STEP_TOKENS = (1, 8, 32, 64, 128, 256), 512, 33
COMPILE_SECONDS = 60.0  # the static cache needs at least this, because torch.compile cannot be interrupted
TOKENIZER = SimpleNamespace(pad_token_id=0)


@dataclass(frozen=True)
class Item:
    """One measurement."""

    decoder: Decoder
    workload: Workload
    provider: str

    @property
    def name(self):
        bucket = f" of {len(self.workload.prompts)}" if self.workload.name == STEP else ""
        return f"{self.decoder.name}, {self.workload.name}{bucket} | {self.provider}"


def plan(small=False):
    """The measurements on a GPU, the most important first. small: for a trial on a CPU."""
    models, lengths = (TINY,) if small else DECODERS, workloads(small)
    full, tailed, short = lengths.values()
    sizes = ((1, 4), 8, 9) if small else (STEP_BUCKETS, STEP_CONTEXT, STEP_TOKENS)
    steps = [equal(bucket, *sizes[1:], STEP) for bucket in sizes[0]]
    items = [Item(model, workload, "ours") for model in models for workload in (full, tailed)]
    items += [Item(model, step, "ours") for model in models[::-1] for step in steps]
    hf, static, continuous = list(PROVIDERS)[1:]
    items += [Item(model, full, hf) for model in models if model is not LLAMA3_8B]
    items += [Item(model, short, name) for model in models for name in ("ours", hf, continuous)]
    order = (TINY,) if small else (QWEN3_06B, LLAMA3_8B, LLAMA_20M)
    return items + [Item(model, short, static) for model in order]


def build_model(decoder, device):
    """A Hugging Face model of these sizes with random weights, bfloat16 on a GPU, else float32."""
    if decoder is EMBEDDED:
        return world.build_model(0).eval()
    config_type = {"llama": LlamaConfig, "qwen3": Qwen3Config}[decoder.model_type]
    config = config_type(
        vocab_size=decoder.vocab_size,
        hidden_size=decoder.hidden_size,
        intermediate_size=decoder.intermediate_size,
        num_hidden_layers=decoder.layers,
        num_attention_heads=decoder.heads,
        num_key_value_heads=decoder.kv_heads,
        head_dim=decoder.head_dim,
        max_position_embeddings=decoder.context,
        tie_word_embeddings=decoder.tied,
        rope_theta=decoder.rope_theta,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    # Made empty and filled in one pass, because initialising 8·10^9 weights module by module takes long.
    with torch.device(device), no_init_weights():
        dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)  # of a norm
            else:
                parameter.normal_(std=0.02)
    return model.eval()


class MarkedStep:
    """A `DecodeStep` that records when each step begins and ends on the device."""

    def __init__(self, step, is_cuda):
        self.step, self.is_cuda, self.marks = step, is_cuda, []

    def __getattr__(self, name):
        return getattr(self.step, name)

    def mark(self):
        if not self.is_cuda:
            return self.marks.append(time.perf_counter())
        self.marks.append(torch.cuda.Event(enable_timing=True))
        self.marks[-1].record()

    def __call__(self, *arguments):
        self.mark()
        self.step(*arguments)
        self.mark()

    def seconds(self, steps):
        """Mean seconds of the first `steps` steps; after them all sequences are done."""
        first, last = self.marks[0], self.marks[2 * steps - 1]
        if self.is_cuda:
            torch.cuda.synchronize()
        return (first.elapsed_time(last) / 1e3 if self.is_cuda else last - first) / steps


class Runner:
    """Runs items on one device; keeps the model and its engines while items of the same model follow each other."""

    def __init__(self, device, rates):
        self.device, self.is_cuda = torch.device(device), torch.device(device).type == "cuda"
        self.rates = Device("here", rates["copy_bytes_per_s"], rates["gemm_flops_per_s"])
        self.itemsize = 2 if self.is_cuda else 4
        self.decoder, self.model, self.engines = None, None, {}

    def engine(self, item):
        if item.decoder is not self.decoder:
            self.model, self.engines = None, {}
            self.free()
            self.model, self.decoder = build_model(item.decoder, self.device), item.decoder
        if item.provider not in self.engines:
            self.engines[item.provider] = PROVIDERS[item.provider](self.model, TOKENIZER, RolloutConfig())
        return self.engines[item.provider]

    def free(self):
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()

    def run(self, item, deadline=float("inf")):
        """A record (a dict) with the measurements, or the reason why there are none ("skipped", "error")."""
        workload, start = item.workload, time.perf_counter()
        record = {
            "model": item.decoder.name,
            "workload": workload.name,
            "provider": item.provider,
            "sequences": len(workload.prompts),
            "response_tokens": workload.response_tokens,
        }
        compiles = self.is_cuda and item.provider == "HF generate, static cache"
        if start + (COMPILE_SECONDS if compiles else 0.0) > deadline:
            return record | {"skipped": "out of time"}
        is_ours = item.provider == "ours"
        try:
            engine = self.engine(item)
            engine.deadline = deadline
            if not is_ours:  # continuous batching asks the device how much memory is free
                self.free()
            found = (self._step if workload.name == STEP else self._rollout)(engine, item)
        # Engines fail for reasons of their own, such as memory or missing features; the reason is the result.
        except Exception as error:
            self.engines.pop(item.provider, None)
            found = {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}"}
        if not is_ours or "error" in found:
            self.free()
        return record | found | {"wall_seconds": time.perf_counter() - start}

    def _timed(self, engine, prompts, limits, n=1):
        start = time.perf_counter()
        batch = engine.generate(prompts, n, Sampling(max(limits)), 0, limits=limits)
        if self.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start, batch

    def _rollout(self, engine, item):
        workload, found = item.workload, {}
        prompts, limits = workload.prompt_ids(item.decoder.vocab_size), list(workload.responses)
        warm_up = getattr(engine, "warm_up_tokens", None)  # None for a whole run
        if warm_up != 0:
            # This compiles kernels and captures graphs.
            found["first_seconds"] = self._timed(engine, prompts, [min(n, warm_up or n) for n in limits])[0]
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats()
        before = sum(engine.step.steps.values()) if item.provider == "ours" else 0
        seconds, batch = self._timed(engine, prompts, limits)
        if [len(ids) for ids in batch.response_ids] != limits:
            return found | {"skipped": f"out of time: {batch.num_tokens} of {sum(limits)} tokens in {seconds:.0f} s"}
        setup = batch.timings.get("setup", 0.0)
        found |= result(item, seconds - setup, self.rates, self.itemsize)
        found |= {f"{key}_seconds": batch.timings.get(key) for key in ("prefill", "decode")}
        found |= {
            "capture_seconds": batch.stats.get("capture_seconds", setup or None),
            "occupancy": batch.stats.get("occupancy"),
            "preemptions": batch.stats.get("preemptions"),
            "peak_bytes": torch.cuda.max_memory_allocated() if self.is_cuda else None,
        }
        if item.provider == "ours":
            found["steps"] = sum(engine.step.steps.values()) - before
        elif item.provider.startswith("HF generate"):
            found["occupancy"] = sum(limits) / (len(limits) * max(limits))
        return found

    def _step(self, engine, item):
        """Times decode steps. A first run with one repeated prompt, whose prefill is short, makes the bucket's graph."""
        prompts, limits = item.workload.prompt_ids(item.decoder.vocab_size), list(item.workload.responses)
        self._timed(engine, prompts[:1], limits, n=len(limits))
        step = engine.step
        engine.step = MarkedStep(step, self.is_cuda)
        try:
            self._timed(engine, prompts, limits)
            seconds = engine.step.seconds(limits[0] - 1)  # the first token came from the prefill
        finally:
            engine.step = step
        return result(item, seconds, self.rates, self.itemsize)


def result(item, seconds, rates, itemsize):
    """Tokens/s and share of the bound, of a rollout, or of a step for workloads named STEP."""
    workload, sequences = item.workload, len(item.workload.prompts)
    if workload.name == STEP:
        tokens = sequences * (workload.prompts[0] + workload.responses[0] / 2)  # in the cache, on average over steps
        bound, drawn = step_seconds(item.decoder, rates, sequences, tokens, itemsize=itemsize), sequences
    else:
        bound, drawn = rollout_seconds(item.decoder, workload, rates, itemsize=itemsize), workload.response_tokens
    return {
        "seconds": seconds,
        "tokens_per_second": drawn / seconds,
        "bound_seconds": bound,
        "percent_of_bound": 100 * bound / seconds,
    }


def run(device, rates, deadline, items):
    """Yields the records of items of `plan`."""
    runner = Runner(device, rates)
    for item in items:
        yield runner.run(item, deadline)
