"""The decode step: it has no host sync, runs the Triton kernels in the whole engine, and has CUDA graphs by bucket."""

import contextlib
import copy
import sys
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import costs
from rto_fast import layer_ops
from rto_fast.config import RolloutConfig
from rto_fast.errors import RolloutError
from rto_fast.kernels import decode_reference
from rto_fast.models import joined_linear
from rto_fast.rollout import NativeEngine, Sampling, attention, decode, native
from rto_fast.rollout.cache import PagedCache
from rto_fast.rollout.decode import DecodeState, DecodeStep, Sampler
from rto_fast.rollout.model import RolloutModel
from rto_fast.rollout.scheduler import Scheduler
from tests.tiny_models import ARCHITECTURES, FAMILIES, assert_same, native_engine, prompts, tiny


class Shapes:
    """Replaces the Triton kernels, which need data, by results of the right shapes on the meta device. Counts calls."""

    def __init__(self):
        self.calls = Counter()

    def __getattr__(self, name):
        made = {
            "store_kv": lambda *_, **__: None,
            "paged_attention": lambda query, *_, **__: torch.empty_like(query),
            "rotate_and_store": lambda *_, **__: None,
            "rms_norm": lambda x, *_: torch.empty_like(x),
            "add_rms_norm": lambda x, residual, *_: (torch.empty_like(x), torch.empty_like(x)),
            "rotary_embedding": lambda qkv, rope, *, num_heads, num_kv_heads, **_: torch.empty_like(qkv).split(
                [num_heads, num_kv_heads, num_kv_heads], 1
            ),
            "adapter_input": lambda x, runs, keeps: x.new_empty(len(x), runs[-1].ranks.stop),
            "add_adapters": lambda *_: None,
            "gated_activation": lambda gate_up, activation: gate_up.chunk(2, -1)[0],
            "begin_step": lambda lengths, active, *_, **__: (
                torch.empty_like(lengths),
                torch.empty_like(lengths, dtype=torch.int32),
                torch.empty(len(lengths), 2, device="meta"),
                torch.empty_like(active),
            ),
            "finish_step": lambda *_, **__: None,
            "sample_tokens": lambda z, *_, **__: (
                z.new_empty(len(z), dtype=torch.int64),
                z.new_empty(len(z)),
                z.new_empty(len(z)),
            ),
        }.get(name)
        if made is None:
            raise AttributeError(name)

        def call(*args, **options):
            self.calls[name] += 1
            return made(*args, **options)

        return call


def meta_step(name, monkeypatch, patch=None, under=None, has_decoder=None):
    """Runs the decode step on the meta device, where reading a value raises. Returns the Shapes.

    Args:
        has_decoder: whether a decoder of ours is expected; by default, whether the family has one.
    """
    import rto_fast.kernels

    with torch.device("meta"):
        causal_lm = tiny(name, std=None)
    if patch:
        patch(causal_lm)
    shapes = Shapes()
    for module in ("paged_attention", "rotary", "decode_step"):
        monkeypatch.setattr(rto_fast.kernels, module, shapes, raising=False)
        monkeypatch.setitem(sys.modules, f"rto_fast.kernels.{module}", shapes)
    monkeypatch.setattr(decode, "sample_tokens", lambda *args, **options: shapes.sample_tokens(*args, **options))
    monkeypatch.setattr(layer_ops, "implementation", lambda *_: shapes)
    # Meta tensors have no addresses: neighbours cannot be told.
    monkeypatch.setattr(joined_linear, "joined", lambda all: all[0].new_empty(sum(map(len, all)), *all[0].shape[1:]))
    model, device = RolloutModel(causal_lm), torch.device("meta")
    cache = PagedCache([(2, 8)] * 2, 64, torch.float32, device)
    cache.num_pages = 8
    state = DecodeState(8, 8, 16, 2, device)
    with torch.no_grad(), model.decoding(128):
        assert (model.decoder is not None) == (name in FAMILIES if has_decoder is None else has_decoder)
        sampler = Sampler(Sampling(16, 2, top_p=0.9, stop_ids=(1, 2)), model.head, device)
        with under or contextlib.nullcontext():
            DecodeStep(model, cache, state, sampler, False).run(4)
    return shapes


# Mixtral's experts are chosen by what the host is told.
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "mixtral"])
def test_no_host_sync_hides_in_a_step(name, monkeypatch):
    meta_step(name, monkeypatch)


