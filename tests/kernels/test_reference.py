"""`kernels/reference.py` against plain Python loops over float64 numbers, written from the papers."""

import math
from itertools import pairwise

import pytest
import torch

from rto_fast.kernels import reference

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def gae_loop(rewards, values, gamma, gae_lambda, bootstrap):
    """Advantages of the actions of a sequence, by the definition A_t = Σ (γλ)^l δ_{t+l}."""
    next_values = [*values[1:], bootstrap]
    deltas = [r + gamma * after - v for r, v, after in zip(rewards, values, next_values)]
    return [
        sum((gamma * gae_lambda) ** (later - t) * deltas[later] for later in range(t, len(deltas)))
        for t in range(len(deltas))
    ]


def clamp(x, limit):
    return max(-limit, min(limit, x)) if limit else x


def sequence_loop(old, ref, dpo, dpo_ref, score, delimiters, options):
    """(token rewards, clipped DPO rewards) of one sequence's response tokens, in the order of the authors' code."""
    clipped = [clamp(options["dpo_reward_scale"] * (d - r), options["dpo_reward_clip"]) for d, r in zip(dpo, dpo_ref)]
    moved, pending = [], 0.0
    for t, reward in enumerate(clipped):
        pending += reward
        closes = {"token": True, "sentence": delimiters[t], "sequence": False}[options["granularity"]]
        closes = closes or t == len(clipped) - 1
        moved.append(pending if closes else 0.0)
        pending = 0.0 if closes else pending
    rewards = [m - options["kl_coef"] * (o - r) for m, o, r in zip(moved, old, ref)]
    rewards[-1] += options["score_scale"] * clamp(score, options["score_clip"])
    if options["shaping"]:
        rewards[-1] -= sum(clipped)
    return rewards, clipped


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(5)
    lengths = [7, 1, 0, 12, 4, 30]
    total = sum(lengths)
    draws = torch.randn(5, total, generator=generator, dtype=torch.float64)
    mask = torch.rand(total, generator=generator) > 0.4
    mask[7], mask[20:24] = True, False  # a sequence of one token; one without a response
    return {
        "draws": draws,
        "mask": mask,
        "delimiters": torch.rand(total, generator=generator) > 0.6,
        "scores": 8 * torch.randn(len(lengths), generator=generator, dtype=torch.float64),
        "bootstrap": torch.randn(len(lengths), generator=generator, dtype=torch.float64),
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).int(),
    }


def actions(batch):
    """The response tokens' indices, sequence by sequence."""
    bounds = batch["cu_seqlens"].tolist()
    return [[t for t in range(a, b) if batch["mask"][t]] for a, b in pairwise(bounds)]


@pytest.mark.parametrize("gamma, gae_lambda", [(1.0, 0.95), (0.9, 1.0), (1.0, 0.0), (0.0, 0.5), (0.97, 0.8)])
@pytest.mark.parametrize("bootstrapped", [False, True])
def test_gae(batch, gamma, gae_lambda, bootstrapped):
    rewards, values = batch["draws"][:2]
    advantages, returns = reference.gae(
        rewards,
        values,
        batch["cu_seqlens"],
        gamma=gamma,
        gae_lambda=gae_lambda,
        mask=batch["mask"],
        bootstrap_values=batch["bootstrap"] if bootstrapped else None,
    )
    expected = torch.zeros(len(rewards), dtype=torch.float64)
    for n, tokens in enumerate(actions(batch)):
        bootstrap = batch["bootstrap"][n].item() if bootstrapped else 0.0
        expected[tokens] = torch.tensor(
            gae_loop(rewards[tokens].tolist(), values[tokens].tolist(), gamma, gae_lambda, bootstrap),
            dtype=torch.float64,
        )
    torch.testing.assert_close(advantages, expected, **EXACT)
    torch.testing.assert_close(returns, (expected + values) * batch["mask"], **EXACT)


