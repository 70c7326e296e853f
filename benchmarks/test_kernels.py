"""Kernel benchmarks for pytest-benchmark, a group for each kernel: `pytest benchmarks [--benchmark-json FILE]`.

`benchmarks.timing` times all providers of a group in turns. Then each provider's test passes its rounds to
pytest-benchmark (`benchmarks.replay`). This is the only way to interleave rounds of different tests.
"""

from functools import cache
from itertools import chain

import pytest
import torch

from benchmarks import decode_cases
from benchmarks.cases import (
    advantages_cases,
    cpu_cases,
    gae_cases,
    linear_cases,
    linear_ppo_cases,
    logits_cases,
    logits_ppo_cases,
    run,
    vector_cases,
)
from benchmarks.replay import replay, replayed
from benchmarks.shapes import MODELS
from benchmarks.timing import Clock, ceilings

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


def cuda_cases():
    for shape in MODELS:
        for build in (logits_cases, linear_cases, linear_ppo_cases, logits_ppo_cases):
            yield from build(shape, CUDA, torch.bfloat16)
    yield from decode_cases.decode_cases(CUDA)
    yield from chain(vector_cases(1 << 20, CUDA), gae_cases(1 << 20, 1024, CUDA, slow_peers=False))
    for sequences in (8, 128, 1024):
        yield from advantages_cases(1 << 20, sequences, CUDA, slow_peers=False)


def parameters(cases):
    return [pytest.param(case, name, id=f"{case.name} | {name}") for case in cases for name in case.providers]


@cache
def device_clock(device):
    clock = Clock(device)
    return clock, ceilings(clock)


measured = {}  # of one case at a time, because the tests of a case follow each other


def record_of(case, name, device, **options):
    if case.name not in measured:
        measured.clear()
        measured[case.name] = {record["provider"]: record for record in run(case, *device_clock(device), **options)}
    return measured[case.name][name]


def report(benchmark, record):
    group = f"{record['group']} {record['phase']}, {record['model']}, T={record['tokens']}, mask {record['mask']}"
    replay(benchmark, group, record, record.get("seconds"))


@replayed
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case, name", parameters(cuda_cases()))
def test_gpu(benchmark, case, name):
    report(benchmark, record_of(case, name, CUDA))


@replayed
@pytest.mark.parametrize("case, name", parameters(chain(cpu_cases(), decode_cases.cpu_cases())))
def test_cpu(benchmark, case, name):
    report(benchmark, record_of(case, name, CPU, rounds=7, seconds=1.5))
