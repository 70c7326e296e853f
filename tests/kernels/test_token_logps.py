"""token_logps against the float64 reference, on the GPU or through Triton's interpreter."""

import numpy as np
import pytest
import torch

from rto_fast.kernels import reference
from rto_fast.kernels import token_logps as kernel

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def make(rows, vocab, device, dtype=torch.float32, scale=4.0, seed=0):
    """Logits and labels (with ignored ones where there are several rows) of every case, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, vocab, generator=generator) * scale).to(device, dtype)
    labels = torch.randint(0, vocab, (rows,), generator=generator)
    labels[1::5] = -100
    return logits, labels.to(device)


def evaluate(function, logits, labels, **options):
    """(logps, entropy, gradient of both under signed, non-uniform upstream gradients)."""
    logits = logits.detach().clone().requires_grad_()
    logps, entropy = function(logits, labels, return_entropy=True, **options)
    generator = torch.Generator().manual_seed(7)
    upstream = torch.randn(2, *labels.shape, generator=generator, dtype=torch.float64).to(logps)
    (gradient,) = torch.autograd.grad((logps, entropy), logits, (upstream[0], upstream[1]))
    return logps.detach(), entropy.detach(), gradient


def assert_matches(logits, labels, *, atol=1e-5, **options):
    actual = evaluate(kernel.token_logps, logits, labels, **options)
    expected = evaluate(reference.token_logps, logits.double(), labels, **options)
    for name, value, truth in zip(("logps", "entropy"), actual, expected):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), truth, rtol=2e-6, atol=atol, msg=lambda m, n=name: f"{n}: {m}")
    assert_gradient(actual[2], expected[2], logits, labels, **options)
    return actual


def assert_gradient(gradient, truth, logits, labels, **options):
    """The error is at most 2 times that of torch in the same dtype (1e-6 relative in float32), per row and overall."""
    assert gradient.dtype == logits.dtype and gradient.shape == logits.shape
    error = (gradient.double() - truth).norm(dim=-1)
    if logits.dtype == torch.float32:
        assert (error <= 2e-6 * truth.norm(dim=-1) + 1e-6).all(), error.max()
    else:
        peer = evaluate(torch_in_dtype, logits, labels, **options)[2]
        peer_error = (peer.double() - truth).norm(dim=-1)
        assert error.norm() <= 2 * peer_error.norm() + 1e-6
        rounding = torch.finfo(logits.dtype).eps * truth.norm(dim=-1)
        assert (error <= 2 * torch.maximum(peer_error, rounding) + 1e-6).all()


def torch_in_dtype(logits, labels, temperature=1.0, ignore_index=-100, return_entropy=True):
    """The plain PyTorch implementation, all in the dtype of the logits."""
    log_probs = (logits / temperature).log_softmax(-1)
    valid = labels != ignore_index
    logps = log_probs.gather(-1, labels.where(valid, 0).unsqueeze(-1)).squeeze(-1).where(valid, 0.0)
    return logps, -(log_probs.exp() * log_probs).sum(-1).where(valid, 0.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, vocab", [(1, 1), (63, 7), (63, 900), (5, 1024), (3, 8200), (2, 32000)])
def test_values_and_gradients(rows, vocab, dtype, device):
    assert_matches(*make(rows, vocab, device, dtype), temperature=0.7)


@pytest.mark.parametrize("vocab, dtype", [(128256, torch.bfloat16), (151936, torch.float32), (262144, torch.bfloat16)])
def test_large_vocabularies(vocab, dtype, device):
    assert_matches(*make(2, vocab, device, dtype))


def test_many_rows(device):
    logits, labels = make(1000, 7, device)
    expected = reference.token_logps(logits.double(), labels)
    torch.testing.assert_close(kernel.token_logps(logits, labels).double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("with_entropy", [False, True])
def test_split_rows_agree_with_whole_rows(with_entropy, device, monkeypatch):
    logits, labels = make(3, 20000, device)
    split = kernel.token_logps_fwd(logits[None], labels, 1.3, -100, with_entropy, False)
    assert kernel._splits(3, 20000, 8192)[0] == 3
    monkeypatch.setattr(kernel, "MIN_PROGRAMS", 1)
    whole = kernel.token_logps_fwd(logits[None], labels, 1.3, -100, with_entropy, False)
    for value, other in zip(split, whole):
        torch.testing.assert_close(value, other, rtol=1e-6, atol=1e-6)
    assert (whole[1].numel() > 0) == with_entropy


@pytest.mark.parametrize("rows", [0, 3])
def test_nothing_to_do(rows, device):
    logits, _ = make(rows, 10, device)
    labels = torch.full((rows,), -100, device=device)
    logps, entropy, gradient = evaluate(kernel.token_logps, logits.fill_(float("nan")), labels)
    assert logps.shape == entropy.shape == (rows,)
    for value in (logps, entropy, gradient):
        assert (value == 0).all()


def float32_error(logits, labels):
    """The largest error of the log-probs by the plain method in float32, in the order in which a GPU's threads add.

    Each of 32 threads adds up its numbers one by one, 8 that lie together at a time. Next to the label's 1, numbers
    below half of float32's resolution there, 2^-24, are lost: of logps of −3e-5, 5.3e-7. So much, to the last digit, an
    H200 gave.
    """
    z = torch.nn.functional.pad(logits.float().cpu(), (0, -logits.shape[1] % 256), value=float("-inf"))
    highest = z.amax(-1, keepdim=True)
    shares = (z - highest).exp().view(len(z), -1, 32, 8).transpose(1, 2).flatten(2)
    sums = shares[..., 0]
    for i in range(1, shares.shape[-1]):
        sums = sums + shares[..., i]
    while sums.shape[1] > 1:
        sums = sums[:, ::2] + sums[:, 1::2]
    logps = (z.gather(1, labels.cpu()[:, None]) - highest - sums.log())[:, 0]
    return (logps - reference.token_logps(logits.double(), labels).cpu()).abs().max().item()


@pytest.mark.parametrize("dtype", DTYPES)
def test_confident_rows(dtype, device):
    """At p = .9999, 1 - p must be computed in float32, not from rounded terms."""
    logits, labels = make(8, 900, device, dtype, scale=0.5)
    labels = labels.clamp(min=0)
    logits[torch.arange(8), labels] = torch.linspace(13, 19, 8).to(logits)
    # lg2.approx.f32 errs by up to 2^-22 between .5 and 2 (PTX ISA), which takes no part in the plain method.
    atol = 2 * float32_error(logits, labels) + 2**-22 * np.log(2)
    assert atol < 1.5e-6
    logps, _, _ = assert_matches(logits, labels, atol=atol)
    assert (logps > -0.03).all() and (logps <= 0).all()
    x = logits.clone().requires_grad_()
    kernel.token_logps(x, labels).sum().backward()
    at_label = x.grad[torch.arange(8), labels].double()
    truth = -torch.expm1(reference.token_logps(logits.double(), labels))
    torch.testing.assert_close(at_label, truth, rtol=torch.finfo(dtype).eps, atol=atol)  # 1 - p errs as log p does


@pytest.mark.parametrize("offset", [-120.0, 120.0])
def test_offsets(offset, device):
    logits, labels = make(4, 1024, device)
    assert_matches(logits + offset, labels, temperature=1.5)


@pytest.mark.parametrize("vocab", [900, 20000])
def test_minus_infinity(vocab, device):
    logits, labels = make(4, vocab, device)
    labels = labels.clamp(min=1)
    logits[0, : vocab - 3] = float("-inf")  # several leading blocks without anything finite
    labels[0] = vocab - 2
    logits[1, ::2] = float("-inf")
    labels[1] = 7
    logits[2, 0] = float("-inf")
    logits[3] = torch.finfo(torch.float32).min  # the other way to mask
    logits[3, labels[3]] = 1.0
    actual = assert_matches(logits, labels)
    assert all(value.isfinite().all() for value in actual)
    impossible = kernel.token_logps(logits[:3], torch.zeros(3, dtype=torch.long, device=device))
    assert torch.equal(impossible, torch.full((3,), float("-inf"), device=device))


@pytest.mark.parametrize("where", [0, 899, 500])
def test_nan_stays_in_its_row(where, device):
    logits, _ = make(3, 900, device)
    labels = torch.tensor([3, 4, 5], device=device)
    clean = evaluate(kernel.token_logps, logits, labels)
    logits[1, where] = float("nan")
    for value, other in zip(evaluate(kernel.token_logps, logits, labels), clean):
        assert value[1].isnan().any()
        assert torch.equal(value[::2], other[::2])


def test_ignored_rows_are_not_read(device):
    logits, labels = make(6, 900, device)
    logits[labels == -100] = float("nan")
    logps, entropy, gradient = evaluate(kernel.token_logps, logits, labels)
    for value in (logps, entropy, gradient):
        assert (value[labels == -100] == 0).all() and value.isfinite().all()
        assert (value[labels != -100] != 0).any()


def test_ignore_index(device):
    logits, labels = make(6, 90, device)
    labels[labels == -100] = 3
    labels[2] = 3
    assert_matches(logits, labels, ignore_index=3)


@pytest.mark.parametrize("only", ["logps", "entropy"])
def test_gradient_of_one_output(only, device):
    logits, labels = make(6, 900, device)
    gradients = []
    for function, x in ((kernel.token_logps, logits), (reference.token_logps, logits.double())):
        x = x.detach().clone().requires_grad_()
        outputs = dict(zip(("logps", "entropy"), function(x, labels, return_entropy=True)))
        (outputs[only] * torch.arange(-2, 4, device=device)).sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(gradients[0].double(), gradients[1], rtol=1e-5, atol=1e-6)
    assert gradients[0].norm() > 0.1


def views(device):
    """Non-contiguous logits of every kind, and non-contiguous labels."""
    base, labels = make(30, 72, device)
    yield base.view(5, 6, 72)[:, :-1], labels.view(5, 6)[:, 1:]
    yield base.t().contiguous().t(), labels
    yield base[:, 5:70], labels.clamp(max=60)
    yield base[::3], labels[::3]
    yield base.view(5, 6, 72).transpose(0, 1), labels.view(5, 6).t()
    yield base.view(5, 3, 2, 72)[:, ::2], labels.view(5, 3, 2)[:, ::2]
    yield base[0], labels[0]
    yield base[0].expand(4, 72), labels[:4]


@pytest.mark.parametrize("inplace_backward", [False, True])
def test_shapes_and_strides(inplace_backward, device):
    for logits, labels in views(device):
        leaf = logits.detach().requires_grad_()
        logps, entropy = kernel.token_logps(
            leaf.clone() if inplace_backward else leaf, labels, return_entropy=True, inplace_backward=inplace_backward
        )
        truth = logits.detach().double().requires_grad_()
        expected, expected_entropy = reference.token_logps(truth, labels, return_entropy=True)
        assert logps.shape == entropy.shape == labels.shape
        torch.testing.assert_close(logps.double(), expected, rtol=0, atol=1e-5)
        (logps.sin().sum() + entropy.sum()).backward()
        (expected.sin().sum() + expected_entropy.sum()).backward()
        torch.testing.assert_close(leaf.grad.double(), truth.grad, rtol=1e-5, atol=1e-6)


def test_inplace_backward(device):
    logits, labels = make(6, 900, device, torch.bfloat16)
    expected = evaluate(kernel.token_logps, logits, labels)[2]
    leaf = logits.clone().requires_grad_()
    x = leaf * 1.0
    logps, entropy = kernel.token_logps(x, labels, return_entropy=True, inplace_backward=True)
    upstream = torch.randn(2, 6, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(logps)
    torch.autograd.backward((logps, entropy), (upstream[0], upstream[1]), retain_graph=True)
    assert torch.equal(leaf.grad, expected)
    assert torch.equal(x, expected), "the gradient takes the logits' memory"
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logps.sum().backward()


def test_offsets_beyond_32_bits(device):
    """Rows 2^30 elements apart, forward and in-place backward; NumPy maps the 4 GB between them and touches none."""
    stride, (dense, labels) = (1 << 30) + 16, make(3, 90, device, torch.float16)
    size = 2 * stride + 90
    memory = torch.empty(size, dtype=torch.float16, device=device) if device.type == "cuda" else np.empty(size, "f2")
    x = torch.as_tensor(memory).as_strided((3, 90), (stride, 1))
    x.copy_(dense)
    # Rows 16 elements aligned, as x's are: the same loads, hence the same order of sums, bit by bit.
    dense = torch.nn.functional.pad(dense, (0, 6))[:, :90]
    expected, gradient = evaluate(kernel.token_logps, dense, labels)[::2]
    logps, entropy, state = kernel.token_logps_fwd(x[None], labels, 1.0, -100, True, False)
    assert torch.equal(logps, expected)
    upstream = torch.randn(2, 3, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(logps)
    kernel.token_logps_bwd_(upstream[0], upstream[1], x[None], labels, state, entropy, 1.0, -100)
    assert torch.equal(x, gradient)


@pytest.mark.parametrize("rows", [2, 40])
def test_bitwise_repeatable(rows, device):
    logits, labels = make(rows, 20000 if rows == 2 else 900, device, torch.bfloat16)
    first, second = (evaluate(kernel.token_logps, logits, labels) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("with_entropy, inplace_backward", [(False, False), (True, False), (True, True)])
def test_opcheck(with_entropy, inplace_backward, device):
    logits, labels = make(6, 64, device)
    arguments = logits[None].requires_grad_(), labels, 0.7, -100, with_entropy, inplace_backward
    torch.library.opcheck(kernel.token_logps_fwd, arguments)
    _, entropy, state = kernel.token_logps_fwd(*arguments)
    upstream = torch.randn(2, 6, device=device)
    backward = kernel.token_logps_bwd_ if inplace_backward else kernel.token_logps_bwd
    arguments = upstream[0], upstream[1] if with_entropy else None, logits.detach()[None].clone(), labels, state
    torch.library.opcheck(backward, (*arguments, entropy.detach(), 0.7, -100))


def test_compile(device):
    """One graph serves other temperatures and numbers of rows."""

    def loss(hidden, weight, labels, temperature):
        logits = hidden @ weight.t()
        logps, entropy = kernel.token_logps(
            logits, labels, temperature=temperature, return_entropy=True, inplace_backward=True
        )
        return (logps * logps).sum() + entropy.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    weight = torch.randn(64, 8, device=device, requires_grad=True)
    for rows, temperature in ((5, 0.7), (9, 0.9)):
        hidden = torch.randn(rows, 8, device=device, requires_grad=True)
        _, labels = make(rows, 64, device)
        expected = loss(hidden, weight, labels, temperature)
        gradients = torch.autograd.grad(expected, (hidden, weight))
        actual = compiled(hidden, weight, labels, temperature)
        assert torch.equal(actual, expected)
        for a, b in zip(torch.autograd.grad(actual, (hidden, weight)), gradients):
            torch.testing.assert_close(a, b)
