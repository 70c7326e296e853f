"""The optimizer engine and the data order."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch

from rto_fast.config import DeepSpeedConfig, OptimizerConfig, SFTConfig
from rto_fast.data.layouts import Example
from rto_fast.data.tokenizing import Demonstration, Pair, Prompt
from rto_fast.errors import TrainingError
from rto_fast.models.graphs import PassGraphs
from rto_fast.models.model import Model
from rto_fast.stages import SupervisedTrainer
from rto_fast.training.optimizer import Optimizer, count_steps, learning_rate_factor
from rto_fast.training.order import ShuffledIndices, fingerprint


def test_schedule_warms_up_and_follows_a_cosine_to_its_floor():
    factors = [learning_rate_factor(s, 100, 0.1, 0.2) for s in range(101)]
    assert factors[0] == pytest.approx(1 / 11) and factors[9] == pytest.approx(10 / 11) and factors[10] == 1.0
    assert factors[55] == pytest.approx(0.6) and factors[100] == pytest.approx(0.2)
    assert all(a >= b for a, b in zip(factors[10:], factors[11:]))


def regression(dtype, steps=20, lr=1e-2, **options):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8)).to(dtype)
    settings = OptimizerConfig(**{"weight_decay": 0.1, "max_grad_norm": 0.5, "warmup_ratio": 0.0} | options)
    optimizer = Optimizer(Model(model), SFTConfig(lr=lr), settings, steps)
    data = torch.randn(steps, 4, 8).to(dtype)
    return model, optimizer, data


def test_a_float32_step_is_torchs_adamw_with_clipping():
    model, optimizer, data = regression(torch.float32)
    torch.manual_seed(0)
    other = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8))
    matrices, vectors = [other[0].weight], [other[0].bias, *other[1].parameters()]
    adam = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}], betas=(0.9, 0.95)
    )
    for step, x in enumerate(data):
        optimizer.backward(model(x).square().mean())
        values = optimizer.step()
        other(x).square().mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(other.parameters(), 0.5)
        for group in adam.param_groups:
            group["lr"] = 1e-2 * learning_rate_factor(step, 20, 0.0, 0.1)
        adam.step()
        adam.zero_grad()
        assert values["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    for a, b in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(a, b)


def test_bfloat16_weights_keep_updates_smaller_than_their_precision():
    model, optimizer, data = regression(torch.bfloat16, lr=1e-5, weight_decay=0.0, min_lr_ratio=1.0)
    before = optimizer.masters[0].clone()
    for x in data:
        optimizer.backward((model(x).float().sum(-1) * model[0].weight.float().sum()).mean())
        assert all(p.grad is None for p in model.parameters())  # collected in float32, and freed
        optimizer.step()
    moved = (optimizer.masters[0] - before).abs().max().item()
    assert 1e-5 < moved < 1e-3
    assert torch.equal(model[0].weight, optimizer.masters[0].bfloat16())


def test_bfloat16_gradients_accumulate_in_float32():
    model, optimizer, _ = regression(torch.bfloat16)
    for value in (1.0, 2.0**-9):  # 1 + 2⁻⁹ is no bfloat16
        optimizer.backward(model[0].weight.sum() * value)
    assert (model[0].weight.main_grad == 1 + 2.0**-9).all()


def test_a_non_finite_gradient_skips_the_update_and_is_counted():
    model, optimizer, data = regression(torch.float32)
    before = [p.clone() for p in model.parameters()]
    optimizer.backward(model(data[0]).mean() * math.inf)
    assert not math.isfinite(optimizer.step()["grad_norm"])
    assert (optimizer.skipped, optimizer.steps) == (1, 1)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_restored_optimizer_goes_on_bitwise(dtype):
    model, optimizer, data = regression(dtype)

    def train(model, optimizer, data):
        for x in data:
            optimizer.backward(model(x).float().square().mean())
            optimizer.step()

    train(model, optimizer, data[:7])
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.utils._pytree.tree_map(lambda x: x.clone() if torch.is_tensor(x) else x, optimizer.state_dict())
    train(model, optimizer, data[7:])
    other, restored, _ = regression(dtype)
    other.load_state_dict(weights)
    restored.load_state_dict(state)
    train(other, restored, data[7:])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))


def test_each_epoch_visits_everything_once_in_a_new_order():
    order = ShuffledIndices(10, seed=1)
    taken = order.take(4) + order.take(4) + order.take(12)
    assert sorted(taken[:10]) == sorted(taken[10:]) == list(range(10)) and taken[:10] != taken[10:]
    assert ShuffledIndices(10, seed=2).take(10) != ShuffledIndices(10, seed=3).take(10)


def test_a_restored_order_goes_on():
    order = ShuffledIndices(7, seed=1)
    order.take(10)
    other = ShuffledIndices(7, seed=1)
    other.load_state_dict(order.state_dict())
    assert order.take(9) == other.take(9)


def linear_trainer(say=print, items=10, data="", seen=None, micro_batch_tokens=16384, optimizer=None, **options):
    """y = w·x on some items; the loss is the mean over the step's items. seen: takes the items of each step."""
    torch.manual_seed(0)
    model, x, y = torch.nn.Linear(3, 1, bias=False), torch.randn(items, 3), torch.randn(items)

    def work(indices, step):
        if seen is not None and indices[0] == step[0]:
            seen.append(step)
        return loss_of, indices, len(step)

    def loss_of(module, indices, count):
        loss = (module(x[indices])[:, 0] - y[indices]).square().sum() / count
        return loss, {"loss": loss.detach(), "items": torch.tensor(len(indices) / count)}

    stage = SFTConfig(**{"batch_size": 4, "epochs": 3, "lr": 0.1} | options)
    optimizer = OptimizerConfig(**optimizer or {})
    config = SimpleNamespace(seed=0, deepspeed=DeepSpeedConfig(), optimizer=optimizer)
    order = ShuffledIndices(items, config.seed, stage.epochs, data)
    return SupervisedTrainer(Model(model), stage, order, [5] * items, work, config, micro_batch_tokens, say)


