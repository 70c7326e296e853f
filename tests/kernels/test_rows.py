"""The linear ops with the positions that count given by the caller: same results, no look at values, fixed shapes."""

from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from rto_fast.kernels import linear_ppo_loss, linear_token_logps, reference

T, V, D = 23, 300, 16
EXTRA = [0, 0, 3, 22]  # outside of the mask; an ascending list holds them where a batch is filled up


def make(device, seed=0):
    """(hidden states, weight, labels, old log-probs, advantages, mask); what is outside of the mask is poisoned."""
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(T, D, generator=generator), torch.randn(V, D, generator=generator) / 4
    labels, mask = torch.randint(0, V, (T,), generator=generator), torch.rand(T, generator=generator) < 0.6
    mask[EXTRA] = False
    old_logps, advantages = torch.randn(T, generator=generator) / 5 - 5.5, torch.randn(T, generator=generator)
    labels[~mask], old_logps[~mask], advantages[~mask] = -100, torch.nan, torch.inf
    return [t.to(device) for t in (hidden, weight, labels, old_logps, advantages, mask)]


def known(mask, extra=()):
    """The positions of the mask and others outside of it."""
    return torch.cat([mask.nonzero().squeeze(-1), torch.tensor(extra, device=mask.device).long()]).sort().values


