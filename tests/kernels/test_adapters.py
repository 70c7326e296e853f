"""LoRA's kernels against float64, and the bits of their rows."""

import pytest
import torch

from rto_fast.kernels import adapters as kernel
from rto_fast.kernels import layer_reference as reference
from rto_fast.kernels.layer_reference import AdapterInput, AdapterOutput
from tests.kernels.layers import DTYPES, normal

# Columns of each projection; ranks of its adapters, None: it has none. Some have several, some tiles are not full.
GROUPS = {
    "one": ([72], [[4]]),
    "qkv": ([96, 24, 24], [[16], [16], [16]]),
    "a gap": ([96, 24, 40], [[16], None, [16]]),
    "gaps at the ends": ([8, 24, 40], [None, [5], None]),
    "ranks": ([40, 72], [[1], [70]]),
    "several adapters": ([40, 24], [[3, 8], [None, 8]]),
    "four projections": ([16, 24, 8, 70], [[4], [8], None, [16]]),
    "the fourth has none": ([16, 24, 8, 70], [[4], [8], [3], None]),
}


def make(group, size, dtype, device, scales=(2.0, -0.3)):
    """(runs, outputs) of a group, an input each."""
    columns, ranks = GROUPS[group]
    runs, outputs, rank = [], [], 0
    starts = [sum(columns[:i]) for i in range(len(columns))]
    for order in range(2):
        for start, width, own in zip(starts, columns, ranks):
            found = own[order] if own is not None and order < len(own) else None
            if found is None:
                continue
            part, seed = slice(rank, rank := rank + found), 10 * start + order
            a = normal(found, size, seed=seed, dtype=dtype, device=device) / size**0.5
            b = normal(width, found, seed=seed + 1, dtype=dtype, device=device)
            runs.append(AdapterInput(part, a, scales[order]))
            outputs.append(AdapterOutput(slice(start, start + width), part, b, scales[order]))
    return runs, outputs, sum(columns)


def run(module, x, base, runs, outputs, keeps=False):
    out = base if base.dtype == x.dtype else torch.empty(base.shape, dtype=x.dtype, device=x.device)
    module.add_adapters(base, module.adapter_input(x, runs, keeps), outputs, out)
    return out


def wide(runs, outputs):
    return [r._replace(a=r.a.double()) for r in runs], [o._replace(b=o.b.double()) for o in outputs]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("rows, size", [(1, 40), (19, 300), (0, 64)])
def test_against_float64(group, rows, size, dtype, device):
    runs, outputs, columns = make(group, size, dtype, device)
    x = normal(rows, size, seed=1, dtype=dtype, device=device)
    base = 3 * normal(rows, columns, seed=2, device=device)
    expected = run(reference, x.double(), base.double(), *wide(runs, outputs))
    # t is rounded, and so is the sum. The interpreter truncates to bfloat16, which doubles the error.
    eps = 0.0 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    bound = (eps + 1e-6) * base.abs().double()
    for r, o in zip(*wide(runs, outputs)):
        t, of_sum = (x.double() @ r.a.t()).abs(), x.double().abs() @ r.a.t().abs()
        bound[:, o.columns] += abs(r.scale) * (eps * t + 1e-6 * of_sum) @ o.b.t().abs()
    for module, keeps in ((kernel, False), (kernel, True), (reference, True)):
        found = run(module, x, base.clone(), runs, outputs, keeps)
        assert found.dtype == dtype and ((found.double() - expected).abs() <= bound).all()
    if rows:
        assert ((expected - base).abs() > 10 * bound).any(), "adapters change nothing"


@pytest.fixture
def tiles(monkeypatch):
    """A function that fixes the tiles of both kernels, and whether one program walks all of K."""

    def fix(block_t, block_n, block_r, block_k, whole):
        monkeypatch.setattr(kernel, "_input_tile", lambda *_: dict(BLOCK_T=block_t, BLOCK_R=block_r, BLOCK_K=block_k))
        monkeypatch.setattr(kernel, "_output_tile", lambda *_: dict(BLOCK_T=block_t, BLOCK_N=block_n, BLOCK_R=block_r))
        monkeypatch.setattr(kernel, "WHOLE_PROGRAMS", 0 if whole else 1 << 30)

    return fix


