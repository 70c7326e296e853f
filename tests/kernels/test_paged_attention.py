"""paged_attention and store_kv against the float64 reference, on the GPU or through Triton's interpreter.

Every cache is NaN wherever no token of a sequence lies, and tables name pages that do not exist beyond their lengths.
"""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rto_fast.kernels import paged_attention as kernel
from rto_fast.kernels import paged_reference as reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Case:
    query: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    block_tables: torch.Tensor
    lengths: torch.Tensor
    scale: float

    @property
    def addresses(self):
        return addresses_of(self.k_cache, self.v_cache)

    def attend(self, query=None, **options):
        return kernel.paged_attention(
            self.query if query is None else query,
            self.addresses,
            self.block_tables,
            self.lengths,
            num_kv_heads=self.k_cache.shape[1],
            page_size=self.k_cache.shape[2],
            scale=self.scale,
            **options,
        )

    def truth(self, absolute_values=False, **options):
        v_cache = self.v_cache.double()
        return reference.paged_attention(
            self.query.double(),
            self.k_cache.double(),
            v_cache.abs() if absolute_values else v_cache,
            self.block_tables,
            self.lengths,
            scale=self.scale,
            **options,
        )


def addresses_of(k_cache, v_cache):
    return torch.tensor([k_cache.data_ptr(), v_cache.data_ptr()], device=k_cache.device)


def nan_cache(device, dtype, *shape):
    return torch.full(shape, float("nan"), device=device, dtype=dtype)


