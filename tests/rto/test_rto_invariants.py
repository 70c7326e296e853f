"""The identities RTO rests on (arXiv 2404.18922), on a small tree of responses, to float64 rounding.

Every response of a tiny language (three tokens, the first ends the response, at most four tokens) is one packed
sequence behind a prompt of two tokens. The ops are the public ones.
"""

import itertools

import pytest
import torch

from rto_fast.ops import gae, rto_advantages

EXACT = {"rtol": 0, "atol": 4e-15}
VOCAB, DEPTH, PROMPT = 3, 4, 2


def is_final(prefix):
    return len(prefix) == DEPTH or prefix[-1:] == (0,)


PREFIXES = [p for length in range(DEPTH + 1) for p in itertools.product(range(VOCAB), repeat=length) if 0 not in p[:-1]]
RESPONSES = [prefix for prefix in PREFIXES if is_final(prefix)]
CHILDREN = {prefix: [(*prefix, token) for token in range(VOCAB)] for prefix in PREFIXES if not is_final(prefix)}


def random_policy(seed):
    """{prefix: log-prob of its last token}."""
    generator = torch.Generator().manual_seed(seed)
    logps = {}
    for children in CHILDREN.values():
        logits = torch.randn(VOCAB, generator=generator, dtype=torch.float64)
        logps |= zip(children, logits.log_softmax(0))
    return logps


def policy_of_responses(log_weights):
    """The policy that samples each response with a probability proportional to exp(log_weights[response])."""
    totals = dict(log_weights)
    for prefix in sorted(CHILDREN, key=len, reverse=True):
        totals[prefix] = torch.stack([totals[child] for child in CHILDREN[prefix]]).logsumexp(0)
    return {child: totals[child] - totals[prefix] for prefix, children in CHILDREN.items() for child in children}


