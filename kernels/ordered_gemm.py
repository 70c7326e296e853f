"""The Triton GEMM of `rto_fast.kernels.gemm`: x @ weightᵀ + bias, in one order of additions, which no size changes.

An output is one float32 accumulator of a tensor core, to which the products are added from the first of K to the last. K is
never split over programs. The bias is added in float32, and the sum is rounded once. On an H200, twelve tilings had the same
bits, with both kinds of tensor-core instructions (`mma.sync`, `wgmma`), and so had cuBLAS wherever it did not split K.

`best_tile` chooses the tiling by arithmetic, not by trial. Predictions for an H200 with 16, 64 and 256 rows, in µs, beside
what cuBLAS took in a run that counted about 6 µs of launch too (the bytes of these weights alone take 1.5, 8 and 28 µs):

| | predicted | cuBLAS, measured | cuBLASLt without split-K, measured |
|---|---|---|---|
| Qwen3-0.6B's `down` (1024 x 3072) | 3.6, 5.7, 9.2 | -, 11.2, 11.4 | -, 74.0, 11.7 |
| Llama-3-8B's `o` (4096 x 4096) | 8.3, 12, 28 | -, 18.0, 24.5 | -, 18.0, 24.8 |
| Llama-3-8B's `down` (4096 x 14336) | 29, 43, 98 | -, 44.4, 54.0 | -, 42.0, 57.7 |

So it is for few rows. With many, each tile of columns reads x again from the L2 cache, where cuBLAS's kernels share what
they read.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rto_fast.kernels.common import INTERPRETED, cdiv

GROUP = tl.constexpr(8)  # tiles of rows that share tiles of the weight in the L2 cache


@triton.jit(do_not_specialize=["num_rows"])
def ordered_gemm_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    stride_x,
    stride_weight,
    stride_out,
    num_rows,
    num_cols,
    inner,
    RAGGED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile [BLOCK_T, BLOCK_N] of the output. RAGGED: K is no multiple of BLOCK_K, and zeros fill it up."""
    tiles_t = tl.cdiv(num_rows, BLOCK_T)
    tiles_n = tl.cdiv(num_cols, BLOCK_N)
    pid = tl.program_id(0)
    first_t = pid // (GROUP * tiles_n) * GROUP
    height = tl.minimum(tiles_t - first_t, GROUP)
    within = pid % (GROUP * tiles_n)
    offs_t = (first_t + within % height) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_n = within // height * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_t = offs_t < num_rows
    mask_n = offs_n < num_cols
    x_ptrs = x_ptr + offs_t.to(tl.int64)[:, None] * stride_x + offs_k[None, :]
    weight_ptrs = weight_ptr + offs_n.to(tl.int64)[:, None] * stride_weight + offs_k[None, :]
    acc = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for k in range(0, inner, BLOCK_K):
        # What lies outside is not read: a row alone costs the traffic of one row, not of a tile.
        mask_x = mask_t[:, None]
        mask_weight = mask_n[:, None]
        if RAGGED:
            mask_x = mask_x & (offs_k < inner - k)[None, :]
            mask_weight = mask_weight & (offs_k < inner - k)[None, :]
        x = tl.load(x_ptrs, mask=mask_x, other=0.0)
        weight = tl.load(weight_ptrs, mask=mask_weight, other=0.0)
        if INTERPRETED:
            x = x.to(tl.float32)
            weight = weight.to(tl.float32)
        acc = tl.dot(x, tl.trans(weight), acc, input_precision="ieee")
        x_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    out_ptrs = out_ptr + offs_t.to(tl.int64)[:, None] * stride_out + offs_n[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask_t[:, None] & mask_n[None, :])


class Tile(NamedTuple):
    """How a product is cut."""

    rows: int
    cols: int
    inner: int  # of K at a time
    warps: int
    stages: int  # blocks of K that are in shared memory or on their way there


