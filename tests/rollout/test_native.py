"""The native engine: what a sample depends on, its log-probs, and its errors."""

import threading
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from rto_fast.batch import pack
from rto_fast.config import RolloutConfig
from rto_fast.errors import ConfigError, ModelError, RolloutError
from rto_fast.models.attention import PACKED
from rto_fast.models.forward import causal_logps
from rto_fast.rollout import NativeEngine, Sampling, cache, native, scheduler
from rto_fast.rollout.attention import Prefill
from rto_fast.rollout.model import RolloutModel
from tests.tiny_models import assert_same, native_engine, prompts, state_of, tiny

SAMPLING = Sampling(20, stop_ids=(1, 7, 8, 9))


def generate(model, way=None, sampling=SAMPLING, seed=0, n=3, ids=None, **options):
    return native_engine(model, **way or {}).generate(ids or prompts(), n, sampling, seed, **options)


@pytest.mark.parametrize(
    "way",
    [
        dict(batch_size=1),
        dict(batch_size=4),  # refills, and a prompt's samples that begin at different times
        dict(batch_size=4, page_size=16),
        dict(page_size=16, prefill_tokens=7),
        dict(page_size=32),
    ],
    ids=str,
)
def test_a_sample_does_not_depend_on_batch_slots_or_pages(way):
    model = tiny()
    expected = generate(model)
    assert set(expected.finish_reasons) == {"stop", "length"}
    assert_same(generate(model, way), expected)