def train(trainer, steps=None):
    """Steps it to its end, or so often; returns the metrics."""
    end = trainer.steps if steps is None else trainer.step_count + steps
    return [trainer.step() for _ in range(end - trainer.step_count)]


def test_a_step_is_the_same_whatever_its_micro_batches():
    whole, split = linear_trainer(), linear_trainer(micro_batch_tokens=6)
    for _ in range(3):
        a, b = whole.step(), split.step()
        assert a["loss"].item() == pytest.approx(b["loss"].item()) and b["items"].item() == 1 and a["tokens"] == 20
    torch.testing.assert_close(whole.model.module.weight, split.model.module.weight)


def run_out_of_memory(optimizer, passes):
    """The backward after so many fails, once, when it has left its gradient."""
    PassGraphs.drop()  # what other tests recorded would be given back first
    backward, calls = optimizer.backward, iter(range(passes + 1))

    def failing(loss):
        backward(loss)
        if next(calls, None) == passes:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")

    optimizer.backward = failing


def test_a_step_that_runs_out_of_memory_is_begun_anew_with_half_the_tokens():
    said = []
    failing, half = linear_trainer(micro_batch_tokens=15, say=said.append), linear_trainer(micro_batch_tokens=7)
    run_out_of_memory(failing.optimizer, 1)
    assert [failing.step() for _ in range(3)] == [half.step() for _ in range(3)]
    assert torch.equal(failing.model.module.weight, half.model.module.weight)
    assert said == ["out of memory with micro-batches of 15 tokens; goes on with 7"]
    resumed, other = linear_trainer(micro_batch_tokens=15), linear_trainer(micro_batch_tokens=12)
    for trainer in (resumed, other):
        trainer.load_state_dict(failing.state_dict())
    assert (resumed.accumulator.tokens, other.accumulator.tokens) == (7, 12)  # 12: lowered by the user


def test_a_larger_budget_than_the_step_is_lowered_to_one_that_makes_a_difference():
    trainer = linear_trainer(micro_batch_tokens=16384)  # a step has 20
    run_out_of_memory(trainer.optimizer, 0)
    trainer.step()
    assert trainer.accumulator.tokens == 16


