"""Log-probs of many responses under a model, without gradients."""

import contextlib

import torch
from torch import nn

from rto_fast.batch import pack
from rto_fast.models.loading import causal_logps, precise_logps
from rto_fast.models.placement import device_of, is_zero3, resident, whole_weights
from rto_fast.training import ranks


@torch.no_grad()
def response_logps(
    model: nn.Module,
    prompt_ids: list[list[int]],
    response_ids: list[list[int]],
    max_tokens: int,
    temperature: float = 1.0,
    precise: bool = False,
) -> torch.Tensor:
    """Log-probs of many responses: one packed [T] tensor in the alignment of `pack`, made `max_tokens` at a time.

    precise: computed in a higher precision than the model's; else in float32 from the model's hidden states.
    """
    lengths = [len(p) + len(r) for p, r in zip(prompt_ids, response_ids)]
    gathered = whole_weights(model) if precise and is_zero3(model) else contextlib.nullcontext()
    with resident(model), gathered:
        device, function = device_of(model), precise_logps if precise else causal_logps

        def logps(run: list[int]) -> torch.Tensor:
            batch = pack([prompt_ids[i] for i in run], [response_ids[i] for i in run], device)
            return function(model, batch, temperature=temperature)

        return ranks.map_items(logps, lengths, [length - 1 for length in lengths], max_tokens)