@pytest.mark.parametrize("way", [{}, dict(batch_size=4), dict(page_size=16, prefill_tokens=37)], ids=str)
def test_padded_prefills_change_nothing(way, monkeypatch):
    """As on a GPU, where pieces of prompts and first draws have few sizes."""
    expected = generate(tiny(), way)
    sizes, hidden = set(), RolloutModel.hidden

    def counted(self, input_ids, *args):
        if isinstance(args[1], Prefill):
            sizes.add(len(input_ids))
        return hidden(self, input_ids, *args)

    monkeypatch.setattr(RolloutModel, "looks_at_sizes", True)
    monkeypatch.setattr(RolloutModel, "hidden", counted)
    monkeypatch.setattr(scheduler, "padded_size", lambda count, coarse: -(-count // 16) * 16)
    assert_same(generate(tiny(), way), expected)
    assert sizes and not any(size % 16 for size in sizes)


def test_a_sample_does_not_depend_on_the_order_of_prompts_or_the_rank():
    model, ids = tiny(), prompts()
    expected = generate(model)
    order = [3, 0, 4, 2, 1]
    permuted = generate(model, ids=[ids[i] for i in order], prompt_numbers=order)
    rows = [3 * i + j for i in order for j in range(3)]
    assert permuted.response_ids == [expected.response_ids[row] for row in rows]
    # Two ranks, each with some of the prompts.
    for mine in ([0, 3], [1, 2, 4]):
        part = generate(model, ids=[ids[i] for i in mine], prompt_numbers=mine)
        assert part.response_ids == [expected.response_ids[3 * i + j] for i in mine for j in range(3)]


def test_a_seed_repeats_and_leaves_the_global_random_state_alone():
    model = tiny()
    before = torch.random.get_rng_state()
    first, again, other = (generate(model, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(before, torch.random.get_rng_state())
    assert first.response_ids == again.response_ids != other.response_ids
    assert torch.equal(first.logps, again.logps)
    assert len(set(map(tuple, first.response_ids))) == len(first.response_ids)  # no two samples alike


def forward_logps(model, rollout, temperature=1.0):
    """Log-probs [total response tokens] from a packed forward pass."""
    before = model.config._attn_implementation
    model.set_attn_implementation(PACKED)
    batch = pack(rollout.prompt_ids, rollout.response_ids)
    with torch.no_grad():
        logps = causal_logps(model, batch, temperature=temperature)[batch.response_mask]
    model.set_attn_implementation(before)
    return logps


@pytest.mark.parametrize("name", ["llama", "gemma2", "granite", "gpt2"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_those_of_the_training_forward(name, temperature):
    model = tiny(name)
    rollout = generate(model, sampling=Sampling(20, temperature=temperature, stop_ids=(1, 7)))
    torch.testing.assert_close(rollout.logps, forward_logps(model, rollout, temperature), atol=3e-5, rtol=1e-5)
    batch, logps, sampling_logps = rollout.pack()
    assert torch.equal(logps[batch.response_mask], rollout.logps) and not logps[~batch.response_mask].any()
    assert sampling_logps.shape == batch.labels.shape


@pytest.mark.parametrize("name", ["llama", "gemma2", "granite", "cohere"])
def test_log_probs_of_greedy_responses(name):
    """Log-probs are those of the distribution at temperature 1, with divisors and caps of logits."""
    model = tiny(name)
    rollout = generate(model, sampling=Sampling(8, temperature=0.0), n=1)
    torch.testing.assert_close(rollout.logps, forward_logps(model, rollout), atol=3e-5, rtol=1e-5)


def test_filters_and_bans_change_the_sampling_log_probs_only():
    model = tiny()
    rollout = generate(model, sampling=Sampling(20, 4, top_k=5, stop_ids=(1, 7, 8)))
    torch.testing.assert_close(rollout.logps, forward_logps(model, rollout), atol=3e-5, rtol=1e-5)
    assert (rollout.sampling_logps > rollout.logps).all()
    plain = generate(model, sampling=Sampling(20, 0, stop_ids=(1, 7, 8)))
    assert torch.equal(plain.sampling_logps, plain.logps)


def test_lengths_stop_tokens_and_limits():
    model, ids = tiny(), prompts()
    rollout = generate(model, sampling=Sampling(12, 5, stop_ids=(1, 7, 8, 9, 10, 11)), n=8)
    for response, reason in zip(rollout.response_ids, rollout.finish_reasons):
        stops = [i for i, token in enumerate(response) if token in (1, 7, 8, 9, 10, 11)]
        assert stops == ([len(response) - 1] if reason == "stop" else []) and (not stops or stops[0] >= 5)
        assert len(response) == 12 or reason == "stop"
    limits = [1, 2, 12, 4, 12]
    rollout = generate(model, sampling=Sampling(12), n=1, limits=limits)
    assert [len(r) for r in rollout.response_ids] == [1, 2, 12, 4, 12]
    assert rollout.finish_reasons == ["length"] * 5 and rollout.prompt_ids == ids
    assert rollout.timings["rollout"] >= rollout.timings["prefill"] > 0


def test_a_response_ends_at_the_end_of_the_context():
    model = tiny(max_position_embeddings=48)
    rollout = generate(model, sampling=Sampling(20), n=1)
    assert [len(r) for r in rollout.response_ids] == [20, 20, 20, 20, 8]


def test_samples_follow_the_policy():
    """Second tokens of 6,000 samples, given the first, by chi-square; the first alone could not rule out greedy draws."""
    model, ids = tiny(), prompts((6,))
    rollout = generate(model, sampling=Sampling(2), n=6000, ids=ids)
    first = torch.tensor([r[0] for r in rollout.response_ids])
    token = first.mode().values.item()
    second = torch.tensor([r[1] for r in rollout.response_ids])
    with torch.no_grad():
        logits = [model(torch.tensor([ids[0] + extra])).logits[0, -1] for extra in ([], [token])]
    for drawn, z in ((first, logits[0]), (second[first == token], logits[1])):
        expected = len(drawn) * z.softmax(-1)
        counts = torch.bincount(drawn, minlength=97)
        common = expected > 5
        rest = (counts[~common].sum() - expected[~common].sum()) ** 2 / expected[~common].sum()
        chi_square = ((counts - expected) ** 2 / expected)[common].sum() + rest
        freedom = int(common.sum())
        assert chi_square < freedom + 5 * (2 * freedom) ** 0.5, (chi_square, freedom)


def test_page_exhaustion_preempts_and_changes_nothing():
    model = tiny()
    expected = generate(model)
    page = 16 * 2 * 2 * 2 * 8 * 4  # tokens · layers · (key, value) · heads · head_dim · bytes
    # Room for little more than one of the longest sequences (60 tokens, 4 pages).
    rollout = generate(model, dict(page_size=16, kv_cache_gib=6 * page / (1 << 30)))
    assert rollout.stats["preemptions"] > 0 and 0 < rollout.stats["occupancy"] <= 1
    assert_same(rollout, expected)


def test_a_sequence_that_ends_with_its_page_is_decoded_beside_longer_ones():
    way = dict(page_size=16)
    found = generate(tiny(), way, Sampling(20), n=1, ids=[[3] * 13, [4] * 3], limits=[2, 20])
    assert [len(response) for response in found.response_ids] == [2, 20]
    assert_same(found, generate(tiny(), None, Sampling(20), n=1, ids=[[3] * 13, [4] * 3], limits=[2, 20]))


@pytest.mark.parametrize("pages", [4, 5, 6, 8])
@pytest.mark.parametrize("limit", [1, 20])
def test_prompts_that_fill_their_pages_wait_for_room(pages, limit):
    """Samples share all pages so far, and each needs a page of its own next."""
    ids = [[token] * 16 for token in range(3, 11)]
    page = 16 * 2 * 2 * 2 * 8 * 4
    way = dict(page_size=16, kv_cache_gib=(pages + 1.5) * page / (1 << 30))
    found = generate(tiny(), way, Sampling(limit), n=2, ids=ids)
    assert_same(found, generate(tiny(), None, Sampling(limit), n=2, ids=ids))
    assert 0 <= found.stats["occupancy"] <= 1


def test_all_pages_come_back(monkeypatch):
    engine = native_engine(tiny(), batch_size=4, page_size=16)
    seen = {}
    release = engine.cache.__class__.release

    def record(self):
        seen["free"], seen["pages"] = sorted(self.free), self.num_pages if hasattr(self, "num_pages") else 0
        release(self)

    monkeypatch.setattr(engine.cache.__class__, "release", record)
    engine.generate(prompts(), 3, SAMPLING, 0)
    assert seen["pages"] > 0 and seen["free"] == list(range(seen["pages"]))


def test_weights_changed_between_calls_give_what_a_fresh_engine_gives():
    model = tiny()
    engine = NativeEngine(model, None, RolloutConfig())
    before = engine.generate(prompts(), 3, SAMPLING, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    after = engine.generate(prompts(), 3, SAMPLING, 0)
    assert after.response_ids != before.response_ids
    assert_same(after, generate(model))


def test_another_dtype_after_the_engine_was_built():
    model = tiny()
    engine = NativeEngine(model, None, RolloutConfig())
    model.double()
    assert_same(engine.generate(prompts(), 3, SAMPLING, 0), generate(model))


# Modes of torch, threads


def test_inference_mode_and_autocast_change_nothing():
    model, ids = tiny(), torch.tensor(prompts((5,)))
    expected = generate(tiny())
    engine = NativeEngine(tiny(), None, RolloutConfig())
    for mode in (torch.inference_mode(), torch.autocast("cpu")):
        with mode:
            inside = NativeEngine(model, None, RolloutConfig())
            assert_same(inside.generate(prompts(), 3, SAMPLING, 0), expected)
            assert_same(engine.generate(prompts(), 3, SAMPLING, 0), expected)
        assert_same(inside.generate(prompts(), 3, SAMPLING, 0), expected)
        assert_same(engine.generate(prompts(), 3, SAMPLING, 0), expected)
    model.train()(ids, labels=ids).loss.backward()  # the weights can still be trained


def test_two_threads_do_not_decode_with_one_model():
    """Two engines of the same model cannot run at once either."""
    model = tiny()
    engines = [NativeEngine(model, None, RolloutConfig()) for _ in range(2)]
    before = state_of(model)
    started, go_on = threading.Event(), threading.Event()

    class Waiting(nn.Module):
        def forward(self, x):
            started.set()
            go_on.wait(30)
            return x

    norm = model.model.norm
    model.model.norm = nn.Sequential(norm, Waiting())
    found = []
    thread = threading.Thread(target=lambda: found.append(engines[0].generate(prompts(), 3, SAMPLING, 0)))
    thread.start()
    assert started.wait(30)
    for engine in engines:
        with pytest.raises(RolloutError, match="LlamaForCausalLM is at work for another thread's rollout"):
            engine.generate(prompts(), 3, SAMPLING, 0)
    go_on.set()
    thread.join()
    model.model.norm = norm
    assert state_of(model) == before
    assert_same(found[0], engines[1].generate(prompts(), 3, SAMPLING, 0))


# Restoring


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_the_model_is_restored_whatever_happens(error, monkeypatch):
    model = tiny().train()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    model.model.layers[1].eval()  # a part that somebody froze
    engine = NativeEngine(model, None, RolloutConfig(batch_size=4))
    before = state_of(model)
    calls = []

    class Failing(nn.Module):
        def forward(self, x):
            calls.append(1)
            if error and len(calls) == 9:
                raise error("in the middle")
            return x

    model.model.norm = nn.Sequential(model.model.norm, Failing())
    before = state_of(model)
    if error:
        with pytest.raises(error, match="in the middle"):
            engine.generate(prompts(), 3, SAMPLING, 0)
        calls.clear()
        calls.extend([1] * 20)
    assert engine.cache.keys == []
    rollout = engine.generate(prompts(), 3, SAMPLING, 0)
    assert state_of(model) == before and engine.cache.keys == []
    assert rollout.num_tokens > 0


# Bad input


def test_a_model_without_an_output_layer_is_refused():
    with pytest.raises(ModelError, match="LlamaModel has no output layer"):
        NativeEngine(tiny().model, None, RolloutConfig())


def test_hooks_on_the_output_layer_are_refused_whenever_they_come():
    model = tiny()
    engine = NativeEngine(model, None, RolloutConfig())
    handle = model.lm_head.register_forward_hook(lambda *_: None)
    with pytest.raises(ModelError, match="hooks on its output layer"):
        engine.generate(prompts(), 3, SAMPLING, 0)
    handle.remove()
    assert_same(engine.generate(prompts(), 3, SAMPLING, 0), generate(model))


def test_a_prompt_that_fills_the_context_is_refused():
    model = tiny(max_position_embeddings=40)
    with pytest.raises(
        RolloutError, match="prompt 4 has 40 tokens; the model takes at least 1, and with a response at most 40"
    ):
        generate(model)
    with pytest.raises(RolloutError, match="prompt 1 has 0 tokens"):
        generate(model, ids=[[3], []])


def test_a_stop_token_outside_of_the_vocabulary_is_refused():
    with pytest.raises(RolloutError, match=r"stop_ids: \[97, -1\] are no tokens of the model, whose vocabulary has 97"):
        generate(tiny(), sampling=Sampling(4, stop_ids=(1, 97, -1)))


def test_a_budget_too_small_for_one_sequence_is_refused():
    with pytest.raises(RolloutError, match="rollout.kv_cache_gib: the longest sequence needs .* GiB"):
        generate(tiny(), dict(kv_cache_gib=1e-6))


@pytest.mark.parametrize("batch_size", [15, 4])
def test_nan_logits_name_the_response_and_the_token(batch_size):
    model = tiny()
    expected = generate(model)
    # A token that one response says, and no other and no prompt: what follows on it is NaN.
    said = [(token, row, i) for row, r in enumerate(expected.response_ids) for i, token in enumerate(r[:-1])]
    elsewhere = sum(prompts(), [])
    token, row, step = next(x for x in said if [t for t, *_ in said].count(x[0]) == 1 and x[0] not in elsewhere)
    model.model.embed_tokens.weight.data[token] = torch.nan
    with pytest.raises(RolloutError, match=rf"logits are NaN: response {row} \(.*\), token {step + 1};"):
        generate(model, dict(batch_size=batch_size))
    with pytest.raises(RolloutError, match="response 0 .*, token 0"):
        generate(model, n=1, ids=[[token]])


def test_out_of_memory_shrinks_the_cache_and_says_so(monkeypatch):
    model = tiny()
    expected = generate(model, dict(page_size=16))
    zeros, failed = torch.zeros, []

    def scarce(*args, **options):
        if args and isinstance(args[0], tuple) and len(args[0]) == 4 and args[0][0] > 21:
            failed.append(args[0][0])
            raise torch.OutOfMemoryError("CUDA out of memory")
        return zeros(*args, **options)

    engine = native_engine(model, page_size=16)
    monkeypatch.setattr(cache.torch, "zeros", scarce)
    with pytest.warns(UserWarning, match="no memory for a KV cache of .* GiB; trying .* GiB"):
        rollout = engine.generate(prompts(), 3, SAMPLING, 0)
    assert failed
    assert_same(rollout, expected)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), KeyboardInterrupt()], ids=str)
def test_a_fault_while_memory_is_taken_leaves_an_engine_that_works(error, monkeypatch):
    model = tiny()
    engine = NativeEngine(model, None, RolloutConfig())
    before = state_of(model)

    def fail(*_, **__):
        raise error

    for owner, name in ((native, "DecodeState"), (cache.PagedCache, "_allocate_pools"), (native, "Scheduler")):
        with monkeypatch.context() as patch, pytest.raises((type(error), RolloutError)):
            patch.setattr(owner, name, fail)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that the cache shrinks
                engine.generate(prompts(), 3, SAMPLING, 0)
        assert engine.cache.keys == [] and state_of(model) == before
    assert_same(engine.generate(prompts(), 3, SAMPLING, 0), generate(model))


def test_out_of_memory_later_on_tells_what_to_lower(monkeypatch):
    engine = NativeEngine(tiny(), None, RolloutConfig())

    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")

    monkeypatch.setattr(scheduler, "prefill_chunk", fail)
    with pytest.raises(RolloutError, match="out of memory .CUDA out of memory.*; lower rollout.kv_cache_gib "):
        engine.generate(prompts(), 3, SAMPLING, 0)
    assert engine.cache.keys == []


def test_the_cache_shrinks_no_further_than_one_sequence_needs(monkeypatch):
    found = cache.PagedCache([(2, 8)], 16, torch.float32, torch.device("cpu"))
    allocate = cache.PagedCache._allocate_pools

    def scarce(self, pages):
        if pages > 7:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        allocate(self, pages)

    monkeypatch.setattr(cache.PagedCache, "_allocate_pools", scarce)
    with pytest.warns(UserWarning, match="trying"):
        found.allocate(10, 6, 1 << 20)
    assert found.num_pages == 6
    with pytest.warns(UserWarning), pytest.raises(RolloutError, match="no memory for the KV cache of one sequence"):
        found.allocate(10, 8, 1 << 20)
    with pytest.raises(RolloutError, match="kv_cache_gib: the longest sequence needs"):
        found.allocate(10, 8, 1000)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(n=0), "n: expected at least 1 sample"),
        (dict(limits=[1] * 14), "limits: expected 15 numbers of at least 1"),
        (dict(limits=[0] * 15), "limits: expected 15 numbers of at least 1"),
        (dict(prompt_numbers=[0]), "prompt_numbers: expected 5 numbers, .*, got 1"),
        (dict(prompt_numbers=[0, 1, 2, 3, 2**63]), "prompt_numbers: expected 5 numbers, which times n fit 63 bits"),
        (dict(ids=[[3, 4.5]]), "prompt 0: expected whole numbers in a list, an array or a tensor, got .3, 4.5."),
        (dict(ids=[3, 4]), "prompt 0: expected whole numbers in a list"),
        (dict(sampling=Sampling(4, stop_ids=tuple(range(97)))), "there must be a token that does not stop"),
        (dict(ids=[[3, 97]]), "prompt 0 has tokens outside of the model's vocabulary of 97"),
    ],
    ids=str,
)
def test_requests_that_cannot_be_are_refused(options, message):
    with pytest.raises(RolloutError, match=message):
        generate(tiny(), **options)


@pytest.mark.parametrize(
    "name, value",
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", 4.0),
        ("temperature", -1.0),
        ("temperature", 1e-39),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("min_p", 2.0),
    ],
)
def test_sampling_that_cannot_be_is_refused(name, value):
    with pytest.raises(RolloutError, match=f"{name}: expected .* number .*, got {value}"):
        Sampling(**{"max_new_tokens": 4} | {name: value})