# For any number of rows. All others must agree with it.
REFERENCE = Tile(128, 128, 64, 8, 4)
TILES = (
    Tile(16, 16, 256, 2, 6),
    Tile(16, 32, 256, 4, 5),
    Tile(16, 64, 128, 4, 7),
    Tile(32, 64, 128, 4, 6),
    Tile(64, 16, 256, 4, 5),
    Tile(64, 32, 128, 4, 7),
    Tile(64, 64, 128, 4, 6),
    Tile(64, 128, 64, 4, 6),
    REFERENCE,
)
# Rates of an H200, in bytes or FLOPs a µs; of other cards, only the ratios matter.
DRAM, L2, SM = 4.2e6, 5.5e6, 0.1e6  # an SM reads 64 bytes a cycle from the L2 cache
SM_FLOPS = 4.8e6  # of `wgmma`; `mma.sync` reaches half
CYCLES = 1755.0  # a µs
LATENCY = 0.7  # µs until a load from memory arrives


def expected_us(tile: Tile, rows: int, cols: int, inner: int, num_sms: int = 132) -> float:
    """The longest of what a product needs, in µs: each runs while the others do."""
    programs = cdiv(rows, tile.rows) * cdiv(cols, tile.cols)
    loaded = 2.0 * inner * (min(rows, tile.rows) + tile.cols)  # by a program
    in_turn = cdiv(programs, num_sms)  # programs of the SM that has most
    rounds = cdiv(in_turn, max(1, (227 << 10) // _shared_bytes(tile)))  # of those that fit beside each other
    is_wgmma = tile.rows >= 64
    # Products that are added up in order wait for one another; a block of K costs a barrier and more, 200 cycles.
    a_step = max(20.0, tile.cols / 2) if is_wgmma else 33.0
    chain = (inner / 16 * a_step + inner / tile.inner * 200.0) / CYCLES
    return max(
        2.0 * inner * (rows + cols) / DRAM,
        programs * loaded / L2,
        in_turn * loaded / SM,
        in_turn * 2.0 * tile.rows * tile.cols * inner / (SM_FLOPS if is_wgmma else SM_FLOPS / 2),
        rounds * chain,
        rounds * LATENCY * (1.0 + inner / tile.inner / (tile.stages - 1)),
    )


def _shared_bytes(tile: Tile) -> int:
    return 2 * tile.inner * (tile.rows + tile.cols) * (tile.stages - 1)


@cache
def best_tile(rows: int, cols: int, inner: int, num_sms: int = 132, shared_bytes: int = 227 << 10) -> Tile:
    """The tile that is expected to be fastest; if several are, the one that reads least."""

    def cost(tile: Tile) -> tuple[float, int]:
        programs = cdiv(rows, tile.rows) * cdiv(cols, tile.cols)
        return expected_us(tile, rows, cols, inner, num_sms), programs * (min(rows, tile.rows) + tile.cols)

    return min((tile for tile in TILES if _shared_bytes(tile) <= shared_bytes), key=cost)


def tile_for(x: Tensor, weight: Tensor) -> Tile:
    """`best_tile` of a product on the device of x."""
    sizes = (x.shape[0], *weight.shape)
    if not x.is_cuda:
        return best_tile(*sizes)
    device = triton.runtime.driver.active.utils.get_device_properties(x.device.index)
    return best_tile(*sizes, device["multiprocessor_count"], device["max_shared_mem"])


def ordered_gemm(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, tile: Tile) -> Tensor:
    """out = x @ weightᵀ + bias.

    Args:
        x: [T, K], bfloat16 or float16; the elements of a row follow each other, rows may have any stride.
        weight: [N, K] of the dtype of x, with rows like those of x.
        bias: [N], contiguous, or None.
        out: [T, N], of the dtype of x or float32, with rows like those of x.
        tile: how the product is cut, which does not change its bits.
    """
    (rows, inner), cols = x.shape, weight.shape[0]
    if not out.numel():
        return out
    options: dict[str, Any] = {"num_warps": tile.warps, "num_stages": tile.stages}
    with torch.cuda.device_of(x):
        ordered_gemm_kernel[(cdiv(rows, tile.rows) * cdiv(cols, tile.cols),)](
            x,
            weight,
            bias,
            out,
            x.stride(0),
            weight.stride(0),
            out.stride(0),
            rows,
            cols,
            inner,
            RAGGED=inner % tile.inner != 0,
            BLOCK_T=tile.rows,
            BLOCK_N=tile.cols,
            BLOCK_K=tile.inner,
            maxnreg=255,  # by itself ptxas would spill, to make room for more programs
            **options,
        )
    return out
