"""Passes as CUDA graphs on a GPU: replays are eager passes bit by bit, follow the weights, share memory and give it back."""

import gc
import time
import warnings

import pytest
import torch

from rto_fast.batch import pack
from rto_fast.config import load_config
from rto_fast.models.attention import PACKED
from rto_fast.models.embedding import use_op_embeddings
from rto_fast.models.forward import causal_logps
from rto_fast.models.graphs import PassGraphs
from rto_fast.models.model import Model
from rto_fast.models.pass_time import PassSizes
from rto_fast.rto.update import MicroBatch, policy_loss, value_loss
from rto_fast.training.optimizer import Optimizer
from tests.models.test_padding import RTO, STATISTICS, sides
from tests.tiny_models import AutoModelForCausalLM, AutoModelForSequenceClassification, tiny

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CONFIG = load_config(["--config", "default"])
LENGTHS = [(20 + 3 * i, 40 - i) for i in range(12)]
LOSSES = [(policy_loss, (RTO, 0.7)), (value_loss, (RTO, STATISTICS))]


@pytest.fixture(autouse=True)
def deterministic_and_clean():
    """Equal to the bit are only kernels that add in a fixed order. What a test leaves behind would be memory of the next."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # that passes run without graphs
        warnings.filterwarnings("ignore", ".*deterministic")
        yield
    torch.use_deterministic_algorithms(False)
    PassGraphs.drop()


def made(loss=policy_loss, name="llama", dtype=torch.bfloat16, seed=1):
    """A model that is wide enough for tensor cores."""
    kind = AutoModelForCausalLM if loss is policy_loss else AutoModelForSequenceClassification
    sizes = dict(hidden_size=512, intermediate_size=1024, num_hidden_layers=4, vocab_size=2000, head_dim=64)
    heads = dict(num_attention_heads=8, num_key_value_heads=2, num_labels=1)
    module = tiny(name, kind, seed, std=0.04, **sizes, **heads).to("cuda", dtype)
    module.set_attn_implementation(PACKED)
    use_op_embeddings(module)
    model = Model(module)
    model.graphs = PassGraphs(module)
    return model


def optimizer_of(model):
    return Optimizer(model, CONFIG.rto, CONFIG.optimizer, 100, 1e-3)


def packed(lengths=LENGTHS, seed=0):
    return pack(*sides(lengths, seed), "cuda")


def micro_batch(lengths=LENGTHS, seed=0):
    batch = packed(lengths, seed)
    generator = torch.Generator("cuda").manual_seed(seed)
    draw = lambda: torch.randn(batch.num_tokens, generator=generator, device="cuda")  # noqa: E731
    return MicroBatch(batch, 400.0, old_logps=draw() - 7.0, old_values=draw(), advantages=draw(), returns=draw())


def recorded(model):
    return [found for found in model.graphs.recorded.values() if found]


@torch.no_grad()
def eager(model, batch):
    return causal_logps(model.module, batch.padded())[: batch.num_tokens]


def eager_step(model, optimizer, loss, inputs, *args):
    """Returns the metrics alone: what a loss keeps alive would bring another stream into a capture."""
    value, metrics = loss(model.module, inputs, *args)
    optimizer.backward(value)
    return metrics


@torch.no_grad()
def scored(model, batch):
    return model.forward(causal_logps, batch)


def gradients(model):
    return [parameter.main_grad.clone() for parameter in model.module.parameters()]


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gemma2"])
def test_a_replayed_scoring_pass_is_the_eager_one(name):
    model = made(name=name)
    for seed in range(4):
        batch = packed(seed=seed)
        assert torch.equal(scored(model, batch), eager(model, batch))  # the first one is eager, the others are replays
        assert len(recorded(model)) == (seed > 0)


@pytest.mark.parametrize("loss, args", LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_replayed_training_pass_is_the_eager_one(loss, args, dtype):
    model = made(loss, dtype=dtype)
    optimizer = optimizer_of(model)
    for step in range(4):
        inputs = [micro_batch(seed=2 * step), micro_batch(seed=2 * step + 1)]
        optimizer.zero_grad()
        expected = []
        for each in inputs:
            metrics = eager_step(model, optimizer, loss, each.padded(), *args)
            expected.append({name: metric.clone() for name, metric in metrics.items()})
        wanted = gradients(model)
        optimizer.zero_grad()
        found = [model.learn(loss, each, *args, backward=optimizer.backward) for each in inputs]
        assert [list(each) for each in found] == [list(each) for each in expected]
        for ours, theirs in zip(found, expected):
            assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        for ours, theirs in zip(gradients(model), wanted):
            assert torch.equal(ours, theirs)
        before = [parameter.clone() for parameter in model.module.parameters()]
        optimizer.step()  # the next replays compute with other weights
        assert any(not torch.equal(a, b) for a, b in zip(before, model.module.parameters()))
    assert len(recorded(model)) == 1
    optimizer.release()


def test_a_factor_of_zero_adds_nothing_and_a_trial_neither():
    model = made()
    optimizer = optimizer_of(model)
    for _ in range(4):
        model.learn(policy_loss, micro_batch(), RTO, 1.0, backward=optimizer.backward, factor=0.0)
    assert recorded(model) and not any(gradient.any() for gradient in gradients(model))
    optimizer.release()


def test_models_and_sizes_share_memory_and_do_not_disturb_each_other():
    models = [made(seed=seed) for seed in (1, 2)]
    batches = [packed(lengths, seed) for seed, lengths in enumerate((LENGTHS, LENGTHS[:5], LENGTHS * 2))]
    expected = [[eager(model, batch) for batch in batches] for model in models]
    for _ in range(4):
        found = [[scored(model, batch) for batch in batches] for model in models]
    graphs = [each.graph.graph for model in models for each in recorded(model)]
    assert len(graphs) == 6 and len({graph.pool() for graph in graphs}) == 1
    for ours, theirs in zip(sum(found, []), sum(expected, [])):
        assert torch.equal(ours, theirs)


def test_all_memory_comes_back():
    batches = [packed(lengths) for lengths in (LENGTHS, LENGTHS * 3)]
    model = made()
    optimizer = optimizer_of(model)
    for batch in batches:  # what libraries keep for themselves
        scored(model, batch)
    model.learn(policy_loss, micro_batch(), RTO, 1.0, backward=optimizer.backward)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for round_ in range(3):
        for _ in range(3):
            for batch in batches:
                scored(model, batch)
            model.learn(policy_loss, micro_batch(), RTO, 1.0, backward=optimizer.backward)
        assert len(recorded(model)) == 3
        held = torch.cuda.memory_reserved()
        assert PassGraphs.drop() and not recorded(model)
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
        after = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        assert after[1] < held
        if round_:  # the first captures leave cuBLAS a workspace for their stream
            assert after[0] <= before[0] and after[1] <= before[1]
        before = after
    optimizer.release()


def test_fifty_steps_take_no_more_memory_than_five():
    model, held = made(), []
    optimizer = optimizer_of(model)
    for step in range(50):
        model.learn(policy_loss, micro_batch(seed=step), RTO, 1.0, backward=optimizer.backward)
        scored(model, packed(seed=step))
        optimizer.step()
        torch.cuda.synchronize()
        held.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    assert held[-1][0] == held[5][0] and held[-1][1] <= 1.02 * held[5][1]
    optimizer.release()


def test_a_pass_that_waits_for_the_device_runs_eagerly():
    def waits(module, inputs, *args):
        loss, metrics = policy_loss(module, inputs, *args)
        loss.item()
        return loss, metrics

    model = made()
    optimizer = optimizer_of(model)
    inputs = micro_batch()
    eager_step(model, optimizer, policy_loss, inputs.padded(), RTO, 1.0)
    wanted = gradients(model)
    optimizer.zero_grad()
    with pytest.warns(UserWarning, match="passes run without CUDA graphs"):
        for _ in range(2):
            optimizer.zero_grad()
            model.learn(waits, inputs, RTO, 1.0, backward=optimizer.backward)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(gradients(model), wanted))
    assert torch.cuda.get_sync_debug_mode() == 0 and not recorded(model)
    optimizer.release()


def test_without_memory_passes_go_on_eagerly():
    model, batch = made(), packed(LENGTHS * 8)
    expected = scored(model, batch)
    free, total = torch.cuda.mem_get_info()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (8 << 20)) / total)
    try:
        with pytest.raises(torch.OutOfMemoryError), pytest.warns(UserWarning, match="not enough memory"):
            scored(model, batch)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert torch.equal(scored(model, batch), expected) and not recorded(model)


def test_a_replay_takes_the_host_a_fraction_of_the_time(capsys):
    """Prints both, and what the prediction says of the pass."""
    model, inputs = made(), micro_batch()
    optimizer = optimizer_of(model)
    times = []
    for use in (False, True):
        model.graphs.is_on = use
        for _ in range(3):
            model.learn(policy_loss, inputs, RTO, 1.0, backward=optimizer.backward)
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(10):
            model.learn(policy_loss, inputs, RTO, 1.0, backward=optimizer.backward)
        launched = time.perf_counter() - start
        torch.cuda.synchronize()
        times.append((1e3 * launched / 10, 100 * (time.perf_counter() - start)))
    tokens, rows = inputs.batch.num_tokens, len(inputs.batch.rows)
    with capsys.disabled():
        print(
            f"\n{tokens} tokens, ms a training pass (host, whole): eager {times[0][0]:.2f}, {times[0][1]:.2f}; "
            f"graph {times[1][0]:.2f}, {times[1][1]:.2f}; predicted on the GPU "
            f"{1e3 * PassSizes.of(model.module).seconds(tokens, rows, True):.2f}; captures took "
            f"{model.graphs.capture_seconds:.2f} s"
        )
    assert times[1][0] < 0.5 * times[0][0]
    optimizer.release()
