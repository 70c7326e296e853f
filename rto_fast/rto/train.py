"""Stage 4: Reinforced Token Optimization. What an iteration does stands in `rto_fast.rto.trainer`."""

from collections.abc import Callable

from rto_fast.reporting.metric_names import CLIP_FRACTION, DPO_REWARD, KL, LENGTH, SCORE, TOKENS_PER_SECOND
from rto_fast.rollout import Engine
from rto_fast.rto.first_update import check_dpo_model
from rto_fast.rto.health import Health
from rto_fast.rto.models import Models
from rto_fast.rto.trainer import RTOTrainer
from rto_fast.session import TrainingSession
from rto_fast.training.loop import train
from rto_fast.training.saving import save_model

SHOWN = (SCORE, DPO_REWARD, KL, LENGTH, CLIP_FRACTION, TOKENS_PER_SECOND)  # on the live line


def train_rto(
    session: TrainingSession, models: Models, evaluate: Callable[[Models, Engine, int], object] | None = None
) -> str:
    """Trains the policy and the critic and saves them; returns the policy's directory.

    Args:
        models: From `load_models`.
        evaluate: Is called with the models, the policy's engine and the iteration, every `eval.every` iterations.
    """
    config, log, prompts = session.config, session.log, session.data.prompts
    if config.dpo.model:
        check_dpo_model(session, models)
    trainer = RTOTrainer(config, models, session.tokenizer, session.sampling, prompts, session.device, log)
    rollout = int(min(config.rto.prompts_per_rollout, trainer.order.remaining))
    if len(prompts) < rollout:
        log.say(f"rto: {len(prompts)} prompts fill a rollout of {rollout} more than once")

    def evaluate_policy(iteration: int) -> None:
        if evaluate and config.eval.every and iteration % config.eval.every == 0:
            evaluate(models, trainer.engine, iteration)

    train("rto", trainer, session.checkpoints, SHOWN, after_step=Health(config, log).check, evaluate=evaluate_policy)
    if models.critic is not None:
        save_model(models.critic, session.tokenizer, session.folder / "rto_critic", session.stop_ids)
    path = save_model(models.policy, session.tokenizer, session.folder / "rto", session.stop_ids)
    trainer.release()
    return path
