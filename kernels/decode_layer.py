"""What a decoder layer of the Llama family computes between its GEMMs and its attention, in two kernels instead of ten.

A decode step is short: for 256 sequences a small model's layer reads 10 µs of weights and cache, and each kernel costs
about 2 µs before it reads a byte. So one kernel does a residual sum and the norm that follows it. Another does the
norms of heads, the rotary embedding and the stores to the cache, which touch the same elements.

Both kernels round where transformers' modules round on a GPU. So the keys of a token are those of the training forward,
bit by bit if the GEMMs and the order of a norm's sum are the same:
- A product that is added to something is rounded first. The compiler would contract both into one fused multiply-add,
even
  if the product is cast to 16 bits in between: it narrows the product to 16 bits, then contracts. `EXACT` forbids this.
- The mean is the sum times the float32 reciprocal of the size, as torch's CUDA kernel computes it.
- `tl.rsqrt` is rsqrt.approx, as CUDA's rsqrtf is.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rto_fast.kernels.common import EXACT
from rto_fast.kernels.paged_attention import cache_pointers


@triton.jit
def add_rms_norm_kernel(x_ptr, residual_ptr, weight_ptr, out_ptr, num_cols, reciprocal, eps, BLOCK_D: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * num_cols
    offs_d = tl.arange(0, BLOCK_D)
    mask = offs_d < num_cols
    z = tl.load(residual_ptr + row + offs_d, mask=mask, other=0.0)
    weight = tl.load(weight_ptr + offs_d, mask=mask, other=0.0).to(tl.float32)  # arrives while the row is summed up
    if x_ptr is not None:
        x = tl.load(x_ptr + row + offs_d, mask=mask, other=0.0)
        z = (z.to(tl.float32) + x.to(tl.float32)).to(z.dtype)
        tl.store(residual_ptr + row + offs_d, z, mask=mask)
    wide = z.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) * reciprocal + eps)
    out = (wide * scale).to(z.dtype).to(tl.float32) * weight
    tl.store(out_ptr + row + offs_d, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def rotate_and_store_kernel(
    qkv_ptr,
    rope_ptr,
    query_norm_ptr,
    key_norm_ptr,
    addresses_ptr,
    slots_ptr,
    stride_qkv_t,
    eps,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Does BLOCK_H heads of a token; its queries, keys and values follow each other. BLOCK_D spans half a head."""
    HALF: tl.constexpr = HEAD_DIM // 2
    pid_t = tl.program_id(0).to(tl.int64)
    offs_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    offs_d = tl.arange(0, BLOCK_D)
    is_query = offs_h < NUM_HEADS
    is_value = offs_h >= NUM_HEADS + NUM_KV_HEADS
    mask_d = offs_d < HALF
    mask = (offs_h < NUM_HEADS + 2 * NUM_KV_HEADS)[:, None] & mask_d[None, :]
    at = qkv_ptr + pid_t * stride_qkv_t + offs_h[:, None] * HEAD_DIM + offs_d[None, :]
    low = tl.load(at, mask=mask, other=0.0)
    high = tl.load(at + HALF, mask=mask, other=0.0)
    dtype = low.dtype
    # All loads are issued before the first is waited for.
    rope_ptr += pid_t * (2 * HEAD_DIM) + HALF
    cos = tl.load(rope_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(rope_ptr + HEAD_DIM + offs_d, mask=mask_d, other=0.0).to(tl.float32)[None, :]
    slot = tl.load(slots_ptr + pid_t)
    k_ptr, v_ptr = cache_pointers(addresses_ptr, dtype)
    a = low.to(tl.float32)
    b = high.to(tl.float32)
    if query_norm_ptr is not None:
        query_low = tl.load(query_norm_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)[None, :]
        query_high = tl.load(query_norm_ptr + HALF + offs_d, mask=mask_d, other=0.0).to(tl.float32)[None, :]
        key_low = tl.load(key_norm_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)[None, :]
        key_high = tl.load(key_norm_ptr + HALF + offs_d, mask=mask_d, other=0.0).to(tl.float32)[None, :]
        scale = tl.rsqrt(tl.sum(a * a + b * b, 1) * (1.0 / HEAD_DIM) + eps)[:, None]
        a = (a * scale).to(dtype).to(tl.float32) * tl.where(is_query[:, None], query_low, key_low)
        b = (b * scale).to(dtype).to(tl.float32) * tl.where(is_query[:, None], query_high, key_high)
        a = a.to(dtype).to(tl.float32)
        b = b.to(dtype).to(tl.float32)
    turned_low = (a * cos).to(dtype).to(tl.float32) - (b * sin).to(dtype).to(tl.float32)
    turned_high = (b * cos).to(dtype).to(tl.float32) + (a * sin).to(dtype).to(tl.float32)
    low = tl.where(is_value[:, None], low, turned_low.to(dtype))
    high = tl.where(is_value[:, None], high, turned_high.to(dtype))
    # A prefill's attention reads the keys from here.
    tl.store(at, low, mask=mask & ~is_value[:, None])
    tl.store(at + HALF, high, mask=mask & ~is_value[:, None])

    if slot >= 0:
        head = tl.where(is_value, offs_h - NUM_HEADS - NUM_KV_HEADS, offs_h - NUM_HEADS)
        rows = (slot // PAGE_SIZE * NUM_KV_HEADS + head) * PAGE_SIZE + slot % PAGE_SIZE
        offs = rows[:, None] * HEAD_DIM + offs_d[None, :]
        mask_k = mask & (~is_query & ~is_value)[:, None]
        mask_v = mask & is_value[:, None]
        tl.store(k_ptr + offs, low, mask=mask_k)
        tl.store(k_ptr + offs + HALF, high, mask=mask_k)
        tl.store(v_ptr + offs, low, mask=mask_v)
        tl.store(v_ptr + offs + HALF, high, mask=mask_v)


def add_rms_norm(x: Tensor | None, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of residual + x, [T, D]; writes the sum to `residual`.

    Args:
        x: [T, D], contiguous, or None for nothing to add.
        residual: [T, D], contiguous, of the same dtype.
        weight: [D], of the norm.
        eps: of the norm.
    """
    num_rows, num_cols = residual.shape
    out = torch.empty_like(residual)
    if num_rows:
        block_d = triton.next_power_of_2(num_cols)
        # Two accesses of 128 bits a thread.
        num_warps = min(max(block_d * residual.element_size() // 1024, 1), 16)
        with torch.cuda.device_of(residual):
            add_rms_norm_kernel[(num_rows,)](
                x, residual, weight, out, num_cols, 1.0 / num_cols, eps, BLOCK_D=block_d, num_warps=num_warps, **EXACT
            )
    return out


def rotate_and_store(
    qkv: Tensor,
    rope: Tensor,
    addresses: Tensor,
    slots: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    page_size: int,
    query_norm: Tensor | None = None,
    key_norm: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """Normalises (if there are norms) and rotates the queries and keys of T tokens in place; stores keys and values.

    Args:
        qkv: [T, num_heads + 2·num_kv_heads, head_dim], contiguous: queries, keys, values.
        rope: [T, 2, head_dim], as for `rto_fast.kernels.decode_reference.rotate`.
        addresses, slots, page_size: as for `rto_fast.kernels.paged_attention.store_kv`.
        query_norm: [head_dim], weight of the RMSNorm of queries, or None.
        key_norm: the same for keys.
        eps: of the norms.
    """
    num_tokens, num_rows, head_dim = qkv.shape
    if not num_tokens:
        return
    block_d = triton.next_power_of_2(head_dim // 2)
    block_h = min(triton.next_power_of_2(num_rows), 16)
    # Two accesses of 128 bits a thread to read, as many to write.
    num_warps = min(max(block_h * block_d * 2 * qkv.element_size() // 1024, 1), 8)
    with torch.cuda.device_of(qkv):
        rotate_and_store_kernel[(num_tokens, triton.cdiv(num_rows, block_h))](
            qkv,
            rope,
            query_norm,
            key_norm,
            addresses,
            slots,
            qkv.stride(0),
            eps,
            NUM_HEADS=num_heads,
            NUM_KV_HEADS=num_kv_heads,
            HEAD_DIM=head_dim,
            PAGE_SIZE=page_size,
            BLOCK_H=block_h,
            BLOCK_D=block_d,
            num_warps=num_warps,
            **EXACT,
        )
