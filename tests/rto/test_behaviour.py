"""Old log-probs: the sampler's while they agree with a forward pass, else recomputed and importance-weighted."""

import pytest
import torch

from rto_fast.batch import pack
from rto_fast.config import load_config
from rto_fast.data.tokenizing import Prompt
from rto_fast.data.world import build_model, build_tokenizer
from rto_fast.models.attention import PACKED
from rto_fast.models.model import Model
from rto_fast.rollout import NativeEngine, Sampling
from rto_fast.rto import behaviour, experience, update
from rto_fast.rto.experience import Experience, Models
from rto_fast.rto.token_rewards import TokenRewards
from rto_fast.rto.trainer import RTOTrainer
from rto_fast.training.accumulate import Accumulator
from tests.rto.recorded_log import RecordedLog
from tests.waits import NoWaits

TOKENIZER = build_tokenizer()
PROMPTS = [[2, 13, 29, 30, 3], [2, 9, 25, 33, 5, 8, 26, 31, 3], [2, 10, 3]]


@pytest.fixture
def policy():
    model = build_model(0)
    model.set_attn_implementation(PACKED)
    return Model(model.train())


@pytest.fixture
def rollout(policy):
    engine = NativeEngine(policy, TOKENIZER, load_config([]).rollout)
    return engine.generate(PROMPTS, 8, Sampling(12, stop_ids=(1,)), 0)


@pytest.fixture
def forwards(monkeypatch):
    """How many responses each forward pass was asked for."""
    calls, response_logps = [], experience.response_logps

    def count(model, prompt_ids, *arguments, **options):
        calls.append(len(prompt_ids))
        return response_logps(model, prompt_ids, *arguments, **options)

    monkeypatch.setattr(experience, "response_logps", count)
    return calls


def logps_of(policy, rollout, *options):
    """(log-probs, weights, metrics, the tokens of the responses)."""
    models = Models(policy, policy, None, None, None, None)
    prompts = [Prompt(ids, "", {}, "") for ids in rollout.prompt_ids]
    with NoWaits(allowed=[behaviour.ppo_notices]):
        found = experience.score_rollout(load_config(list(options)), models, rollout, prompts, TOKENIZER, "cpu", 16384)
    return found.old_logps, found.importance, found.mismatch, found.batch.response_mask


def test_the_samplers_log_probs_are_taken_and_checked_on_some_responses(policy, rollout, forwards):
    old_logps, weights, metrics, mask = logps_of(policy, rollout)
    assert weights is None and torch.equal(old_logps[mask], rollout.logps)
    assert forwards == [4, 24]  # of 24; then the reference
    assert metrics["mismatch_mean"] < 1e-5 and metrics["mismatch_max"] < 1e-4 and abs(metrics["mismatch_k3"]) < 1e-8


def test_a_mismatch_leads_to_a_forward_pass_and_truncated_importance_weights(policy, rollout, forwards):
    exact = rollout.logps.clone()
    noise = torch.linspace(-1.0, 1.0, len(exact))
    rollout.logps = exact + noise  # a sampler that is off by half a nat in the mean
    old_logps, weights, metrics, mask = logps_of(policy, rollout, "--rto.importance_cap", "1.5")
    assert forwards == [4, 24, 24]
    torch.testing.assert_close(old_logps[mask], exact, atol=1e-5, rtol=0)
    torch.testing.assert_close(weights[mask], (-noise).exp().clamp(max=1.5), atol=1e-4, rtol=0)
    lengths = [len(ids) for ids in rollout.response_ids]
    checked = torch.cat([noise.split(lengths)[i] for i in range(0, 24, 6)])
    torch.testing.assert_close(metrics["mismatch_mean"], checked.abs().mean(), atol=1e-5, rtol=0)
    torch.testing.assert_close(metrics["mismatch_k3"], ((-checked).exp() - 1 + checked).mean(), atol=1e-4, rtol=0)
    torch.testing.assert_close(metrics["importance_weight"], weights[mask].mean())


