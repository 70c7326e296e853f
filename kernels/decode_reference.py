"""What surrounds GEMMs, attention and draw in a decode step, in plain torch: the truth the kernels of `decode_layer` and
`decode_step` are tested against, and the path CPU tensors take."""

import torch


def rms_norm(x, weight, eps):
    """As transformers' LlamaRMSNorm: float32 inside, rounded to x's dtype before the product with the weight."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(eps))
    return weight * (wide * scale).to(x.dtype)


def add_rms_norm(x, residual, weight, eps):
    """See `rto_fast.kernels.decode_layer.add_rms_norm`."""
    if x is not None:
        residual += x
    return rms_norm(residual, weight, eps)


def rotate(x, rope):
    """Rotary embedding of [T, heads, D] by [T, 2, D / 2], cosines and sines: (a, b) → (a·cos − b·sin, b·cos + a·sin) of the
    halves a and b of a head."""
    a, b = x.chunk(2, -1)
    cos, sin = rope[:, None, 0], rope[:, None, 1]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def begin_step(lengths, active, block_tables, rows, generated, uniforms, *, page_size, min_new_tokens):
    """See `rto_fast.kernels.decode_step.begin_step`."""
    page = block_tables.gather(1, (lengths // page_size)[:, None])[:, 0].long()
    slots = torch.where(active, page * page_size + lengths % page_size, -1)
    kv_lengths = torch.where(active, lengths + 1, 0).int()
    return slots, kv_lengths, uniforms[rows, generated], generated >= min_new_tokens


def finish_step(
    drawn, stop_ids, rows, generated, active, limits, lengths, input_ids, tokens, logps, sampling_logps, counts, done, *,
    grow,
):  # fmt: skip
    """See `rto_fast.kernels.decode_step.finish_step`."""
    for results, values in zip((tokens, logps, sampling_logps), drawn):
        results.index_put_((rows, generated), values)
    input_ids.copy_(drawn[0])
    if grow:
        lengths += active
    generated += active
    # One comparison a stop token: fewer calls than a table of all.
    ended = generated >= limits
    for stop_id in stop_ids:
        ended |= drawn[0] == stop_id
    counts.index_put_((rows,), generated)
    done.index_put_((rows,), ended)
    active &= ended.logical_not()
    rows.masked_fill_(ended, len(tokens) - 1)
