"""The sampler's log-probs are those of training passes, to the bit, on a GPU in bfloat16. Three minutes at most:

    python -m pytest tests/rollout/test_exact_cuda.py

The weights are random and the shapes those of models. `test_exact.py` shows on a CPU what Triton's interpreter can show.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rto_fast.config import LoraConfig, RolloutConfig, load_config
from rto_fast.models import joined_linear
from rto_fast.models.attention import PACKED
from rto_fast.models.graphs import PassGraphs
from rto_fast.models.lora import new_adapter
from rto_fast.models.model import Model
from rto_fast.models.placement import lay_side_by_side, projection_groups
from rto_fast.rollout import NativeEngine, Sampling
from rto_fast.training.optimizer import Optimizer
from tests.exactness import differing, first_step
from tests.tiny_models import AutoModelForCausalLM, tiny_config

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
ROOT = Path(__file__).parents[2]
CONFIG = load_config(["--config", "default"])
DEVICE, SEQUENCES, LONGEST = "cuda", 256, 144


def sizes(hidden, intermediate, layers, heads, kv_heads, head_dim, vocabulary):
    return dict(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=vocabulary,
        max_position_embeddings=4096,
    )


WIDE = sizes(512, 1024, 4, 8, 2, 64, 2000)
SHAPES = {
    "tiny": ("llama", sizes(64, 128, 2, 4, 2, 16, 97)),
    "wide": ("llama", WIDE),
    "SmolLM2-135M": ("llama", sizes(576, 1536, 30, 9, 3, 64, 49152)),
    "Qwen3-0.6B": ("qwen3", sizes(1024, 3072, 28, 16, 8, 128, 151936)),
    "two layers of Llama-3-8B": ("llama", sizes(4096, 14336, 2, 32, 8, 128, 128256)),
    "Qwen2": ("qwen2", sizes(896, 4864, 4, 14, 2, 64, 9000)),
    "Gemma-2": (
        "gemma2",
        sizes(1024, 4096, 4, 4, 2, 256, 9000)
        | dict(
            sliding_window=300, query_pre_attn_scalar=256, attn_logit_softcapping=50.0, final_logit_softcapping=30.0
        ),
    ),
    "Granite": ("granite", WIDE | dict(residual_multiplier=0.22, embedding_multiplier=12.0, logits_scaling=8.0)),
    "Phi-3": ("phi3", WIDE | dict(sliding_window=2000)),
}


def made(shape="wide", std=0.04, trains=True):
    """A model with logits that are not flat, its projections side by side as `load_model` lays them."""
    torch.manual_seed(1)
    name, options = SHAPES[shape]
    with torch.device(DEVICE):
        module = AutoModelForCausalLM.from_config(tiny_config(name, **options), dtype=torch.bfloat16)
        with torch.no_grad():
            for parameter in module.parameters():
                # Of norms and biases too: weights of 1 would hide a product.
                parameter.normal_(std=std) if parameter.dim() > 1 else parameter.add_(std * torch.randn_like(parameter))
    module.train(trains).requires_grad_(trains)
    module.set_attn_implementation(PACKED)
    lay_side_by_side(projection_groups(module))
    return module


def prompts(vocabulary, count=None, shortest=20, longest=700, seed=0):
    generator, count = torch.Generator().manual_seed(seed), count or SEQUENCES
    lengths = torch.linspace(shortest, longest, count).long()[torch.randperm(count, generator=generator)]
    return [torch.randint(3, vocabulary, (n,), generator=generator).tolist() for n in lengths.tolist()]


def engine_of(model, batch_size=None, **settings):
    engine = NativeEngine(model, None, RolloutConfig(batch_size=batch_size or SEQUENCES, **settings))
    assert engine.exactness.holds, str(engine.exactness)
    return engine


def shrinking(count):
    """Limits of responses by which half of the sequences that are left end every 16 steps, down to one alone."""
    return [16 * (count // (count - i)).bit_length() for i in range(count)]


@pytest.mark.parametrize("shape", SHAPES)
def test_log_probs_are_those_of_training_in_all_buckets(shape):
    model = made(shape)
    engine, ids = engine_of(model), prompts(SHAPES[shape][1]["vocab_size"])
    rollout = engine.generate(ids, 1, Sampling(LONGEST, temperature=0.9), 0, limits=shrinking(len(ids)))
    assert rollout.exact and max(engine.step.steps) == SEQUENCES and min(engine.step.steps) == 1
    assert len(engine.step.steps) >= 6, engine.step.steps  # buckets
    assert differing(model, rollout, 0.9) == 0


def test_samples_do_not_depend_on_their_batch():
    """A sample depends on seed, prompt and position alone: in a batch of one, of seven, of all, and in another order."""
    ids, sampling = prompts(2000), Sampling(24, stop_ids=(1, 7))
    model = made()
    expected = engine_of(model).generate(ids, 1, sampling, 3)
    parts = expected.logps.split([len(response) for response in expected.response_ids])
    backwards = list(range(len(ids)))[::-1]
    for batch_size, numbers in ((1, backwards[:6]), (7, backwards[::9]), (SEQUENCES, backwards)):
        engine = engine_of(model, batch_size)
        found = engine.generate([ids[i] for i in numbers], 1, sampling, 3, prompt_numbers=numbers)
        assert found.response_ids == [expected.response_ids[i] for i in numbers]
        assert torch.equal(found.logps, torch.cat([parts[i] for i in numbers]))


def test_filters_change_only_the_distribution_that_is_sampled():
    model = made("Gemma-2")
    rollout = engine_of(model).generate(prompts(9000, 40), 1, Sampling(32, temperature=0.7, top_p=0.9, top_k=50), 0)
    assert differing(model, rollout, 0.7) == 0
    assert not torch.equal(rollout.logps, rollout.sampling_logps)


def test_samples_that_were_preempted_and_refilled():
    model, sampling, ids = made(), Sampling(300), prompts(2000, 24, 20, 300)
    expected = engine_of(model).generate(ids, 2, sampling, 0)
    room = expected.num_tokens * 4 * 2 * 2 * 64 * 2 / 3 / (1 << 30)  # a third of the keys and values of all responses
    found = engine_of(model, kv_cache_gib=room).generate(ids, 2, sampling, 0)
    assert found.stats["preemptions"] > 0 == expected.stats["preemptions"]
    assert found.response_ids == expected.response_ids and torch.equal(found.logps, expected.logps)
    assert differing(model, found) == 0


@pytest.mark.parametrize("shape", ["wide", "Granite"])
@pytest.mark.parametrize("graphs", [False, True])
def test_the_ratio_is_one_after_every_update(shape, graphs):
    """Of the loss that trains, eagerly and in a CUDA graph, with the optimizer and the gradients of a run."""
    model = Model(made(shape))
    engine, optimizer = engine_of(model), Optimizer(model, CONFIG.rto, CONFIG.optimizer, 100, 1e-3)
    model.graphs = PassGraphs(model.module) if graphs else None
    ids = prompts(2000, 32, 20, 300)
    for seed in range(5):
        rollout = engine.generate(ids, 1, Sampling(24), seed)
        optimizer.zero_grad()
        metrics = first_step(model, rollout, backward=optimizer.backward)
        assert metrics["approx_kl"] == metrics["clip_fraction"] == 0.0
        assert differing(model, rollout) == 0
        optimizer.step()
        assert differing(model, rollout) > 0  # the weights have moved
    optimizer.release()
    PassGraphs.drop()


@pytest.mark.parametrize("shape", ["wide", "Qwen2"])
def test_lora(shape):
    pytest.importorskip("peft", reason="LoRA needs PEFT (the lora extra)")
    adapter = new_adapter(made(shape, trains=False), "policy", LoraConfig(rank=16), 0)
    torch.manual_seed(0)
    for _, parameter in adapter.trainable():
        parameter.data += 0.02 * torch.randn_like(parameter)
    model, ids = Model(adapter), prompts(2000)
    rollout = engine_of(model).generate(ids, 1, Sampling(LONGEST), 0, limits=shrinking(len(ids)))
    assert differing(model, rollout) == 0
    assert first_step(model, rollout)["approx_kl"] == 0.0


@pytest.mark.parametrize("shape", ["wide", "Granite", "Gemma-2"])
def test_gradient_checkpointing(shape):
    """A layer then adds to the residual stream by torch, and norms alone, where it otherwise does both in one kernel."""
    model = made(shape)
    rollout = engine_of(model).generate(prompts(2000, 32), 1, Sampling(24), 0)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert differing(model, rollout) == 0 and first_step(model, rollout)["approx_kl"] == 0.0


@pytest.mark.parametrize("number", [0, 5, -1])
def test_one_rounding_in_one_product_is_noticed(number, monkeypatch):
    """One element of each row of one product of a training pass is the next bfloat16."""
    model, calls, linear = made(), [], joined_linear.linear
    rollout = engine_of(model).generate(prompts(2000, 8, 20, 60), 1, Sampling(24), 0)

    def planted(*args, **options):
        y = linear(*args, **options)
        calls.append(None)
        if len(calls) - 1 == number % 16:  # four products a layer
            y.view(torch.int16)[:, -1] += 1
        return y

    monkeypatch.setattr(joined_linear, "linear", planted)
    assert differing(model, rollout) > 0 and len(calls) >= 16


def test_200_iterations_of_the_default_run(tmp_path):
    """With weights that move, old log-probs are the sampler's, and the first step of every iteration has a ratio of 1."""
    short = {f"{stage}.max_steps": 20 for stage in ("sft", "reward_model", "dpo")}
    options = short | {"rto.iterations": 200, "eval.prompts": 16, "output_dir": tmp_path / "run", "dtype": "bfloat16"}
    options["model.dtype"] = options.pop("dtype")
    command = [sys.executable, "-m", "rto_fast.train", "--config", "default"]
    command += [f"--{key}={value}" for key, value in options.items()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in open(tmp_path / "run" / "metrics.jsonl")]
    steps = [record for record in records if record["stage"] == "rto" and "approx_kl" in record]
    assert len(steps) == 200 and any(record["approx_kl"] > 0 for record in steps)
    assert [record["step"] for record in steps if record["first_step_kl"] != 0] == []
    assert not any("mismatch_mean" in record for record in steps)  # nothing was computed anew
