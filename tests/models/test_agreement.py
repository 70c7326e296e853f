"""Rounding or a fault: right computations pass in every dtype, planted faults do not, PPO's limits follow from its clip."""

import os

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rto_fast.batch import pack, pack_whole
from rto_fast.errors import ModelError
from rto_fast.kernels import layer_reference
from rto_fast.models import attention, precision
from rto_fast.models.agreement import Noise, compare_logits, compare_values, k3_limit, mismatch, ppo_notices
from rto_fast.models.attention import PACKED
from rto_fast.models.checks import check_causal_lm, check_scorer
from rto_fast.models.forward import causal_logps, forward_hidden, packed_inputs, packed_logits, precise_logps
from rto_fast.models.precision import higher_precision, precise
from rto_fast.rollout.model import RolloutModel
from rto_fast.rollout.native import verified_cache
from tests.tiny_models import ARCHITECTURES, tiny

REAL = os.environ.get("RTO_FAST_SMOLLM2")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
needs_real = pytest.mark.skipif(not REAL, reason="RTO_FAST_SMOLLM2 names no folder with SmolLM2-135M-Instruct")


def packed(name, dtype=torch.float32):
    """On the CPU, as everything here: which dtype rounds how is the point, not where."""
    model = AutoModelForCausalLM.from_pretrained(REAL, dtype=dtype) if name == "SmolLM2" else tiny(name).to(dtype)
    model.set_attn_implementation(PACKED)
    return model.eval()


MODELS = ["llama", "qwen3", "mistral", "mixtral", "gemma2", "gpt2", "cohere", pytest.param("SmolLM2", marks=needs_real)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MODELS)
def test_packing_passes_in_every_dtype(name, dtype):
    check_causal_lm(packed(name, dtype), name)


PACKING = attention, layer_reference  # of transformers' layers and of ours
FOUND = "packed {} differ from the model's own|lets a packed sequence see its neighbours"


def leak(monkeypatch, model):
    def one_sequence(query, key, value, cu_seqlens, *options):
        return packed_attention(query, key, value, cu_seqlens[[0, -1]], *options)

    packed_attention = layer_reference.packed_sdpa
    for module in PACKING:
        monkeypatch.setattr(module, "packed_sdpa", one_sequence)


def small_leak(monkeypatch, model):
    """A thousandth of a neighbour, as through the state of a convolution."""

    def mixed(query, *arguments):
        out = packed_attention(query, *arguments)
        return out + 1e-3 * out.roll(1, 0)

    packed_attention = layer_reference.packed_sdpa
    for module in PACKING:
        monkeypatch.setattr(module, "packed_sdpa", mixed)


def wrong_scale(monkeypatch, model):
    def scaled(query, *arguments):
        return packed_attention(1.02 * query, *arguments)

    packed_attention = layer_reference.packed_sdpa
    for module in PACKING:
        monkeypatch.setattr(module, "packed_sdpa", scaled)


def unknown_logits(monkeypatch, model):
    head = model.lm_head.forward
    monkeypatch.setattr(model.lm_head, "forward", lambda x: 1.02 * head(x))


@pytest.mark.parametrize("fault", [leak, small_leak, wrong_scale, unknown_logits])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["llama", "gemma2", pytest.param("SmolLM2", marks=needs_real)])
def test_planted_faults_of_packing_are_found_in_every_dtype(name, dtype, fault, monkeypatch):
    model = packed(name, dtype)
    fault(monkeypatch, model)
    with pytest.raises(ModelError, match=FOUND.format("log-probs")):
        check_causal_lm(model, name)


def scorer(dtype):
    model = tiny("llama", AutoModelForSequenceClassification, seed=0, std=None, num_labels=1).to(dtype)
    model.set_attn_implementation(PACKED)
    return model.eval()


@pytest.mark.parametrize("dtype", DTYPES)
def test_scorers_pass_and_their_planted_faults_are_found_in_every_dtype(dtype, monkeypatch):
    model = scorer(dtype)
    check_scorer(model, "right")
    head = model.score.forward
    with monkeypatch.context() as patch, pytest.raises(ModelError, match="packed scores differ from the model's own"):
        patch.setattr(model.score, "forward", lambda x: head(x).sigmoid())  # what our own path does not know
        check_scorer(model, "sigmoid")
    for fault in (leak, small_leak, wrong_scale):
        with (
            monkeypatch.context() as patch,
            pytest.raises(ModelError, match=FOUND.format("scores")),
        ):
            fault(patch, model)
            check_scorer(model, fault.__name__)


