"""Greedy decoding equals transformers' `generate`, architecture by architecture."""

import pytest
import torch

from rto_fast.config import RolloutConfig
from rto_fast.errors import ModelError
from rto_fast.models.attention import PACKED
from rto_fast.models.checks import check_causal_lm
from rto_fast.rollout import HFEngine, Sampling, build_engine
from rto_fast.rollout.attention import DenseDecode
from tests.tiny_models import ARCHITECTURES, native_engine, prompts, tiny

GREEDY = Sampling(24, min_new_tokens=0, temperature=0.0, stop_ids=(1,))


def generate_alone(model, prompt, tokens):
    ids = torch.tensor([prompt])
    model.set_attn_implementation("eager")  # of Gemma-2's softcap not every other one knows
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
    return out[0, len(prompt) :].tolist()


# Two slots: every other response is a refill; pages of 16: sequences cross pages; 11 tokens: prompts come in pieces.
WAYS = [dict(batch_size=2), dict(batch_size=3, page_size=16), dict(page_size=16, prefill_tokens=11)]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_tokens_are_those_of_generate(name):
    model = tiny(name)
    expected = [generate_alone(model, prompt, 24) for prompt in prompts()]
    for way in WAYS:
        rollout = native_engine(model, **way).generate(prompts(), 1, GREEDY)
        assert rollout.response_ids == expected, way


def test_an_architecture_without_the_attention_interface_falls_back_with_one_warning():
    from transformers import BloomConfig, BloomForCausalLM

    model = BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=1, n_head=2, vocab_size=97)).eval()
    with pytest.warns(UserWarning, match="falls back to hf.*BloomForCausalLM") as caught:
        engine = build_engine(model, None, RolloutConfig())
    assert isinstance(engine, HFEngine) and len(caught) == 1


def test_a_model_that_decodes_otherwise_than_it_trains_falls_back(monkeypatch):
    model = tiny("olmo")
    forward = type(model.model).forward

    def shifted(self, *args, position_ids, paged=None, **kwargs):
        # As a model would that counts positions by itself: a token that comes alone is always its first.
        single = isinstance(paged, DenseDecode)
        return forward(self, *args, position_ids=0 * position_ids if single else position_ids, paged=paged, **kwargs)

    monkeypatch.setattr(type(model.model), "forward", shifted)
    with pytest.warns(UserWarning, match="decoded log-probs differ from those of its forward pass by"):
        assert isinstance(build_engine(model, None, RolloutConfig()), HFEngine)


@pytest.mark.parametrize(
    "name, reason",
    [("stablelm", "its attention is given no cache"), ("deepseek_v2", r"its keys have .* \(latent attention")],
)
def test_an_architecture_that_does_not_run_on_a_paged_cache_falls_back(name, reason):
    model = tiny(name, std=None, num_key_value_heads=4, first_k_dense_replace=2)
    with pytest.warns(UserWarning, match=f"falls back to hf.*cannot be decoded natively: {reason}"):
        engine = build_engine(model, None, RolloutConfig())
    assert isinstance(engine, HFEngine) and model.config._attn_implementation != "rto_paged"


@pytest.mark.parametrize(
    "name, sizes",
    [("phimoe", {}), ("qwen2_moe", dict(use_sliding_window=True, max_window_layers=1, moe_intermediate_size=16))],
)
def test_a_window_that_only_the_mask_knows_falls_back(name, sizes):
    sizes = dict(sliding_window=12, num_local_experts=4, num_experts=4, num_experts_per_tok=2) | sizes
    model = tiny(name, std=None, **sizes)
    with pytest.warns(
        UserWarning, match="falls back to hf.*its sliding window of 12 tokens is in its attention mask only"
    ):
        assert isinstance(build_engine(model, None, RolloutConfig()), HFEngine)
    model.set_attn_implementation(PACKED)
    with pytest.raises(ModelError, match="in its attention mask only"):  # nor can it be trained on packed sequences
        check_causal_lm(model, name)


def test_positions_that_depend_on_the_batch_fall_back():
    scaling = {
        "rope_type": "longrope",
        "long_factor": [2.0] * 4,
        "short_factor": [1.0] * 4,
        "rope_theta": 10000.0,
        "factor": 2.0,
        "original_max_position_embeddings": 32,
    }
    with pytest.warns(UserWarning, match="falls back to hf.*its RoPE .longrope. changes with the longest sequence"):
        assert isinstance(build_engine(tiny("phi3", rope_parameters=scaling), None, RolloutConfig()), HFEngine)
