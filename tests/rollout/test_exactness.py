"""The native engine's question at its start: are its log-probs those of the training forward pass, to the bit?"""

import pytest
import torch

from rto_fast import rollout as engines
from rto_fast.config import RolloutConfig
from rto_fast.errors import RolloutError
from rto_fast.kernels import arguments
from rto_fast.models.decoder import refuse
from rto_fast.rollout import Exactness, HFEngine, Sampling, attention, build_engine, decode, exactness, native
from tests.exactness import RowProducts
from tests.tiny_models import native_engine, prompts, tiny

SAMPLING = Sampling(4)


@pytest.fixture
def few(monkeypatch):
    """Few and short sequences, whose pieces and batches still have several sizes."""
    for name, value in dict(
        PROMPT_LENGTHS=(21, 9, 5), SAMPLES=2, LONGEST=4, PREFILL_TOKENS=8, LEARNING_TOKENS=21
    ).items():
        monkeypatch.setattr(exactness, name, value)


@pytest.fixture
def trusted(few, monkeypatch):
    """Nothing speaks against exactness, and the training pass has the sampler's log-probs, which it returns."""
    sampled, logps = exactness._sampled, {}

    def remember(*arguments):
        rollout = sampled(*arguments)
        parts = rollout.logps.split([len(ids) for ids in rollout.response_ids])
        for prompt, response, part in zip(rollout.prompt_ids, rollout.response_ids, parts):
            logps[*prompt, *response] = part
        return rollout

    def training(module, batch, *, temperature):
        found = torch.zeros(batch.num_tokens)
        for first, last in zip(batch.cu_seqlens.tolist(), batch.cu_seqlens[1:].tolist()):
            tokens = [*batch.input_ids[first:last].tolist(), int(batch.labels[last - 1])]
            part = logps[*tokens]
            found[last - len(part) : last] = part
        return found

    monkeypatch.setattr(exactness, "_sampled", remember)
    monkeypatch.setattr(exactness, "causal_logps", training)
    monkeypatch.setattr(exactness, "reason_against", lambda policy: None)
    return training


def test_equal_bits_make_the_engine_and_its_rollouts_exact(trusted):
    engine = native_engine(tiny())
    assert engine.exactness.holds and engine.exactness.tokens == 13
    assert str(engine.exactness) == "the sampler's log-probs are the trainer's to the bit (13 tokens compared)"
    assert engine.generate(prompts(), 2, SAMPLING).exact
    engine.exactness = Exactness(reason="")
    assert not engine.generate(prompts(), 2, SAMPLING).exact


def test_every_batch_is_another_and_every_sample_is_in_one(trusted, monkeypatch):
    seen, modes = [], []
    monkeypatch.setattr(
        exactness,
        "causal_logps",
        lambda module, batch, **options: (
            seen.append(batch.num_sequences),
            modes.append(torch.is_grad_enabled()),
            trusted(module, batch, **options),
        )[-1],
    )
    native_engine(tiny())
    assert seen == [1, 2, 3] and modes == [True, True, False]  # of at most 21 tokens with activations kept


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_the_callers_modes_do_not_count(mode, few, monkeypatch):
    monkeypatch.setattr(exactness, "reason_against", lambda policy: None)
    model = tiny().train()
    expected = native_engine(model).exactness
    with mode():
        assert native_engine(model).exactness == expected and expected.tokens == 13


def test_one_rounding_of_one_log_prob_is_found(trusted, monkeypatch):
    calls = []

    def off(module, batch, **options):
        found = trusted(module, batch, **options)
        if not calls:
            found[batch.rows[-1]] = torch.nextafter(found[batch.rows[-1]], torch.tensor(0.0))
        calls.append(batch)
        return found

    monkeypatch.setattr(exactness, "causal_logps", off)
    engine = native_engine(tiny())
    found = engine.exactness
    assert not found.holds and (found.tokens, found.different) == (13, 1)
    assert found.first == calls[0].num_tokens and 0 < found.mean < found.largest < 1e-6
    assert "sampler and trainer may differ: 1 of 13 log-probs do, from position" in str(found)
    assert not engine.generate(prompts(), 2, SAMPLING).exact


def test_a_number_that_is_none_differs():
    found = Exactness.of(torch.tensor([0.0, torch.nan]), torch.tensor([-0.0, torch.nan]), torch.tensor([3.0, 7.0]))
    assert (found.different, found.first, found.holds) == (1, 7, False)
    assert not Exactness().holds  # nothing was compared