def test_an_item_is_never_cut():
    trainer = linear_trainer(micro_batch_tokens=5)
    run_out_of_memory(trainer.optimizer, 0)
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        trainer.step()


def test_a_bfloat16_backward_that_broke_off_leaves_nothing():
    model, optimizer, data = regression(torch.bfloat16)
    optimizer.backward(model(data[0]).float().sum())
    model[0].weight.grad = torch.ones_like(model[0].weight)  # not yet collected
    optimizer.gradients.pending[model[0].bias] = torch.ones_like(model[0].bias)
    optimizer.zero_grad()
    assert all(p.grad is None and not p.main_grad.any() for p in model.parameters()) and not optimizer.gradients.pending


def test_a_restored_trainer_goes_on_bitwise():
    first, second = linear_trainer(), linear_trainer()
    train(first, 3)
    state = copy.deepcopy(first.state_dict())
    expected = train(first)
    second.load_state_dict(state)
    assert train(second) == expected and expected[-1]["tokens"] == 10  # the last step has two items
    assert (
        torch.equal(first.model.module.weight, second.model.module.weight)
        and first.optimizer.steps == second.optimizer.steps == 8
    )


@pytest.mark.parametrize(
    "items, epochs, batch_size", [(10, 3, 4), (60, 1, 31), (60, 1, 59), (12, 2, 4), (3, 1, 128), (3, 5, 128), (1, 1, 1)]
)
def test_a_stage_trains_on_all_of_its_data_as_often_as_it_has_epochs(items, epochs, batch_size):
    seen = []
    trainer = linear_trainer(
        items=items, epochs=epochs, batch_size=batch_size, optimizer={"min_lr_ratio": 0.0}, seen=seen
    )
    metrics = train(trainer)
    assert sorted(index for step in seen for index in step) == sorted([*range(items)] * epochs)
    total, last = len(seen), items * epochs % batch_size or batch_size
    assert [len(step) for step in seen] == [min(batch_size, items * epochs)] * (total - 1) + [last]
    assert total == trainer.steps == count_steps(items * epochs, batch_size)
    assert all(step["items"].item() == pytest.approx(1) for step in metrics)  # a mean over the step's own items
    for number, step in enumerate(metrics):
        assert step["lr"] == 0.1 * learning_rate_factor(number, total, 0.03, 0.0)


def test_a_smaller_last_step_is_normalised_by_its_own_number_of_items():
    trainer = linear_trainer(items=5, epochs=1, batch_size=3, micro_batch_tokens=5, optimizer={"max_grad_norm": 1e9})
    train(trainer, 1)
    weight = trainer.model.module.weight.detach().clone().requires_grad_()
    left = trainer.order._order[3:]
    torch.manual_seed(0)
    _, x, y = torch.nn.Linear(3, 1, bias=False), torch.randn(5, 3), torch.randn(5)
    (x[left] @ weight[0] - y[left]).square().mean().backward()
    assert train(trainer)[-1]["grad_norm"] == pytest.approx(weight.grad.norm().item(), rel=1e-6)


def test_steps_of_a_stage():
    assert linear_trainer(max_steps=5).steps == 5
    assert linear_trainer(max_steps=9).steps == 8
    with pytest.raises(ValueError, match="no data"):
        ShuffledIndices(0, seed=0)


# 3 steps of 4 items, of 10 items 3 times; then the stage goes on with other data or another batch size.
@pytest.mark.parametrize(
    "changes, left",
    [
        ({"items": 5}, [3]),
        ({"items": 4}, []),
        ({"items": 1}, []),
        ({"items": 100}, [4] * 72),
        ({"items": 11, "epochs": 2}, [4, 4, 2]),
        ({"batch_size": 7}, [7, 7, 4]),
        ({"batch_size": 1}, [1] * 18),
        ({"epochs": 1}, []),
        ({"epochs": 2}, [4, 4]),
        ({"max_steps": 4}, [4]),
        ({"max_steps": 2}, []),
    ],
)
def test_a_stage_that_goes_on_with_other_data_ends_when_that_is_visited(changes, left):
    before, seen = linear_trainer(data="one"), []
    train(before, 3)
    after = linear_trainer(**{"data": "one", "seen": seen} | changes)
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    assert after.steps == after.optimizer.total_steps == 3 + len(left)
    train(after)
    assert [len(step) for step in seen] == left
    # As if this had been the data from the beginning: what comes after the first twelve visits.
    order = ShuffledIndices(after.order.size, 0)
    order.take(12)
    assert [index for step in seen for index in step] == order.take(sum(left))


