"""Packed forward passes against each sequence alone, on the architectures people use."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rto_fast.batch import pack, pack_whole
from rto_fast.errors import ModelError
from rto_fast.models.attention import PACKED, attention_implementation
from rto_fast.models.checks import check_causal_lm
from rto_fast.models.forward import causal_logps, token_scores
from rto_fast.models.loading import load_model
from tests.tiny_models import perturbed, tiny

PLACEMENT = {"device": "cpu", "dtype": torch.float32, "trainable": False}
SIZES = dict(vocab_size=61, head_dim=8, max_position_embeddings=128, bos_token_id=1, eos_token_id=2)
WINDOW = {"sliding_window": 4}
ARCHITECTURES = {
    "llama": {},
    "qwen3": {},
    "gemma3_text": WINDOW,
    "gemma2": WINDOW,
    "mistral": WINDOW,
    "granite": {},
    "gpt2": {},
}


def made(name, auto_class=AutoModelForCausalLM, **sizes):
    """With weights larger than those of its class, so that a leak shows."""
    return perturbed(tiny(name, auto_class, seed=0, std=None, **SIZES | ARCHITECTURES[name] | sizes), 0.2)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_log_probs_equal_each_sequence_alone(name):
    model = made(name)
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
    model = made(name)
    model.set_attn_implementation(PACKED)
    first, second, other = ([int(t) for t in torch.randint(3, 61, (n,))] for n in (11, 8, 11))
    before = causal_logps(model, pack([[], []], [first, second]))[10:]
    after = causal_logps(model, pack([[], []], [other, second]))[10:]
    assert torch.equal(before, after)


@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral"])
def test_packed_gradients_equal_those_of_the_sequences_alone(name):
    model = made(name).double()
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
    model = made("llama", AutoModelForSequenceClassification, num_labels=1)
    sequences = [torch.randint(3, 61, (n,)).tolist() for n in (9, 1, 12)]
    expected = torch.cat([model(torch.tensor([s])).logits[0] for s in sequences])
    model.set_attn_implementation(PACKED)
    batch = pack_whole(sequences)
    torch.testing.assert_close(token_scores(model, batch)[batch.last], expected, atol=1e-5, rtol=1e-5)


def test_a_model_with_an_unknown_logit_transformation_is_refused():
    model = made("llama")
    model.set_attn_implementation(PACKED)
    check_causal_lm(model, "good")
    head = model.lm_head.forward
    model.lm_head.forward = lambda x: 1.5 * head(x)
    with pytest.raises(ModelError, match="bad: packed log-probs differ"):
        check_causal_lm(model, "bad")


def test_loads_from_a_directory_and_restores_the_attention(tmp_path):
    made("llama").save_pretrained(tmp_path)
    options = dict(device="cpu", dtype=torch.float32)
    model = load_model("causal_lm", tmp_path, trainable=True, **options)
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert model.config._attn_implementation == PACKED
    with pytest.raises(RuntimeError), attention_implementation(model, "sdpa"):
        raise RuntimeError
    assert model.config._attn_implementation == PACKED
    scorer = load_model("scorer", tmp_path, trainable=False, new_head=True, **options)
    assert not any(p.requires_grad for p in scorer.parameters())
    assert not scorer.score.weight.any() and torch.equal(
        scorer.model.embed_tokens.weight, model.model.embed_tokens.weight
    )
    with pytest.raises(ModelError, match="nowhere"):
        load_model("causal_lm", tmp_path / "nowhere", trainable=False, **options)


def test_checkpoints_of_another_kind_are_refused(tmp_path):
    options = dict(device="cpu", dtype=torch.float32, trainable=False)
    made("llama", AutoModelForSequenceClassification, num_labels=2).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="lacks weights: lm_head.weight"):
        load_model("causal_lm", tmp_path, **options)
    with pytest.raises(ModelError, match="its score head has 2 labels; a reward model or critic has one"):
        load_model("scorer", tmp_path, **options)


OTHER_ATTENTION = {
    "stablelm": (dict(), "its attention is not told where the packed sequences begin"),
    "doge": (dict(), r"self_attn \(DogeAttention\) cannot run .* needs a mask of its own \(attention_mask\)"),
    "gpt_oss": (
        dict(num_local_experts=2, num_experts_per_tok=1),
        r"self_attn \(GptOssAttention\) cannot run .* needs attention sinks \(s_aux\), which packed attention does",
    ),
    "gpt_neo": (
        dict(num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]),
        "does not use transformers' ",
    ),
}


@pytest.mark.parametrize("name", OTHER_ATTENTION)
def test_attention_that_cannot_be_packed_is_refused_in_one_line(name, tmp_path, capfd):
    settings, message = OTHER_ATTENTION[name]
    tiny(name, std=None, **SIZES | settings).save_pretrained(tmp_path)
    capfd.readouterr()
    options = {"device": "cpu", "dtype": torch.float32, "trainable": True}
    for kind, head in (("causal_lm", {}), ("scorer", {"new_head": True})):
        with pytest.raises(ModelError, match=message) as refused:
            load_model(kind, str(tmp_path), **options, **head)
        assert str(refused.value).startswith(f"{tmp_path}: ") and "\n" not in str(refused.value)
    assert "[transformers]" not in capfd.readouterr().err


MAMBA = dict(mamba_d_state=4, mamba_dt_rank=4, state_size=4, time_step_rank=4)
RECURRENT = {
    "lfm2": (
        dict(layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False),
        "conv.conv.weight",
        "Lfm2ShortConv",
    ),
    "mamba": (MAMBA, "conv1d.weight", "MambaMixer"),
    "mamba2": (dict(num_heads=8, head_dim=8, n_groups=1, state_size=4, chunk_size=8), "conv1d.weight", "Mamba2Mixer"),
    "jamba": (
        MAMBA | dict(num_experts=2, attn_layer_period=2, attn_layer_offset=1),
        "dt_proj.weight",
        "JambaMambaMixer",
    ),
    "minimax": (
        dict(num_local_experts=2, layer_types=["linear_attention", "full_attention"]),
        "out_proj.weight",
        "MiniMaxLightningAttention",
    ),
    "recurrent_gemma": (
        dict(block_types=["recurrent", "attention"], lru_width=32),
        "linear_out.weight",
        "RecurrentGemmaRecurrentBlock",
    ),
}


def write_weak(folder, name):
    """A model with layers that carry a state into the next sequence, all but invisibly."""
    settings, weak, layer = RECURRENT[name]
    model = tiny(name, seed=0, std=None, **SIZES | settings)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith(weak):
                parameter.mul_(1e-4)
    model.save_pretrained(folder)
    return layer


@pytest.mark.parametrize("name", RECURRENT)
def test_layers_that_carry_a_state_into_the_next_sequence_are_refused_however_weak(name, tmp_path):
    layer = write_weak(tmp_path, name)
    with pytest.raises(ModelError, match=rf"layers\.[01]\.\S+ \({layer}\) lets a packed sequence see its neighbours"):
        load_model("causal_lm", str(tmp_path), **PLACEMENT)


def test_a_new_head_does_not_hide_that_sequences_leak(tmp_path):
    write_weak(tmp_path, "jamba")
    with pytest.raises(ModelError, match="lets a packed sequence see its neighbours"):
        load_model("scorer", str(tmp_path), new_head=True, **PLACEMENT)


def leaks_in_training(module, inputs, output):
    return output + 1e-9 * output.mean(1, keepdim=True) if module.training else output


def leaks_token_ids(module, inputs, output):
    return output + 1e-2 * torch.nn.functional.pad(inputs[0], (1, 0))[:, :-1, None].float()


def leaks_backwards(module, inputs, output):
    return output + 1e-9 * output.roll(-1, 1)


@pytest.mark.parametrize(
    "fault, where",
    [
        (leaks_in_training, "model.layers.1.mlp"),
        (leaks_backwards, "model.layers.0.self_attn.o_proj"),
        (leaks_token_ids, "model.embed_tokens"),
    ],
)
def test_a_planted_leak_is_found_and_its_layer_named(fault, where):
    model = made("llama")
    model.set_attn_implementation(PACKED)
    check_causal_lm(model, "good")
    model.get_submodule(where).register_forward_hook(fault)
    with pytest.raises(ModelError, match=rf"^bad: .*{where} \("):
        check_causal_lm(model, "bad")


DROPOUT = {
    "opt": dict(dropout=0.3, attention_dropout=0.3, layerdrop=0.5, ffn_dim=48, word_embed_proj_dim=32),
    "seed_oss": dict(residual_dropout=0.3, attention_dropout=0.3),
    "biogpt": dict(hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3, activation_dropout=0.3, layerdrop=0.5),
    "gpt_bigcode": dict(attn_pdrop=0.3, resid_pdrop=0.3, embd_pdrop=0.3),
    "mixtral": dict(router_jitter_noise=0.3, attention_dropout=0.3, num_local_experts=2),
    "gpt2": dict(attn_pdrop=0.3, resid_pdrop=0.3, embd_pdrop=0.3),
}


@pytest.mark.parametrize("name", DROPOUT)
def test_dropout_of_whatever_kind_is_off_in_training(name, tmp_path):
    tiny(name, std=None, **SIZES | DROPOUT[name]).save_pretrained(tmp_path)
    batch = pack([[5, 6]] * 2, [[7, 8, 9], [10, 11, 12, 13]])
    heads = [("causal_lm", causal_logps, {})]
    heads += [] if name == "seed_oss" else [("scorer", token_scores, {"new_head": True})]
    for kind, run, head in heads:
        model = load_model(kind, str(tmp_path), **PLACEMENT | {"trainable": True}, **head)
        assert model.training
        for _ in range(4):
            torch.testing.assert_close(run(model, batch), run(model, batch), atol=0, rtol=0)
        trained = run(model, batch)
        torch.testing.assert_close(trained, run(model.eval(), batch))


def test_what_stays_random_is_refused_with_the_layer(tmp_path):
    tiny("phimoe", std=None, **SIZES, num_local_experts=4, router_jitter_noise=0.3).save_pretrained(tmp_path)
    for kind, head in (("causal_lm", {}), ("scorer", {"new_head": True})):
        with pytest.raises(
            ModelError, match=r"layers\.0\.mlp\.router \(PhimoeTopKRouter\) draws random numbers in training"
        ):
            load_model(kind, str(tmp_path), **PLACEMENT, **head)


@pytest.mark.parametrize(
    "noise, reason",
    [
        (lambda x: x + 0.1 * torch.randn_like(x), "draws random numbers in training mode"),
        (lambda x: 1.1 * x, "computes something else in training mode than in evaluation mode"),
    ],
)
def test_a_training_mode_that_computes_something_else_is_refused_with_the_layer(noise, reason):
    model = made("llama")
    model.set_attn_implementation(PACKED)
    model.model.layers[1].mlp.register_forward_hook(lambda mlp, inputs, out: noise(out) if mlp.training else out)
    with pytest.raises(ModelError, match=rf"noisy: model\.layers\.1\.mlp \(LlamaMLP\) {reason}"):
        check_causal_lm(model, "noisy")
    assert not model.training
