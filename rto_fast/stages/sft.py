"""Stage 1: supervised fine-tuning, packed, loss on the response only (by default)."""

from rto_fast.batch import micro_batches, pack
from rto_fast.models.loading import causal_logps, load_causal_lm
from rto_fast.stages.common import save_model
from rto_fast.training.optimizer import Optimizer
from rto_fast.training.order import ShuffledIndices, steps_in


def main(config, base, tokenizer, sequences, *, output, log, **placement):
    """Trains `base` (a directory) on `sequences` (prompt_ids, response_ids) and returns the directory of the result."""
    stage = config.sft
    model = load_causal_lm(
        base, trainable=True, gradient_checkpointing=config.model.gradient_checkpointing, **placement
    )  # fmt: skip
    steps = steps_in(stage, len(sequences))
    optimizer = Optimizer(model, stage, steps)
    order = ShuffledIndices(len(sequences), config.seed)
    with log.stage("sft", steps) as progress:
        for _ in range(steps):
            chosen = [sequences[i] for i in order.take(stage.batch_size)]
            counts = [len(s.response_ids) + stage.loss_on_prompt * (len(s.prompt_ids) - 1) for s in chosen]
            total, loss = sum(counts), 0.0
            lengths = [len(s.prompt_ids) + len(s.response_ids) for s in chosen]
            for run in micro_batches(lengths, stage.micro_batch_tokens):
                batch = pack(
                    [chosen[i].prompt_ids for i in run], [chosen[i].response_ids for i in run], placement["device"],
                    loss_on_prompt=stage.loss_on_prompt,
                )  # fmt: skip
                # The mean over the tokens of the whole step, whatever the micro-batches.
                part = -causal_logps(model, batch).sum() / total
                part.backward()
                loss += part.detach()
            progress.step({"loss": loss, "tokens": sum(lengths)} | optimizer.step(), show=("loss", "lr"))
    return save_model(model, tokenizer, output)
