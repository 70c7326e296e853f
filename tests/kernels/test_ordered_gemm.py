"""The Triton GEMM beside float64, and the bits of its tilings beside one another."""

import pytest
import torch

from rto_fast.kernels.ordered_gemm import REFERENCE, TILES, Tile, best_tile, expected_us, ordered_gemm

SMALL = (Tile(16, 16, 16, 1, 2), Tile(32, 16, 32, 2, 2), Tile(16, 64, 64, 4, 2), Tile(64, 32, 16, 4, 2))


def operands(rows, cols, inner, dtype, device, biased=True):
    generator = torch.Generator().manual_seed(rows + cols + inner)
    x = torch.randn(rows, inner, generator=generator)
    weight = torch.randn(cols, inner, generator=generator) * inner**-0.5
    bias = torch.randn(cols, generator=generator).to(device, dtype) if biased else None
    return x.to(device, dtype), weight.to(device, dtype), bias


def exact(x, weight, bias):
    return x.double() @ weight.double().T + (0.0 if bias is None else bias.double())


def run(x, weight, bias, tile, dtype=torch.float32):
    return ordered_gemm(x, weight, bias, torch.empty(len(x), len(weight), dtype=dtype, device=x.device), tile)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "rows, cols, inner, biased",
    [
        (1, 1, 1, True),
        (1, 49, 64, False),
        (17, 33, 40, True),
        (5, 8, 129, True),
        (64, 64, 128, False),
        (130, 20, 16, True),
    ],
)
def test_it_is_the_product(rows, cols, inner, biased, dtype, device):
    """The error of a sum in float32 of products that are exact, and one rounding where the output has 16 bits."""
    x, weight, bias = operands(rows, cols, inner, dtype, device, biased)
    expected = exact(x, weight, bias)
    size = exact(x.abs(), weight.abs(), None if bias is None else bias.abs())
    for tile in SMALL:
        found = run(x, weight, bias, tile)
        assert ((found.double() - expected).abs() <= size * (inner + 1) * 2**-24).all()
        if dtype == torch.float16 or x.is_cuda:  # the interpreter truncates to bfloat16
            rounded = run(x, weight, bias, tile, dtype)
            assert torch.equal(rounded, found.to(dtype))


@pytest.mark.parametrize("rows, cols, inner", [(50, 70, 200), (1, 16, 192), (33, 49, 96)])
def test_a_row_has_the_same_bits_in_every_tile_and_number_of_rows(rows, cols, inner, device, ordered_dot):
    x, weight, bias = operands(rows, cols, inner, torch.float16, device)
    whole = run(x, weight, bias, SMALL[0])
    for tile in (*SMALL, REFERENCE):
        assert torch.equal(run(x, weight, bias, tile), whole)
        for first, count in ((0, 1), (rows // 2, 1), (rows // 3, rows // 2)):
            assert torch.equal(run(x[first : first + count], weight, bias, tile), whole[first : first + count])
        columns = slice(cols // 3, cols)
        assert torch.equal(run(x, weight[columns], bias[columns], tile), whole[:, columns])


def test_a_sum_that_is_split_has_other_bits(device, ordered_dot):
    """Else the test above would show nothing."""
    x, weight, _ = operands(33, 49, 96, torch.float16, device)
    halves = run(x[:, :48], weight[:, :48], None, SMALL[0]) + run(x[:, 48:], weight[:, 48:], None, SMALL[0])
    assert (halves != run(x, weight, None, SMALL[0])).float().mean() > 0.05


def test_rows_may_have_any_stride(device):
    x, weight, bias = operands(20, 24, 48, torch.float16, device)
    expected = run(x, weight, bias, SMALL[1])
    wide_x, wide_weight = torch.randn(20, 100, device=device).half(), torch.randn(24, 64, device=device).half()
    wide_x[:, 7:55], wide_weight[:, 16:] = x, weight
    out = torch.full((20, 40), 7.0, device=device)
    ordered_gemm(wide_x[:, 7:55], wide_weight[:, 16:], bias, out[:, 9:33], SMALL[1])
    assert torch.equal(out[:, 9:33], expected)
    assert (out[:, :9] == 7).all() and (out[:, 33:] == 7).all()


def test_a_row_with_nan_spoils_no_other(device):
    x, weight, bias = operands(20, 24, 40, torch.float16, device)
    expected = run(x, weight, bias, SMALL[1])
    x[3, 5], x[4, 6] = float("nan"), float("inf")
    found = run(x, weight, bias, SMALL[1])
    assert found[3].isnan().all() and not found[4].isfinite().any()
    others = [row for row in range(20) if row not in (3, 4)]
    assert torch.equal(found[others], expected[others])


@pytest.mark.parametrize("rows, cols", [(0, 8), (8, 0)])
def test_nothing_is_multiplied(rows, cols, device):
    x, weight, _ = operands(rows, cols, 16, torch.float16, device)
    assert run(x, weight, None, SMALL[0]).shape == (rows, cols)


def test_tiles_follow_from_sizes():
    assert best_tile(16384, 28672, 4096) == REFERENCE
    for sizes in ((1, 4096, 14336), (16, 1024, 3072), (64, 4096, 4096), (256, 1024, 3072), (1, 16, 4096)):
        tile = best_tile(*sizes)
        assert tile.rows <= 64 and tile != REFERENCE
        assert expected_us(tile, *sizes) <= min(expected_us(other, *sizes) for other in TILES)
    # Cards whose blocks have 99 KB of shared memory, as those for games.
    assert best_tile(16, 1024, 3072, 128, 99 << 10) != best_tile(16, 1024, 3072)
    for sizes in ((1, 4096, 14336), (16, 1024, 3072), (64, 4096, 4096), (16384, 28672, 4096)):
        assert best_tile(*sizes, 128, 99 << 10) in (Tile(16, 16, 256, 2, 6), Tile(16, 32, 256, 4, 5), REFERENCE)


@pytest.mark.parametrize("rows", [1, 16, 32])
@pytest.mark.parametrize("cols, inner", [(4096, 4096), (4096, 14336)])
def test_few_rows_of_long_sums_are_expected_at_the_bandwidth(rows, cols, inner):
    """Predictions: within 15 % of the time that the weight takes to be read, as cuBLAS is not (44 instead of 28 µs)."""
    assert expected_us(best_tile(rows, cols, inner), rows, cols, inner) <= 1.15 * 2 * cols * inner / 4.2e6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: the order in which tensor cores add up")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows, cols, inner", [(300, 1024, 3072), (70, 4096, 14336), (33, 200, 1000), (512, 16, 4096)])
def test_all_tiles_have_the_same_bits_on_a_gpu(rows, cols, inner, dtype, device):
    x, weight, bias = operands(rows, cols, inner, dtype, device)
    whole = run(x, weight, bias, REFERENCE)
    assert [tile for tile in TILES if not torch.equal(run(x, weight, bias, tile), whole)] == []
    assert [tile for tile in TILES if not torch.equal(run(x[7:8], weight, bias, tile), whole[7:8])] == []
    error = (whole.double() - exact(x, weight, bias)).abs()
    # A tensor core adds eight products or more at once, and may cut the sum off after 24 bits.
    assert (error <= exact(x.abs(), weight.abs(), bias.abs()) * inner / 8 * 2**-23).all()