def random_numbers(keys, seed):
    numbers = torch.randn(len(keys), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return dict(zip(keys, numbers))


def path(response):
    """The prefixes after each token of a response; each names an action."""
    return [response[:length] for length in range(1, len(response) + 1)]


def pack(of_action):
    """A [T] tensor of a dict by action; the prompt's places are NaN, which no op may read."""
    rows = [torch.stack([of_action[prefix] for prefix in path(response)]) for response in RESPONSES]
    return torch.cat([torch.cat([row.new_full((PROMPT,), torch.nan), row]) for row in rows])


def by_response(packed):
    """The response parts of a packed [T] tensor."""
    return [row[PROMPT:] for row in packed.split([PROMPT + len(response) for response in RESPONSES])]


LENGTHS = torch.tensor([PROMPT + len(response) for response in RESPONSES])
CU_SEQLENS = torch.cat([torch.zeros(1), LENGTHS.cumsum(0)]).int()
RESPONSE_MASK = torch.cat([torch.arange(length) >= PROMPT for length in LENGTHS.tolist()])
REF, DPO, POLICY = random_policy(1), random_policy(2), random_policy(3)
SCORES = random_numbers(RESPONSES, 4)
VALUES = pack({child: v for prefix, v in random_numbers(list(CHILDREN), 5).items() for child in CHILDREN[prefix]})
SETTINGS = {"dpo_reward_scale": 0.7, "dpo_reward_clip": 0.0, "kl_coef": 0.3, "score_scale": 1.3, "whiten": False}


def rto(old=POLICY, ref=REF, dpo=DPO, values=VALUES, scores=SCORES, **options):
    scores = torch.stack([scores[response] for response in RESPONSES])
    return rto_advantages(
        pack(old), pack(ref), pack(dpo), values, scores, CU_SEQLENS, RESPONSE_MASK, **SETTINGS | options
    )


def potentials(clip=0.0, scale=SETTINGS["dpo_reward_scale"]):
    """(Φ(s_h), Φ(s_{h+1}) with Φ(end) = 0) for each response: Φ sums the DPO rewards of the tokens before."""
    clipped = rto(kl_coef=0.0, score_scale=0.0, dpo_reward_clip=clip, dpo_reward_scale=scale).token_rewards
    for rewards in by_response(clipped):
        sums = torch.cat([rewards.new_zeros(1), rewards.cumsum(0)])
        yield sums[:-1], torch.cat([sums[1:-1], sums.new_zeros(1)])


def test_log_ratio_is_the_advantage_of_the_optimal_policy():
    """β·log π*/π_ref = r + V*(s') − V*(s), so that a response's sum is its total reward less V*(s_1)."""
    beta = SETTINGS["dpo_reward_scale"]
    rewards = random_numbers([child for children in CHILDREN.values() for child in children], 6)
    values = {response: torch.zeros((), dtype=torch.float64) for response in RESPONSES}
    optimal = {}
    for prefix in sorted(CHILDREN, key=len, reverse=True):
        children = CHILDREN[prefix]
        logits = torch.stack([REF[child] + (rewards[child] + values[child]) / beta for child in children])
        values[prefix] = beta * logits.logsumexp(0)
        optimal |= zip(children, logits.log_softmax(0))
    token_rewards = rto(dpo=optimal, kl_coef=0.0, score_scale=0.0).token_rewards
    bellman = pack({action: rewards[action] + values[action] - values[action[:-1]] for action in optimal})
    torch.testing.assert_close(token_rewards[RESPONSE_MASK], bellman[RESPONSE_MASK], **EXACT)
    sums = rto(dpo=optimal, kl_coef=0.0, score_scale=0.0, granularity="sequence").token_rewards
    for response, row in zip(RESPONSES, by_response(sums)):
        total = sum(rewards[action] for action in path(response))
        torch.testing.assert_close(row[-1] + values[()], total, **EXACT)


def test_optimum_of_the_rto_objective():
    """π* ∝ π_ref^(1−β1/β2)·π_dpo^(β1/β2)·exp(β3·r/β2). At the optimum of a KL-regularised objective every response
    earns the same total reward, KL included: β2·log Z."""
    beta_1, beta_2, beta_3 = SETTINGS["dpo_reward_scale"], SETTINGS["kl_coef"], SETTINGS["score_scale"]
    log_weights = {
        response: sum((1 - beta_1 / beta_2) * REF[a] + beta_1 / beta_2 * DPO[a] for a in path(response))
        + beta_3 / beta_2 * SCORES[response]
        for response in RESPONSES
    }
    totals = torch.stack([row.sum() for row in by_response(rto(old=policy_of_responses(log_weights)).token_rewards)])
    log_z = torch.stack(list(log_weights.values())).logsumexp(0)
    torch.testing.assert_close(totals, (beta_2 * log_z).expand_as(totals), **EXACT)
    off_optimum = torch.stack([row.sum() for row in by_response(rto().token_rewards)])
    assert off_optimum.std() > 0.1


def test_equal_scales_without_a_score_make_the_dpo_policy_optimal():
    token_rewards = rto(old=DPO, kl_coef=SETTINGS["dpo_reward_scale"], score_scale=0.0).token_rewards
    torch.testing.assert_close(token_rewards, torch.zeros_like(token_rewards), **EXACT)


@pytest.mark.parametrize("clip", [0.0, 0.4])
def test_shaping_is_potential_based(clip):
    """RS-PPO adds Φ(s') − Φ(s) to the sparse rewards; clipped, Φ must sum the *clipped* rewards, as shaping does."""
    shaped = by_response(rto(shaping=True, dpo_reward_clip=clip).token_rewards)
    sparse = by_response(rto(dpo_reward_scale=0.0).token_rewards)
    for row, plain, (before, after) in zip(shaped, sparse, potentials(clip)):
        torch.testing.assert_close(row, plain + after - before, **EXACT)
        torch.testing.assert_close(row.sum(), plain.sum(), **EXACT)


def test_clipping_changes_the_sums():
    """So an unclipped potential would leave a reward behind that is not potential-based."""
    clipped = by_response(rto(dpo_reward_clip=0.4, kl_coef=0.0, score_scale=0.0).token_rewards)
    whole = by_response(rto(kl_coef=0.0, score_scale=0.0).token_rewards)
    assert max((a.sum() - b.sum()).abs() for a, b in zip(clipped, whole)) > 0.5


@pytest.mark.parametrize("gae_lambda", [0.0, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("clip", [0.0, 0.4])
def test_shaping_is_a_change_of_values(gae_lambda, clip):
    """GAE(shaped rewards, V − Φ) = GAE(sparse rewards, V) for every λ."""
    prompt = torch.zeros(PROMPT, dtype=torch.float64)
    phi = torch.cat([torch.cat([prompt, before]) for before, _ in potentials(clip)])
    shaped = rto(shaping=True, dpo_reward_clip=clip, values=VALUES - phi, gae_lambda=gae_lambda)
    sparse = rto(dpo_reward_scale=0.0, gae_lambda=gae_lambda)
    torch.testing.assert_close(shaped.advantages, sparse.advantages, **EXACT)
    again, _ = gae(shaped.token_rewards, VALUES - phi, CU_SEQLENS, gae_lambda=gae_lambda, mask=RESPONSE_MASK)
    torch.testing.assert_close(again, sparse.advantages, **EXACT)


def test_granularity_is_a_baseline_without_discounting():
    """At λ = γ = 1: A_RTO = A_DDPO − Φ. Below λ = 1 the two differ by more, which is where dense rewards help."""
    token, sequence = (rto(granularity=g, gae_lambda=1.0).advantages for g in ("token", "sequence"))
    for row, whole, (before, _) in zip(by_response(token), by_response(sequence), potentials()):
        torch.testing.assert_close(row, whole - before, **EXACT)
    token, sequence = (rto(granularity=g, gae_lambda=0.9).advantages for g in ("token", "sequence"))
    rows = zip(by_response(token), by_response(sequence), potentials())
    assert max((row - whole + before).abs().max() for row, whole, (before, _) in rows) > 0.05
