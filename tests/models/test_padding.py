"""A padded batch gives the results of the batch: values, losses, metrics and gradients; its padding adds exactly nothing."""

from dataclasses import fields, replace

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from rto_fast.batch import IGNORE_INDEX, pack, pack_whole, padded_size
from rto_fast.config import load_config
from rto_fast.models.attention import PACKED
from rto_fast.models.forward import causal_logps, token_scores
from rto_fast.models.model import Model, ScoreStatistics
from rto_fast.rto.update import MicroBatch, policy_loss, value_loss
from tests.tiny_models import tiny

LENGTHS = [[(3, 2)], [(5, 4), (2, 7), (9, 1), (4, 4)], [(6, 20), (1, 30), (11, 3)]]
RTO = load_config(["--config", "default", "--rto.entropy_coef", "0.01", "--rto.dual_clip", "3"]).rto
STATISTICS = ScoreStatistics(0.3, 1.7)


def sides(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randint(3, 97, (n,), generator=generator).tolist()  # noqa: E731
    return [draw(p) for p, _ in lengths], [draw(r) for _, r in lengths]


def micro_batch(lengths, weighted=False, seed=0):
    batch = pack(*sides(lengths, seed))
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randn(batch.num_tokens, generator=generator, dtype=torch.float64)  # noqa: E731
    weights = dict(policy_weights=draw().abs(), value_weights=draw().abs()) if weighted else {}
    columns = dict(old_logps=draw() - 4.0, old_values=draw(), advantages=draw(), returns=draw())
    return MicroBatch(batch, 37.0, **columns, **weights)


def poisoned(padded, tokens):
    """The micro-batch with NaN in the columns of its padding."""
    columns = {f.name: getattr(padded, f.name) for f in fields(padded)[2:]}
    for name, column in columns.items():
        if column is not None:
            columns[name] = column.clone()
            columns[name][tokens:] = float("nan")
    return replace(padded, **columns)


def scorer():
    return float64(tiny("llama", AutoModelForSequenceClassification, num_labels=1))


def float64(model):
    model = model.double()
    model.set_attn_implementation(PACKED)
    return model


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)


def assert_equal(found, expected, rtol=1e-11, atol=1e-13):
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("coarse", [True, False])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_the_padding_repeats_the_beginning_as_sequences_without_labels(lengths, coarse):
    batch = pack(*sides(lengths))
    padded, tokens, count = batch.padded(coarse=coarse), batch.num_tokens, batch.num_sequences
    more = padded.num_tokens - tokens
    assert 1 <= more <= tokens and padded.num_tokens == padded_size(tokens + 1, coarse=coarse)
    for name in ("input_ids", "labels", "position_ids"):
        assert torch.equal(getattr(padded, name)[:tokens], getattr(batch, name))
    assert torch.equal(padded.input_ids[tokens:], batch.input_ids[:more])
    assert torch.equal(padded.position_ids[tokens:], batch.position_ids[:more])
    assert (padded.labels[tokens:] == IGNORE_INDEX).all()
    lengths = padded.cu_seqlens.diff()
    assert padded.cu_seqlens.dtype == torch.int32 and torch.equal(padded.cu_seqlens[: count + 1], batch.cu_seqlens)
    assert padded.cu_seqlens[-1] == padded.num_tokens and (lengths >= 0).all()
    assert lengths.max() <= padded.max_seqlen and batch.max_seqlen <= padded.max_seqlen
    assert padded.max_seqlen < 2 * batch.max_seqlen if coarse else padded.max_seqlen == batch.max_seqlen
    starts = padded.cu_seqlens[:-1][lengths > 0]
    assert torch.equal((padded.position_ids == 0).nonzero().squeeze(-1), starts)
    assert torch.equal(padded.rows[: len(batch.rows)], batch.rows)
    assert (padded.rows[len(batch.rows) :] == tokens).all()
    assert len(padded.rows) == padded_size(len(batch.rows), coarse=coarse)


def test_sizes_are_few_and_waste_little():
    sizes = [padded_size(count) for count in range(1, 5000)]
    assert all(count <= size <= 1.125 * count for count, size in enumerate(sizes, 1))
    assert len(set(sizes)) < 90 and padded_size(0) == 0
    assert {padded_size(size) for size in sizes} == set(sizes)


