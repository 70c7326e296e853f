"""The RTO stage against a straightforward implementation: one sequence at a time, one token at a time, float64."""

import copy
import math

import pytest
import torch

from rto_fast import batch
from rto_fast.batch import pack_whole
from rto_fast.config import load_config
from rto_fast.data.tokenizing import Prompt
from rto_fast.data.world import build_model, build_tokenizer
from rto_fast.models.attention import PACKED, attention_implementation
from rto_fast.models.graphs import PassGraphs
from rto_fast.models.model import Model
from rto_fast.rewards import NormalizedScores
from rto_fast.rollout import RolloutBatch, Sampling
from rto_fast.rollout.base import finish_reasons
from rto_fast.rto.experience import Models, critic_values, load_models, score_rollout
from rto_fast.rto.metrics import rollout_metrics
from rto_fast.rto.token_rewards import delimiter_table, token_rewards
from rto_fast.rto.trainer import RTOTrainer, adapt_kl_coef
from rto_fast.rto.update import update
from rto_fast.training.accumulate import Accumulator
from rto_fast.training.loader import Loader
from tests.models.test_graphs import Repeated
from tests.rto.recorded_log import RecordedLog
from tests.tiny_models import perturbed, world_scorer

TOKENIZER = build_tokenizer()
PROMPTS = [[2, 13, 29, 30, 3], [2, 9, 25, 33, 5, 8, 26, 31, 3], [2, 10, 3]]
RESPONSES = [[17, 24, 30, 6, 1], [18, 25, 33], [19, 6, 7, 7, 6, 20, 1]]  # the second one is cut
FINISHED = [True, False, True]
SCORES = [0.7, -1.3, 12.0]


def config(*overrides):
    arguments = ["--rto.prompts_per_rollout", "3", "--rto.iterations", "4", "--rto.batch_size", "3", "--rto.lr", "1e-3"]
    return load_config(["--config", "default", *arguments, *overrides])


def build_models(**changes):
    """Four different float64 models, so that no two log-probs agree by accident."""
    models = []
    for seed in range(4):
        model = perturbed(build_model(seed).double(), 0.05, seed)
        model.set_attn_implementation(PACKED)
        models.append(model)
    critic = world_scorer(seed=9).double()
    critic.set_attn_implementation(PACKED)
    critic.config.score_mean, critic.config.score_std = 0.3, 1.7
    scorer = lambda completions: torch.tensor(SCORES[: len(completions)])  # noqa: E731
    policy, reference, dpo, critic = map(Model, (*models[:3], critic))
    parts = dict(policy=policy, reference=reference, dpo=dpo, dpo_reference=None, critic=critic, scorer=scorer)
    return Models(**parts | changes)


def collect(models, settings, delimiters=None):
    prompts = [Prompt(ids, "1 red cup", {}) for ids in PROMPTS]
    rollout = RolloutBatch(PROMPTS, RESPONSES, finish_reasons(RESPONSES, (1,)))
    experience = score_rollout(settings, models, rollout, prompts, TOKENIZER, "cpu", 16384)
    rewards = token_rewards(settings.rto, experience, settings.rto.kl_coef, delimiters)
    return experience, rewards, rollout_metrics(experience, rewards, settings.rto.kl_coef)


@torch.no_grad()
def plain_logps(model, prompt, response):
    with attention_implementation(model.module, "eager"):
        logits = model.module(torch.tensor([prompt + response])).logits[0]
    rows = logits.log_softmax(-1)
    return [rows[len(prompt) - 1 + i, token].item() for i, token in enumerate(response)]


@torch.no_grad()
def plain_values(critic, prompt, response):
    """V of each state of the response, and of the state after it."""
    critic = critic.module
    with attention_implementation(critic, "eager"):
        scores = critic.score(critic.model(torch.tensor([prompt + response])).last_hidden_state)[0, :, 0]
    return [(s.item() - 0.3) / 1.7 for s in scores[len(prompt) - 1 :]]


