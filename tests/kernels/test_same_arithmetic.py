"""Decoding and training compile variants of one kernel: their machine code adds up in the same order and rounds alike.

A variant follows from what is None (the rstd that a backward pass needs, the cache of a decode step) and from values on
which Triton specialises: sizes and strides that are 1 or a multiple of 16. The order of a sum over a tile follows from the
layout that the compiler chooses for the variant. No GPU is needed.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILE = """
import importlib, json, re, sys
import torch
from collections import Counter
from benchmarks.static import compile_launch, record_launches
from benchmarks.static_cases import gated, rms_norm, rotary

def multiplied(count):
    # As Granite's blocks are, before they are added.
    def call(module):
        x, residual = (torch.empty(count, 2048, dtype=torch.bfloat16) for _ in range(2))
        for weight in (torch.empty(2048, dtype=torch.bfloat16, requires_grad=grad) for grad in (False, True)):
            module.add_rms_norm(x, residual, weight, 1e-6, multiplier=0.22)
    return "rms_norm", call

def odd(count):
    # Addresses and strides that are multiples of no vector, which a row of a larger tensor may have.
    def call(module):
        for place, stride in ((0, 576), (1, 576), (0, 577)):
            x = torch.empty(count * stride + 8, dtype=torch.bfloat16)[place:][: count * stride].view(count, stride)
            module.rms_norm(x[:, :576], torch.empty(584, dtype=torch.bfloat16)[place:][:576], 1e-6)
    return "rms_norm", call

CALLS = {
    "norm of 576 at odd addresses": odd,
    "norm of 2048 with a multiplier": multiplied,
    "norm of 576": lambda count: rms_norm(576, count=count),
    "norm of 4096": lambda count: rms_norm(4096, count=count),
    "norm of 3584 with an offset": lambda count: rms_norm(3584, count=count, unit_offset=True),
    "norm in float32": lambda count: rms_norm(384, torch.float32, count=count),
    "rotation with norms of 128": lambda count: rotary(16, 8, 128, norms=True, count=count),
    "rotation with norms of 256": lambda count: rotary(4, 1, 256, norms=True, count=count, unit_offset=True),
    "rotation with norms, 96 of 128": lambda count: rotary(6, 2, 128, norms=True, rotated=96, count=count),
    "rotation": lambda count: rotary(32, 8, 128, count=count),
    "gate": lambda count: gated(3072, count=count),
}
FORWARD = ("rms_norm_kernel", "rotary_kernel", "gated_kernel")
NAMES = "add|sub|mul|fma|neg|abs|min|max|div|rcp|rsqrt|sqrt|ex2|lg2|cvt"
FLOATS = rf"^\\s*(?:@\\S+\\s+)?((?:{NAMES})\\.[\\w.]*b?f(?:16|32)[\\w.]*)\\s"

def facts(kernel, args, options, sm):
    compiled = compile_launch(kernel, args, options, sm)
    ttgir = compiled.asm["ttgir"]
    layouts = dict(re.findall(r"^(#\\w+) = (.*)$", ttgir, re.MULTILINE))
    sums = re.findall(r"\\}\\) : \\(tensor<([\\dx]+xf32), (#\\w+)>\\)", ttgir)
    floats = Counter()
    for name in re.findall(FLOATS, compiled.asm["ptx"], re.MULTILINE):
        floats[name.replace("x2", "")] += 1 + ("x2" in name)
    names = [name for name, value in zip(kernel.arg_names, args) if value is None]
    return {
        "hash": compiled.hash,
        "absent": names,
        "sums": [[shape, layouts[name]] for shape, name in sums],
        "floats": floats,
    }

def launches(call, count):
    module, function = call(count)
    found = record_launches(function, importlib.import_module(f"rto_fast.kernels.{module}"))
    return [launch for launch in found if launch[0].__name__ in FORWARD]

print(json.dumps([
    {"case": name, "sm": sm, "count": count, **facts(*launch, sm)}
    for name, call in CALLS.items()
    for sm in (80, 90, 100)
    for count in (1, 3, 256)
    for launch in launches(call, count)
]))
"""


@pytest.fixture(scope="module")
def variants():
    """Facts about every variant, from a process of its own: nothing can be compiled under the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE]
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def by(variants, *keys):
    groups = {}
    for variant in variants:
        groups.setdefault(tuple(str(variant[key]) for key in keys), []).append(variant)
    return groups


def test_the_number_of_rows_compiles_nothing_else(variants):
    counts = by(variants, "case", "sm")
    assert len(counts) == 33
    for found in counts.values():
        hashes = [[variant["hash"] for variant in same] for same in by(found, "count").values()]
        assert len(hashes) == 3 and hashes == [hashes[0]] * 3


def test_decoding_and_training_add_up_in_the_same_order(variants):
    several = 0
    for (case, _), found in by(variants, "case", "sm").items():
        sums = [variant["sums"] for variant in found]
        assert sums == [sums[0]] * len(sums)
        assert len(sums[0]) == ("norm" in case) + ("96 of 128" in case)
        several += len(by(found, "hash")) > 1
    assert several == 30  # all but the gate, whose only variant serves both


def test_decoding_and_training_compute_with_the_same_instructions(variants):
    """Variants of one formula: a norm saves its rstd or does not, a rotation stores to a cache or does not."""
    for (case, sm), found in by(variants, "case", "sm").items():
        # A sum with the residual stream, and one with a multiplier, are formulas of their own.
        for _, same in by(formulas(found), "formula").items():
            floats = [variant["floats"] for variant in same]
            assert floats[0] and floats == [floats[0]] * len(floats), (case, sm)
    norms = formulas(variant for variant in variants if variant["case"] == "norm of 576")
    assert len(by(norms, "formula")) == 2 and len(by(norms, "hash")) == 12


def formulas(found):
    ours = ("x_ptr", "multiplier", "rope_ptr", "query_norm_ptr")
    return [{**variant, "formula": [name for name in variant["absent"] if name in ours]} for variant in found]
