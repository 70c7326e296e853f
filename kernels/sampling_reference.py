"""`sample_tokens` in plain torch, for CPU tensors and to test the Triton kernel against, and the random numbers of both.

Computes in float64 for float64, else in float32. A decode step of a small model takes microseconds, so calls of torch
are kept few: ten without filters.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from rto_fast.kernels.reference import CACHE_ELEMENTS, compute_dtype

# Tokens of the vocabulary that share an entry in the upper level of the cumulative distribution. It is about the square
# root of a vocabulary, so that both levels are short, and gives more tiles than any usual top_k (see
# kernels/sampling.py).
TILE = 512

_WORD = 0xFFFFFFFF
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int], rounds: int = 10
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 (Salmon et al., SC'11, "Parallel random numbers: as easy as 1, 2, 3").

    Args:
        counter: four int64 tensors of words in [0, 2^32) that broadcast against each other.
        key: two integers in [0, 2^32).
    Returns:
        Four int64 tensors of random words in [0, 2^32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        # int64 products wrap modulo 2^64, which keeps all 64 bits of the unsigned product. >> copies the sign, so mask.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        high0, high1 = product0 >> 32, product1 >> 32
        c0 = high1.bitwise_and_(_WORD) ^ (c1 ^ k0)
        c2 = high0.bitwise_and_(_WORD) ^ (c3 ^ k1)
        c1, c3 = product1.bitwise_and_(_WORD), product0.bitwise_and_(_WORD)
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def philox_uniforms(seed: int, sample_ids: Tensor, positions: Tensor) -> Tensor:
    """Two random numbers for each (sample, position), a function of seed, sample id and position only.

    Args:
        seed: an integer, of which 64 bits count.
        sample_ids: int64 tensor.
        positions: int64 tensor that broadcasts against `sample_ids`.
    Returns:
        [..., 2] float32 multiples of 2^-24 in [0, 1), on the device of the tensors.
    """
    counter = positions & _WORD, torch.zeros_like(positions), sample_ids & _WORD, (sample_ids >> 32) & _WORD
    words = philox4x32(counter, (seed & _WORD, (seed >> 32) & _WORD))
    return torch.stack([word >> 8 for word in words[:2]], dim=-1).to(torch.float32).mul_(2.0**-24)


@torch.no_grad()
def sample_tokens(
    logits: Tensor,
    uniforms: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    softcap: float | None = None,
    stop_ids: Tensor | None = None,
    stop_allowed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `rto_fast.ops.sample_tokens`."""
    rows = max(1, CACHE_ELEMENTS * torch.get_num_threads() // logits.shape[1])
    sample = partial(
        _sample, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, softcap=softcap, stop_ids=stop_ids
    )
    if len(logits) <= rows:
        return sample(logits, uniforms, stop_allowed)
    # Rows go in blocks whose tensors are still in cache when they are read again.
    allowed = [None] * len(logits) if stop_allowed is None else stop_allowed.split(rows)
    parts = map(sample, logits.split(rows), uniforms.split(rows), allowed)
    tokens, logps, sampling_logps = map(torch.cat, zip(*parts))
    return tokens, logps, sampling_logps


def _sample(
    logits: Tensor,
    uniforms: Tensor,
    stop_allowed: Tensor | None,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    softcap: float | None,
    stop_ids: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    z = logits.to(compute_dtype(logits))
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    drawn_from = z
    if stop_ids is not None and stop_allowed is not None and not stop_allowed.all():
        if ((stop_ids < 0) | (stop_ids >= z.shape[1])).any():
            raise ValueError(f"stop_ids: expected values in [0, {z.shape[1]}), got {stop_ids.tolist()}")
        drawn_from = z.index_fill(-1, stop_ids, -math.inf).where(~stop_allowed[:, None], z)
    log_probs = _log_softmax(z, temperature or 1.0)
    if temperature == 0:
        best, tokens = drawn_from.max(-1, keepdim=True)
        sampling_logps = best - best  # 0, or NaN where there is nothing to draw
    else:
        if top_k or top_p < 1 or min_p:
            threshold = _threshold(drawn_from, temperature, top_k, top_p, min_p)
            drawn_from = drawn_from.masked_fill(drawn_from < threshold, -math.inf)
        sampling = log_probs if drawn_from is z else _log_softmax(drawn_from, temperature)
        tokens = _draw(sampling, uniforms)
        sampling_logps = sampling.gather(-1, tokens)
    if drawn_from is z and temperature != 0:
        return tokens.squeeze(-1), sampling_logps.squeeze(-1), sampling_logps.squeeze(-1).clone()
    # Either may lack a NaN of the other: the NaN was forbidden or filtered, or all other tokens were forbidden.
    logps = log_probs.gather(-1, tokens)
    invalid = (logps + sampling_logps).isnan()
    logps, sampling_logps = (x.masked_fill(invalid, math.nan).squeeze(-1) for x in (logps, sampling_logps))
    return tokens.masked_fill(invalid, 0).squeeze(-1), logps, sampling_logps


def _log_softmax(z: Tensor, temperature: float) -> Tensor:
    return (z if temperature == 1 else z / temperature).log_softmax(-1)


def _draw(log_probs: Tensor, uniforms: Tensor) -> Tensor:
    """Draws tokens [B, 1] from distributions [B, V], by the inverse CDF of tiles and then of the tokens of a tile."""
    if log_probs.shape[1] <= TILE:
        return _invert(log_probs.exp(), uniforms[:, 1:])
    if log_probs.shape[1] % TILE:
        log_probs = F.pad(log_probs, (0, -log_probs.shape[1] % TILE), value=-math.inf)
    tiles = log_probs.unflatten(1, (-1, TILE))
    tile = _invert(tiles.exp().sum(-1), uniforms[:, :1])
    inside = tiles.gather(1, tile.unsqueeze(-1).expand(-1, -1, TILE)).squeeze(1)
    # Relative to the tile's own maximum, so that the sum is at least 1, which `_invert` needs.
    return tile * TILE + _invert((inside - inside.amax(-1, keepdim=True)).exp_(), uniforms[:, 1:])


def _invert(weights: Tensor, uniforms: Tensor) -> Tensor:
    """The first index [B, 1] whose running sum exceeds uniform·sum, never one of weight 0; 0 if weights are NaN."""
    sums = weights.cumsum(-1)
    index = torch.searchsorted(sums, sums[:, -1:] * uniforms, right=True)
    index.remainder_(weights.shape[1])  # if everything is NaN, the search runs to the end
    if weights.gather(-1, index).all():
        return index
    # Sequential sums do not change where the weight is 0, but those of a GPU's parallel scan may, by rounding. So these
    # indices are excluded, and the largest sum of the others counts as the whole. One of them is above u times that,
    # because u·S < S in float32 too for u ≤ 1 − 2^-24, unless S is subnormal.
    sums.mul_(weights.sign())
    return (sums > sums.amax(-1, keepdim=True) * uniforms).max(-1, keepdim=True).indices


def _threshold(z: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    """The lowest logit [B, 1] that top_k, then top_p, then min_p keep."""
    highest = z.amax(-1, keepdim=True)
    threshold = highest + (temperature * math.log(min_p) if min_p else -math.inf)
    top_k = min(top_k, z.shape[1])
    if top_k:
        values = z.topk(top_k).values
        threshold = torch.maximum(threshold, values[:, -1:])
    if top_p < 1:
        exp = ((z - highest) / temperature).exp_()
        if top_k:
            exp.masked_fill_(z < values[:, -1:], 0)
        target = top_p * exp.sum(-1, keepdim=True)
        # Sorting a whole vocabulary takes 50 times as long as finding its largest 256 logits, which are mostly enough.
        width = top_k or min(256, z.shape[1])
        while True:
            values = z.topk(width).values
            is_short = ((values - highest) / temperature).exp_().cumsum(-1) < target
            # The first that is not short, because later sums of a parallel scan may be short again.
            is_enough, last_kept = is_short.logical_not_().max(-1, keepdim=True)
            if top_k or width == z.shape[1] or is_enough.all():
                break
            width = min(16 * width, z.shape[1])
        threshold = torch.maximum(threshold, values.gather(-1, last_kept.where(is_enough, width - 1)))
    return threshold