def made(name, seed, auto_class=AutoModelForCausalLM, **settings):
    """With large weights, in bfloat16."""
    model = tiny(name, auto_class, seed, vocab_size=199, **settings)
    model.to(torch.bfloat16).set_attn_implementation(PACKED)
    return model.eval()


@pytest.mark.parametrize("seed", [0, 5, 7, 24])
def test_a_token_that_rounding_sends_to_another_expert_is_no_fault(seed):
    check_causal_lm(made("mixtral", seed), "mixtral")
    check_scorer(made("mixtral", seed, AutoModelForSequenceClassification, num_labels=1), "mixtral")
    verified_cache(RolloutModel(made("mixtral", seed)))


def test_the_rounding_of_scores_is_no_fault():
    for seed in range(12, 24):
        for name in ("llama", "gemma2"):
            check_scorer(made(name, seed, AutoModelForSequenceClassification, num_labels=1), name)


def test_in_16_bits_an_error_of_many_tokens_is_a_fault_and_that_of_one_token_is_not():
    truth, own = torch.zeros(50), torch.full((50,), 1e-2)
    one, quarter, all_of_them = (own.clone() for _ in range(3))
    one[0], quarter[:13], all_of_them[:] = 1.0, 1.0, 2.5e-2
    for dtype in DTYPES:
        is_coarse = dtype != torch.float32
        assert compare_values(own, own, truth, dtype).is_rounding
        assert compare_values(one, own, truth, dtype).is_rounding == is_coarse
        assert not compare_values(quarter, own, truth, dtype).is_rounding
        assert not compare_values(all_of_them, own, truth, dtype).is_rounding


def test_a_scorer_that_reads_another_token_of_one_sequence_is_found(monkeypatch):
    model = scorer(torch.float32)
    forward = type(model).forward

    def other(self, input_ids, **options):
        return forward(self, input_ids=input_ids[:, :-1] if input_ids.shape[1] == 15 else input_ids, **options)

    monkeypatch.setattr(type(model), "forward", other)
    with pytest.raises(ModelError, match="does something to its scores"):
        check_scorer(model, "other")


def test_a_kernel_that_is_wrong_in_16_bits_alone_is_found(monkeypatch):
    """On a GPU 16-bit attention is another kernel than that of higher precisions."""

    def wrong_in_16_bits(query, *arguments):
        return packed_attention((1.3 if query.dtype.itemsize == 2 else 1.0) * query, *arguments)

    packed_attention = layer_reference.packed_sdpa
    for module in PACKING:
        monkeypatch.setattr(module, "packed_sdpa", wrong_in_16_bits)
    check_causal_lm(packed("llama"), "float32")
    with pytest.raises(ModelError, match="in torch.bfloat16"):
        check_causal_lm(packed("llama", torch.bfloat16), "bfloat16")
    with pytest.raises(ModelError, match="in torch.bfloat16"):
        check_scorer(made("llama", 0, AutoModelForSequenceClassification, num_labels=1), "bfloat16")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [*ARCHITECTURES, pytest.param("SmolLM2", marks=needs_real)])
def test_precise_is_the_model_in_float32_to_the_bit(name, dtype):
    model = packed(name, dtype)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    buffers = {key: value.dtype for key, value in model.named_buffers()}
    batch = pack_whole([list(range(2, 20)), list(range(30, 40))])
    with precise(model, torch.float32):
        hidden = forward_hidden(model, batch)
    assert hidden.dtype == torch.float32
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert buffers == {key: value.dtype for key, value in model.named_buffers()}
    with torch.no_grad():
        if name == "mixtral":  # the experts run one by one there
            model.set_experts_implementation("eager")
        own = model.float().base_model(**packed_inputs(batch)).last_hidden_state[0]
        assert torch.equal(hidden, own)


def test_a_large_output_layer_is_cast_in_pieces(monkeypatch):
    model, batch = packed("phi", torch.bfloat16), pack_whole([list(range(2, 20))])  # with a bias
    batch.labels.fill_(5)
    expected, whole = precise_logps(model, batch), packed_logits(model, batch)
    casts, to = [], torch.Tensor.to
    monkeypatch.setattr(precision, "CAST_ELEMENTS", 10 * model.config.hidden_size)

    def recording(self, *args, **options):
        casts.append(self.numel())
        return to(self, *args, **options)

    monkeypatch.setattr(torch.Tensor, "to", recording)
    torch.testing.assert_close(precise_logps(model, batch), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(packed_logits(model, batch), whole, atol=1e-6, rtol=0)
    with precise(model, torch.float32):
        packed_logits(model, batch)
    assert max(casts) < model.lm_head.weight.numel()


def test_precise_log_probs_are_those_of_float64():
    # Of the architectures here only GPT-2's casts nothing to float32 by itself: its float64 is one.
    model, batch = packed("gpt2"), pack([[5, 6]] * 2, [[7, 8, 9], [11, 12]])
    found = precise_logps(model, batch, temperature=0.7)
    with torch.no_grad():
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, causal_logps(model.double(), batch, temperature=0.7), atol=1e-12, rtol=0)