@pytest.mark.parametrize("group", ["a gap", "ranks", "several adapters"])
def test_bits_depend_on_the_row_alone(group, tiles, ordered_dot, device):
    """Not on the number of rows, the tiles, or who adds up the splits. In float16, which the interpreter rounds rightly."""
    size, rows = 1100, 37  # five splits, the last of them not full
    assert kernel.split_of(size) == 256
    runs, outputs, columns = make(group, size, torch.float16, device)
    x, base = (
        normal(rows, size, seed=1, dtype=torch.float16, device=device),
        normal(rows, columns, seed=2, device=device),
    )
    expected = run(kernel, x, base.clone(), runs, outputs, keeps=True)
    some = slice(20, 23)
    for fixed in [(16, 32, 16, 32, True), (16, 16, 64, 128, False), (32, 64, 32, 64, False), (64, 128, 64, 64, True)]:
        tiles(*fixed)
        assert torch.equal(run(kernel, x, base.clone(), runs, outputs), expected)
        assert torch.equal(run(kernel, x[some], base[some].clone(), runs, outputs), expected[some])
    assert torch.equal(run(kernel, x, base.clone(), runs, outputs, keeps=True), expected)


def test_splits_that_moved_would_be_seen(monkeypatch, ordered_dot, device):
    """Proves that the test above can fail: float32 sums in another order."""
    runs, outputs, columns = make("one", 1100, torch.float32, device)
    x, base = normal(9, 1100, seed=1, device=device), normal(9, columns, seed=2, device=device)
    expected = run(kernel, x, base.clone(), runs, outputs)
    monkeypatch.setattr(kernel, "SPLIT_MULTIPLE", 512)
    assert not torch.equal(run(kernel, x, base.clone(), runs, outputs), expected)


def test_one_rounding_keeps_small_updates(device):
    """Updates of some hundredths of a unit in the last place of the outputs are there, on average.

    Most vanish if the base is rounded first.
    """
    size, columns, dtype = 64, 2048, torch.float16
    x = normal(64, size, seed=1, dtype=dtype, device=device)
    base = normal(64, columns, seed=2, device=device)
    a, b = (
        normal(4, size, seed=3, dtype=dtype, device=device) / 8,
        normal(columns, 4, seed=4, dtype=dtype, device=device),
    )
    scale = 2e-5
    runs, outputs = [AdapterInput(slice(0, 4), a, scale)], [AdapterOutput(slice(0, columns), slice(0, 4), b, scale)]
    update = scale * (x.double() @ a.double().t()) @ b.double().t()

    def gain(before):
        change = run(kernel, x, before.clone(), runs, outputs).double() - base.to(dtype).double()
        return ((change * update).sum() / update.square().sum()).item()

    assert abs(gain(base) - 1) < 0.2 and gain(base.to(dtype).float()) < 0.5


def test_views_and_nan(device):
    """Rows with strides, and NaN in one row, which stays there."""
    runs, outputs, columns = make("qkv", 48, torch.float32, device)
    x, base = normal(5, 96, seed=1, device=device)[:, ::2], normal(5, 2 * columns, seed=2, device=device)[:, :columns]
    base = base.clone()
    x[3, 2] = torch.nan
    expected = run(reference, x.double(), base.double(), *wide(runs, outputs))
    found = run(kernel, x, base, runs, outputs)
    assert found[3].isnan().all() and found.isnan().sum() == columns
    torch.testing.assert_close(found, expected.float(), equal_nan=True)


def test_launches(monkeypatch, device):
    """One for t if the a's are neighbours, one for all outputs; four projections and a second adapter take one more each."""
    for group, expected in (("one", 1), ("qkv", 1), ("a gap", 1), ("several adapters", 2), ("four projections", 2)):
        runs, outputs, columns = make(group, 40, torch.float32, device)
        count = []
        add = kernel._add_spans
        monkeypatch.setattr(kernel, "_add_spans", lambda *args, add=add, count=count: (count.append(1), add(*args)))
        run(kernel, normal(3, 40, seed=1, device=device), normal(3, columns, seed=2, device=device), runs, outputs)
        monkeypatch.undo()
        assert len(count) == expected, group