def test_sizes_of_eager_passes_are_few_and_waste_a_hundredth():
    for begin in (2048, 4096, 32768):
        sizes = [padded_size(count, coarse=False) for count in range(begin, 2 * begin)]
        assert all(count <= size <= count + begin // 32 for count, size in enumerate(sizes, begin))
        assert len(set(sizes)) == 33 and sum(sizes) < 1.012 * sum(range(begin, 2 * begin))
        assert not any(size % 64 for size in sizes)
    small = range(1100)
    assert all(padded_size(count, coarse=False) <= padded_size(count) for count in small)
    assert len({padded_size(count, coarse=False) for count in small}) < 70 and padded_size(0, coarse=False) == 0


@pytest.mark.parametrize("budget", [1024, 11264, 65536])
def test_a_pass_that_fills_its_budget_is_not_much_larger_for_its_padding(budget):
    """The plan's numbers of tokens are such sizes themselves, so it need not count the padding of passes within them."""
    assert padded_size(budget, coarse=False) == budget


def test_batches_of_about_the_same_size_have_the_same_shapes():
    shapes = set()
    for seed in range(3):
        lengths = [(25 + i + seed, 30 - i) for i in range(9)]
        padded = pack(*sides(lengths, seed)).padded()
        shapes.add((padded.num_tokens, padded.num_sequences, padded.max_seqlen, len(padded.rows)))
    assert len(shapes) == 1


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
@pytest.mark.parametrize("coarse", [True, False])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_log_probs_and_their_gradients(name, lengths, coarse):
    model = float64(tiny(name))
    batch = pack(*sides(lengths))
    padded = batch.padded(coarse=coarse)
    expected, found = causal_logps(model, batch), causal_logps(model, padded)
    assert_equal(found[: batch.num_tokens], expected)
    assert not found[batch.num_tokens :].any()
    upstream = torch.randn(padded.num_tokens, dtype=torch.float64)  # of the padding too
    assert_equal(
        gradients(model, (found * upstream).sum()), gradients(model, (expected * upstream[: batch.num_tokens]).sum())
    )


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("coarse", [True, False])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_the_losses_of_rto_and_all_gradients(lengths, coarse, weighted):
    inputs = micro_batch(lengths, weighted)
    padded = poisoned(inputs.padded(coarse=coarse), inputs.batch.num_tokens)
    for model, loss, args, tolerance in (
        (float64(tiny("llama")), policy_loss, (RTO, 0.7), {}),
        (scorer(), value_loss, (RTO, STATISTICS), dict(rtol=1e-5, atol=1e-7)),  # scores are float32
    ):
        (expected, metrics), (found, padded_metrics) = loss(model, inputs, *args), loss(model, padded, *args)
        assert_equal(found, expected)
        assert_equal(padded_metrics, metrics, **tolerance)
        assert expected != 0 and all(value != 0 for value in metrics.values() if value.dtype.is_floating_point)
        assert_equal(gradients(model, found), gradients(model, expected), **tolerance)


def test_scores_of_whole_sequences():
    model = scorer()
    batch = pack_whole([[5, 6, 7], [8], [9, 10, 11, 12, 13, 14]])
    padded = batch.padded()
    assert not len(padded.rows)
    torch.testing.assert_close(token_scores(model, padded)[: batch.num_tokens], token_scores(model, batch))


class Sizes(list):
    """A function of a model that records the sizes of its passes."""

    def __init__(self, function):
        self.function = function

    def __call__(self, module, inputs, *args, **options):
        batch = getattr(inputs, "batch", inputs)
        self.append((batch.num_tokens, len(batch.rows)))
        return self.function(module, inputs, *args, **options)


def test_eager_passes_have_few_sizes_where_they_are_padded_and_their_results_are_the_batchs(monkeypatch):
    model, inputs = Model(float64(tiny("llama"))), micro_batch([(40, 60)] * 30)
    batch, found = inputs.batch, []
    for pads in (False, True):
        monkeypatch.setattr(Model, "_pads", lambda self, pads=pads: pads)
        score, learn = Sizes(causal_logps), Sizes(policy_loss)
        with torch.no_grad():
            logps = model.forward(score, batch)
        metrics = model.learn(learn, inputs, RTO, 1.0, backward=lambda loss: loss.backward(), factor=2.0)
        found.append((logps, metrics, [p.grad for p in model.module.parameters()]))
        model.module.zero_grad()
        sizes = (batch.num_tokens, len(batch.rows)) if not pads else (3008, 1856)
        assert score == learn == [sizes]
    assert_equal(found[1], found[0])


def test_on_a_cpu_no_pass_is_padded():
    model, batch, score = Model(float64(tiny("llama"))), pack(*sides(LENGTHS[2])), Sizes(causal_logps)
    with torch.no_grad():
        model.forward(score, batch)
    assert score == [(batch.num_tokens, len(batch.rows))]
