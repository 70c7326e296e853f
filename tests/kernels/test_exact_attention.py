"""Decode attention has the bits of training's, whatever shares the work, on the GPU or through Triton's interpreter.

Cases on a CPU are in float32 and float16, and products sum in the order of k (`ordered_dot`). Splits are short there, so
that sequences have many. A GPU runs the last tests, with bfloat16, tensor cores and whole splits.
"""

from dataclasses import dataclass

import pytest
import torch
import triton
import triton.language as tl

from rto_fast.kernels import attention_forward, paged_attention
from tests.kernels.test_attention import bounds, needs_cuda, tiles


@dataclass
class Case:
    """Packed sequences, and the same keys and values in shuffled pages."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    lengths: tuple[int, ...]
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    tables: torch.Tensor
    options: dict

    def trained(self, last=None):
        """The output [T, num_heads, head_dim]; given `last`, of as many queries at the ends of the sequences."""
        device = self.query.device
        cu_seqlens = cu_seqlens_k = bounds(self.lengths, device)
        query, lengths = self.query, self.lengths
        if last is not None:
            query, lengths = self.query[self.rows(last)], last
            cu_seqlens = bounds(last, device)
        return attention_forward.attention_forward(
            query, self.key, self.value, cu_seqlens, cu_seqlens_k, max(lengths), *self.options.values()
        )[0]

    def rows(self, last):
        ends = bounds(self.lengths, "cpu").tolist()[1:]
        return [row for end, count in zip(ends, last) for row in range(end - count, end)]

    def decoded(self, positions, num_programs=None):
        """The output at `positions`, pairs (sequence, position), each decoded as the last token of its sequence."""
        device = self.query.device
        starts = bounds(self.lengths, "cpu").tolist()
        rows = [starts[sequence] + position for sequence, position in positions]
        return paged_attention.paged_attention(
            self.query[rows],
            torch.tensor([self.k_cache.data_ptr(), self.v_cache.data_ptr()], device=device),
            self.tables[[sequence for sequence, _ in positions]],
            torch.tensor([position + 1 for _, position in positions], dtype=torch.int32, device=device),
            num_kv_heads=self.key.shape[1],
            page_size=self.k_cache.shape[2],
            num_programs=num_programs,
            **self.options,
        ), rows


def make(device, lengths, *, heads=1, group=2, head_dim=16, page_size=16, dtype=torch.float32, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    shape = sum(lengths), heads * (group + 2), head_dim
    qkv = (2 * torch.randn(shape, generator=generator)).to(dtype)
    query, key, value = qkv.split([heads * group, heads, heads], 1)
    blocks = [-(-length // page_size) for length in lengths]
    free = torch.randperm(sum(blocks), generator=generator).tolist()
    tables = torch.full((len(lengths), max(blocks)), torch.iinfo(torch.int32).max, dtype=torch.int32)
    caches = [torch.full((len(free), heads, page_size, head_dim), float("nan"), dtype=dtype) for _ in range(2)]
    start = 0
    for sequence, length in enumerate(lengths):
        for block in range(blocks[sequence]):
            page, count = free.pop(), min(page_size, length - block * page_size)
            tables[sequence, block] = page
            for cache, tokens in zip(caches, (key, value)):
                first = start + block * page_size
                cache[page, :, :count] = tokens[first : first + count].transpose(0, 1)
        start += length
    options = {"scale": head_dim**-0.5, "window": None, "softcap": None} | options
    return Case(
        *(x.to(device) for x in (query, key, value)), lengths, *(x.to(device) for x in (*caches, tables)), options
    )


def splits_of(monkeypatch, keys):
    monkeypatch.setattr(attention_forward, "SPLIT_KEYS", keys)


def ends(case, step=1):
    """Positions at which blocks and splits begin and end, of every sequence."""
    edges = {0, 1, 30, 31, 32, 33, 62, 63, 64, 65, 127, 128, 129, 191, 192, 255, 256, 257, 299, 511, 512}
    return [
        (sequence, position)
        for sequence, length in enumerate(case.lengths)
        for position in sorted((edges | {length - 1}) & set(range(length)))[::-step]
    ]


def assert_decodes_as_trained(case, programs=(1, 3), positions=None):
    expected = case.trained()
    for num_programs in programs:
        found, rows = case.decoded(ends(case) if positions is None else positions, num_programs)
        assert found.isfinite().all() and torch.equal(found, expected[rows]), (found != expected[rows]).sum()


@pytest.mark.parametrize(
    "lengths, group, head_dim, page_size, dtype, options",
    [
        ((1, 63, 64, 65), 1, 16, 16, torch.float32, {}),
        ((150, 0, 33), 2, 24, 32, torch.float32, {"softcap": 2.0}),
        ((140,), 3, 64, 64, torch.float16, {}),
        ((200, 1), 2, 16, 24, torch.float16, {"window": 70}),
        ((97,), 7, 24, 16, torch.float32, {"window": 1}),
        ((130, 65), 2, 64, 16, torch.float32, {"window": 33, "softcap": 5.0}),
    ],
)
def test_decode_is_training(lengths, group, head_dim, page_size, dtype, options, device, ordered_dot, monkeypatch):
    splits_of(monkeypatch, 64)
    case = make(device, lengths, group=group, head_dim=head_dim, page_size=page_size, dtype=dtype, **options)
    assert_decodes_as_trained(case)


@pytest.mark.parametrize("length, window", [(255, None), (256, None), (257, None), (300, 280), (600, None)])
def test_whole_splits(length, window, device, ordered_dot):
    case = make(device, (length,), group=1, dtype=torch.float16, page_size=64, window=window)
    last = [(0, position) for position in (255, 256, length - 1) if position < length]
    assert_decodes_as_trained(case, (1, 2), last)


@pytest.mark.parametrize("seed", range(4))
def test_random_cases(seed, device, ordered_dot, monkeypatch):
    def draw(*choices):
        return choices[torch.randint(len(choices), (), generator=generator)]

    generator = torch.Generator().manual_seed(seed)
    splits_of(monkeypatch, draw(64, 128))
    case = make(
        device,
        tuple(torch.randint(1, 160, (draw(1, 2),), generator=generator).tolist()),
        heads=draw(1, 2),
        group=draw(1, 2, 3),
        head_dim=draw(16, 24, 48),
        page_size=draw(16, 24, 64, 128),
        dtype=draw(torch.float32, torch.float16),
        seed=seed,
        window=draw(None, 2, 63, 64, 65, 100),
        softcap=draw(None, 0.5, 30.0),
    )
    positions = [(0, int(x)) for x in torch.randint(case.lengths[0], (3,), generator=generator)]
    assert_decodes_as_trained(case, (1, draw(2, 3, 4, 9)), positions + [(0, case.lengths[0] - 1)])


def test_number_of_programs_does_not_matter(device, ordered_dot, monkeypatch):
    """More than there are splits, too; and more splits than are merged at once."""
    splits_of(monkeypatch, 32)
    monkeypatch.setattr(paged_attention, "MERGED_AT_ONCE", 64)
    case = make(device, (330, 64), group=3)
    first, _ = case.decoded([(0, 329), (1, 63), (0, 100), (0, 0)], 1)
    for num_programs in (2, 5, 11, 16, None):
        assert torch.equal(case.decoded([(0, 329), (1, 63), (0, 100), (0, 0)], num_programs)[0], first)


@pytest.mark.parametrize("merge_first", [True, False])
@pytest.mark.parametrize("window", [None, 40])
def test_tiles_that_merge_before_or_after_blocks(merge_first, window, device, ordered_dot, monkeypatch):
    """Rows of a tile see different splits; an H100's kernel merges before a block, others after it."""
    splits_of(monkeypatch, 64)
    case = make(device, (200, 70), group=1, window=window)
    found = []
    for rows in (32, 128):
        tiles(monkeypatch, rows)
        monkeypatch.setattr(
            attention_forward,
            "fit_two_states",
            lambda rows, options, query: (rows, options | {"SPLIT": 64, "MERGE_FIRST": merge_first}),
        )
        found.append(case.trained())
    assert torch.equal(*found)
    decoded, rows = case.decoded(ends(case), 2)
    assert torch.equal(decoded, found[0][rows])