def test_the_comparison_is_over_what_the_model_would_say():
    truth = torch.tensor([[0.0, -1.0, -30.0]]).log_softmax(-1)
    unlikely, likely = truth + torch.tensor([0.0, 0.0, 5.0]), truth + torch.tensor([0.5, 0.0, 0.0])
    assert (
        compare_logits(unlikely, truth, truth, torch.float32).error
        < 1e-6
        < 0.1
        < compare_logits(likely, truth, truth, torch.float32).error
    )
    expected = (truth.exp() * (likely.log_softmax(-1) - truth)).abs().sum()
    assert compare_logits(likely, likely, truth, torch.float32).error == pytest.approx(expected.item(), rel=1e-6)
    never = truth.clone()
    never[0, 2] = -torch.inf  # a token that cannot be is no NaN
    assert compare_logits(never, never, never, torch.float32).is_rounding
    assert not compare_logits(never * torch.nan, truth, truth, torch.float32).is_rounding


def drawn(noise, tokens=100_000):
    """(training, sampler) log-probs of tokens that a sampler with Gaussian noise in its logits drew from its own softmax."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(tokens, 16, generator=generator, dtype=torch.float64)
    sampler = (logits + noise * torch.randn(logits.shape, generator=generator, dtype=torch.float64)).log_softmax(-1)
    tokens = torch.multinomial(sampler.exp(), 1, generator=generator)
    return logits.log_softmax(-1).gather(1, tokens)[:, 0], sampler.gather(1, tokens)[:, 0]


def test_noise_leaves_the_mean_ratio_at_one_and_k3_is_half_its_variance():
    training, sampler = drawn(0.08)
    found = mismatch(training, sampler)
    assert abs(found["mismatch_bias"]) < 3 * (training - sampler).std() / len(training) ** 0.5
    assert found["mismatch_k3"] == pytest.approx((training - sampler).var().item() / 2, rel=0.02)


def test_what_ppo_notices_follows_from_its_clip():
    training, sampler = drawn(0.05)  # 0.036 nats in the mean, as bfloat16 does to a real model
    found = mismatch(training, sampler)
    assert 0.03 < found["mismatch_mean"] < 0.05 and not ppo_notices(found, 0.2)
    # It moves the clipped objective by less than its own standard error, though PPO's ratio starts at exp(Δ).
    advantage = torch.randn(len(training), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ratio = (training - sampler).exp()
    gains = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage) - advantage
    assert gains.mean().abs() < advantage.std() / len(advantage) ** 0.5
    assert ((ratio - 1).abs() > 0.2).double().mean() < 1e-3

    assert ppo_notices(found, 0.05)  # a clip as narrow as the noise cuts it
    assert ppo_notices(mismatch(*drawn(0.2)), 0.2)  # noise as wide as the clip
    assert ppo_notices(mismatch(training, training - 0.03), 0.2)  # a constant moves the clip, whatever its k3
    assert mismatch(training, training - 0.03)["mismatch_k3"] < k3_limit(0.2)
    assert ppo_notices(mismatch(training * torch.nan, sampler), 0.2)


def test_two_passes_are_not_further_apart_than_their_noise_allows():
    model = packed("llama", torch.bfloat16)
    batch = pack([[5, 6, 7]] * 8, [list(range(10 + i, 40 + i)) for i in range(8)])
    mask = batch.response_mask
    with torch.no_grad():
        own, truth = causal_logps(model, batch)[mask], precise_logps(model, batch)[mask]
    noise = Noise.measure(own, truth)
    assert 1e-3 < noise.mean < 0.1 and higher_precision(torch.bfloat16) == truth.dtype == torch.float32
    delta = torch.randn(len(own), generator=torch.Generator().manual_seed(0)) * (own - truth).std()
    again = mismatch(own, truth + delta)  # another pass, whose error is independent
    assert again["mismatch_mean"] <= noise.repeated_mean and again["mismatch_k3"] <= noise.repeated_k3
    other = mismatch(own, truth + 5 * delta)
    assert other["mismatch_mean"] > noise.repeated_mean and other["mismatch_k3"] > noise.repeated_k3
