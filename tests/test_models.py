"""Packed forward passes against each sequence alone, on the architectures people use."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from rto_fast.batch import pack, pack_whole
from rto_fast.models.attention import PACKED
from rto_fast.models.loading import (
    ModelError,
    attention_implementation,
    causal_logps,
    check_causal_lm,
    load_causal_lm,
    load_scorer,
    token_scores,
)

SIZES = dict(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=8, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
ARCHITECTURES = {
    "llama": {},
    "qwen3": {},
    "gemma3_text": dict(sliding_window=4, layer_types=["sliding_attention", "full_attention"]),
    "gemma2": dict(sliding_window=4, attn_logit_softcapping=5.0, final_logit_softcapping=3.0),
    "mistral": dict(sliding_window=4),
    "granite": dict(logits_scaling=3.0),
    "gpt2": dict(n_embd=32, n_layer=2, n_head=4),
}


def tiny(name, cls=AutoModelForCausalLM, **extra):
    torch.manual_seed(0)
    model = cls.from_config(AutoConfig.for_model(name, **SIZES | ARCHITECTURES[name] | extra))
    with torch.no_grad():
        for p in model.parameters():  # larger than the default init, so that a leak shows
            p.add_(torch.randn_like(p) * 0.2)
    return model.eval()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_log_probs_equal_each_sequence_alone(name):
    model = tiny(name)
    model.set_attn_implementation(PACKED)
    sequences = [torch.randint(3, 61, (n,)).tolist() for n in (9, 2, 17, 12)]
    packed = causal_logps(model, pack([s[:1] for s in sequences], [s[1:] for s in sequences]))
    model.set_attn_implementation("eager")
    alone = []
    for s in sequences:
        logits = model(torch.tensor([s]), use_cache=False).logits[0, :-1].double()
        alone.append(logits.log_softmax(-1).gather(-1, torch.tensor(s[1:])[:, None])[:, 0])
    torch.testing.assert_close(packed.double(), torch.cat(alone), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text"])
def test_a_sequence_does_not_see_its_neighbours(name):
    model = tiny(name)
    model.set_attn_implementation(PACKED)
    first, second, other = ([int(t) for t in torch.randint(3, 61, (n,))] for n in (11, 8, 11))
    before = causal_logps(model, pack([[], []], [first, second]))[10:]
    after = causal_logps(model, pack([[], []], [other, second]))[10:]
    assert torch.equal(before, after)


@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral"])
def test_packed_gradients_equal_those_of_the_sequences_alone(name):
    model = tiny(name).double()
    sequences = [torch.randint(3, 61, (n,)).tolist() for n in (9, 2, 12)]
    weights = torch.randn(20, dtype=torch.float64)

    def gradients(batches, weights):
        model.zero_grad()
        for batch, weight in zip(batches, weights):
            (causal_logps(model, batch) * weight).sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    model.set_attn_implementation(PACKED)
    together = gradients([pack([[]] * 3, sequences)], [weights])
    apart = gradients([pack([[]], [s]) for s in sequences], weights.split([8, 1, 11]))
    for a, b in zip(together, apart):
        # eager softcapped attention keeps its softmax in float32
        torch.testing.assert_close(a, b, atol=1e-6 if name == "gemma2" else 1e-10, rtol=1e-6)


def test_scores_equal_hugging_faces_last_token_score():
    model = tiny("llama", AutoModelForSequenceClassification, num_labels=1)
    sequences = [torch.randint(3, 61, (n,)).tolist() for n in (9, 1, 12)]
    expected = torch.cat([model(torch.tensor([s])).logits[0] for s in sequences])
    model.set_attn_implementation(PACKED)
    batch = pack_whole(sequences)
    torch.testing.assert_close(token_scores(model, batch)[batch.last], expected, atol=1e-5, rtol=1e-5)


def test_a_model_with_an_unknown_logit_transformation_is_refused():
    model = tiny("llama")
    model.set_attn_implementation(PACKED)
    check_causal_lm(model, "good")
    head = model.lm_head.forward
    model.lm_head.forward = lambda x: 1.5 * head(x)
    with pytest.raises(ModelError, match="bad: packed log-probs differ"):
        check_causal_lm(model, "bad")


def test_loads_from_a_directory_and_restores_the_attention(tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    options = dict(device="cpu", dtype=torch.float32)
    model = load_causal_lm(tmp_path, trainable=True, **options)
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert model.config._attn_implementation == PACKED
    with pytest.raises(RuntimeError), attention_implementation(model, "sdpa"):
        raise RuntimeError
    assert model.config._attn_implementation == PACKED
    scorer = load_scorer(tmp_path, trainable=False, new_head=True, **options)
    assert not any(p.requires_grad for p in scorer.parameters())
    assert not scorer.score.weight.any() and torch.equal(
        scorer.model.embed_tokens.weight, model.model.embed_tokens.weight
    )
    with pytest.raises(ModelError, match="nowhere"):
        load_causal_lm(tmp_path / "nowhere", trainable=False, **options)


def test_checkpoints_of_another_kind_are_refused(tmp_path):
    options = dict(device="cpu", dtype=torch.float32, trainable=False)
    tiny("llama", AutoModelForSequenceClassification, num_labels=2).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="lacks weights: lm_head.weight"):
        load_causal_lm(tmp_path, **options)
    with pytest.raises(ModelError, match="its score head has 2 labels; a reward model or critic has one"):
        load_scorer(tmp_path, **options)


OTHER_ATTENTION = {
    "stablelm": (dict(), "its attention is not told where the packed sequences begin"),
    "doge": (dict(), "packed attention takes no attention_mask, attention sinks"),
    "gpt_neo": (
        dict(num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]),
        "does not use transformers' ",
    ),
}


@pytest.mark.parametrize("name", OTHER_ATTENTION)
def test_attention_that_cannot_be_packed_is_refused_in_one_line(name, tmp_path, capfd):
    settings, message = OTHER_ATTENTION[name]
    AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **SIZES | settings)).save_pretrained(tmp_path)
    capfd.readouterr()
    options = {"device": "cpu", "dtype": torch.float32, "trainable": True}
    for load, head in ((load_causal_lm, {}), (load_scorer, {"new_head": True})):
        with pytest.raises(ModelError, match=message) as refused:
            load(str(tmp_path), **options, **head)
        assert str(refused.value).startswith(f"{tmp_path}: ") and "\n" not in str(refused.value)
    assert "[transformers]" not in capfd.readouterr().err


def test_a_new_head_does_not_hide_that_sequences_leak(tmp_path):
    """Jamba has layers that carry a state into the next sequence."""
    settings = dict(num_experts=2, mamba_d_state=4, mamba_dt_rank=4, attn_layer_period=2, attn_layer_offset=1)
    AutoModelForCausalLM.from_config(AutoConfig.for_model("jamba", **SIZES | settings)).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="or does not respect packing"):
        load_scorer(str(tmp_path), device="cpu", dtype=torch.float32, trainable=True, new_head=True)
