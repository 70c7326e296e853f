"""Rotary embedding of queries and keys, with the norms of heads before it: one kernel for training, prefill and decoding.

A kernel of a decode step costs about 2 µs before it reads a byte. So one does the norms of heads, the rotary embedding and
the stores to the cache, which touch the same elements. In training it writes to a new buffer instead, with the same bits: a
tile follows from the shape of a token alone. It rounds where transformers' modules round, as `rms_norm.py` does, so the keys
of a token are those of the training forward, bit by bit, if the GEMMs are.

A program does BLOCK_H heads of a token. A head has up to three parts: the two halves of what is rotated, and the rest.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rto_fast.kernels.common import EXACT, cdiv
from rto_fast.kernels.paged_attention import cache_pointers
from rto_fast.kernels.weight_gradients import rows_per_program, sum_partials


@triton.jit
def _head_weight(weight_ptr, offs, mask, UNIT_OFFSET: tl.constexpr):
    """The weights of a part of each head, [BLOCK_H, part]; `weight_ptr` has a pointer for each head."""
    weight = tl.load(weight_ptr[:, None] + offs[None, :], mask=mask, other=0.0).to(tl.float32)
    return 1.0 + weight if UNIT_OFFSET else weight


@triton.jit
def _load_rope(rope_ptr, token, mask, HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr):
    """Cosines and sines of a token, once for each head: the compiler lays them out as what they are multiplied with."""
    offs = tl.zeros((BLOCK_H,), tl.int32)[:, None] + tl.arange(0, BLOCK_D)[None, :]
    rope_ptr += token * (4 * HALF) + HALF
    cos = tl.load(rope_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    return cos, tl.load(rope_ptr + 2 * HALF + offs, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _normalise(x, scale, weight, dtype: tl.constexpr, UNIT_OFFSET: tl.constexpr):
    x = x * scale
    if not UNIT_OFFSET:
        x = x.to(dtype).to(tl.float32)
    return (x * weight).to(dtype).to(tl.float32)


@triton.jit
def _store_part(part, offs, mask, out_ptr, k_ptr, v_ptr, cache_rows, slot, is_key, is_value, HEAD_DIM: tl.constexpr):
    """Stores a part of each head where the head belongs; without a cache (k_ptr is None) all go to `out`."""
    if k_ptr is None:
        tl.store(out_ptr + offs[None, :], part, mask=mask)
    else:
        tl.store(out_ptr + offs[None, :], part, mask=mask & ~is_value[:, None])  # a prefill's attention reads keys here
        if slot >= 0:
            cached = cache_rows[:, None] * HEAD_DIM + offs[None, :]
            tl.store(k_ptr + cached, part, mask=mask & is_key[:, None])
            tl.store(v_ptr + cached, part, mask=mask & is_value[:, None])


@triton.jit
def rotary_kernel(
    qkv_ptr,
    rope_ptr,
    query_norm_ptr,
    key_norm_ptr,
    out_ptr,
    addresses_ptr,
    slots_ptr,
    stride_qkv_t,
    stride_out_t,
    eps,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """`out` may be `qkv` if there is a cache; then values go to the cache alone."""
    REST: tl.constexpr = HEAD_DIM - 2 * HALF
    pid_t = tl.program_id(0).to(tl.int64)
    offs_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    offs_d = tl.arange(0, BLOCK_D)
    is_query = offs_h < NUM_HEADS
    is_value = offs_h >= NUM_HEADS + NUM_KV_HEADS
    is_key = ~is_query & ~is_value
    mask_h = (offs_h < NUM_HEADS + 2 * NUM_KV_HEADS)[:, None]
    mask_d = offs_d < HALF
    mask = mask_h & mask_d[None, :]
    at = qkv_ptr + pid_t * stride_qkv_t + offs_h[:, None] * HEAD_DIM
    low = tl.load(at + offs_d[None, :], mask=mask, other=0.0)
    high = tl.load(at + HALF + offs_d[None, :], mask=mask, other=0.0)
    if REST:
        offs_r = tl.arange(0, BLOCK_REST)
        mask_r = offs_r < REST
        rest = tl.load(at + 2 * HALF + offs_r[None, :], mask=mask_h & mask_r[None, :], other=0.0)
    dtype = low.dtype
    # All loads are issued before the first is waited for.
    if rope_ptr is not None:
        cos, sin = _load_rope(rope_ptr, pid_t, mask, HALF, BLOCK_H, BLOCK_D)
    slot = 0
    k_ptr = None
    v_ptr = None
    cache_rows = None
    if addresses_ptr is not None:
        slot = tl.load(slots_ptr + pid_t)
        k_ptr, v_ptr = cache_pointers(addresses_ptr, dtype)
        head = tl.where(is_value, offs_h - NUM_HEADS - NUM_KV_HEADS, offs_h - NUM_HEADS)
        cache_rows = (slot // PAGE_SIZE * NUM_KV_HEADS + head) * PAGE_SIZE + slot % PAGE_SIZE
    a = low.to(tl.float32)
    b = high.to(tl.float32)
    if query_norm_ptr is not None:
        weight_ptr = tl.where(is_query, query_norm_ptr, key_norm_ptr)
        weight_low = _head_weight(weight_ptr, offs_d, mask, UNIT_OFFSET)
        weight_high = _head_weight(weight_ptr, HALF + offs_d, mask, UNIT_OFFSET)
        squares = tl.sum(a * a + b * b, 1)
        if REST:
            c = rest.to(tl.float32)
            squares += tl.sum(c * c, 1)
        scale = tl.rsqrt(squares * (1.0 / HEAD_DIM) + eps)[:, None]
        a = _normalise(a, scale, weight_low, dtype, UNIT_OFFSET)
        b = _normalise(b, scale, weight_high, dtype, UNIT_OFFSET)
        if REST:
            weight_rest = _head_weight(weight_ptr, 2 * HALF + offs_r, mask_h & mask_r[None, :], UNIT_OFFSET)
            rest = tl.where(is_value[:, None], rest, _normalise(c, scale, weight_rest, dtype, UNIT_OFFSET).to(dtype))
    if rope_ptr is not None:
        turned = (a * cos).to(dtype).to(tl.float32) - (b * sin).to(dtype).to(tl.float32)
        b = (b * cos).to(dtype).to(tl.float32) + (a * sin).to(dtype).to(tl.float32)
        a = turned
    low = tl.where(is_value[:, None], low, a.to(dtype))
    high = tl.where(is_value[:, None], high, b.to(dtype))
    out_ptr += pid_t * stride_out_t + offs_h[:, None] * HEAD_DIM
    _store_part(low, offs_d, mask, out_ptr, k_ptr, v_ptr, cache_rows, slot, is_key, is_value, HEAD_DIM)
    _store_part(high, HALF + offs_d, mask, out_ptr, k_ptr, v_ptr, cache_rows, slot, is_key, is_value, HEAD_DIM)
    if REST:
        mask = mask_h & mask_r[None, :]
        _store_part(rest, 2 * HALF + offs_r, mask, out_ptr, k_ptr, v_ptr, cache_rows, slot, is_key, is_value, HEAD_DIM)


@triton.jit(do_not_specialize=["num_tokens", "tokens_per_program"])
def rotary_bwd_kernel(
    dquery_ptr,
    dkey_ptr,
    dvalue_ptr,
    qkv_ptr,
    rope_ptr,
    query_norm_ptr,
    key_norm_ptr,
    dqkv_ptr,
    partials_ptr,
    stride_dquery_t,
    stride_dquery_h,
    stride_dkey_t,
    stride_dkey_h,
    stride_dvalue_t,
    stride_dvalue_h,
    stride_qkv_t,
    num_tokens,
    tokens_per_program,
    eps,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """Rotates back, then the gradient of the norms; partials [programs, 2, HEAD_DIM] are those of their weights."""
    REST: tl.constexpr = HEAD_DIM - 2 * HALF
    NUM_ROWS: tl.constexpr = NUM_HEADS + 2 * NUM_KV_HEADS
    offs_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    offs_d = tl.arange(0, BLOCK_D)
    is_query = offs_h < NUM_HEADS
    is_value = offs_h >= NUM_HEADS + NUM_KV_HEADS
    is_key = ~is_query & ~is_value
    mask_h = (offs_h < NUM_ROWS)[:, None]
    mask_d = offs_d < HALF
    mask = mask_h & mask_d[None, :]
    # Gradients of queries, keys and values lie in three tensors.
    head = tl.where(is_query, offs_h, tl.where(is_key, offs_h - NUM_HEADS, offs_h - NUM_HEADS - NUM_KV_HEADS))
    stride_t = tl.where(is_query, stride_dquery_t, tl.where(is_key, stride_dkey_t, stride_dvalue_t)).to(tl.int64)
    stride_h = tl.where(is_query, stride_dquery_h, tl.where(is_key, stride_dkey_h, stride_dvalue_h))
    base = tl.where(is_query, dquery_ptr, tl.where(is_key, dkey_ptr, dvalue_ptr)) + head * stride_h
    if REST:
        offs_r = tl.arange(0, BLOCK_REST)
        mask_r = offs_r < REST
        mask_rest = mask_h & mask_r[None, :]
    if query_norm_ptr is not None:
        weight_ptr = tl.where(is_query, query_norm_ptr, key_norm_ptr)
        sum_low = tl.zeros((BLOCK_H, BLOCK_D), tl.float32)
        sum_high = tl.zeros((BLOCK_H, BLOCK_D), tl.float32)
        if REST:
            sum_rest = tl.zeros((BLOCK_H, BLOCK_REST), tl.float32)

    begin = tl.program_id(0) * tokens_per_program
    for t in range(begin, tl.minimum(begin + tokens_per_program, num_tokens)):
        token = tl.cast(t, tl.int64)
        source = (base + token * stride_t)[:, None]
        da = tl.load(source + offs_d[None, :], mask=mask, other=0.0)
        db = tl.load(source + HALF + offs_d[None, :], mask=mask, other=0.0)
        dtype = da.dtype
        da = da.to(tl.float32)
        db = db.to(tl.float32)
        if REST:
            dc = tl.load(source + 2 * HALF + offs_r[None, :], mask=mask_rest, other=0.0).to(tl.float32)
        if rope_ptr is not None:
            cos, sin = _load_rope(rope_ptr, token, mask, HALF, BLOCK_H, BLOCK_D)
            turned = tl.where(is_value[:, None], da, da * cos + db * sin)
            db = tl.where(is_value[:, None], db, db * cos - da * sin)
            da = turned
        if query_norm_ptr is not None:
            at = qkv_ptr + token * stride_qkv_t + offs_h[:, None] * HEAD_DIM
            has_norm = ~is_value[:, None]
            a = tl.load(at + offs_d[None, :], mask=mask & has_norm, other=0.0).to(tl.float32)
            b = tl.load(at + HALF + offs_d[None, :], mask=mask & has_norm, other=0.0).to(tl.float32)
            squares = tl.sum(a * a + b * b, 1)
            if REST:
                c = tl.load(at + 2 * HALF + offs_r[None, :], mask=mask_rest & has_norm, other=0.0).to(tl.float32)
                squares += tl.sum(c * c, 1)
            scale = tl.rsqrt(squares * (1.0 / HEAD_DIM) + eps)[:, None]
            a = a * scale
            b = b * scale
            if REST:
                c = c * scale
            if partials_ptr is not None:  # the weight's factor was rounded
                sum_low += da * (a if UNIT_OFFSET else a.to(dtype).to(tl.float32))
                sum_high += db * (b if UNIT_OFFSET else b.to(dtype).to(tl.float32))
                if REST:
                    sum_rest += dc * (c if UNIT_OFFSET else c.to(dtype).to(tl.float32))
            # From the L1 cache: kept in registers over the loop they would cost programs.
            da = tl.where(has_norm, da * _head_weight(weight_ptr, offs_d, mask, UNIT_OFFSET), da)
            db = tl.where(has_norm, db * _head_weight(weight_ptr, HALF + offs_d, mask, UNIT_OFFSET), db)
            mean = tl.sum(da * a + db * b, 1)
            if REST:
                dc = tl.where(has_norm, dc * _head_weight(weight_ptr, 2 * HALF + offs_r, mask_rest, UNIT_OFFSET), dc)
                mean += tl.sum(dc * c, 1)
            mean = (mean * (1.0 / HEAD_DIM))[:, None]
            da = tl.where(has_norm, (da - a * mean) * scale, da)
            db = tl.where(has_norm, (db - b * mean) * scale, db)
            if REST:
                dc = tl.where(has_norm, (dc - c * mean) * scale, dc)
        out = dqkv_ptr + token * (NUM_ROWS * HEAD_DIM) + offs_h[:, None] * HEAD_DIM
        tl.store(out + offs_d[None, :], da.to(dtype), mask=mask)
        tl.store(out + HALF + offs_d[None, :], db.to(dtype), mask=mask)
        if REST:
            tl.store(out + 2 * HALF + offs_r[None, :], dc.to(dtype), mask=mask_rest)

    if partials_ptr is not None:
        program = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        partials_ptr += program * (2 * HEAD_DIM)
        for is_head in tl.static_range(2):
            chosen = (is_key if is_head else is_query)[:, None]
            at_weight = partials_ptr + is_head * HEAD_DIM
            tl.store(at_weight + offs_d, tl.sum(tl.where(chosen, sum_low, 0.0), 0), mask=mask_d)
            tl.store(at_weight + HALF + offs_d, tl.sum(tl.where(chosen, sum_high, 0.0), 0), mask=mask_d)
            if REST:
                tl.store(at_weight + 2 * HALF + offs_r, tl.sum(tl.where(chosen, sum_rest, 0.0), 0), mask=mask_r)


@cache
def _tile(num_rows: int, head_dim: int, rotated: int, itemsize: int) -> dict[str, int]:
    """Block sizes and warps. Each thread reads two times 128 bits."""
    half = rotated // 2
    block_h = min(triton.next_power_of_2(num_rows), 16)
    block_d = triton.next_power_of_2(half)
    num_warps = min(max(block_h * triton.next_power_of_2(head_dim) * itemsize // 1024, 1), 8)
    block_rest = triton.next_power_of_2(max(head_dim - 2 * half, 1))
    return {"HALF": half, "BLOCK_H": block_h, "BLOCK_D": block_d, "BLOCK_REST": block_rest, "num_warps": num_warps}


def _rotated(head_dim: int, rope: Tensor | None) -> int:
    """How many elements of a head are in two halves; without `rope` all."""
    return head_dim if rope is None else rope.shape[2]


def _launch(
    qkv: Tensor,
    rope: Tensor | None,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    out: Tensor,
    addresses: Tensor | None,
    slots: Tensor | None,
    num_heads: int,
    num_kv_heads: int,
    page_size: int,
    eps: float,
    unit_offset: bool,
) -> None:
    num_tokens, num_rows, head_dim = qkv.shape
    if not num_tokens:
        return
    tile = _tile(num_rows, head_dim, _rotated(head_dim, rope), qkv.element_size())
    with torch.cuda.device_of(qkv):
        rotary_kernel[(num_tokens, cdiv(num_rows, tile["BLOCK_H"]))](
            qkv,
            rope,
            query_norm,
            key_norm,
            out,
            addresses,
            slots,
            qkv.stride(0),
            out.stride(0),
            eps,
            NUM_HEADS=num_heads,
            NUM_KV_HEADS=num_kv_heads,
            HEAD_DIM=head_dim,
            PAGE_SIZE=page_size,
            UNIT_OFFSET=unit_offset,
            **tile,
            **EXACT,
        )


def _forward(
    qkv: Tensor,
    rope: Tensor | None,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    num_heads: int,
    num_kv_heads: int,
    eps: float,
    unit_offset: bool,
) -> Any:
    """Queries, keys and values, views of one buffer."""
    out = torch.empty_like(qkv)
    _launch(qkv, rope, query_norm, key_norm, out, None, None, num_heads, num_kv_heads, 0, eps, unit_offset)
    return out.split_with_sizes([num_heads, num_kv_heads, num_kv_heads], 1)


def _dense_heads(x: Tensor) -> Tensor:
    """x [T, heads, head_dim] such that a token's heads follow each other."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        rope: Tensor | None,
        query_norm: Tensor | None,
        key_norm: Tensor | None,
        num_heads: int,
        num_kv_heads: int,
        eps: float,
        unit_offset: bool,
    ) -> Any:
        ctx.save_for_backward(None if query_norm is None else qkv, rope)
        # Not saved by autograd: gradient checkpointing would hand out copies, which have no `main_grad`.
        ctx.norms = query_norm, key_norm
        ctx.settings = qkv.shape, num_heads, num_kv_heads, eps, unit_offset
        return _forward(qkv, rope, query_norm, key_norm, num_heads, num_kv_heads, eps, unit_offset)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        qkv, rope = ctx.saved_tensors
        (num_tokens, num_rows, head_dim), num_heads, num_kv_heads, eps, unit_offset = ctx.settings
        gradients = [x if x.stride(2) == 1 else x.contiguous() for x in gradients]
        like = gradients[0]
        dqkv = like.new_empty((num_tokens, num_rows, head_dim))
        tile = _tile(num_rows, head_dim, _rotated(head_dim, rope), like.element_size())
        blocks = cdiv(num_rows, tile["BLOCK_H"])
        needs_sums = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
        tokens = rows_per_program(num_tokens, 1) if needs_sums else 1
        programs = cdiv(num_tokens, tokens)
        partials = None
        if needs_sums:
            partials = like.new_empty((programs * blocks, 2, head_dim), dtype=torch.float32)
        if num_tokens:
            with torch.cuda.device_of(like):
                rotary_bwd_kernel[(programs, blocks)](
                    *gradients,
                    qkv,
                    rope,
                    *ctx.norms,
                    dqkv,
                    partials,
                    *(stride for x in gradients for stride in (x.stride(0), x.stride(1))),
                    0 if qkv is None else qkv.stride(0),
                    num_tokens,
                    tokens,
                    eps,
                    NUM_HEADS=num_heads,
                    NUM_KV_HEADS=num_kv_heads,
                    HEAD_DIM=head_dim,
                    UNIT_OFFSET=unit_offset,
                    **tile,
                )
        dnorms: list[Tensor | None] = [None, None]
        if partials is not None:
            needed = [norm if needs else None for norm, needs in zip(ctx.norms, ctx.needs_input_grad[2:4])]
            dnorms = sum_partials(partials, needed)
        return dqkv, None, *dnorms, None, None, None, None