@pytest.mark.parametrize("granularity", ["token", "sentence", "sequence"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"shaping": True},
        {"dpo_reward_clip": 0.0, "score_clip": 0.0},
        {"dpo_reward_scale": 0.0},
        {"score_scale": -2},
    ],
    ids=str,
)
@pytest.mark.parametrize("own_reference", [False, True])
def test_rto_advantages(batch, granularity, changes, own_reference):
    options = {
        "dpo_reward_scale": 0.05,
        "dpo_reward_clip": 0.05,
        "kl_coef": 0.02,
        "score_scale": 1.5,
        "score_clip": 10.0,
        "shaping": False,
        "granularity": granularity,
    } | changes
    old, ref, dpo, dpo_ref, values = batch["draws"]
    dpo_ref = dpo_ref if own_reference else ref
    actual = reference.rto_advantages(
        old,
        ref,
        dpo,
        values,
        batch["scores"],
        batch["cu_seqlens"],
        batch["mask"],
        **options,
        dpo_ref_logps=dpo_ref if own_reference else None,
        delimiter_mask=batch["delimiters"],
        gamma=0.99,
        bootstrap_values=batch["bootstrap"],
    )

    token_rewards, advantages = torch.zeros(2, len(old), dtype=torch.float64)
    sums = dict.fromkeys(("dpo_reward_sum", "kl_sum", "score_reward_sum", "dpo_clip_count"), 0.0)
    for n, tokens in enumerate(actions(batch)):
        if not tokens:
            continue
        numbers = [x[tokens].tolist() for x in (old, ref, dpo, dpo_ref)]
        score = batch["scores"][n].item()
        rewards, clipped = sequence_loop(*numbers, score, batch["delimiters"][tokens].tolist(), options)
        token_rewards[tokens] = torch.tensor(rewards, dtype=torch.float64)
        advantages[tokens] = torch.tensor(
            gae_loop(rewards, values[tokens].tolist(), 0.99, 0.95, batch["bootstrap"][n].item()), dtype=torch.float64
        )
        ratios = [options["dpo_reward_scale"] * (d - r) for d, r in zip(numbers[2], numbers[3])]
        sums["dpo_reward_sum"] += sum(clipped)
        sums["kl_sum"] += sum(o - r for o, r in zip(numbers[0], numbers[1]))
        sums["score_reward_sum"] += options["score_scale"] * clamp(score, options["score_clip"])
        sums["score_reward_sum"] -= sum(clipped) if options["shaping"] else 0.0
        limit = options["dpo_reward_clip"]
        sums["dpo_clip_count"] += sum(abs(x) > limit for x in ratios) if limit else 0

    valid = batch["mask"]
    samples = advantages[valid].tolist()
    mean = sum(samples) / len(samples)
    variance = sum((a - mean) ** 2 for a in samples) / len(samples)
    stats = sums | {"count": len(samples), "advantage_mean": mean, "advantage_var": variance}
    torch.testing.assert_close(actual.token_rewards, token_rewards, **EXACT)
    torch.testing.assert_close(actual.kl, (old - ref) * valid, **EXACT)
    torch.testing.assert_close(actual.returns, (advantages + values) * valid, **EXACT)
    torch.testing.assert_close(actual.advantages, (advantages - mean) / math.sqrt(variance) * valid, **EXACT)
    assert actual.stats.keys() == stats.keys()
    for name, number in stats.items():
        assert actual.stats[name].item() == pytest.approx(number, rel=1e-12, abs=1e-12), name
    # The logged shares add up to the rewards that were given.
    total = stats["dpo_reward_sum"] + stats["score_reward_sum"] - options["kl_coef"] * stats["kl_sum"]
    assert actual.token_rewards.sum().item() == pytest.approx(total, rel=1e-12, abs=1e-12)


def test_whitening_has_a_floor():
    """Advantages that are all equal become 0, not NaN."""
    zeros, mask = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.bool)
    bounds = torch.tensor([0, 1, 2, 3, 4]).int()
    result = reference.rto_advantages(zeros, zeros, zeros, zeros, torch.full((4,), 2.0).double(), bounds, mask)
    assert result.stats["advantage_mean"] == 2.0 and result.advantages.eq(0).all()


