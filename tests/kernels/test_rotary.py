"""Rotary embedding with the norms of heads, in training and with the stores to the cache."""

import pytest
import torch
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb as apply_partial
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

from rto_fast.kernels import layer_reference as reference
from rto_fast.kernels import rotary as kernel
from tests.kernels.layers import DTYPES, assert_near, cuda_norm, normal, skip_truncation, sums_exactly

EPS = 1e-6


def rope_of(tokens, size, dtype, device):
    """Cosines, and sines with their signs, of positions that are far apart."""
    angles = torch.arange(tokens)[:, None] * 37.0 * 1000.0 ** (-torch.arange(size // 2) / (size // 2))
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([torch.cat([cos, cos], 1), torch.cat([-sin, sin], 1)], 1).to(device, dtype)


class Case:
    def __init__(self, device, tokens, heads, kv_heads, head_dim, rotated, dtype, norms, unit_offset=False):
        self.heads = [heads, kv_heads, kv_heads]
        self.qkv = normal(tokens, heads + 2 * kv_heads, head_dim, seed=0, dtype=dtype, device=device)
        self.rope = rope_of(tokens, rotated, dtype, device) if rotated else None
        self.norms = [normal(head_dim, seed=i, dtype=dtype, device=device) for i in (1, 2)] if norms else []
        self.upstream = [normal(tokens, n, head_dim, seed=3, dtype=dtype, device=device) for n in self.heads]
        self.options = dict(num_heads=heads, num_kv_heads=kv_heads, eps=EPS, unit_offset=unit_offset)

    def run(self, module, qkv=None, norms=None, rope=None):
        norms = dict(zip(("query_norm", "key_norm"), self.norms if norms is None else norms))
        rope = self.rope if rope is None else rope
        return module.rotary_embedding(self.qkv if qkv is None else qkv, rope, **norms, **self.options)

    def gradients(self, module, dtype):
        """(outputs, gradients of qkv and of the norms' weights)."""
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in (self.qkv, *self.norms)]
        outputs = self.run(module, leaves[0], leaves[1:], None if self.rope is None else self.rope.to(dtype))
        torch.autograd.backward(outputs, [g.to(dtype) for g in self.upstream])
        return [x.detach() for x in outputs], [leaf.grad for leaf in leaves]


SHAPES = [  # tokens, heads, kv_heads, head_dim, how much of it is rotated
    (5, 4, 2, 16, 16),
    (3, 32, 8, 128, 128),
    (2, 7, 1, 80, 80),
    (1, 1, 1, 2, 2),
    (3, 16, 16, 20, 20),
    (5, 6, 2, 32, 24),
    (3, 3, 1, 24, 6),
    (4, 4, 2, 16, None),
    (2, 4, 2, 15, None),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norms", [False, True, "unit offset"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rotary_embedding(shape, norms, dtype, device):
    case = Case(device, *shape, dtype, norms, norms == "unit offset")
    outputs, gradients = case.gradients(kernel, dtype)
    true_outputs, true_gradients = case.gradients(reference, torch.float64)
    # Of two rounded products, relative to their size and not to that of their difference.
    for found, truth in zip(outputs, true_outputs):
        assert found.dtype == dtype
        assert_near(found, truth, 6, truth.abs().amax(-1, keepdim=True))
    assert torch.equal(outputs[2], case.qkv[:, case.heads[0] + case.heads[1] :])
    # Rounded once; with norms the result may be a small difference of what is large in its head.
    size = torch.cat(case.upstream, 1).double().abs().amax(-1, keepdim=True)
    if norms:
        size = size.maximum(true_gradients[0].abs().amax(-1, keepdim=True)) * 4
    assert_near(gradients[0], true_gradients[0], 2, size)
    # Sums over tokens and heads of products with a rounded factor.
    for found, truth, head in zip(gradients[1:], true_gradients[1:], case.heads):
        assert_near(found, truth, 2, truth.abs() + 6 * (shape[0] * head) ** 0.5 * torch.ones_like(truth))


def test_what_a_tolerance_would_see(device):
    """Gradients of rotation by the wrong sign, or of a norm left out, are far beyond the tolerance of the test above."""
    case = Case(device, 5, 4, 2, 16, 16, torch.float32, True)
    _, right = case.gradients(reference, torch.float64)
    case.rope[:, 1].neg_()
    _, wrong = case.gradients(kernel, torch.float32)
    assert (right[0] - wrong[0].double()).abs().amax() > 0.1


@pytest.mark.parametrize("size, whole", [(64, 64), (48, 64)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_reference_rotates_as_transformers(dtype, size, whole):
    """Results are the same to the last bit."""
    x, rope = normal(9, 6, whole, seed=0, dtype=dtype), rope_of(9, size, dtype, "cpu")
    cos, sin = rope[None, :, 0], torch.cat([rope[:, 1, size // 2 :]] * 2, 1)[None]
    apply = apply_rotary_pos_emb if size == whole else apply_partial
    expected, _ = apply(x.transpose(0, 1)[None], x.transpose(0, 1)[None], cos, sin)
    assert torch.equal(reference.rotate(x, rope), expected[0].transpose(0, 1))


def module_norm(x, weight, eps, unit_offset):
    module = (Gemma3RMSNorm if unit_offset else LlamaRMSNorm)(len(weight), eps).to(weight)
    module.weight.data = weight
    return module(x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [16, 80, 128])
@pytest.mark.parametrize("norms", [False, True, "unit offset"])
def test_rounds_where_transformers_does(norms, head_dim, dtype, device):
    """Results are the same to the last bit if the order of a norm's sum does not matter."""
    skip_truncation(dtype, device)
    unit_offset = norms == "unit offset"
    case = Case(device, 15, 4, 2, head_dim, head_dim, dtype, norms, unit_offset)
    case.qkv = sums_exactly(15, 8, head_dim, seed=3, dtype=dtype, device=device)
    query, key, _ = case.run(kernel)
    q, k, _ = case.qkv.split([4, 2, 2], 1)
    if norms:
        norm = module_norm if device.type == "cuda" else cuda_norm
        q, k = (norm(x, weight, EPS, unit_offset) for x, weight in zip((q, k), case.norms))
    cos, sin = case.rope[None, :, 0], case.rope[None, :, 1].clone()
    sin[..., : head_dim // 2].neg_()
    expected = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)
    for actual, truth in zip((query, key), expected):
        assert torch.equal(actual, truth[0].transpose(0, 1))


class Cache:
    """Pages of keys and values that hold NaN wherever nothing is written; every fourth token has no slot."""

    def __init__(self, case, page_size):
        tokens, _, head_dim = case.qkv.shape
        order = torch.randperm(4 * page_size, generator=torch.Generator().manual_seed(0))
        self.slots, self.page_size = order[:tokens].to(case.qkv.device), page_size
        self.slots[1::4] = -1
        shape = 4, case.heads[1], page_size, head_dim
        self.pages = [torch.full(shape, torch.nan, dtype=case.qkv.dtype, device=case.qkv.device) for _ in range(2)]

    def store(self, case, qkv, rows=slice(None)):
        addresses = torch.tensor([pages.data_ptr() for pages in self.pages], device=qkv.device)
        norms = dict(zip(("query_norm", "key_norm"), case.norms))
        rope = None if case.rope is None else case.rope[rows]
        slots = self.slots[rows]
        kernel.rotate_and_store(qkv, rope, addresses, slots, page_size=self.page_size, **norms, **case.options)
        return qkv.split(case.heads, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norms", [False, True, "unit offset"])
@pytest.mark.parametrize("shape, page_size", list(zip(SHAPES, [16, 64, 24, 16, 16, 16, 16, 16, 16])), ids=str)
def test_rotate_and_store_has_the_bits_of_training(shape, page_size, norms, dtype, device):
    case = Case(device, *shape, dtype, norms, norms == "unit offset")
    expected = case.run(kernel, case.qkv.clone().requires_grad_())
    cache = Cache(case, page_size)
    query, key, value = cache.store(case, case.qkv.clone())
    for found, truth in zip((query, key, value), expected):
        assert torch.equal(found, truth)
    kept = cache.slots >= 0
    pages, offsets = cache.slots[kept] // page_size, cache.slots[kept] % page_size
    for stored, source in zip(cache.pages, (key, value)):
        assert torch.equal(stored[pages, :, offsets], source[kept])
        assert stored.isfinite().sum() == kept.sum() * case.heads[1] * source.shape[-1]


def test_no_slots_and_no_tokens(device):
    case = Case(device, 5, 4, 2, 16, 16, torch.float32, True)
    cache = Cache(case, 16)
    cache.slots.fill_(-1)
    cache.store(case, case.qkv.clone())
    cache.store(case, case.qkv[:0], slice(0))
    assert all(pages.isnan().all() for pages in cache.pages)
    leaves = [t.requires_grad_() for t in (case.qkv[:0].clone(), *case.norms)]
    outputs = case.run(kernel, leaves[0], leaves[1:], case.rope[:0])
    assert [x.shape for x in outputs] == [(0, 4, 16), (0, 2, 16), (0, 2, 16)]
    sum(x.sum() for x in outputs).backward()
    assert leaves[0].grad.shape == (0, 8, 16)
    assert all(torch.equal(leaf.grad, torch.zeros_like(leaf)) for leaf in leaves[1:])


def test_bitwise_the_same_in_any_batch(device):
    case = Case(device, 9, 6, 2, 64, 64, torch.bfloat16, True)
    whole = torch.cat(case.run(kernel), 1)
    for t in range(9):
        alone = case.run(kernel, case.qkv[t : t + 1], rope=case.rope[t : t + 1])
        assert torch.equal(torch.cat(alone, 1), whole[t : t + 1])


def test_outputs_lie_in_one_buffer(device):
    case = Case(device, 5, 4, 2, 16, 16, torch.float32, False)
    for requires_grad in (False, True):
        query, key, value = case.run(kernel, case.qkv.clone().requires_grad_(requires_grad))
        assert query.stride() == key.stride() == value.stride() == (8 * 16, 16, 1)
        assert key.data_ptr() - query.data_ptr() == 4 * 16 * 4 and value.data_ptr() - key.data_ptr() == 2 * 16 * 4


def test_strides(device):
    """Inputs of a wider buffer, and gradients of any strides: slices, transposed or expanded ones, one that is missing."""
    case = Case(device, 5, 4, 2, 16, 16, torch.float32, True)
    _, expected = case.gradients(reference, torch.float64)
    wide = torch.cat([case.qkv, case.qkv], 1).requires_grad_()
    query, key, value = case.run(kernel, wide[:, :8])
    upstream = [
        torch.cat([case.upstream[0]] * 2, 2)[:, :, :16],
        case.upstream[1].transpose(0, 1).contiguous().transpose(0, 1),
        case.upstream[2].permute(2, 0, 1).contiguous().permute(1, 2, 0),
    ]
    torch.autograd.backward((query, key, value), upstream)
    assert_near(wide.grad[:, :8], expected[0], 10, expected[0].abs().amax())
    assert not wide.grad[:, 8:].any()
    for upstream in (torch.tensor(0.5, device=device).expand(5, 2, 16), None):
        qkv, truth = case.qkv.clone().requires_grad_(), case.qkv.double().requires_grad_()
        key = case.run(kernel, qkv)[1]
        true_key = case.run(reference, truth, [w.double() for w in case.norms], case.rope.double())[1]
        for result in (key, true_key):
            result.backward(None if upstream is None else upstream.to(result.dtype)) if upstream is not None else (
                result.square().sum().backward()
            )
        assert_near(qkv.grad, truth.grad, 20, truth.grad.abs().amax())


def test_nan_stays_in_its_head(device):
    case = Case(device, 3, 4, 2, 16, 16, torch.float32, True)
    case.qkv[1, 2, 3] = torch.nan
    outputs, (gradient, *_) = case.gradients(kernel, torch.float32)
    for rows in (torch.cat(outputs, 1), gradient):
        assert rows[1, 2].isnan().all()
        rows[1, 2] = 0.0
        assert rows.isfinite().all()


@pytest.mark.parametrize("kind", ["main_grad", "one main_grad", "frozen", "one frozen"])
def test_weights_of_norms(kind, device):
    case = Case(device, 70, 4, 2, 16, 16, torch.float32, True)
    _, expected = case.gradients(reference, torch.float64)
    weights = [torch.nn.Parameter(weight.clone()) for weight in case.norms]
    for weight in weights[: {"main_grad": 2, "one main_grad": 1}.get(kind, 0)]:
        weight.main_grad = torch.full((16,), 0.25, device=device)
    for weight in weights[: {"frozen": 2, "one frozen": 1}.get(kind, 0)]:
        weight.requires_grad_(False)
    qkv = case.qkv.clone().requires_grad_()
    torch.autograd.backward(case.run(kernel, qkv, weights), case.upstream)
    assert_near(qkv.grad, expected[0], 10, expected[0].abs().amax())
    for weight, truth in zip(weights, expected[1:]):
        if hasattr(weight, "main_grad"):
            assert weight.grad is None
            assert_near(weight.main_grad - 0.25, truth, 40, truth.abs().amax())
        elif weight.requires_grad:
            assert_near(weight.grad, truth, 40, truth.abs().amax())
        else:
            assert weight.grad is None


def test_main_grad_under_gradient_checkpointing(device):
    case = Case(device, 9, 4, 2, 16, 16, torch.float32, True)
    _, (gradient, *expected) = case.gradients(kernel, torch.float32)
    weights = [torch.nn.Parameter(weight.clone()) for weight in case.norms]
    for weight in weights:
        weight.main_grad = torch.zeros(16, device=device)
    qkv = case.qkv.clone().requires_grad_()
    outputs = torch.utils.checkpoint.checkpoint(lambda x: case.run(kernel, x, weights), qkv, use_reentrant=False)
    torch.autograd.backward(outputs, case.upstream)
    assert torch.equal(qkv.grad, gradient)
    assert all(torch.equal(weight.main_grad, truth) for weight, truth in zip(weights, expected))