def rotary_embedding(
    qkv: Tensor,
    rope: Tensor | None,
    *,
    num_heads: int,
    num_kv_heads: int,
    query_norm: Tensor | None = None,
    key_norm: Tensor | None = None,
    eps: float = 0.0,
    unit_offset: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `rto_fast.layer_ops.rotary_embedding`."""
    qkv, rope = _dense_heads(qkv), rope if rope is None else rope.contiguous()
    norms = () if query_norm is None or key_norm is None else (query_norm, key_norm)
    if torch.is_grad_enabled() and (
        qkv.requires_grad or (norms and (norms[0].requires_grad or norms[1].requires_grad))
    ):
        return _Rotary.apply(qkv, rope, query_norm, key_norm, num_heads, num_kv_heads, eps, unit_offset)
    return _forward(qkv, rope, query_norm, key_norm, num_heads, num_kv_heads, eps, unit_offset)


def rotate_and_store(
    qkv: Tensor,
    rope: Tensor | None,
    addresses: Tensor,
    slots: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    page_size: int,
    query_norm: Tensor | None = None,
    key_norm: Tensor | None = None,
    eps: float = 0.0,
    unit_offset: bool = False,
) -> None:
    """`rotary_embedding` in place, which also stores keys and values in a layer's cache; no gradients.

    Args:
        qkv: [T, num_heads + 2·num_kv_heads, head_dim]; the heads of a token follow each other in memory.
        rope: [T, 2, R] contiguous, or None.
        addresses, slots, page_size: as for `rto_fast.kernels.paged_attention.store_kv`.
        query_norm, key_norm, eps, unit_offset: as for `rto_fast.layer_ops.rotary_embedding`.
    """
    _launch(
        qkv, rope, query_norm, key_norm, qkv, addresses, slots, num_heads, num_kv_heads, page_size, eps, unit_offset
    )
