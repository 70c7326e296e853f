"""The stages before RTO: supervised fine-tuning, the Bradley-Terry reward model, and DPO.

Each trains a model from a directory or hub id and returns the directory of the result. DPO's policy is the source of RTO's
token rewards.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rto_fast.batch import segment_sum
from rto_fast.config import Config, SupervisedConfig
from rto_fast.data.tokenizing import Pair
from rto_fast.estimates import rate, wins
from rto_fast.models.forward import causal_logps
from rto_fast.models.model import Model
from rto_fast.reporting.log import Finding
from rto_fast.reporting.metric_names import (
    ACCURACY,
    HELD_OUT_ACCURACY,
    IMBALANCE,
    LOSS,
    LR,
    MARGIN,
    SCORE_STD,
    TOKENS,
    TOKENS_PER_SECOND,
    TRAINING_ACCURACY,
)
from rto_fast.rewards import score_sequences, score_statistics
from rto_fast.session import TrainingSession
from rto_fast.system.progress import progress
from rto_fast.training import ranks
from rto_fast.training.accumulate import Accumulator
from rto_fast.training.checkpoint import Trainer
from rto_fast.training.loader import Loader
from rto_fast.training.loop import train
from rto_fast.training.optimizer import count_steps, stage_steps
from rto_fast.training.order import ShuffledIndices
from rto_fast.training.ranks import map_items
from rto_fast.training.saving import save_model
from rto_fast.training.supervised import (
    dpo_batch,
    dpo_loss,
    packed_sides,
    reward_batch,
    reward_loss,
    text_batch,
    text_loss,
    whole_sides,
)
from rto_fast.training.zero import build_optimizer

CHECKED_PAIRS = 64  # of a supplied DPO model: enough to tell a model that is wrong from one that is right


class SupervisedTrainer(Trainer):
    """Trains a model on a fixed list of items. Each epoch visits all of them, so the last step may have fewer items.

    Args:
        order: in which the items are visited.
        lengths: the tokens of each item.
        work: is called with the numbers of the items in a micro-batch and in its whole optimizer step; returns what
            `Model.learn` takes: the loss and the inputs. Losses and metrics add up to those of the step.
        tokens, say: see `Accumulator`.
    """

    def __init__(
        self,
        model: Model,
        stage: SupervisedConfig,
        order: ShuffledIndices,
        lengths: Sequence[int],
        work: Callable[[list[int], list[int]], tuple[Any, ...]],
        config: Config,
        tokens: int,
        say: Callable[[str], object],
    ):
        self.model, self.stage, self.lengths, self.work = model, stage, lengths, work
        self.steps = stage_steps(stage, len(lengths))
        self.optimizer = build_optimizer(model, stage, self.steps, config)
        self.optimizers = {"optimizer": self.optimizer}
        self.order = order
        self.accumulator = Accumulator(tokens, say)

    @property
    def step_count(self) -> int:
        return self.optimizer.steps

    def step(self) -> dict[str, Any]:
        """Takes one optimizer step and returns its metrics."""
        items = self.order.take(self.stage.batch_size)
        step = self.accumulator.step(items, self.lengths, [self.optimizer])
        for rows, factor in step:
            with step:
                work = self.work(rows, items)
                step.add(self.model.learn(*work, backward=self.optimizer.backward, factor=factor))
        lengths = [self.lengths[i] for i in items]
        balance = {IMBALANCE: ranks.imbalance(lengths)} if ranks.world_size() > 1 else {}
        return step.metrics() | {TOKENS: sum(lengths)} | balance | self.optimizer.step()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a state. Data, batch size and epochs may differ from the state's: the stage ends when what is left is
        visited."""
        super().load_state_dict(state)
        left = count_steps(self.order.remaining, self.stage.batch_size)
        if self.stage.max_steps is not None:
            left = min(left, max(0, self.stage.max_steps - self.step_count))
        self.steps = self.step_count + left
        self.optimizer.total_steps = self.steps


