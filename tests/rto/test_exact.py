"""A run with an exact engine: the sampler's log-probs are used as they are, which each iteration checks for nothing."""

import types

import pytest
import torch
import torch.nn.functional as F

from rto_fast.errors import ModelError, TrainingError
from rto_fast.models.model import Model
from rto_fast.rollout import Exactness
from rto_fast.rto import experience, first_update
from rto_fast.rto import trainer as trainer_module
from rto_fast.rto.experience import score_rollout
from tests.rto.exact_engine import TOKENIZER, build, off_by_one_ulp, ordered_linear, packed, training_logps
from tests.training.test_waits import watched_call
from tests.waits import NoWaits


@pytest.fixture(autouse=True)
def ordered(monkeypatch):
    monkeypatch.setattr(F, "linear", ordered_linear)


@pytest.fixture
def passes(monkeypatch):
    """Of each forward pass over a rollout's responses: (the model, the number of responses)."""
    calls, response_logps = [], experience.response_logps

    def count(model, prompt_ids, *arguments, **options):
        calls.append((model, len(prompt_ids)))
        return response_logps(model, prompt_ids, *arguments, **options)

    for module in (experience, first_update):
        monkeypatch.setattr(module, "response_logps", count)
    return calls


def scored(trainer, seed=0):
    prompts, rollout = trainer._sample(seed)
    config, models = trainer.config, trainer.models
    with NoWaits():
        return score_rollout(config, models, rollout, prompts, TOKENIZER, "cpu", 16384), rollout


def test_log_probs_on_this_cpu_do_not_depend_on_the_batch():
    """What the other tests here build on."""
    trainer = build()
    found, rollout = scored(trainer)
    whole = experience.response_logps(trainer.models.policy, found.prompt_ids, found.response_ids, 10_000)
    assert torch.equal(whole[found.batch.rows], training_logps(trainer.models.policy, rollout))


@pytest.mark.parametrize(
    "options, steps",
    [
        ("", 6),
        ("--rto.loss_normalization sequence --rto.entropy_coef 0.01 --rto.dual_clip 2", 6),
        ("--rto.batch_size 12 --rto.ppo_epochs 1 --rto.old_logps sampler --rto.clip_eps 0", 1),
        ("--rollout.temperature 0.7 --rto.ppo_epochs 1", 3),
    ],
)
def test_no_pass_of_the_policy_and_a_ratio_of_exactly_one_in_every_iteration(options, steps, passes):
    trainer = build(*options.split())
    for _ in range(3):
        metrics = trainer.step()
        assert metrics["first_step_kl"] == 0.0
        assert not [name for name in metrics if name.startswith(("mismatch", "importance"))]
        # Of several steps, only the first has the ratio 1.
        assert (metrics["approx_kl"] == 0.0) == (metrics["clip_fraction"] == 0.0 and steps == 1) == (steps == 1)
    assert trainer.log.findings == [] and trainer.is_exact
    assert passes == 3 * [(trainer.models.reference, 12)]


def test_an_iteration_reads_its_metrics_once_and_waits_for_nothing_else(monkeypatch):
    reads, numbers = [], trainer_module.numbers
    for name in ("score_rollout", "token_rewards", "rollout_metrics", "update"):
        call = watched_call(getattr(trainer_module, name), [first_update.check_ratio])
        monkeypatch.setattr(trainer_module, name, call)
    monkeypatch.setattr(trainer_module, "numbers", lambda metrics: (reads.append(1), numbers(metrics))[1])
    trainer = build()
    for _ in range(2):
        trainer.step()
    assert len(reads) == 2


def test_one_rounding_in_one_log_prob_is_said_once_and_ends_the_trust(passes):
    trainer = build("--rto.batch_size", "12")  # or the first step might not see it
    trainer.step()
    trainer.engine.fault = off_by_one_ulp
    second = trainer.step()
    assert 0 < second["first_step_kl"] < 1e-12 and "mismatch_mean" not in second
    (finding,) = trainer.log.findings
    assert finding.name == "sampler_is_not_exact" and "instead of 0" in finding.what
    third = trainer.step()
    assert 0 <= third["mismatch_mean"] < 1e-6 and len(trainer.log.findings) == 1
    assert (trainer.models.policy, 4) in passes[-2:]  # compared on some responses


def test_a_resumed_run_trusts_as_much_as_it_did():
    trainer, resumed = build("--rto.batch_size", "12"), build("--rto.batch_size", "12")
    trainer.engine.fault = off_by_one_ulp
    trainer.step()
    state = trainer.state_dict()
    resumed.load_state_dict(state)
    resumed.models.policy.module.load_state_dict(trainer.models.policy.module.state_dict())
    trainer.engine.fault = None
    ours, theirs = resumed.step(), trainer.step()
    assert "mismatch_mean" in ours and not resumed.is_exact
    assert all(ours[name] == theirs[name] for name in ("score", "kl", "first_step_kl", "mismatch_mean", "approx_kl"))
    del state["is_exact"]  # of an older version
    resumed.load_state_dict(state)
    assert resumed.is_exact


