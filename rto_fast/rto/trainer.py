"""Stage 4, Reinforced Token Optimization (arXiv 2404.18922). An iteration is sample → score → reward → update.

Differences from the authors' code: a truncated response is not passed off as finished, β1 = 0 means 0, the DPO model's own
reference is honoured, log-probs are float32, and the loss is a mean over tokens. `rto.compat: paper_code` restores the
authors' behaviour, except for the precision.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from rto_fast.config import Config
from rto_fast.data.tokenizing import Prompt
from rto_fast.errors import RewardError
from rto_fast.models.model import Model, vocabulary_of
from rto_fast.reporting.log import Finding, RunLog
from rto_fast.reporting.metric_names import (
    CLIP_FRACTION,
    DPO_REWARD,
    FIRST_STEP_KL,
    KL,
    LENGTH,
    MICRO_BATCH_TOKENS,
    PLANNED_TOKENS,
    SCORE,
    TOKENS_PER_SECOND,
)
from rto_fast.rollout import Engine, RolloutBatch, Sampling, build_engine
from rto_fast.rollout.base import generate_shared
from rto_fast.rto.experience import Experience, Models, score_rollout
from rto_fast.rto.first_update import check_dpo_model, check_first_rollout
from rto_fast.rto.health import Health
from rto_fast.rto.metrics import recorded_iterations, rollout_metrics, speed_metrics, token_records
from rto_fast.rto.token_rewards import TokenRewards, delimiter_table, token_rewards
from rto_fast.rto.update import update
from rto_fast.session import TrainingSession
from rto_fast.system.progress import progress
from rto_fast.training.accumulate import Accumulator, numbers
from rto_fast.training.budget import TokenBudget, unplanned_budget
from rto_fast.training.checkpoint import Trainer
from rto_fast.training.loop import train
from rto_fast.training.optimizer import count_steps
from rto_fast.training.order import ShuffledIndices
from rto_fast.training.saving import save_model
from rto_fast.training.zero import build_optimizer, release

KL_HORIZON = 10_000  # responses over which an adaptive kl_coef reacts


class RTOTrainer(Trainer):
    """The state of the stage, and one iteration of it.

    All randomness derives from the seed and the number of the iteration, so that a trainer restored from `state_dict` goes
    on exactly as this one would have.

    Args:
        budget: the tokens of a pass; default: as the configuration says without a plan.
    """

    step_count = 0  # iterations done
    is_exact = True  # no iteration has shown that the log-probs of an exact engine are not

    def __init__(
        self,
        config: Config,
        models: Models,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
        prompts: Sequence[Prompt],
        device: str,
        log: RunLog,
        budget: TokenBudget | None = None,
    ):
        rto = config.rto
        self.config, self.models, self.tokenizer, self.sampling = config, models, tokenizer, sampling
        self.prompts, self.device, self.log = prompts, device, log
        self.kl_coef = rto.kl_coef
        epochs = None if rto.iterations else rto.epochs  # a number of iterations draws on the prompts without end
        self.order = ShuffledIndices.of(prompts, config.seed, epochs)
        self.steps, updates = self._count_steps()
        self.optimizers = {"policy_optimizer": build_optimizer(models.policy, rto, updates, config)}
        if models.critic is not None:
            self.optimizers["critic_optimizer"] = build_optimizer(models.critic, rto, updates, config, rto.critic_lr)
        self.budget = budget or unplanned_budget(config)
        self.accumulator = Accumulator(self.budget.training, log.say)
        self.engine = build_engine(models.policy, tokenizer, config.rollout)
        say_exactness(log, models.policy, self.engine)
        self.delimiters = None
        if rto.granularity == "sentence":
            self.delimiters = delimiter_table(tokenizer, vocabulary_of(models.policy.module), rto.delimiters, device)

    def _count_steps(self) -> tuple[int, int]:
        """The number of iterations, those done included, and of optimizer steps still to come."""
        rto = self.config.rto
        left = self.order.remaining
        if rto.iterations:
            left = max(0, rto.iterations - self.step_count) * rto.prompts_per_rollout
        whole, rest = divmod(int(left), rto.prompts_per_rollout)
        updates = [count_steps(n * rto.samples_per_prompt, rto.batch_size) for n in (rto.prompts_per_rollout, rest)]
        return self.step_count + whole + bool(rest), rto.ppo_epochs * (whole * updates[0] + updates[1])

    def step(self) -> dict[str, Any]:
        """Runs one iteration and returns its metrics.

        Raises:
            RewardError: the trainer is as it was before the iteration.
        """
        seed, order = self.config.seed * 1_000_003 + self.step_count, self.order.state_dict()
        start = time.perf_counter()
        prompts, rollout = self._sample(seed)
        sampled = time.perf_counter()
        try:
            with progress("rto: score"):
                experience = score_rollout(
                    self.config, self.models, rollout, prompts, self.tokenizer, self.device, self.budget.scoring
                )
        except RewardError:
            self.order.load_state_dict(order)
            raise
        rewards = token_rewards(self.config.rto, experience, self.kl_coef, self.delimiters)
        known = rollout_metrics(experience, rewards, self.kl_coef)
        scored = time.perf_counter()
        check = self._inspect(experience, rewards)
        updates = update(self.config, self.models, self.optimizers, experience, rewards, seed, self.accumulator, check)
        metrics = numbers(known | updates)  # the iteration's only look at them, which waits for the update
        updated = time.perf_counter()
        if experience.exact and metrics[FIRST_STEP_KL] != 0:  # or NaN
            self.is_exact = False
            self.log.warning("rto", self.step_count + 1, *not_exact(metrics[FIRST_STEP_KL]))
        if self.config.rto.kl_target is not None:
            self.kl_coef = adapt_kl_coef(self.kl_coef, metrics[KL], len(prompts), self.config.rto.kl_target)
        self.step_count += 1
        metrics |= {MICRO_BATCH_TOKENS: self.accumulator.tokens, PLANNED_TOKENS: self.accumulator.configured}
        return metrics | speed_metrics(rollout, sampled - start, scored - sampled, updated - scored)

    def _sample(self, seed: int) -> tuple[list[Prompt], RolloutBatch]:
        """Draws the iteration's prompts and samples responses; returns the prompt of each response, and the rollout."""
        rto = self.config.rto
        drawn = [self.prompts[i] for i in self.order.take(rto.prompts_per_rollout)]
        rollout = generate_shared(
            self.engine, [prompt.prompt_ids for prompt in drawn], rto.samples_per_prompt, self.sampling, seed
        )
        rollout.exact &= self.is_exact
        return [prompt for prompt in drawn for _ in range(rto.samples_per_prompt)], rollout

    def _inspect(self, experience: Experience, rewards: TokenRewards) -> Callable[[Mapping[str, Any]], None] | None:
        """Records what single tokens earned, and checks the first rollout of a run.

        Returns:
            The check of the first optimizer step; None after the first iteration.
        """
        if self.step_count in recorded_iterations(self.steps):
            self.log.tokens("rto", self.step_count + 1, token_records(experience, rewards, self.tokenizer))
        if self.step_count:
            return None
        return check_first_rollout(
            self.config, self.models, experience, rewards.kl, lambda finding: self.log.warning("rto", 1, *finding)
        )

    def release(self) -> None:
        super().release()
        for frozen in (self.models.reference, self.models.dpo, self.models.dpo_reference):
            release(frozen)

    def state_dict(self) -> dict[str, Any]:
        own = {"iteration": self.step_count, "kl_coef": self.kl_coef, "is_exact": int(self.is_exact)}
        return super().state_dict() | own

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.step_count, self.kl_coef = state["iteration"], state["kl_coef"]
        self.is_exact = bool(state.get("is_exact", 1))  # older checkpoints have none
        self.steps, updates = self._count_steps()
        for optimizer in self.optimizers.values():
            optimizer.total_steps = optimizer.steps + updates


