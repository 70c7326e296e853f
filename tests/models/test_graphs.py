"""Passes as CUDA graphs, on a CPU: a stand-in for a graph runs the recorded work again on the static tensors."""

import contextlib
import gc
import weakref

import pytest
import torch
from torch.autograd.graph import get_gradient_edge

from rto_fast.batch import pack
from rto_fast.config import load_config
from rto_fast.data.tokenizing import Demonstration, Pair
from rto_fast.errors import ModelError
from rto_fast.models import graphs
from rto_fast.models.forward import causal_logps, token_scores
from rto_fast.models.graphs import CudaGraph, PassGraphs
from rto_fast.models.model import Model
from rto_fast.models.pass_time import PassSizes
from rto_fast.rto.update import policy_loss, value_loss
from rto_fast.training.accumulate import Accumulator
from rto_fast.training.supervised import dpo_batch, dpo_loss, reward_batch, reward_loss, text_batch, text_loss
from tests.models.test_padding import RTO, STATISTICS, float64, micro_batch, scorer, sides
from tests.tiny_models import tiny
from tests.waits import NoWaits

SAME_SIZES = [(6, 20), (1, 30), (11, 3)], [(5, 20), (2, 30), (11, 3)], [(6, 19), (1, 31), (11, 3)]


class Repeated:
    """Stands in for a `CudaGraph`. What has to be there only while it is captured must not be needed again."""

    def __init__(self, run):
        run()
        self.run, self.replays = run, 0

    def replay(self):
        self.replays += 1
        return self.run()


def model_with_graphs(module=None, graph=Repeated):
    model = Model(module or float64(tiny("llama")))
    causal = model.module.get_output_embeddings() is not None
    (causal_logps if causal else token_scores)(model.module, pack([[3] * 100], [[4] * 100]))  # makes the table of RoPE
    model.graphs = PassGraphs(model.module, graph)
    return model


def made(model):
    return [recorded.graph for recorded in model.graphs.recorded.values() if recorded]


def backward(module):
    """As an optimizer's `backward`: the gradients are in buffers that stay where they are."""
    for parameter in module.parameters():
        parameter.main_grad = torch.zeros_like(parameter)

    def add(loss):
        loss.backward()
        for parameter in module.parameters():
            if parameter.grad is not None:  # that of others, layers have added themselves
                parameter.main_grad += parameter.grad
                parameter.grad = None

    return add


def clear(module):
    for parameter in module.parameters():
        parameter.main_grad.zero_()


def gradients(module):
    return [parameter.main_grad.clone() for parameter in module.parameters()]


@torch.no_grad()
def scored(model, lengths, seed=0, **options):
    return model.forward(causal_logps, pack(*sides(lengths, seed)), **options)


@torch.no_grad()
def eager(model, lengths, seed=0, **options):
    return causal_logps(model.module, pack(*sides(lengths, seed)), **options)


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)


def test_a_size_is_recorded_when_it_comes_for_the_second_time_and_serves_other_batches():
    model = model_with_graphs()
    for number, lengths in enumerate(SAME_SIZES * 2):
        found = scored(model, lengths, seed=number)
        assert_close(found, eager(model, lengths, seed=number))
        assert len(found) == sum(p + r - 1 for p, r in lengths)
        assert [graph.replays for graph in made(model)] == ([number] if number else [])


def test_results_are_the_callers():
    model = model_with_graphs(graph=Overwriting)
    results = [scored(model, SAME_SIZES[0], seed) for seed in range(4)]
    for seed, result in enumerate(results):
        assert_close(result, eager(model, SAME_SIZES[0], seed))


class Overwriting(Repeated):
    """Its result is in the same place at every replay, of which it returns a copy, as a `CudaGraph` does."""

    def __init__(self, run):
        super().__init__(run)
        self.result = run()

    def replay(self):
        self.result.copy_(super().replay())
        return self.result.clone()