def test_a_checkpoint_of_an_older_version_goes_on_in_its_data_and_on_shorter_data():
    """It knew no size of the data, and its stage would have ended before the last two of the 30 visits."""
    trainer = linear_trainer(data="one")
    train(trainer, 5)
    old = trainer.state_dict() | {"order": {"epoch": 1, "position": 10}}
    for items, left in ((10, [4, 4, 2]), (5, [4, 1])):
        seen = []
        resumed = linear_trainer(items=items, data="one", seen=seen)
        resumed.load_state_dict(copy.deepcopy(old))
        train(resumed)
        assert [len(step) for step in seen] == left


def test_a_state_tells_whether_the_data_is_the_same():
    def order(size, data):
        return ShuffledIndices(size, seed=0, epochs=1, fingerprint=data)

    state = order(5, "a").state_dict()
    assert order(5, "a").difference(state) is None
    assert order(5, "b").difference(state) == "its items are not those of the checkpoint, or in another order"
    assert order(1000, "b").difference(state) == "1,000 items, it had 5 when the checkpoint was made"
    old = {"epoch": 0, "position": 5}
    assert order(5, "a").difference(old) is None  # it does not say
    assert "fewer than when" in order(4, "a").difference(old)


def test_a_fingerprint_changes_with_all_that_is_trained_on():
    def prompt(ids=(1, 2), text="a", origin="data.jsonl:1", **columns):
        return Prompt(list(ids), text, columns, origin)

    def pair(chosen=(3,), rejected=(4, 5), origin="data.jsonl:1"):
        return Pair([1, 2], list(chosen), list(rejected), Example("a", origin=origin))

    different = [
        [],
        [prompt()],
        [prompt(), prompt()],
        [prompt((1, 2, 3))],
        [prompt((2, 1))],
        [prompt(text="b")],
        [prompt(answer="4")],
        [prompt(answer="5")],
        [prompt(answer=4)],
        [prompt(), prompt(text="b")],
        [prompt(text="b"), prompt()],
        [pair()],
        [pair((3, 4), (5,))],
        [pair((4, 5), (3,))],
        [Demonstration([1, 2], [3])],
        [Demonstration([1], [2, 3])],
        [prompt(answer="\ud800")],
    ]
    assert len({fingerprint(items) for items in different}) == len(different)
    assert fingerprint([prompt()]) == fingerprint([prompt(origin="elsewhere")])
    assert fingerprint([pair()]) == fingerprint([pair(origin="elsewhere")])
    assert fingerprint([prompt(image=object())]) == fingerprint([prompt(image=object())])


def test_training_stops_when_no_gradient_is_finite_any_more():
    model, optimizer, data = regression(torch.float32)
    with pytest.raises(TrainingError, match="10 steps in a row"):
        for _ in range(20):
            optimizer.backward(model(data[0]).mean() * math.nan)
            assert optimizer.step()["skipped"] == 1
            optimizer.check()
    assert optimizer.steps == 10
    _, restored, _ = regression(torch.float32)
    restored.load_state_dict(optimizer.state_dict())
    assert restored.skipped_in_a_row == 10


def test_in_a_short_stage_half_of_the_steps_are_enough_to_stop():
    model, optimizer, data = regression(torch.float32, steps=4)
    with pytest.raises(TrainingError, match="2 steps in a row"):
        for _ in range(4):
            optimizer.backward(model(data[0]).mean() * math.nan)
            optimizer.step()
            optimizer.check()