@pytest.mark.parametrize("name, value", [("batch_size", 0), ("kv_cache_gib", 0.0)])
def test_settings_that_cannot_be_are_refused(name, value):
    with pytest.raises(ConfigError, match=f"rollout.{name}: expected .*, got {value}"):
        NativeEngine(tiny(), None, RolloutConfig(**{name: value}))


def test_arrays_and_tensors_are_lists_of_numbers():
    model, ids = tiny(), prompts()
    limits = [4] * 15
    expected = generate(model, ids=ids, limits=limits)
    way = dict(prompt_numbers=torch.arange(5), limits=np.array(limits))
    sampling = Sampling(20, stop_ids=torch.tensor([1, 7, 8, 9]))
    for convert in (torch.tensor, np.array):
        found = generate(model, ids=[convert(x) for x in ids], sampling=sampling, **way)
        assert_same(found, expected)
        assert found.prompt_ids == expected.prompt_ids and type(found.prompt_ids[0][0]) is int


def test_no_prompts_give_no_responses():
    rollout = NativeEngine(tiny(), None, RolloutConfig()).generate([], 3, SAMPLING, 0)
    assert rollout.response_ids == [] and rollout.logps.shape == (0,)


def test_limits_do_not_exceed_max_new_tokens():
    rollout = generate(tiny(), sampling=Sampling(3), n=1, limits=[9] * 5)
    assert [len(r) for r in rollout.response_ids] == [3] * 5


def test_free_slots_are_refilled_while_others_have_all_they_need():
    """With one page a sequence, as on a CPU, running sequences reserve no pages that they do not need."""
    engine = NativeEngine(tiny(), None, RolloutConfig(batch_size=8))
    engine.generate(prompts((6,) * 48), 1, SAMPLING, 0)
    steps = engine.step.steps
    assert steps[8] > 0.5 * sum(steps.values()), steps


def test_strings_need_a_tokenizer():
    with pytest.raises(RolloutError, match="prompt 1 is text"):
        NativeEngine(tiny(), None, RolloutConfig()).generate([[2, 3], "4 5"], 1, SAMPLING)


def test_strings_are_encoded():
    class Words:
        def __call__(self, text):
            return {"input_ids": [int(word) for word in text.split()]}

    engine = NativeEngine(tiny(), Words(), RolloutConfig())
    texts = [" ".join(map(str, ids)) for ids in prompts()]
    assert_same(engine.generate(texts, 2, SAMPLING, 0), engine.generate(prompts(), 2, SAMPLING, 0))