@pytest.mark.parametrize("change", ["temperature", "mode", "size", "function"])
def test_what_differs_has_a_graph_of_its_own(change):
    model = model_with_graphs()
    for _ in range(2):
        scored(model, SAME_SIZES[0])
    for _ in range(2):
        options, lengths = {}, SAME_SIZES[0]
        if change == "temperature":
            options = {"temperature": 0.5}
        elif change == "mode":
            model.module.train()
        elif change == "size":
            lengths = [(6, 20), (1, 30), (11, 23)]
        if change == "function":
            with torch.no_grad():
                found = model.forward(twice, pack(*sides(lengths)))
            assert_close(found, 2 * eager(model, lengths))
        else:
            assert_close(scored(model, lengths, **options), eager(model, lengths, **options))
    assert [graph.replays for graph in made(model)] == [1, 1]


def twice(module, batch):
    return 2 * causal_logps(module, batch)


def test_sizes_used_last_are_kept(monkeypatch):
    monkeypatch.setattr(graphs, "MAX_SIZES", 2)
    model = model_with_graphs()
    sizes = [[(6, 20)], [(6, 40)], [(6, 80)]]
    for lengths in (sizes[0], sizes[0], sizes[1], sizes[0], sizes[2], sizes[0], sizes[1]):
        scored(model, lengths)
    assert [graph.replays for graph in made(model)] == [3]  # of the first, which came before each of the others
    assert len(model.graphs.recorded) == 2
    scored(model, sizes[2])  # it was forgotten, and is eager again
    assert len(model.graphs.recorded) == 2 and len(made(model)) == 0


@pytest.mark.parametrize("loss, make, args", [(policy_loss, tiny, (RTO, 0.7)), (value_loss, scorer, (RTO, STATISTICS))])
def test_gradients_of_micro_batches_add_up_as_without_graphs(loss, make, args):
    plain, model = Model(float64(make())), model_with_graphs(float64(make()))
    adds = backward(plain.module), backward(model.module)
    inputs = [micro_batch(lengths, seed=seed) for seed, lengths in enumerate(SAME_SIZES * 2)]
    tolerance = dict(rtol=1e-4, atol=1e-6) if loss is value_loss else dict(rtol=1e-10, atol=1e-13)
    for _ in range(2):  # two optimizer steps
        for micro in inputs:
            for factor in (1.0, 0.0):
                expected, found = (
                    each.learn(loss, micro, *args, backward=add, factor=factor)
                    for each, add in zip((plain, model), adds)
                )
                assert list(found) == list(expected)
                torch.testing.assert_close(found, dict(expected), **tolerance, check_dtype=False)
                torch.testing.assert_close(gradients(model.module), gradients(plain.module), **tolerance)
        with torch.no_grad():
            for each in (plain, model):
                for parameter in each.module.parameters():
                    parameter -= 0.1 * parameter.main_grad
                clear(each.module)
    assert [graph.replays for graph in made(model)] == [len(inputs) * 4 - 1]


PAIRS = [Pair([5, 6, 7], [8, 9, 1], [10, 1], None), Pair([5, 9], [3, 1], [4, 4, 1], None)]
DPO = load_config(["--config", "default"]).dpo


@pytest.mark.parametrize(
    "loss, make, inputs, args",
    [
        (policy_loss, tiny, micro_batch(SAME_SIZES[0]), (RTO, 0.7)),
        (value_loss, scorer, micro_batch(SAME_SIZES[0]), (RTO, STATISTICS)),
        (text_loss, tiny, text_batch([Demonstration([5, 6], [7, 8, 1])], 3.0, False, "cpu"), ()),
        (reward_loss, scorer, reward_batch(PAIRS, 2, "cpu"), ()),
        (dpo_loss, tiny, dpo_batch(PAIRS, torch.zeros(2, 2), 2, "cpu"), (DPO,)),
    ],
)
def test_no_node_of_autograd_outlives_a_pass(loss, make, inputs, args):
    """A node that receives a parameter's gradient runs on the stream of the pass that made it, as long as any result keeps
    it alive. In a later capture this would be another stream than that of the capture, which fails then."""

    def received(module):
        return [get_gradient_edge(parameter).node.metadata for parameter in module.parameters()]

    def marked(module, *given):
        results = loss(module, *given)
        for metadata in received(module):
            metadata["is old"] = True
        return results

    model = Model(float64(make("llama")) if make is tiny else make())
    metrics = model.learn(marked, inputs, *args, backward=backward(model.module))
    assert metrics and not any(received(model.module))
    kept, _ = marked(model.module, inputs, *args)
    assert any(received(model.module)), "the test finds what a loss keeps alive"