def plain_rto(models, settings):
    """The token rewards and GAE, one token at a time; returns (advantages, returns), a list for each response."""
    s = settings.rto
    all_advantages, all_returns = [], []
    for i, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES)):
        old, ref, dpo = (plain_logps(m, prompt, response) for m in (models.policy, models.reference, models.dpo))
        dpo_ref = ref if models.dpo_reference is None else plain_logps(models.dpo_reference, prompt, response)
        values = plain_values(models.critic, prompt, response) if models.critic is not None else [0.0] * (len(old) + 1)
        dense = [s.dpo_reward_scale * (d - r) for d, r in zip(dpo, dpo_ref)]
        dense = [min(max(x, -s.dpo_reward_clip), s.dpo_reward_clip) for x in dense]
        rewards = [x - s.kl_coef * (o - r) for x, o, r in zip(dense, old, ref)]
        score, after = SCORES[i], 0.0
        if not FINISHED[i] and s.truncation == "penalty":
            score = min(score, 0) - s.truncation_penalty
        elif not FINISHED[i] and s.truncation == "bootstrap":
            score, after = 0.0, values[-1]
        rewards[-1] += s.score_scale * min(max(score, -s.score_clip), s.score_clip)
        if s.shaping:
            rewards[-1] -= sum(dense)
        advantages, carry, following = [], 0.0, after
        lam = s.gae_lambda if s.advantage == "gae" else 1.0
        for h in reversed(range(len(response))):
            carry = rewards[h] + s.gamma * following - values[h] + s.gamma * lam * carry
            following = values[h]
            advantages.insert(0, carry)
        all_advantages.append(advantages)
        all_returns.append([a + v for a, v in zip(advantages, values)])
    flat = sum(all_advantages, [])
    mean = sum(flat) / len(flat)
    variance = sum((a - mean) ** 2 for a in flat) / len(flat)
    return [[(a - mean) / math.sqrt(max(variance, 1e-8)) for a in row] for row in all_advantages], all_returns


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("--rto.truncation", "bootstrap", "--rto.gae_lambda", "0.7", "--rto.gamma", "0.9"),
        ("--rto.truncation", "score", "--rto.shaping", "true", "--rto.dpo_reward_clip", "0.3"),
        ("--rto.advantage", "reinforce_pp", "--rto.gamma", "0.9"),
        ("--rto.score_scale", "0.5", "--rto.score_clip", "2"),
    ],
    ids=["default", "bootstrap", "shaping", "reinforce_pp", "score_scale"],
)
def test_experience_is_what_rto_says_token_by_token(overrides):
    settings = config(*overrides)
    models = build_models(**{"critic": None} if settings.rto.advantage == "reinforce_pp" else {})
    experience, rewards, _ = collect(models, settings)
    advantages, returns = plain_rto(models, settings)
    mask = experience.batch.response_mask
    # Values pass through float32 in `token_scores`; everything else is float64.
    torch.testing.assert_close(
        rewards.advantages[mask].double(), torch.tensor(sum(advantages, [])).double(), atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(
        rewards.returns[mask].double(), torch.tensor(sum(returns, [])).double(), atol=1e-5, rtol=1e-5
    )
    assert not rewards.advantages[~mask].any()


def test_the_dpo_models_own_reference_counts():
    own = build_model(7).double()
    own.set_attn_implementation(PACKED)
    models = build_models(dpo_reference=Model(own))
    settings = config("--rto.dpo_reward_clip", "0")
    settings.rto.dpo_reward_clip = 1e9
    experience, rewards, _ = collect(models, settings)
    advantages, _ = plain_rto(models, settings)
    flat = torch.tensor(sum(advantages, [])).double()
    torch.testing.assert_close(rewards.advantages[experience.batch.response_mask].double(), flat, atol=1e-5, rtol=1e-5)


def gradients(models, settings, experience, rewards, tokens=16384):
    """Gradients of the first optimizer step of `update`, which does not take it."""
    seen = {}

    class Recorder:
        def __init__(self, name, model):
            self.name, self.model = name, model

        def backward(self, loss):
            loss.backward()

        def step(self):
            seen[self.name] = [p.grad.clone() for p in self.model.parameters()]
            self.model.zero_grad()
            return {}

        def make_gradients(self):
            pass

        free_gradients = make_gradients

    optimizers = {f"{name}_optimizer": Recorder(name, getattr(models, name).module) for name in ("policy", "critic")}
    metrics = update(settings, models, optimizers, experience, rewards, 0, Accumulator(tokens, print))
    return seen, metrics


@pytest.mark.parametrize("normalization", ["token", "sequence"])
def test_update_has_the_gradient_of_the_plain_losses_whatever_the_micro_batches(normalization):
    settings = config("--rto.loss_normalization", normalization, "--rto.ppo_epochs", "1")
    models = build_models()
    experience, rewards, _ = collect(models, settings)
    with torch.no_grad():  # move away from ratio 1 and from the old values, beyond the clip for some tokens
        for p in [*models.policy.module.parameters(), *models.critic.module.parameters()]:
            p.add_(torch.randn_like(p) * 0.01)

    advantages, returns = rewards.advantages.split(experience.lengths), rewards.returns.split(experience.lengths)
    old_logps = experience.old_logps.split(experience.lengths)
    old_values = experience.old_values.split(experience.lengths)
    policy_loss = value_loss = 0.0
    tokens = sum(map(len, RESPONSES))
    for i, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES)):
        policy, critic = models.policy.module, models.critic.module
        with attention_implementation(policy, "eager"), attention_implementation(critic, "eager"):
            rows = models.policy.module(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
            hidden = models.critic.module.model(torch.tensor([prompt + response])).last_hidden_state[0]
        values = (models.critic.module.score(hidden)[:, 0] - 0.3) / 1.7
        weight = 1 / tokens if normalization == "token" else 1 / len(response) / len(RESPONSES)
        for h, token in enumerate(response):
            t = len(prompt) - 1 + h
            ratio = (rows[t, token] - old_logps[i][t]).exp()
            a, v, r, old = advantages[i][t], values[t], returns[i][t], old_values[i][t]
            policy_loss += weight * torch.maximum(-a * ratio, -a * ratio.clamp(0.8, 1.2))
            clipped = old + (v - old).clamp(-0.2, 0.2)
            value_loss += weight * 0.5 * torch.maximum((v - r) ** 2, (clipped - r) ** 2)
    expected = {
        "policy": torch.autograd.grad(policy_loss, list(models.policy.module.parameters())),
        "critic": torch.autograd.grad(value_loss, list(models.critic.module.parameters())),
    }
    for budget in (1, 12, 10_000):
        seen, metrics = gradients(models, settings, experience, rewards, budget)
        for name in expected:
            for mine, plain in zip(seen[name], expected[name]):
                # The model's norms compute in float32 even in a float64 model, and `token_scores` returns it.
                tolerance = 1e-6 if name == "policy" else 1e-5
                torch.testing.assert_close(mine, plain, atol=tolerance, rtol=1e-5)
        assert metrics["policy_loss"].item() == pytest.approx(policy_loss.item(), abs=1e-6)
        assert metrics["value_loss"].item() == pytest.approx(value_loss.item(), abs=1e-5)
        assert 0 < metrics["clip_fraction"].item() < 1


def test_an_untouched_policy_has_ratio_one_and_no_kl_to_itself():
    settings = config()
    models = build_models()
    models.reference = copy.deepcopy(models.policy)
    experience, rewards, collected = collect(models, settings)
    _, metrics = gradients(models, settings, experience, rewards)
    assert collected["kl"].item() == 0 and metrics["approx_kl"].item() < 1e-20 and metrics["clip_fraction"].item() == 0


def test_a_head_with_a_bias_takes_the_same_loss():
    settings = config("--rto.entropy_coef", "0.1")
    models = build_models()
    experience, rewards, _ = collect(models, settings)
    plain, plain_metrics = gradients(models, settings, experience, rewards)
    models.policy.module.lm_head.bias = torch.nn.Parameter(torch.zeros(len(TOKENIZER)).double())
    biased, biased_metrics = gradients(models, settings, experience, rewards)
    assert plain_metrics["entropy"].item() == pytest.approx(biased_metrics["entropy"].item(), rel=1e-6)
    without_bias = [g for g in biased["policy"] if g.shape != (len(TOKENIZER),)]
    for a, b in zip(plain["policy"], without_bias, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def test_the_metrics_split_the_reward_into_its_shares():
    settings = config()
    *_, m = collect(build_models(), settings)
    assert m["reward"].item() == pytest.approx((m["dpo_reward"] - m["kl_penalty"] + m["score_reward"]).item(), abs=1e-6)
    assert m["score"].item() == pytest.approx(sum(SCORES) / 3, abs=1e-6)
    assert m["score_reward"].item() == pytest.approx((0.7 - 1.3 - 1.0 + 10.0) / 3, abs=1e-6)  # penalty; clipped at 10
    assert m["truncated"].item() == pytest.approx(1 / 3) and m["length"].item() == 5
    assert -1 <= m["dpo_score_correlation"].item() <= 1


def test_paper_code_ends_truncated_responses_and_ignores_a_zero_scale():
    settings = config("--rto.compat", "paper_code", "--rto.dpo_reward_scale", "0")
    experience, rewards, metrics = collect(build_models(), settings)
    assert experience.response_ids[1] == [18, 25, TOKENIZER.eos_token_id]
    assert metrics["truncated"].item() == 0 and metrics["dpo_reward"].item() != 0
    *_, ours = collect(build_models(), config("--rto.dpo_reward_scale", "0"))
    assert ours["dpo_reward"].item() == 0


def test_sentence_granularity_pays_at_the_worlds_punctuation():
    table = delimiter_table(TOKENIZER, len(TOKENIZER), ".,", "cpu")
    assert table.nonzero()[:, 0].tolist() == [5, 6]
    settings = config("--rto.granularity", "sentence", "--rto.advantage", "reinforce_pp", "--rto.kl_coef", "0")
    settings.rto.score_scale = 0.0
    models = build_models(critic=None)
    experience, rewards, metrics = collect(models, settings, table)
    # Without a critic and with λ = 1, the return to go changes only behind tokens that are paid.
    rewards = rewards.returns[experience.batch.response_mask][-7:].diff().ne(0).tolist()
    assert rewards == [False, True, False, False, True, False]
    assert metrics["dpo_reward"].item() != 0


def test_kl_controller_moves_towards_its_target_within_bounds():
    assert adapt_kl_coef(0.1, 6.0, 64, 6.0) == 0.1
    assert adapt_kl_coef(0.1, 60.0, 64, 6.0) == pytest.approx(0.1 * (1 + 0.2 * 0.0064))
    assert adapt_kl_coef(0.1, 0.0, 64, 6.0) == pytest.approx(0.1 * (1 - 0.2 * 0.0064))


def trainer(*overrides, log=None, prompts=6):
    settings = config("--rollout.max_new_tokens", "8", "--rto.kl_target", "1.0", *overrides)
    models = build_models(scorer=lambda completions: torch.tensor([float(len(c.text)) for c in completions]))
    given = [Prompt(PROMPTS[i % 3], "1 red cup", {}) for i in range(prompts)]
    sampling = Sampling.of(settings.rollout, [1])
    return RTOTrainer(settings, models, TOKENIZER, sampling, given, "cpu", log or RecordedLog())


def test_a_restored_trainer_goes_on_bitwise():
    first = trainer()
    for _ in range(2):
        first.step()
    state = copy.deepcopy(first.state_dict())
    for _ in range(2):
        first.step()
    second = trainer()
    second.load_state_dict(state)
    torch.manual_seed(123)  # the global random state plays no part
    for _ in range(2):
        second.step()
    assert first.step_count == second.step_count == 4 and first.kl_coef == second.kl_coef
    for name in ("policy", "critic"):
        pairs = zip(getattr(first.models, name).module.parameters(), getattr(second.models, name).module.parameters())
        assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(
        next(first.models.policy.module.parameters()), next(trainer().models.policy.module.parameters())
    )


def test_rto_rolls_out_all_of_its_prompts_as_often_as_it_has_epochs():
    """Six prompts twice, in rollouts of five: 5, 5 and 2, each with two responses a prompt in optimizer steps of four."""
    settings = ["--rto.iterations=null", "--rto.epochs=2", "--rto.prompts_per_rollout=5"]
    settings += ["--rto.samples_per_prompt=2", "--rto.batch_size=4", "--rto.ppo_epochs=3"]
    first = trainer(*settings)
    metrics, coefficients = [], [first.kl_coef]
    while first.step_count < first.steps:
        if first.step_count == 2:
            state, visited = copy.deepcopy(first.state_dict()), first.order.visited
        metrics.append(first.step())
        coefficients.append(first.kl_coef)
    responses = [10, 10, 4]
    assert first.steps == 3 and first.order.remaining == 0 and visited == 10
    assert [round(step["tokens"] / float(step["length"])) for step in metrics] == responses
    for optimizer in first.optimizers.values():
        assert optimizer.steps == optimizer.total_steps == 3 * (3 + 3 + 1)
    expected = [adapt_kl_coef(c, float(m["kl"]), n, 1.0) for c, m, n in zip(coefficients, metrics, responses)]
    assert coefficients[1:] == expected  # the last rollout counts for as many responses as it has
    second = trainer(*settings)
    second.load_state_dict(state)
    again = second.step()
    assert second.steps == 3 and all(float(again[k]) == float(metrics[2][k]) for k in again if "second" not in k)
    for name in ("policy", "critic"):
        pairs = zip(getattr(first.models, name).module.parameters(), getattr(second.models, name).module.parameters())
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("asked, rollouts", [("--rto.iterations=null", [6]), ("--rto.iterations=3", [16, 16, 16])])
def test_prompts_fill_a_rollout_more_than_once_only_where_iterations_are_asked_for(asked, rollouts):
    built = trainer("--rto.prompts_per_rollout", "16", "--rto.epochs", "1", asked)
    assert built.steps == len(rollouts)
    assert [len(built.order.take(16)) for _ in rollouts] == rollouts


@pytest.mark.parametrize("prompts, rollouts", [(2, []), (4, []), (6, [4]), (7, [4, 2]), (20, [4] * 8)])
def test_rto_goes_on_with_other_prompts_until_they_are_visited(prompts, rollouts):
    """After two of the three rollouts that six prompts fill twice."""
    settings = ["--rto.iterations=null", "--rto.epochs=2", "--rto.prompts_per_rollout=4", "--rto.batch_size=3"]
    before = trainer(*settings)
    for _ in range(2):
        before.step()
    after = trainer(*settings, prompts=prompts)
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    assert after.steps == 2 + len(rollouts)
    updates = after.config.rto.ppo_epochs * sum(-(-n // 3) for n in rollouts)
    assert all(o.total_steps == o.steps + updates for o in after.optimizers.values())
    assert [len(after.order.take(4)) for _ in rollouts] == rollouts and after.order.take(4) == []


def test_an_update_that_runs_out_of_memory_is_begun_anew_with_half_the_tokens():
    log = RecordedLog()
    failing, half = (
        trainer("--model.micro_batch_tokens", "40", log=log),
        trainer("--model.micro_batch_tokens", "40"),
    )
    half.accumulator.tokens = 20
    backward, failures = failing.optimizers["critic_optimizer"].backward, [True]

    def fails(loss):  # the policy's gradient is there already
        if failures:
            failures.pop()
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")
        backward(loss)

    failing.optimizers["critic_optimizer"].backward = fails
    for _ in range(2):
        ours, theirs = failing.step(), half.step()
        assert all(torch.equal(torch.as_tensor(ours[k]), torch.as_tensor(theirs[k])) for k in ours if "second" not in k)
    for name in ("policy", "critic"):
        pairs = zip(getattr(failing.models, name).module.parameters(), getattr(half.models, name).module.parameters())
        assert all(torch.equal(a, b) for a, b in pairs)
    assert log.said == ["out of memory with micro-batches of 40 tokens; goes on with 20"]
    resumed = trainer("--model.micro_batch_tokens", "40")
    resumed.load_state_dict(failing.state_dict())
    assert resumed.accumulator.tokens == 20


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """Policies of different weights and a reward model without statistics, on disk."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("sft", "dpo", "other")):
        build_model(seed).save_pretrained(folder / name)
    world_scorer().save_pretrained(folder / "rm")
    return {name: str(folder / name) for name in ("sft", "dpo", "other", "rm")}


def load(directories, critic="rm", scorer=None, overrides=()):
    paths = [directories[name] for name in ("sft", "dpo", critic)]
    settings = config(*overrides)
    return load_models(settings, *paths, scorer, Loader(settings, {"device": "cpu", "dtype": torch.float32}))


def test_the_dpo_reference_is_the_sft_model_whatever_the_kl_reference(directories):
    assert load(directories).dpo_reference is None  # one model serves both
    models = load(directories, overrides=["--rto.ref_model", directories["other"]])
    sft = load(directories).reference
    assert torch.equal(models.dpo_reference.module.lm_head.weight, sft.module.lm_head.weight)
    assert not torch.equal(models.reference.module.lm_head.weight, sft.module.lm_head.weight)
    paper = load(directories, overrides=["--rto.ref_model", directories["other"], "--rto.compat", "paper_code"])
    assert paper.dpo_reference is None
    assert load(directories, overrides=["--rto.dpo_reward_scale", "0"]).dpo is None


def test_a_critic_from_the_reward_model_speaks_in_normalised_scores(directories):
    scorer = NormalizedScores(None, directories["rm"], mean=20.0, std=4.0)
    critic = load(directories, scorer=scorer).critic
    batch = pack_whole([[2, 13, 29]])
    raw = critic_values(load(directories, scorer=NormalizedScores(None, directories["rm"])).critic, batch)
    torch.testing.assert_close(critic_values(critic, batch), (raw - 20.0) / 4.0)
    from_sft = load(directories, critic="sft", scorer=scorer).critic  # its head starts at 0
    assert not critic_values(from_sft, batch).any()


def test_at_another_temperature_the_dense_reward_stays_that_of_the_dpo_model():
    models = build_models(scorer=None)
    zeros = ("--rto.kl_coef", "0", "--rto.truncation", "score", "--rto.dpo_reward_clip", "0")
    cold, warm = (collect(models, config(*zeros, "--rollout.temperature", t)) for t in ("0.5", "1.0"))
    assert cold[2]["dpo_reward"].item() == pytest.approx(warm[2]["dpo_reward"].item(), abs=1e-6)
    assert cold[2]["kl"].item() != pytest.approx(warm[2]["kl"].item(), abs=1e-2)


def test_without_a_reward_model_the_truncation_penalty_stands():
    *_, metrics = collect(build_models(scorer=None), config("--rto.score_scale", "0"))
    assert metrics["score_reward"].item() == pytest.approx(-1 / 3)


def test_iterations_with_graphs_are_those_without(monkeypatch):
    """Scoring and training passes of all models; a stand-in repeats what a CUDA graph would."""
    few_sizes = lambda count, coarse: 1 << (count - 1).bit_length() if count else 0  # noqa: E731
    monkeypatch.setattr(batch, "padded_size", few_sizes)
    plain, other = (trainer("--rto.batch_size", "2") for _ in range(2))
    models = [other.models.policy, other.models.reference, other.models.dpo, other.models.critic]
    for model in models:
        model.graphs = PassGraphs(model.module, Repeated)
    for _ in range(3):
        steps = [{k: float(v) for k, v in each.step().items() if "second" not in k} for each in (other, plain)]
        assert steps[0] == pytest.approx(steps[1], rel=1e-3, abs=1e-5)
    replays = [sum(r.graph.replays for r in model.graphs.recorded.values() if r) for model in models]
    assert min(replays) > 0
    other.release()
    assert not any(model.graphs.recorded for model in models)


def test_iterations_with_padded_passes_are_those_without(monkeypatch):
    """As on a GPU, where every eager pass of our layers has one of few sizes."""
    plain, other = (trainer("--rto.batch_size", "2") for _ in range(2))
    for _ in range(2):
        expected = {k: float(v) for k, v in plain.step().items() if "second" not in k}
        with monkeypatch.context() as context:
            context.setattr(Model, "_pads", lambda self: True)
            found = {k: float(v) for k, v in other.step().items() if "second" not in k}
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)
    plain.release(), other.release()
