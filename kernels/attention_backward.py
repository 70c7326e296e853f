"""The backward pass of causal attention within packed sequences, in two kernels without atomics: its bits repeat.

With P the weights, dP = dO·Vᵀ, Δ = rowsum(dO ∘ O) and dS = P ∘ (dP − Δ): dQ = dS·K, dK = dSᵀ·Q, dV = Pᵀ·dO (arXiv
2205.14135). P is computed again from the log-sum-exp. Both kernels do, so there are 7 products of tiles and not 5; in
return nothing is added up in memory, where FlashAttention adds float32 dQ by atomics, in an order that varies.

- `attention_dq_kernel` does a tile of queries of a head. It has dO at hand, so it also computes Δ for the other kernel.
- `attention_dkdv_kernel` does a tile of keys of a key head and walks the queries of all heads of its group, so keys are not
  repeated, nor their gradients added up afterwards.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rto_fast.kernels import attention_forward
from rto_fast.kernels.attention_forward import (
    base_2,
    bounds_of_launches,
    key_ranges,
    launch_options,
    load_rows,
    product,
    store_rows,
    visible,
    weights,
)
from rto_fast.kernels.common import EXACT


@triton.jit
def sum_of_rows(x):
    """The sum of each row in one order, whatever the tile. Neighbours are added up first, because a thread has them."""
    if x.shape[1] == 1:
        return tl.reshape(x, (x.shape[0],))
    else:
        left, right = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
        return sum_of_rows(left + right)


@triton.jit(do_not_specialize=["num_tokens"])
def attention_dq_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    out_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    cu_seqlens_ptr,
    stride_query_t,
    stride_query_h,
    stride_key_t,
    stride_key_h,
    stride_value_t,
    stride_value_h,
    stride_dout_t,
    stride_dout_h,
    stride_grad_t,
    num_tokens,
    scale,
    factor,
    cap,
    window,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pid_n = tl.program_id(2)
    pid_h = tl.program_id(1).to(tl.int64)
    num_heads = tl.num_programs(1)
    first = tl.load(cu_seqlens_ptr + pid_n)
    length = tl.load(cu_seqlens_ptr + pid_n + 1) - first
    begin_m = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M  # last tiles, which have most keys, first
    if begin_m >= length:
        return
    first = first.to(tl.int64)
    first_m = first + begin_m
    end_m = first + length
    positions = begin_m + tl.arange(0, BLOCK_M)

    query = load_rows(query_ptr + pid_h * stride_query_h, first_m, end_m, stride_query_t, HEAD_DIM, BLOCK_M, BLOCK_D)
    dout = load_rows(dout_ptr + pid_h * stride_dout_h, first_m, end_m, stride_dout_t, HEAD_DIM, BLOCK_M, BLOCK_D)
    out = load_rows(out_ptr + pid_h * HEAD_DIM, first_m, end_m, num_heads * HEAD_DIM, HEAD_DIM, BLOCK_M, BLOCK_D)
    delta = dout.to(tl.float32) * out.to(tl.float32)
    # Larger heads have one tile only, and would spill registers on an A100.
    delta = sum_of_rows(delta) if BLOCK_D <= 128 else tl.sum(delta, 1)
    rows = pid_h * num_tokens + first_m + tl.arange(0, BLOCK_M)
    lse = tl.load(lse_ptr + rows, mask=positions < length, other=0.0)
    tl.store(delta_ptr + rows, delta, mask=positions < length)

    key_ptr += pid_h // GROUP * stride_key_h
    value_ptr += pid_h // GROUP * stride_value_h
    end = tl.minimum(begin_m + BLOCK_M, length)
    begin, edge, full = key_ranges(begin_m, end, window, BLOCK_N)
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(begin, end, BLOCK_N):
        key = load_rows(key_ptr, first + start, end_m, stride_key_t, HEAD_DIM, BLOCK_N, BLOCK_D)
        value = load_rows(value_ptr, first + start, end_m, stride_value_t, HEAD_DIM, BLOCK_N, BLOCK_D)
        x = product(query, tl.trans(key), key.dtype)
        p, derivative = weights(x, lse[:, None], factor, cap)
        if start < edge or start >= full:
            p = tl.where(visible(positions[:, None], (start + tl.arange(0, BLOCK_N))[None, :], window), p, 0.0)
        dp = product(dout, tl.trans(value), value.dtype)
        dq = product(p * (dp - delta[:, None]) * derivative, key, key.dtype, dq)
    store_rows(dq_ptr + pid_h * HEAD_DIM, dq * scale, first_m, end_m, stride_grad_t, HEAD_DIM, BLOCK_M, BLOCK_D)


@triton.jit(do_not_specialize=["num_tokens"])
def attention_dkdv_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    cu_seqlens_ptr,
    stride_query_t,
    stride_query_h,
    stride_key_t,
    stride_key_h,
    stride_value_t,
    stride_value_h,
    stride_dout_t,
    stride_dout_h,
    stride_grad_t,
    num_tokens,
    scale,
    factor,
    cap,
    window,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Tiles are transposed, [keys, queries], so that dK and dV add up products whose first factor is at hand."""
    pid_n = tl.program_id(2)
    pid_h = tl.program_id(1).to(tl.int64)
    first = tl.load(cu_seqlens_ptr + pid_n)
    length = tl.load(cu_seqlens_ptr + pid_n + 1) - first
    begin_n = tl.program_id(0) * BLOCK_N  # first tiles, which most queries see, first
    if begin_n >= length:
        return
    first = first.to(tl.int64)
    first_n = first + begin_n
    end_n = first + length
    keys = begin_n + tl.arange(0, BLOCK_N)

    key = load_rows(key_ptr + pid_h * stride_key_h, first_n, end_n, stride_key_t, HEAD_DIM, BLOCK_N, BLOCK_D)
    value = load_rows(value_ptr + pid_h * stride_value_h, first_n, end_n, stride_value_t, HEAD_DIM, BLOCK_N, BLOCK_D)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    # Queries [begin_n, end) see one of the keys; blocks within [full, edge) see all.
    end = length
    edge = length
    full = begin_n + BLOCK_N
    if window is not None:
        end = tl.minimum(begin_n + BLOCK_N - 1 + window, length)
        edge = begin_n + window
    num_blocks = tl.cdiv(end - begin_n, BLOCK_M)
    for i in range(GROUP * num_blocks):  # one loop, because each end of a loop waits for loads
        head = pid_h * GROUP + i // num_blocks
        begin_m = begin_n + i % num_blocks * BLOCK_M
        positions = begin_m + tl.arange(0, BLOCK_M)
        first_m = first + begin_m
        query = load_rows(query_ptr + head * stride_query_h, first_m, end_n, stride_query_t, HEAD_DIM, BLOCK_M, BLOCK_D)
        dout = load_rows(dout_ptr + head * stride_dout_h, first_m, end_n, stride_dout_t, HEAD_DIM, BLOCK_M, BLOCK_D)
        rows = head * num_tokens + first_m + tl.arange(0, BLOCK_M)
        lse = tl.load(lse_ptr + rows, mask=positions < length, other=0.0)
        delta = tl.load(delta_ptr + rows, mask=positions < length, other=0.0)
        x = product(key, tl.trans(query), key.dtype)
        dp = product(value, tl.trans(dout), value.dtype)
        p, derivative = weights(x, lse[None, :], factor, cap)
        if begin_m < full or begin_m + BLOCK_M > edge:
            p = tl.where(visible(positions[None, :], keys[:, None], window), p, 0.0)
        dv = product(p, dout, dout.dtype, dv)
        dk = product(p * (dp - delta[None, :]) * derivative, query, query.dtype, dk)
    at = pid_h * HEAD_DIM
    store_rows(dk_ptr + at, dk * scale, first_n, end_n, stride_grad_t, HEAD_DIM, BLOCK_N, BLOCK_D)
    store_rows(dv_ptr + at, dv, first_n, end_n, stride_grad_t, HEAD_DIM, BLOCK_N, BLOCK_D)


