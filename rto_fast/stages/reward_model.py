"""Stage 2: the Bradley-Terry reward model, and its score statistics."""

import torch

from rto_fast.batch import micro_batches, pack_whole
from rto_fast.losses import bradley_terry
from rto_fast.models.loading import load_scorer, token_scores
from rto_fast.rewards import score_sequences, score_statistics
from rto_fast.stages.common import save_model
from rto_fast.training.optimizer import Optimizer
from rto_fast.training.order import ShuffledIndices, steps_in


def _sides(pairs):
    """Whole sequences: all chosen, then all rejected."""
    return [p.prompt_ids + p.chosen_ids for p in pairs] + [p.prompt_ids + p.rejected_ids for p in pairs]


def preference_scores(model, pairs, max_tokens):
    """(chosen [N], rejected [N]) scores of pairs."""
    return score_sequences(model, _sides(pairs), max_tokens).chunk(2)


def main(config, base, tokenizer, pairs, held_out, *, output, log, **placement):
    """Trains a reward model on the backbone of `base` (a directory) and returns the directory of the result.

    The mean and standard deviation of its scores over `held_out` (chosen and rejected) are stored in its config.json as
    `score_mean` and `score_std`.
    """
    stage = config.reward_model
    model = load_scorer(
        base, trainable=True, gradient_checkpointing=config.model.gradient_checkpointing, **placement
    )  # fmt: skip
    steps = steps_in(stage, len(pairs))
    optimizer = Optimizer(model, stage, steps)
    order = ShuffledIndices(len(pairs), config.seed)
    with log.stage("reward_model", steps) as progress:
        for _ in range(steps):
            chosen = [pairs[i] for i in order.take(stage.batch_size)]
            lengths = [2 * len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for p in chosen]
            loss = correct = 0.0
            for run in micro_batches(lengths, stage.micro_batch_tokens):
                batch = pack_whole(_sides([chosen[i] for i in run]), placement["device"])
                better, worse = token_scores(model, batch)[batch.last].chunk(2)
                part = bradley_terry(better, worse).sum() / len(chosen)
                part.backward()
                loss += part.detach()
                correct += (better > worse).sum() / len(chosen)
            values = {"loss": loss, "accuracy": correct, "tokens": sum(lengths)} | optimizer.step()
            progress.step(values, show=("loss", "accuracy", "lr"))
    model.eval()
    measured = held_out or pairs
    better, worse = preference_scores(model, measured, stage.micro_batch_tokens)
    model.config.score_mean, model.config.score_std = score_statistics(torch.cat([better, worse]))
    accuracy = (better > worse).float().mean().item()
    log.metrics("reward_model", steps, {"held_out_accuracy": accuracy, "score_std": model.config.score_std})
    log.say(f"reward model: {100 * accuracy:.1f} % of {len(measured)} held-out pairs ranked right")
    return save_model(model, tokenizer, output)
