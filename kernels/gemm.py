"""Matrix products of ops and layers: the one place that says how cuBLAS is called. Needs no Triton on a CPU.

`linear` is for all products whose rows must not depend on how many there are, `gemm` for gradients. On an H200, in bfloat16,
1 to 12,345 rows of the layers of SmolLM2-135M, Qwen3-0.6B and Llama-3-8B were compared with the same rows of 16,384. Their
bits are equal unless cuBLAS splits K, as it does for Qwen3's `down` (2 to 128 rows) and Llama-3's `o` (1 to 32) and `down`
(1 to 256). With split-K forbidden, a row alone of Qwen3's `down` differs, and 64 rows of it take 74 instead of 11 µs. Logits
in float32 were equal for eight numbers of rows up to 2,048. That the Triton GEMM is right for K above 2,048 too, and as fast
as cuBLAS for few rows, is a prediction (`ordered_gemm`); `gemm_choice` finds out on the card at hand.
"""

import torch
import torch.nn.functional as F

from rto_fast.kernels import gemm_choice

# cuBLAS splits the sum over K if a product has too few tiles to fill the GPU, and may then add up the parts in the
# dtype of a 16-bit output. So products up to this size, two waves of 128 x 256 tiles on 132 SMs, are written in
# float32, at most 32 MiB, and then rounded. (The largest that was seen to be split on an H200 had 2^20 elements.)
SPLIT_K_ELEMENTS = 1 << 23


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """x [T, K] @ weight [N, K]ᵀ + bias [N]: the forward pass of every linear layer of our decoder and of its output layer.

    On CUDA, a row of a 16-bit product has the same bits in any number of rows: its sum is that of `ordered_gemm`, in order
    and never split, whoever computes it (`gemm_choice`). The first product of new sizes waits for the device.

    Args:
        x: its rows may have any stride.
        weight: of the dtype of x.
        out: [T, N] of the dtype of x or float32, whose rows may have any stride. Default: a new tensor of the dtype of x.
    """
    if x.is_cuda and gemm_choice.is_exact(x.dtype):
        if out is None:
            out = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
        return gemm_choice.product(_rows(x), _rows(weight), bias, out) if out.numel() else out
    if out is None:
        return F.linear(x, weight, bias)
    gemm(x, weight.t(), out)
    return out if bias is None else out.add_(bias)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x with rows that do not overlap, whose elements follow each other."""
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()


def gemm(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, accumulate: bool = False) -> torch.Tensor:
    """out (+)= a @ b, accumulated in float32 and rounded once to the dtype of `out`.

    torch can forbid 16-bit parts only by global flags (`allow_bf16_reduced_precision_reduction`), which belong to the
    user.
    """
    # Always with `out=`, because autocast changes only the forms without it.
    options = {"out": out} if out.dtype == a.dtype else {"out": out, "out_dtype": out.dtype}
    if not a.is_cuda and (a.dtype.itemsize == 2 or out.dtype != a.dtype):
        # The CPU has no GEMM with an output of another dtype; products of 16-bit floats are exact in float32.
        wide = torch.promote_types(a.dtype, torch.float32)
        product = torch.mm(a.to(wide), b.to(wide), out=torch.empty(out.shape, dtype=wide))
    elif out.dtype.itemsize == 2 and out.numel() <= SPLIT_K_ELEMENTS:
        product = gemm(a, b, torch.empty(out.shape, dtype=torch.float32, device=out.device))
    else:
        return torch.addmm(out, a, b, **options) if accumulate else torch.mm(a, b, **options)
    return out.add_(product) if accumulate else out.copy_(product)
