"""The buffer of an optimizer's gradients, and steps that wait for nothing."""

import gc
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from rto_fast.config import OptimizerConfig, SFTConfig
from rto_fast.models.model import Model
from rto_fast.training import gradients
from rto_fast.training.optimizer import Optimizer
from tests.waits import NoWaits

DTYPES = [torch.float32, torch.bfloat16]


class Adds(torch.autograd.Function):
    """x @ weight.T, whose backward adds the weight's gradient to its `main_grad`, as our layers do."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        ctx.weight = weight
        return x @ weight.t()

    @staticmethod
    def backward(ctx, upstream):
        x, weight = ctx.saved_tensors
        if hasattr(ctx.weight, "main_grad"):
            ctx.weight.main_grad.addmm_(upstream.t().float(), x.float())
            return upstream @ weight, None
        return upstream @ weight, upstream.t() @ x


class Network(nn.Module):
    """Weights that are neighbours in the model, a bias between them, and one weight that is used twice."""

    def __init__(self, own=True):
        super().__init__()
        self.embedding = nn.Embedding(16, 32)
        self.query, self.key, self.value = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32, bias=False)
        self.norm, self.own = nn.LayerNorm(32), own

    def forward(self, ids):
        x = self.norm(self.embedding(ids))
        x = self.query(x) * self.key(x).tanh()
        x = Adds.apply(x, self.value.weight) if self.own else self.value(x)
        return x @ self.embedding.weight.t()


def make(dtype, own=True, **options):
    torch.manual_seed(0)
    model = Network(own).to(dtype)
    settings = OptimizerConfig(**{"weight_decay": 0.1, "max_grad_norm": 0.5, "warmup_ratio": 0.0} | options)
    return model, Optimizer(Model(model), SFTConfig(lr=1e-2), settings, 20)


def loss_of(model, seed=0, size=8):
    ids = torch.randint(0, 16, (size,), generator=torch.Generator().manual_seed(seed))
    return model(ids).float().log_softmax(-1).gather(-1, ids[:, None]).sum() / size


def truth(model, seeds):
    """The float64 gradients of the summed losses, by name."""
    double = Network(own=False).double()
    double.load_state_dict(model.state_dict())
    sum(loss_of(double, seed) for seed in seeds).backward()
    return {name: parameter.grad for name, parameter in double.named_parameters()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("large", [1, 1 << 20])
def test_gradients_of_both_kinds_add_up(dtype, large, monkeypatch):
    """Those that a layer adds to `main_grad`, and those that come through autograd, over micro-batches."""
    monkeypatch.setattr(gradients, "LARGE", large)
    model, optimizer = make(dtype)
    for seed in range(3):
        optimizer.backward(loss_of(model, seed))
    for name, expected in truth(model, range(3)).items():
        parameter = model.get_parameter(name)
        actual = parameter.main_grad
        assert actual.dtype == torch.float32 and actual.shape == parameter.shape
        error = (actual.double() - expected).norm() / expected.norm()
        assert error < 8 * torch.finfo(dtype).eps, name
        assert dtype == torch.float32 or parameter.grad is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_neighbours_lie_side_by_side(dtype):
    """Matrices of a model follow one another, also with biases between them: one product writes all their gradients."""
    model, optimizer = make(dtype)
    optimizer.gradients.make()
    weights = [part.weight.main_grad for part in (model.query, model.key, model.value)]
    biases = [part.bias.main_grad for part in (model.query, model.key)]
    for group in (weights, biases):
        for one, other in zip(group, group[1:]):
            assert other.data_ptr() == one.data_ptr() + 4 * one.numel()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_gradient_begins_where_vectors_are_loaded(dtype):
    odd = nn.Sequential(nn.Linear(5, 3), nn.LayerNorm(3), nn.Linear(3, 1)).to(dtype)
    optimizer = Optimizer(Model(odd), SFTConfig(lr=1e-2), OptimizerConfig(), 20)
    flat = optimizer.gradients.make()
    for parameter in odd.parameters():
        assert (parameter.main_grad.data_ptr() - flat.data_ptr()) % 128 == 0


def test_small_gradients_wait_within_a_bound(monkeypatch):
    model, optimizer = make(torch.bfloat16, own=False)
    waiting, collected, take, collect = [], [], optimizer.gradients._take, optimizer.gradients.collect

    def watch(parameter):
        take(parameter)
        waiting.append(sum(g.nbytes for g in optimizer.gradients.pending.values()))

    for hook in optimizer.gradients.hooks:
        hook.remove()
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(watch)
    monkeypatch.setattr(gradients, "PENDING_BYTES", 2500)
    monkeypatch.setattr(
        optimizer.gradients, "collect", lambda: (collected.append(len(optimizer.gradients.pending)), collect())
    )
    optimizer.backward(loss_of(model))
    assert max(waiting) <= 2500 and len(waiting) == len(list(model.parameters()))
    assert sum(collected) == len(waiting) and len(collected) > 2
    for name, expected in truth(model, [0]).items():
        error = (model.get_parameter(name).main_grad.double() - expected).norm()
        assert error < 8 * torch.finfo(torch.bfloat16).eps * expected.norm()


def test_one_call_never_adds_twice_to_one_place():
    """A checkpoint inside of a backward pass may give a weight two gradients."""
    model, optimizer = make(torch.bfloat16)
    optimizer.gradients.make()
    weight = model.query.weight
    for value in (1.0, 2.0**-9):
        weight.grad = torch.full_like(weight, value)
        optimizer.gradients._take(weight)
    optimizer.gradients.collect()
    assert (weight.main_grad == 1 + 2.0**-9).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_memory_is_given_back_unless_it_is_kept(dtype):
    model, optimizer = make(dtype)
    optimizer.backward(loss_of(model))
    optimizer.step()
    where = optimizer.gradients.flat.data_ptr()
    assert not optimizer.gradients.flat.any()
    optimizer.model.graphs = SimpleNamespace(trains=True)
    optimizer.free_gradients()
    optimizer.backward(loss_of(model))
    assert optimizer.gradients.flat.data_ptr() == where and model.norm.weight.main_grad.any()
    optimizer.zero_grad()
    optimizer.model.graphs.trains = False
    optimizer.free_gradients()
    assert optimizer.gradients.flat is None and all(tensor.grad is None for tensor in optimizer.updated)
    assert not any(hasattr(p, "main_grad") or p.grad is not None for p in model.parameters())
    optimizer.backward(loss_of(model))  # and it goes on
    assert model.norm.weight.main_grad.any()
    optimizer.release()
    loss_of(model).backward()  # ordinary gradients again
    assert all(p.grad is not None and not hasattr(p, "main_grad") for p in model.parameters())


def collected(model):
    return [parameter.main_grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_optimizer_that_is_used_owns_the_gradients(dtype):
    """Also while another one of the same model exists, and when it is gone the gradients are ordinary ones again."""
    model, first = make(dtype)
    first.backward(loss_of(model))
    expected = collected(model)
    second = Optimizer(Model(model), SFTConfig(lr=1e-2), first.settings, 20)
    for optimizer in (second, first, second):
        optimizer.zero_grad()
        optimizer.make_gradients()
        optimizer.backward(loss_of(model))
        assert all(map(torch.equal, collected(model), expected))
        assert torch.equal(optimizer.gradients.flat, first.gradients.flat) and optimizer.gradients.flat.any()
    del optimizer, second
    gc.collect()
    assert not any(hasattr(p, "main_grad") or p.grad is not None for p in model.parameters())
    first.make_gradients()
    del first
    gc.collect()
    loss_of(model).backward()
    assert all(p.grad is not None and not hasattr(p, "main_grad") for p in model.parameters())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_user_who_clears_the_models_gradients_loses_none(dtype, when):
    """`Module.zero_grad` sets `grad` to None: before a backward pass it loses nothing, after it what autograd holds."""
    results = []
    for clears in (False, True):
        model, optimizer = make(dtype)
        optimizer.make_gradients()
        if clears and when == "before":
            model.zero_grad()
        optimizer.backward(loss_of(model))
        if clears and when == "after":
            model.zero_grad()
        optimizer.step()
        results.append([p.detach().clone() for p in model.parameters()])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("dtype", DTYPES)
def test_freeing_between_steps_changes_nothing(dtype):
    results = []
    for frees in (False, True):
        model, optimizer = make(dtype)
        for seed in range(4):
            optimizer.backward(loss_of(model, seed))
            optimizer.step()
            if frees:
                optimizer.free_gradients()
        results.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*results))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_is_torchs_adamw_on_float32_masters(dtype):
    """Whatever the layout: against torch's AdamW with a tensor for each weight, clipped by torch."""
    model, optimizer = make(dtype)
    masters = {name: p.detach().float().clone() for name, p in model.named_parameters()}
    groups = [[p for p in masters.values() if p.dim() > 1], [p for p in masters.values() if p.dim() < 2]]
    adam = torch.optim.AdamW(
        [{"params": groups[0], "weight_decay": 0.1}, {"params": groups[1], "weight_decay": 0.0}], betas=(0.9, 0.95)
    )
    for seed in range(5):
        optimizer.backward(loss_of(model, seed))
        for name, master in masters.items():
            master.grad = model.get_parameter(name).main_grad.clone()
        norm = torch.nn.utils.clip_grad_norm_(list(masters.values()), 0.5)
        metrics = optimizer.step()
        for group in adam.param_groups:
            group["lr"] = metrics["lr"]
        adam.step()
        assert metrics["grad_norm"].item() == pytest.approx(norm.item(), rel=1e-5)
    assert norm > 0.5  # it was clipped
    for name, master in masters.items():
        torch.testing.assert_close(dict(zip(optimizer.names, optimizer.masters))[name], master, rtol=1e-5, atol=1e-7)
        assert torch.equal(model.get_parameter(name), dict(zip(optimizer.names, optimizer.masters))[name].to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_and_step_wait_for_nothing(dtype):
    model, optimizer = make(dtype)
    with NoWaits():
        for seed in range(3):
            optimizer.backward(loss_of(model, seed))
            optimizer.backward(loss_of(model, seed) * (math.nan if seed == 1 else 1.0))
            metrics = optimizer.step()
            optimizer.free_gradients()
    assert metrics["skipped"] == 0 and (optimizer.steps, optimizer.skipped, optimizer.skipped_in_a_row) == (3, 1, 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_skipped_step_changes_nothing_but_the_count(dtype, bad):
    """Neither weights, nor moments, nor the step that AdamW's bias correction counts; the schedule goes on."""
    models = []
    for skips in (False, True):
        model, optimizer = make(dtype, min_lr_ratio=1.0)
        for seed in range(4):
            if skips and seed in (0, 2):  # also the very first
                optimizer.backward(loss_of(model, seed) * bad)
                assert optimizer.step()["skipped"] == 1
            optimizer.backward(loss_of(model, seed))
            optimizer.step()
        models.append((model, optimizer))
    (one, first), (other, second) = models
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters()))
    assert all(torch.equal(first.moments[key], second.moments[key]) for key in first.moments)
    assert (second.steps, second.skipped, second.skipped_in_a_row) == (6, 2, 0)
    assert all(values["step"] == 4 for values in second.adam.state.values())


