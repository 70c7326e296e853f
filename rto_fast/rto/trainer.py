"""Stage 4: Reinforced Token Optimization (arXiv 2404.18922).

PPO on the token reward
    r_h = β1·log π_dpo/π_ref − β2·log π/π_ref + 1[h = H]·β3·score
where every token is paid at once for how much the DPO policy prefers it. Where this departs from the authors' code:
a truncated response is not passed off as finished, β1 = 0 means 0, the DPO model's own reference is honoured, log-probs
are float32, and the loss is a mean over tokens; `rto.compat: paper_code` takes these back, but for the precision.
"""

import time
from collections import Counter
from dataclasses import dataclass

import torch

from rto_fast.batch import PackedBatch, pack, pack_whole, segment_sum
from rto_fast.errors import RewardError
from rto_fast.models.loading import forward_hidden, output_head, token_scores
from rto_fast.models.model import Model, ScoreStatistics, vocabulary_of
from rto_fast.ops import linear_ppo_loss, linear_token_logps, ppo_policy_loss, ppo_value_loss, rto_advantages
from rto_fast.rewards import completions_of, judged
from rto_fast.rollout import build_engine
from rto_fast.rollout.shared import generate_shared
from rto_fast.rto import first_update as preflight
from rto_fast.rto.behaviour import behaviour_logps
from rto_fast.rto.health import Health
from rto_fast.rto.token_records import recorded_iterations, reward_parts, token_records
from rto_fast.system.progress import progress
from rto_fast.training import ranks
from rto_fast.training.accumulate import Accumulator
from rto_fast.training.loop import train
from rto_fast.training.optimizer import build_optimizer
from rto_fast.training.order import ShuffledIndices, fingerprint
from rto_fast.training.ranks import map_items
from rto_fast.training.response_logps import response_logps
from rto_fast.training.saving import save_model
from rto_fast.training.steps import count_steps
from rto_fast.training.zero import release


@dataclass
class Models:
    policy: Model
    reference: Model
    dpo: Model | None
    dpo_reference: Model | None  # None: the same as `reference`
    critic: Model | None
    scorer: object | None  # completions → [N] normalised scores
    origins: tuple[str, str] | None = None  # where policy and reference were loaded from


@dataclass
class Experience:
    """A rollout, ready for PPO: packed in the alignment of `batch`, [T] each."""

    prompt_ids: list[list[int]]
    response_ids: list[list[int]]
    batch: PackedBatch
    old_logps: torch.Tensor
    old_values: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor
    importance: torch.Tensor | None = None  # weights of the policy's loss, see `behaviour_logps`
    reward_parts: dict[str, torch.Tensor] | None = None  # what the token rewards are made of, for the report
    kl: torch.Tensor | None = None  # log π/π_ref

    @property
    def lengths(self):
        return self.batch.cu_seqlens.diff().tolist()


def load_models(config, sft, dpo, critic, scorer, loader):
    """Loads every model of the stage.

    Args:
        sft, dpo, critic: directories or hub ids; `dpo` may be None. scorer: `NormalizedScores` or None. loader: `Loader`.
    """
    rto = config.rto

    def frozen(path):
        return loader.frozen("causal_lm", path)

    start, reference = dpo if rto.init_from == "dpo" else sft, rto.ref_model or sft
    pays = config.pays_dense_reward
    dpo_reference = config.dpo.ref_model or sft if pays and rto.compat == "none" else reference
    return Models(
        policy=loader.trained("causal_lm", start),
        reference=frozen(reference),
        dpo=frozen(dpo) if pays else None,
        dpo_reference=frozen(dpo_reference) if dpo_reference != reference else None,
        critic=load_critic(critic, scorer, loader, critic == sft and not rto.critic)
        if rto.advantage == "gae"
        else None,
        scorer=scorer,
        origins=(start, reference),
    )


def load_critic(path, scorer, loader, new_head):
    """A critic in the units of the scores it predicts: one that starts from the reward model takes over the statistics by
    which the scores are normalised, and keeps them in its config. new_head: it starts from a language model."""
    critic = loader.trained("scorer", path, new_head)
    if scorer is not None and path == scorer.path:
        critic.scores = ScoreStatistics(scorer.mean, scorer.std)
    return critic


def critic_values(critic, batch):
    """Values of a packed batch's states, [T]: the head's output in the units of the normalised scores."""
    mean, std = critic.scores or ScoreStatistics()
    return (critic.forward(token_scores, batch) - mean) / std


