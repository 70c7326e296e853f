"""Stage 1: supervised fine-tuning, packed, loss on the response only (by default)."""

from rto_fast.batch import pack
from rto_fast.models.loading import causal_logps
from rto_fast.session import TrainingSession
from rto_fast.training.loader import Loader
from rto_fast.training.loop import train
from rto_fast.training.order import fingerprint
from rto_fast.training.saving import save_model
from rto_fast.training.supervised import SupervisedTrainer


def train_sft(session: TrainingSession, base: str) -> str:
    """Trains the model at `base` (directory or hub id) on `data.sft`; returns the directory of the result."""
    config, sequences = session.config, session.data.sft
    stage = config.sft
    model = Loader(config, session.placement).trained("causal_lm", base)

    def loss(indices, step_indices):
        """The mean over the step's labelled tokens, whatever its micro-batches."""
        prompts, responses = zip(*((sequences[i].prompt_ids, sequences[i].response_ids) for i in indices))
        batch = pack(prompts, responses, session.device, loss_on_prompt=stage.loss_on_prompt)
        step = [sequences[i] for i in step_indices]
        total = sum(len(s.response_ids) + stage.loss_on_prompt * (len(s.prompt_ids) - 1) for s in step)
        return -causal_logps(model, batch).sum() / total, {}

    lengths = [len(s.prompt_ids) + len(s.response_ids) for s in sequences]
    trainer = SupervisedTrainer(model, stage, lengths, loss, config, session.log.say, fingerprint(sequences))
    train("sft", trainer, session.log, session.checkpoints, stage.save_every, ("loss", "lr", "tokens_per_second"))
    path = save_model(model, session.tokenizer, session.folder / "sft", session.stop_ids)
    trainer.release()
    return path
