"""Stage 1: supervised fine-tuning, packed, loss on the response only (by default)."""

from rto_fast.batch import pack
from rto_fast.models.loading import causal_logps
from rto_fast.training.loader import Loader
from rto_fast.training.loop import train
from rto_fast.training.order import fingerprint
from rto_fast.training.saving import save_model
from rto_fast.training.supervised import SupervisedTrainer


def main(config, base, tokenizer, sequences, *, output, log, checkpoints, stop_ids=None, **placement):
    """Trains `base` (a directory) on `sequences` (prompt_ids, response_ids) and returns the directory of the result."""
    stage = config.sft
    model = Loader(config, placement).trained("causal_lm", base)

    def loss(indices, step_indices):
        """The mean over the step's labelled tokens, whatever its micro-batches."""
        prompts, responses = zip(*((sequences[i].prompt_ids, sequences[i].response_ids) for i in indices))
        batch = pack(prompts, responses, placement["device"], loss_on_prompt=stage.loss_on_prompt)
        step = [sequences[i] for i in step_indices]
        total = sum(len(s.response_ids) + stage.loss_on_prompt * (len(s.prompt_ids) - 1) for s in step)
        return -model.forward(causal_logps, batch).sum() / total, {}

    lengths = [len(s.prompt_ids) + len(s.response_ids) for s in sequences]
    trainer = SupervisedTrainer(model, stage, lengths, loss, config, log.say, fingerprint(sequences))
    train("sft", trainer, log, checkpoints, stage.save_every, ("loss", "lr", "tokens_per_second"))
    path = save_model(model, tokenizer, output, stop_ids)
    trainer.release()
    return path
