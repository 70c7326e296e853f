"""RMSNorm with and without the residual sum, against float64 and against transformers' own modules."""

import pytest
import torch
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from rto_fast.kernels import layer_reference as reference
from rto_fast.kernels import rms_norm as kernel
from tests.kernels.layers import DTYPES, assert_near, cuda_norm, leaves, normal, skip_truncation, sums_exactly

EPS = 1e-5
SHAPES = (5, 64), (70, 100), (2, 1), (9, 576)


def llama_norm(x, weight):
    module = LlamaRMSNorm(len(weight), EPS).to(weight)
    module.weight.data = weight
    return module(x)


def gemma_norm(x, weight):
    module = Gemma2RMSNorm(len(weight), EPS).to(weight)
    module.weight.data = weight
    return module(x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "tokens, size, unit_offset, multiplier",
    [
        *((*shape, True, 1.0) for shape in SHAPES),
        *((*shape, False, 0.22) for shape in SHAPES),
        *((*shape, False, 1.0) for shape in [*SHAPES, (1, 4096)]),
    ],
)
def test_add_rms_norm(tokens, size, unit_offset, multiplier, dtype, device):
    options = dict(unit_offset=unit_offset, multiplier=multiplier)
    made = [normal(tokens, size, seed=seed, dtype=dtype, device=device) for seed in (0, 1)]
    mine, truth = leaves(*made, normal(size, seed=2, dtype=dtype, device=device))
    out, total = kernel.add_rms_norm(*mine, EPS, **options)
    assert out.dtype == total.dtype == dtype
    true_total = truth[1] + multiplier * truth[0]
    assert_near(total, true_total, 2, made[0].abs().double() + made[1].abs().double())
    # What is normed, and differentiated, is the rounded sum.
    rounded = total.detach().double() + (true_total - true_total.detach())
    expected = reference.rms_norm(rounded, truth[2], EPS, unit_offset)
    assert_near(out, expected, 2)
    upstream = [normal(tokens, size, seed=seed, dtype=dtype, device=device) for seed in (3, 4)]
    torch.autograd.backward((out, total), upstream)
    torch.autograd.backward((expected, true_total), [g.double() for g in upstream])
    # Gradients are computed in float32 and rounded once; those of D = 1 cancel.
    size_of = truth[1].grad.abs().amax(-1, keepdim=True) + sum(g.abs().amax(-1, keepdim=True) for g in upstream)
    assert_near(mine[0].grad, truth[0].grad, 4, multiplier * size_of)
    assert_near(mine[1].grad, truth[1].grad, 4, size_of)
    # The normed value is rounded before it meets the weight, in every row.
    normed = reference.rms_norm(total.detach().double(), torch.ones_like(truth[2]), EPS)
    assert_near(mine[2].grad, truth[2].grad, 2, (upstream[0].double() * normed).abs().sum(0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm(dtype, device):
    mine, truth = leaves(*(normal(*s, seed=7, dtype=dtype, device=device) for s in ((2, 6, 40), (40,))))
    out, expected = kernel.rms_norm(*mine, EPS), reference.rms_norm(*truth, EPS)
    assert_near(out, expected, 2)
    upstream = normal(2, 6, 40, seed=8, dtype=dtype, device=device)
    out.backward(upstream)
    expected.backward(upstream.double())
    assert_near(mine[0].grad, truth[0].grad, 4, truth[0].grad.abs().amax(-1, keepdim=True))
    assert_near(mine[1].grad, truth[1].grad, 2, truth[1].grad.abs().sum() * torch.ones_like(truth[1]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("unit_offset", [False, True])
@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("size", [64, 100, 576, 896, 4096])
def test_rounds_where_transformers_does(size, adds, unit_offset, dtype, device):
    """Results are the same to the last bit if the order of the sum does not matter."""
    skip_truncation(dtype, device)
    residual, x = (sums_exactly(50, size, seed=seed, dtype=dtype, device=device) for seed in (0, 1))
    weight = normal(size, seed=2, dtype=dtype, device=device)
    total = (residual + x).clamp(-4, 4) if adds else residual
    if adds:
        found, summed = kernel.add_rms_norm(total - residual, residual, weight, EPS, unit_offset)
        assert torch.equal(summed, total)
    else:
        found = kernel.rms_norm(residual, weight, EPS, unit_offset)
    assert torch.equal(found, cuda_norm(total, weight, EPS, unit_offset))
    if device.type == "cuda" or size & (size - 1) == 0:
        assert torch.equal(found, (gemma_norm if unit_offset else llama_norm)(total, weight))


def test_rounds_the_multiplied_block_as_granite(device):
    """Granite's layers add x·multiplier, which is rounded, to the residual."""
    x, residual = (normal(64, 64, seed=seed, dtype=torch.float16, device=device) for seed in (0, 1))
    _, total = kernel.add_rms_norm(x, residual, torch.ones(64, device=device).half(), EPS, multiplier=0.22)
    assert torch.equal(total, residual + x * 0.22)
    once = (residual.double() + x.double() * 0.22).half()
    assert not torch.equal(total, once)  # the rounding can be seen


def test_the_reference_is_transformers_norm():
    x, weight = (normal(*shape, seed=0, dtype=torch.bfloat16) for shape in ((6, 40), (40,)))
    assert torch.equal(reference.rms_norm(x, weight, EPS), llama_norm(x, weight))
    assert torch.equal(reference.rms_norm(x, weight, EPS, True), gemma_norm(x, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_reference_norm_of_wide_dtypes_is_the_same(dtype):
    x, weight = normal(6, 40, seed=0).to(dtype), normal(40, seed=1).to(dtype)
    expected = weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS))
    torch.testing.assert_close(reference.rms_norm(x, weight, EPS), expected)


def test_rows_of_zeros_and_large_rows(device):
    residual, ones = torch.zeros(3, 64, device=device), torch.ones(64, device=device)
    residual[1], residual[2, 5] = 1e15, 3e4
    found = kernel.rms_norm(residual, ones, 1e-6)
    torch.testing.assert_close(found, reference.rms_norm(residual.double(), ones.double(), 1e-6).float())
    assert not found[0].any() and found.isfinite().all()
    residual[1, 3] = torch.nan
    residual.requires_grad_()
    found = kernel.rms_norm(residual, ones, 1e-6)
    found.backward(torch.ones_like(found))
    for rows in (found, residual.grad):
        assert rows[1].isnan().all() and rows[[0, 2]].isfinite().all()


def test_strides(device):
    """Rows of a wider buffer, transposed rows, and gradients that are expanded or slices."""
    wide = normal(7, 96, seed=0, device=device)
    cases = wide[:, 32:], wide[:, :64], normal(64, 7, seed=1, device=device).t()
    weight = normal(64, seed=2, device=device)
    for x in cases:
        for upstream in (torch.tensor(0.5, device=device).expand(7, 64), normal(7, 128, seed=3, device=device)[:, 64:]):
            mine, truth = leaves(x.contiguous(), weight)
            strided = (
                mine[0].as_strided(x.shape, x.stride())
                if x.is_contiguous()
                else torch.empty_strided(x.shape, x.stride(), device=device).copy_(mine[0])
            )
            out, total = kernel.add_rms_norm(strided, cases[0], mine[1], EPS)
            expected = reference.add_rms_norm(truth[0], cases[0].double(), truth[1], EPS)
            torch.autograd.backward((out, total), (upstream, upstream))
            torch.autograd.backward(expected, (upstream.double(), upstream.double()))
            for found, true in zip([out, total, *(t.grad for t in mine)], [*expected, *(t.grad for t in truth)]):
                torch.testing.assert_close(found, true.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("used", [0, 1])
def test_one_output_is_used(used, device):
    """The other has no gradient."""
    made = [normal(6, 40, seed=seed, device=device) for seed in (0, 1)]
    mine, truth = leaves(*made, normal(40, seed=2, device=device))
    upstream = normal(6, 40, seed=3, device=device)
    kernel.add_rms_norm(*mine, EPS)[used].backward(upstream)
    reference.add_rms_norm(*truth, EPS)[used].backward(upstream.double())
    for found, true in zip(mine, truth):
        expected = torch.zeros_like(true) if true.grad is None else true.grad
        torch.testing.assert_close(found.grad, expected.float(), rtol=1e-5, atol=1e-6)


def test_both_inputs_share_a_gradient(device):
    """One kernel writes it, once."""
    x, residual = (normal(6, 40, seed=seed, device=device).requires_grad_() for seed in (0, 1))
    out, total = kernel.add_rms_norm(x, residual, torch.ones(40, device=device), EPS)
    gradients = torch.autograd.grad((out, total), (x, residual), (torch.ones_like(out), torch.ones_like(out)))
    assert gradients[0].data_ptr() == gradients[1].data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_main_grad(dtype, device):
    """Is added to in float32; autograd gets no gradient."""
    x, weight = (normal(*s, seed=1, dtype=dtype, device=device) for s in ((300, 48), (48,)))
    weight = torch.nn.Parameter(weight)
    weight.main_grad = torch.full((48,), 0.25, device=device)
    truth = weight.detach().double().requires_grad_()
    upstream = normal(300, 48, seed=2, dtype=dtype, device=device)
    for _ in range(2):
        kernel.rms_norm(x, weight, EPS).backward(upstream)
    reference.rms_norm(x.double(), truth, EPS).backward(upstream.double())
    assert weight.grad is None
    # 300 products with a rounded factor; a sum that was rounded to 16 bits would be off by more.
    tolerance = 2e-5 if dtype == torch.float32 else torch.finfo(dtype).eps * 300**0.5 * 3
    torch.testing.assert_close(weight.main_grad.double(), 0.25 + 2 * truth.grad, rtol=1e-5, atol=tolerance)


def test_main_grad_under_gradient_checkpointing(device):
    weight = torch.nn.Parameter(normal(48, seed=1, device=device))
    x, expected = normal(9, 48, seed=2, device=device), weight.detach().clone().requires_grad_()
    kernel.rms_norm(x, expected, EPS).sum().backward()
    weight.main_grad = torch.zeros(48, device=device)
    torch.utils.checkpoint.checkpoint(kernel.rms_norm, x, weight, EPS, use_reentrant=False).sum().backward()
    assert weight.grad is None and torch.equal(weight.main_grad, expected.grad)


def launches(monkeypatch, call):
    """Names of the kernels that `call` launches."""
    names, run = [], type(kernel.rms_norm_kernel).run

    def record(self, *args, **kwargs):
        names.append(self.fn.__name__)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(type(kernel.rms_norm_kernel), "run", record)
    call()
    return names


def test_kernels_of_a_backward_pass(monkeypatch, device):
    """Two, or one if the weight is frozen; none fills memory."""
    x, residual = (normal(6, 40, seed=seed, device=device).requires_grad_() for seed in (0, 1))
    weight = torch.ones(40, device=device, requires_grad=True)
    upstream = torch.ones(6, 40, device=device), torch.ones(6, 40, device=device)
    for frozen in (False, True):
        outputs = kernel.add_rms_norm(x, residual, weight.detach() if frozen else weight, EPS)
        names = launches(monkeypatch, lambda outputs=outputs: torch.autograd.backward(outputs, upstream))
        assert names == ["rms_norm_bwd_kernel"] + ["sum_partials_kernel"] * (not frozen)


def test_no_rows(device):
    x, weight = torch.ones(0, 16, device=device, requires_grad=True), torch.ones(16, device=device, requires_grad=True)
    out, total = kernel.add_rms_norm(x, x, weight, EPS)
    assert out.shape == total.shape == kernel.rms_norm(x, weight, EPS).shape == (0, 16)
    (out.sum() + total.sum()).backward()
    assert x.grad.shape == (0, 16) and torch.equal(weight.grad, torch.zeros_like(weight))


def test_bitwise_the_same_in_any_batch(device):
    """With and without a gradient, alone and among others; gradients of rows too."""
    x, residual = (normal(9, 576, seed=seed, dtype=torch.bfloat16, device=device) for seed in (0, 1))
    weight = normal(576, seed=2, dtype=torch.bfloat16, device=device)
    upstream = normal(9, 576, seed=3, dtype=torch.bfloat16, device=device)

    def run(rows, requires_grad):
        leaf = residual[rows].clone().requires_grad_(requires_grad)
        out, total = kernel.add_rms_norm(x[rows], leaf, weight, EPS)
        return [out, total, *(torch.autograd.grad((out, total), leaf, (upstream[rows],) * 2) if requires_grad else ())]

    whole = run(slice(9), True)
    for t in range(9):
        for requires_grad in (False, True):
            for found, expected in zip(run(slice(t, t + 1), requires_grad), whole):
                assert torch.equal(found, expected[t : t + 1])


def test_gradients_of_weights_are_the_same_in_every_run(device):
    rows = 5000 if device.type == "cuda" else 600  # of several programs
    x, weight = (normal(*s, seed=0, device=device) for s in ((rows, 32), (32,)))
    weight.requires_grad_()
    gradients = [torch.autograd.grad(kernel.rms_norm(x, weight, EPS), weight, x)[0] for _ in range(2)]
    assert all(torch.equal(g, gradients[0]) for g in gradients)
