"""Rollouts for pytest-benchmark: `pytest benchmarks/test_rollout.py`. Tokens/s and % of the bound are in extra_info.

On a GPU each item of `benchmarks.rollout.plan` runs once after its warm-up. This takes some minutes, most of them in
transformers' `generate`. On a CPU the native engine and `generate` take turns.
"""

from functools import cache

import pytest
import torch

from benchmarks import rollout, rollout_cpu
from benchmarks.replay import replay, replayed
from benchmarks.timing import Clock, ceilings


@cache
def gpu_runner():
    return rollout.Runner("cuda", ceilings(Clock("cuda")))


@cache
def cpu_records(index):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {r["provider"]: r for r in rollout_cpu.records(*rollout_cpu.WORKLOADS[index], rounds=3, seconds=1.0)}
    finally:
        torch.set_num_threads(before)


def group(record):
    bucket = f" of {record['sequences']}" if record["workload"] == rollout.STEP else ""
    return f"rollout of {record['model']}, {record['workload']}{bucket}"


@replayed
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("item", [pytest.param(item, id=item.name) for item in rollout.plan()])
def test_gpu(benchmark, item):
    record = gpu_runner().run(item)
    replay(benchmark, group(record), record, [record["seconds"]] if "seconds" in record else [])


@replayed
@pytest.mark.parametrize("provider", rollout_cpu.PROVIDERS)
@pytest.mark.parametrize("index", range(len(rollout_cpu.WORKLOADS)), ids=[w[0].name for w in rollout_cpu.WORKLOADS])
def test_cpu(benchmark, index, provider):
    record = cpu_records(index)[provider]
    replay(benchmark, group(record), record, record.get("rounds"))
