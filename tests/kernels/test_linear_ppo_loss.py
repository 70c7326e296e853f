"""linear_ppo_loss against the float64 reference, on the GPU or through Triton's interpreter."""

import pytest
import torch

from rto_fast.kernels import linear_ppo_loss as kernel
from rto_fast.kernels import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
UPSTREAM = -1.7  # a gradient scaler's, an accumulation's: anything but 1


def make(rows, vocab, hidden_size, device, dtype=torch.float32, spread=0.3, seed=0):
    """[hidden_states, lm_head_weight, labels, old_logps, advantages, loss_mask]; ratios around the clip range."""
    generator = torch.Generator().manual_seed(seed)
    hidden = (torch.randn(rows, hidden_size, generator=generator) * 2).to(dtype)
    weight = (torch.randn(vocab, hidden_size, generator=generator) * 2 / hidden_size**0.5).to(dtype)
    labels = torch.randint(0, vocab, (rows,), generator=generator)
    old_logps = reference.linear_token_logps(hidden.double(), weight.double(), labels)
    old_logps = (old_logps + spread * torch.randn(rows, generator=generator)).float()
    advantages, mask = torch.randn(rows, generator=generator), torch.rand(rows, generator=generator) < 0.8
    labels[~mask] = -100  # any value is allowed outside the mask
    return [t.to(device) for t in (hidden, weight, labels, old_logps, advantages, mask)]


def evaluate(function, inputs, **options):
    """(loss, metrics, gradients of hidden_states and lm_head_weight)."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs[:2]]
    loss, metrics = function(*leaves, *inputs[2:], **options)
    return loss.detach(), metrics, torch.autograd.grad(loss * UPSTREAM, leaves)


def make_confident(hidden, weight, labels):
    """Changes the labels' weights in place, so that each row gives its own label p ~ .999."""
    h = hidden.double()
    for row, label in enumerate(labels):
        logits = h[row] @ weight.double().t()
        gap = 7.0 + logits.exp().sum().log() - logits[label]
        weight[label] += (gap * h[row] / h[row].square().sum()).to(weight.dtype)


def in_double(inputs):
    return [t.double() if t.is_floating_point() else t for t in inputs]


def torch_in_dtype(hidden, weight, labels, *args, entropy_coef=0.0, temperature=1.0, softcap=None, **options):
    """The plain PyTorch implementation: logits and log-probs in the dtype of the inputs."""
    logits = hidden @ weight.t()
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    log_probs = (logits / temperature).log_softmax(-1)
    logps = log_probs.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1).float()
    loss, metrics = reference.ppo_policy_loss(logps, *args, **options)
    weight, scale = reference._normaliser(args[2], options.get("weights"), options.get("num_items"), torch.float32)
    return loss - entropy_coef * (entropy * weight).sum() * scale, metrics


def assert_matches(inputs, **options):
    loss, metrics, gradients = actual = evaluate(kernel.linear_ppo_loss, inputs, **options)
    expected_loss, expected_metrics, expected_gradients = evaluate(
        reference.linear_ppo_loss, in_double(inputs), **options
    )
    torch.testing.assert_close(loss.double(), expected_loss, rtol=1e-4, atol=1e-5)
    assert metrics.keys() == expected_metrics.keys()
    for name, value in metrics.items():
        assert value.dtype == torch.float32 and value.shape == () and not value.requires_grad
        torch.testing.assert_close(value.double(), expected_metrics[name], rtol=1e-4, atol=1e-5, msg=name)
    dtype = inputs[0].dtype
    for gradient, truth, peer in zip(gradients, expected_gradients, evaluate(torch_in_dtype, inputs, **options)[2]):
        assert gradient.dtype == dtype
        error, peer_error, size = (gradient.double() - truth).norm(), (peer.double() - truth).norm(), truth.norm()
        assert size > 0
        if dtype == torch.float32:
            assert error <= max(2e-5 * size, 2 * peer_error)
        else:
            assert error <= 2 * peer_error
            assert error <= 2 * torch.finfo(dtype).eps * size
    return actual


