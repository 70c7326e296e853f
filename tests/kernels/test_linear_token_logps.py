"""linear_token_logps against the float64 reference, on the GPU or through Triton's interpreter."""

import pytest
import torch
import torch.nn.functional as F

from rto_fast.kernels import linear_token_logps as kernel
from rto_fast.kernels import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def make(rows, vocab, hidden_size, device, dtype=torch.float32, seed=0):
    """(hidden states, weight, bias, labels), logits of standard deviation ~4, one label in five ignored."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, hidden_size, generator=generator) * 2
    weight = torch.randn(vocab, hidden_size, generator=generator) * 2 / hidden_size**0.5
    bias = torch.randn(vocab, generator=generator)
    labels = torch.randint(0, vocab, (rows,), generator=generator)
    labels[1::5] = -100
    return hidden.to(device, dtype), weight.to(device, dtype), bias.to(device, dtype), labels.to(device)


def evaluate(function, hidden, weight, bias, labels, **options):
    """(logps, entropy, gradients of hidden, weight and bias under signed, non-uniform upstream gradients)."""
    leaves = [t.detach().clone().requires_grad_() for t in (hidden, weight, bias)]
    logps, entropy = function(leaves[0], leaves[1], labels, bias=leaves[2], return_entropy=True, **options)
    generator = torch.Generator().manual_seed(7)
    upstream = torch.randn(2, *labels.shape, generator=generator, dtype=torch.float64).to(logps)
    gradients = torch.autograd.grad((logps, entropy), leaves, (upstream[0], upstream[1]))
    return logps.detach(), entropy.detach(), *gradients


def torch_in_dtype(
    hidden, weight, labels, *, bias, temperature=1.0, softcap=None, ignore_index=-100, return_entropy=True
):
    """The plain PyTorch implementation, all in the dtype of the inputs."""
    logits = F.linear(hidden, weight, bias)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    log_probs = (logits / temperature).log_softmax(-1)
    valid = labels != ignore_index
    logps = log_probs.gather(-1, labels.where(valid, 0).unsqueeze(-1)).squeeze(-1).where(valid, 0.0)
    plogp = log_probs.exp() * log_probs.where(log_probs > float("-inf"), 0.0)
    return logps, -plogp.sum(-1).where(valid, 0.0)


def assert_matches(hidden, weight, bias, labels, **options):
    tensors = hidden, weight, bias
    actual = evaluate(kernel.linear_token_logps, *tensors, labels, **options)
    expected = evaluate(reference.linear_token_logps, *(t.double() for t in tensors), labels, **options)
    for value, truth in zip(actual[:2], expected[:2]):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), truth, rtol=0, atol=1e-4)
    peers = evaluate(torch_in_dtype, *tensors, labels, **options)
    for gradient, truth, peer, tensor in zip(actual[2:], expected[2:], peers[2:], tensors):
        assert gradient.dtype == tensor.dtype and gradient.shape == tensor.shape
        error, peer_error, size = (gradient.double() - truth).norm(), (peer.double() - truth).norm(), truth.norm()
        if hidden.dtype == torch.float32:
            assert error <= torch.maximum(1e-5 * size, 2 * peer_error) + 1e-6
        else:
            assert error <= 2 * peer_error + 1e-6
            assert error <= 2 * torch.finfo(hidden.dtype).eps * size + 1e-6
    return actual


@pytest.fixture
def small_chunks(monkeypatch):
    """Makes several chunks in both passes, where the real sizes would make one."""
    monkeypatch.setattr(kernel, "rows_per_chunk", lambda *_: 16)
    monkeypatch.setattr(kernel, "MAX_CHUNK_COLS", 384)


OPTIONS = ({}, {"temperature": 0.7}, {"softcap": 5.0, "temperature": 1.3})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_values_and_gradients(dtype, options, device, small_chunks):
    assert_matches(*make(24, 900, 32, device, dtype), **options)


@pytest.mark.parametrize("rows, vocab", [(1, 1), (63, 7), (1, 900), (2, 32000)])
def test_shapes(rows, vocab, device):
    assert_matches(*make(rows, vocab, 16, device), temperature=0.8)


def test_large_vocabulary(device):
    assert_matches(*make(1, 128256, 8, device, torch.bfloat16), softcap=30.0)


def test_many_rows_of_few_columns(device, small_chunks):
    hidden, weight, _, labels = make(300, 7, 8, device)
    expected = reference.linear_token_logps(hidden.double(), weight.double(), labels)
    actual = kernel.linear_token_logps(hidden, weight, labels)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-4)


def test_chunks_do_not_change_the_result(device, monkeypatch):
    inputs = make(20, 500, 32, device)
    whole = evaluate(kernel.linear_token_logps, *inputs)
    monkeypatch.setattr(kernel, "WORKSPACE_BYTES", 4 * 16 * 128)
    assert kernel.rows_per_chunk(16, 500) == 4 and kernel.columns_per_chunk(16, 500) == 128
    for value, other in zip(evaluate(kernel.linear_token_logps, *inputs), whole):
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [0, 5])
def test_nothing_to_do(rows, device):
    hidden, weight, bias, _ = make(rows, 50, 8, device)
    labels = torch.full((rows,), -100, device=device)
    for value in evaluate(kernel.linear_token_logps, hidden * float("nan"), weight, bias, labels):
        assert (value == 0).all()


def test_ignored_rows_do_not_count(device, small_chunks):
    hidden, weight, bias, labels = make(11, 300, 8, device)
    clean = evaluate(kernel.linear_token_logps, hidden, weight, bias, labels)
    hidden[labels == -100] = float("nan")
    for value, other in zip(evaluate(kernel.linear_token_logps, hidden, weight, bias, labels), clean):
        assert torch.equal(value, other) and other.norm() > 0.1
    labels[labels == -100] = 3
    labels[4] = 3
    assert_matches(hidden.nan_to_num(), weight, bias, labels, ignore_index=3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_confident_rows(dtype, device):
    """The labels' weights are changed, so that each row gives its own label p ~ .999."""
    hidden, weight, bias, _ = make(6, 300, 16, device, dtype)
    labels = torch.arange(6, device=device) * 7
    for h, label in zip(hidden.double(), labels):
        logits = h @ weight.double().t() + bias
        gap = 7.0 + logits.exp().sum().log() - logits[label]
        weight[label] += (gap * h / h.square().sum()).to(dtype)
    logps, *_ = assert_matches(hidden, weight, bias, labels)
    assert ((logps < -1e-4) & (logps > -5e-3)).all()


