"""The Triton PPO losses against the float64 reference: values, gradients and metrics."""

import pytest
import torch

from rto_fast.kernels import ppo_losses, reference

EPS = torch.finfo(torch.float32).eps
LOSSES = ("ppo_policy_loss", "ppo_value_loss")


def make_batch(count, device, dtype=torch.float32, seed=0, masked=0.3):
    """Three tensors of an op and its mask; they are NaN outside of the mask."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(count, generator=generator) >= masked
    old = torch.randn(count, generator=generator)
    new = old + 0.3 * torch.randn(count, generator=generator)
    third = torch.randn(count, generator=generator)
    tensors = (x.where(mask, torch.nan).to(device, dtype) for x in (new, old, third))
    return *tensors, mask.to(device)


def make_weights(mask, seed=1):
    weights = torch.rand(mask.shape, generator=torch.Generator().manual_seed(seed)) + 0.2
    return weights.to(mask.device).where(mask, torch.nan)


def double(x):
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def run(module, name, batch, upstream, **options):
    first = batch[0].detach().clone().requires_grad_()
    loss, metrics = getattr(module, name)(first, *batch[1:], **options)
    (loss * upstream).backward()
    return loss.detach(), metrics, first.grad


def assert_matches(name, batch, upstream=-1.7, **options):
    loss, metrics, grad = run(ppo_losses, name, batch, upstream, **options)
    exact = {key: double(option) for key, option in options.items()}
    exact_loss, exact_metrics, exact_grad = run(reference, name, [*map(double, batch)], upstream, **exact)
    assert loss.dtype == torch.float32 and loss.shape == ()
    # Rounding errors of the terms add up; cancelling signs make the sum smaller than its terms.
    magnitude = exact_grad.abs().sum().item() + abs(exact_loss.item())
    assert loss.item() == pytest.approx(exact_loss.item(), rel=16 * EPS, abs=16 * EPS * magnitude)
    assert metrics.keys() == exact_metrics.keys()
    for key, number in exact_metrics.items():
        assert metrics[key].shape == () and metrics[key].dtype == torch.float32 and not metrics[key].requires_grad
        absolute = 16 * EPS * magnitude if key.endswith("loss") else 0.0
        assert metrics[key].item() == pytest.approx(number.item(), rel=1e-5, abs=absolute), key
    assert grad.dtype == batch[0].dtype and grad.shape == batch[0].shape
    dtype = torch.finfo(grad.dtype)  # float16 runs into its subnormals here
    bound = (dtype.eps + 16 * EPS) * exact_grad.abs() + dtype.smallest_normal * dtype.eps
    assert torch.all((grad.double() - exact_grad).abs() <= bound + 2 * EPS * magnitude / grad.numel())
    assert grad[~batch[3]].eq(0).all()
    return loss, metrics, grad


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("count", [0, 1, 63, 1000, 1024, 5000])
def test_shapes(device, name, count):
    batch = make_batch(count, device, masked=0.0 if count == 1 else 0.3)
    if count:
        loss, _, grad = assert_matches(name, batch)
        assert loss != 0 and grad.any()
    else:
        loss, metrics, grad = run(ppo_losses, name, batch, 1.0)
        assert loss == 0 and grad.shape == (0,) and not any(metrics.values())


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs(device, name, dtype):
    assert_matches(name, make_batch(1500, device, dtype), upstream=0.6)


@pytest.mark.parametrize(
    "clips",
    [
        {"clip_eps": 0.1},
        {"clip_eps_high": 0.28},
        {"clip_eps": 0.0},
        {"dual_clip": 1.1},
        {"clip_eps": 0.3, "clip_eps_high": 0.05, "dual_clip": 1.5},
    ],
    ids=str,
)
def test_policy_clips(device, clips):
    _, metrics, _ = assert_matches("ppo_policy_loss", make_batch(500, device, seed=2), **clips)
    assert 0.05 < metrics["clip_fraction"] < 0.95


@pytest.mark.parametrize("eps", [0.05, 0.4, 1e9, None])
def test_value_clips(device, eps):
    batch = make_batch(500, device, seed=3)
    _, metrics, _ = assert_matches("ppo_value_loss", batch, value_clip_eps=eps)
    assert (metrics["value_clip_fraction"] > 0) == (eps in (0.05, 0.4))


def test_values_at_the_old_values_are_not_clipped(device):
    """old + (v − old) is rounded to a value other than v, which is no clipping."""
    values = torch.randn(1000, device=device)
    old_values = values + 0.1 * torch.rand(1000, device=device)
    mask = torch.ones(1000, dtype=torch.bool, device=device)
    returns = torch.randn(1000, device=device)
    for module in (ppo_losses, reference):
        assert module.ppo_value_loss(values, old_values, returns, mask)[1]["value_clip_fraction"] == 0


def test_dual_clip_bounds_the_loss(device):
    old, advantages = torch.zeros(2, device=device), torch.tensor([-2.0, 2.0], device=device)
    batch = (torch.tensor([3.0, -3.0], device=device), old, advantages, torch.ones(2, dtype=torch.bool, device=device))
    loss, metrics, grad = assert_matches("ppo_policy_loss", batch, upstream=1.0, dual_clip=3.0)
    assert loss.item() == pytest.approx((3 * 2 - 2 * torch.tensor(-3.0).exp().item()) / 2)
    assert metrics["clip_fraction"] == 0.5 and grad[0] == 0 and grad[1] != 0


@pytest.mark.parametrize("log_ratio", [19.9, 20.1, -19.9, -20.1, 1e6, torch.inf])
@pytest.mark.parametrize("advantage", [-0.7, 0.7])
def test_log_ratio_is_clamped(device, log_ratio, advantage):
    """Tests one token at a time, so that large ratios do not hide the errors of others."""
    mask = torch.ones(1, dtype=torch.bool, device=device)
    batch = [torch.full((1,), x, device=device) for x in (log_ratio, 0.0, advantage)]
    loss, _, grad = run(ppo_losses, "ppo_policy_loss", [*batch, mask], 1.0)
    exact_loss, _, exact_grad = run(reference, "ppo_policy_loss", [*map(double, batch), mask], 1.0)
    # e^20 through exp2 in float32: the rounding of 20·log2(e) is a relative error of 20·eps.
    assert loss.item() == pytest.approx(exact_loss.item(), rel=40 * EPS)
    assert grad.item() == pytest.approx(exact_grad.item(), rel=40 * EPS)


@pytest.mark.parametrize("size", [1e-4, 0.049, 0.1])
def test_small_kl_keeps_its_digits(device, size):
    """With log-ratios of 1e-4 the mean KL is 5e-9, where ratio − 1 − log ratio in float32 would be only noise."""
    log_ratio = size * torch.rand(1000, device=device)
    mask = torch.ones(1000, dtype=torch.bool, device=device)
    _, metrics = ppo_losses.ppo_policy_loss(log_ratio, torch.zeros_like(log_ratio), log_ratio, mask)
    exact = log_ratio.double().expm1() - log_ratio.double()
    # Beyond 0.05 the kernel subtracts: the 2^-22 or so of a GPU's fast exp2 is a few 1e-5 of x²/2 there.
    assert metrics["approx_kl"].item() == pytest.approx(exact.mean().item(), rel=5e-6 if size < 0.05 else 5e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_weights(device, name):
    batch = make_batch(1500, device, seed=4)
    assert_matches(name, batch, weights=make_weights(batch[3]))
    assert_matches(name, batch, weights=make_weights(batch[3]).bfloat16(), num_items=33.0)


def test_weights_give_the_mean_over_sequences(device):
    lengths = torch.tensor([3, 1, 20], device=device)
    logps, old_logps, advantages, mask = make_batch(24, device, masked=0.0)
    weights = (1 / lengths).repeat_interleave(lengths)
    loss, _ = ppo_losses.ppo_policy_loss(logps, old_logps, advantages, mask, weights=weights, num_items=3)
    parts = [x.split(lengths.tolist()) for x in (logps, old_logps, advantages, mask)]
    means = [ppo_losses.ppo_policy_loss(*part)[0].item() for part in zip(*parts)]
    assert loss.item() == pytest.approx(sum(means) / 3, rel=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_num_items_makes_micro_batches_exact(device, name):
    batch = make_batch(1100, device, seed=5)
    loss, metrics, grad = run(ppo_losses, name, batch, -1.7)
    total = batch[3].sum()
    for num_items in (total, total.item(), float(total)):
        parts = [run(ppo_losses, name, part, -1.7, num_items=num_items) for part in zip(*(x.split(300) for x in batch))]
        assert torch.equal(torch.cat([part[2] for part in parts]), grad)
        assert sum(part[0].item() for part in parts) == pytest.approx(loss.item(), rel=1e-5)
        for key, number in metrics.items():
            assert sum(part[1][key].item() for part in parts) == pytest.approx(number.item(), rel=1e-5), key


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_in_the_loss(device, name):
    """An empty mask and num_items=0 give 0, not NaN."""
    for batch, options in ((make_batch(70, device, masked=1.1), {}), (make_batch(70, device), {"num_items": 0})):
        loss, metrics, grad = run(ppo_losses, name, batch, 1.0, **options)
        assert loss == 0 and grad.eq(0).all() and all(number == 0 for number in metrics.values())


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("spoiled", [0, 1, 2])
def test_nan_in_the_loss_is_seen(device, name, spoiled):
    batch = make_batch(100, device, masked=0.0)
    batch[spoiled][7] = torch.nan
    loss, _, grad = run(ppo_losses, name, batch, 1.0)
    assert loss.isnan() and grad[7].isnan() and grad.isnan().sum() == 1


@pytest.mark.parametrize("name", LOSSES)
def test_any_shape_and_stride(device, name):
    flat = make_batch(2 * 5 * 7, device)
    expected = run(ppo_losses, name, flat, 0.9)
    strided = [torch.stack([x, x], -1).view(2, 5, 7, 2)[..., 0] for x in flat]
    actual = run(ppo_losses, name, strided, 0.9)
    assert not strided[0].is_contiguous() and actual[2].shape == (2, 5, 7)
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[2].flatten(), expected[2])


@pytest.mark.parametrize("name", LOSSES)
def test_bitwise_repeatable(device, name):
    batch = make_batch(5000, device)
    first, second = (run(ppo_losses, name, batch, 1.0) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[2], second[2])
    assert all(map(torch.equal, first[1].values(), second[1].values()))


@pytest.mark.parametrize("name", LOSSES)
def test_more_blocks_than_one_reduction_step(device, name, monkeypatch):
    monkeypatch.setattr(ppo_losses, "BLOCK_T", 64)
    monkeypatch.setattr(ppo_losses, "BLOCK_P", 16)
    assert_matches(name, make_batch(64 * 37 + 5, device))


def test_opcheck(device):
    first, second, third, _ = make_batch(70, device, masked=0.0)
    first.requires_grad_()
    mask = torch.arange(70, device=device) % 3 > 0
    weights, num_items = torch.rand(70, device=device), torch.tensor(50.0, device=device)
    policy = torch.ops.rto_fast.ppo_policy_loss.default
    torch.library.opcheck(policy, (first, second, third, mask, weights, num_items, 0.8, 1.2, 3.0))
    value = torch.ops.rto_fast.ppo_value_loss.default
    torch.library.opcheck(value, (first, second, third, mask, None, None, 0.2))


@pytest.mark.parametrize("name", LOSSES)
def test_compiles_without_a_graph_break(device, name):
    batch = make_batch(100, device)
    compiled = torch.compile(getattr(ppo_losses, name), fullgraph=True, backend="aot_eager")
    for num_items in (50.0, 70.0, torch.tensor(60, device=device)):
        first = batch[0].clone().requires_grad_()
        loss, metrics = compiled(first, *batch[1:], num_items=num_items)
        (-1.3 * loss).backward()
        expected = run(ppo_losses, name, batch, -1.3, num_items=num_items)
        assert torch.equal(loss, expected[0]) and torch.equal(first.grad, expected[2]) and metrics == expected[1]
