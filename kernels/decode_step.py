"""The bookkeeping of a decode step: one kernel before the forward pass and one after the draw, instead of two dozen.

A slot holds a sequence that is being decoded, and a row holds the results of a sample. The tensors are those of
`rto_fast.rollout.decode.DecodeState`, [slots] int64 unless stated otherwise. Each kernel is compiled once for all
sizes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 64


@triton.jit(do_not_specialize=["stride_tables", "stride_uniforms", "count", "min_new_tokens"])
def begin_step_kernel(
    lengths_ptr,
    active_ptr,
    tables_ptr,
    rows_ptr,
    generated_ptr,
    uniforms_ptr,
    slots_ptr,
    kv_lengths_ptr,
    drawn_ptr,
    allowed_ptr,
    stride_tables,
    stride_uniforms,
    count,
    min_new_tokens,
    PAGE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < count
    active = tl.load(active_ptr + offs, mask=mask, other=0) != 0
    length = tl.load(lengths_ptr + offs, mask=mask, other=0)
    page = tl.load(tables_ptr + offs.to(tl.int64) * stride_tables + length // PAGE_SIZE, mask=active, other=0)
    slot = page.to(tl.int64) * PAGE_SIZE + length % PAGE_SIZE
    tl.store(slots_ptr + offs, tl.where(active, slot, -1), mask=mask)
    tl.store(kv_lengths_ptr + offs, tl.where(active, length + 1, 0).to(tl.int32), mask=mask)
    generated = tl.load(generated_ptr + offs, mask=mask, other=0)
    at = tl.load(rows_ptr + offs, mask=mask, other=0) * stride_uniforms + 2 * generated
    for i in tl.static_range(2):
        tl.store(drawn_ptr + 2 * offs + i, tl.load(uniforms_ptr + at + i, mask=mask, other=0.0), mask=mask)
    tl.store(allowed_ptr + offs, generated >= min_new_tokens, mask=mask)


@triton.jit(
    do_not_specialize=["num_stops", "stride_rows", "idle_row", "count", "grow"],
    # Tensors begin at any slot where new sequences begin.
    do_not_specialize_on_alignment=[
        "token_ptr",
        "logp_ptr",
        "sampling_logp_ptr",
        "rows_ptr",
        "generated_ptr",
        "active_ptr",
        "limits_ptr",
        "lengths_ptr",
        "input_ids_ptr",
    ],
)
def finish_step_kernel(
    token_ptr,
    logp_ptr,
    sampling_logp_ptr,
    stop_ids_ptr,
    rows_ptr,
    generated_ptr,
    active_ptr,
    limits_ptr,
    lengths_ptr,
    input_ids_ptr,
    tokens_ptr,
    logps_ptr,
    sampling_logps_ptr,
    counts_ptr,
    done_ptr,
    num_stops,
    stride_rows,
    idle_row,
    count,
    grow,
    BLOCK: tl.constexpr,
):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < count
    row = tl.load(rows_ptr + offs, mask=mask, other=0)
    generated = tl.load(generated_ptr + offs, mask=mask, other=0)
    active = tl.load(active_ptr + offs, mask=mask, other=0) != 0
    token = tl.load(token_ptr + offs, mask=mask, other=0)
    at = row * stride_rows + generated
    tl.store(tokens_ptr + at, token, mask=mask)
    tl.store(logps_ptr + at, tl.load(logp_ptr + offs, mask=mask, other=0.0), mask=mask)
    tl.store(sampling_logps_ptr + at, tl.load(sampling_logp_ptr + offs, mask=mask, other=0.0), mask=mask)
    tl.store(input_ids_ptr + offs, token, mask=mask)

    generated += active.to(tl.int64)
    done = generated >= tl.load(limits_ptr + offs, mask=mask, other=0)
    for i in range(num_stops):
        done = done | (token == tl.load(stop_ids_ptr + i))
    length = tl.load(lengths_ptr + offs, mask=mask, other=0)
    tl.store(lengths_ptr + offs, length + (active & (grow != 0)).to(tl.int64), mask=mask)
    tl.store(generated_ptr + offs, generated, mask=mask)
    tl.store(counts_ptr + row, generated, mask=mask)
    tl.store(done_ptr + row, done, mask=mask)
    tl.store(active_ptr + offs, active & ~done, mask=mask)
    tl.store(rows_ptr + offs, tl.where(done, idle_row, row), mask=mask)


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
    """Computes the inputs of a step.

    Args:
        lengths: tokens in the cache.
        active: [slots] bool.
        block_tables: [slots, blocks] int32.
        rows: rows of the slots in `uniforms`.
        generated: tokens generated so far, the columns in `uniforms`.
        uniforms: [rows, tokens, 2] float32, random numbers.
    Returns:
        slots: where the keys and values of this step go, −1 for an idle slot.
        kv_lengths: [slots] int32, tokens to attend to, 0 for an idle slot.
        drawn: [slots, 2] float32, the random numbers of this step.
        allowed: [slots] bool, whether `min_new_tokens` have been generated.
    """
    count = len(lengths)
    slots, kv_lengths = torch.empty_like(lengths), torch.empty_like(lengths, dtype=torch.int32)
    drawn, allowed = uniforms.new_empty(count, 2), torch.empty_like(active)
    with torch.cuda.device_of(lengths):
        begin_step_kernel[(triton.cdiv(count, BLOCK),)](
            lengths,
            active,
            block_tables,
            rows,
            generated,
            uniforms,
            slots,
            kv_lengths,
            drawn,
            allowed,
            block_tables.stride(0),
            uniforms.stride(0),
            count,
            min_new_tokens,
            PAGE_SIZE=page_size,
            BLOCK=BLOCK,
            num_warps=2,
        )
    return slots, kv_lengths, drawn, allowed


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
    """Records the tokens drawn, in place. A slot whose sequence is done becomes idle, and its row is then the last one.

    Args:
        drawn: (tokens, logps, sampling_logps); log-probs are float32.
        stop_ids: [stops], the stop tokens.
        active: [slots] bool.
        limits: maximal number of tokens of each sequence.
        lengths: tokens in the cache.
        input_ids: input of the next step.
        tokens, logps, sampling_logps: [rows, most tokens + 1], results.
        counts: [rows], number of tokens.
        done: [rows] bool.
        grow: whether the step stored a token in the cache, which is not so if prefill logits were drawn from.
    """
    count = len(rows)
    with torch.cuda.device_of(rows):
        finish_step_kernel[(triton.cdiv(count, BLOCK),)](
            *drawn,
            stop_ids,
            rows,
            generated,
            active,
            limits,
            lengths,
            input_ids,
            tokens,
            logps,
            sampling_logps,
            counts,
            done,
            len(stop_ids),
            tokens.stride(0),
            len(tokens) - 1,
            count,
            int(grow),
            BLOCK=BLOCK,
            num_warps=2,
        )