@pytest.mark.parametrize("offset", [-120.0, 120.0])
def test_offsets(offset, device, small_chunks):
    hidden, weight, bias, labels = make(6, 1024, 16, device)
    assert_matches(hidden, weight, bias + offset, labels)


def test_vocabulary_masked_by_the_bias(device, small_chunks):
    """Logits are -inf, in whole leading tiles."""
    hidden, weight, bias, labels = make(6, 900, 16, device)
    bias[:600] = float("-inf")
    bias[700::2] = float("-inf")
    labels = labels.clamp(min=0) % 100 + 600
    actual = assert_matches(hidden, weight, bias, labels)
    assert all(value.isfinite().all() for value in actual)


def test_nan_stays_in_its_row(device, small_chunks):
    hidden, weight, bias, _ = make(3, 600, 8, device)
    labels = torch.tensor([3, 4, 5], device=device)
    clean = evaluate(kernel.linear_token_logps, hidden, weight, bias, labels)
    hidden[1, 2] = float("nan")
    actual = evaluate(kernel.linear_token_logps, hidden, weight, bias, labels)
    for value, other in zip(actual[:3], clean):
        assert value[1].isnan().all() and torch.equal(value[::2], other[::2])
    assert actual[3].isnan().any()


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_only_the_gradients_needed(needs, device, monkeypatch):
    hidden, weight, _, labels = make(9, 300, 16, device)
    expected = hidden.double().requires_grad_(needs[0]), weight.double().requires_grad_(needs[1])
    (reference.linear_token_logps(*expected, labels) * torch.arange(-4, 5, device=device)).sum().backward()
    hidden.requires_grad_(needs[0]), weight.requires_grad_(needs[1])
    products, gemm = [], kernel.gemm
    monkeypatch.setattr(kernel, "gemm", lambda *args, **options: products.append(gemm(*args, **options)))
    logps = kernel.linear_token_logps(hidden, weight, labels)
    (logps * torch.arange(-4, 5, device=device)).sum().backward()
    assert len(products) == 2, "recomputed logits, one gradient"
    for tensor, truth in zip((hidden, weight), expected):
        assert (tensor.grad is None) == (truth.grad is None)
        if truth.grad is not None:
            torch.testing.assert_close(tensor.grad.double(), truth.grad, rtol=1e-5, atol=1e-5)


