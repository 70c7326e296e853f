"""The losses of the stages before RTO against a plain form, one example at a time, and on padded micro-batches."""

import math

import pytest
import torch

from rto_fast.config import DPOConfig
from rto_fast.data.tokenizing import Demonstration, Pair
from rto_fast.models.forward import causal_logps, token_scores
from rto_fast.models.graphs import PassGraphs
from rto_fast.models.model import Model
from rto_fast.training.supervised import (
    dpo_batch,
    dpo_loss,
    packed_sides,
    reward_batch,
    reward_loss,
    text_batch,
    text_loss,
    whole_sides,
)
from tests.models.test_graphs import Repeated, backward, clear, gradients
from tests.models.test_padding import float64, scorer
from tests.tiny_models import tiny

STEP = 7  # examples of the optimizer step, more than those of a micro-batch
DPO = DPOConfig(beta=0.3, label_smoothing=0.1)


def draw(seed, *lengths):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 97, (n,), generator=generator).tolist() for n in lengths]


def pairs(count=5, seed=0):
    return [Pair(*draw(seed + i, 4 + i, 12 - i, 3 + 2 * i), None) for i in range(count)]


def texts(count=5, seed=0):
    return [Demonstration(*draw(seed + i, 4 + i, 12 - i)) for i in range(count)]


def reference_of(count, seed=0):
    return -10.0 * torch.rand(count, 2, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def summed(model, prompt, response):
    rows = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
    return sum(rows[len(prompt) - 1 + i, token] for i, token in enumerate(response))


CASES = {
    "text": (tiny, text_loss, lambda count, seed: text_batch(texts(count, seed), 40.0, False, "cpu"), ()),
    "reward": (scorer, reward_loss, lambda count, seed: reward_batch(pairs(count, seed), STEP, "cpu"), ()),
    "dpo": (
        tiny,
        dpo_loss,
        lambda count, seed: dpo_batch(pairs(count, seed), reference_of(count, seed), STEP, "cpu"),
        (DPO,),
    ),
}


def test_text_loss_is_the_mean_over_all_labelled_tokens():
    model = float64(tiny())
    plain = tiny().double()
    loss, metrics = text_loss(model, text_batch(texts(), 40.0, False, "cpu"))
    expected = -sum(summed(plain, text.prompt_ids, text.response_ids) for text in texts()) / 40.0
    torch.testing.assert_close(loss, expected)
    assert metrics["loss"] == loss and not metrics["loss"].requires_grad


def test_reward_loss_is_bradley_terrys_of_the_last_scores():
    model = scorer()
    found, metrics = reward_loss(model, reward_batch(pairs(), STEP, "cpu"))
    plain = scorer()
    plain.set_attn_implementation("eager")
    score = lambda ids: plain.score(plain.model(torch.tensor([ids])).last_hidden_state)[0, -1, 0]  # noqa: E731
    margins = [score(p.prompt_ids + p.chosen_ids) - score(p.prompt_ids + p.rejected_ids) for p in pairs()]
    torch.testing.assert_close(
        found.double(), sum(torch.log1p((-m).exp()) for m in margins) / STEP, rtol=1e-5, atol=1e-6
    )
    assert metrics["accuracy"].item() == pytest.approx(sum(m > 0 for m in margins).item() / STEP)


def test_dpo_loss_is_that_of_the_log_ratios():
    plain, reference = tiny().double(), reference_of(5)
    found, metrics = dpo_loss(float64(tiny()), dpo_batch(pairs(), reference, STEP, "cpu"), DPO)
    sides = [[summed(plain, p.prompt_ids, ids) for ids in (p.chosen_ids, p.rejected_ids)] for p in pairs()]
    margins = [DPO.beta * ((c - a) - (r - b)) for (c, r), (a, b) in zip(sides, reference.double().tolist())]
    expected = sum(0.9 * math.log1p(math.exp(-m)) + 0.1 * math.log1p(math.exp(m)) for m in margins) / STEP
    assert found.item() == pytest.approx(expected, rel=1e-6)
    assert metrics["margin"].item() == pytest.approx(sum(margins).item() / STEP, rel=1e-6)
    assert metrics["accuracy"].item() == pytest.approx(sum(m > 0 for m in margins).item() / STEP)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("count", [1, 5, 9])
@pytest.mark.parametrize("coarse", [True, False])
def test_padding_changes_neither_loss_nor_metrics_nor_gradients(name, count, coarse):
    make, loss, inputs_of, args = CASES[name]
    model, inputs = float64(make()), inputs_of(count, 0)
    padded = inputs.padded(coarse=coarse)
    parts = [loss(model, each, *args) for each in (inputs, padded)]
    tolerance = dict(rtol=1e-5, atol=1e-7) if name == "reward" else dict(rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(parts[1][0], parts[0][0], **tolerance, check_dtype=False)
    torch.testing.assert_close(parts[1][1], parts[0][1], **tolerance, check_dtype=False)
    expected, found = (torch.autograd.grad(value, list(model.parameters())) for value, _ in parts)
    torch.testing.assert_close(found, expected, **tolerance)
    assert parts[0][0] != 0 and padded.batch.num_tokens > inputs.batch.num_tokens


@pytest.mark.parametrize("name", CASES)
def test_graphs_give_the_gradients_of_eager_passes(name):
    make, loss, inputs_of, args = CASES[name]
    plain, model = Model(float64(make())), Model(float64(make()))
    causal_logps(model.module, packed_sides(pairs(), "cpu")) if name != "reward" else None
    model.graphs = PassGraphs(model.module, Repeated)
    adds = backward(plain.module), backward(model.module)
    for seed in range(0, 400, 100):
        for each, add in zip((plain, model), adds):
            each.learn(loss, inputs_of(5, seed), *args, backward=add)
        tolerance = dict(rtol=1e-4, atol=1e-6) if name == "reward" else dict(rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(gradients(model.module), gradients(plain.module), **tolerance)
    assert sum(bool(recorded) for recorded in model.graphs.recorded.values()) == 1
    clear(model.module)


def test_scores_of_whole_sides_are_those_of_the_sequences():
    model = scorer()
    batch = reward_batch(pairs(), STEP, "cpu").batch
    assert batch.input_ids.tolist() == sum(whole_sides(pairs()), [])
    assert token_scores(model, batch).shape == batch.input_ids.shape
