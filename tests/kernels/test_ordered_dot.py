"""`ordered_dot` of tests/conftest.py: a row of `tl.dot` has the same bits in every tile."""

import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def _product(a, b, out, K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    total = tl.full([ROWS, COLUMNS], 0.5, tl.float32)
    for start in range(0, K, BLOCK):
        ks = start + tl.arange(0, BLOCK)
        left, right = tl.load(a + rows[:, None] * K + ks[None]), tl.load(b + columns[None] * K + ks[:, None])
        total = tl.dot(left, right, total, input_precision="ieee")
    tl.store(out + rows[:, None] * COLUMNS + columns[None], total)


def _multiply(a, b, block):
    out = torch.empty(len(a), len(b), device=a.device)
    _product[(1,)](a, b, out, a.shape[1], len(a), len(b), block)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_bits_of_an_element_do_not_depend_on_the_tile(ordered_dot, device, dtype):
    torch.manual_seed(0)
    a, b = (torch.randn(64, 128).to(device, dtype) for _ in range(2))
    whole = _multiply(a, b, 128)
    for rows, columns, block in ((16, 16, 16), (16, 64, 32), (64, 16, 64), (32, 32, 128)):
        assert torch.equal(_multiply(a[:rows], b[:columns], block), whole[:rows, :columns])
    torch.testing.assert_close(whole.double(), a.double() @ b.double().T + 0.5, rtol=1e-5, atol=1e-4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's order is not known")
def test_the_sum_is_in_the_order_of_k(ordered_dot, device):
    """1 is lost beside 2^24 and is not lost after it is gone, so the order of the terms shows."""
    a, b = torch.zeros(16, 16), torch.ones(16, 16)
    a[0, :3], a[1, :3] = torch.tensor([2.0**24, 1.0, -(2.0**24)]), torch.tensor([2.0**24, -(2.0**24), 1.0])
    assert _multiply(a, b, 16)[:2, 0].tolist() == [0.0, 1.5 - 0.5]