@pytest.mark.parametrize("moved", ["weight", "gradient"])
def test_graphs_end_when_what_they_hold_has_moved(moved):
    model = model_with_graphs()
    add, inputs = backward(model.module), micro_batch(SAME_SIZES[0])
    run = lambda: model.learn(policy_loss, inputs, RTO, 1.0, backward=add)  # noqa: E731
    for _ in range(3):
        run()
    old = weakref.ref(made(model)[0])
    parameter = list(model.module.parameters())[3]
    if moved == "weight":
        parameter.data = 2.0 * parameter.data
    else:
        parameter.main_grad = torch.zeros_like(parameter)
    clear(model.module)
    loss, metrics = policy_loss(model.module, inputs, RTO, 1.0)
    add(loss)
    expected = gradients(model.module)
    clear(model.module)
    assert_close(run()["policy_loss"], metrics["policy_loss"])
    gc.collect()
    assert old() is None and not made(model)
    assert_close(gradients(model.module), expected)
    run()
    assert len(made(model)) == 1


def test_a_larger_table_of_rope_ends_the_graphs_that_hold_the_old_one():
    model = model_with_graphs()
    for _ in range(2):
        scored(model, SAME_SIZES[0])
    old = weakref.ref(made(model)[0])
    long = [(3, 300)]
    for _ in range(4):  # the first makes the table, the third records it
        assert_close(scored(model, long), eager(model, long))
    assert old() is None and [graph.replays for graph in made(model)] == [2]
    assert_close(scored(model, SAME_SIZES[0]), eager(model, SAME_SIZES[0]))


@pytest.fixture
def sync_modes(monkeypatch):
    modes = ["default"]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    return modes


def test_a_pass_that_asks_the_host_runs_eagerly_and_counts_once(sync_modes):
    class Waiting(Repeated):
        def __init__(self, run):
            with graphs.waits_forbidden():
                super().__init__(run)

    def asks(module, inputs, *args):
        loss, metrics = policy_loss(module, inputs, *args)
        loss.register_hook(in_the_backward_pass)
        return loss, metrics

    def in_the_backward_pass(gradient):
        if sync_modes[-1] == "error":
            next(model.module.parameters()).main_grad.add_(0.0 * gradient)
            raise RuntimeError("called a synchronizing CUDA operation\nmore")

    model, plain = model_with_graphs(graph=Waiting), Model(float64(tiny("llama")))
    adds = backward(plain.module), backward(model.module)
    inputs = micro_batch(SAME_SIZES[0])
    with pytest.warns(UserWarning, match="passes run without CUDA graphs: called a synchronizing") as caught:
        for _ in range(4):
            for each, add in zip((plain, model), adds):
                each.learn(asks, inputs, RTO, 1.0, backward=add)
    assert len(caught) == 1 and sync_modes == ["default", "error", "default"] and not made(model)
    assert_close(gradients(model.module), gradients(plain.module))


def test_an_error_of_the_pass_is_not_taken_for_a_wait():
    class Failing(Repeated):
        def __init__(self, run):
            raise RuntimeError("shapes do not fit")

    model = model_with_graphs(graph=Failing)
    scored(model, SAME_SIZES[0])
    with pytest.raises(RuntimeError, match="do not fit"):
        scored(model, SAME_SIZES[0])


