"""The ops where they are used: in a model with a tied head, recomputed, accumulated over micro-batches, compiled.

Through `rto_fast.ops`, on the torch reference and on Triton.
"""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from rto_fast import ops
from rto_fast.kernels import arguments, reference

ROWS, VOCAB, SIZE = 24, 300, 16
BOUNDS = torch.tensor([0, 9, 10, ROWS], dtype=torch.int32)


@pytest.fixture(params=["reference", "triton"])
def path(request, monkeypatch):
    monkeypatch.setattr(arguments, "INTERPRET", request.param == "triton")
    monkeypatch.setattr(reference, "BLOCK_ELEMENTS", 7 * VOCAB)  # several blocks,
    monkeypatch.setattr(reference, "KEPT_ELEMENTS", 8 * VOCAB)  # the last ones computed again in the backward pass
    return request.param


@pytest.fixture
def place(path, device):
    """The device of the tensors of this implementation."""
    return device if path == "triton" else torch.device("cpu")


class TiedModel(nn.Module):
    """A model in which one parameter is both embedding and head."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding = nn.Parameter(torch.randn(VOCAB, SIZE, generator=generator))
        self.mix = nn.Parameter(torch.randn(SIZE, SIZE, generator=generator) / 4)

    def forward(self, batch):
        return (self.embedding[batch["input_ids"]] @ self.mix).tanh()


def make_batch(place, rows=ROWS):
    generator = torch.Generator().manual_seed(1)
    batch = {name: torch.randint(0, VOCAB, (rows,), generator=generator) for name in ("input_ids", "labels")}
    batch |= {name: torch.randn(rows, generator=generator) for name in ("old_logps", "advantages", "upstream")}
    batch |= {"old_logps": batch["old_logps"] / 4 - 5.0, "loss_mask": torch.rand(rows, generator=generator) < 0.8}
    return {name: tensor.to(place) for name, tensor in batch.items()}


def log_prob_loss(hidden, weight, batch):
    labels = batch["labels"].masked_fill(~batch["loss_mask"], -100)
    logps, entropy = ops.linear_token_logps(hidden, weight, labels, temperature=0.8, return_entropy=True)
    return (batch["upstream"] * logps).sum() + (batch["upstream"] * entropy).sin().sum()


def ppo_loss(hidden, weight, batch, num_items=None):
    arguments = [batch[name] for name in ("labels", "old_logps", "advantages", "loss_mask")]
    options = {"temperature": 0.8, "entropy_coef": 0.1, "num_items": num_items}
    return ops.linear_ppo_loss(hidden, weight, *arguments, **options)[0]


def dense_log_prob_loss(hidden, weight, batch):
    log_probs = (hidden @ weight.t() / 0.8).log_softmax(-1)
    logps = log_probs.gather(-1, batch["labels"][:, None])[:, 0] * batch["loss_mask"]
    entropy = -(log_probs.exp() * log_probs).sum(-1) * batch["loss_mask"]
    return (batch["upstream"] * logps).sum() + (batch["upstream"] * entropy).sin().sum()


def dense_ppo_loss(hidden, weight, batch):
    log_probs = (hidden @ weight.t() / 0.8).log_softmax(-1)
    logps = log_probs.gather(-1, batch["labels"][:, None])[:, 0]
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    ratio, advantages = (logps - batch["old_logps"]).exp(), batch["advantages"]
    losses = -torch.minimum(advantages * ratio, advantages * ratio.clamp(0.8, 1.2)) - 0.1 * entropy
    return losses[batch["loss_mask"]].mean()


def gradients(loss, model):
    return torch.autograd.grad(loss, list(model.parameters()))


@pytest.mark.parametrize("loss_function, dense", [(log_prob_loss, dense_log_prob_loss), (ppo_loss, dense_ppo_loss)])
def test_tied_head(loss_function, dense, place):
    """The gradients of the embedding and of the head add up in the one parameter."""
    model, batch = TiedModel().to(place), make_batch(place)
    loss = loss_function(model(batch), model.embedding, batch)
    truth = TiedModel().to(place).double()
    expected = dense(truth(batch), truth.embedding, batch)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    for gradient, true_gradient in zip(gradients(loss, model), gradients(expected, truth)):
        torch.testing.assert_close(gradient.double(), true_gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss_function", [log_prob_loss, ppo_loss])
def test_recomputed_by_a_checkpoint(loss_function, place):
    model, batch = TiedModel().to(place), make_batch(place)

    def run(batch):
        return loss_function(model(batch), model.embedding, batch)

    loss, recomputed = run(batch), checkpoint(run, batch, use_reentrant=False)
    assert torch.equal(recomputed, loss)
    for a, b in zip(gradients(recomputed, model), gradients(loss, model)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_accumulation_over_micro_batches(as_tensor, place):
    """Gradients add up in `.grad`; one micro-batch has no token in the loss."""
    model, batch = TiedModel().to(place), make_batch(place)
    batch["loss_mask"][11:14] = False
    whole = ppo_loss(model(batch), model.embedding, batch)
    exact = TiedModel().to(place).double()
    truths = gradients(dense_ppo_loss(exact(batch), exact.embedding, batch), exact)
    peers = gradients(dense_ppo_loss(model(batch), model.embedding, batch), model)
    num_items = batch["loss_mask"].sum()
    total = 0.0
    for here in (slice(0, 11), slice(11, 14), slice(14, ROWS)):
        part = {name: tensor[here] for name, tensor in batch.items()}
        loss = ppo_loss(model(part), model.embedding, part, num_items if as_tensor else num_items.item())
        loss.backward()
        total += loss.detach()
    torch.testing.assert_close(total, whole.detach())
    # Sums of other batches round otherwise: as exact as torch's float32, which errs about as much as two of ours
    # differ.
    for parameter, truth, peer in zip(model.parameters(), truths, peers):
        assert (parameter.grad.double() - truth).norm() <= 4 * (peer.double() - truth).norm()


def call(name, model, batch):
    """An op applied to outputs of a model. Its tensors are in a list, differentiable ones first."""
    hidden, old_logps = model(batch), batch["old_logps"]
    ppo = old_logps, batch["advantages"], batch["loss_mask"]
    if name == "token_logps":
        return [ops.token_logps(hidden @ model.embedding.t(), batch["labels"], temperature=0.8)]
    if name == "linear_token_logps":
        return [log_prob_loss(hidden, model.embedding, batch)]
    if name == "linear_ppo_loss":
        return [ppo_loss(hidden, model.embedding, batch)]
    if name in ("ppo_policy_loss", "ppo_value_loss"):
        loss, metrics = getattr(ops, name)(hidden.sum(-1), *ppo)
        return [loss, *metrics.values()]
    bounds = BOUNDS.to(hidden.device)
    if name == "gae":
        return list(ops.gae(batch["advantages"], old_logps, bounds))
    logps = old_logps, old_logps + 0.1, old_logps * 0.9
    *outputs, stats = ops.rto_advantages(*logps, batch["advantages"], batch["upstream"][:3], bounds, batch["loss_mask"])
    return [*outputs, *stats.values()]


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace the builtin")
@pytest.mark.parametrize("name", [name for name in ops.__all__ if name != "RTOAdvantages"])
def test_compiled(name, path, place):
    """Ops compile to one graph, except those of the reference whose shapes depend on masks and bounds."""
    one_graph = path == "triton" or name in ("token_logps", "ppo_policy_loss", "ppo_value_loss")
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=one_graph, backend="aot_eager")
    model, batch = TiedModel().to(place), make_batch(place)
    actual, expected = compiled(name, model, batch), call(name, model, batch)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)
    if expected[0].requires_grad:
        for a, b in zip(gradients(actual[0].sum(), model), gradients(expected[0].sum(), model)):
            torch.testing.assert_close(a, b)
    else:
        assert name in ("gae", "rto_advantages", "sample_tokens")
