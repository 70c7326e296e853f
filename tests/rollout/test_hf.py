"""The Hugging Face rollout engine, on the embedded world's model."""

import pytest
import torch
from transformers import GenerationConfig

from rto_fast.config import RolloutConfig
from rto_fast.data.world import build_model, build_tokenizer
from rto_fast.errors import ModelError
from rto_fast.models.attention import PACKED
from rto_fast.rollout import Sampling, build_engine

TOKENIZER = build_tokenizer()
PROMPTS = [[2, 13, 29, 30, 3], [2, 9, 25, 33, 5, 8, 26, 31, 3], [2, 10, 3]]


@pytest.fixture
def model():
    model = build_model(0)
    model.set_attn_implementation(PACKED)
    return model.train()


def engine(model, batch_size=8):
    return build_engine(model, TOKENIZER, RolloutConfig(engine="hf", batch_size=batch_size))


def sampling(**options):
    return Sampling(**{"max_new_tokens": 12, "stop_ids": (1,)} | options)


def test_samples_of_a_prompt_lie_side_by_side_and_end_at_the_stop_token(model):
    rollout = engine(model).generate(PROMPTS, 40, sampling(), seed=0)
    assert rollout.prompt_ids == [p for p in PROMPTS for _ in range(40)]
    for response, finished in zip(rollout.response_ids, rollout.finished):
        assert 1 <= len(response) <= 12
        assert finished == (response[-1] == 1) and 1 not in response[:-1]
        assert finished or len(response) == 12
    assert any(rollout.finished) and not all(rollout.finished)
    assert rollout.num_tokens == sum(map(len, rollout.response_ids)) and rollout.timings["rollout"] > 0


def test_a_seed_repeats_and_leaves_the_global_random_state_alone(model):
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    first = engine(model).generate(PROMPTS, 2, sampling(), seed=3)
    assert torch.equal(before, torch.random.get_rng_state())
    again, other = (engine(model).generate(PROMPTS, 2, sampling(), seed=s) for s in (3, 4))
    assert first.response_ids == again.response_ids != other.response_ids


def test_samples_follow_the_policy_at_temperature_one(model):
    """First tokens of 4,000 samples against the model's own probabilities (chi-square, 48 degrees of freedom)."""
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        logits = model(torch.tensor(PROMPTS[:1])).logits[0, -1]
    logits[1] = -torch.inf  # at least one token before the stop
    expected = 4000 * logits.softmax(-1)
    model.set_attn_implementation(PACKED)
    rollout = engine(model, 4000).generate(PROMPTS[:1], 4000, sampling(max_new_tokens=2, min_new_tokens=2), seed=0)
    counts = torch.bincount(torch.tensor([r[0] for r in rollout.response_ids]), minlength=49)
    chi_square = ((counts - expected).square() / expected.clamp(min=1e-9))[expected > 0].sum().item()
    assert chi_square < 92.0  # P(chi² > 92) = 1e-4
    assert counts[1] == 0


def test_the_models_own_generation_config_neither_matters_nor_changes(model):
    plain = engine(model).generate(PROMPTS, 2, sampling(), seed=0)
    model.generation_config = odd = GenerationConfig(repetition_penalty=50.0, top_k=1, do_sample=False)
    assert engine(model).generate(PROMPTS, 2, sampling(), seed=0).response_ids == plain.response_ids
    assert model.generation_config is odd


def test_the_model_is_restored_even_after_an_exception(model, monkeypatch):
    def fail(**_):
        raise RuntimeError("interrupted")

    defaults, built = model.generation_config, engine(model)
    monkeypatch.setattr(model, "generate", fail)
    with pytest.raises(RuntimeError, match="interrupted"):
        built.generate(PROMPTS, 1, sampling(), seed=0)
    assert model.training and model.config._attn_implementation == PACKED and model.generation_config is defaults


def test_a_model_that_generate_cannot_decode_is_refused_in_one_line_before_any_rollout(model, monkeypatch):
    def no_such_layer(self, *args, **options):
        raise IndexError("list index out of range")

    monkeypatch.setattr(type(model.model.layers[0].self_attn), "forward", no_such_layer)
    with pytest.raises(
        ModelError, match=r"LlamaForCausalLM cannot be decoded by transformers' generate: model.layers.0.self_attn"
    ):
        engine(model)
    assert model.training and model.config._attn_implementation == PACKED


def test_left_padding_does_not_change_what_a_prompt_gets(model):
    """A low temperature is greedy in the limit; responses are the same alone and beside a longer prompt."""
    cold = sampling(temperature=1e-4)
    together = engine(model).generate(PROMPTS, 1, cold, seed=0).response_ids
    alone = [engine(model).generate([p], 1, cold, seed=0).response_ids[0] for p in PROMPTS]
    assert together == alone