@torch.no_grad()
def rollout_values(critic, prompt_ids, response_ids, max_tokens, device):
    """(values [T] in the alignment of `pack`, value after the last token of each sequence [N])."""
    sequences = [p + r for p, r in zip(prompt_ids, response_ids)]

    def values(run):
        return critic_values(critic, pack_whole([sequences[i] for i in run], device))

    lengths = [len(s) for s in sequences]
    whole = map_items(values, lengths, lengths, max_tokens)
    last = torch.tensor(lengths, device=device).cumsum(0) - 1
    is_state = torch.ones_like(whole, dtype=torch.bool).index_fill(0, last, False)
    return whole[is_state], whole[last]


def delimiter_table(tokenizer, vocab_size, characters, device):
    """[V] bool: tokens whose text ends, but for spaces, with one of `characters`."""
    texts = tokenizer.batch_decode([[i] for i in range(vocab_size)])
    ends = [any(text.rstrip(" ").endswith(c) for c in characters) for text in texts]
    return torch.tensor(ends, device=device)


def collect(config, models, rollout, prompts, tokenizer, kl_coef, delimiters, device):
    """Scores a rollout and turns it into an `Experience`.

    Returns:
        (Experience, metrics of the rollout).
    """
    rto, max_tokens = config.rto, config.rto.micro_batch_tokens
    paper_code = rto.compat == "paper_code"
    finished = list(rollout.finished)
    response_ids = rollout.response_ids
    if paper_code:
        eos = tokenizer.eos_token_id
        response_ids = [r if done else r[:-1] + [eos] for r, done in zip(response_ids, finished)]
        finished = [True] * len(finished)
    prompt_ids = rollout.prompt_ids
    batch = pack(prompt_ids, response_ids, device)

    def logps(model, temperature=config.rollout.temperature):
        return response_logps(model, prompt_ids, response_ids, max_tokens, temperature)

    old_logps, importance, mismatch = behaviour_logps(config, models.policy, rollout, prompt_ids, response_ids, batch)
    ref_logps = logps(models.reference)
    dpo_logps = dpo_ref_logps = ref_logps
    if models.dpo is not None:
        # The implicit reward is that of the DPO model as it was trained: at temperature 1.
        dpo_logps = logps(models.dpo, 1.0)
        if models.dpo_reference is not None or config.rollout.temperature != 1.0:
            dpo_ref_logps = logps(models.dpo_reference or models.reference, 1.0)
    if models.critic is not None:
        values, after = rollout_values(models.critic, prompt_ids, response_ids, max_tokens, device)
    else:
        values, after = torch.zeros_like(old_logps), old_logps.new_zeros(batch.num_sequences)

    truncated = torch.tensor([not done for done in finished], device=device)
    scores, bootstrap = old_logps.new_zeros(batch.num_sequences), None
    if models.scorer is not None:
        completions = completions_of(prompts, response_ids, finished, tokenizer)
        scores = judged(models.scorer, completions).to(device)
    paid_scores = scores
    if rto.truncation == "penalty":
        # At most 0 before the penalty: never to end must not be worth more than any ending.
        paid_scores = torch.where(truncated, scores.clamp(max=0.0) - rto.truncation_penalty, scores)
    elif rto.truncation == "bootstrap":
        paid_scores, bootstrap = torch.where(truncated, 0.0, scores), torch.where(truncated, after, 0.0)

    scale = 1.0 if paper_code and rto.dpo_reward_scale <= 0 else rto.dpo_reward_scale
    result = rto_advantages(
        old_logps,
        ref_logps,
        dpo_logps,
        values,
        paid_scores,
        batch.cu_seqlens,
        batch.response_mask,
        dpo_ref_logps=dpo_ref_logps,
        dpo_reward_scale=scale,
        dpo_reward_clip=rto.dpo_reward_clip,
        kl_coef=kl_coef,
        # Without a reward model all scores are 0, but the penalty stands.
        score_scale=rto.score_scale or 1.0,
        score_clip=rto.score_clip,
        gamma=rto.gamma,
        # Without a critic the advantage is the discounted sum of all rewards to come: λ = 1 over zero values.
        gae_lambda=rto.gae_lambda if rto.advantage == "gae" else 1.0,
        granularity=rto.granularity,
        delimiter_mask=delimiters[batch.labels.clamp(min=0)] if delimiters is not None else None,
        shaping=rto.shaping,
        bootstrap_values=bootstrap,
        whiten=rto.whiten,
    )
    parts = reward_parts(result, kl_coef, paid_scores, rto.score_scale or 1.0, rto.score_clip, batch)
    experience = Experience(
        prompt_ids,
        response_ids,
        batch,
        old_logps,
        values,
        result.advantages,
        result.returns,
        importance,
        parts,
        result.kl,
    )

    per_response = {k: v / batch.num_sequences for k, v in result.stats.items() if k.endswith("_sum")}
    mask, stats = batch.response_mask, result.stats
    dense = torch.where(mask, dpo_logps - dpo_ref_logps, 0.0)
    sizes = torch.stack([segment_sum(part, batch.cu_seqlens).abs().mean() for part in parts.values()])
    metrics = {
        "score": scores.mean(),
        "reward": segment_sum(result.token_rewards, batch.cu_seqlens).mean(),
        "dpo_reward": per_response["dpo_reward_sum"],
        "kl": per_response["kl_sum"],
        "kl_penalty": kl_coef * per_response["kl_sum"],
        "score_reward": per_response["score_reward_sum"],
        "kl_coef": kl_coef,
        "dpo_clip_fraction": stats["dpo_clip_count"] / stats["count"].clamp(min=1),
        "dpo_score_correlation": _correlation(segment_sum(dense, batch.cu_seqlens), scores),
        "length": stats["count"] / batch.num_sequences,
        "truncated": truncated.float().mean(),
        "advantage_std": stats["advantage_var"].sqrt(),
        "explained_variance": _explained_variance(values[mask], result.returns[mask]),
    }
    # Of a response's size, without signs: in a mean over responses they would cancel.
    shares = sizes / sizes.sum().clamp(min=1e-8)
    metrics |= {f"{name}_share": share for name, share in zip(parts, shares)}
    return experience, metrics | mismatch