def _launch_options(query: Tensor, max_seqlen: int) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """(rows of a tile, block sizes and launch options of both kernels), by which nothing spills registers."""
    rows, options = launch_options(query, max_seqlen)
    options = options | {"maxnreg": 255}  # by itself ptxas would spill, to make room for more programs
    is_16_bit, is_wide = query.element_size() == 2, options["BLOCK_D"] > 128
    keys, queries = (64 if is_16_bit and options["BLOCK_D"] <= 64 else 32), 32
    if is_wide:
        queries = 16
    if not is_16_bit and options["BLOCK_D"] > 64:
        keys, queries = 16, 16
    dkdv_options = options
    if is_16_bit and attention_forward.architecture(query.device) // 10 not in (9, 10):
        # Tensor cores that do not read shared memory: keys and values take registers too.
        rows, queries, dkdv_options = 64, 32, options | {"num_warps": 8}
        options = options | {"num_warps": 8 if is_wide else 4}
    return (
        rows,
        {"BLOCK_M": rows, "BLOCK_N": keys, **options},
        {"BLOCK_M": queries, "BLOCK_N": rows, **dkdv_options},
    )


def attention_backward(
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value: views of one contiguous tensor [T, num_heads + 2·num_kv_heads, head_dim].

    Args:
        dout: [T, num_heads, head_dim], with any strides.
        out, lse: the results of `attention_forward`.
    """
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads = key.shape[1]
    grads = torch.empty(num_tokens, num_heads + 2 * num_kv_heads, head_dim, dtype=query.dtype, device=query.device)
    dq, dk, dv = grads.split([num_heads, num_kv_heads, num_kv_heads], 1)
    if not num_tokens:
        return dq, dk, dv
    if dout.stride(-1) != 1:
        dout = dout.contiguous()
    delta = torch.empty_like(lse)
    factor, cap = base_2(scale, softcap)
    strides = [stride for x in (query, key, value, dout) for stride in x.stride()[:2]]
    numbers = (*strides, grads.stride(0), num_tokens, scale, factor, cap, window)
    sizes = {"GROUP": num_heads // num_kv_heads, "HEAD_DIM": head_dim, **EXACT}
    rows, dq_options, dkdv_options = _launch_options(query, max_seqlen)
    tiles = triton.cdiv(max_seqlen, rows)
    with torch.cuda.device_of(query):
        for bounds in bounds_of_launches(cu_seqlens):
            sequences = len(bounds) - 1
            attention_dq_kernel[(tiles, num_heads, sequences)](
                query, key, value, out, dout, lse, delta, dq, bounds, *numbers, **sizes, **dq_options
            )
            attention_dkdv_kernel[(tiles, num_kv_heads, sequences)](
                query, key, value, dout, lse, delta, dk, dv, bounds, *numbers, **sizes, **dkdv_options
            )
    return dq, dk, dv
