"""The softmax of a row of logits, in one order for the losses and the sampler: its state, the log-prob and the gradient.

The state of a row is (m, s, u) with m = max z, t = (z - m)·log2(e)/temperature, s = Σ 2^t and u = Σ 2^t·t. It is in
base 2 because the hardware has ex2 and lg2. With u, entropy = ln s - u/s (base e) needs no second pass and does not
cancel as lse - E[z] does. `scale` is log2(e)/temperature, and `cap` is the softcap or None.

Every kernel adds up a row in the same order, so the sampler and the losses get the same bits from the same logits:

1. A row consists of tiles of 512 columns, counted from column 0, and a tile of parts of 512 bytes of logits. In a tile,
   p = 2^t is relative to the maximum of that tile. The parts are added up elementwise, by halving.
2. Tile i belongs to slot i mod 8. A slot has a maximum and a sum for each column of a part, to which its tiles are
   added in order.
3. At the end of the row the slots are brought to one maximum. All their columns are added up, neighbour to neighbour.

A slot lies in one warp. So nothing but the maximum of a tile is exchanged before step 3, and that within a warp. No
order is left to the compiler: each `tl.sum` of p is over two elements, and all these kernels are launched with EXACT, so
that a product is contracted into a sum only where it says `tl.fma`. So the bits depend on neither layouts nor the number
of warps nor that of slots: a row of fewer than 8 tiles needs fewer slots, because an empty one adds 0.
"""

import torch
import triton
import triton.language as tl

from rto_fast.kernels.common import LN2, LOG2E

# Columns of a tile, and slots of a row. A float32 tile is 16 elements a thread of its warp.
TILE = tl.constexpr(512)
SLOTS = 8
# Below this 2^t is 0 in float32. t is clamped to it as a factor, because 0·t must not become 0·(-inf).
MIN_LOG2 = tl.constexpr(-200.0)