@pytest.mark.parametrize("options", [{}, {"window": 50, "softcap": 2.0}])
def test_prefill_with_earlier_keys(options, device, ordered_dot, monkeypatch):
    """Pieces of prompts that follow what the cache holds; they are shorter than a split, their keys are not."""
    splits_of(monkeypatch, 64)
    case, last = make(device, (150, 66, 40), **options), (20, 1, 40)
    assert torch.equal(case.trained(last), case.trained()[case.rows(last)])


@triton.jit
def sum_in_any_order(s):
    return tl.sum(s, 1)


@triton.jit
def merge_backwards(m, total, acc, split_m, split_total, split_acc):
    for i in tl.static_range(split_acc.shape[0]):
        at = (tl.arange(0, split_acc.shape[0]) == split_acc.shape[0] - 1 - i)[:, None]
        m2 = tl.max(tl.where(at, split_m[:, None], float("-inf")), 0)
        total2 = tl.sum(tl.where(at, split_total[:, None], 0.0), 0)
        acc2 = tl.sum(tl.where(at, split_acc, 0.0), 0)[None, :]
        m, total, acc = attention_forward.merge(m, total, acc, m2, total2, acc2)
    return m, total, acc


def planted(name, monkeypatch):
    """A difference between the two kernels."""
    if name == "smaller blocks":
        tiling = paged_attention._tiling
        monkeypatch.setattr(paged_attention, "_tiling", lambda *args: tiling(*args) | {"BLOCK_N": 16})
    elif name == "longer splits":
        tiling = paged_attention._tiling
        monkeypatch.setattr(paged_attention, "_tiling", lambda *args: tiling(*args) | {"SPLIT": 128})
    elif name == "sums in another order":
        monkeypatch.setattr(paged_attention, "sum_of_columns", sum_in_any_order)
    else:
        monkeypatch.setattr(paged_attention, "merge_in_order", merge_backwards)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled once")