def _save(session: TrainingSession, name: str, trainer: SupervisedTrainer) -> str:
    """Writes the trained model to the run's folder `name` and gives back the trainer's memory; returns the folder."""
    path = save_model(trainer.model, session.tokenizer, session.folder / name, session.stop_ids)
    trainer.release()
    return path


def train_sft(session: TrainingSession, base: str) -> str:
    """Trains the model at `base` (directory or hub id) on `data.sft`; returns the directory of the result."""
    config, sequences = session.config, session.data.sft
    stage = config.sft
    model = Loader(config, session.placement).trained("causal_lm", base)

    def work(rows: list[int], step_items: list[int]) -> tuple[Any, ...]:
        step = [sequences[i] for i in step_items]
        total = sum(len(s.response_ids) + stage.loss_on_prompt * (len(s.prompt_ids) - 1) for s in step)
        return text_loss, text_batch([sequences[i] for i in rows], total, stage.loss_on_prompt, session.device)

    lengths = [len(s.prompt_ids) + len(s.response_ids) for s in sequences]
    order = ShuffledIndices.of(sequences, config.seed, stage.epochs)
    tokens = session.budget("sft").training
    trainer = SupervisedTrainer(model, stage, order, lengths, work, config, tokens, session.log.say)
    train("sft", trainer, session.checkpoints, show=(LOSS, LR, TOKENS_PER_SECOND))
    return _save(session, "sft", trainer)


def train_reward_model(session: TrainingSession, sft: str) -> str:
    """Trains a reward model on the backbone of `sft` (directory or hub id); returns the directory of the result.

    The mean and standard deviation of its scores over the held-out pairs (chosen and rejected; over the training pairs if
    none are held out) are stored in its config.json as `score_mean` and `score_std`.
    """
    config, log, pairs, held_out = session.config, session.log, session.data.pairs, session.data.held_out_pairs
    stage, budget = config.reward_model, session.budget("reward_model")
    model = Loader(config, session.placement).trained("scorer", sft, new_head=True)

    def work(rows: list[int], step_items: list[int]) -> tuple[Any, ...]:
        return reward_loss, reward_batch([pairs[i] for i in rows], len(step_items), session.device)

    order, lengths = ShuffledIndices.of(pairs, config.seed, stage.epochs), [p.num_tokens for p in pairs]
    trainer = SupervisedTrainer(model, stage, order, lengths, work, config, budget.training, log.say)
    train("reward_model", trainer, session.checkpoints, show=(LOSS, ACCURACY, LR, TOKENS_PER_SECOND))
    model.module.eval()
    metric, kind, measured = TRAINING_ACCURACY, "training", pairs
    if held_out:
        metric, kind, measured = HELD_OUT_ACCURACY, "held-out", held_out
    scores = score_sequences(model, whole_sides(measured), budget.scoring)
    chosen, rejected = scores.chunk(2)
    model.scores = statistics = score_statistics(scores)
    accuracy = (chosen > rejected).float().mean().item()
    log.metrics("reward_model", trainer.steps, {metric: accuracy, SCORE_STD: statistics.std})
    log.say(f"reward model: {100 * accuracy:.1f} % of {len(measured)} {kind} pairs ranked right")
    return _save(session, "reward_model", trainer)


@torch.no_grad()
def pair_logps(model: Model, pairs: Sequence[Pair], max_tokens: int) -> Tensor:
    """Summed log-probs of chosen and rejected responses, [len(pairs), 2] float32 on the CPU, `max_tokens` at a time."""

    def logps(rows: list[int]) -> Tensor:
        batch = packed_sides([pairs[i] for i in rows], model.device)
        return segment_sum(model.forward(causal_logps, batch), batch.cu_seqlens).view(2, -1).t()

    return map_items(logps, [p.num_tokens for p in pairs], [1] * len(pairs), max_tokens).cpu()


