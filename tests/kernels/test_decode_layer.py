"""The kernels between a decoder layer's GEMMs, against float64 and against transformers' own modules."""

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

from rto_fast.kernels import decode_layer as kernel
from rto_fast.kernels import layer_reference as reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def normal(*shape, seed, dtype=torch.float32, device="cpu"):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def rope_of(tokens, head_dim, dtype, device):
    """Cosines, and sines with their signs, of positions that are far apart."""
    angles = torch.arange(tokens)[:, None] * 37.0 * 1000.0 ** (-torch.arange(head_dim // 2) / (head_dim // 2))
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([torch.cat([cos, cos], 1), torch.cat([-sin, sin], 1)], 1).to(device, dtype)


def rounding(dtype, roundings):
    """The relative error of this many roundings. The interpreter truncates to bfloat16, which doubles the error."""
    return 1e-6 if dtype == torch.float32 else roundings * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens, size", [(5, 64), (3, 100), (1, 4096), (2, 1), (4, 5000)])
@pytest.mark.parametrize("adds", [True, False])
def test_add_rms_norm(adds, tokens, size, dtype, device):
    x, residual = (normal(tokens, size, seed=seed, dtype=dtype, device=device) for seed in (0, 1))
    weight = normal(size, seed=2, dtype=dtype, device=device)
    x = x if adds else None
    total = residual.double() + x.double() if adds else residual.double()
    found = kernel.add_rms_norm(x, residual, weight, 1e-5)
    # The sum is rounded before the norm; what is normed is the rounded sum.
    torch.testing.assert_close(residual.double(), total, rtol=rounding(dtype, 1), atol=1e-7)
    expected = reference.rms_norm(residual.double(), weight.double(), 1e-5)
    torch.testing.assert_close(found.double(), expected, rtol=rounding(dtype, 2), atol=1e-6)
    assert found.dtype == dtype and found.shape == residual.shape


def test_the_reference_is_transformers_norm():
    x, weight = normal(6, 40, seed=0, dtype=torch.bfloat16), normal(40, seed=1, dtype=torch.bfloat16)
    module = LlamaRMSNorm(40, 1e-5).to(torch.bfloat16)
    module.weight.data = weight
    assert torch.equal(reference.rms_norm(x, weight, 1e-5), module(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_reference_rotates_as_transformers(dtype):
    """Results are the same to the last bit."""
    x, rope = normal(9, 6, 64, seed=0, dtype=dtype), rope_of(9, 64, dtype, "cpu")
    cos, sin = rope[None, :, 0], torch.cat([rope[:, 1, 32:]] * 2, 1)[None]
    expected, _ = apply_rotary_pos_emb(x.transpose(0, 1)[None], x.transpose(0, 1)[None], cos, sin)
    assert torch.equal(reference.rotate(x, rope), expected[0].transpose(0, 1))


def sums_exactly(*shape, seed, dtype=torch.float32, device="cpu"):
    """Numbers of 7 bits, whose squares float32 adds up without rounding, in any order."""
    return (normal(*shape, seed=seed) * 16).round().clamp(-64, 63).div(16).to(device, dtype)


def llama_norm(x, weight, eps):
    module = LlamaRMSNorm(len(weight), eps).to(weight)
    module.weight.data = weight
    return module(x)


def cuda_norm(x, weight, eps):
    """LlamaRMSNorm by the operations of torch's CUDA kernels: its mean multiplies by 1/D, where a CPU's divides by D."""
    wide = x.float()
    reciprocal = torch.tensor(1.0 / x.shape[-1], dtype=torch.float32, device=x.device)
    scale = torch.rsqrt(wide.square().sum(-1, keepdim=True) * reciprocal + eps)
    return weight * (wide * scale).to(x.dtype)


@pytest.fixture(params=DTYPES, ids=str)
def exact_dtype(request, device):
    if device.type == "cpu" and request.param == torch.bfloat16:
        pytest.skip("Triton's interpreter truncates to bfloat16: needs a GPU")
    return request.param


@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("size", [64, 100, 576, 896, 4096])
def test_add_rms_norm_rounds_where_transformers_does(size, adds, exact_dtype, device):
    """Results are the same to the last bit if the order of the sum does not matter."""
    residual, x = (sums_exactly(50, size, seed=seed, dtype=exact_dtype, device=device) for seed in (0, 1))
    weight, x = normal(size, seed=2, dtype=exact_dtype, device=device), x if adds else None
    total = (residual + x).clamp(-4, 4) if adds else residual
    if adds:
        x = total - residual
    found = kernel.add_rms_norm(x, residual.clone(), weight, 1e-5)
    assert torch.equal(found, cuda_norm(total, weight, 1e-5))
    if device.type == "cuda" or size & (size - 1) == 0:
        assert torch.equal(found, llama_norm(total, weight, 1e-5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_reference_norm_of_wide_dtypes_is_the_same(dtype):
    x, weight = normal(6, 40, seed=0).to(dtype), normal(40, seed=1).to(dtype)
    expected = weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5))
    torch.testing.assert_close(reference.rms_norm(x, weight, 1e-5), expected)


def test_rows_of_zeros_and_large_rows(device):
    residual = torch.zeros(3, 64, device=device)
    residual[1], residual[2, 5] = 1e15, 3e4
    found = kernel.add_rms_norm(None, residual, torch.ones(64, device=device), 1e-6)
    ones = torch.ones(64, device=device, dtype=torch.float64)
    torch.testing.assert_close(found, reference.rms_norm(residual.double(), ones, 1e-6).float())
    assert not found[0].any() and found.isfinite().all()
    residual[1, 3] = torch.nan
    found = kernel.add_rms_norm(None, residual, torch.ones(64, device=device), 1e-6)
    assert found[1].isnan().all() and found[[0, 2]].isfinite().all()


class Case:
    def __init__(self, device, tokens, heads, kv_heads, head_dim, page_size, dtype, norms, seed=0):
        self.heads, self.kv_heads, self.page_size = heads, kv_heads, page_size
        self.qkv = normal(tokens, heads + 2 * kv_heads, head_dim, seed=seed, dtype=dtype, device=device)
        self.rope = rope_of(tokens, head_dim, dtype, device)
        self.norms = [normal(head_dim, seed=seed + i, dtype=dtype, device=device) for i in (1, 2)] if norms else None
        order = torch.randperm(4 * page_size, generator=torch.Generator().manual_seed(seed))
        self.slots = order[:tokens].to(device)
        self.slots[1::4] = -1
        # NaN wherever nothing is written.
        shape = 4, kv_heads, page_size, head_dim
        self.caches = [torch.full(shape, torch.nan, dtype=dtype, device=device) for _ in range(2)]

    def run(self, qkv):
        addresses = torch.tensor([cache.data_ptr() for cache in self.caches], device=qkv.device)
        names = ("query_norm", "key_norm")
        kernel.rotate_and_store(
            qkv,
            self.rope,
            addresses,
            self.slots,
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            page_size=self.page_size,
            eps=1e-6,
            **dict(zip(names, self.norms or ())),
        )
        return qkv

    def truth(self):
        query, key, value = self.qkv.double().split([self.heads, self.kv_heads, self.kv_heads], 1)
        if self.norms:
            query, key = (reference.rms_norm(x, w.double(), 1e-6) for x, w in zip((query, key), self.norms))
        return *(reference.rotate(x, self.rope.double()) for x in (query, key)), value


SHAPES = [  # tokens, heads, kv_heads, head_dim, page_size
    (5, 4, 2, 16, 16),
    (3, 32, 8, 128, 64),
    (6, 6, 2, 64, 24),
    (2, 7, 1, 80, 16),
    (1, 1, 1, 2, 16),
    (9, 16, 16, 20, 16),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rotate_and_store(shape, norms, dtype, device):
    case = Case(device, *shape, dtype, norms)
    found = case.run(case.qkv.clone())
    query, key, value = found.split([case.heads, case.kv_heads, case.kv_heads], 1)
    # Of two rounded products, relative to their size and not to that of their difference.
    expected = case.truth()
    for actual, truth in zip((query, key), expected):
        size = truth.abs().amax(-1, keepdim=True)
        assert ((actual.double() - truth).abs() <= rounding(dtype, 6) * size + 1e-6).all()
    assert torch.equal(value, case.qkv[:, case.heads + case.kv_heads :])  # untouched
    kept = case.slots >= 0
    pages, offsets = case.slots[kept] // case.page_size, case.slots[kept] % case.page_size
    for cache, source in zip(case.caches, (key, value)):
        assert torch.equal(cache[pages, :, offsets], source[kept])
        assert cache.isfinite().sum() == kept.sum() * case.kv_heads * source.shape[-1]


@pytest.mark.parametrize("head_dim", [16, 80, 128])
@pytest.mark.parametrize("norms", [False, True])
def test_rounds_where_transformers_does(norms, head_dim, exact_dtype, device):
    """Results are the same to the last bit if the order of a norm's sum does not matter."""
    case = Case(device, 15, 4, 2, head_dim, 16, exact_dtype, norms)
    case.qkv = sums_exactly(15, 8, head_dim, seed=3, dtype=exact_dtype, device=device)
    query, key, value = case.run(case.qkv.clone()).split([4, 2, 2], 1)
    q, k, _ = case.qkv.split([4, 2, 2], 1)
    if norms:
        norm = llama_norm if device.type == "cuda" else cuda_norm
        q, k = (norm(x, weight, 1e-6) for x, weight in zip((q, k), case.norms))
    cos, sin = case.rope[None, :, 0], case.rope[None, :, 1].clone()
    sin[..., : head_dim // 2].neg_()
    expected = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)
    for actual, truth in zip((query, key), expected):
        assert torch.equal(actual, truth[0].transpose(0, 1))


def test_nothing_to_do(device):
    case = Case(device, 5, 4, 2, 16, 16, torch.float32, False)
    case.slots.fill_(-1)
    case.run(case.qkv.clone())
    assert all(cache.isnan().all() for cache in case.caches)
    case.slots, case.rope = case.slots[:0], case.rope[:0]
    case.run(case.qkv[:0])
    assert kernel.add_rms_norm(None, case.qkv[:0, 0], torch.ones(16, device=device), 1e-6).shape == (0, 16)


def test_bitwise_the_same_in_any_batch(device):
    case = Case(device, 9, 6, 2, 64, 16, torch.bfloat16, True)
    whole = case.run(case.qkv.clone())
    rope, slots = case.rope, case.slots
    for t in range(9):
        case.rope, case.slots = rope[t : t + 1], slots[t : t + 1]
        assert torch.equal(case.run(case.qkv[t : t + 1].clone()), whole[t : t + 1])
