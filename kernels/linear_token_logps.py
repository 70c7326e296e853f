"""Log-probabilities and entropies of labels straight from hidden states; the [T, V] logits never exist.

Forward pass: a GEMM writes the float32 logits of a chunk of rows, and the kernel of `token_logps` reduces each row in one
program, in the order in which the sampler does it. Backward pass: recomputes the logits in chunks of the vocabulary, so
that dW of a chunk is written once, with all tokens in one accumulation. Only dX, which is small, is accumulated over
chunks, in float32. Logits must be float32: bfloat16 costs .03 nats of log-prob at |z| ~ 19, more than PPO's clipping
range resolves. Ignored rows are dropped before the GEMMs, which saves half of the FLOPs or more if prompts are in the
batch. Which these are, the host has to know: a caller who does not say it (`rows`) waits for the device.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rto_fast.kernels.common import EXACT, LOG2E, autocast_operands, contiguous, equal_share, kept_rows
from rto_fast.kernels.gemm import gemm, linear
from rto_fast.kernels.row_softmax import gradient_view, logits_buffer, row_block, write_gradient
from rto_fast.kernels.token_logps import token_logps_fwd_kernel

# Float32 logits of a chunk, in each pass. In the forward pass a chunk is some rows of the whole vocabulary. 1 GiB holds
# 2093 of 128k and 1766 of 152k columns: 8192 rows of Llama-3-8B's and Qwen3-0.6B's logits took 13.26 and 4.89 ms in four
# products of 2048 rows (H200), and 14.01 and 5.09 in tiles of 1024 x 8192. Chunks small enough to be read back from L2
# do not pay off, because short GEMMs lose more: whole forward passes took 15.22 and 6.37 ms in tiles of 32 and 64 MiB,
# 14.67 and 5.97 in tiles of 512.
# In the backward pass a chunk is all rows of some columns. Each adds a float32 read-modify-write of dX, which takes 735/C
# of the time of the dX GEMM of a chunk of C columns. 1 GiB holds C = 16384 (4 %) for 16k rows and 4096 (18 %) for 64k
# rows, and is half of what the bfloat16 logits of 8192 tokens of a 128k vocabulary would take.
WORKSPACE_BYTES = 1 << 30
MAX_CHUNK_COLS = 16384


@triton.jit(do_not_specialize=["num_tokens", "first_col"])
def logits_gradient_kernel(
    x_ptr,
    dx_ptr,
    bias_ptr,
    labels_ptr,
    state_ptr,
    entropy_ptr,
    dlogps_ptr,
    dentropy_ptr,
    rows_ptr,
    stride_x_t,
    stride_dx_t,
    num_tokens,
    num_cols,
    first_col,
    scale,
    cap,
    ignore_index,
    BLOCK_V: tl.constexpr,
):
    """Overwrites a row of a chunk of logits with its gradient; see `gradient_view`. That of an ignored row is 0."""
    pid_t = tl.program_id(0).to(tl.int64)
    token = tl.load(rows_ptr + pid_t)
    label = tl.load(labels_ptr + token)
    counts = label != ignore_index
    dlogp = tl.where(counts, tl.load(dlogps_ptr + token), 0.0)
    m = tl.load(state_ptr + token)
    log2_s = tl.load(state_ptr + num_tokens + token)
    entropy = 0.0
    dentropy = 0.0
    if dentropy_ptr is not None:
        entropy = tl.load(entropy_ptr + token)
        dentropy = tl.where(counts, tl.load(dentropy_ptr + token), 0.0)
    write_gradient(
        x_ptr + pid_t * stride_x_t,
        dx_ptr + pid_t * stride_dx_t,
        bias_ptr,
        0,
        num_cols,
        (label - first_col).to(tl.int32),
        m,
        log2_s,
        entropy,
        dlogp,
        dentropy,
        scale,
        cap,
        dentropy_ptr is not None,
        BLOCK_V,
    )


def rows_per_chunk(num_rows: int, vocab_size: int) -> int:
    """Rows of a forward chunk, which is all of them or an equal share that fits the workspace."""
    largest = max(1, WORKSPACE_BYTES // (4 * vocab_size))
    return min(num_rows, largest, equal_share(num_rows, largest))


def columns_per_chunk(num_rows: int, vocab_size: int) -> int:
    """Columns of a backward chunk, equal shares of the vocabulary that fit the workspace."""
    largest = min(MAX_CHUNK_COLS, max(128, WORKSPACE_BYTES // (4 * num_rows) // 128 * 128))
    return equal_share(vocab_size, largest)


@torch.library.custom_op("rto_fast::linear_token_logps_fwd", mutates_args=())
def linear_token_logps_fwd(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    rows: Tensor | None,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    with_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden_states [T, D], weight [V, D], labels [T], rows [n] → logps [T], entropy [T or 0], state [2, T]."""
    logps = hidden_states.new_zeros(len(labels), dtype=torch.float32)
    entropy = logps.new_zeros(len(labels) if with_entropy else 0)
    state = logps.new_zeros(2, len(labels))
    rows, hidden = kept_rows(rows, labels, ignore_index, hidden_states)
    if not len(rows):
        return logps, entropy, state
    vocab_size, scale = len(weight), LOG2E.value / temperature
    labels, chunk_rows = labels.contiguous(), rows_per_chunk(len(rows), vocab_size)
    buffer = logits_buffer(chunk_rows, vocab_size, hidden)
    block_v, num_warps = row_block(vocab_size, 4)
    with torch.cuda.device_of(hidden):
        for chunk, tokens in zip(hidden.split(chunk_rows), rows.split(chunk_rows)):
            logits = buffer[: len(chunk), :vocab_size]
            linear(chunk, weight, out=logits)
            token_logps_fwd_kernel[(len(chunk),)](
                logits,
                bias,
                labels,
                tokens,
                logps,
                entropy,
                state,
                0,
                logits.stride(0),
                len(chunk),
                len(labels),
                vocab_size,
                scale,
                softcap,
                ignore_index,
                WITH_ENTROPY=with_entropy,
                BLOCK_V=block_v,
                num_warps=num_warps,
                **EXACT,
            )
    return logps, entropy, state