def test_a_weight_without_a_gradient_has_one_of_0():
    """Its state is in the checkpoint like that of the others."""
    model, optimizer = make(torch.float32)
    model.unused = model.key
    optimizer.backward(model.norm(model.embedding(torch.arange(3))).sum())
    optimizer.step()
    assert set(optimizer.state_dict()["exp_avg"]) == {name for name, _ in model.named_parameters()}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="what a GPU waits for only a GPU shows")
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_a_gpu_a_step_is_that_of_a_cpu_and_waits_for_nothing(dtype):
    weights = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64)).to(dtype).to(device)
        settings = OptimizerConfig(weight_decay=0.1, max_grad_norm=0.5)
        optimizer = Optimizer(Model(model), SFTConfig(lr=1e-2), settings, 20)
        data = torch.randn(4, 8, 64, generator=torch.Generator().manual_seed(0)).to(device, dtype)
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            for number, x in enumerate(data):
                optimizer.backward(model(x).float().square().mean() * (math.nan if number == 1 else 1.0))
                optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert optimizer.skipped == 1
        weights.append([master.cpu() for master in optimizer.masters])
    for one, other in zip(*weights):
        torch.testing.assert_close(one, other, rtol=0.02 if dtype == torch.bfloat16 else 1e-4, atol=1e-4)
