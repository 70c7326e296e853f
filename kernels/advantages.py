"""RTO's token rewards, their generalised advantage estimation (GAE) and whitening, over packed sequences.

One program walks the tiles of a sequence from its end. Each token hands to the token before it

    h_t = γ·V_t + γλ·A_t,    so that    A_t = r_t − V_t + h_{t+1},

and a token that is no action hands on what it was handed, so that gaps need no search for the next value. The last
action is handed what is added to its reward, for example the score. Each program also stores its sums and (count, mean,
M2). A second launch merges these in a fixed order, without atomics, so that results are bitwise repeatable, and
whitens. Nothing is padded and the host never waits.

A tile consists of groups of four tokens (`token_groups.py`), one for each thread. Its rows are in reversed order, so
that the recursion runs forward through a tile and does not need `tl.associative_scan(reverse=True)`, which has open
bugs on GPUs. Within its group a thread walks backward.

The kernels are bound by latency, not by bandwidth: each tile takes two loads, one after the other, and a scan with its
barriers. So it matters how many programs an SM holds at once. With two tokens a thread and tiles of 1024 an SM held one
program (101 registers), and 1M tokens of 1024 sequences took 63 µs on an H200, gae 24. Now an SM holds eight programs
of 512 tokens (64 registers), which is all of them. benchmarks/README.md has the prediction.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rto_fast.kernels.common import contiguous
from rto_fast.kernels.reference import RTOAdvantages
from rto_fast.kernels.token_groups import GROUP, join_columns, load_groups, split_columns, store_groups, token_groups

BLOCK_WHITEN, BLOCK_N = 2048, 1024
MAX_TILE = 1024  # tokens, which take 8 warps; with 16, registers spill
# For rto_advantages with 8 warps, where ptxas by itself may take 64 and spill. With 80 an SM still holds three
# programs.
LARGE_TILE_REGISTERS = 80
# Tokens in the tiles of all programs that run at once: each of 132 SMs holds 1024 threads of 64 registers.
RESIDENT_TOKENS = 132 * 1024 * GROUP.value
STATS = ("count", "advantage_mean", "advantage_var", "dpo_reward_sum", "kl_sum", "score_reward_sum", "dpo_clip_count")


@triton.jit
def _compose(a_1, b_1, p_1, q_1, a_2, b_2, p_2, q_2):
    """Joins two ranges of tokens; the first is later in time. A range that is handed h hands on a·h + b, and its earliest
    token is handed p·h + q."""
    return a_2 * a_1, a_2 * b_1 + b_2, p_2 * a_1, p_2 * b_1 + q_2


@triton.jit
def _join_sentences(starts_1, sum_1, starts_2, sum_2):
    """Joins two ranges of tokens: (whether a sentence starts in it, sum since the last start)."""
    return starts_1 | starts_2, tl.where(starts_2 != 0, sum_2, sum_1 + sum_2)


@triton.jit
def _last(block, BLOCK: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, BLOCK) == BLOCK - 1, block, 0.0))


@triton.jit
def _clip(x, limit):
    """x clipped to ±limit; None is no limit. Uses selects, because min and max would drop NaN."""
    if limit is not None:
        x = tl.where(tl.abs(x) > limit, tl.where(x > 0.0, limit, -limit), x)
    return x


@triton.jit
def _sequence(cu_seqlens_ptr, bootstrap_values_ptr, pid_n, gamma):
    """(first token of a sequence, one past its last token, what its last action is handed)."""
    bootstrap = 0.0
    if bootstrap_values_ptr is not None:
        bootstrap = tl.load(bootstrap_values_ptr + pid_n).to(tl.float32)
    return tl.load(cu_seqlens_ptr + pid_n), tl.load(cu_seqlens_ptr + pid_n + 1), gamma * bootstrap


@triton.jit
def _gae_tile(reward, value, valid, handed, gamma, gamma_lambda, ROWS: tl.constexpr):
    """(advantages of a tile, what its earliest token hands on). reward and value are 0 for tokens that are not valid."""
    delta = reward - value
    a_0, a_1, a_2, a_3 = split_columns(tl.where(valid, gamma_lambda, 1.0), ROWS)
    b_0, b_1, b_2, b_3 = split_columns(gamma * value + gamma_lambda * delta, ROWS)
    # Joins a thread's four tokens, computes what each thread is handed, then what each of its tokens is handed.
    a_01, b_01 = a_0 * a_1, a_0 * b_1 + b_0
    a_23, b_23 = a_2 * a_3, a_2 * b_3 + b_2
    a, b = a_01 * a_23, a_01 * b_23 + b_01
    a, b, p, q = tl.associative_scan((a, b, tl.full((ROWS,), 1.0, tl.float32), tl.zeros_like(b)), 0, _compose)
    handed_3 = p * handed + q
    handed_2 = a_3 * handed_3 + b_3
    handed_1 = a_2 * handed_2 + b_2
    handed_0 = a_1 * handed_1 + b_1
    advantage = tl.where(valid, delta + join_columns(handed_0, handed_1, handed_2, handed_3, ROWS), 0.0)
    return advantage, _last(a * handed + b, ROWS)


@triton.jit(do_not_specialize=["num_tokens"])
def gae_kernel(
    rewards_ptr,
    values_ptr,
    cu_seqlens_ptr,
    mask_ptr,
    bootstrap_values_ptr,
    advantages_ptr,
    returns_ptr,
    num_tokens,
    gamma,
    gamma_lambda,
    ROWS: tl.constexpr,
):
    pid_n = tl.program_id(0)
    start, end, handed = _sequence(cu_seqlens_ptr, bootstrap_values_ptr, pid_n, gamma)
    groups = tl.cdiv(end, GROUP)
    for done in range(0, groups - start // GROUP, ROWS):
        first_t, offs_t, mask_t, group_whole = token_groups(groups - done, start, end, ROWS)
        is_whole = (groups - done) * GROUP <= num_tokens
        valid = mask_t
        if mask_ptr is not None:
            valid = mask_t & (load_groups(mask_ptr, first_t, mask_t, is_whole) != 0)
        value = tl.where(valid, load_groups(values_ptr, first_t, valid, is_whole).to(tl.float32), 0.0)
        reward = tl.where(valid, load_groups(rewards_ptr, first_t, valid, is_whole).to(tl.float32), 0.0)
        advantage, handed = _gae_tile(reward, value, valid, handed, gamma, gamma_lambda, ROWS)
        store_groups(advantages_ptr, first_t, advantage, mask_t, group_whole)
        store_groups(returns_ptr, first_t, advantage + value, mask_t, group_whole)


@triton.jit
def _move_to_delimiters(
    dpo_logps_ptr,
    dpo_ref_logps_ptr,
    response_mask_ptr,
    delimiter_mask_ptr,
    token_rewards_ptr,
    start,
    end,
    dpo_reward_scale,
    dpo_reward_clip,
    BLOCK_T: tl.constexpr,
):
    """(sum of a sequence's DPO rewards, the part after its last delimiter). With delimiters, stores each sentence's sum
    at its delimiter in `token_rewards`."""
    totals = tl.zeros((BLOCK_T,), tl.float32)
    rest = 0.0
    # Up to one position past the end: if the last token is a delimiter, the sentence that starts there has the sum 0.
    for done in range(0, end - start + 1, BLOCK_T):
        offs_t = start + done + tl.arange(0, BLOCK_T)
        mask_t = offs_t < end
        valid = tl.load(response_mask_ptr + offs_t, mask=mask_t, other=0) != 0
        log_ratio = tl.load(dpo_logps_ptr + offs_t, mask=valid, other=0.0).to(tl.float32)
        log_ratio -= tl.load(dpo_ref_logps_ptr + offs_t, mask=valid, other=0.0).to(tl.float32)
        clipped = _clip(dpo_reward_scale * log_ratio, dpo_reward_clip)
        totals += clipped
        if delimiter_mask_ptr is not None:
            before = (offs_t > start) & (offs_t <= end)
            starts = tl.load(response_mask_ptr + offs_t - 1, mask=before, other=0) != 0
            starts = starts & (tl.load(delimiter_mask_ptr + offs_t - 1, mask=before, other=0) != 0)
            starts, sums = tl.associative_scan((starts.to(tl.int32), clipped), 0, _join_sentences)
            sums = tl.where(starts != 0, sums, sums + rest)
            rest = _last(sums, BLOCK_T)
            is_delimiter = valid & (tl.load(delimiter_mask_ptr + offs_t, mask=mask_t, other=0) != 0)
            tl.store(token_rewards_ptr + offs_t, tl.where(is_delimiter, sums, 0.0), mask=mask_t)
    return tl.sum(totals), rest


@triton.jit
def _merge(count, mean, m2):
    """(count, mean, sum of squared deviations) of all samples of a block together, by Chan's formula."""
    total = tl.sum(count)
    centre = tl.sum(count * mean) / tl.maximum(total, 1.0)
    return total, centre, tl.sum(m2 + count * (mean - centre) * (mean - centre))


@triton.jit
def _add(x_1, y_1, z_1, x_2, y_2, z_2):
    return x_1 + x_2, y_1 + y_2, z_1 + z_2


@triton.jit(do_not_specialize=["num_tokens", "num_sequences"])
def rto_advantages_kernel(
    old_logps_ptr,
    ref_logps_ptr,
    dpo_logps_ptr,
    dpo_ref_logps_ptr,
    values_ptr,
    scores_ptr,
    cu_seqlens_ptr,
    response_mask_ptr,
    delimiter_mask_ptr,
    bootstrap_values_ptr,
    token_rewards_ptr,
    kl_ptr,
    advantages_ptr,
    returns_ptr,
    partials_ptr,
    num_tokens,
    num_sequences,
    dpo_reward_scale,
    dpo_reward_clip,
    kl_coef,
    score_scale,
    score_clip,
    gamma,
    gamma_lambda,
    GRANULARITY: tl.constexpr,
    SHAPING: tl.constexpr,
    ROWS: tl.constexpr,
):
    pid_n = tl.program_id(0)
    start, end, handed = _sequence(cu_seqlens_ptr, bootstrap_values_ptr, pid_n, gamma)

    # What is added to the reward of the last response token: the score, and what granularity and shaping move there.
    score = _clip(tl.load(scores_ptr + pid_n).to(tl.float32), score_clip)
    score = score_scale * score
    moved = 0.0
    if SHAPING or GRANULARITY != "token":
        total, rest = _move_to_delimiters(
            dpo_logps_ptr,
            dpo_ref_logps_ptr,
            response_mask_ptr,
            delimiter_mask_ptr,
            token_rewards_ptr,
            start,
            end,
            dpo_reward_scale,
            dpo_reward_clip,
            2 * ROWS,  # two tokens a thread; with four, registers spill
        )
        if SHAPING:
            score -= total
        if GRANULARITY == "sequence":
            moved = total
        if GRANULARITY == "sentence":
            moved = rest
            tl.debug_barrier()  # the sums on delimiters are read back below by other threads of this program
    on_top = moved + score
    handed += on_top  # tokens after the last response token hand it on unchanged

    last = start - 1  # index of the last response token, which is found first
    count = tl.zeros(
        (ROWS,), tl.float32
    )  # statistics of each thread; they are reduced once at the end, not once a tile
    mean = tl.zeros((ROWS,), tl.float32)
    m2 = tl.zeros((ROWS,), tl.float32)
    dpo_sum = tl.zeros((ROWS,), tl.float32)
    kl_sum = tl.zeros((ROWS,), tl.float32)
    clip_count = tl.zeros((ROWS,), tl.float32)
    groups = tl.cdiv(end, GROUP)
    for done in range(0, groups - start // GROUP, ROWS):
        first_t, offs_t, mask_t, group_whole = token_groups(groups - done, start, end, ROWS)
        is_whole = (groups - done) * GROUP <= num_tokens
        valid = mask_t & (load_groups(response_mask_ptr, first_t, mask_t, is_whole) != 0)
        # Groups without a response token are not read, so a prompt costs one byte a token, and its NaN cannot leak.
        old_logp = load_groups(old_logps_ptr, first_t, valid, is_whole).to(tl.float32)
        ref_logp = load_groups(ref_logps_ptr, first_t, valid, is_whole).to(tl.float32)
        dpo_logp = load_groups(dpo_logps_ptr, first_t, valid, is_whole).to(tl.float32)
        dpo_ref_logp = load_groups(dpo_ref_logps_ptr, first_t, valid, is_whole).to(tl.float32)
        value = tl.where(valid, load_groups(values_ptr, first_t, valid, is_whole).to(tl.float32), 0.0)
        kl = tl.where(valid, old_logp - ref_logp, 0.0)
        dense = tl.where(valid, dpo_reward_scale * (dpo_logp - dpo_ref_logp), 0.0)
        clipped = _clip(dense, dpo_reward_clip)
        if GRANULARITY == "token":
            reward = clipped - kl_coef * kl
        elif GRANULARITY == "sentence":
            moved_here = load_groups(token_rewards_ptr, first_t, valid, is_whole)
            reward = tl.where(valid, moved_here, 0.0) - kl_coef * kl
        else:
            reward = -kl_coef * kl
        # Values are stored and summed before the scan if possible, since registers limit how many programs an SM holds.
        store_groups(kl_ptr, first_t, kl, mask_t, group_whole)
        dpo_sum += tl.sum(clipped, 1)
        kl_sum += tl.sum(kl, 1)
        clip_count += tl.sum((clipped != dense).to(tl.float32), 1)
        if last < start:
            last = tl.max(tl.where(valid, offs_t, last))
        paid = tl.where(offs_t == last, reward + on_top, reward)
        store_groups(token_rewards_ptr, first_t, paid, mask_t, group_whole)

        advantage, handed = _gae_tile(reward, value, valid, handed, gamma, gamma_lambda, ROWS)
        store_groups(advantages_ptr, first_t, advantage, mask_t, group_whole)
        store_groups(returns_ptr, first_t, advantage + value, mask_t, group_whole)
        # Chan's formula; the second sample is a thread's four tokens.
        count_here = tl.sum(valid.to(tl.float32), 1)
        mean_here = tl.sum(advantage, 1) / tl.maximum(count_here, 1.0)
        deviation = tl.where(valid, advantage - mean_here[:, None], 0.0)
        share = count_here / tl.maximum(count + count_here, 1.0)
        shift = mean_here - mean
        m2 += tl.sum(deviation * deviation, 1) + shift * shift * count * share
        mean += shift * share
        count += count_here

    count, mean, m2 = _merge(count, mean, m2)
    dpo_sum, kl_sum, clip_count = tl.reduce((dpo_sum, kl_sum, clip_count), 0, _add)
    partials_ptr += pid_n
    tl.store(partials_ptr, count)
    tl.store(partials_ptr + num_sequences, mean)
    tl.store(partials_ptr + 2 * num_sequences, m2)
    tl.store(partials_ptr + 3 * num_sequences, dpo_sum)
    tl.store(partials_ptr + 4 * num_sequences, kl_sum)
    tl.store(partials_ptr + 5 * num_sequences, tl.where(last >= start, score, 0.0))
    tl.store(partials_ptr + 6 * num_sequences, clip_count)


@triton.jit
def _merge_partials(partials_ptr, num_sequences, BLOCK_N: tl.constexpr):
    """(count, mean, variance) of all tokens."""
    count = tl.zeros((BLOCK_N,), tl.float32)
    mean = tl.zeros((BLOCK_N,), tl.float32)
    m2 = tl.zeros((BLOCK_N,), tl.float32)
    for done in range(0, num_sequences, BLOCK_N):
        offs_n = done + tl.arange(0, BLOCK_N)
        mask_n = offs_n < num_sequences
        count_n = tl.load(partials_ptr + offs_n, mask=mask_n, other=0.0)
        mean_n = tl.load(partials_ptr + num_sequences + offs_n, mask=mask_n, other=0.0)
        m2_n = tl.load(partials_ptr + 2 * num_sequences + offs_n, mask=mask_n, other=0.0)
        share = count_n / tl.maximum(count + count_n, 1.0)
        deviation = mean_n - mean
        m2 += m2_n + deviation * deviation * count * share
        mean += deviation * share
        count += count_n
    count, mean, m2 = _merge(count, mean, m2)
    return count, mean, m2 / tl.maximum(count, 1.0)


@triton.jit(do_not_specialize=["num_tokens", "num_sequences"])
def rto_whiten_kernel(
    advantages_ptr,
    response_mask_ptr,
    partials_ptr,
    stats_ptr,
    num_tokens,
    num_sequences,
    WHITEN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Each program merges all partials in the same order, which is cheaper than another launch. The first program
    stores the statistics."""
    pid_t = tl.program_id(0)
    offs_t = pid_t * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = offs_t < num_tokens
    # A bound would split the accesses into single elements, so whole blocks have code without one.
    is_whole = (pid_t + 1) * BLOCK_T <= num_tokens
    if WHITEN:  # loaded first, so that they arrive while the partials are merged
        if is_whole:
            valid = tl.load(response_mask_ptr + offs_t) != 0
            advantage = tl.load(advantages_ptr + offs_t)
        else:
            valid = tl.load(response_mask_ptr + offs_t, mask=mask_t, other=0) != 0
            advantage = tl.load(advantages_ptr + offs_t, mask=mask_t, other=0.0)
    count, mean, variance = _merge_partials(partials_ptr, num_sequences, BLOCK_N)
    if WHITEN:
        scale = 1.0 / tl.sqrt(tl.maximum(variance, 1e-8))
        advantage = tl.where(valid, (advantage - mean) * scale, 0.0)
        if is_whole:
            tl.store(advantages_ptr + offs_t, advantage)
        else:
            tl.store(advantages_ptr + offs_t, advantage, mask=mask_t)
    if pid_t == 0:
        tl.store(stats_ptr, count)
        tl.store(stats_ptr + 1, mean)
        tl.store(stats_ptr + 2, variance)
        rows = 3 + tl.arange(0, 4)
        sums = tl.zeros((4, BLOCK_N), tl.float32)
        for done in range(0, num_sequences, BLOCK_N):
            offs_n = done + tl.arange(0, BLOCK_N)[None, :]
            sums += tl.load(
                partials_ptr + rows[:, None] * num_sequences + offs_n, mask=offs_n < num_sequences, other=0.0
            )
        tl.store(stats_ptr + rows, tl.sum(sums, 1))


def _tile(num_tokens: int, num_sequences: int) -> dict[str, int]:
    """Launch options: a tile holds the mean sequence, or less of it if the programs would not all fit on the GPU."""
    mean, share = triton.cdiv(num_tokens, max(num_sequences, 1)), RESIDENT_TOKENS // max(num_sequences, 1)
    tile = min(triton.next_power_of_2(mean), triton.next_power_of_2(share + 1) // 2, MAX_TILE)
    rows = max(tile // GROUP.value, 32)
    return {"ROWS": rows, "num_warps": rows // 32}


@torch.library.custom_op("rto_fast::gae", mutates_args=())
def _gae(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    mask: Tensor | None,
    bootstrap_values: Tensor | None,
    gamma: float,
    gae_lambda: float,
) -> tuple[Tensor, Tensor]:
    num_tokens, num_sequences = len(rewards), len(cu_seqlens) - 1
    advantages = torch.empty(num_tokens, dtype=torch.float32, device=rewards.device)
    returns = torch.empty_like(advantages)
    if num_tokens:
        with torch.cuda.device_of(rewards):
            gae_kernel[(num_sequences,)](
                *contiguous(rewards, values, cu_seqlens, mask, bootstrap_values),
                advantages,
                returns,
                num_tokens,
                gamma,
                gamma * gae_lambda,
                **_tile(num_tokens, num_sequences),
            )
    return advantages, returns


@_gae.register_fake
def _(rewards: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return rewards.new_empty(rewards.shape, dtype=torch.float32), rewards.new_empty(rewards.shape, dtype=torch.float32)


@torch.library.custom_op("rto_fast::rto_advantages", mutates_args=())
def _rto_advantages(
    old_logps: Tensor,
    ref_logps: Tensor,
    dpo_logps: Tensor,
    dpo_ref_logps: Tensor,
    values: Tensor,
    scores: Tensor,
    cu_seqlens: Tensor,
    response_mask: Tensor,
    delimiter_mask: Tensor | None,
    bootstrap_values: Tensor | None,
    dpo_reward_scale: float,
    dpo_reward_clip: float,
    kl_coef: float,
    score_scale: float,
    score_clip: float,
    gamma: float,
    gae_lambda: float,
    granularity: str,
    shaping: bool,
    whiten: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(token_rewards, kl, advantages, returns, the statistics that STATS names)."""
    num_tokens, num_sequences = len(old_logps), len(cu_seqlens) - 1
    outputs = [torch.empty(num_tokens, dtype=torch.float32, device=old_logps.device) for _ in range(4)]
    token_rewards, kl, advantages, returns = outputs
    stats = torch.empty(len(STATS), dtype=torch.float32, device=old_logps.device)
    partials = torch.empty(len(STATS), num_sequences, dtype=torch.float32, device=old_logps.device)
    response_mask, tile = response_mask.contiguous(), _tile(num_tokens, num_sequences)
    with torch.cuda.device_of(old_logps):
        if num_sequences:
            rto_advantages_kernel[(num_sequences,)](
                *contiguous(old_logps, ref_logps, dpo_logps, dpo_ref_logps, values, scores, cu_seqlens),
                response_mask,
                *contiguous(delimiter_mask if granularity == "sentence" else None, bootstrap_values),
                *outputs,
                partials,
                num_tokens,
                num_sequences,
                dpo_reward_scale,
                dpo_reward_clip or None,
                kl_coef,
                score_scale,
                score_clip or None,
                gamma,
                gamma * gae_lambda,
                GRANULARITY=granularity,
                SHAPING=shaping,
                **tile,
                maxnreg=LARGE_TILE_REGISTERS if tile["num_warps"] == 8 else None,
            )
        programs = triton.cdiv(num_tokens, BLOCK_WHITEN) if whiten else 1
        rto_whiten_kernel[(max(programs, 1),)](
            advantages,
            response_mask,
            partials,
            stats,
            num_tokens,
            num_sequences,
            WHITEN=whiten,
            BLOCK_T=BLOCK_WHITEN,
            BLOCK_N=BLOCK_N,
            num_warps=8,
        )
    return token_rewards, kl, advantages, returns, stats


@_rto_advantages.register_fake
def _(old_logps: Tensor, *_: Any) -> tuple[Tensor, ...]:
    new = [old_logps.new_empty(old_logps.shape, dtype=torch.float32) for _ in range(4)]
    return *new, old_logps.new_empty(len(STATS), dtype=torch.float32)


def gae(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    *,
    gamma: float = 1.0,
    gae_lambda: float = 0.95,
    mask: Tensor | None = None,
    bootstrap_values: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `rto_fast.ops.gae`. Not differentiable: advantages and returns are constants of the losses."""
    return _gae(rewards, values, cu_seqlens, mask, bootstrap_values, gamma, gae_lambda)


def rto_advantages(
    old_logps: Tensor,
    ref_logps: Tensor,
    dpo_logps: Tensor,
    values: Tensor,
    scores: Tensor,
    cu_seqlens: Tensor,
    response_mask: Tensor,
    *,
    dpo_ref_logps: Tensor | None = None,
    dpo_reward_scale: float = 0.05,
    dpo_reward_clip: float = 0.05,
    kl_coef: float = 0.01,
    score_scale: float = 1.0,
    score_clip: float = 10.0,
    gamma: float = 1.0,
    gae_lambda: float = 0.95,
    granularity: str = "token",
    delimiter_mask: Tensor | None = None,
    shaping: bool = False,
    bootstrap_values: Tensor | None = None,
    whiten: bool = True,
) -> RTOAdvantages:
    """See `rto_fast.ops.rto_advantages`. Not differentiable, like `gae`."""
    token_rewards, kl, advantages, returns, stats = _rto_advantages(
        old_logps,
        ref_logps,
        dpo_logps,
        ref_logps if dpo_ref_logps is None else dpo_ref_logps,
        values,
        scores,
        cu_seqlens,
        response_mask,
        delimiter_mask,
        bootstrap_values,
        dpo_reward_scale,
        dpo_reward_clip,
        kl_coef,
        score_scale,
        score_clip,
        gamma,
        gae_lambda,
        granularity,
        shaping,
        whiten,
    )
    return RTOAdvantages(token_rewards, kl, advantages, returns, dict(zip(STATS, stats.unbind())))