@linear_token_logps_fwd.register_fake
def _(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    rows: Tensor | None,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    with_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    logps = hidden_states.new_empty(len(labels), dtype=torch.float32)
    return logps, logps.new_empty(len(labels) if with_entropy else 0), logps.new_empty(2, len(labels))


@torch.library.custom_op("rto_fast::linear_token_logps_bwd", mutates_args=())
def linear_token_logps_bwd(
    dlogps: Tensor,
    dentropy: Tensor | None,
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    rows: Tensor | None,
    state: Tensor,
    entropy: Tensor,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    need_dhidden: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden_states, weight and bias; those not needed are empty."""
    rows, hidden = kept_rows(rows, labels, ignore_index, hidden_states)
    vocab_size = len(weight)
    new = torch.empty_like if len(rows) else torch.zeros_like
    dweight = new(weight, memory_format=torch.contiguous_format) if need_dweight else weight.new_empty(0)
    dbias = new(bias) if bias is not None and need_dbias else weight.new_empty(0)
    if not len(rows):
        return torch.zeros_like(hidden_states) if need_dhidden else hidden.new_empty(0), dweight, dbias
    dhidden = torch.empty_like(hidden, dtype=torch.float32, memory_format=torch.contiguous_format)
    chunk_cols = columns_per_chunk(len(rows), vocab_size)
    buffer = logits_buffer(len(rows), min(chunk_cols, vocab_size), hidden)
    block_v, num_warps = row_block(min(chunk_cols, vocab_size), 4)
    dlogps, dentropy, labels = contiguous(dlogps, dentropy, labels)
    with torch.cuda.device_of(hidden):
        for first_col in range(0, vocab_size, chunk_cols):
            here = slice(first_col, first_col + chunk_cols)
            num_cols = len(weight[here])
            logits, dlogits = buffer[:, :num_cols], gradient_view(buffer, hidden.dtype)[:, :num_cols]
            gemm(hidden, weight[here].t(), logits)
            logits_gradient_kernel[(len(rows),)](
                logits,
                dlogits,
                None if bias is None else bias[here],
                labels,
                state,
                entropy,
                dlogps,
                dentropy,
                rows,
                logits.stride(0),
                dlogits.stride(0),
                len(dlogps),
                num_cols,
                first_col,
                LOG2E.value / temperature,
                softcap,
                ignore_index,
                BLOCK_V=block_v,
                num_warps=num_warps,
            )
            if need_dhidden:
                gemm(dlogits, weight[here], dhidden, accumulate=first_col > 0)
            if need_dweight:
                gemm(dlogits.t(), hidden, dweight[here])
            if need_dbias:
                dbias[here] = dlogits.sum(0, dtype=torch.float32)
    if not need_dhidden:
        dhidden = hidden.new_empty(0)
    elif hidden is not hidden_states:
        dhidden = torch.zeros_like(hidden_states).index_copy_(0, rows, dhidden.to(hidden.dtype))
    return dhidden.to(hidden.dtype), dweight, dbias


@linear_token_logps_bwd.register_fake
def _(
    dlogps: Tensor,
    dentropy: Tensor | None,
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    rows: Tensor | None,
    state: Tensor,
    entropy: Tensor,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    need_dhidden: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
        if need_dhidden
        else hidden_states.new_empty(0),
        torch.empty_like(weight, memory_format=torch.contiguous_format) if need_dweight else weight.new_empty(0),
        torch.empty_like(bias) if bias is not None and need_dbias else weight.new_empty(0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden_states, weight, bias, labels, rows, *ctx.settings = inputs
    _, entropy, state = output
    ctx.save_for_backward(hidden_states, weight, bias, labels, rows, state, entropy)
    ctx.mark_non_differentiable(state)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dlogps: Tensor | None, dentropy: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    hidden_states, weight, bias, labels, rows, state, entropy = ctx.saved_tensors
    temperature, softcap, ignore_index, with_entropy = ctx.settings
    dlogps = torch.zeros_like(state[0]) if dlogps is None else dlogps
    needed = ctx.needs_input_grad[:3]
    gradients = linear_token_logps_bwd(
        dlogps,
        dentropy if with_entropy else None,
        hidden_states,
        weight,
        bias,
        labels,
        rows,
        state,
        entropy,
        temperature,
        softcap,
        ignore_index,
        *needed,
    )
    return *(g if need else None for g, need in zip(gradients, needed)), *(None,) * 6


linear_token_logps_fwd.register_autograd(_backward, setup_context=_setup_context)


def linear_token_logps(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    *,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """See `rto_fast.ops.linear_token_logps`. Without `rows` both passes wait for the device, to count the rows."""
    hidden, weight = autocast_operands(hidden_states.reshape(-1, hidden_states.shape[-1]), lm_head_weight)
    logps, entropy, _ = linear_token_logps_fwd(
        hidden, weight, bias, labels.reshape(-1), rows, temperature, softcap, ignore_index, return_entropy
    )
    logps = logps.view(labels.shape)
    return (logps, entropy.view(labels.shape)) if return_entropy else logps