def test_without_memory_for_a_graph_all_end_and_passes_run_eagerly():
    class Large(Repeated):
        def __init__(self, run):
            raise torch.OutOfMemoryError("CUDA out of memory")

    other, model = model_with_graphs(), model_with_graphs(graph=Large)
    for _ in range(2):
        scored(other, SAME_SIZES[0])
    assert made(other)
    scored(model, SAME_SIZES[0])
    with pytest.warns(UserWarning, match="not enough memory"):
        found = scored(model, SAME_SIZES[0])
    assert_close(found, eager(model, SAME_SIZES[0]))
    assert not made(other) and not made(model)
    for each in (model, other, other):
        scored(each, SAME_SIZES[0])
    assert not made(other) and not made(model)


def test_a_step_without_memory_first_does_without_graphs_then_halves_its_micro_batches():
    PassGraphs.drop()
    model, said = model_with_graphs(), []
    for _ in range(2):
        scored(model, SAME_SIZES[0])
    accumulator = Accumulator(1000, said.append)
    accumulator.shrink([400, 300], "out of memory")
    assert accumulator.tokens == 1000 and not made(model) and "without CUDA graphs" in said[0]
    accumulator.shrink([400, 300], "out of memory")
    assert accumulator.tokens == 500


def test_drop_gives_graphs_back_and_they_come_again():
    model = model_with_graphs()
    for _ in range(2):
        scored(model, SAME_SIZES[0])
    known = weakref.ref(made(model)[0])
    assert PassGraphs.drop() and known() is None and not PassGraphs.drop()
    for _ in range(2):
        scored(model, SAME_SIZES[0])
    assert made(model)


def test_passes_that_the_gpu_takes_longer_for_are_eager(monkeypatch):
    model = model_with_graphs()
    monkeypatch.setattr(PassSizes, "is_bound_by_launches", lambda self, tokens, rows, backward: tokens < 50)
    for _ in range(3):
        scored(model, SAME_SIZES[0])
    assert not model.graphs.recorded


def test_nothing_on_the_way_to_a_replay_waits_for_the_device():
    """Padding, copying, and looking whether anything has moved. The pass itself is not run here: a graph holds it."""

    class Still(Repeated):
        def __init__(self, run):
            super().__init__(run)
            self.result = run()

        def replay(self):
            return self.result.clone()

    model = model_with_graphs(graph=Still)
    add = backward(model.module)
    for _ in range(2):
        model.learn(policy_loss, micro_batch(SAME_SIZES[0]), RTO, 1.0, backward=add)
        scored(model, SAME_SIZES[0])
    batch, inputs = pack(*sides(SAME_SIZES[0])), micro_batch(SAME_SIZES[0])
    with NoWaits(), torch.no_grad():
        assert len(model.forward(causal_logps, batch)) == batch.num_tokens
        assert "policy_loss" in model.learn(policy_loss, inputs, RTO, 1.0, backward=add)
    assert len(made(model)) == 2


def test_a_pass_with_gradients_outside_of_learn_is_eager():
    model = model_with_graphs()
    for _ in range(3):
        assert model.forward(causal_logps, pack(*sides(SAME_SIZES[0]))).requires_grad
    assert not model.graphs.recorded