def assert_as_exact_as_torch(gradients, inputs, **options):
    """The error against float64 is at most 4 times that of torch's float32 (on a CPU it is 1 to 1.6 times).

    For gradients of other chunks or batches than those of a comparison: their GEMMs add up in another order, and two
        orders differ by as much as each of them errs. An element that is nearly 0 has the error of its terms, so norms
        are compared.
    """
    truths = evaluate(reference.linear_ppo_loss, in_double(inputs), **options)[2]
    peers = evaluate(torch_in_dtype, inputs, **options)[2]
    for gradient, truth, peer in zip(gradients, truths, peers):
        assert (gradient.double() - truth).norm() <= 4 * (peer.double() - truth).norm()


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 16 rows of 900 columns."""
    monkeypatch.setattr(kernel, "WORKSPACE_BYTES", 4 * 900 * 16)


OPTIONS = (
    {},
    {"clip_eps": 0.1, "clip_eps_high": 0.4},
    {"dual_clip": 1.2},
    {"entropy_coef": 0.3, "temperature": 0.7},
    {"entropy_coef": -0.1, "softcap": 5.0, "dual_clip": 1.5, "num_items": 100.0},
)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_values_and_gradients(options, device, small_chunks):
    inputs = make(60, 900, 16, device)
    _, metrics, _ = assert_matches(inputs, weights=torch.rand(60, device=device), **options)
    assert 0.05 < metrics["clip_fraction"] < 0.9


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("chunked", [False, True])
def test_low_precision(dtype, chunked, device, monkeypatch):
    if chunked:
        monkeypatch.setattr(kernel, "WORKSPACE_BYTES", 4 * 900 * 16)
    # Ratios at 1: elsewhere a 16-bit peer clips other tokens than float64 does, and its error says nothing.
    inputs = make(40, 900, 16, device, dtype, spread=0.0)
    assert_matches(inputs, entropy_coef=0.1, temperature=0.9)


@pytest.mark.parametrize("rows, vocab", [(1, 1), (63, 7), (1, 1024), (2, 32000), (1, 151936)])
def test_shapes(rows, vocab, device):
    inputs = make(rows, vocab, 8, device)
    inputs[2], inputs[5] = inputs[2].clamp(min=0), torch.ones_like(inputs[5])
    if vocab == 1:  # log 1 has no gradient
        loss, _, gradients = evaluate(kernel.linear_ppo_loss, inputs)
        expected = evaluate(reference.linear_ppo_loss, in_double(inputs))[0]
        torch.testing.assert_close(loss.double(), expected)
        assert all((gradient == 0).all() for gradient in gradients)
    else:
        inputs[4] = -inputs[4].abs() - 0.1  # with ratios at 1, no token is clipped
        inputs[3] = reference.linear_token_logps(inputs[0].double(), inputs[1].double(), inputs[2]).float()
        assert_matches(inputs)


@pytest.mark.parametrize("rows", [0, 5])
@pytest.mark.parametrize("options", [{}, {"num_items": 7.0}, {"entropy_coef": 0.1, "num_items": 0.0}], ids=str)
def test_empty_mask(rows, options, device):
    inputs = make(rows, 50, 8, device)
    inputs[5] = torch.zeros_like(inputs[5])
    inputs[0] = inputs[0] * float("nan")
    loss, metrics, gradients = evaluate(kernel.linear_ppo_loss, inputs, **options)
    for value in (loss, *metrics.values(), *gradients):
        assert (value == 0).all()


def test_what_is_outside_the_mask_does_not_count(device, small_chunks):
    inputs = make(40, 900, 16, device)
    weights = torch.rand(40, device=device)
    clean = evaluate(kernel.linear_ppo_loss, inputs, weights=weights, entropy_coef=0.1)
    outside = ~inputs[5]
    inputs[2][outside] = 1 << 40
    for values in (inputs[0], inputs[3], inputs[4], weights):
        values[outside] = float("nan")
    loss, metrics, gradients = evaluate(kernel.linear_ppo_loss, inputs, weights=weights, entropy_coef=0.1)
    assert torch.equal(loss, clean[0]) and all(torch.equal(metrics[name], clean[1][name]) for name in metrics)
    assert all(torch.equal(a, b) for a, b in zip(gradients, clean[2]))
    assert (gradients[0][outside] == 0).all() and (gradients[0][~outside] != 0).any(-1).sum() > 10


@pytest.mark.parametrize("which", [0, 3, 4])
def test_nan_is_not_hidden(which, device):
    """NaN in hidden states, old log-probs or advantages."""
    inputs = make(4, 300, 8, device)
    inputs[2], inputs[5] = inputs[2].clamp(min=0), torch.ones_like(inputs[5])
    inputs[which][1] = float("nan")
    loss, _, (dhidden, dweight) = evaluate(kernel.linear_ppo_loss, inputs)
    assert loss.isnan() and dhidden[1].isnan().all() and dweight.isnan().any()
    assert dhidden[[0, 2, 3]].isfinite().all()


def test_extreme_ratios(device):
    """log-ratios beyond ±20 are clamped and pass no gradient; neither side overflows."""
    inputs = make(6, 300, 8, device, spread=0.0)
    inputs[5][:] = True
    inputs[2] = inputs[2].clamp(min=0)
    logps = reference.linear_token_logps(inputs[0].double(), inputs[1].double(), inputs[2])
    inputs[3] = (logps - torch.tensor([50.0, 50.0, -50.0, -50.0, 3.0, 0.0], device=device)).float()
    inputs[4] = torch.tensor([1.0, -1.0, 1.0, -1.0, -1.0, 1.0], device=device)
    loss, _, (dhidden, _) = assert_matches(inputs)
    assert loss > 1e7 and (dhidden[:4] == 0).all() and (dhidden[4:] != 0).any(-1).all()


def test_float16_saturates(device):
    """A ratio of e^15 on a bad token: loss exact, all gradients finite, those of other tokens untouched."""
    inputs = make(6, 300, 8, device, torch.float16)
    inputs[2], inputs[5][:] = inputs[2].clamp(min=0), True
    inputs[3] = reference.linear_token_logps(*in_double(inputs[:2]), inputs[2], temperature=0.5).float()
    inputs[3][2] -= 15.0
    inputs[4] = torch.tensor([1.0, -1.0, -2.0, 0.5, -0.5, 1.0], device=device)
    options = {"temperature": 0.5, "entropy_coef": 0.1, "num_items": 1e4}
    loss, _, (dhidden, dweight) = evaluate(kernel.linear_ppo_loss, inputs, **options)
    expected, _, (true_dhidden, _) = evaluate(reference.linear_ppo_loss, in_double(inputs), **options)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=0.0)
    assert dhidden.isfinite().all() and dweight.isfinite().all()
    others = [0, 1, 3, 4, 5]
    error = (dhidden.double() - true_dhidden)[others].norm()
    assert error <= 2e-3 * true_dhidden[others].norm()
    share = 2**15 * 0.5 / (2 * torch.tensor(15.0).exp())
    torch.testing.assert_close(dhidden[2].double(), true_dhidden[2] * share, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_confident_rows(dtype, device):
    inputs = make(6, 300, 16, device, dtype)
    hidden, weight, labels = inputs[0], inputs[1], torch.arange(6, device=device) * 7
    make_confident(hidden, weight, labels)
    logps = reference.linear_token_logps(hidden.double(), weight.double(), labels)
    assert ((logps < -1e-4) & (logps > -5e-3)).all()
    inputs[2], inputs[3], inputs[5][:] = labels, logps.float(), True
    assert_matches(inputs)


def test_minus_infinity(device):
    """Logits are -inf where weight rows are infinite; hidden states have one sign."""
    inputs = make(4, 600, 8, device)
    inputs[0], inputs[5][:] = inputs[0].abs() + 0.1, True
    inputs[1][:500] = float("-inf")
    inputs[2] = inputs[2].clamp(min=0) % 100 + 500
    loss, metrics, (_, dweight) = evaluate(kernel.linear_ppo_loss, inputs, entropy_coef=0.1)
    small = [*inputs[:1], inputs[1][500:], inputs[2] - 500, *inputs[3:]]
    expected_loss, expected, (_, expected_dweight) = evaluate(reference.linear_ppo_loss, small, entropy_coef=0.1)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(metrics["entropy"], expected["entropy"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dweight[500:], expected_dweight, rtol=1e-4, atol=1e-5)
    assert (dweight[:500] == 0).all()


def test_micro_batches_add_up(device):
    """With num_items, losses, metrics and gradients of parts sum to those of the whole."""
    inputs = make(40, 300, 16, device)
    total = inputs[5].sum()
    whole = evaluate(kernel.linear_ppo_loss, inputs, entropy_coef=0.1)
    parts = []
    for here in (slice(0, 13), slice(13, 14), slice(14, 40)):
        part = [inputs[0][here], inputs[1], *(t[here] for t in inputs[2:])]
        parts.append(evaluate(kernel.linear_ppo_loss, part, num_items=total, entropy_coef=0.1))
    torch.testing.assert_close(sum(part[0] for part in parts), whole[0])
    for name, value in whole[1].items():
        torch.testing.assert_close(sum(part[1][name] for part in parts), value)
    gradients = torch.cat([part[2][0] for part in parts]), sum(part[2][1] for part in parts)
    assert_as_exact_as_torch(gradients, inputs, entropy_coef=0.1)


def test_chunks_do_not_change_the_result(device, monkeypatch):
    inputs = make(40, 300, 16, device)
    whole = evaluate(kernel.linear_ppo_loss, inputs, entropy_coef=0.1)
    monkeypatch.setattr(kernel, "WORKSPACE_BYTES", 4 * 300 * 7)
    monkeypatch.setattr(kernel, "rows_per_chunk", lambda *_: 7)
    chunked = evaluate(kernel.linear_ppo_loss, inputs, entropy_coef=0.1)
    torch.testing.assert_close(chunked[0], whole[0])
    for gradients in (whole[2], chunked[2]):
        assert_as_exact_as_torch(gradients, inputs, entropy_coef=0.1)


@pytest.mark.parametrize("needs", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("grad_enabled", [True, False])
def test_only_the_work_needed(needs, grad_enabled, device, monkeypatch):
    inputs = make(9, 300, 16, device)
    expected = evaluate(reference.linear_ppo_loss, in_double(inputs))
    products, gemm = [], kernel.gemm
    monkeypatch.setattr(kernel, "gemm", lambda *args, **options: products.append(gemm(*args, **options)))
    for tensor, need in zip(inputs, needs):
        tensor.requires_grad_(need)
    with torch.set_grad_enabled(grad_enabled):
        loss, _ = kernel.linear_ppo_loss(*inputs)
    torch.testing.assert_close(loss.double(), expected[0], rtol=1e-4, atol=1e-5)
    assert len(products) == sum(needs) * grad_enabled, "one for each gradient"
    assert loss.requires_grad == (any(needs) and grad_enabled)
    if loss.requires_grad:
        (loss * UPSTREAM).backward()
    for tensor, truth, need in zip(inputs, expected[2], needs):
        assert (tensor.grad is not None) == (need and grad_enabled)
        if tensor.grad is not None:
            torch.testing.assert_close(tensor.grad.double(), truth, rtol=1e-4, atol=1e-6)


def test_backward_twice(device):
    """The saved gradients survive a backward pass."""
    inputs = make(9, 300, 16, device)
    inputs[0].requires_grad_()
    loss, _ = kernel.linear_ppo_loss(*inputs)
    first, second = (torch.autograd.grad(loss * c, inputs[0], retain_graph=True)[0] for c in (1.0, 3.0))
    torch.testing.assert_close(second, 3.0 * first)


def test_shapes_and_strides(device):
    inputs = make(30, 60, 16, device)
    weights = torch.rand(30, device=device)
    folded = [inputs[0].view(5, 6, 16), inputs[1].t().contiguous().t(), *(t.view(5, 6) for t in inputs[2:])]
    sliced = [t if i == 1 else t[:, 1:] for i, t in enumerate(folded)]
    assert_matches(sliced, weights=weights.view(5, 6)[:, :-1])
    assert_matches([t if i == 1 else t[::2] for i, t in enumerate(inputs)], weights=weights[1::2])


@pytest.mark.parametrize("num_items", [31, 31.0, torch.tensor(31.0), torch.tensor(31)])
def test_num_items_of_any_kind(num_items, device):
    inputs = make(9, 60, 8, device)
    if isinstance(num_items, torch.Tensor):
        num_items = num_items.to(device)
    assert_matches(inputs, num_items=num_items)


def test_autocast(device):
    inputs = make(9, 300, 16, device)
    low = [inputs[0].bfloat16(), inputs[1].bfloat16(), *inputs[2:]]
    expected = evaluate(kernel.linear_ppo_loss, low)
    with torch.autocast(device.type, torch.bfloat16):
        actual = evaluate(kernel.linear_ppo_loss, inputs)
    assert torch.equal(actual[0], expected[0])
    assert all(a.dtype == torch.float32 and torch.equal(a, b.float()) for a, b in zip(actual[2], expected[2]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_bitwise_repeatable(dtype, device, small_chunks):
    inputs = make(24, 900, 32, device, dtype)
    first, second = (evaluate(kernel.linear_ppo_loss, inputs, entropy_coef=0.1) for _ in range(2))
    assert torch.equal(first[0], second[0]) and all(torch.equal(a, b) for a, b in zip(first[2], second[2]))


@pytest.mark.parametrize("vocab, hidden_size", [(1, 8), (32000, 2048), (128256, 4096), (151936, 1024), (262144, 640)])
@pytest.mark.parametrize("rows", [0, 1, 63, 8192, 100_000])
def test_chunks_fit_the_workspace(rows, vocab, hidden_size):
    chunk = kernel.rows_per_chunk(rows, vocab, hidden_size, True)
    accumulator = 4 * vocab * hidden_size
    assert 4 * chunk * vocab + accumulator * (chunk < rows) <= kernel.WORKSPACE_BYTES + accumulator
    chunk = kernel.rows_per_chunk(rows, vocab, hidden_size, False)
    assert min(rows, 1) <= chunk <= rows and 4 * chunk * vocab <= kernel.WORKSPACE_BYTES


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_opcheck(dtype, device):
    inputs = make(6, 64, 8, device, dtype)
    for tensor in inputs[:2]:
        tensor.requires_grad_()
    settings = 0.2, 0.3, 3.0, 0.1, 0.7, None, True, True
    torch.library.opcheck(kernel.linear_ppo_sweep, (*inputs, None, torch.rand(6, device=device), None, *settings))
    settings = 0.2, 0.3, None, 0.0, 1.0, 5.0, True, False
    inputs[1].requires_grad_(False)
    rows = inputs[5].nonzero().squeeze(-1)
    torch.library.opcheck(kernel.linear_ppo_sweep, (*inputs, rows, None, torch.tensor(9.0, device=device), *settings))


def test_compile(device):
    """One graph serves other temperatures and numbers of rows."""

    def total(hidden, weight, *rest, temperature):
        loss, metrics = kernel.linear_ppo_loss(
            hidden.tanh(), weight, *rest, temperature=temperature, num_items=9.0, entropy_coef=0.1
        )
        return loss * 3.0, metrics["approx_kl"]

    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    for rows, temperature in ((5, 0.7), (9, 0.9)):
        inputs = make(rows, 64, 8, device)
        leaves = [tensor.requires_grad_() for tensor in inputs[:2]]
        expected, actual = total(*inputs, temperature=temperature), compiled(*inputs, temperature=temperature)
        for a, b in zip(actual, expected):
            assert torch.equal(a, b)
        for a, b in zip(torch.autograd.grad(actual[0], leaves), torch.autograd.grad(expected[0], leaves)):
            torch.testing.assert_close(a, b)
