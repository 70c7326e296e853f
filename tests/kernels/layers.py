"""Inputs and tolerances of the tests of a layer's kernels."""

import pytest
import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def normal(*shape, seed, dtype=torch.float32, device="cpu"):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def sums_exactly(*shape, seed, dtype=torch.float32, device="cpu"):
    """Numbers of 7 bits, whose squares float32 adds up without rounding, in any order."""
    return (normal(*shape, seed=seed) * 16).round().clamp(-64, 63).div(16).to(device, dtype)


def assert_near(found, expected, roundings, size=None):
    """Compares with float64 values: this many roundings relative to `size`, by default to the value itself.

    The interpreter truncates to bfloat16, which doubles the error. float32's is that of sums of some dozen numbers.
    """
    eps = 1e-6 if found.dtype == torch.float32 else torch.finfo(found.dtype).eps
    size = expected.abs() if size is None else size
    excess = (found.double() - expected).abs() - roundings * eps * size - 1e-6
    assert found.shape == expected.shape and (excess <= 0).all(), excess.max()


def leaves(*tensors):
    """(copies that require a gradient, float64 copies that do)."""
    return tuple([make(t.detach()).requires_grad_() for t in tensors] for make in (torch.clone, torch.Tensor.double))


def cuda_norm(x, weight, eps, unit_offset):
    """transformers' RMSNorms by the operations of torch's CUDA kernels: these multiply by 1/D, where a CPU's divide by D."""
    wide = x.float()
    reciprocal = torch.tensor(1.0 / x.shape[-1], dtype=torch.float32, device=x.device)
    normed = wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) * reciprocal + eps)
    return (normed * (1.0 + weight.float())).to(x.dtype) if unit_offset else weight * normed.to(x.dtype)


def skip_truncation(dtype, device):
    if device.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter truncates to bfloat16: needs a GPU")