def test_a_token_put_in_the_place_of_the_last_one_costs_a_pass_of_its_response(passes):
    trainer = build("--rto.compat", "paper_code", max_new_tokens=4, stop_ids=range(1, 30))
    found, rollout = scored(trainer)
    cut = [i for i, reason in enumerate(rollout.finish_reasons) if reason == "length"]
    assert 0 < len(cut) < 12 and found.exact
    policy = trainer.models.policy
    assert [count for model, count in passes if model is policy] == [len(cut)]
    changed = [found.response_ids[i] for i in cut]
    assert all(ids[-1] == TOKENIZER.eos_token_id for ids in changed)
    whole = experience.response_logps(policy, found.prompt_ids, found.response_ids, 10_000)
    assert torch.equal(found.old_logps, whole)
    for _ in range(2):
        assert trainer.step()["first_step_kl"] == 0.0


def test_no_response_that_is_cut_costs_no_pass(passes):
    trainer = build("--rto.compat", "paper_code")
    prompts, rollout = trainer._sample(0)
    rollout.finish_reasons = ["stop"] * 12
    models = trainer.models
    found = score_rollout(trainer.config, models, rollout, prompts, TOKENIZER, "cpu", 16384)
    assert torch.equal(found.old_logps[found.batch.rows], rollout.logps)
    assert [model for model, _ in passes] == [models.reference]


def test_the_configuration_can_insist_on_a_forward_pass(passes):
    trainer = build("--rto.old_logps", "recompute")
    trainer.engine.fault = off_by_one_ulp
    assert trainer.step()["first_step_kl"] == 0.0 and trainer.log.findings == []
    assert passes.count((trainer.models.policy, 12)) == 1


def test_a_policy_is_at_its_reference_exactly(passes, monkeypatch):
    measured, noise = [], first_update.forward_noise
    monkeypatch.setattr(first_update, "forward_noise", lambda *a: (measured.append(1), noise(*a))[1])
    trainer = build(origins=("here", "here"))
    assert trainer.step()["kl"] == 0.0 and not measured
    moved = packed()
    with torch.no_grad():
        moved.lm_head.weight.mul_(1.1)
    with pytest.raises(ModelError, match="was changed while it was read"):
        build(reference=moved, origins=("here", "here")).step()
    trainer = build(reference=moved, origins=("here", "there"))
    trainer.step()
    assert [finding.name for finding in trainer.log.findings] == ["reference_is_elsewhere"] and len(measured) == 2
    build("--rto.init_from", "dpo", reference=moved, origins=("here", "there")).step()
    assert len(measured) == 2


def noisy(size):
    def fault(batch):
        batch.logps = batch.logps + size * torch.randn(len(batch.logps), generator=torch.Generator().manual_seed(0))

    return fault


def test_a_policy_that_did_not_sample_stops_the_run():
    trainer = build()
    trainer.engine.fault = noisy(0.5)
    with pytest.raises(TrainingError, match="ratio .* is not 1.*came from the sampler"):
        trainer.step()
    trainer = build()  # a pass with noise
    trainer.models.policy.module.model.norm.register_forward_hook(lambda m, i, out: out + 0.5 * torch.randn_like(out))
    with pytest.raises(TrainingError, match="ratio .* is not 1.*not repeatable"):
        trainer.step()


def test_rounding_does_not_stop_a_run_whatever_its_clip():
    trainer = build("--rto.clip_eps", "0.001", policy=packed().bfloat16(), reference=packed().bfloat16())
    trainer.engine.fault = noisy(2e-3)  # as far as rounding to 16 bits moves the log-probs of this model
    trainer.step()
    assert not trainer.is_exact and [finding.name for finding in trainer.log.findings] == ["sampler_is_not_exact"]


def test_a_number_that_is_none_is_no_proof(monkeypatch):
    trainer = build()
    trainer.step()
    numbers = trainer_module.numbers
    monkeypatch.setattr(trainer_module, "numbers", lambda m: numbers(m) | {"first_step_kl": float("nan")})
    trainer.step()
    assert not trainer.is_exact and "nan" in trainer.log.findings[0].what


def test_the_log_says_what_was_found_on_a_gpu_and_nothing_on_a_cpu(monkeypatch):
    trainer = build()
    assert not [line for line in trainer.log.said if line.startswith("policy:")]
    monkeypatch.setattr(Model, "device", torch.device("cuda"))
    for found, line in (
        (Exactness(2048), "policy: the sampler's log-probs are the trainer's to the bit (2,048 tokens compared)"),
        (
            Exactness(reason="why"),
            "policy: sampler and trainer may differ: why; old log-probs are compared or recomputed",
        ),
    ):
        said = []
        log = types.SimpleNamespace(say=said.append)
        trainer_module.say_exactness(log, trainer.models.policy, types.SimpleNamespace(exactness=found))
        assert len(said) == 1 and said[0].startswith(line)
