"""The vLLM engine with a stub of vLLM's Python API (`vllm_stub`), which decodes with the weights that it is given."""

import importlib
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from rto_fast.data.world import build_model, build_tokenizer
from rto_fast.errors import ConfigError, ModelError, RolloutError
from rto_fast.models.attention import PACKED
from rto_fast.models.model import Model
from rto_fast.rollout.base import Sampling
from rto_fast.rollout.vllm import VLLMEngine, request_seed
from rto_fast.rto.experience import response_logps

STUB = Path(__file__).parent / "vllm_stub"
TOKENIZER = build_tokenizer()
PROMPTS = [[2, 13, 29, 30, 3], [2, 9, 25, 33, 5, 8, 26, 31, 3], [2, 10, 3]]


@dataclass
class Config:
    """The fields of `RolloutConfig` that the engine reads."""

    batch_size: int = 8
    vllm: dict = field(default_factory=dict)


@pytest.fixture
def stub(monkeypatch, tmp_path):
    """Imports the stub as `vllm`, and uses an empty folder for temporary files."""
    monkeypatch.syspath_prepend(STUB)
    for name in ("vllm", "vllm.exceptions"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(VLLMEngine, "_place", lambda self: str(tmp_path))
    yield importlib.import_module("vllm")
    del sys.modules["vllm"], sys.modules["vllm.exceptions"]
    assert not list(tmp_path.iterdir()), "a temporary folder is left"


@pytest.fixture
def model():
    model = build_model(0)
    model.set_attn_implementation(PACKED)
    return model.train()


def engine(model, **options):
    return VLLMEngine(model, TOKENIZER, Config(vllm=options))


def sampling(**options):
    return Sampling(**{"max_new_tokens": 12, "min_new_tokens": 0, "stop_ids": (1,)} | options)


def double_head(model):
    with torch.no_grad():
        model.lm_head.weight *= 2.0


def split(values, rollout):
    return values.split([len(r) for r in rollout.response_ids])


def own_logps(model, rollout, temperature=1.0):
    """Log-probs [total response tokens] of the training forward pass."""
    logps = response_logps(Model(model), rollout.prompt_ids, rollout.response_ids, 10_000, temperature)
    return logps[rollout.pack()[0].response_mask]


def test_samples_of_a_prompt_lie_side_by_side_and_end_at_a_stop_token_or_limit(stub, model):
    rollout = engine(model).generate(PROMPTS, 10, sampling(), seed=0)
    assert rollout.prompt_ids == [p for p in PROMPTS for _ in range(10)]
    for response, reason in zip(rollout.response_ids, rollout.finish_reasons, strict=True):
        assert 1 <= len(response) <= 12 and 1 not in response[:-1]
        assert reason == ("stop" if response[-1] == 1 else "length")
        assert reason == "stop" or len(response) == 12
    assert set(rollout.finish_reasons) == {"stop", "length"}
    assert 0 < rollout.timings["sync"] < rollout.timings["rollout"]
    one = stub.LOADED[-1]
    assert one.options["dtype"] == "float32" and one.options["max_num_seqs"] == 8


def test_log_probs_are_the_policys_own_in_the_order_of_the_responses(stub, model):
    for temperature in (1.0, 0.7):
        rollout = engine(model).generate(PROMPTS, 3, sampling(temperature=temperature), seed=1)
        assert rollout.logps.dtype == torch.float32 and rollout.logps.shape == (rollout.num_tokens,)
        torch.testing.assert_close(rollout.logps, own_logps(model, rollout, temperature), atol=2e-5, rtol=0)
        assert torch.equal(rollout.sampling_logps, rollout.logps)


@pytest.mark.parametrize("filters", [{"top_p": 0.5}, {"top_k": 3}, {"min_p": 0.3}, {"min_new_tokens": 4}])
def test_with_filters_only_the_log_probs_of_the_distribution_drawn_from_are_known(stub, model, filters):
    rollout = engine(model).generate(PROMPTS, 4, sampling(**filters), seed=1)
    assert rollout.logps is None
    policy = own_logps(model, rollout)
    assert (rollout.sampling_logps >= policy - 2e-5).all() and (rollout.sampling_logps > policy + 1e-3).any()


def test_greedy_takes_the_most_likely_token_and_gives_no_log_probs(stub, model):
    rollout = engine(model).generate(PROMPTS, 2, sampling(temperature=0.0), seed=1)
    assert rollout.response_ids[0::2] == rollout.response_ids[1::2]
    assert rollout.logps is None and rollout.sampling_logps is None


def test_min_new_tokens_come_before_the_stop_token(stub, model):
    for least in (0, 1, 3):
        options = sampling(min_new_tokens=least, stop_ids=tuple(range(4, 40)))
        rollout = engine(model).generate(PROMPTS, 10, options, seed=0)
        assert min(map(len, rollout.response_ids)) == least + 1


def test_any_of_the_stop_ids_ends_a_response_and_nothing_else_does(stub, model):
    rollout = engine(model).generate(PROMPTS, 20, sampling(stop_ids=(5, 7)), seed=0)
    ends = {r[-1] for r, reason in zip(rollout.response_ids, rollout.finish_reasons) if reason == "stop"}
    assert ends == {5, 7}
    assert any(1 in response for response in rollout.response_ids)  # the tokenizer's own end is no stop id here


@pytest.mark.parametrize(
    "prompts, options, message",
    [
        ([[2] * 256], {}, "prompt 0 has 256 tokens; the model takes at least 1, and with a response at most 256"),
        ([[2, 99]], {}, "prompt 0 has tokens outside of the model's vocabulary of 49"),
        ([[2]], dict(stop_ids=(50,)), "stop_ids: .50. are no tokens of the model"),
    ],
)
def test_requests_that_cannot_be_are_refused_before_the_weights_cross(prompts, options, message, stub, model):
    built = engine(model)
    with pytest.raises(RolloutError, match=message):
        built.generate(prompts, 1, sampling(**options), seed=0)
    assert built.llm.calls == []


def test_limits_hold_for_each_response(stub, model):
    limits = [1, 5, 12, 40, 2, 7]
    rollout = engine(model).generate(PROMPTS, 2, sampling(stop_ids=(), min_new_tokens=3), seed=0, limits=limits)
    assert [len(r) for r in rollout.response_ids] == [1, 5, 12, 12, 2, 7]
    assert set(rollout.finish_reasons) == {"length"}
    with pytest.raises(RolloutError, match="limits: expected 6 numbers of at least 1"):
        engine(model).generate(PROMPTS, 2, sampling(), seed=0, limits=limits[:-1])


def test_a_response_depends_on_its_prompts_number_and_not_on_the_batch(stub, model):
    rollouts = engine(model)
    together = rollouts.generate(PROMPTS, 2, sampling(), seed=3)
    assert together.response_ids == rollouts.generate(PROMPTS, 2, sampling(), seed=3).response_ids
    assert together.response_ids != rollouts.generate(PROMPTS, 2, sampling(), seed=4).response_ids
    for number in (2, 1):
        alone = rollouts.generate([PROMPTS[number]], 2, sampling(), seed=3, prompt_numbers=[number])
        assert alone.response_ids == together.response_ids[2 * number : 2 * number + 2]
    same = rollouts.generate([PROMPTS[0]] * 2, 2, sampling(), seed=3).response_ids
    assert len({tuple(r) for r in same}) == 4  # the same prompt twice is not the same responses twice


def test_request_seeds_have_63_bits_and_do_not_meet():
    seeds = {request_seed(s, p, k) for s in range(20) for p in range(100) for k in range(20)}
    assert len(seeds) == 40_000 and max(seeds) < 2**63 and min(seeds) >= 0
    assert request_seed(0, 0, 1) != request_seed(0, 1, 0)
    ones = sum(bin(seed).count("1") for seed in seeds) / len(seeds)
    assert abs(ones - 31.5) < 0.1


def test_the_present_weights_are_used_each_time_and_no_old_prefix(stub, model):
    rollouts = engine(model)
    first = rollouts.generate(PROMPTS, 2, sampling(), seed=0)
    model.lm_head.weight.data.mul_(2.0)  # through `.data`: no version counter shows it
    second = rollouts.generate(PROMPTS, 2, sampling(), seed=0)
    assert second.response_ids != first.response_ids
    # The first token of each response is drawn from what a stale prefix cache would answer.
    torch.testing.assert_close(second.logps, own_logps(model, second), atol=2e-5, rtol=0)
    assert stub.LOADED[-1].calls == ["reload_weights", "reset_prefix_cache", "generate"] * 2


def test_tied_weights_cross_once(stub, model, monkeypatch):
    model.config.tie_word_embeddings = True
    model.tie_weights()
    rollouts, written = engine(model), []
    save = type(model).save_pretrained

    def look(self, folder):
        save(self, folder)
        written.append(sum(f.stat().st_size for f in Path(folder).glob("*.safetensors")))

    monkeypatch.setattr(type(model), "save_pretrained", look)
    double_head(model)
    rollout = rollouts.generate(PROMPTS, 2, sampling(), seed=0)
    torch.testing.assert_close(rollout.logps, own_logps(model, rollout), atol=2e-5, rtol=0)
    assert written[0] < 4 * sum(p.numel() for p in model.parameters()) + 10_000


def test_asleep_between_rollouts_when_sleep_mode_is_on(stub, model):
    rollouts = engine(model, enable_sleep_mode=True)
    server = stub.LOADED[-1]
    assert server.asleep == {"weights", "kv_cache"}
    rollout = rollouts.generate(PROMPTS, 2, sampling(), seed=0)
    torch.testing.assert_close(rollout.logps, own_logps(model, rollout), atol=2e-5, rtol=0)
    assert server.asleep == {"weights", "kv_cache"}
    weights, cache = "wake_up ['weights']", "wake_up ['kv_cache']"
    steps = [weights, "reload_weights", cache, "reset_prefix_cache", "generate", "sleep 2"]
    assert server.calls == ["sleep 2", *steps]


def test_the_model_and_the_random_state_are_left_as_they_were(stub, model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    defaults, state = model.generation_config, torch.random.get_rng_state()
    engine(model).generate(PROMPTS, 2, sampling(), seed=0)
    assert model.training and model.config._attn_implementation == PACKED and model.generation_config is defaults
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("method", ["collective_rpc", "generate"])
def test_a_failure_leaves_no_folder_and_puts_the_engine_to_sleep(stub, model, monkeypatch, method):
    def fail(*_, **__):
        raise RuntimeError("EngineCore died")

    rollouts = engine(model, enable_sleep_mode=True)
    monkeypatch.setattr(stub.LLM, method, fail)
    with pytest.raises(RuntimeError, match="EngineCore died"):
        rollouts.generate(PROMPTS, 1, sampling(), seed=0)
    assert stub.LOADED[-1].calls[-1] == "sleep 2"  # and the fixture looks for folders


def test_prompts_may_be_text_and_what_vllm_refuses_is_an_error(stub, model):
    text = TOKENIZER.decode(PROMPTS[0])
    rollout = engine(model).generate([text], 1, sampling(), seed=0)
    assert rollout.prompt_ids == [TOKENIZER(text)["input_ids"]]
    with pytest.raises(RolloutError, match="^vllm: The prompt .length 9. is longer"):
        engine(model, max_model_len=9).generate(PROMPTS, 1, sampling(), seed=0)
    with pytest.raises(RolloutError, match="^vllm: temperature"):
        engine(model).generate(PROMPTS, 1, sampling(temperature=3.0), seed=0)
    short = engine(model, max_model_len=10).generate(PROMPTS, 1, sampling(stop_ids=()), seed=0)
    assert [len(r) for r in short.response_ids] == [5, 1, 7] and set(short.finish_reasons) == {"length"}


def test_the_policy_is_taken_out_of_its_wrapper_and_must_be_whole(stub, model):
    wrapped = torch.nn.Module()
    wrapped.module = model
    rollout = engine(wrapped).generate(PROMPTS, 1, sampling(), seed=0)
    assert rollout.response_ids == engine(model).generate(PROMPTS, 1, sampling(), seed=0).response_ids
    wrapped.zero_optimization_stage = lambda: 3
    with pytest.raises(ModelError, match="ZeRO-3"):
        engine(wrapped)
    model.model.layers[0].mlp.lora_A = torch.nn.ModuleDict()
    with pytest.raises(ModelError, match="LoRA"):
        engine(model)


def test_what_vllm_gives_up_on_is_an_error(stub, model, monkeypatch):
    rollouts = engine(model)
    monkeypatch.setattr(stub.LLM, "reset_prefix_cache", lambda self: False)
    with pytest.raises(RolloutError, match="prefix cache"):
        rollouts.generate(PROMPTS, 1, sampling(), seed=0)
    monkeypatch.undo()

    request = stub.LLM._request

    def aborted(self, *arguments):
        out = request(self, *arguments)
        out.outputs[0].finish_reason = "abort"
        return out

    monkeypatch.setattr(stub.LLM, "_request", aborted)
    monkeypatch.setattr(VLLMEngine, "_place", lambda self: None)
    with pytest.raises(RolloutError, match="'abort'"):
        rollouts.generate(PROMPTS, 1, sampling(), seed=0)


def test_log_probs_that_are_not_finite_are_an_error(stub, model, monkeypatch):
    rollouts = engine(model)
    monkeypatch.setattr(
        stub.FlatLogprobs,
        "append",
        lambda self, token, logprob: (
            self.start_indices.append(len(self.logprobs)),
            self.logprobs.append(float("nan")),
        ),
    )
    with pytest.raises(RolloutError, match="finite"):
        rollouts.generate(PROMPTS, 1, sampling(), seed=0)


def test_without_a_tokenizer_there_is_no_checkpoint_to_read(stub, model):
    with pytest.raises(ConfigError, match="needs the tokenizer"):
        VLLMEngine(model, None, Config())


def test_without_vllm_the_error_names_the_key_and_the_remedy(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match=r"^rollout\.engine: .*pip install .*vllm"):
        engine(model)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"tensor_paralel_size": 2}, r"^rollout\.vllm: .*'tensor_paralel_size'"),
        ({"gpu_memory_utilization": "half"}, r"^rollout\.vllm: .*gpu_memory_utilization"),
        ({"logprobs_mode": "raw_logprobs"}, r"^rollout\.vllm: .*multiple values for .*'logprobs_mode'"),
    ],
)
def test_options_that_vllm_does_not_know_or_that_are_not_theirs_are_named(stub, model, options, message):
    with pytest.raises(ConfigError, match=message):
        engine(model, **options)


def test_processes_of_a_node_share_out_its_gpus(stub, model, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for rank in (0, 1):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        engine(model, device_ids=[4, 5, 6, 7], tensor_parallel_size=2)
        assert stub.LOADED[-1].options["device_ids"] == [[4, 5], [6, 7]][rank]
    with pytest.raises(ConfigError, match=r"rollout\.vllm\.device_ids"):
        engine(model, device_ids=[4, 5, 6])


def test_weights_go_through_memory_unless_a_shared_folder_is_named(stub, model, monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.syspath_prepend(STUB)
    rollouts = VLLMEngine.__new__(VLLMEngine)
    rollouts.model, rollouts.shared_folder = model, None
    free = type("Usage", (), {"free": 10**6})
    monkeypatch.setattr("shutil.disk_usage", lambda path: free)
    monkeypatch.setattr(Path, "is_dir", lambda self: True)
    assert rollouts._place() == Path("/dev/shm")
    free.free = 10**3
    assert rollouts._place() is None
    rollouts.shared_folder = str(tmp_path)
    assert rollouts._place() == str(tmp_path)