@pytest.mark.parametrize("name", ["smaller blocks", "longer splits", "sums in another order", "merged backwards"])
def test_a_planted_difference_is_found(name, device, ordered_dot, monkeypatch):
    splits_of(monkeypatch, 64)
    case = make(device, (200,), group=3, head_dim=32)
    positions = [(0, position) for position in (199, 150)]
    assert_decodes_as_trained(case, (4,), positions)
    planted(name, monkeypatch)
    with pytest.raises(AssertionError):
        assert_decodes_as_trained(case, (4,), positions)


@needs_cuda
@pytest.mark.parametrize("page_size", [16, 64, 256])
@pytest.mark.parametrize(
    "heads, group, head_dim, dtype, options",
    [
        (8, 2, 128, torch.bfloat16, {}),
        (8, 4, 128, torch.bfloat16, {"window": 700}),
        (3, 3, 64, torch.bfloat16, {}),
        (2, 7, 64, torch.float16, {"softcap": 20.0}),
        (4, 2, 256, torch.bfloat16, {"window": 1024, "softcap": 50.0}),
        (4, 1, 96, torch.float16, {}),
        (2, 3, 64, torch.float32, {}),
    ],
)
def test_on_a_gpu(heads, group, head_dim, dtype, options, page_size, device, monkeypatch):
    """Tensor cores by mma.sync and wgmma, tiles of 64 and 128 queries, one program of a sequence and many."""
    shape = {"heads": heads, "group": group, "head_dim": head_dim, "page_size": page_size, "dtype": dtype}
    case = make(device, (700, 1, 2100, 256, 257, 333), **shape, **options)
    assert_decodes_as_trained(case, (1, 2, 5, None))
    expected, last = case.trained(), (100, 1, 3, 256, 1, 64)
    assert torch.equal(case.trained(last), expected[case.rows(last)])
    if head_dim <= 128 and dtype != torch.float32 and attention_forward.architecture(device) == 90:
        for rows in (64, 128):
            monkeypatch.setattr(attention_forward, "rows_of_a_tile", lambda *_, rows=rows: rows)
            assert torch.equal(case.trained(), expected)


@needs_cuda
def test_a_long_sequence_on_a_gpu(device):
    """More splits than a warp merges at once."""
    case = make(device, (33000,), heads=2, group=2, head_dim=128, page_size=64, dtype=torch.bfloat16)
    assert_decodes_as_trained(case, (1, 7, None), [(0, 32999), (0, 32768), (0, 16384), (0, 8191)])
