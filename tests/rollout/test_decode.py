"""The decode step: no host sync, the Triton kernels through the whole engine, CUDA graphs by bucket."""

import pytest
import torch
from models import ARCHITECTURES, SIZES, prompts, tiny
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from rto_fast.config import RolloutConfig
from rto_fast.rollout import NativeEngine, Sampling, decode
from rto_fast.rollout.attention import PagedDecode
from rto_fast.rollout.cache import PagedCache
from rto_fast.rollout.decode import DecodeState, DecodeStep, Sampler
from rto_fast.rollout.model import RolloutModel


class ShapesOnly:
    """Stands in for kernels that need data: the right shapes on the meta device."""

    def __getattr__(self, name):
        return {"store_kv": lambda *_, **__: None, "paged_attention": lambda query, *_, **__: torch.empty_like(query)}[
            name
        ]


def meta_step(name, monkeypatch, patch=None):
    """Runs the decode step on the meta device, where whatever asks for a value raises."""
    import rto_fast.kernels

    sizes = {key: value for key, value in (SIZES | ARCHITECTURES[name]).items() if value is not None}
    with torch.device("meta"):
        causal_lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **sizes)).eval()
    if patch:
        patch(causal_lm)
    monkeypatch.setattr(rto_fast.kernels, "paged_attention", ShapesOnly(), raising=False)
    rows = lambda z, *_, **__: (z.new_empty(len(z), dtype=torch.int64), z.new_empty(len(z)), z.new_empty(len(z)))  # noqa: E731
    monkeypatch.setattr(decode, "sample_tokens", rows)
    model, device = RolloutModel(causal_lm), torch.device("meta")
    cache = PagedCache([(2, 8)] * 2, 64, torch.float32, device)
    cache.num_pages = 8
    state = DecodeState(8, 8, 16, 2, device)
    with torch.no_grad(), model.decoding():
        sampler = Sampler(Sampling(16, 2, top_p=0.9, stop_ids=(1, 2)), model.head, device)
        DecodeStep(model, cache, state, sampler).run(4)


# Mixtral's experts are chosen by what the host is told.
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "mixtral"])
def test_no_host_sync_hides_in_a_step(name, monkeypatch):
    meta_step(name, monkeypatch)


def test_a_host_sync_would_be_found(monkeypatch):
    class Asks(nn.Module):
        def forward(self, x):
            return x + float(x.max())

    def patch(model):
        model.model.norm = Asks()

    with pytest.raises((RuntimeError, NotImplementedError), match="(?i)meta"):
        meta_step("llama", monkeypatch, patch)


@pytest.fixture
def triton_decode(monkeypatch, request):
    """The decode step with the kernels that a GPU runs, here through Triton's interpreter."""
    if not torch.cuda.is_available():
        request.getfixturevalue("interpreter")
    from rto_fast.kernels import sampling

    def paged(cache, tables, lengths, active, *_):
        return PagedDecode(cache, tables, lengths, active)

    monkeypatch.setattr(decode, "DenseDecode", paged)
    monkeypatch.setattr(decode, "sample_tokens", sampling.sample_tokens)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_the_triton_kernels_decode_as_the_plain_path_does(name, triton_decode, monkeypatch):
    model = tiny(name)
    sampling = Sampling(9, stop_ids=(1, 7), top_k=20)
    way = dict(batch_size=3, page_size=16)
    found = NativeEngine(model, None, RolloutConfig(**way)).generate(prompts(), 1, sampling, 0)
    monkeypatch.undo()
    expected = NativeEngine(model, None, RolloutConfig(**way)).generate(prompts(), 1, sampling, 0)
    assert found.response_ids == expected.response_ids
    torch.testing.assert_close(found.logps, expected.logps, atol=2e-5, rtol=0)
    torch.testing.assert_close(found.sampling_logps, expected.sampling_logps, atol=2e-5, rtol=0)


class Recorder:
    """A `torch.cuda.CUDAGraph` that runs again what it saw captured."""

    def replay(self):
        self.captured()


@pytest.fixture
def fake_graphs(monkeypatch):
    """CUDA graphs and buckets on the CPU: what is replayed is the captured call, with the captured arguments."""
    captures = []

    def capture(self, count):
        graph, longest = Recorder(), self.state.block_tables.shape[1] * self.cache.page_size
        graph.captured = lambda: self.run(count, longest)
        self.graphs[count] = graph
        captures.append(count)

    monkeypatch.setattr(DecodeStep, "_capture", capture)
    monkeypatch.setattr(DecodeStep, "bucket", lambda self, n: min((b for b in decode.BUCKETS if b >= n)))
    init = DecodeStep.__init__

    def with_graphs(self, *args):
        init(self, *args)
        self.use_graphs = True

    monkeypatch.setattr(DecodeStep, "__init__", with_graphs)
    return captures


def test_graphs_by_bucket_are_captured_once_and_kept_while_the_shapes_last(fake_graphs):
    model, sampling = tiny(), Sampling(20, stop_ids=(1, 7, 8, 9))
    engine = NativeEngine(model, None, RolloutConfig(page_size=16, batch_size=16))
    first = engine.generate(prompts(), 3, sampling, 0)
    assert fake_graphs[0] == 16 and sorted(set(fake_graphs)) == sorted(fake_graphs)
    again = engine.generate(prompts(), 3, sampling, 0)
    assert len(set(fake_graphs)) == len(fake_graphs)  # nothing was captured twice
    fewer = engine.generate(prompts()[:2], 3, sampling, 0)  # other prompts, fewer samples
    assert first.response_ids == again.response_ids and fewer.response_ids == first.response_ids[:6]


def test_idle_slots_change_nothing(fake_graphs):
    model, sampling = tiny(), Sampling(20, stop_ids=(1, 7, 8, 9))
    engine = NativeEngine(model, None, RolloutConfig(page_size=16, batch_size=16))
    found = engine.generate(prompts(), 3, sampling, 0)
    assert 16 in engine.step.graphs and found.num_tokens
    del fake_graphs
    plain = NativeEngine(model, None, RolloutConfig(batch_size=5)).generate(prompts(), 3, sampling, 0)
    assert found.response_ids == plain.response_ids
    torch.testing.assert_close(found.logps, plain.logps, atol=2e-5, rtol=0)


def test_a_model_whose_capture_fails_decodes_without_graphs(monkeypatch):
    class Refusing:
        def __enter__(self):
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

        def __exit__(self, *_):
            return False

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorder)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: 1)
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: Refusing())
    model, sampling = tiny(), Sampling(8, stop_ids=(1,))
    engine = NativeEngine(model, None, RolloutConfig())
    expected = engine.generate(prompts(), 1, sampling, 0)
    engine.step.use_graphs = True
    with pytest.warns(UserWarning, match="decodes without CUDA graphs: operation not permitted") as caught:
        found = engine.generate(prompts(), 1, sampling, 0)
    assert found.response_ids == expected.response_ids and len(caught) == 1
