"""The gradient of an embedding: against float64, for sizes around those of chunks and blocks, and the same in every run."""

import pytest
import torch
import torch.nn.functional as F

from rto_fast.kernels import embedding as kernels

V = 50


def ids_of(count, kind, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if kind == "one":
        return torch.full((count,), V - 1)
    ids = torch.randint(0, V, (count,), generator=generator)
    return ids if kind == "any" else torch.where(ids % 3 == 0, ids, 7)  # most are one token


def gradients(ids, size, dtype, device, padding_idx=None, main_grad=None):
    """(gradient or main_grad, float64 gradient, the sum of the absolute values of its terms)."""
    generator = torch.Generator().manual_seed(len(ids))
    weight = torch.randn(V, size, generator=generator).to(device, dtype).requires_grad_()
    towards = torch.randn(len(ids), size, generator=generator).to(device, dtype)
    if main_grad is not None:
        weight.main_grad = main_grad
    out = kernels.embedding(ids.to(device), weight, padding_idx)
    assert torch.equal(out, F.embedding(ids.to(device), weight))
    out.backward(towards)
    exact, sizes = (
        torch.zeros(V, size, dtype=torch.float64).index_add_(0, ids, rows.double().cpu())
        for rows in (towards, towards.abs())
    )
    if padding_idx is not None:
        exact[padding_idx] = 0.0
    return weight.grad if main_grad is None else main_grad, exact, sizes


@pytest.mark.parametrize("kind", ["any", "one", "skewed"])
@pytest.mark.parametrize("count, size", [(1, 1), (63, 5), (64, 8), (65, 16), (200, 3), (129, 513)])
def test_gradients(count, size, kind, device):
    found, exact, sizes = gradients(ids_of(count, kind), size, torch.float32, device)
    bound = 16 * torch.finfo(torch.float32).eps * sizes  # additions of up to 200 terms by pairs and chunks
    assert ((found.cpu().double() - exact).abs() <= bound).all()
    assert found.shape == (V, size) and not found.cpu()[exact.abs().sum(1) == 0].any()


def test_a_main_grad_gets_the_gradient_in_float32_and_autograd_none(device):
    before = torch.randn(V, 24, generator=torch.Generator().manual_seed(1)).to(device)
    main_grad = before.clone()
    found, exact, sizes = gradients(ids_of(300, "any"), 24, torch.float16, device, main_grad=main_grad)
    assert found is main_grad
    error = (main_grad.double() - before.double()).cpu() - exact
    assert (error.abs() <= 32 * torch.finfo(torch.float32).eps * (sizes + before.abs().cpu())).all()
    missing = [i for i in range(V) if i not in ids_of(300, "any").tolist()]
    assert torch.equal(main_grad[missing], before[missing])


def test_the_row_of_padding_has_no_gradient(device):
    found, exact, _ = gradients(ids_of(100, "any"), 6, torch.float32, device, padding_idx=7)
    assert not found[7].any() and exact[8].any() and found[8].any()


def test_no_tokens_and_no_gradient(device):
    found, *_ = gradients(torch.empty(0, dtype=torch.int64), 4, torch.float32, device)
    assert not found.any()
    weight = torch.randn(V, 4, device=device)
    assert not kernels.embedding(torch.tensor([3], device=device), weight, None).requires_grad


def test_rows_of_gradients_may_have_any_stride(device):
    ids = ids_of(70, "skewed").to(device)
    weight = torch.zeros(V, 6, device=device, requires_grad=True)
    wide = torch.randn(70, 12, device=device)
    kernels.embedding(ids[None], weight, None).backward(wide[None, :, :6])
    expected = torch.zeros(V, 6, device=device).index_put_((ids,), wide[:, :6], accumulate=True)
    torch.testing.assert_close(weight.grad, expected)


def test_nan_stays_nan_and_stays_in_its_row(device):
    ids = torch.tensor([3, 5, 3], device=device)
    weight = torch.zeros(V, 4, device=device, requires_grad=True)
    towards = torch.ones(3, 4, device=device)
    towards[2, 1] = torch.nan
    kernels.embedding(ids, weight, None).backward(towards)
    assert weight.grad.isnan().sum() == 1 and weight.grad[3, 1].isnan()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("count", [2000, 3072, 20000, 65536])
@pytest.mark.parametrize("kind", ["any", "skewed"])
def test_a_hundred_runs_have_the_same_bits(count, kind, device):
    torch.use_deterministic_algorithms(False)
    ids, size = ids_of(count, kind), 512
    weight = torch.zeros(V, size, device=device, dtype=torch.bfloat16, requires_grad=True)
    towards = torch.randn(count, size, device=device, dtype=torch.bfloat16)
    found = []
    for _ in range(100):
        weight.main_grad = torch.zeros(V, size, device=device)
        kernels.embedding(ids.to(device), weight, None).backward(towards)
        found.append(weight.main_grad)
    assert all(torch.equal(each, found[0]) for each in found)
