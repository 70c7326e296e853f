"""Stage 1: supervised fine-tuning on packed sequences. By default only the response has a loss."""

from torch import Tensor

from rto_fast.batch import pack
from rto_fast.models.forward import causal_logps
from rto_fast.reporting.metric_names import LOSS, LR, TOKENS_PER_SECOND
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

    def loss(rows: list[int], step_items: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
        """The negative log-likelihood, a mean over the labelled tokens of the whole optimizer step."""
        prompts, responses = zip(*((sequences[i].prompt_ids, sequences[i].response_ids) for i in rows))
        batch = pack(prompts, responses, session.device, loss_on_prompt=stage.loss_on_prompt)
        step = [sequences[i] for i in step_items]
        total = sum(len(s.response_ids) + stage.loss_on_prompt * (len(s.prompt_ids) - 1) for s in step)
        return -model.forward(causal_logps, batch).sum() / total, {}

    lengths = [len(s.prompt_ids) + len(s.response_ids) for s in sequences]
    trainer = SupervisedTrainer(model, stage, lengths, loss, config, session.log.say, fingerprint(sequences))
    train("sft", trainer, session.checkpoints, show=(LOSS, LR, TOKENS_PER_SECOND))
    path = save_model(model, session.tokenizer, session.folder / "sft", session.stop_ids)
    trainer.release()
    return path