def adapt_kl_coef(kl_coef: float, kl: float, responses: int, target: float) -> float:
    """Proportional controller in log space (arXiv 1909.08593, section 2.2).

    Args:
        kl, target: nats a response.
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return kl_coef * (1.0 + error * responses / KL_HORIZON)


def say_exactness(log: RunLog, policy: Model, engine: Engine) -> None:
    """Says whether the sampler's log-probs are the trainer's. On a CPU, where they never are, nothing is said."""
    if policy.device.type != "cpu":
        otherwise = "" if engine.exactness.holds else "; old log-probs are compared or recomputed in every rollout"
        log.say(f"policy: {engine.exactness}{otherwise}")


def not_exact(kl: float) -> Finding:
    """A ratio that is not exactly 1 at an iteration's first step, though the sampler's log-probs passed for exact.

    Args:
        kl: `FIRST_STEP_KL`, nats a token.
    """
    return Finding(
        "sampler_is_not_exact",
        f"the sampler's log-probs were not the trainer's to the bit: approx_kl of the first step was {kl:.2g} instead of 0; "
        "from now on they are compared in every rollout",
        "nothing is wrong while mismatch_k3 is small; please report the GPU and the model",
    )


SHOWN = (SCORE, DPO_REWARD, KL, LENGTH, CLIP_FRACTION, TOKENS_PER_SECOND)  # on the live line


def train_rto(
    session: TrainingSession, models: Models, evaluate: Callable[[Models, Engine, int], object] | None = None
) -> str:
    """Trains the policy and the critic and saves them; returns the policy's directory.

    Args:
        models: From `load_models`.
        evaluate: Is called with the models, the policy's engine and the iteration, every `eval.every` iterations.
    """
    config, log, prompts, budget = session.config, session.log, session.data.prompts, session.budget("rto")
    if config.dpo.model:
        check_dpo_model(session, models)
    trainer = RTOTrainer(config, models, session.tokenizer, session.sampling, prompts, session.device, log, budget)
    rollout = int(min(config.rto.prompts_per_rollout, trainer.order.remaining))
    if len(prompts) < rollout:
        log.say(f"rto: {len(prompts)} prompts fill a rollout of {rollout} more than once")

    def evaluate_policy(iteration: int) -> None:
        if evaluate and config.eval.every and iteration % config.eval.every == 0:
            evaluate(models, trainer.engine, iteration)

    train("rto", trainer, session.checkpoints, SHOWN, after_step=Health(config, log).check, evaluate=evaluate_policy)
    if models.critic is not None:
        save_model(models.critic, session.tokenizer, session.folder / "rto_critic", session.stop_ids)
    path = save_model(models.policy, session.tokenizer, session.folder / "rto", session.stop_ids)
    trainer.release()
    return path