class FakeCuda:
    """What a `CudaGraph` asks of torch.cuda, in place of a device."""

    def __init__(self, monkeypatch, fails=None):
        self.events, self.fails, fake = [], fails, self

        class Stream:
            def wait_stream(self, other):
                fake.events.append(f"{self.name} waits for {other.name}")

        class CUDAGraph:
            def __init__(self):
                self.name = object()

            def pool(self):
                return self.name

            def replay(self):
                fake.events.append("replay")

        @contextlib.contextmanager
        def graph(captured, pool, stream, capture_error_mode):
            assert capture_error_mode == "thread_local" and torch.cuda.get_sync_debug_mode() == "default"
            captured.name = pool or captured.name
            fake.events.append(f"capture on {stream.name}")
            yield
            if fake.fails:
                raise fake.fails

        @contextlib.contextmanager
        def on(stream):
            fake.events.append(f"on {stream.name}")
            yield

        current, side = Stream(), Stream()
        current.name, side.name = "current", "side"
        for name, value in dict(current_stream=lambda: current, Stream=lambda: side, stream=on).items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: self.events.append(f"back on {stream.name}"))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", CUDAGraph)
        monkeypatch.setattr(torch.cuda, "graph", graph)
        monkeypatch.setattr(CudaGraph, "stream", None)
        monkeypatch.setattr(CudaGraph, "live", weakref.WeakSet())


def test_a_cuda_graph_is_tried_on_the_stream_of_its_capture(monkeypatch, sync_modes):
    fake, seen = FakeCuda(monkeypatch), []
    result = torch.tensor([1.0])

    def run():
        seen.append(sync_modes[-1])
        return result

    graph = CudaGraph(run)
    assert seen == ["error", "default"]
    waits = ["side waits for current", "on side", "current waits for side"]
    assert fake.events == [*waits, "capture on side"]
    found = graph.replay()
    assert fake.events[-1] == "replay" and torch.equal(found, result) and found is not result
    assert CudaGraph(run).graph.pool() is graph.graph.pool()
    ended = graph.graph.pool()
    del graph
    gc.collect()
    assert CudaGraph(run).graph.pool() is not ended  # none was left to share with


@pytest.mark.parametrize("first", [False, True])
def test_a_capture_that_runs_out_of_memory_says_so(monkeypatch, sync_modes, first):
    def run():
        if first and sync_modes[-1] == "default":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.ones(1)

    # torch ends the capture while the error is on its way, which may raise another one.
    fake = FakeCuda(monkeypatch, fails=None if first else torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(torch.OutOfMemoryError):
        CudaGraph(run)
    assert not CudaGraph.live and fake.events[-1] == "back on current"


def test_a_capture_that_fails_ends_the_run_and_tells_the_way_out(monkeypatch, sync_modes):
    FakeCuda(monkeypatch, fails=RuntimeError("operation not permitted when stream is capturing\nmore"))
    with pytest.raises(ModelError, match="not permitted .*start again with --rollout.cuda_graphs false"):
        CudaGraph(lambda: torch.ones(1))


def sizes(layers, hidden, intermediate, vocab):
    layer = layers * (4 * hidden * hidden + 3 * hidden * intermediate)
    return PassSizes(layers, hidden, intermediate, layer, hidden * vocab, 2)


@pytest.mark.parametrize(
    "model, tokens, expected",
    [
        (sizes(8, 384, 1024, 4096), 16384, True),  # 20M
        (sizes(30, 576, 1536, 49152), 4096, True),  # SmolLM2-135M
        (sizes(30, 576, 1536, 49152), 65536, False),
        (sizes(28, 1024, 3072, 151936), 16384, False),  # Qwen3-0.6B
        (sizes(32, 4096, 14336, 128256), 4096, False),  # Llama-3-8B
        (sizes(32, 4096, 14336, 128256), 128, True),
    ],
)
@pytest.mark.parametrize("backward", [False, True])
def test_which_passes_are_bound_by_launches(model, tokens, expected, backward):
    assert model.is_bound_by_launches(tokens, tokens // 2, backward) == expected


def test_the_sizes_of_a_model():
    model = tiny("llama")
    found = PassSizes.of(model)
    layers = sum(p.numel() for name, p in model.named_parameters() if "layers" in name and p.dim() > 1)
    assert found == PassSizes(2, 32, 48, layers, 97 * 32, 4)
    assert PassSizes.of(scorer()).head_weights == 32
    assert 3 * found.seconds(100, 50, False) == found.seconds(100, 50, True)