class Launches(TorchDispatchMode):
    """Counts the calls that run a kernel on a GPU, which is all except views and allocations."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        is_view = any(r.alias_info and not r.alias_info.is_write for r in function._schema.returns)
        name = function._schema.name
        if not is_view and not name.startswith(("aten::empty", "aten::new_empty", "aten::_unsafe_view")):
            self.found[name] += 1
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("name, kernels", [*costs.KERNELS.items(), ("cohere", costs.UNFUSED)])
def test_the_number_of_kernels_is_what_predictions_count(name, kernels, monkeypatch):
    launches, (a_layer, around) = Launches(), kernels
    shapes = meta_step(name, monkeypatch, under=launches)
    found = launches.found.total() + shapes.calls.total()
    assert found == 2 * a_layer + around, (launches.found, shapes.calls)


@pytest.mark.parametrize("targets, more", [("all-linear", 8), (["q_proj", "k_proj", "v_proj"], 2)], ids=str)
def test_the_number_of_kernels_with_adapters(targets, more, monkeypatch):
    """Two for each group of projections that has adapters."""
    peft = pytest.importorskip("peft", reason="LoRA needs PEFT (the lora extra)")

    def patch(model):
        peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=targets), model)

    launches, (a_layer, around) = Launches(), costs.KERNELS["llama"]
    shapes = meta_step("llama", monkeypatch, patch, launches)
    assert shapes.calls["add_adapters"] == 2 * more // 2
    assert launches.found.total() + shapes.calls.total() == 2 * (a_layer + more) + around, (
        launches.found,
        shapes.calls,
    )


def test_a_host_sync_would_be_found(monkeypatch):
    class Asks(nn.Module):
        def forward(self, x):
            return x + float(x.max())

    def patch(model):
        model.model.norm = Asks()

    with pytest.raises((RuntimeError, NotImplementedError), match="(?i)meta"):
        meta_step("llama", monkeypatch, patch, has_decoder=False)


@pytest.fixture
def triton_decode(monkeypatch, device):
    """Models on `device` decode by the kernels of a GPU; without a GPU, in Triton's interpreter."""
    from rto_fast.kernels import sampling

    if device.type == "cpu":
        monkeypatch.setattr(decode, "sample_tokens", sampling.sample_tokens)
        for module in (decode, attention, native):
            monkeypatch.setattr(module, "runs_triton", lambda _: True)
        monkeypatch.setattr(RolloutModel, "looks_at_sizes", property(lambda self: self.decoder is not None))
        # The engine's own check that it decodes the model, on few tokens: here it takes longer than the test.
        monkeypatch.setattr(native, "PROMPT_LENGTHS", (2, 3))
        monkeypatch.setattr(native, "DECODED", 2)


@torch.no_grad()
def float64_logps(model, rollout):
    """Log-probs of a rollout's tokens from the model's own forward pass, one sequence at a time."""
    exact = copy.deepcopy(model).double()
    exact.set_attn_implementation("eager")
    logps = []
    for prompt, response in zip(rollout.prompt_ids, rollout.response_ids):
        logits = exact(torch.tensor([prompt + response]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        logps.append(logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None])[:, 0])
    return torch.cat(logps)