def _correlation(x, y):
    x, y = x - x.mean(), y - y.mean()
    return (x * y).sum() / (x.square().sum() * y.square().sum()).sqrt().clamp(min=1e-8)


def _explained_variance(values, returns):
    return 1.0 - (returns - values).var(correction=0) / returns.var(correction=0).clamp(min=1e-8)


def policy_loss(module, batch, old_logps, advantages, *, temperature, entropy_coef, **options):
    """The PPO loss of a packed batch and its metrics; see `rto_fast.ops.linear_ppo_loss`."""
    hidden, head, mask = forward_hidden(module, batch), output_head(module), batch.response_mask
    if head.bias is None:
        return head.run(
            linear_ppo_loss,
            hidden,
            batch.labels,
            old_logps,
            advantages,
            mask,
            entropy_coef=entropy_coef,
            temperature=temperature,
            **options,
        )
    logps, entropy = head.run(linear_token_logps, hidden, batch.labels, temperature=temperature, return_entropy=True)
    loss, metrics = ppo_policy_loss(logps, old_logps, advantages, mask, **options)
    weights = mask if options["weights"] is None else options["weights"] * mask
    mean_entropy = (entropy * weights).sum() / options["num_items"]
    return loss - entropy_coef * mean_entropy, metrics | {"entropy": mean_entropy.detach()}


