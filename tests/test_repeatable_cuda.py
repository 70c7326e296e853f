"""On a GPU: runs of all stages with one seed have the same weights and metrics to the bit, whatever the sampler's slots and
pages and wherever a run was killed; and torch itself finds no op in a run that would not repeat."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rto_fast.batch import pack_whole
from rto_fast.models.attention import PACKED, PLAIN
from rto_fast.models.embedding import use_op_embeddings
from rto_fast.models.forward import packed_inputs
from tests.tiny_models import tiny
from tests.training.test_resume import KILLER, UNREPORTED, records

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
# The embedded model in 16 bits: a vocabulary of 48, so that every token comes many times.
OPTIONS = """--config default --model.dtype bfloat16 --data.limit 200 --data.held_out 8 --eval.prompts 16
--sft.max_steps 6 --reward_model.max_steps 4 --dpo.max_steps 4 --rto.iterations 4 --rto.prompts_per_rollout 32
--rto.batch_size 16 --rollout.max_new_tokens 40 --eval.every 2""".split()
VARIANTS = {
    "whole": [],
    "lora": ["--lora.rank", "8"],
    "eager": ["--rollout.cuda_graphs", "false"],
    "checkpointing": ["--model.gradient_checkpointing", "true"],
}
# Room for the pages of a few sequences: 2 layers, keys and values, 4 heads of 16, 2 bytes, pages of 64 tokens.
FEW_PAGES = str(12 * 2 * 2 * 4 * 16 * 2 * 64 / (1 << 30))
DETERMINISTIC = """
import torch
torch.use_deterministic_algorithms(True)  # also fills memory that is not written with NaN
"""


def run(*arguments, code="", environment=()):
    return subprocess.run(
        [sys.executable, "-c", f"{UNREPORTED}{code}command()", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | dict(environment),
        timeout=300,
    )


def finished(folder, *arguments, **options):
    process = run(*arguments, "--output_dir", folder, **options)
    assert process.returncode == 0, process.stderr
    return folder


def state(folder):
    """All that a run made, without what is measured: of speed and of the sampler's slots."""
    weights = {path.parent.name: load_file(path) for path in sorted(Path(folder).glob("*/model.safetensors"))}
    bits = {
        name: {
            key: value.view(torch.int16 if value.itemsize == 2 else torch.int32).tolist() for key, value in w.items()
        }
        for name, w in weights.items()
    }
    assert bits.keys() >= {"sft", "reward_model", "dpo", "rto"}
    return (
        bits,
        records(folder),
        records(folder, "samples.jsonl"),
        json.loads((Path(folder) / "results.json").read_text()),
    )


def assert_same(found, expected):
    for ours, theirs in zip(state(found), state(expected)):
        assert ours == theirs


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request, tmp_path_factory):
    """(options, the folder of a run with them)."""
    options = [*OPTIONS, *VARIANTS[request.param]]
    return options, finished(tmp_path_factory.mktemp("run") / request.param, *options)


def test_a_seed_repeats_a_run(variant, tmp_path):
    options, first = variant
    assert_same(finished(tmp_path / "again", *options), first)


@pytest.mark.parametrize("sampler", [("--rollout.batch_size", "7"), ("--rollout.kv_cache_gib", FEW_PAGES)], ids=str)
def test_neither_slots_nor_preemption_change_a_run(sampler, variant, tmp_path):
    options, first = variant
    assert_same(finished(tmp_path / "other", *options, *sampler), first)


@pytest.mark.parametrize("steps", [3, 8, 12, 16])
def test_a_killed_run_that_is_resumed_is_the_same(steps, variant, tmp_path):
    options, first = variant
    folder = tmp_path / "killed"
    killer = KILLER.format(signal=int(signal.SIGKILL))
    assert run(steps, *options, "--save_every=1", "--output_dir", folder, code=killer).returncode == -signal.SIGKILL
    process = run("--resume", folder)
    assert process.returncode == 0, process.stderr
    assert_same(folder, first)


def test_torch_finds_no_op_that_would_not_repeat(variant, tmp_path):
    """Nor is memory read that nothing wrote: it would be NaN."""
    options, first = variant
    environment = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # torch asks for it, whatever workspaces it has itself
    folder = finished(tmp_path / "deterministic", *options, code=DETERMINISTIC, environment=environment)
    assert all("NaN" not in json.dumps(record) for record in records(folder))


@pytest.mark.parametrize("name", ["olmo2", "gemma2", "gpt2"])
def test_transformers_layers_repeat_and_compute_what_torchs_attention_does(name):
    sizes = dict(hidden_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=64, num_hidden_layers=2)
    model = tiny(name, **({} if name == "gpt2" else sizes)).to("cuda", torch.bfloat16)
    use_op_embeddings(model)
    batch = pack_whole([[3 + i % 40] * (20 + i) for i in range(200)], "cuda")
    batch = replace(batch, input_ids=torch.randint_like(batch.input_ids, 3, 90))

    def gradients(attention):
        model.set_attn_implementation(attention)
        hidden = model.base_model(**packed_inputs(batch)).last_hidden_state
        towards = torch.linspace(-1, 1, hidden.numel(), device="cuda").view_as(hidden).to(hidden)
        return torch.autograd.grad(hidden, [p for n, p in model.named_parameters() if "lm_head" not in n], towards)

    first, plain = gradients(PACKED), gradients(PLAIN)
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(gradients(PACKED), first))
    for ours, theirs in zip(first, plain):
        assert (ours - theirs).norm() <= 0.02 * theirs.norm()