def train_dpo(session: TrainingSession, sft: str) -> str:
    """Trains the model at `sft` (directory or hub id), which is also the reference; returns the directory of the result."""
    config, log, pairs, held_out = session.config, session.log, session.data.pairs, session.data.held_out_pairs
    stage, budget = config.dpo, session.budget("dpo")
    model = Loader(config, session.placement).trained("causal_lm", sft)
    # The reference is the model before its first step: no second copy, and each pair is scored once.
    order = ShuffledIndices.of(pairs, config.seed, stage.epochs)
    visited = order.first(None if stage.max_steps is None else stage.max_steps * stage.batch_size)
    # A resumed stage may have come further than its present batch size says, so it scores all pairs. The others come last:
    # the passes over the first ones are those of a run that was not resumed.
    others = sorted(set(order.first(None)).difference(visited)) if config.resume else []
    log.say(f"dpo: reference log-probs of {len(visited) + len(others) + len(held_out):,} pairs")
    with progress("dpo: reference log-probs"):
        reference = torch.full((len(pairs), 2), torch.nan)  # a step that came to another pair would stop
        for part in filter(None, (visited, others)):
            reference[part] = pair_logps(model, [pairs[i] for i in part], budget.scoring)
        held_out_reference = pair_logps(model, held_out, budget.scoring) if held_out else None

    def work(rows: list[int], step_items: list[int]) -> tuple[Any, ...]:
        inputs = dpo_batch([pairs[i] for i in rows], reference[rows], len(step_items), session.device)
        return dpo_loss, inputs, stage

    lengths = [p.num_tokens for p in pairs]
    trainer = SupervisedTrainer(model, stage, order, lengths, work, config, budget.training, log.say)
    train("dpo", trainer, session.checkpoints, show=(LOSS, ACCURACY, MARGIN, LR, TOKENS_PER_SECOND))
    model.module.eval()
    if held_out_reference is not None:
        with progress("dpo: held-out pairs"):
            change = pair_logps(model, held_out, budget.scoring) - held_out_reference
        accuracy = (change[:, 0] > change[:, 1]).float().mean().item()
        log.metrics("dpo", trainer.steps, {HELD_OUT_ACCURACY: accuracy})
        log.say(f"dpo: implicit reward ranks {100 * accuracy:.1f} % of {len(held_out)} held-out pairs right")
        if finding := preference_finding(change, supplied=False):
            log.warning("dpo", trainer.steps, *finding)
    return _save(session, "dpo", trainer)


def preference_finding(change: Tensor, supplied: bool) -> Finding | None:
    """Judges whether a DPO model's implicit reward ranks preference pairs as people did.

    Args:
        change: [N, 2] log π_dpo/π_ref of the chosen and the rejected responses, nats.
        supplied: the model is `dpo.model`; else it was trained here.
    """
    accuracy = rate(wins(change[:, 0], change[:, 1]))
    measured = (
        f"the DPO model ranks {accuracy.value:.0%} of {accuracy.count} held-out pairs right "
        f"(95 % interval {accuracy.low:.0%} to {accuracy.high:.0%})"
    )
    cause = (
        "dpo.ref_model must be what dpo.model was trained from" if supplied else "dpo.lr or dpo.epochs may be too low"
    )
    remedy = (
        "see that chosen and rejected are the right way round (python -m rto_fast.data shows them); "
        f"{cause}; rto.dpo_reward_scale: 0 does without it"
    )
    if accuracy.high < 0.5:
        return Finding("dense_reward_is_inverted", f"the dense reward points the wrong way: {measured}", remedy)
    # Of few pairs every model might be a coin; people agree with each other on two thirds to three quarters.
    if accuracy.count >= CHECKED_PAIRS // 2 and accuracy.low < 0.5 and accuracy.value < 0.55:
        return Finding("dense_reward_is_noise", f"the dense reward may be noise: {measured}", remedy)
    return None
