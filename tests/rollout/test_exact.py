"""The sampler's log-probs are those of training passes, to the bit: what a CPU can show of it, in Triton's interpreter.

Everything between token ids and log-probs runs as on a GPU: the engine's decode steps in buckets over a paged cache, the
kernels of the layers, of attention, of the sampler and of the losses. Two things are replaced, because their order of sums
is not a GPU's: `tl.dot` (`ordered_dot`) and torch's products (`RowProducts`). `test_exact_cuda.py` is the proof on a GPU.
"""

import pytest
import torch

from rto_fast.config import LoraConfig
from rto_fast.kernels import arguments, attention_forward
from rto_fast.models.lora import new_adapter
from rto_fast.models.model import Model
from rto_fast.rollout import Exactness, Sampling, attention, decode, exactness, native
from tests.exactness import RowProducts, differing, first_step
from tests.tiny_models import native_engine, perturbed, prompts, tiny

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has its own tests: test_exact_cuda.py")
LENGTHS = (3, 22, 14)  # the second is prefilled in two pieces; the third is decoded into a second page
SAMPLING = Sampling(3, stop_ids=(1, 7))
FAMILIES = [("qwen3", torch.float32), ("qwen2", torch.float16), ("gemma2", torch.float32), ("phi3", torch.float32)]


@pytest.fixture(autouse=True)
def as_on_a_gpu(ordered_dot, monkeypatch):
    """What Triton computes on a GPU runs in the interpreter, and products of torch in an order that knows no rows."""
    monkeypatch.setattr(arguments, "INTERPRET", True)
    for module in (attention, decode, native):
        monkeypatch.setattr(module, "runs_triton", lambda _: True)
    monkeypatch.setattr(exactness, "measure", lambda *_: Exactness())  # thousands of tokens
    # The engine's own check that it decodes the model, on few tokens: here it takes longer than the test.
    monkeypatch.setattr(native, "PROMPT_LENGTHS", (2, 3))
    monkeypatch.setattr(native, "DECODED", 2)
    with RowProducts():
        yield


def made(name="llama", dtype=torch.float32, **sizes):
    layers = 2 if name == "gemma2" else 1  # its layers are of two kinds
    sizes = dict(num_hidden_layers=layers, num_attention_heads=2, num_key_value_heads=1) | sizes
    return perturbed(tiny(name, max_position_embeddings=512, **sizes), 0.05).to(dtype).train()


def engine_of(model, batch_size=8, **settings):
    return native_engine(model, page_size=16, batch_size=batch_size, **{"prefill_tokens": 24} | settings)


@pytest.mark.parametrize("name, dtype", FAMILIES)
def test_a_familys_log_probs_are_those_of_training(name, dtype):
    model = made(name, dtype)
    assert differing(model, engine_of(model).generate(prompts(LENGTHS), 1, SAMPLING, 0)) == 0


def test_splits_of_keys(monkeypatch):
    """They begin at a sequence's start, and end within prompts, pieces of prompts and responses. Others are noticed."""
    monkeypatch.setattr(attention_forward, "SPLIT_KEYS", 64)  # instead of 256
    model = made()
    rollout = engine_of(model, prefill_tokens=50).generate(prompts((80, 62)), 1, Sampling(4), 0)
    assert differing(model, rollout) == 0
    monkeypatch.setattr(attention_forward, "SPLIT_KEYS", 128)
    assert differing(model, rollout) > 0


def test_a_sample_is_the_same_in_any_batch():
    model = made()
    expected = engine_of(model).generate(prompts(LENGTHS), 2, SAMPLING, 0)
    for batch_size in (1, 3):
        found = engine_of(model, batch_size).generate(prompts(LENGTHS), 2, SAMPLING, 0)
        assert found.response_ids == expected.response_ids
        assert torch.equal(found.logps, expected.logps) and torch.equal(found.sampling_logps, expected.sampling_logps)


def test_samples_that_were_preempted_and_refilled():
    """Their keys are computed anew, as a prompt's, where they were once computed token by token."""
    model, sampling = made(), Sampling(8)
    engine = engine_of(model)
    expected = engine.generate(prompts((9, 25)), 2, sampling, 0)
    room = 8 * engine.cache.page_bytes / (1 << 30)
    found = engine_of(model, kv_cache_gib=room).generate(prompts((9, 25)), 2, sampling, 0)
    assert found.stats["preemptions"] > 0 == expected.stats["preemptions"]
    assert found.response_ids == expected.response_ids and torch.equal(found.logps, expected.logps)
    assert differing(model, found) == 0


def test_the_ratio_is_one_at_the_first_step_and_after_an_update():
    model, temperature = made(), 0.7
    engine, sampling = engine_of(model), Sampling(4, temperature=temperature, top_p=0.9, stop_ids=(1, 7))
    rollout = engine.generate(prompts(LENGTHS), 1, sampling, 0)
    metrics = first_step(model, rollout, temperature)
    assert metrics["approx_kl"] == metrics["clip_fraction"] == 0.0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 1e-2 * parameter.grad
    assert first_step(model, rollout, temperature, backward=torch.detach)["approx_kl"] > 0.0
    rollout = engine.generate(prompts(LENGTHS), 1, sampling, 1)
    assert first_step(model, rollout, temperature, backward=torch.detach)["approx_kl"] == 0.0


@pytest.mark.parametrize("name, dtype, size", [("llama", torch.float32, 64), ("qwen2", torch.float16, 288)])
def test_lora(name, dtype, size):
    """Inputs of 288 elements have splits, which decoding leaves to several programs."""
    pytest.importorskip("peft", reason="LoRA needs PEFT (the lora extra)")
    model = made(name, dtype, hidden_size=size, intermediate_size=96)
    adapter = new_adapter(model.requires_grad_(False), "policy", LoraConfig(rank=2, alpha=4.0), 0)
    torch.manual_seed(0)
    for _, parameter in adapter.trainable():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model = Model(adapter)
    assert differing(model, engine_of(model).generate(prompts(LENGTHS), 1, SAMPLING, 0)) == 0


def test_gradient_checkpointing():
    """A layer then multiplies and adds by torch, and norms alone, where it otherwise does all in one kernel.

    In float16, where each of these steps rounds.
    """
    model = made("granite", torch.float16)
    rollout = engine_of(model).generate(prompts(LENGTHS), 1, SAMPLING, 0)
    assert differing(model, rollout) == 0
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert differing(model, rollout) == 0


@pytest.mark.parametrize("product", [0, 6], ids=["values of a prompt", "attention's output in a decode step"])
def test_one_rounding_in_one_product_is_noticed(product):
    model = made(dtype=torch.float16)  # in float32 the next number of an element may be rounded away again
    engine = engine_of(model)
    with RowProducts(planted=product):
        rollout = engine.generate(prompts((5, 9)), 1, Sampling(4), 0)
    assert differing(model, rollout) > 0
