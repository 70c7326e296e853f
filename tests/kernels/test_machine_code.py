"""Every kernel, compiled for every architecture, satisfies the facts of `benchmarks.static`; no GPU is needed."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KERNELS = [
    kernel
    for path in sorted((ROOT / "kernels").glob("*.py"))
    for kernel in re.findall(r"def (\w+_kernel)\(", path.read_text())
]


@pytest.fixture(scope="module")
def facts():
    """Runs in a separate process, because nothing can be compiled under the interpreter, which may be on in this one."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.static", "--json"]
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert process.stdout, process.stderr
    return json.loads(process.stdout)


@pytest.mark.parametrize("kernel", KERNELS)
def test_machine_code(facts, kernel):
    found = [fact for fact in facts if fact["kernel"] == kernel]
    assert {fact["sm"] for fact in found} == {80, 90, 100}, "the kernel needs a case in benchmarks/static_cases.py"
    assert [(fact["case"], fact["sm"], fact["failures"]) for fact in found if fact["failures"]] == []
    assert all(16 <= fact["registers"] <= 255 and fact["loads"] and fact["stores"] for fact in found)


def test_warps_of_a_row_of_logits(facts):
    """The fastest setting on an H200: 64 bytes a thread, and in the forward pass at most 4096 elements a tile."""
    found = {(fact["kernel"], fact["case"]): fact["warps"] for fact in facts}
    assert found["token_logps_fwd_kernel", "logits llama bf16"] == 4
    assert found["token_logps_fwd_kernel", "logits llama fp32 entropy"] == 8
    assert found["token_logps_bwd_kernel", "logits llama bf16"] == 8


@pytest.mark.parametrize("kernel", ["token_logps_fwd_kernel", "linear_ppo_kernel", "sample_tokens_kernel"])
def test_log_probs_are_rounded_as_written(facts, kernel):
    """No compiler decides what is contracted in one and not in the others. It does so in the gradient's kernel."""
    assert [fact["contractible"] for fact in facts if fact["kernel"] == kernel and fact["contractible"]] == []
    assert all(fact["contractible"] for fact in facts if fact["kernel"] == "logits_gradient_kernel")


@pytest.mark.parametrize("kernel, programs", [("rto_advantages_kernel", 6), ("gae_kernel", 6)])
def test_programs_that_wait_for_latency_share_an_sm(facts, kernel, programs):
    """A million tokens of 1024 sequences are 7.8 programs for each SM of an H200.

    Another release of Triton may use a few other registers. With one or two programs an SM the kernels took four to
    eight rounds.
    """
    found = [fact for fact in facts if fact["kernel"] == kernel and fact["case"].endswith("1M tokens")]
    assert {fact["sm"] for fact in found} == {80, 90, 100}
    for fact in found:
        registers = -(-fact["registers"] // 8) * 8 * 32 * fact["warps"]
        assert 65536 // registers >= programs, fact


@pytest.mark.parametrize("kernel", ["attention_fwd_kernel", "attention_dq_kernel", "attention_dkdv_kernel"])
def test_attention_uses_tensor_cores_asynchronously(facts, kernel):
    """ptxas lets each product wait for the one before where it finds no registers; it does for heads of 256."""
    found = [fact for fact in facts if fact["kernel"] == kernel and "fp32" not in fact["case"]]
    assert len(found) >= 12 and all(fact["tensor_core"] for fact in found)
    assert [fact["case"] for fact in found if fact["serialized"] and "gemma" not in fact["case"]] == []


def test_products_of_16_bits_use_tensor_cores(facts):
    """Tiles of 64 rows and more have the asynchronous instructions of sm_90 and sm_100, and smaller ones `mma.sync`."""
    found = [fact for fact in facts if fact["kernel"] == "ordered_gemm_kernel"]
    for fact in found:
        rows = re.search(r"bf16 (\d+) x", fact["case"])
        assert bool(fact["tensor_core"]) == (fact["sm"] == 80 or (rows is not None and int(rows[1]) >= 64)), fact[
            "case"
        ]
    assert len(found) >= 24
