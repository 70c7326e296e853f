"""Stage 2: the Bradley-Terry reward model, and its score statistics."""

from rto_fast.batch import pack_whole
from rto_fast.losses import bradley_terry
from rto_fast.models.loading import token_scores
from rto_fast.rewards import score_sequences, score_statistics
from rto_fast.session import TrainingSession
from rto_fast.training.loader import Loader
from rto_fast.training.loop import train
from rto_fast.training.order import fingerprint
from rto_fast.training.saving import save_model
from rto_fast.training.supervised import SupervisedTrainer


def _sides(pairs):
    """Whole sequences: all chosen, then all rejected."""
    return [p.prompt_ids + p.chosen_ids for p in pairs] + [p.prompt_ids + p.rejected_ids for p in pairs]


def train_reward_model(session: TrainingSession, sft: str) -> str:
    """Trains a reward model on the backbone of `sft` (directory or hub id); returns the directory of the result.

    The mean and standard deviation of its scores over the held-out pairs (chosen and rejected; over the training pairs if
    none are held out) are stored in its config.json as `score_mean` and `score_std`.
    """
    config, log, pairs, held_out = session.config, session.log, session.data.pairs, session.data.held_out_pairs
    stage = config.reward_model
    model = Loader(config, session.placement).trained("scorer", sft, new_head=True)

    def loss(indices, step_indices):
        batch = pack_whole(_sides([pairs[i] for i in indices]), session.device)
        better, worse = token_scores(model, batch)[batch.last].chunk(2)
        share = 1.0 / len(step_indices)
        return share * bradley_terry(better, worse).sum(), {"accuracy": share * (better > worse).sum()}

    trainer = SupervisedTrainer(model, stage, [p.num_tokens for p in pairs], loss, config, log.say, fingerprint(pairs))
    train(
        "reward_model",
        trainer,
        log,
        session.checkpoints,
        stage.save_every,
        ("loss", "accuracy", "lr", "tokens_per_second"),
    )
    model.eval()
    name, measured = ("held_out", held_out) if held_out else ("training", pairs)
    scores = score_sequences(model, _sides(measured), stage.micro_batch_tokens)
    better, worse = scores.chunk(2)
    model.config.score_mean, model.config.score_std = score_statistics(scores)
    accuracy = (better > worse).float().mean().item()
    log.metrics("reward_model", trainer.steps, {f"{name}_accuracy": accuracy, "score_std": model.config.score_std})
    log.say(f"reward model: {100 * accuracy:.1f} % of {len(measured)} {name.replace('_', '-')} pairs ranked right")
    path = save_model(model, session.tokenizer, session.folder / "reward_model", session.stop_ids)
    trainer.release()
    return path
