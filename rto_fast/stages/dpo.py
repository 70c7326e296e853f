"""Stage 3: direct preference optimisation. Its policy is the source of RTO's token rewards."""

import torch

from rto_fast.batch import micro_batches, pack, segment_sum
from rto_fast.losses import dpo
from rto_fast.models.loading import causal_logps, load_causal_lm
from rto_fast.stages.common import save_model
from rto_fast.training.optimizer import Optimizer
from rto_fast.training.order import ShuffledIndices, steps_in


def _sides(pairs, device):
    """One packed batch: all chosen, then all rejected."""
    prompts = [p.prompt_ids for p in pairs]
    return pack(prompts + prompts, [p.chosen_ids for p in pairs] + [p.rejected_ids for p in pairs], device)


def _pair_tokens(pair):
    return 2 * len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids)


def _side_logps(model, batch):
    """(chosen [N], rejected [N]): summed response log-probs, EOS included."""
    return segment_sum(causal_logps(model, batch), batch.cu_seqlens).chunk(2)


@torch.no_grad()
def pair_logps(model, pairs, max_tokens):
    """[len(pairs), 2] float32: summed log-probs of chosen and rejected."""
    device = next(model.parameters()).device
    runs = micro_batches([_pair_tokens(p) for p in pairs], max_tokens)
    return torch.cat([torch.stack(_side_logps(model, _sides([pairs[i] for i in run], device)), 1) for run in runs])


def main(config, base, tokenizer, pairs, held_out, *, output, log, **placement):
    """Trains `base` (a directory), which is also the reference, and returns the directory of the result."""
    stage = config.dpo
    model = load_causal_lm(
        base, trainable=True, gradient_checkpointing=config.model.gradient_checkpointing, **placement
    )  # fmt: skip
    # The reference is the model before its first step: no second copy, each pair scored once.
    log.say(f"dpo: reference log-probs of {len(pairs) + len(held_out):,} pairs")
    reference = pair_logps(model, pairs, stage.micro_batch_tokens)
    held_out_reference = pair_logps(model, held_out, stage.micro_batch_tokens) if held_out else None
    steps = steps_in(stage, len(pairs))
    optimizer = Optimizer(model, stage, steps)
    order = ShuffledIndices(len(pairs), config.seed)
    with log.stage("dpo", steps) as progress:
        for _ in range(steps):
            indices = order.take(stage.batch_size)
            lengths = [_pair_tokens(pairs[i]) for i in indices]
            loss = correct = margin = 0.0
            for run in micro_batches(lengths, stage.micro_batch_tokens):
                chosen = [indices[i] for i in run]
                better, worse = _side_logps(model, _sides([pairs[i] for i in chosen], placement["device"]))
                better, worse = better - reference[chosen, 0], worse - reference[chosen, 1]
                part = dpo(
                    better, worse, beta=stage.beta, loss=stage.loss, label_smoothing=stage.label_smoothing
                ).sum() / len(indices)  # fmt: skip
                part.backward()
                loss += part.detach()
                correct += (better > worse).sum() / len(indices)
                margin += stage.beta * (better - worse).detach().sum() / len(indices)
            values = {"loss": loss, "accuracy": correct, "margin": margin, "tokens": sum(lengths)} | optimizer.step()
            progress.step(values, show=("loss", "accuracy", "margin", "lr"))
    model.eval()
    if held_out:
        change = pair_logps(model, held_out, stage.micro_batch_tokens) - held_out_reference
        accuracy = (change[:, 0] > change[:, 1]).float().mean().item()
        log.metrics("dpo", steps, {"held_out_accuracy": accuracy})
        log.say(f"dpo: implicit reward ranks {100 * accuracy:.1f} % of {len(held_out)} held-out pairs right")
    return save_model(model, tokenizer, output)