def test_shapes_and_strides(device):
    hidden, weight, _, labels = make(30, 60, 16, device)
    for h, w, y in (
        (hidden.view(5, 6, 16)[:, :-1], weight, labels.view(5, 6)[:, 1:]),
        (hidden.t().contiguous().t(), weight.t().contiguous().t(), labels),
        (hidden[::3, :8], weight[:, 8:], labels[::3]),
        (hidden[0], weight, labels[0]),
    ):
        h, w = h.detach().requires_grad_(), w.detach().requires_grad_()
        truth = h.detach().double().requires_grad_(), w.detach().double().requires_grad_()
        logps, expected = kernel.linear_token_logps(h, w, y), reference.linear_token_logps(*truth, y)
        assert logps.shape == y.shape
        torch.testing.assert_close(logps.double(), expected, rtol=0, atol=1e-4)
        logps.sin().sum().backward()
        expected.sin().sum().backward()
        for tensor, other in zip((h, w), truth):
            torch.testing.assert_close(tensor.grad.double(), other.grad, rtol=1e-4, atol=1e-5)


def test_autocast(device):
    """Float32 weights under autocast give what bfloat16 weights give, and float32 gradients."""
    hidden, weight, bias, labels = make(9, 300, 16, device)
    low = hidden.bfloat16(), weight.bfloat16(), bias
    expected = evaluate(kernel.linear_token_logps, *low, labels)
    with torch.autocast(device.type, torch.bfloat16):
        actual = evaluate(kernel.linear_token_logps, hidden, weight, bias, labels)
    for value, other, dtype in zip(actual, expected, [torch.float32] * 5):
        assert value.dtype == dtype
        torch.testing.assert_close(value, other.float(), rtol=0, atol=0)


def test_bitwise_repeatable(device, small_chunks):
    inputs = make(20, 600, 32, device, torch.bfloat16)
    first, second = (evaluate(kernel.linear_token_logps, *inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("vocab", [1, 128, 900, 32000, 128256, 151936, 262144])
@pytest.mark.parametrize("rows", [1, 63, 1000, 8192, 100_000])
def test_chunks_fit_the_workspace(rows, vocab):
    columns, chunk = kernel.columns_per_chunk(rows, vocab), kernel.rows_per_chunk(rows, vocab)
    assert columns % 128 == 0 and columns <= kernel.MAX_CHUNK_COLS
    assert rows * columns * 4 <= kernel.WORKSPACE_BYTES
    assert 1 <= chunk <= rows and 4 * chunk * vocab <= kernel.WORKSPACE_BYTES
    assert chunk in (rows, kernel.WORKSPACE_BYTES // (4 * vocab)) or chunk % 128 == 0


def test_forward_chunks_of_known_models():
    """The last chunk is hardly shorter than the others, so that no GEMM is short."""
    found = [kernel.rows_per_chunk(8192, vocab) for vocab in (49152, 128256, 151936, 262144)]
    assert found == [4096, 2048, 1664, 1024]


@pytest.mark.parametrize("with_entropy", [False, True])
def test_opcheck(with_entropy, device):
    hidden, weight, bias, labels = make(6, 64, 8, device)
    bias, softcap = (bias.requires_grad_(), 5.0) if with_entropy else (None, None)
    settings, rows = (0.7, softcap, -100), (labels != -100).nonzero().squeeze(-1) if with_entropy else None
    arguments = hidden.requires_grad_(), weight.requires_grad_(), bias, labels, rows, *settings, with_entropy
    torch.library.opcheck(kernel.linear_token_logps_fwd, arguments)
    _, entropy, state = kernel.linear_token_logps_fwd(*arguments)
    upstream = torch.randn(2, 6, device=device)
    tensors = [None if t is None else t.detach() for t in (hidden, weight, bias, labels, rows, state, entropy)]
    needed = True, with_entropy, with_entropy
    arguments = upstream[0], upstream[1] if with_entropy else None, *tensors, *settings, *needed
    torch.library.opcheck(kernel.linear_token_logps_bwd, arguments)


def test_compile(device):
    """One graph serves other temperatures and numbers of rows."""

    def loss(hidden, weight, labels, temperature):
        logps, entropy = kernel.linear_token_logps(
            hidden.tanh(), weight, labels, temperature=temperature, softcap=9.0, return_entropy=True
        )
        return (logps * logps).sum() + entropy.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for rows, temperature in ((5, 0.7), (9, 0.9)):
        hidden, weight, _, labels = make(rows, 64, 8, device)
        leaves = hidden.requires_grad_(), weight.requires_grad_()
        expected, actual = loss(*leaves, labels, temperature), compiled(*leaves, labels, temperature)
        assert torch.equal(actual, expected)
        for a, b in zip(torch.autograd.grad(actual, leaves), torch.autograd.grad(expected, leaves)):
            torch.testing.assert_close(a, b)