def policy_loop(logps, old_logps, advantages, mask, weights, num_items, low, high, dual_clip):
    sums, total = [0.0, 0.0, 0.0], 0.0
    for logp, old_logp, advantage, valid, weight in zip(logps, old_logps, advantages, mask, weights):
        if not valid:
            continue
        total += weight
        log_ratio = max(-20.0, min(20.0, logp - old_logp))
        ratio = math.exp(log_ratio)
        candidates = -advantage * ratio, -advantage * max(1 - low, min(1 + high, ratio))
        loss, is_clipped = max(candidates), candidates[1] > candidates[0]
        if dual_clip is not None and advantage < 0 and loss > -dual_clip * advantage:
            loss, is_clipped = -dual_clip * advantage, True
        for i, term in enumerate((loss, ratio - 1 - log_ratio, float(is_clipped))):
            sums[i] += weight * term
    denominator = total if num_items is None else num_items
    return [s / denominator for s in sums]


@pytest.mark.parametrize("clips", [(0.2, None, None), (0.2, 0.28, None), (0.1, 0.3, 1.2), (0.0, None, 3.0)])
@pytest.mark.parametrize("weighted, num_items", [(False, None), (True, None), (True, 17.5), (False, 40)])
def test_ppo_policy_loss(clips, weighted, num_items):
    low, high, dual_clip = clips
    torch.manual_seed(1)
    logps, old_logps, advantages = torch.randn(3, 50, dtype=torch.float64)
    logps[3], logps[4] = 25.0, -25.0
    mask, weights = torch.rand(50) > 0.3, torch.rand(50, dtype=torch.float64) + 0.1
    logps.requires_grad_()
    loss, metrics = reference.ppo_policy_loss(
        logps,
        old_logps,
        advantages,
        mask,
        weights=weights if weighted else None,
        num_items=num_items,
        clip_eps=low,
        clip_eps_high=high,
        dual_clip=dual_clip,
    )
    numbers = [x.tolist() for x in (old_logps, advantages, mask, weights if weighted else torch.ones(50))]
    settings = (num_items, low, low if high is None else high, dual_clip)
    expected = policy_loop(logps.tolist(), *numbers, *settings)
    assert [loss.item(), metrics["approx_kl"].item(), metrics["clip_fraction"].item()] == pytest.approx(expected)
    assert metrics["policy_loss"].item() == loss.item() and not any(m.requires_grad for m in metrics.values())

    loss.backward()
    for t in range(50):  # central differences: no kink of the loss lies within 1e-6 of these draws
        shifted = [[x + sign * 1e-6 * (i == t) for i, x in enumerate(logps.tolist())] for sign in (1, -1)]
        above, below = (policy_loop(x, *numbers, *settings)[0] for x in shifted)
        slope = (above - below) / 2e-6
        assert logps.grad[t].item() == pytest.approx(slope, rel=1e-5, abs=1e-7 * max(1, abs(expected[0])))


@pytest.mark.parametrize("eps", [0.2, 1.0, None])
@pytest.mark.parametrize("weighted, num_items", [(False, None), (True, 17.5)])
def test_ppo_value_loss(eps, weighted, num_items):
    torch.manual_seed(2)
    values, old_values, returns = torch.randn(3, 50, dtype=torch.float64)
    values[:10] = old_values[:10] + 0.05
    mask, weights = torch.rand(50) > 0.3, torch.rand(50, dtype=torch.float64) + 0.1
    values.requires_grad_()
    loss, metrics = reference.ppo_value_loss(
        values,
        old_values,
        returns,
        mask,
        weights=weights if weighted else None,
        num_items=num_items,
        value_clip_eps=eps,
    )
    total = clipped_total = weight_total = 0.0
    slopes = []
    for v, old, target, valid, w in zip(values.tolist(), old_values.tolist(), returns.tolist(), mask, weights.tolist()):
        w = (w if weighted else 1.0) * bool(valid)
        near = v if eps is None or abs(v - old) <= eps else old + math.copysign(eps, v - old)
        is_clipped = (near - target) ** 2 > (v - target) ** 2
        total += w * 0.5 * max((v - target) ** 2, (near - target) ** 2)
        clipped_total += w * is_clipped
        weight_total += w
        slopes.append(0.0 if is_clipped else w * (v - target))
    denominator = num_items or weight_total
    assert loss.item() == pytest.approx(total / denominator)
    assert metrics["value_loss"].item() == loss.item()
    assert metrics["value_clip_fraction"].item() == pytest.approx(clipped_total / denominator, rel=1e-12)
    loss.backward()
    torch.testing.assert_close(values.grad, torch.tensor(slopes, dtype=torch.float64) / denominator, **EXACT)
