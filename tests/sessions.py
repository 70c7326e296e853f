"""A training session without a run: for tests of one stage."""

from types import SimpleNamespace

import torch

from rto_fast.data.tokenizing import stop_token_ids
from rto_fast.reporting.log import RunLog
from rto_fast.rollout import Sampling
from rto_fast.session import TrainingSession
from rto_fast.training.checkpoint import Checkpoints


def training_session(config, folder, tokenizer, **data):
    """A session on the CPU in `folder`, with these fields of `RunData`."""
    log, stop_ids = RunLog(folder), stop_token_ids(tokenizer)
    return TrainingSession(
        config=config,
        models=(),
        device="cpu",
        dtype=torch.float32,
        tokenizer=tokenizer,
        stop_ids=stop_ids,
        sampling=Sampling.of(config.rollout, stop_ids),
        data=SimpleNamespace(**data),
        folder=folder,
        log=log,
        checkpoints=Checkpoints(folder, log),
    )
