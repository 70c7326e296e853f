"""Gated activation against float64, and against the modules of transformers and torch."""

import pytest
import torch
from transformers.activations import ACT2FN

from rto_fast.kernels import gated as kernel
from rto_fast.kernels import layer_reference as reference
from tests.kernels.layers import DTYPES, assert_near, leaves, normal, skip_truncation

ACTIVATIONS = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh", "gelu": "gelu"}  # and transformers' name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(5, 64), (3, 1, 98), (1, 2), (2, 3000)], ids=str)
def test_gated_activation(shape, activation, dtype, device):
    (mine,), (truth,) = leaves(normal(*shape, seed=0, dtype=dtype, device=device) * 3)
    out, expected = kernel.gated_activation(mine, activation), reference.gated_activation(truth, activation)
    assert out.dtype == dtype
    gate, up = truth.detach().chunk(2, -1)
    # The activation is computed in float32, whose error is relative to the gate where 1 + erf cancels; then two roundings.
    assert_near(out, expected, 2, expected.abs() + 2e-7 / torch.finfo(dtype).eps * (gate * up).abs())
    upstream = normal(*expected.shape, seed=1, dtype=dtype, device=device)
    out.backward(upstream)
    expected.backward(upstream.double())
    size = truth.grad.abs() + 1e-6 / torch.finfo(dtype).eps * torch.cat(
        [(upstream * up).abs(), (upstream * gate).abs()], -1
    )
    assert_near(mine.grad, truth.grad, 2, size)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_accuracy_in_float32(activation, device):
    """The error over the range where an activation bends is not above that of torch's own float32 function by much."""
    gate = torch.linspace(-12, 12, 4096, device=device)
    mine = torch.cat([gate, torch.ones_like(gate)])[None].requires_grad_()  # one row
    out = kernel.gated_activation(mine, activation)
    out.sum().backward()
    torchs, truth = ([x] for x in (gate.clone(), gate.double()))
    for leaf in (torchs, truth):
        leaf[0].requires_grad_()
        leaf.append(reference._ACTIVATIONS[activation](leaf[0]))
        leaf[1].sum().backward()
    for found, theirs, true in (
        (out[0], torchs[1], truth[1]),
        (mine.grad[0, :4096], torchs[0].grad, truth[0].grad),
    ):
        error, allowed = ((x.double() - true).abs().max() for x in (found, theirs))
        assert error <= 2 * allowed + 2e-7, (error, allowed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation, name", ACTIVATIONS.items())
def test_rounds_where_transformers_does(activation, name, dtype, device):
    """The activation is rounded before its product with `up`. exp and erf may differ in float32's last bits.

    So 16-bit results are equal, except where such a bit decides how the activation is rounded: in one of a thousand.
    """
    skip_truncation(dtype, device)
    gate_up = normal(2, 16384, seed=0, dtype=dtype, device=device)
    gate, up = gate_up.chunk(2, -1)
    found, expected = kernel.gated_activation(gate_up, activation), ACT2FN[name](gate) * up
    if dtype == torch.float32:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    else:
        assert (found != expected).float().mean() < 1e-3
        once = (ACT2FN[name](gate.double()) * up.double()).to(dtype)
        assert (found != once).float().mean() > 0.1  # the rounding can be seen


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_large_gates_and_nan(activation, device):
    """Where e⁻ˢ overflows, the activation and its derivative are 0 or those of the identity; NaN stays NaN."""
    gate = torch.tensor([-1e15, -1e4, -200.0, -100.0, 100.0, 200.0, 1e4, 1e15, torch.nan, 1.0], device=device)
    gate_up = torch.stack([gate, torch.full_like(gate, 2.0)], 1).requires_grad_()
    out = kernel.gated_activation(gate_up, activation)
    out.sum().backward()
    expected = torch.where(gate > 0, 2 * gate, 0.0)
    torch.testing.assert_close(out[:8, 0], expected[:8], rtol=1e-6, atol=1e-30)
    torch.testing.assert_close(gate_up.grad[:8, 0], 2 * (gate[:8] > 0).float(), rtol=1e-6, atol=1e-30)
    torch.testing.assert_close(gate_up.grad[:8, 1], expected[:8] / 2, rtol=1e-6, atol=1e-30)
    assert out[8].isnan() and gate_up.grad[8].isnan().all() and out[9].isfinite() and gate_up.grad[9].isfinite().all()


def test_strides_and_no_rows(device):
    """Rows of a wider buffer; gradients that are slices, expanded or transposed."""
    wide = normal(7, 96, seed=0, device=device)
    for upstream in (
        torch.tensor(0.5, device=device).expand(7, 32),
        normal(7, 64, seed=1, device=device)[:, 32:],
        normal(32, 7, seed=1, device=device).t(),
    ):
        (mine,), (truth,) = leaves(wide)
        kernel.gated_activation(mine[:, 32:], "silu").backward(upstream)
        reference.gated_activation(truth[:, 32:], "silu").backward(upstream.double())
        torch.testing.assert_close(mine.grad, truth.grad.float(), rtol=1e-5, atol=1e-6)
    (mine,), _ = leaves(wide[:0])
    out = kernel.gated_activation(mine, "silu")
    out.sum().backward()
    assert out.shape == (0, 48) and mine.grad.shape == (0, 96)


def test_bitwise_the_same_in_any_batch(device):
    gate_up = normal(6, 200, seed=0, dtype=torch.bfloat16, device=device)
    whole = kernel.gated_activation(gate_up.clone().requires_grad_(), "silu")
    for t in range(6):
        assert torch.equal(kernel.gated_activation(gate_up[t : t + 1], "silu"), whole[t : t + 1])
