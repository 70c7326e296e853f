"""Rollouts that a CPU finishes in seconds: the native engine and transformers' `generate` take turns."""

from dataclasses import replace
from functools import cache

import torch

from benchmarks.decoders import EMBEDDED, LLAMA_20M, equal, uniform
from benchmarks.rollout import Item, Runner, result
from benchmarks.timing import Clock, ceilings, measure
from rto_fast.rollout import Sampling

PROVIDERS = ("ours", "HF generate")
WORKLOADS = (
    (LLAMA_20M, equal(64, 32, 64, "64 × (32 + 64) tokens")),
    (EMBEDDED, replace(uniform(64, 8, 16, "64 × (12 + 60) tokens"), responses=(60,) * 64)),
    # The length of the default run's responses.
    (EMBEDDED, replace(uniform(64, 8, 16, "64 × (12 + 4 to 52) tokens"), responses=uniform(64, 4, 52).responses)),
)


@cache
def rates():
    return ceilings(Clock("cpu"))


def records(decoder, workload, *, rounds=3, seconds=20.0):
    """A record for each provider, as `benchmarks.rollout.Runner` makes them, with the seconds of each round as "rounds".

    Uses torch's number of threads.
    """
    runner = Runner("cpu", rates())
    items = [Item(decoder, workload, name) for name in PROVIDERS]
    prompts, limits = workload.prompt_ids(decoder.vocab_size), list(workload.responses)

    def provider(engine):
        def call():  # lengths of the responses, which are compared
            batch = engine.generate(prompts, 1, Sampling(max(limits)), 0, limits=limits)
            return torch.tensor([float(len(ids)) for ids in batch.response_ids])

        return lambda: call

    timed = measure(
        {item.provider: provider(runner.engine(item)) for item in items},
        Clock("cpu"),
        rounds=rounds,
        seconds=seconds,
        warmup=1,
    )
    found = []
    for item in items:
        record = {"model": decoder.name, "workload": workload.name, "provider": item.provider}
        measured = timed[item.provider]
        if "median_ms" in measured:
            times = {"rounds": measured["seconds"], "deviation": measured["deviation"]}
            measured = result(item, measured["median_ms"] / 1e3, runner.rates, runner.itemsize) | times
        found.append(record | measured)
    return found