def log_probs(module, tensors, rows):
    """(log-probs, entropies, gradients of the hidden states and the weight), with upstream gradients at every position."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors[:2]]
    results = module.linear_token_logps(*leaves, tensors[2], rows=rows, return_entropy=True)
    upstream = torch.linspace(-2, 3, T, device=leaves[0].device).to(results[0].dtype)
    return *(r.detach() for r in results), *torch.autograd.grad(results, leaves, (upstream, -upstream))


def ppo(module, tensors, rows, weights=None):
    leaves = [t.detach().clone().requires_grad_() for t in tensors[:2]]
    options = {"num_items": 7.0, "entropy_coef": 0.1, "dual_clip": 3.0, "weights": weights}
    loss, metrics = module.linear_ppo_loss(*leaves, *tensors[2:], rows=rows, **options)
    return loss.detach(), *metrics.values(), *torch.autograd.grad(-1.7 * loss, leaves)


CALLS = [(log_probs, linear_token_logps), (log_probs, reference), (ppo, linear_ppo_loss), (ppo, reference)]
NAMES = ["logps triton", "logps reference", "ppo triton", "ppo reference"]


@pytest.mark.parametrize("call, module", CALLS, ids=NAMES)
@pytest.mark.parametrize("extra", [[], EXTRA])
@pytest.mark.parametrize("chunked", [False, True])
def test_results_do_not_change(call, module, extra, chunked, device, monkeypatch):
    """Rows outside of the mask are exact zeros; sums over more rows may round otherwise."""
    monkeypatch.setattr(linear_token_logps, "MAX_CHUNK_COLS", 128)
    if chunked:
        monkeypatch.setattr(linear_ppo_loss, "rows_per_chunk", lambda *_: 5)
        monkeypatch.setattr(linear_token_logps, "rows_per_chunk", lambda *_: 4)
    tensors = make(device)
    actual, expected = call(module, tensors, known(tensors[5], extra)), call(module, tensors, None)
    for one, other in zip(actual, expected, strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7) if extra else None
        assert extra or torch.equal(one, other)
    dhidden = actual[-2]
    assert (dhidden[~tensors[5]] == 0).all() and (dhidden[tensors[5]] != 0).any(-1).all()


@pytest.mark.parametrize("call, module", CALLS, ids=NAMES)
def test_as_many_rows_as_tokens(call, module, device):
    """A batch that is filled up holds a row twice, and all its rows are looked at by their positions."""
    tensors = make(device)
    rows = known(tensors[5])
    rows = torch.cat([rows.new_zeros(T - len(rows)), rows])
    assert len(rows) == T
    for one, other in zip(call(module, tensors, rows), call(module, tensors, None), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("call, module", CALLS, ids=NAMES)
@pytest.mark.parametrize("rows", [[], EXTRA])
def test_no_row_counts(call, module, rows, device):
    tensors = make(device)
    tensors[5][:], tensors[2][:] = False, -100
    results = call(module, tensors, torch.tensor(rows, dtype=torch.long, device=device))
    assert all((value == 0).all() for value in results)


def test_rows_of_weight_0_are_zeros(device):
    tensors, weights = make(device), torch.ones(T, device=device)
    inside = tensors[5].nonzero()[:3].squeeze(-1)
    weights[inside] = 0.0
    weights[~tensors[5]] = torch.nan
    results = ppo(linear_ppo_loss, tensors, known(tensors[5], EXTRA), weights)
    assert all(value.isfinite().all() for value in results) and (results[-2][inside] == 0).all()


def test_folded_tensors(device):
    """Positions are those of the flattened labels."""
    hidden, weight, labels, *rest = make(device)
    folded = [hidden[:20].view(4, 5, D), weight, labels[:20].view(4, 5), *(t[:20].view(4, 5) for t in rest)]
    for module in (linear_ppo_loss, reference):
        losses = [module.linear_ppo_loss(*folded, rows=rows)[0] for rows in (known(rest[2][:20]), None)]
        assert torch.equal(*losses)


@pytest.mark.parametrize("call, module", CALLS, ids=NAMES)
def test_neither_op_looks_at_values(call, module, device, monkeypatch):
    """Tensors without values: reading one, which would wait for a GPU, raises. Shapes are those of the rows."""
    tensors = make(device)
    if module is reference:  # what a CPU checks
        monkeypatch.setattr(reference, "checked_labels", lambda labels, *_: labels)
    else:
        for kernel in ("linear_ppo_kernel", "token_logps_fwd_kernel", "logits_gradient_kernel"):
            if hasattr(module, kernel):
                monkeypatch.setattr(module, kernel, _Unlaunched())
    rows = known(tensors[5], EXTRA)
    with FakeTensorMode() as mode:
        *fake, rows = [mode.from_tensor(t) for t in (*tensors, rows)]
        if module is reference:
            assert call(module, fake, rows)[-2].shape == (T, D)
        elif call is ppo:
            sweep = linear_ppo_loss.linear_ppo_sweep._init_fn
            settings = 0.2, 0.2, None, 0.1, 1.0, None, True, True
            assert sweep(*fake, rows, None, None, *settings)[3].shape == (T, D)
        else:
            hidden, weight, labels = fake[:3]
            settings = 1.0, None, -100
            logps, entropy, state = linear_token_logps.linear_token_logps_fwd._init_fn(
                hidden, weight, None, labels, rows, *settings, True
            )
            backward = linear_token_logps.linear_token_logps_bwd._init_fn
            more = rows, state, entropy, *settings, True, True, False
            assert backward(logps, entropy, hidden, weight, None, labels, *more)[0].shape == (T, D)


class _Unlaunched:
    """A Triton kernel that is not launched, for its tensors have no values."""

    def __getitem__(self, grid):
        return lambda *_, **options: None


BAD = {
    "expected positions in \\[0, 23\\), got -1 to": lambda rows: torch.cat([rows[:1] * 0 - 1, rows]),
    "expected positions in \\[0, 23\\), got .* to 23": lambda rows: torch.cat([rows, rows[:1] * 0 + 23]),
    "expected ascending positions": lambda rows: rows.flip(0),
    "position .* counts and is missing": lambda rows: rows[1:],
    "expected shape \\[n\\]": lambda rows: rows[None],
    "expected dtype": lambda rows: rows.int(),
    "expected a tensor": lambda rows: rows.tolist(),
}


@pytest.mark.parametrize("message", BAD)
@pytest.mark.parametrize("name", ["linear_token_logps", "linear_ppo_loss"])
def test_a_cpu_names_wrong_rows(name, message):
    from rto_fast import ops

    tensors = make("cpu")
    tensors = tensors[:3] if name == "linear_token_logps" else tensors
    rows = known(make("cpu")[5])
    call = partial(getattr(ops, name), *tensors)
    call(rows=rows)
    with pytest.raises(ValueError, match=f"^rows: {message}"):
        call(rows=BAD[message](rows))


def test_opcheck_of_the_check():
    mask = make("cpu")[5]
    torch.library.opcheck(reference.checked_rows, (known(mask, EXTRA), mask))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("call, module", [CALLS[0], CALLS[2]], ids=[NAMES[0], NAMES[2]])
def test_in_a_cuda_graph(call, module):
    """Captured and replayed with other values in the same memory: bit by bit what the eager ops give."""
    device = torch.device("cuda")
    tensors, others = make(device), make(device, seed=1)
    rows = torch.zeros(T, dtype=torch.long, device=device)

    def fill(source):
        for target, value in zip(tensors, source):
            target.copy_(value)
        positions = known(source[5])
        rows.copy_(torch.cat([positions.new_zeros(T - len(positions)), positions]))

    fill(make(device))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call(module, tensors, rows)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(module, tensors, rows)
    for source in (others, make(device, seed=2)):
        fill(source)
        graph.replay()
        for one, other in zip(captured, call(module, tensors, rows), strict=True):
            assert torch.equal(one, other)