def row_block(num_cols: int, itemsize: int) -> tuple[int, int]:
    """(BLOCK_V, num_warps) for rows of elements of `itemsize` bytes; each thread loads 64 bytes, 4 times 128 bits.

    There are at most 8 warps. With 16, Triton 3.6 spills registers, and an SM holds fewer threads.
    """
    block_v = min(max(triton.next_power_of_2(num_cols), 512), 16384 // itemsize)
    return block_v, max(1, block_v * itemsize // 2048)


@triton.jit
def load_logits(x_ptr, bias_ptr, offs_v, num_cols, cap, MASKED: tl.constexpr):
    """(logits of one tile in float32, -inf past the end; their derivative with respect to what was loaded)."""
    mask_v = offs_v < num_cols
    if MASKED:
        z = tl.load(x_ptr + offs_v, mask=mask_v, other=float("-inf")).to(tl.float32)
    else:
        z = tl.load(x_ptr + offs_v).to(tl.float32)
    if bias_ptr is not None:
        if MASKED:
            z += tl.load(bias_ptr + offs_v, mask=mask_v, other=0.0).to(tl.float32)
        else:
            z += tl.load(bias_ptr + offs_v).to(tl.float32)
    derivative = 1.0
    if cap is not None:
        # tanh from ex2: absolute error 1e-7, where tanh.approx has 5e-4. e^2x overflows to inf and gives 1.
        tanh = 1.0 - 2.0 / (1.0 + tl.exp2(z * (2.0 * LOG2E / cap)))
        derivative = 1.0 - tanh * tanh
        z = cap * tanh
        if MASKED:
            z = tl.where(mask_v, z, float("-inf"))
    return z, derivative


@triton.jit
def load_label(x_ptr, bias_ptr, label, num_cols, cap):
    """(logit of the label or NaN, whether the label is in the row). A label outside of the row is not read."""
    is_label = (label >= 0) & (label < num_cols)
    z, _ = load_logits(x_ptr, bias_ptr, tl.where(is_label, label, 0) + tl.arange(0, 1), num_cols, cap, False)
    return tl.where(is_label, tl.sum(z, 0), float("nan")), is_label


@triton.jit
def tile_columns(bits: tl.constexpr, BLOCK_T: tl.constexpr):
    """Columns of BLOCK_T tiles of logits of so many bits: [parts·BLOCK_T, columns of a part].

    A warp loads a row of this block at once, 16 bytes a lane, and rows go to warps in turn. All rows of a tile, which are
    BLOCK_T apart, go to one warp if there are at most BLOCK_T warps. So no sum over parts leaves its thread.
    """
    PART: tl.constexpr = 4096 // bits
    offs_r = tl.arange(0, TILE // PART * BLOCK_T)
    return (offs_r % BLOCK_T * TILE + offs_r // BLOCK_T * PART)[:, None] + tl.arange(0, PART)[None, :]


@triton.jit
def _add_parts(x, BLOCK_T: tl.constexpr):
    """[parts·BLOCK_T, columns] → [BLOCK_T, columns], one half to the other."""
    if x.shape[0] > BLOCK_T:
        x = _add_parts(tl.sum(tl.reshape(x, (2, x.shape[0] // 2, x.shape[1])), 0), BLOCK_T)
    return x


@triton.jit
def _add_columns(x):
    """The sum of x [N], neighbour to neighbour."""
    x = tl.sum(tl.reshape(x, (x.shape[0] // 2, 2)), 1)
    if x.shape[0] > 2:
        x = _add_columns(x)
    else:
        x = tl.sum(x, 0)
    return x


@triton.jit
def tile_states(z, scale, WITH_ENTROPY: tl.constexpr, BLOCK_T: tl.constexpr):
    """The states of tiles from logits at `tile_columns`: m [BLOCK_T, 1], and s and u by column [BLOCK_T, columns]."""
    PARTS: tl.constexpr = z.shape[0] // BLOCK_T
    z = tl.reshape(z, (PARTS, BLOCK_T, z.shape[1]))
    m = tl.max(tl.max(z, 0), 1, keep_dims=True)
    # While all is -inf, measure from 0: -inf - -inf would be NaN. A NaN logit reaches s through t, while max drops it.
    origin = tl.where(m == float("-inf"), 0.0, m)
    t = tl.reshape((z - origin[None, :, :]) * scale, (PARTS * BLOCK_T, z.shape[2]))
    exp = tl.exp2(t)
    u = 0.0
    if WITH_ENTROPY:
        u = _add_parts(exp * tl.maximum(t, MIN_LOG2), BLOCK_T)
    return m, _add_parts(exp, BLOCK_T), u


@triton.jit
def merge_states(m, s, u, other_m, other_s, other_u, scale, WITH_ENTROPY: tl.constexpr):
    """Adds other states to states: those of tiles to those of their slots, or of splits to those of their rows."""
    new_m = tl.maximum(m, other_m)
    origin = tl.where(new_m == float("-inf"), 0.0, new_m)
    shift = (m - origin) * scale
    other_shift = (other_m - origin) * scale
    rescale = tl.exp2(shift)
    other_rescale = tl.exp2(other_shift)
    if WITH_ENTROPY:
        u = tl.fma(tl.maximum(shift, MIN_LOG2), s, u)
        other_u = tl.fma(tl.maximum(other_shift, MIN_LOG2), other_s, other_u)
        u = tl.fma(u, rescale, other_u * other_rescale)
    return new_m, tl.fma(s, rescale, other_s * other_rescale), u


@triton.jit
def merge_slots(m, s, u, scale, WITH_ENTROPY: tl.constexpr):
    """The state of a row from those of its slots."""
    row_m = tl.max(m)
    shift = (m - tl.where(row_m == float("-inf"), 0.0, row_m)) * scale
    rescale = tl.exp2(shift)
    row_u = 0.0
    if WITH_ENTROPY:
        row_u = tl.sum(tl.fma(tl.maximum(shift, MIN_LOG2), s, u) * rescale)
    return row_m, _add_columns(tl.reshape(s * rescale, (s.shape[0] * s.shape[1],))), row_u


@triton.jit
def empty_states(BLOCK_T: tl.constexpr, COLUMNS: tl.constexpr):
    """(m, s, u) of slots without tiles."""
    zeros = tl.zeros((BLOCK_T, COLUMNS), tl.float32)
    return tl.full((BLOCK_T, 1), float("-inf"), tl.float32), zeros, zeros


@triton.jit
def fold_row(x_ptr, bias_ptr, begin, end, scale, cap, WITH_ENTROPY: tl.constexpr, BLOCK_V: tl.constexpr):
    """The state of columns [begin, end). Whole blocks have no mask, because its selects cost an instruction a word."""
    BLOCK_T: tl.constexpr = BLOCK_V // TILE
    offs_v = tile_columns(x_ptr.dtype.element_ty.primitive_bitwidth, BLOCK_T)
    m, s, u = empty_states(BLOCK_T, offs_v.shape[1])
    tail = begin + (end - begin) // BLOCK_V * BLOCK_V
    for start in range(begin, tail, BLOCK_V):
        z, _ = load_logits(x_ptr, bias_ptr, start + offs_v, end, cap, False)
        tile_m, tile_s, tile_u = tile_states(z, scale, WITH_ENTROPY, BLOCK_T)
        m, s, u = merge_states(m, s, u, tile_m, tile_s, tile_u, scale, WITH_ENTROPY)
    if tail < end:
        z, _ = load_logits(x_ptr, bias_ptr, tail + offs_v, end, cap, True)
        tile_m, tile_s, tile_u = tile_states(z, scale, WITH_ENTROPY, BLOCK_T)
        m, s, u = merge_states(m, s, u, tile_m, tile_s, tile_u, scale, WITH_ENTROPY)
    return merge_slots(m, s, u, scale, WITH_ENTROPY)


@triton.jit
def log_prob(z_label, m, log2_s, scale):
    """z - m is taken first, because near p = 1 the difference with lse would cancel."""
    return tl.fma(z_label - m, scale, -log2_s) * LN2


@triton.jit
def finish_row(z_label, m, s, u, scale):
    """(logp, entropy, log2 s)."""
    log2_s = tl.log2(s)
    return log_prob(z_label, m, log2_s, scale), (log2_s - u / s) * LN2, log2_s


@triton.jit
def logits_gradient(
    z, derivative, offs_v, label, m, log2_s, entropy, dlogp, dentropy, scale, WITH_ENTROPY: tl.constexpr
):
    """Gradient of dlogp·logp[label] + dentropy·entropy in one tile of logits; 1 - p is taken in float32."""
    log2_p = tl.fma(z - m, scale, -log2_s)
    p = tl.exp2(log2_p)
    gradient = dlogp * (tl.where(offs_v == label, 1.0, 0.0) - p)
    if WITH_ENTROPY:
        gradient = tl.fma(-dentropy, p * tl.fma(tl.maximum(log2_p, MIN_LOG2), LN2, entropy), gradient)
    return gradient * (scale * LN2) * derivative


@triton.jit
def _write_gradient_tile(
    x_ptr,
    dx_ptr,
    bias_ptr,
    offs_v,
    end,
    label,
    m,
    log2_s,
    entropy,
    dlogp,
    dentropy,
    scale,
    cap,
    WITH_ENTROPY: tl.constexpr,
    MASKED: tl.constexpr,
):
    z, derivative = load_logits(x_ptr, bias_ptr, offs_v, end, cap, MASKED)
    dz = logits_gradient(z, derivative, offs_v, label, m, log2_s, entropy, dlogp, dentropy, scale, WITH_ENTROPY)
    if x_ptr.dtype != dx_ptr.dtype:
        tl.debug_barrier()  # gradients may overwrite their own tile's logits (see gradient_view): read all first
    if MASKED:
        tl.store(dx_ptr + offs_v, dz.to(dx_ptr.dtype.element_ty), mask=offs_v < end)
    else:
        tl.store(dx_ptr + offs_v, dz.to(dx_ptr.dtype.element_ty))


@triton.jit
def write_gradient(
    x_ptr,
    dx_ptr,
    bias_ptr,
    begin,
    end,
    label,
    m,
    log2_s,
    entropy,
    dlogp,
    dentropy,
    scale,
    cap,
    WITH_ENTROPY: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Writes the gradient of columns [begin, end) of a row, last tile first, since that is still in L2. All NaN if m is."""
    offs_v = tl.arange(0, BLOCK_V)
    tail = begin + (end - begin) // BLOCK_V * BLOCK_V
    if (dlogp == 0.0) & (dentropy == 0.0) & (m == m):
        zeros = tl.zeros((BLOCK_V,), dx_ptr.dtype.element_ty)
        for start in range(begin, tail, BLOCK_V):
            tl.store(dx_ptr + start + offs_v, zeros)
        tl.store(dx_ptr + tail + offs_v, zeros, mask=tail + offs_v < end)
    else:
        if tail < end:
            _write_gradient_tile(
                x_ptr,
                dx_ptr,
                bias_ptr,
                tail + offs_v,
                end,
                label,
                m,
                log2_s,
                entropy,
                dlogp,
                dentropy,
                scale,
                cap,
                WITH_ENTROPY,
                True,
            )
        for done in range(0, tail - begin, BLOCK_V):
            _write_gradient_tile(
                x_ptr,
                dx_ptr,
                bias_ptr,
                tail - BLOCK_V - done + offs_v,
                end,
                label,
                m,
                log2_s,
                entropy,
                dlogp,
                dentropy,
                scale,
                cap,
                WITH_ENTROPY,
                False,
            )


def logits_buffer(num_rows: int, num_cols: int, like: torch.Tensor) -> torch.Tensor:
    """Uninitialised float32 logits [rows, columns]; columns are padded, so that every row is aligned to 128 bits."""
    return torch.empty(num_rows, triton.cdiv(num_cols, 128) * 128, dtype=torch.float32, device=like.device)


def gradient_view(buffer: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The part of a logits_buffer to which `write_gradient` writes the gradients.

    16-bit gradients take the upper half of their own row. Tiles are written from the last to the first: the gradients
    of columns [i, j) overwrite the logits of columns [(W + i)/2, (W + j)/2) of W, which are at or above i, so already
    read.
    """
    return buffer if dtype == torch.float32 else buffer.view(dtype)[:, buffer.shape[1] :]