def update(config, models, optimizers, experience, seed, accumulator, gate=None):
    """PPO epochs over an `Experience`.

    Args:
        optimizers: {"policy": …, "critic": …}. accumulator: `Accumulator`. gate: called with the metrics of the first
            step's passes before that step is taken.
    Returns:
        metrics averaged over the optimizer steps.
    """
    rto, device = config.rto, experience.old_logps.device
    lengths = experience.lengths
    parts = {
        name: getattr(experience, name).split(lengths) for name in ("old_logps", "old_values", "advantages", "returns")
    }
    importance = None if experience.importance is None else experience.importance.split(lengths)
    policy_options = {name: getattr(rto, name) for name in ("clip_eps", "clip_eps_high", "dual_clip", "entropy_coef")}
    per_sequence = rto.loss_normalization == "sequence" or rto.compat == "paper_code"
    totals: Counter = Counter()
    steps = 0
    generator = torch.Generator().manual_seed(seed)
    epochs = (torch.randperm(len(lengths), generator=generator) for _ in range(rto.ppo_epochs))
    minibatches = [chosen.tolist() for epoch in epochs for chosen in epoch.split(rto.batch_size)]
    with progress("rto: update", len(minibatches), "optimizer steps") as phase:
        for chosen in minibatches:
            # What the means are over is known before the first micro-batch: their gradients add up exactly.
            num_items = float(len(chosen) if per_sequence else sum(len(experience.response_ids[i]) for i in chosen))

            def passes(run, factor, chosen=chosen, num_items=num_items):
                rows = [chosen[i] for i in run]
                batch = pack(
                    [experience.prompt_ids[i] for i in rows], [experience.response_ids[i] for i in rows], device
                )
                old_logps, old_values, advantages, returns = (
                    torch.cat([part[i] for i in rows]) for part in parts.values()
                )
                weights = None
                if per_sequence:
                    counts = torch.tensor([len(experience.response_ids[i]) for i in rows], device=device)
                    weights = (1.0 / counts).repeat_interleave(batch.cu_seqlens.diff(), output_size=batch.num_tokens)
                policy_weights = weights
                if importance is not None:
                    policy_weights = torch.cat([importance[i] for i in rows])
                    policy_weights = policy_weights if weights is None else policy_weights * weights
                loss, metrics = models.policy.forward(
                    policy_loss,
                    batch,
                    old_logps,
                    advantages,
                    temperature=config.rollout.temperature,
                    weights=policy_weights,
                    num_items=num_items,
                    **policy_options,
                )
                optimizers["policy"].backward(factor * loss)
                if models.critic is not None:
                    value_loss, value_metrics = ppo_value_loss(
                        critic_values(models.critic, batch),
                        old_values,
                        returns,
                        batch.response_mask,
                        weights=weights,
                        num_items=num_items,
                        value_clip_eps=rto.value_clip_eps,
                    )
                    optimizers["critic"].backward(factor * rto.value_coef * value_loss)
                    metrics |= value_metrics
                return metrics

            metrics = accumulator.run(passes, [lengths[i] for i in chosen], optimizers.values())
            if gate and not steps:
                gate(metrics)
            totals.update(metrics)
            if ranks.world_size() > 1:
                totals.update({"imbalance": ranks.imbalance([lengths[i] for i in chosen])})
            for name, optimizer in optimizers.items():
                prefix = "" if name == "policy" else f"{name}_"
                totals.update({prefix + key: value for key, value in optimizer.step().items()})
            steps += 1
            phase.advance()
    return {name: value / steps for name, value in totals.items()}


def adapt_kl_coef(kl_coef, kl, responses, target, horizon):
    """Proportional controller in log space (arXiv 1909.08593, section 2.2)."""
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return kl_coef * (1.0 + error * responses / horizon)


