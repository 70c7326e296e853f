"""Stage 2: the Bradley-Terry reward model, and its score statistics."""

from collections.abc import Sequence

from torch import Tensor

from rto_fast.batch import pack_whole
from rto_fast.data.tokenizing import Pair
from rto_fast.losses import bradley_terry
from rto_fast.models.forward import token_scores
from rto_fast.reporting.metric_names import (
    ACCURACY,
    HELD_OUT_ACCURACY,
    LOSS,
    LR,
    SCORE_STD,
    TOKENS_PER_SECOND,
    TRAINING_ACCURACY,
)
from rto_fast.rewards import score_sequences, score_statistics
from rto_fast.session import TrainingSession
from rto_fast.training.loader import Loader
from rto_fast.training.loop import train
from rto_fast.training.order import fingerprint
from rto_fast.training.saving import save_model
from rto_fast.training.supervised import SupervisedTrainer


def _sides(pairs: Sequence[Pair]) -> list[list[int]]:
    """Prompts with their responses: all chosen, then all rejected."""
    return [p.prompt_ids + p.chosen_ids for p in pairs] + [p.prompt_ids + p.rejected_ids for p in pairs]


def train_reward_model(session: TrainingSession, sft: str) -> str:
    """Trains a reward model on the backbone of `sft` (directory or hub id); returns the directory of the result.

    The mean and standard deviation of its scores over the held-out pairs (chosen and rejected; over the training pairs if
    none are held out) are stored in its config.json as `score_mean` and `score_std`.
    """
    config, log, pairs, held_out = session.config, session.log, session.data.pairs, session.data.held_out_pairs
    stage = config.reward_model
    model = Loader(config, session.placement).trained("scorer", sft, new_head=True)

    def loss(rows: list[int], step_items: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
        batch = pack_whole(_sides([pairs[i] for i in rows]), session.device)
        chosen, rejected = model.forward(token_scores, batch)[batch.last].chunk(2)
        share = 1.0 / len(step_items)
        return share * bradley_terry(chosen, rejected).sum(), {ACCURACY: share * (chosen > rejected).sum()}

    trainer = SupervisedTrainer(model, stage, [p.num_tokens for p in pairs], loss, config, log.say, fingerprint(pairs))
    shown = (LOSS, ACCURACY, LR, TOKENS_PER_SECOND)
    train("reward_model", trainer, session.checkpoints, shown)
    model.module.eval()
    metric, kind, measured = TRAINING_ACCURACY, "training", pairs
    if held_out:
        metric, kind, measured = HELD_OUT_ACCURACY, "held-out", held_out
    scores = score_sequences(model, _sides(measured), config.model.micro_batch_tokens)
    chosen, rejected = scores.chunk(2)
    model.scores = statistics = score_statistics(scores)
    accuracy = (chosen > rejected).float().mean().item()
    log.metrics("reward_model", trainer.steps, {metric: accuracy, SCORE_STD: statistics.std})
    log.say(f"reward model: {100 * accuracy:.1f} % of {len(measured)} {kind} pairs ranked right")
    path = save_model(model, session.tokenizer, session.folder / "reward_model", session.stop_ids)
    trainer.release()
    return path