def make(device, lengths, *, group=4, heads=2, head_dim=16, page_size=16, dtype=torch.float32, seed=0):
    """A case with shuffled pages, filled token by token, so that it shares no code with what it tests."""
    generator = torch.Generator().manual_seed(seed)
    blocks = [-(-length // page_size) for length in lengths]
    free = torch.randperm(sum(blocks) + 2, generator=generator).tolist()
    tables = torch.full((len(lengths), max(blocks) + 1), torch.iinfo(torch.int32).max, dtype=torch.int32)
    shape = len(free), heads, page_size, head_dim
    k_cache, v_cache = (nan_cache("cpu", dtype, *shape) for _ in range(2))
    for i, length in enumerate(lengths):
        for block in range(blocks[i]):
            page, count = free.pop(), min(page_size, length - block * page_size)
            tables[i, block] = page
            for cache in (k_cache, v_cache):
                cache[page, :, :count] = torch.randn(heads, count, head_dim, generator=generator).to(dtype)
    query = torch.randn(len(lengths), heads * group, head_dim, generator=generator).to(dtype)
    tensors = query, k_cache, v_cache, tables, torch.tensor(lengths, dtype=torch.int32)
    return Case(*(t.to(device) for t in tensors), scale=1.5 / head_dim**0.5)


def assert_matches(case, actual=None, **options):
    """The error is at most that of rounding weights and output to 16 bits (the interpreter truncates), or 1e-5 in float32.

    Both are relative to the sum of |weight·value|; so is the error of torch in the same dtype.
    """
    num_programs = options.pop("num_programs", None)
    actual = case.attend(num_programs=num_programs, **options) if actual is None else actual
    assert actual.dtype == case.query.dtype and actual.shape == case.query.shape and actual.is_contiguous()
    rounding = 0 if actual.dtype == torch.float32 else 1.5 * torch.finfo(actual.dtype).eps
    bound = (rounding + 1e-5) * case.truth(absolute_values=True, **options) + 1e-7
    error = (actual.double() - case.truth(**options)).abs()
    assert (error <= bound).all(), (error / bound).max()
    assert (actual[case.lengths == 0] == 0).all()
    return actual


@pytest.mark.parametrize("window, softcap", [(None, None), (7, None), (None, 2.0), (20, 3.0)])
def test_reference_is_scaled_dot_product_attention(window, softcap):
    case = make("cpu", (1, 16, 45), dtype=torch.float64)
    actual = case.truth(window=window, softcap=softcap)
    for i, length in enumerate(case.lengths.tolist()):
        positions = torch.arange(length)
        pages, offsets = case.block_tables[i, positions // 16].long(), positions % 16
        key, value = (cache[pages, :, offsets].transpose(0, 1) for cache in (case.k_cache, case.v_cache))
        query = case.query[i, :, None]
        if softcap is None:
            mask = positions >= length - (window or length)
            expected = F.scaled_dot_product_attention(
                query, key, value, attn_mask=mask[None], scale=case.scale, enable_gqa=True
            )
        else:
            scores = softcap * torch.tanh(query @ key.repeat_interleave(4, 0).mT * (case.scale / softcap))
            scores = scores[..., -(window or length) :]
            expected = scores.softmax(-1) @ value.repeat_interleave(4, 0)[:, -(window or length) :]
        torch.testing.assert_close(actual[i], expected[:, 0])


@pytest.mark.parametrize(
    "group, head_dim, page_size, num_programs, dtype",
    [
        (1, 64, 16, 1, torch.float32),
        (1, 128, 32, 3, torch.bfloat16),
        (1, 80, 256, None, torch.float16),
        (2, 16, 16, 8, torch.float32),
        (2, 128, 256, 1, torch.bfloat16),
        (4, 128, 32, 1, torch.bfloat16),
        (4, 128, 16, None, torch.bfloat16),
        (4, 80, 32, 3, torch.float32),
        (4, 256, 16, 1, torch.float16),
        (7, 64, 32, None, torch.float32),
        (7, 96, 16, 8, torch.float16),
        (7, 20, 256, 3, torch.bfloat16),
        (20, 64, 16, 3, torch.float32),
        (4, 64, 24, 3, torch.float32),
    ],
)
def test_values(group, head_dim, page_size, num_programs, dtype, device):
    lengths = (0, 1, page_size - 1, page_size, page_size + 1, 2 * page_size + 1, 200)
    heads = 1 if group == 7 else 2
    case = make(device, lengths, group=group, heads=heads, head_dim=head_dim, page_size=page_size, dtype=dtype)
    assert_matches(case, num_programs=num_programs)


@pytest.mark.parametrize("window", [1, 10, 32, 33, 64, 1000])
@pytest.mark.parametrize("num_programs", [1, 3])
def test_window(window, num_programs, device):
    case = make(device, (0, 1, 9, 10, 11, 32, 64, 65, 130), head_dim=32, heads=1, page_size=32)
    assert_matches(case, num_programs=num_programs, window=window)


@pytest.mark.parametrize("page_size, num_pages", [(32, 5), (64, 2)])
def test_nothing_before_the_window_is_read(page_size, num_pages, device):
    """Pages without a token in the window may be freed."""
    case = make(device, (200,), page_size=page_size)
    expected = case.attend(window=20, num_programs=3)
    case.block_tables[0, :num_pages] = torch.iinfo(torch.int32).max
    for cache in (case.k_cache, case.v_cache):
        cache[case.block_tables[0, num_pages].item(), :, : 180 - num_pages * page_size] = float("nan")
    assert torch.equal(case.attend(window=20, num_programs=3), expected)


@pytest.mark.parametrize("softcap", [0.5, 30.0])
@pytest.mark.parametrize("window, num_programs", [(None, 1), (50, 3)])
def test_softcap(softcap, window, num_programs, device):
    case = make(device, (0, 1, 33, 130), page_size=32)
    case.scale *= 20
    assert_matches(case, softcap=softcap, window=window, num_programs=num_programs)


def test_large_scores(device):
    """One token has all the weight, in any split; scores exceed ±1000."""
    case = make(device, (130, 130), head_dim=64, page_size=64)
    case.scale *= 300
    for num_programs in (1, 3):
        actual = case.attend(num_programs=num_programs)
        torch.testing.assert_close(actual.double(), case.truth(), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("num_programs", [2, 3, 8])
def test_number_of_programs_does_not_matter(num_programs, device):
    case = make(device, (0, 1, 64, 257, 900), head_dim=32, heads=1, page_size=64)
    assert torch.equal(case.attend(num_programs=num_programs), case.attend(num_programs=1))


def test_number_of_programs():
    """Up to two programs on each of 132 SMs, and no more for a row than it has splits."""
    cpu = torch.device("cpu")
    assert kernel._num_programs(256 * 8, 16, cpu) == kernel._num_programs(133, 16, cpu) == 1
    assert kernel._num_programs(132, 16, cpu) == 2
    assert kernel._num_programs(8, 4096, cpu) == 33
    assert kernel._num_programs(8, 4, cpu) == 4
    assert kernel._num_programs(1, 1, cpu) == kernel._num_programs(1, 0, cpu) == 1


def test_most_splits():
    assert [kernel._most_splits(tokens, None) for tokens in (0, 1, 256, 257, 4096)] == [0, 1, 1, 2, 16]
    assert [kernel._most_splits(4096, window) for window in (1, 2, 256, 257, 258, 8192)] == [1, 2, 2, 2, 3, 16]


def test_shared_pages(device):
    """Samples of one prompt share their first two pages."""
    case = make(device, (48, 40, 33, 32))
    case.block_tables[1:, :2] = case.block_tables[0, :2]
    actual = assert_matches(case)
    assert not torch.equal(actual[0], actual[1])


def test_strided_query(device):
    case = make(device, (5, 40), group=2)
    expected = case.attend()
    packed = case.query.new_full((2, 7, 4, 40), float("nan"))
    packed[:, 3, :, 8:24] = case.query
    views = (
        packed[:, 3, :, 8:24],
        case.query.transpose(0, 1).contiguous().transpose(0, 1),
        case.query.mT.contiguous().mT,
    )
    for query in views:
        assert not query.is_contiguous() and torch.equal(case.attend(query), expected)


def test_nan_stays_in_its_sequence(device):
    case = make(device, (40, 40, 40))
    clean = case.attend(num_programs=2)
    case.k_cache[case.block_tables[1, 2].item(), 0, 3, 5] = float("nan")
    actual = case.attend(num_programs=2)
    assert actual[1, :4].isnan().all()
    actual[1, :4] = clean[1, :4]
    assert torch.equal(actual, clean)


@pytest.mark.parametrize("num_programs", [1, 3])
def test_bitwise_repeatable_in_any_slot(num_programs, device):
    case = make(device, (0, 100, 17, 64, 65), dtype=torch.bfloat16, head_dim=64)
    first, second = (case.attend(num_programs=num_programs) for _ in range(2))
    assert torch.equal(first, second)
    order = torch.tensor([3, 1, 4, 0, 2, 1], device=device)
    moved = Case(
        case.query[order],
        case.k_cache,
        case.v_cache,
        F.pad(case.block_tables[order], (0, 5), value=-1),
        case.lengths[order],
        case.scale,
    )
    assert torch.equal(moved.attend(num_programs=num_programs), first[order])


@pytest.mark.parametrize("num_programs", [None, 1, 3])
def test_nothing_to_do(num_programs, device):
    case = make(device, (0, 0))
    assert (case.attend(num_programs=num_programs) == 0).all()
    empty = Case(case.query[:0], case.k_cache, case.v_cache, case.block_tables[:0], case.lengths[:0], case.scale)
    assert empty.attend(num_programs=num_programs).shape == empty.truth().shape == (0, 8, 16)
    assert torch.equal(case.truth(), torch.zeros_like(case.query, dtype=torch.float64))
    kernel.store_kv(case.query[:0], case.query[:0], case.addresses, case.lengths[:0].long(), page_size=16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, head_dim, page_size", [(2, 64, 16), (3, 80, 32), (1, 16, 256)])
def test_store_kv(heads, head_dim, page_size, dtype, device):
    generator = torch.Generator().manual_seed(0)
    slots = torch.randperm(4 * page_size, generator=generator)[:11].to(device)
    slots[[2, 7]] = -1
    slots[8] = -page_size
    # As HF gives them: [1, heads, T, head_dim], transposed; the value as a part of a fused projection.
    key = torch.randn(heads, 11, head_dim, generator=generator).to(device, dtype).transpose(0, 1)
    value = torch.randn(11, 3 * heads, head_dim, generator=generator).to(device, dtype)[:, 2 * heads :]
    k_cache, v_cache, expected_k, expected_v = (
        nan_cache(device, dtype, 4, heads, page_size, head_dim) for _ in range(4)
    )
    kernel.store_kv(key, value, addresses_of(k_cache, v_cache), slots, page_size=page_size)
    reference.store_kv(key, value, expected_k, expected_v, slots)
    for cache, expected, source in ((k_cache, expected_k, key), (v_cache, expected_v, value)):
        assert torch.equal(cache.view(torch.uint8), expected.view(torch.uint8))
        assert torch.equal(cache[slots[0] // page_size, :, slots[0] % page_size], source[0])
        assert cache.isfinite().sum() == 8 * heads * head_dim


def test_decoding_is_causal_attention(device):
    """Tokens are stored one by one and attend to those so far; then the cache and its addresses move."""
    key, value, query = torch.randn(3, 2, 20, 16, generator=torch.Generator().manual_seed(0)).to(device)
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    k_cache, v_cache = (nan_cache(device, torch.float32, 3, 2, 16, 16) for _ in range(2))
    addresses, tables = addresses_of(k_cache, v_cache), torch.tensor([[2, 0]], device=device, dtype=torch.int32)
    for t in range(20):
        slots = tables[0, t // 16].long()[None] * 16 + t % 16
        kernel.store_kv(key[None, :, t], value[None, :, t], addresses, slots, page_size=16)
        if t == 17:
            moved = k_cache.clone(), v_cache.clone()
            k_cache.fill_(float("nan"))
            addresses.copy_(addresses_of(*moved))
        lengths = torch.tensor([t + 1], device=device, dtype=torch.int32)
        out = kernel.paged_attention(
            query[None, :, t], addresses, tables, lengths, num_kv_heads=2, page_size=16, scale=0.25
        )
        torch.testing.assert_close(out[0], expected[:, t], rtol=1e-5, atol=1e-5)


def test_offsets_beyond_32_bits(device):
    """Pages begin up to 2^31 elements after the start; NumPy maps the 4 GB of the cache and touches few."""
    pages, shape = (1 << 31) // (2 * 256 * 64) + 2, (2, 256, 64)
    size = pages * 2 * 256 * 64
    memories = [
        torch.empty(size, dtype=torch.float16, device=device)
        if device.type == "cuda"
        else torch.from_numpy(np.empty(size, "f2"))
        for _ in range(2)
    ]
    far = Case(None, *(memory.view(pages, *shape) for memory in memories), None, None, 0.2)
    near = make(device, (300,), group=1, head_dim=64, page_size=256, dtype=torch.float16)
    far.query, far.lengths, far.scale = near.query, near.lengths, near.scale
    far.block_tables = torch.tensor([[pages - 1, 65536 - 1]], device=device, dtype=torch.int32)
    for block, count in ((0, 256), (1, 44)):
        source, target = near.block_tables[0, block].item(), far.block_tables[0, block].item()
        key, value = (cache[source].transpose(0, 1)[:count] for cache in (near.k_cache, near.v_cache))
        slots = target * 256 + torch.arange(count, device=device)
        kernel.store_kv(key, value, far.addresses, slots, page_size=256)
        assert torch.equal(far.k_cache[target].transpose(0, 1)[:count], key)
    assert torch.equal(far.attend(num_programs=2), near.attend(num_programs=2))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs")
@pytest.mark.parametrize("num_programs", [1, 3])
def test_graph_outlives_its_cache(num_programs, device):
    first, second = (make(device, (100, 0, 33), dtype=torch.bfloat16, seed=seed) for seed in (0, 1))
    inputs = [x.clone() for x in (first.query, first.addresses, first.block_tables, first.lengths)]

    def attend():
        return kernel.paged_attention(
            *inputs, num_kv_heads=2, page_size=16, scale=first.scale, num_programs=num_programs
        )

    attend()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend()
    for case in (second, first):
        for x, new in zip(inputs, (case.query, case.addresses, case.block_tables, case.lengths)):
            x.copy_(new)
        graph.replay()
        assert torch.equal(out, case.attend(num_programs=num_programs))
