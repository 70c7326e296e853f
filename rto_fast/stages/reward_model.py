"""Stage 2: the Bradley-Terry reward model, and its score statistics."""

from rto_fast.batch import pack_whole
from rto_fast.losses import bradley_terry
from rto_fast.models.loading import token_scores
from rto_fast.rewards import score_sequences, score_statistics
from rto_fast.training.loader import Loader
from rto_fast.training.loop import train
from rto_fast.training.order import fingerprint
from rto_fast.training.saving import save_model
from rto_fast.training.supervised import SupervisedTrainer


def _sides(pairs):
    """Whole sequences: all chosen, then all rejected."""
    return [p.prompt_ids + p.chosen_ids for p in pairs] + [p.prompt_ids + p.rejected_ids for p in pairs]


def main(config, base, tokenizer, pairs, held_out, *, output, log, checkpoints, stop_ids=None, **placement):
    """Trains a reward model on the backbone of `base` (a directory) and returns the directory of the result.

    The mean and standard deviation of its scores over `held_out` (chosen and rejected; over `pairs` if there are none) are
    stored in its config.json as `score_mean` and `score_std`.
    """
    stage = config.reward_model
    model = Loader(config, placement).trained("scorer", base, new_head=True)

    def loss(indices, step_indices):
        batch = pack_whole(_sides([pairs[i] for i in indices]), placement["device"])
        better, worse = model.forward(token_scores, batch)[batch.last].chunk(2)
        share = 1.0 / len(step_indices)
        return share * bradley_terry(better, worse).sum(), {"accuracy": share * (better > worse).sum()}

    trainer = SupervisedTrainer(model, stage, [p.num_tokens for p in pairs], loss, config, log.say, fingerprint(pairs))
    train("reward_model", trainer, log, checkpoints, stage.save_every, ("loss", "accuracy", "lr", "tokens_per_second"))
    model.module.eval()
    name, measured = ("held_out", held_out) if held_out else ("training", pairs)
    scores = score_sequences(model, _sides(measured), stage.micro_batch_tokens)
    better, worse = scores.chunk(2)
    model.scores = statistics = score_statistics(scores)
    accuracy = (better > worse).float().mean().item()
    log.metrics("reward_model", trainer.steps, {f"{name}_accuracy": accuracy, "score_std": statistics.std})
    log.say(f"reward model: {100 * accuracy:.1f} % of {len(measured)} {name.replace('_', '-')} pairs ranked right")
    path = save_model(model, tokenizer, output, stop_ids)
    trainer.release()
    return path