class RTOTrainer:
    """The stage's state and one iteration of it. All randomness derives from the seed and the iteration's number, so
    `state_dict` is everything that a restored run needs to go on exactly as this one would have."""

    def __init__(self, config, models, tokenizer, sampling, prompts, device, say):
        self.config, self.models, self.tokenizer, self.prompts, self.device = config, models, tokenizer, prompts, device
        self.sampling, rto = sampling, config.rto
        self.step_count, self.kl_coef = 0, rto.kl_coef
        self.token_records = []  # of the last iteration, if it is one of those that are recorded
        self.findings = []  # of the gates before the first update, while it is the last iteration
        epochs = None if rto.iterations else rto.epochs  # so many iterations draw on prompts without end
        self.order = ShuffledIndices(len(prompts), config.seed, epochs, fingerprint(prompts))
        self.steps, updates = self._count_steps()
        self.optimizers = {"policy": build_optimizer(models.policy, rto, updates, config.deepspeed)}
        if models.critic is not None:
            self.optimizers["critic"] = build_optimizer(models.critic, rto, updates, config.deepspeed, rto.critic_lr)
        self.accumulator = Accumulator(rto.micro_batch_tokens, say)
        self.engine = build_engine(models.policy, tokenizer, config.rollout)
        self.delimiters = None
        if rto.granularity == "sentence":
            vocab_size = vocabulary_of(models.policy.module)
            self.delimiters = delimiter_table(tokenizer, vocab_size, rto.delimiters, device)

    def _count_steps(self) -> tuple[int, int]:
        """(iterations, those done included; optimizer steps of those still to come)."""
        rto = self.config.rto
        left = self.order.remaining
        if rto.iterations:
            left = max(0, rto.iterations - self.step_count) * rto.prompts_per_rollout
        whole, rest = divmod(int(left), rto.prompts_per_rollout)
        updates = [count_steps(n * rto.samples_per_prompt, rto.batch_size) for n in (rto.prompts_per_rollout, rest)]
        return self.step_count + whole + bool(rest), rto.ppo_epochs * (whole * updates[0] + updates[1])

    @property
    def skipped(self) -> int:
        """Optimizer steps whose gradient was not finite."""
        return sum(optimizer.skipped for optimizer in self.optimizers.values())

    def step(self):
        """Rollout, scores, PPO; returns the iteration's metrics. A RewardError leaves the state as it was."""
        rto, drawn = self.config.rto, self.order.state_dict()
        seed = self.config.seed * 1_000_003 + self.step_count
        start = time.perf_counter()
        chosen = [self.prompts[i] for i in self.order.take(rto.prompts_per_rollout)]
        prompt_ids = [p.prompt_ids for p in chosen]
        rollout = generate_shared(self.engine, prompt_ids, rto.samples_per_prompt, self.sampling, seed)
        generated = time.perf_counter()
        repeated = [p for p in chosen for _ in range(rto.samples_per_prompt)]
        try:
            experience, metrics = collect(
                self.config, self.models, rollout, repeated, self.tokenizer, self.kl_coef, self.delimiters, self.device
            )
        except RewardError:
            self.order.load_state_dict(drawn)
            raise
        scored = time.perf_counter()
        recorded = self.step_count in recorded_iterations(self.steps)
        self.token_records = token_records(experience, repeated, self.tokenizer) if recorded else []
        self.findings, gate = self._gates(experience, metrics) if self.step_count == 0 else ([], None)
        metrics |= update(self.config, self.models, self.optimizers, experience, seed, self.accumulator, gate)
        end = time.perf_counter()
        if rto.kl_target is not None:
            kl = float(metrics["kl"])
            self.kl_coef = adapt_kl_coef(self.kl_coef, kl, len(repeated), rto.kl_target, rto.kl_horizon)
        self.step_count += 1
        seconds = rollout.timings | {"score": scored - generated, "update": end - scored}
        metrics |= {f"seconds_{phase}": value for phase, value in seconds.items()}
        metrics["micro_batch_tokens"] = self.accumulator.tokens
        if ranks.world_size() > 1:
            metrics["rollout_imbalance"] = rollout.stats["rollout_imbalance"]
        return metrics | {
            "tokens": rollout.num_tokens,
            "tokens_per_second": rollout.num_tokens / (end - start),
            "rollout_tokens_per_second": rollout.num_tokens / (generated - start),
        }

    def _gates(self, experience, metrics):
        """(findings on the first rollout, `gate` of its first update)."""
        noise = preflight.forward_noise(self.config, self.models.policy, experience)
        findings = preflight.check_sampler(noise, metrics, self.config.rollout.engine)
        findings += preflight.check_reference(self.config, self.models, experience, metrics, noise)
        sampled = preflight.are_sampled(metrics)
        return findings, lambda passes: preflight.check_ratio(self.config, noise, sampled, passes)

    def release(self):
        """The stage is over: what it holds beside the models is given back."""
        for optimizer in self.optimizers.values():
            optimizer.release()
        for frozen in (self.models.reference, self.models.dpo, self.models.dpo_reference):
            release(frozen)

    def _parts(self):
        optimizers = {f"{name}_optimizer": optimizer for name, optimizer in self.optimizers.items()}
        return optimizers | {"order": self.order, "accumulator": self.accumulator}

    def state_dict(self):
        parts = {name: part.state_dict() for name, part in self._parts().items()}
        return parts | {"iteration": self.step_count, "kl_coef": self.kl_coef}

    def load_state_dict(self, state):
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.step_count, self.kl_coef = state["iteration"], state["kl_coef"]
        self.steps, updates = self._count_steps()
        for optimizer in self.optimizers.values():
            optimizer.total_steps = optimizer.steps + updates


def main(config, models, tokenizer, sampling, prompts, *, output, log, checkpoints, device, evaluate=None):
    """Trains `models.policy` and saves it to `output` (the critic beside it); returns that directory.

    Args:
        sampling: `Sampling` of the rollouts. prompts: list of `Prompt`. evaluate: called with the policy's engine and the
            iteration, every `eval.every`.
    """
    trainer = RTOTrainer(config, models, tokenizer, sampling, prompts, device, log.say)
    rollout = int(min(config.rto.prompts_per_rollout, trainer.order.remaining))
    if len(prompts) < rollout:
        log.say(f"rto: {len(prompts)} prompts fill a rollout of {rollout} more than once")

    health = Health(config, log)

    def after_step(step, metrics):
        for finding in trainer.findings:
            log.warning("rto", step, *finding)
        health.check(step, metrics)
        log.tokens("rto", step, trainer.token_records)

    def evaluate_policy(step):
        if evaluate and config.eval.every and step % config.eval.every == 0:
            evaluate(trainer.engine, step)

    shown = ("score", "dpo_reward", "kl", "length", "clip_fraction", "tokens_per_second")
    train("rto", trainer, log, checkpoints, config.rto.save_every, shown, after_step, evaluate_policy)
    if models.critic is not None:
        save_model(models.critic, tokenizer, f"{output}_critic", sampling.stop_ids)
    path = save_model(models.policy, tokenizer, output, sampling.stop_ids)
    trainer.release()
    return path
