"""Log-probs of many responses under a model, without gradients."""

import contextlib

import torch

from rto_fast.batch import pack
from rto_fast.models.forward import causal_logps, precise_logps
from rto_fast.models.model import Model
from rto_fast.training import ranks


@torch.no_grad()
def response_logps(
    model: Model,
    prompt_ids: list[list[int]],
    response_ids: list[list[int]],
    max_tokens: int,
    temperature: float = 1.0,
    precise: bool = False,
) -> torch.Tensor:
    """Log-probs of many responses.

    Args:
        prompt_ids, response_ids: token ids of each sequence.
        max_tokens: tokens in one forward pass.
        temperature: divides the logits.
        precise: compute the whole pass in a higher precision than the model's.
    Returns:
        [T] float32 (float64 if a float32 model is run precisely), in the alignment of `pack`.
    """
    lengths = [len(p) + len(r) for p, r in zip(prompt_ids, response_ids)]

    def logps(rows: list[int]) -> torch.Tensor:
        batch = pack([prompt_ids[i] for i in rows], [response_ids[i] for i in rows], model.device)
        if not precise:
            return model.forward(causal_logps, batch, temperature=temperature)
        model.activate()  # and not through the engine: the weights are whole
        return precise_logps(model.module, batch, temperature=temperature)

    with model.resident(), model.whole() if precise else contextlib.nullcontext():
        return ranks.map_items(logps, lengths, [length - 1 for length in lengths], max_tokens)
