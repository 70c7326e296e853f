"""GEMMs of the linear ops are rounded once, for sums of any length."""

import pytest
import torch
from torch.overrides import TorchFunctionMode

from rto_fast.kernels import gemm as gemm_module
from rto_fast.kernels import linear_ppo_loss, linear_token_logps

DTYPES = (torch.bfloat16, torch.float16)


class SplitK(TorchFunctionMode):
    """Makes CPU tensors look like CUDA's, and computes 16-bit products as sums of 16-bit parts, as cuBLAS may do."""

    def __init__(self, parts):
        super().__init__()
        self.parts, self.outputs = parts, []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function == torch.Tensor.is_cuda.__get__:
            return True
        if function not in (torch.mm, torch.addmm):
            return function(*args, **kwargs or {})
        *start, a, b = args
        out = kwargs["out"]
        self.outputs.append(out.dtype)
        assert a.dtype == b.dtype and kwargs.get("out_dtype", a.dtype) == out.dtype
        parts = 1 if out.dtype == torch.float32 else self.parts
        total = start[0].float() if start else torch.zeros(out.shape)
        for x, y in zip(a.float().chunk(parts, 1), b.float().chunk(parts, 0)):
            total = (total + (x @ y).to(out.dtype).float()).to(out.dtype).float()
        return out.copy_(total)


def operands(dtype, tokens=4096, vocab=96, hidden=64, device="cpu"):
    """Gradients of logits [T, V] of mixed signs, whose sums over tokens cancel, and hidden states [T, D]."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(tokens, n, generator=generator).to(device, dtype) for n in (vocab, hidden)]


def errors(found, exact):
    """(relative error, relative error of the exact values after rounding)"""
    size = exact.norm()
    return (found.double() - exact).norm() / size, (exact.to(found.dtype).double() - exact).norm() / size


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parts", [2, 8, 32])
def test_a_split_sum_is_rounded_once(parts, dtype):
    """16-bit parts would have errors of 1.5, 2.4 and 4.2 roundings. They are simulated, without a GPU."""
    dlogits, hidden = operands(dtype)
    with SplitK(parts):
        found = gemm_module.gemm(dlogits.t(), hidden, torch.empty(96, 64, dtype=dtype))
        split = torch.mm(dlogits.t(), hidden, out=torch.empty(96, 64, dtype=dtype))
    exact = dlogits.double().t() @ hidden.double()
    error, rounding = errors(found, exact)
    assert error <= 1.01 * rounding
    assert errors(split, exact)[0] > 1.3 * rounding, "the product of parts is as good: nothing is tested"


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sum_is_added_to(dtype):
    dlogits, hidden = operands(dtype)
    start = torch.randn(96, 64, generator=torch.Generator().manual_seed(1))
    exact = start.double() + dlogits.double().t() @ hidden.double()
    for out in (start.clone(), start.to(dtype)):
        exact = out.double() + dlogits.double().t() @ hidden.double()
        with SplitK(8):
            found = gemm_module.gemm(dlogits.t(), hidden, out, accumulate=True)
        error, rounding = errors(found, exact)
        assert found is out and error <= max(2 * rounding, 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_products_are_written_as_they_are(dtype, monkeypatch):
    """Large products have enough tiles for the GPU, so they are not split; they would take much memory in float32."""
    dlogits, hidden = operands(dtype, tokens=16)
    for limit, written in ((96 * 64 - 1, dtype), (96 * 64, torch.float32)):
        monkeypatch.setattr(gemm_module, "SPLIT_K_ELEMENTS", limit)
        with SplitK(1) as mode:
            gemm_module.gemm(dlogits.t(), hidden, torch.empty(96, 64, dtype=dtype))
        assert mode.outputs == [written]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunks", [1, 3])
def test_gradients_of_hidden_states_add_up_in_float32(chunks, dtype, device, monkeypatch):
    """Over the vocabulary, in every product and from one chunk to the next."""
    outputs = []
    for module in (linear_token_logps, linear_ppo_loss):
        gemm = module.gemm
        monkeypatch.setattr(
            module,
            "gemm",
            lambda a, b, out, *rest, gemm=gemm, **options: (
                outputs.append((tuple(out.shape), out.dtype)),
                gemm(a, b, out, *rest, **options),
            )[1],
        )
    monkeypatch.setattr(linear_token_logps, "MAX_CHUNK_COLS", 384 // chunks)
    monkeypatch.setattr(linear_ppo_loss, "rows_per_chunk", lambda rows, *_: rows // chunks)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 16, generator=generator).to(device, dtype) for n in (6, 384))
    hidden.requires_grad_()
    labels, ones = torch.arange(6, device=device), torch.ones(6, device=device)
    linear_token_logps.linear_token_logps(hidden, weight, labels).sum().backward()
    linear_ppo_loss.linear_ppo_loss(hidden, weight, labels, -5 * ones, ones, ones > 0)[0].backward()
    of_hidden = [found for shape, found in outputs if shape[-1] == 16]
    assert len(of_hidden) == 2 * chunks and set(of_hidden) == {torch.float32}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: how cuBLAS splits a sum")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "vocab, hidden_size, tokens",
    [(512, 64, 65536), (1000, 384, 16384), (4096, 2048, 8192), (16384, 640, 8192), (12288, 1024, 32768)],
)
def test_gradients_of_the_weight_on_a_gpu(vocab, hidden_size, tokens, dtype, capsys):
    """Errors are those of one rounding, for few tiles, where cuBLAS may split the sums, and for many, where it should not.

    The user's flags are unchanged.
    """
    flags = torch.backends.cuda.matmul
    before = flags.allow_bf16_reduced_precision_reduction, flags.allow_fp16_reduced_precision_reduction
    dlogits, hidden = operands(dtype, tokens, vocab, hidden_size, "cuda")
    exact = dlogits.double().t() @ hidden.double()
    out = torch.empty(vocab, hidden_size, dtype=dtype, device="cuda")
    direct, rounding = errors(torch.mm(dlogits.t(), hidden, out=out), exact)
    error, _ = errors(gemm_module.gemm(dlogits.t(), hidden, out), exact)
    with capsys.disabled():
        print(f"\n{dtype} [{vocab}, {hidden_size}] of {tokens} tokens: error {error:.3%}, 16-bit output {direct:.3%}")
    assert error <= 1.05 * rounding
    after = flags.allow_bf16_reduced_precision_reduction, flags.allow_fp16_reduced_precision_reduction
    assert after == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: how cuBLAS splits a sum")
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_hidden_states_on_a_gpu(dtype, capsys):
    """Sums over 65,539 tokens, which would make 16-bit outputs wrong by 1 to 2 %."""
    weight, dlogits = operands(dtype, 65539, 256, 300, "cuda")
    exact = dlogits.double().t() @ weight.double()
    found = gemm_module.gemm(dlogits.t(), weight, torch.empty(300, 256, dtype=torch.float32, device="cuda"))
    direct, rounding = errors(dlogits.t() @ weight, exact)
    error, _ = errors(found.to(dtype), exact)
    with capsys.disabled():
        print(f"\n{dtype} [300, 256] of 65,539 columns: error {error:.3%}, 16-bit output {direct:.3%}")
    assert error <= 1.05 * rounding


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *DTYPES])
def test_a_product_of_any_dtype_is_added_to_float32_gradients(dtype):
    a, b = operands(dtype, tokens=64)
    out = torch.ones(96, 64)
    assert gemm_module.gemm(a.t(), b, out, accumulate=True) is out
    torch.testing.assert_close(out.double(), 1.0 + a.double().t() @ b.double(), rtol=1e-5, atol=1e-5)