def test_the_configuration_can_insist(policy, rollout, forwards):
    rollout.logps = rollout.logps + 1.0
    old_logps, weights, _, mask = logps_of(policy, rollout, "--rto.old_logps", "sampler")
    assert weights is None and torch.equal(old_logps[mask], rollout.logps) and forwards == [4, 24]
    old_logps, weights, metrics, mask = logps_of(policy, rollout, "--rto.old_logps", "recompute")
    torch.testing.assert_close(old_logps[mask], rollout.logps - 1.0, atol=1e-5, rtol=0)
    assert weights is None and metrics == {} and forwards == [4, 24, 24, 24]


def test_an_engine_without_log_probs_needs_a_forward_pass(policy, rollout, forwards):
    expected, rollout.logps = rollout.logps, None
    old_logps, weights, metrics, mask = logps_of(policy, rollout)
    torch.testing.assert_close(old_logps[mask], expected, atol=1e-5, rtol=0)
    assert weights is None and metrics == {} and forwards == [24, 24]


class Recorder:
    def backward(self, loss):
        loss.backward()

    def step(self):
        return {}

    def make_gradients(self):
        pass

    free_gradients = make_gradients


@pytest.mark.parametrize("normalization", ["token", "sequence"])
def test_the_weights_reach_the_policys_loss_and_not_the_values(policy, rollout, monkeypatch, normalization):
    config = load_config(["--rto.loss_normalization", normalization, "--rto.batch_size", "24", "--rto.ppo_epochs", "1"])
    batch = pack(rollout.prompt_ids, rollout.response_ids)
    zeros, ids = torch.zeros(batch.num_tokens), torch.arange(batch.num_tokens).float()
    seen = []

    def loss(model, micro_batch, *_):
        seen.append((micro_batch.advantages, micro_batch.policy_weights, micro_batch.batch))
        loss = model.lm_head.weight.sum() * 0
        return loss, {"approx_kl": loss.detach()}

    monkeypatch.setattr(update, "policy_loss", loss)
    models = Models(policy, None, None, None, None, None)
    # The advantages tell each token's place; its weight is 2 + place.
    responses = rollout.prompt_ids, rollout.response_ids, batch
    experience = Experience([], *responses, *[zeros] * 6, scores=None, truncated=None, importance=2 + ids, mismatch={})
    rewards = TokenRewards(*[zeros] * 5, advantages=ids, returns=zeros, stats={})
    update.update(config, models, {"policy_optimizer": Recorder()}, experience, rewards, 0, Accumulator(10_000, print))
    for places, weights, part in seen:
        expected = 2 + places
        if normalization == "sequence":
            lengths = part.cu_seqlens.diff()
            counts = torch.stack([m.sum() for m in part.response_mask.split(lengths.tolist())])
            expected = expected / counts.repeat_interleave(lengths)
        torch.testing.assert_close(weights, expected)
    assert sum(len(places) for places, _, _ in seen) == batch.num_tokens


def test_an_iteration_says_how_far_sampler_and_forward_are_apart(policy):
    config = load_config(["--rto.prompts_per_rollout", "3", "--rto.advantage", "reinforce_pp", "--rto.batch_size", "3"])
    prompts = [Prompt(ids, "1 red cup", {}) for ids in PROMPTS]
    reference = Model(build_model(0))
    reference.module.set_attn_implementation(PACKED)
    models = Models(policy, reference, None, None, None, lambda completions: torch.ones(len(completions)))
    sampling = Sampling(12, stop_ids=(1,))
    trainer = RTOTrainer(config, models, TOKENIZER, sampling, prompts, "cpu", RecordedLog())
    first, second = trainer.step(), trainer.step()
    assert first["mismatch_mean"] < 1e-5 and abs(first["kl"]) < 1e-4
    assert second["mismatch_mean"] < 1e-5 and {"seconds_prefill", "seconds_decode"} <= second.keys()
