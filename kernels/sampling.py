"""Draws a token for each row of logits and computes its log-prob, in one read of the logits.

The draw is an inverse CDF of two levels, not Gumbel-max: one random number picks a tile of the vocabulary, and one
picks a token of that tile. This takes two random numbers a token instead of V, so a table made once per rollout can
hold them. The sums of the tiles come from the pass that the log-prob needs anyway, which adds up the row in the order of
the losses (kernels/row_softmax.py). Only the chosen tile is read again. One program does all of this for a row, so that a
sample depends on its row only, not on its slot or the size of the batch.

The kernel is bound by memory: 256 rows of 151936 float32 are 156 MB, 36 µs of an H200's 4.3 TB/s. All filters of a row
become one threshold, which is found without sorting. A pass collects the candidates of the row, which are above a bound
that costs nothing (for top_k the k-th largest maximum of a tile; for top_p the logit below which even V of its kind
hold less than 1 - top_p). A bisection of these finds the threshold bit by bit, and a last pass sums up the tiles that
have something above it. That is three reads if there are few candidates. In a flat distribution, or for a top_k above
the number of tiles, all tokens are candidates, and the bisection reads them another 16 times.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from rto_fast.kernels.common import EXACT, LOG2E
from rto_fast.kernels.row_softmax import (
    SLOTS,
    TILE,
    empty_states,
    load_logits,
    log_prob,
    merge_slots,
    merge_states,
    tile_columns,
    tile_states,
)


@triton.jit
def _forbid(z, offs_v, stop_ids_ptr, num_stops):
    for i in range(num_stops):
        z = tl.where(offs_v == tl.load(stop_ids_ptr + i), float("-inf"), z)
    return z


@triton.jit
def _store_tiles(states_ptr, tile, m, s, NUM_TILES: tl.constexpr, BLOCK_T: tl.constexpr):
    """Stores the states (m, Σ 2^((z - m)·scale)) of tiles [tile, tile + BLOCK_T)."""
    # Both at once, because values go to the threads that store them through shared memory.
    state = tl.join(tl.reshape(m, (BLOCK_T,)), tl.sum(s, 1))
    offsets = tl.arange(0, BLOCK_T)[:, None] + tl.arange(0, 2)[None, :] * NUM_TILES
    tl.store(states_ptr + tile + offsets, state)


@triton.jit
def _store_kept(
    x_ptr,
    states_ptr,
    previous_ptr,
    stop_ids_ptr,
    num_stops,
    threshold,
    tile,
    num_cols,
    scale,
    cap,
    NUM_TILES: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Stores the states of tiles [tile, tile + BLOCK_T) of what is left of them: no stop id, nothing below `threshold`."""
    offs_v = tile * TILE + tile_columns(x_ptr.dtype.element_ty.primitive_bitwidth, BLOCK_T)
    end = num_cols
    if threshold is not None:  # tiles below it are not read
        offs_t = tile + tl.arange(0, offs_v.shape[0]) % BLOCK_T
        end = tl.where(tl.load(previous_ptr + offs_t) >= threshold, num_cols, 0)[:, None]
    z, _ = load_logits(x_ptr, None, offs_v, end, cap, True)
    if stop_ids_ptr is not None:
        z = _forbid(z, offs_v, stop_ids_ptr, num_stops)
    if threshold is not None:
        z = tl.where(z >= threshold, z, float("-inf"))
    m, s, _ = tile_states(z, scale, False, BLOCK_T)
    _store_tiles(states_ptr, tile, m, s, NUM_TILES, BLOCK_T)


