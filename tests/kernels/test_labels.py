"""Labels outside of the vocabulary give NaN from Triton, which reads nothing outside of a row, and an error on a CPU."""

import itertools

import numpy as np
import pytest
import torch

from rto_fast.kernels import linear_ppo_loss, linear_token_logps, reference, token_logps

ROWS, VOCAB, SIZE, BAD = 6, 700, 8, 2
# Next to the row, beyond 32 bits (which a 32-bit offset would take for tokens), and beyond all memory.
OUTSIDE = [-1, -101, VOCAB, 2**32 + 3, -(2**32) + 3, 2**40, -(2**63)]


def make(device, bad, dtype=torch.float32):
    """(hidden states, weight, labels); one row is ignored, one has the label `bad`."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, SIZE, generator=generator).to(device, dtype) for n in (ROWS, VOCAB))
    labels = torch.randint(0, VOCAB, (ROWS,), generator=generator)
    labels[0], labels[BAD] = -100, bad
    return hidden, weight, labels.to(device)


def from_logits(module, hidden, weight, labels, **options):
    """(log-probs, entropy, gradient of the logits)."""
    logits = (hidden @ weight.t()).detach().requires_grad_()
    logps, entropy = module.token_logps(logits, labels, return_entropy=True, **options)
    return logps, entropy, *torch.autograd.grad(logps.sum() + entropy.sum(), logits)


def from_hidden(module, hidden, weight, labels, **options):
    """(log-probs, entropy, gradients of hidden states and weight)."""
    leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logps, entropy = module.linear_token_logps(*leaves, labels, return_entropy=True, **options)
    return logps, entropy, *torch.autograd.grad(logps.sum() + entropy.sum(), leaves)


def ppo(module, hidden, weight, labels, mask):
    """(loss, gradients of hidden states and weight)."""
    leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    ones = torch.ones(ROWS, device=hidden.device)
    loss, _ = module.linear_ppo_loss(*leaves, labels, -5 * ones, ones, mask, entropy_coef=0.1)
    return loss, *torch.autograd.grad(loss, leaves)


def assert_only_the_bad_row_is_nan(values, clean):
    others = [row for row in range(ROWS) if row != BAD]
    for value, expected in zip(values, clean):
        assert value[BAD].isnan().all()
        assert torch.equal(value[others], expected[others]) and value[others].isfinite().all()


@pytest.fixture(params=["whole rows", "split rows"])
def splits(request, monkeypatch):
    monkeypatch.setattr(token_logps, "MIN_PROGRAMS", 1 if request.param == "whole rows" else 2 * ROWS)
    monkeypatch.setattr(linear_token_logps, "MAX_CHUNK_COLS", 128)
    monkeypatch.setattr(token_logps, "row_block", lambda *_: (512, 1))


@pytest.mark.parametrize("bad", OUTSIDE)
def test_logits(bad, splits, device):
    hidden, weight, labels = make(device, bad)
    logps, _, gradient = from_logits(token_logps, hidden, weight, labels)
    clean = from_logits(token_logps, hidden, weight, labels.where(labels != bad, 5))
    assert_only_the_bad_row_is_nan((logps, gradient), clean[::2])
    assert logps[0] == 0 and not gradient[0].any()


@pytest.mark.parametrize("op", [token_logps.token_logps, linear_token_logps.linear_token_logps])
def test_a_loss_without_the_label_has_no_other_gradient(op, splits, device):
    """A label that a CPU refuses shows on a GPU even where its weight is 0, as 0 times NaN."""
    hidden, weight, labels = make(device, VOCAB)
    inputs = [hidden @ weight.t()] if op is token_logps.token_logps else [hidden, weight]
    x = inputs[0].requires_grad_()
    op(*inputs, labels)[BAD + 1 :].sum().backward()
    assert x.grad[BAD].isnan().all() and x.grad[BAD + 1 :].isfinite().all() and not x.grad[0].any()


@pytest.mark.parametrize("bad", OUTSIDE)
def test_hidden_states(bad, splits, device):
    hidden, weight, labels = make(device, bad)
    logps, _, dhidden, dweight = from_hidden(linear_token_logps, hidden, weight, labels)
    clean = from_hidden(linear_token_logps, hidden, weight, labels.where(labels != bad, 5))
    assert_only_the_bad_row_is_nan((logps, dhidden), clean[::2])
    assert logps[0] == 0 and not dhidden[0].any() and dweight.isnan().all()


@pytest.mark.parametrize("bad", [*OUTSIDE, -100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_ppo(bad, dtype, device):
    hidden, weight, labels = make(device, bad, dtype)
    mask = torch.arange(ROWS, device=device) > 0
    loss, dhidden, dweight = ppo(linear_ppo_loss, hidden, weight, labels, mask)
    clean = ppo(linear_ppo_loss, hidden, weight, labels.where(labels != bad, 5), mask)
    assert loss.isnan() and dweight.isnan().all()
    assert_only_the_bad_row_is_nan([dhidden], [clean[1]])
    mask[BAD] = False
    assert all(value.isfinite().all() for value in ppo(linear_ppo_loss, hidden, weight, labels, mask))


@pytest.mark.parametrize("ignored", [-1, VOCAB + 7, 5])
def test_ignore_index_may_be_any_number(ignored, device):
    hidden, weight, labels = make(device, ignored)
    labels[0] = ignored
    for logps, _, gradient in (
        from_logits(token_logps, hidden, weight, labels, ignore_index=ignored),
        from_hidden(linear_token_logps, hidden, weight, labels, ignore_index=ignored)[:3],
        from_hidden(reference, hidden.cpu(), weight.cpu(), labels.cpu(), ignore_index=ignored)[:3],
    ):
        assert not logps[[0, BAD]].any() and not gradient[[0, BAD]].any()
        assert (logps[labels.to(logps.device) != ignored] < 0).all() and gradient.isfinite().all()


class Reads:
    """Records what interpreted kernels read and which memory their arguments have."""

    def __init__(self):
        self.addresses, self.bounds = [], []

    def add_argument(self, tensor):
        """A row of a strided matrix has its own elements only, not the memory between it and the next row."""
        row_bytes = tensor.element_size() * (tensor.shape[-1] if tensor.dim() else 1)
        for index in itertools.product(*map(range, tensor.shape[:-1])):
            start = tensor[index].data_ptr()
            self.bounds.append((start, start + row_bytes))

    def outside(self):
        """The number of addresses that are in none of the arguments."""
        bounds, addresses = np.array(sorted(self.bounds)), np.concatenate(self.addresses)
        ends = np.maximum.accumulate(bounds[:, 1])
        before = np.searchsorted(bounds[:, 0], addresses, side="right") - 1
        return int(((before < 0) | (addresses >= ends[before])).sum())


@pytest.fixture
def reads(device, monkeypatch):
    if device.type != "cpu":
        pytest.skip("only Triton's interpreter tells what is read: needs a machine without a GPU")
    from triton.runtime import interpreter

    found = Reads()

    def init(self, *args, init=interpreter.GridExecutor._init_args_hst):
        result = init(self, *args)
        for argument in (*result[0], *result[1].values()):
            if isinstance(argument, torch.Tensor) and argument.numel():
                found.add_argument(argument)
        return result

    def load(self, ptrs, mask, *args, load=interpreter.InterpreterBuilder.create_masked_load):
        found.addresses.append(ptrs.data[mask.data].astype(np.int64).reshape(-1))
        return load(self, ptrs, mask, *args)

    monkeypatch.setattr(interpreter.GridExecutor, "_init_args_hst", init)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", load)
    return found


@pytest.mark.parametrize("bad", OUTSIDE)
def test_nothing_is_read_outside_of_a_row(bad, splits, reads, device):
    hidden, weight, labels = make(device, bad)
    wide = torch.full((ROWS, VOCAB + 50), torch.nan)
    wide[:, 20 : 20 + VOCAB] = hidden @ weight.t()
    logits = wide[:, 20 : 20 + VOCAB].requires_grad_()
    token_logps.token_logps(logits, labels).sum().backward()
    from_hidden(linear_token_logps, hidden, weight, labels)
    ppo(linear_ppo_loss, hidden, weight, labels, torch.ones(ROWS, dtype=torch.bool))
    assert len(reads.addresses) > 100 and reads.outside() == 0


@pytest.mark.parametrize("bad", OUTSIDE)
@pytest.mark.parametrize("function", [from_logits, from_hidden])
def test_a_cpu_names_the_label(function, bad):
    hidden, weight, labels = make("cpu", bad)
    with pytest.raises(
        ValueError, match=rf"^labels: expected values in \[0, 700\) or ignore_index \(-100\), got {bad} at \[2\]"
    ):
        function(reference, hidden, weight, labels)


@pytest.mark.parametrize("bad", [*OUTSIDE, -100])
def test_a_cpu_names_the_label_inside_the_loss_mask(bad):
    hidden, weight, labels = make("cpu", bad)
    mask = torch.arange(ROWS) > 0
    with pytest.raises(
        ValueError, match=rf"^labels: expected values in \[0, 700\) where loss_mask is True, got {bad} at \[2\]"
    ):
        ppo(reference, hidden, weight, labels, mask)
    mask[BAD] = False
    assert all(value.isfinite().all() for value in ppo(reference, hidden, weight, labels, mask))


def test_a_cpu_names_the_label_of_a_compiled_function():
    """Bad labels give NaN in one graph, which also serves good labels."""
    hidden, weight, labels = make("cpu", 5)

    def function(labels):
        return reference.token_logps(hidden @ weight.t(), labels)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(labels), function(labels))
    with pytest.raises(ValueError, match="^labels: expected values in .* got 700 at"):
        compiled(labels.where(labels != 5, VOCAB))


def test_opcheck():
    _, _, labels = make("cpu", 5)
    torch.library.opcheck(reference.checked_labels, (labels, labels >= 0, VOCAB, ""))
