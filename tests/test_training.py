"""The optimizer engine and the data order."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch

from rto_fast.config import DeepSpeedConfig, StageConfig
from rto_fast.errors import TrainingError
from rto_fast.training.optimizer import Optimizer, learning_rate_factor
from rto_fast.training.order import ShuffledIndices
from rto_fast.training.supervised import SupervisedTrainer


def test_schedule_warms_up_and_follows_a_cosine_to_its_floor():
    factors = [learning_rate_factor(s, 100, 0.1, 0.2) for s in range(101)]
    assert factors[0] == pytest.approx(1 / 11) and factors[9] == pytest.approx(10 / 11) and factors[10] == 1.0
    assert factors[55] == pytest.approx(0.6) and factors[100] == pytest.approx(0.2)
    assert all(a >= b for a, b in zip(factors[10:], factors[11:]))


def regression(dtype, steps=20, **options):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8)).to(dtype)
    stage = StageConfig(**{"lr": 1e-2, "weight_decay": 0.1, "max_grad_norm": 0.5, "warmup_ratio": 0.0} | options)
    optimizer = Optimizer(model, stage, steps)
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
        model(x).square().mean().backward()
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
        (model(x).float().sum(-1) * model[0].weight.float().sum()).mean().backward()
        assert all(p.grad is None for p in model.parameters())  # collected in float32, and freed
        optimizer.step()
    moved = (optimizer.masters[0] - before).abs().max().item()
    assert 1e-5 < moved < 1e-3
    assert torch.equal(model[0].weight, optimizer.masters[0].bfloat16())


def test_bfloat16_gradients_accumulate_in_float32():
    model, optimizer, _ = regression(torch.bfloat16)
    for value in (1.0, 2.0**-9):  # 1 + 2⁻⁹ is no bfloat16
        (model[0].weight.sum() * value).backward()
    assert (optimizer.masters[0].grad == 1 + 2.0**-9).all()


def test_a_non_finite_gradient_skips_the_update_and_is_counted():
    model, optimizer, data = regression(torch.float32)
    before = [p.clone() for p in model.parameters()]
    (model(data[0]).mean() * math.inf).backward()
    assert not math.isfinite(optimizer.step()["grad_norm"])
    assert (optimizer.skipped, optimizer.steps) == (1, 1)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_restored_optimizer_goes_on_bitwise(dtype):
    model, optimizer, data = regression(dtype)

    def train(model, optimizer, data):
        for x in data:
            model(x).float().square().mean().backward()
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


def linear_trainer(say=print, **options):
    """y = w·x on ten items; the loss is the mean over the step's items."""
    torch.manual_seed(0)
    x, y, model = torch.randn(10, 3), torch.randn(10), torch.nn.Linear(3, 1, bias=False)

    def loss(indices, step):
        error = model(x[indices])[:, 0] - y[indices]
        return error.square().sum() / len(step), {"items": torch.tensor(len(indices) / len(step))}

    stage = StageConfig(**{"batch_size": 4, "epochs": 3, "lr": 0.1} | options)
    config = SimpleNamespace(seed=0, deepspeed=DeepSpeedConfig())
    return SupervisedTrainer(model, stage, [5] * 10, loss, config, say)


def test_a_step_is_the_same_whatever_its_micro_batches():
    whole, split = linear_trainer(), linear_trainer(micro_batch_tokens=6)
    for _ in range(3):
        a, b = whole.step(), split.step()
        assert a["loss"].item() == pytest.approx(b["loss"].item()) and b["items"].item() == 1 and a["tokens"] == 20
    torch.testing.assert_close(whole.model.weight, split.model.weight)


def run_out_of_memory(optimizer, passes):
    """The backward after so many fails, once, when it has left its gradient."""
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
    assert torch.equal(failing.model.weight, half.model.weight)
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
    model[0].weight.grad = torch.ones_like(model[0].weight)  # not yet collected
    optimizer.zero_grad()
    assert all(p.grad is None for p in [*model.parameters(), *optimizer.masters])


def test_a_restored_trainer_goes_on_bitwise():
    first, second = linear_trainer(), linear_trainer()
    for _ in range(3):
        first.step()
    state = copy.deepcopy(first.state_dict())
    while first.step_count < first.steps:
        first.step()
    second.load_state_dict(state)
    while second.step_count < second.steps:
        second.step()
    assert torch.equal(first.model.weight, second.model.weight) and first.optimizer.steps == second.optimizer.steps == 7


def test_steps_of_a_stage():
    assert linear_trainer().steps == 7
    assert linear_trainer(max_steps=5).steps == 5
    assert linear_trainer(batch_size=40, epochs=1).steps == 1
    with pytest.raises(ValueError, match="no data"):
        ShuffledIndices(0, seed=0)


def test_training_stops_when_no_gradient_is_finite_any_more():
    model, optimizer, data = regression(torch.float32)
    with pytest.raises(TrainingError, match="10 steps in a row"):
        for _ in range(20):
            (model(data[0]).mean() * math.nan).backward()
            assert optimizer.step()["skipped"] == 1
    assert optimizer.steps == 9
    _, restored, _ = regression(torch.float32)
    restored.load_state_dict(optimizer.state_dict())
    assert restored.skipped_in_a_row == 10


def test_in_a_short_stage_half_of_the_steps_are_enough_to_stop():
    model, optimizer, data = regression(torch.float32, steps=4)
    with pytest.raises(TrainingError, match="2 steps in a row"):
        for _ in range(4):
            (model(data[0]).mean() * math.nan).backward()
            optimizer.step()