@triton.jit
def _fold_policy(x_ptr, states_ptr, num_cols, scale, cap, NUM_TILES: tl.constexpr, BLOCK_T: tl.constexpr):
    """(m, s) of the row as the losses have it (see kernels/row_softmax.py); stores the states of its tiles."""
    BLOCK_V: tl.constexpr = BLOCK_T * TILE
    offs_v = tile_columns(x_ptr.dtype.element_ty.primitive_bitwidth, BLOCK_T)
    m, s, u = empty_states(BLOCK_T, offs_v.shape[1])
    tail = num_cols // (2 * BLOCK_V) * (2 * BLOCK_V)
    for start in range(0, tail, 2 * BLOCK_V):
        # Both loads come before the first store, so 8 warps have 32 KB in flight. Two programs on an SM cover the latency.
        z, _ = load_logits(x_ptr, None, start + offs_v, num_cols, cap, False)
        next_z, _ = load_logits(x_ptr, None, start + BLOCK_V + offs_v, num_cols, cap, False)
        tile_m, tile_s, _ = tile_states(z, scale, False, BLOCK_T)
        m, s, u = merge_states(m, s, u, tile_m, tile_s, u, scale, False)
        _store_tiles(states_ptr, start // TILE, tile_m, tile_s, NUM_TILES, BLOCK_T)
        tile_m, tile_s, _ = tile_states(next_z, scale, False, BLOCK_T)
        m, s, u = merge_states(m, s, u, tile_m, tile_s, u, scale, False)
        _store_tiles(states_ptr, start // TILE + BLOCK_T, tile_m, tile_s, NUM_TILES, BLOCK_T)
    for start in range(tail, num_cols, BLOCK_V):
        z, _ = load_logits(x_ptr, None, start + offs_v, num_cols, cap, True)
        tile_m, tile_s, _ = tile_states(z, scale, False, BLOCK_T)
        m, s, u = merge_states(m, s, u, tile_m, tile_s, u, scale, False)
        _store_tiles(states_ptr, start // TILE, tile_m, tile_s, NUM_TILES, BLOCK_T)
    m, s, _ = merge_slots(m, s, u, scale, False)
    return m, s


@triton.jit
def _fold_tiles(states_ptr, num_tiles, scale, NUM_TILES: tl.constexpr):
    """(m of the row, Σ 2^((z - m)·scale) of each tile, their total, m of each tile)."""
    tl.debug_barrier()  # the tiles were stored by other threads
    offs_t = tl.arange(0, NUM_TILES)
    tile_m = tl.load(states_ptr + offs_t, mask=offs_t < num_tiles, other=float("-inf"))
    tile_s = tl.load(states_ptr + NUM_TILES + offs_t, mask=offs_t < num_tiles, other=0.0)
    m = tl.max(tile_m, 0)
    weights = tile_s * tl.exp2((tile_m - tl.where(m == float("-inf"), 0.0, m)) * scale)
    return m, weights, tl.sum(weights, 0), tile_m


@triton.jit
def _invert(weights, offs, uniform):
    """The first index where the running sum exceeds uniform·sum, never one of weight 0; -1 if all are 0.

    A parallel scan is not exactly monotone, and its last element is not exactly the sum, so both are checked here.
    """
    above = (tl.cumsum(weights, 0) > uniform * tl.sum(weights, 0)) & (weights > 0.0)
    first = tl.min(tl.where(above, offs, 2147483647), 0)
    return tl.where(first == 2147483647, tl.max(tl.where(weights > 0.0, offs, -1), 0), first)


@triton.jit
def _to_key(value):
    """An integer that has the order of the floats."""
    bits = value.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)


@triton.jit
def _from_key(key):
    bits = key.to(tl.int32)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit
def _collect(x_ptr, values_ptr, stop_ids_ptr, num_stops, floor, num_cols, cap, BLOCK_V: tl.constexpr):
    """Stores the row's values ≥ floor side by side, in order; returns their number."""
    offs_v = tl.arange(0, BLOCK_V)
    count = 0
    for start in range(0, num_cols, BLOCK_V):
        z, _ = load_logits(x_ptr, None, start + offs_v, num_cols, cap, True)
        if stop_ids_ptr is not None:
            z = _forbid(z, start + offs_v, stop_ids_ptr, num_stops)
        is_candidate = (z >= floor) & (start + offs_v < num_cols)
        slots = tl.cumsum(is_candidate.to(tl.int32), 0)
        tl.store(values_ptr + count + slots - 1, z, mask=is_candidate)
        count += tl.max(slots, 0)
    tl.debug_barrier()
    return count


@triton.jit
def _weigh(values_ptr, count, a, b, c, m, scale, BY_MASS: tl.constexpr, BLOCK_V: tl.constexpr):
    """The number, or the mass Σ 2^((value - m)·scale), of values ≥ a, ≥ b and ≥ c, always summed in the same order."""
    offs_v = tl.arange(0, BLOCK_V)
    above_a = tl.zeros((BLOCK_V,), tl.float32)
    above_b = tl.zeros((BLOCK_V,), tl.float32)
    above_c = tl.zeros((BLOCK_V,), tl.float32)
    for start in range(0, count, BLOCK_V):
        valid = start + offs_v < count
        value = tl.load(values_ptr + start + offs_v, mask=valid, other=float("-inf"))
        weight = tl.where(valid, tl.exp2((value - m) * scale) if BY_MASS else 1.0, 0.0)
        above_a += tl.where(value >= a, weight, 0.0)
        above_b += tl.where(value >= b, weight, 0.0)
        above_c += tl.where(value >= c, weight, 0.0)
    return tl.sum(above_a, 0), tl.sum(above_b, 0), tl.sum(above_c, 0)


@triton.jit
def _bisect(values_ptr, count, low, high, target, m, scale, BY_MASS: tl.constexpr, BLOCK_V: tl.constexpr):
    """The highest key in [low, high) with at least `target` at or above it, else low. Finds two bits a pass."""
    while high - low > 1:
        width = high - low
        a, b, c = _weigh(
            values_ptr,
            count,
            _from_key(low + width // 4),
            _from_key(low + width // 2),
            _from_key(low + 3 * width // 4),
            m,
            scale,
            BY_MASS,
            BLOCK_V,
        )
        quarter = (a >= target).to(tl.int64) + (b >= target).to(tl.int64) + (c >= target).to(tl.int64)
        high = tl.where(quarter == 3, high, low + (quarter + 1) * width // 4)
        low += quarter * width // 4
    return low


@triton.jit(do_not_specialize=["stride_u_b", "stride_u_i", "num_rows", "num_stops", "top_k"])
def sample_tokens_kernel(
    x_ptr,
    uniforms_ptr,
    stop_ids_ptr,
    stop_allowed_ptr,
    tokens_ptr,
    logps_ptr,
    states_ptr,
    values_ptr,
    stride_x_b,
    stride_u_b,
    stride_u_i,
    num_rows,
    num_cols,
    num_stops,
    scale,
    cap,
    top_k,
    top_p,
    min_p_drop,
    GREEDY: tl.constexpr,
    NUM_TILES: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Filters that are off are None. min_p_drop: distance of min_p's threshold from the highest logit. states: [B, 4,
    NUM_TILES]."""
    BLOCK_V: tl.constexpr = BLOCK_T * TILE
    pid_b = tl.program_id(0).to(tl.int64)
    x_ptr += pid_b * stride_x_b
    states_ptr += pid_b * 4 * NUM_TILES
    num_tiles = tl.cdiv(num_cols, TILE)

    # The policy, without filters and forbidden tokens.
    policy_m, policy_s = _fold_policy(x_ptr, states_ptr, num_cols, scale, cap, NUM_TILES, BLOCK_T)
    m, s = policy_m, policy_s
    _, weights, _, tile_m = _fold_tiles(states_ptr, num_tiles, scale, NUM_TILES)

    if stop_ids_ptr is not None:
        if tl.load(stop_allowed_ptr + pid_b):
            num_stops = 0
        tl.debug_barrier()
        for i in range(num_stops):
            stop_id = tl.load(stop_ids_ptr + i)
            if (stop_id >= 0) & (stop_id < num_cols):
                tile = (stop_id // BLOCK_V).to(tl.int32) * BLOCK_T
                _store_kept(
                    x_ptr,
                    states_ptr,
                    None,
                    stop_ids_ptr,
                    num_stops,
                    None,
                    tile,
                    num_cols,
                    scale,
                    cap,
                    NUM_TILES,
                    BLOCK_T,
                )
        m, weights, s, tile_m = _fold_tiles(states_ptr, num_tiles, scale, NUM_TILES)

    threshold = None
    if not GREEDY:
        if min_p_drop is not None:
            threshold = m - min_p_drop
        if (top_k is not None) or (top_p is not None):
            BLOCK_C: tl.constexpr = BLOCK_V // 4  # candidates are few
            low = _to_key(tl.full((), float("-inf"), tl.float32))
            high = _to_key(m) + 1
            if top_k is not None:
                low = _bisect(states_ptr, num_tiles, low, high, top_k, m, scale, False, BLOCK_C)
            else:
                # Half of (1 - top_p)·s / V, as a margin for rounding.
                low = _to_key(m + (tl.log2((1.0 - top_p) * s / num_cols) - 1.0) / scale)
            values_ptr += pid_b * num_cols
            count = _collect(x_ptr, values_ptr, stop_ids_ptr, num_stops, _from_key(low), num_cols, cap, BLOCK_V // 2)
            if top_k is not None:
                low = _bisect(values_ptr, count, low, high, top_k, m, scale, False, BLOCK_C)
            if top_p is not None:
                if top_k is not None:
                    kept = _from_key(low)
                    s, _, _ = _weigh(values_ptr, count, kept, kept, kept, m, scale, True, BLOCK_C)
                low = _bisect(values_ptr, count, low, high, top_p * s, m, scale, True, BLOCK_C)
            threshold = _from_key(low) if threshold is None else tl.maximum(threshold, _from_key(low))
        if threshold is not None:
            for tile in range(0, num_tiles, BLOCK_T):
                _store_kept(
                    x_ptr,
                    states_ptr + 2 * NUM_TILES,
                    states_ptr,
                    stop_ids_ptr,
                    num_stops,
                    threshold,
                    tile,
                    num_cols,
                    scale,
                    cap,
                    NUM_TILES,
                    BLOCK_T,
                )
            states_ptr += 2 * NUM_TILES
            m, weights, s, tile_m = _fold_tiles(states_ptr, num_tiles, scale, NUM_TILES)

    offs_t = tl.arange(0, NUM_TILES)
    if GREEDY:
        tile = tl.argmax(tile_m, 0)
    else:
        tile = tl.maximum(_invert(weights, offs_t, tl.load(uniforms_ptr + pid_b * stride_u_b)), 0)
    offs_v = tl.arange(0, TILE)
    z, _ = load_logits(x_ptr, None, tile * TILE + offs_v, num_cols, cap, True)
    drawn_from = z
    if stop_ids_ptr is not None:
        drawn_from = _forbid(drawn_from, tile * TILE + offs_v, stop_ids_ptr, num_stops)
    if GREEDY:
        token = tl.argmax(drawn_from, 0)
    else:
        if threshold is not None:
            drawn_from = tl.where(drawn_from >= threshold, drawn_from, float("-inf"))
        origin = tl.max(drawn_from, 0)  # relative to the tile's own maximum, however small that is
        weights = tl.exp2((drawn_from - tl.where(origin == float("-inf"), 0.0, origin)) * scale)
        token = tl.maximum(_invert(weights, offs_v, tl.load(uniforms_ptr + pid_b * stride_u_b + stride_u_i)), 0)

    z_token = tl.sum(tl.where(offs_v == token, z, 0.0), 0)
    logp = log_prob(z_token, policy_m, tl.log2(policy_s), scale)
    sampling_logp = 0.0 if GREEDY else log_prob(z_token, m, tl.log2(s), scale)
    # False with a NaN or +inf in the row, and if there is nothing to draw.
    valid = (policy_s > 0.0) & (s > 0.0)
    tl.store(tokens_ptr + pid_b, tl.where(valid, tile * TILE + token, 0))
    tl.store(logps_ptr + pid_b, tl.where(valid, logp, float("nan")))
    tl.store(logps_ptr + num_rows + pid_b, tl.where(valid, sampling_logp, float("nan")))


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
    num_rows, num_cols = logits.shape
    num_tiles = triton.cdiv(num_cols, TILE.value)
    slots = min(triton.next_power_of_2(num_tiles), SLOTS)
    tokens = logits.new_empty(num_rows, dtype=torch.int64)
    logps = logits.new_empty(2, num_rows, dtype=torch.float32)
    if not num_rows:
        return tokens, logps[0], logps[1]
    states = logps.new_empty(num_rows, 4, triton.next_power_of_2(num_tiles))
    greedy = temperature == 0
    top_k = top_k if 0 < top_k < num_cols and not greedy else None
    top_p = top_p if top_p < 1 and not greedy else None
    values = None if top_k is None and top_p is None else logps.new_empty(num_rows, num_cols)
    if stop_allowed is None:
        stop_ids = None
    with torch.cuda.device_of(logits):
        # With 128 registers a thread two programs fit on an SM, which suits 256 rows. By itself ptxas would aim at more
        # programs in some variants, and spill.
        sample_tokens_kernel[(num_rows,)](
            logits,
            uniforms,
            stop_ids,
            None if stop_ids is None else stop_allowed,
            tokens,
            logps,
            states,
            values,
            logits.stride(0),
            uniforms.stride(0),
            uniforms.stride(1),
            num_rows,
            num_cols,
            0 if stop_ids is None else len(stop_ids),
            LOG2E.value / (temperature or 1.0),
            softcap,
            top_k,
            top_p,
            -temperature * math.log(min_p) if min_p and not greedy else None,
            GREEDY=greedy,
            NUM_TILES=states.shape[2],
            BLOCK_T=slots,
            num_warps=slots,
            maxnreg=128,
            **EXACT,
        )
    return tokens, logps[0], logps[1]
