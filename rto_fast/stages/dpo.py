"""Stage 3: direct preference optimisation. Its policy is the source of RTO's token rewards."""

import torch

from rto_fast.batch import pack, segment_sum
from rto_fast.losses import dpo
from rto_fast.models.loading import causal_logps
from rto_fast.rto.first_update import preference_finding
from rto_fast.system.progress import progress
from rto_fast.training.loader import Loader
from rto_fast.training.loop import train
from rto_fast.training.order import fingerprint
from rto_fast.training.ranks import map_items
from rto_fast.training.saving import save_model
from rto_fast.training.supervised import SupervisedTrainer


def _side_logps(model, pairs):
    """(chosen [N], rejected [N]): summed response log-probs, EOS included."""
    prompts = [p.prompt_ids for p in pairs]
    batch = pack(prompts + prompts, [p.chosen_ids for p in pairs] + [p.rejected_ids for p in pairs], model.device)
    return segment_sum(model.forward(causal_logps, batch), batch.cu_seqlens).chunk(2)


@torch.no_grad()
def pair_logps(model, pairs, max_tokens):
    """[len(pairs), 2] float32 on the CPU: summed log-probs of chosen and rejected."""

    def logps(run):
        return torch.stack(_side_logps(model, [pairs[i] for i in run]), 1).cpu()

    return map_items(logps, [p.num_tokens for p in pairs], [1] * len(pairs), max_tokens)


def main(config, base, tokenizer, pairs, held_out, *, output, log, checkpoints, stop_ids=None, **placement):
    """Trains `base` (a directory), which is also the reference, and returns the directory of the result."""
    stage = config.dpo
    model = Loader(config, placement).trained("causal_lm", base)
    # The reference is the model before its first step: no second copy, each pair scored once.
    log.say(f"dpo: reference log-probs of {len(pairs) + len(held_out):,} pairs")
    with progress("dpo: reference log-probs"):
        reference = pair_logps(model, pairs, stage.micro_batch_tokens)
        held_out_reference = pair_logps(model, held_out, stage.micro_batch_tokens) if held_out else None

    def loss(indices, step_indices):
        before = reference[indices].to(placement["device"])
        better, worse = _side_logps(model, [pairs[i] for i in indices])
        better, worse = better - before[:, 0], worse - before[:, 1]
        share = 1.0 / len(step_indices)
        losses = dpo(better, worse, beta=stage.beta, loss=stage.loss, label_smoothing=stage.label_smoothing)
        margin = stage.beta * (better - worse).detach()
        return share * losses.sum(), {"accuracy": share * (margin > 0).sum(), "margin": share * margin.sum()}

    trainer = SupervisedTrainer(model, stage, [p.num_tokens for p in pairs], loss, config, log.say, fingerprint(pairs))
    train("dpo", trainer, log, checkpoints, stage.save_every, ("loss", "accuracy", "margin", "lr", "tokens_per_second"))
    model.module.eval()
    if held_out:
        with progress("dpo: held-out pairs"):
            change = pair_logps(model, held_out, stage.micro_batch_tokens) - held_out_reference
        accuracy = (change[:, 0] > change[:, 1]).float().mean().item()
        log.metrics("dpo", trainer.steps, {"held_out_accuracy": accuracy})
        log.say(f"dpo: implicit reward ranks {100 * accuracy:.1f} % of {len(held_out)} held-out pairs right")
        if finding := preference_finding(change, supplied=False):
            log.warning("dpo", trainer.steps, *finding)
    path = save_model(model, tokenizer, output, stop_ids)
    trainer.release()
    return path
