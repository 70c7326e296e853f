"""Stage 3: direct preference optimisation. Its policy is the source of RTO's token rewards."""

import torch

from rto_fast.batch import pack, segment_sum
from rto_fast.estimates import rate, wins
from rto_fast.losses import dpo
from rto_fast.models.loading import causal_logps
from rto_fast.models.placement import device_of
from rto_fast.reporting.log import Finding
from rto_fast.session import TrainingSession
from rto_fast.system.progress import progress
from rto_fast.training.loader import Loader
from rto_fast.training.loop import train
from rto_fast.training.order import fingerprint
from rto_fast.training.ranks import map_items
from rto_fast.training.saving import save_model
from rto_fast.training.supervised import SupervisedTrainer

CHECKED_PAIRS = 64  # of a supplied DPO model: enough to tell a model that is wrong from one that is right


def _side_logps(model, pairs):
    """(chosen [N], rejected [N]): summed response log-probs, EOS included."""
    prompts, device = [p.prompt_ids for p in pairs], device_of(model)
    batch = pack(prompts + prompts, [p.chosen_ids for p in pairs] + [p.rejected_ids for p in pairs], device)
    return segment_sum(causal_logps(model, batch), batch.cu_seqlens).chunk(2)


@torch.no_grad()
def pair_logps(model, pairs, max_tokens):
    """[len(pairs), 2] float32 on the CPU: summed log-probs of chosen and rejected."""

    def logps(run):
        return torch.stack(_side_logps(model, [pairs[i] for i in run]), 1).cpu()

    return map_items(logps, [p.num_tokens for p in pairs], [1] * len(pairs), max_tokens)


def train_dpo(session: TrainingSession, sft: str) -> str:
    """Trains the model at `sft` (directory or hub id), which is also the reference; returns the directory of the result."""
    config, log, pairs, held_out = session.config, session.log, session.data.pairs, session.data.held_out_pairs
    stage = config.dpo
    model = Loader(config, session.placement).trained("causal_lm", sft)
    # The reference is the model before its first step: no second copy, each pair scored once.
    log.say(f"dpo: reference log-probs of {len(pairs) + len(held_out):,} pairs")
    with progress("dpo: reference log-probs"):
        reference = pair_logps(model, pairs, stage.micro_batch_tokens)
        held_out_reference = pair_logps(model, held_out, stage.micro_batch_tokens) if held_out else None

    def loss(indices, step_indices):
        before = reference[indices].to(session.device)
        better, worse = _side_logps(model, [pairs[i] for i in indices])
        better, worse = better - before[:, 0], worse - before[:, 1]
        share = 1.0 / len(step_indices)
        losses = dpo(better, worse, beta=stage.beta, loss=stage.loss, label_smoothing=stage.label_smoothing)
        margin = stage.beta * (better - worse).detach()
        return share * losses.sum(), {"accuracy": share * (margin > 0).sum(), "margin": share * margin.sum()}

    trainer = SupervisedTrainer(model, stage, [p.num_tokens for p in pairs], loss, config, log.say, fingerprint(pairs))
    train(
        "dpo",
        trainer,
        log,
        session.checkpoints,
        stage.save_every,
        ("loss", "accuracy", "margin", "lr", "tokens_per_second"),
    )
    model.eval()
    if held_out:
        with progress("dpo: held-out pairs"):
            change = pair_logps(model, held_out, stage.micro_batch_tokens) - held_out_reference
        accuracy = (change[:, 0] > change[:, 1]).float().mean().item()
        log.metrics("dpo", trainer.steps, {"held_out_accuracy": accuracy})
        log.say(f"dpo: implicit reward ranks {100 * accuracy:.1f} % of {len(held_out)} held-out pairs right")
        if finding := preference_finding(change, supplied=False):
            log.warning("dpo", trainer.steps, *finding)
    path = save_model(model, session.tokenizer, session.folder / "dpo", session.stop_ids)
    trainer.release()
    return path


def preference_finding(change: torch.Tensor, supplied: bool) -> Finding | None:
    """Whether a DPO model's implicit reward ranks preference pairs as people did.

    Args:
        change: [N, 2] log π_dpo/π_ref of chosen and rejected. supplied: as `dpo.model`, else trained here.
    """
    accuracy = rate(wins(change[:, 0], change[:, 1]))
    told = (
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
        return Finding("dense_reward_is_inverted", f"the dense reward points the wrong way: {told}", remedy)
    # Of few pairs every model might be a coin; people agree with each other on two thirds to three quarters.
    if accuracy.count >= CHECKED_PAIRS // 2 and accuracy.low < 0.5 and accuracy.value < 0.55:
        return Finding("dense_reward_is_noise", f"the dense reward may be noise: {told}", remedy)
    return None