# Llama is Qwen2 without biases, and Mistral's window is Gemma-2's.
@pytest.mark.parametrize("name, top_k", [("qwen2", 0), ("qwen3", 0), ("gemma2", 20), ("gpt2", 0)])
def test_the_triton_kernels_decode_as_the_plain_path_does(name, top_k, triton_decode, device, monkeypatch):
    sampling = Sampling(5, stop_ids=(1, 7), top_k=top_k)
    config, lengths = dict(batch_size=2, page_size=16), (5, 30, 14)  # two are decoded into another page
    found = native_engine(tiny(name).to(device), **config).generate(prompts(lengths), 1, sampling, 0)
    monkeypatch.undo()
    plain = tiny(name)  # on a CPU, where plain torch decodes
    expected = native_engine(plain, **config).generate(prompts(lengths), 1, sampling, 0)
    assert found.response_ids == expected.response_ids
    exact = float64_logps(plain, expected)
    # float32 in another order: a few times what the plain path's own float32 errs.
    atol = 8 * (expected.logps - exact).abs().max().item()
    assert 0 < atol < 1e-4
    torch.testing.assert_close(found.logps.cpu().double(), exact, atol=atol, rtol=0)
    torch.testing.assert_close(found.sampling_logps.cpu(), expected.sampling_logps, atol=atol, rtol=0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for what a GPU does")
class TestGraphs:
    """Replaces CUDA graphs on a CPU: a graph repeats the captured call with the captured arguments."""

    sampling = Sampling(20, stop_ids=(1, 7, 8, 9))
    config = dict(page_size=16, batch_size=16)

    @pytest.fixture
    def captures(self, monkeypatch):
        buckets = []

        class Graph:
            def __init__(self, step, count):
                longest = step.state.block_tables.shape[1] * step.cache.page_size
                self.replay = lambda: step.run(count, longest)

        def first(self, count):
            self.graphs[count] = Graph(self, count)
            buckets.append(count)
            self.graphs[count].replay()

        def bucket(self, count):
            return min(b for b in decode.BUCKETS if b >= count)

        def with_graphs(self, *args, init=DecodeStep.__init__):
            init(self, *args)
            self.use_graphs = True

        monkeypatch.setattr(DecodeStep, "_first", first)
        monkeypatch.setattr(DecodeStep, "bucket", bucket)
        monkeypatch.setattr(DecodeStep, "__init__", with_graphs)
        return buckets

    def test_each_bucket_is_captured_once_and_kept_while_the_shapes_fit(self, captures):
        engine = native_engine(tiny(), **self.config)
        first = engine.generate(prompts(), 3, self.sampling, 0)
        assert captures[0] == 16 and len(set(captures)) == len(captures)
        again = engine.generate(prompts(), 3, self.sampling, 0)
        fewer = engine.generate(prompts()[:4], 3, self.sampling, 0)  # other prompts, samples and slots
        assert len(set(captures)) == len(captures)
        assert first.response_ids == again.response_ids and fewer.response_ids == first.response_ids[:12]
        engine.generate(prompts(), 3, Sampling(20, top_p=0.9), 0)  # another kernel
        assert len(set(captures)) < len(captures)

    def test_idle_slots_change_nothing(self, captures, monkeypatch):
        found = native_engine(tiny(), **self.config).generate(prompts(), 3, self.sampling, 0)
        assert captures
        monkeypatch.undo()
        assert_same(
            found, NativeEngine(tiny(), None, RolloutConfig(batch_size=5)).generate(prompts(), 3, self.sampling)
        )

    @pytest.mark.parametrize("way", [{}, dict(batch_size=4), dict(kv_cache_gib=6 * 16384 / (1 << 30))], ids=str)
    def test_looking_one_burst_late_changes_nothing(self, captures, monkeypatch, way):
        """As on a GPU, it is known what is done only after the next steps have begun."""
        expected = NativeEngine(tiny(), None, RolloutConfig()).generate(prompts(), 3, self.sampling, 0)

        class Device:
            type = "cuda"

        def late(self, *args, init=Scheduler.__init__, **options):
            init(self, *args, **options)
            self.device = Device()

        monkeypatch.setattr(Scheduler, "__init__", late)
        engine = native_engine(tiny(), **self.config | way)
        assert_same(engine.generate(prompts(), 3, self.sampling, 0), expected)

    @pytest.fixture
    def sync_modes(self, monkeypatch):
        modes = ["default"]
        monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
        monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
        return modes

    def test_a_model_that_asks_the_host_decodes_without_graphs(self, monkeypatch, sync_modes):
        engine = NativeEngine(tiny(), None, RolloutConfig())
        expected = engine.generate(prompts(), 1, self.sampling, 0)
        run = DecodeStep.run

        def asks(self, count, longest=None, pages=None):
            if sync_modes[-1] == "error":
                raise RuntimeError("called a synchronizing CUDA operation\nmore")
            run(self, count, self.state.block_tables.shape[1] * self.cache.page_size, pages)

        monkeypatch.setattr(DecodeStep, "run", asks)
        engine.step.use_graphs = True
        with pytest.warns(UserWarning, match="decodes without CUDA graphs: called a synchronizing") as caught:
            found = engine.generate(prompts(), 1, self.sampling, 0)
        assert_same(found, expected)
        assert len(caught) == 1 and sync_modes == ["default", "error", "default"]

    def test_a_capture_that_breaks_off_ends_the_rollout_and_tells_the_way_out(self, monkeypatch, sync_modes):
        class Refusing:
            def __enter__(self):
                raise RuntimeError("operation not permitted when stream is capturing")

            def __exit__(self, *_):
                return False

        monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: 1)
        monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: Refusing())
        run = DecodeStep.run
        monkeypatch.setattr(DecodeStep, "run", lambda self, count: run(self, count, self.cache.page_size))
        engine = NativeEngine(tiny(), None, RolloutConfig())
        plain = engine._scheduler

        def graphs(*args):
            scheduler = plain(*args)
            engine.step.use_graphs = True
            return scheduler

        monkeypatch.setattr(engine, "_scheduler", graphs)
        with pytest.raises(RolloutError, match="not permitted .*start again with --rollout.cuda_graphs false"):
            engine.generate(prompts((5,)), 1, self.sampling, 0)
        assert engine.cache.keys == []


def test_what_a_graph_holds_does_not_depend_on_the_size_of_the_cache():
    """Idle slots write to no page of the cache."""
    state = DecodeState(2, 2, 4, 1, torch.device("cpu"))
    state.lengths[:], state.active[0] = torch.tensor([5, 7]), True
    state.block_tables[:, 0] = torch.tensor([3, 2])
    slots = state.lengths, state.active, state.block_tables, state.rows, state.generated, state.uniforms
    where, lengths, *_ = decode_reference.begin_step(*slots, page_size=16, min_new_tokens=1)
    assert (where.tolist(), lengths.tolist()) == ([3 * 16 + 5, -1], [6, 0])