def test_a_comparison_that_fails_stops_no_run(trusted, monkeypatch):
    def fails(*_, **__):
        raise error

    for error in (RolloutError("rollout: no memory"), torch.OutOfMemoryError("CUDA out of memory. Tried\nmore")):
        monkeypatch.setattr(exactness, "causal_logps", fails)
        found = native_engine(tiny()).exactness
        assert not found.holds and str(error).splitlines()[0] in found.reason


def test_short_contexts_and_small_memory_are_compared_too(trusted, monkeypatch):
    monkeypatch.setattr(exactness, "PROMPT_LENGTHS", (630, 250, 20))
    for context in (8, 40, 256):
        engine = native_engine(tiny(max_position_embeddings=context), batch_size=2, kv_cache_gib=1e-9)
        assert engine.exactness.holds, engine.exactness
        assert engine.config.kv_cache_gib == 1e-9 and engine.prefill_tokens == 16384 and not engine.cache.keys


def test_lengths_of_the_shipped_check():
    """Some thousand tokens, past two splits of 256 keys, in decode steps that cross the ends of splits and of blocks."""
    limits = [1 + 5 * i % exactness.LONGEST for i in range(exactness.SAMPLES * len(exactness.PROMPT_LENGTHS))]
    assert sorted(limits) == list(range(1, 65)) and sum(limits) == 2080
    for end in (64, 128, 256, 512):
        assert any(n <= end < n + exactness.LONGEST for n in exactness.PROMPT_LENGTHS), end
    sizes = [len(rows) for rows in exactness._groups(len(limits))]
    assert sizes == [1, 2, 4, 8, 16, 32, 1]
    assert exactness.PROMPT_LENGTHS[0] + exactness.LONGEST <= exactness.LEARNING_TOKENS


def test_reasons(monkeypatch):
    model = tiny("llama").to(torch.bfloat16)
    assert "CPU" in native_engine(model).exactness.reason
    monkeypatch.setattr(attention, "runs_triton", lambda _: True)
    policy = native.RolloutModel(model)
    assert exactness.reason_against(policy) is None
    assert exactness.reason_against(native.RolloutModel(tiny("gpt2").to(torch.bfloat16))).startswith(
        "it trains with transformers' layers"
    )
    assert "float32" in exactness.reason_against(native.RolloutModel(tiny("llama")))
    policy.is_zero3 = True
    assert "ZeRO 3" in exactness.reason_against(policy)
    policy.is_zero3 = False
    model.requires_grad_(False)
    assert exactness.reason_against(policy) == "the model is not trained"
    refuse(model.requires_grad_(True), "for the test")
    assert "for the test" in exactness.reason_against(policy)


def test_other_engines_are_not_exact():
    engine = HFEngine(tiny(), None, RolloutConfig())
    assert not engine.exactness.holds and "other kernels" in str(engine.exactness)
    assert not engine.generate(prompts(), 1, SAMPLING).exact


def test_an_engine_is_exact_on_all_ranks_or_on_none(trusted, monkeypatch):
    monkeypatch.setattr(engines, "any_rank", lambda flag: flag)
    assert build_engine(tiny(), None, RolloutConfig()).exactness.holds
    answers = iter([False, True])  # all ranks have native engines; one is not exact
    monkeypatch.setattr(engines, "any_rank", lambda flag: next(answers))
    found = build_engine(tiny(), None, RolloutConfig()).exactness
    assert not found.holds and "rank" in found.reason


@pytest.fixture
def row_products():
    with RowProducts():
        yield


def test_the_kernels_of_a_gpu_give_the_bits_of_training(monkeypatch, ordered_dot, device, request):
    """Without a GPU in Triton's interpreter, where decoding, scoring and training run what they run on a GPU."""
    for name, value in dict(PROMPT_LENGTHS=(11, 5), SAMPLES=2, LONGEST=3, PREFILL_TOKENS=4).items():
        monkeypatch.setattr(exactness, name, value)
    engine = native_engine(tiny("llama", num_hidden_layers=1).to(device, torch.bfloat16))
    if device.type == "cpu":
        monkeypatch.setattr(arguments, "INTERPRET", True)
        request.getfixturevalue("row_products")
        for module in (decode, attention, native):
            monkeypatch.setattr(module, "runs_triton", lambda _: True)
    found = engine.measure_exactness()
    assert found.tokens == 7 and found.holds, found
    scored = attention.PagedDecode.scored

    def off(self, *arguments):  # by one unit in the last place of one element of a decode step's attention
        out = scored(self, *arguments)
        out.view(torch.int16)[0, 0, 0] += 1
        return out

    monkeypatch.setattr(attention.PagedDecode, "scored", off)
    found = engine.measure_exactness()
    assert found.tokens == 7 and 0 < found.different < 4, found  # of the three tokens that are no prompt's first
