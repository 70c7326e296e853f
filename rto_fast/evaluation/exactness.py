"""Are the log-probs of a rollout those of training passes, to the bit? `python -m rto_fast.exact` asks, and tests do."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rto_fast.batch import micro_batches, pack
from rto_fast.models.forward import causal_logps
from rto_fast.models.model import Model
from rto_fast.rollout import Engine, Exactness, RolloutBatch, Sampling

PASS_TOKENS = 4096  # of a training pass: its activations must fit beside the weights of a large model
ALONE = 3  # prompts that are sampled once more without the others


def trained_logps(model: Model, rollout: RolloutBatch, groups: Sequence[Sequence[int]], temperature: float) -> Tensor:
    """Log-probs of a rollout's tokens from passes that keep what gradients need, in the order of the rollout, on the CPU.

    Args:
        groups: the responses of each pass, which together hold every response once.
    """
    parts: dict[int, Tensor] = {}
    model.activate()
    for rows in groups:
        prompts, responses = ([ids[i] for i in rows] for ids in (rollout.prompt_ids, rollout.response_ids))
        batch = pack(prompts, responses, model.device)
        # As training passes are on a GPU: of few sizes.
        inputs = batch.padded() if batch.labels.is_cuda else batch
        with torch.enable_grad():
            logps = causal_logps(model.module, inputs, temperature=temperature).detach()
        parts |= zip(rows, logps[batch.rows].cpu().split([len(ids) for ids in responses]))
    return torch.cat([parts[i] for i in range(len(rollout.response_ids))])


def check_exactness(
    model: Model, engine: Engine, prompt_ids: list[list[int]], sampling: Sampling, seed: int = 0
) -> tuple[Exactness, int]:
    """Samples a response to each prompt and computes its log-probs anew.

    Args:
        model: with weights that require gradients.
        engine: samples from it.
    Returns:
        (how the log-probs compare, the number of the first `ALONE` samples that are others when they are drawn alone).
    """
    rollout, again = (engine.generate(ids, 1, sampling, seed) for ids in (prompt_ids, prompt_ids[:ALONE]))
    assert rollout.logps is not None and again.logps is not None
    lengths = [len(prompt) + len(response) for prompt, response in zip(rollout.prompt_ids, rollout.response_ids)]
    trained = trained_logps(model, rollout, micro_batches(lengths, PASS_TOKENS), sampling.temperature)
    positions = [torch.arange(len(p), len(p) + len(r)) for p, r in zip(rollout.prompt_ids, rollout.response_ids)]
    found = Exactness.of(rollout.logps.cpu(), trained, torch.cat(positions))
    return found, sum(a != b for a, b in zip(_samples(again), _samples(rollout)))


def _samples(rollout: RolloutBatch) -> list[tuple[list[int], list[float]]]:
    """(tokens, log-probs) of each response."""
    assert rollout.logps is not None
    parts = rollout.logps.split([len(ids) for ids in rollout.response_ids])
    return [(ids, part.tolist()) for ids, part in zip(rollout.response_ids, parts)]
