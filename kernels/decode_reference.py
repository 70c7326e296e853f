"""What a decode step computes besides its forward pass and the draw, in plain torch.

The kernels of `decode_step` are tested against it. CPU tensors run it, except `begin_step`, of which
a CPU needs less.
"""

import torch
from torch import Tensor


def begin_step(
    lengths: Tensor,
    active: Tensor,
    block_tables: Tensor,
    rows: Tensor,
    generated: Tensor,
    uniforms: Tensor,
    *,
    page_size: int,
    min_new_tokens: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `rto_fast.kernels.decode_step.begin_step`."""
    page = block_tables.gather(1, (lengths // page_size)[:, None])[:, 0].long()
    slots = torch.where(active, page * page_size + lengths % page_size, -1)
    kv_lengths = torch.where(active, lengths + 1, 0).int()
    return slots, kv_lengths, uniforms[rows, generated], generated >= min_new_tokens


def finish_step(
    drawn: tuple[Tensor, Tensor, Tensor],
    stop_ids: Tensor,
    rows: Tensor,
    generated: Tensor,
    active: Tensor,
    limits: Tensor,
    lengths: Tensor,
    input_ids: Tensor,
    tokens: Tensor,
    logps: Tensor,
    sampling_logps: Tensor,
    counts: Tensor,
    done: Tensor,
    *,
    grow: bool,
) -> None:
    """See `rto_fast.kernels.decode_step.finish_step`."""
    for results, values in zip((tokens, logps, sampling_logps), drawn):
        results.index_put_((rows, generated), values)
    input_ids.copy_(drawn[0])
    if grow:
        lengths += active
    generated += active
    # One comparison a stop token takes fewer calls than a table of all.
    ended = generated >= limits
    for stop_id in stop_ids:
        ended |= drawn[0] == stop_id
    counts.index_put_((rows,), generated)
    done.index_put_((rows,), ended)
    active &= ended.logical_not()
    rows.masked_fill_(ended, len(tokens) - 1)
