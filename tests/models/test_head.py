"""The linear ops as the forward of the head: alone, and where ZeRO-3 has taken the weights away (two processes)."""

import sys
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from rto_fast.errors import ModelError
from rto_fast.models.head import use_op_linear
from rto_fast.ops import linear_ppo_loss, linear_token_logps
from tests.ranks import RANKS, join_deepspeed, run_ranks  # noqa: E402
from tests.tiny_models import tiny  # noqa: E402

VOCAB, TOKENS, STEPS, NUM_ITEMS = 50, 12, 2, 8.0


class Policy(nn.Module):
    """A causal LM whose forward is its loss: PPO's, less the mean log-prob for the recomputing backward pass."""

    def __init__(self, tied):
        super().__init__()
        sizes = dict(vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
        self.lm = tiny("llama", seed=0, std=None, **sizes, tie_word_embeddings=tied).train()

    def hidden(self, input_ids):
        return self.lm.base_model(input_ids=input_ids[None], use_cache=False).last_hidden_state[0]

    def forward(self, input_ids, labels, old_logps, advantages, loss_mask):
        hidden, head = self.hidden(input_ids), self.lm.get_output_embeddings()
        loss, _ = head(
            hidden,
            op=linear_ppo_loss,
            labels=labels,
            old_logps=old_logps,
            advantages=advantages,
            loss_mask=loss_mask,
            num_items=NUM_ITEMS,
            entropy_coef=0.1,
        )
        return loss - 0.01 * head(hidden, op=linear_token_logps, labels=labels).mean()


class DensePolicy(Policy):
    """The same from [T, V] log-probs."""

    def forward(self, input_ids, labels, old_logps, advantages, loss_mask):
        log_probs = self.lm.get_output_embeddings()(self.hidden(input_ids)).log_softmax(-1)
        logps, entropy = log_probs.gather(-1, labels[:, None])[:, 0], -(log_probs.exp() * log_probs).sum(-1)
        ratio = (logps - old_logps).exp()
        losses = -torch.minimum(advantages * ratio, advantages * ratio.clamp(0.8, 1.2)) - 0.1 * entropy
        return losses[loss_mask].sum() / NUM_ITEMS - 0.01 * logps.mean()


def make_batches(count):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        input_ids, labels = torch.randint(0, VOCAB, (2, TOKENS), generator=generator)
        old_logps, advantages = torch.randn(2, TOKENS, generator=generator) / 4 + torch.tensor([[-4.0], [0.0]])
        yield input_ids, labels, old_logps, advantages, torch.rand(TOKENS, generator=generator) < 0.7


def adam(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)


def train_dense(tied):
    """(losses [steps, ranks], parameters after the steps)"""
    model, losses, batches = DensePolicy(tied), [], list(make_batches(STEPS * RANKS))
    optimizer = adam(model)
    for step in range(STEPS):
        optimizer.zero_grad()
        losses.append([model(*batch) for batch in batches[step * RANKS : (step + 1) * RANKS]])
        (sum(losses[-1]) / RANKS).backward()
        optimizer.step()
    return losses, model.parameters()


def train_zero3(tied, rank):
    """One of two processes: the same steps on ZeRO-3 shards, compared with those of one process without."""
    import deepspeed

    model = Policy(tied)
    use_op_linear(model.lm)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": 0,
            "stage3_max_live_parameters": 0,  # nothing gathered forward is still there backward
            "stage3_max_reuse_distance": 0,
        },
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=adam(model), config=config)
    weight = model.lm.get_output_embeddings().weight
    batches = list(make_batches(STEPS * RANKS))
    with pytest.raises(ValueError, match=r"lm_head_weight: expected shape \[V, D\], got \(0,\)"):
        linear_token_logps(torch.zeros(1, 16), weight, torch.zeros(1, dtype=torch.long))
    expected_losses, expected_parameters = train_dense(tied)
    for step, expected in enumerate(expected_losses):
        loss = engine(*batches[step * RANKS + rank])
        torch.testing.assert_close(loss, expected[rank])
        assert weight.numel() == 0
        engine.backward(loss)
        engine.step()
        assert weight.numel() == 0
    for parameter, expected in zip(model.parameters(), expected_parameters, strict=True):
        with deepspeed.zero.GatheredParameters([parameter]):
            torch.testing.assert_close(parameter.detach(), expected.detach(), rtol=1e-4, atol=1e-5)


def main(rank, store):
    from rto_fast.kernels import arguments, reference

    join_deepspeed(rank, store)
    reference.BLOCK_ELEMENTS, reference.KEPT_ELEMENTS = 5 * VOCAB, 0  # blocks computed again in the backward pass
    for arguments.INTERPRET in (False, True):
        for tied in (False, True):
            train_zero3(tied, rank)


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")
def test_zero3(tmp_path, interpreter):
    run_ranks(__file__, tmp_path, TRITON_INTERPRET="1")


@pytest.mark.parametrize("tied", [False, True])
def test_without_zero3(tied):
    model, dense = Policy(tied), DensePolicy(tied)
    names = list(model.state_dict())
    head = use_op_linear(model.lm)
    assert head is use_op_linear(model.lm) and list(model.state_dict()) == names
    batch = next(make_batches(1))
    model(*batch).backward()
    dense(*batch).backward()
    for parameter, expected in zip(model.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-4, atol=1e-6)
    assert torch.equal(model.lm(batch[0][None]).logits, dense.lm(batch[0][None]).logits)


def test_any_linear_layer_is_replaced_under_its_name():
    model = nn.Module()
    model.own_head = nn.Linear(8, 20)  # a model's own code may have no `set_output_embeddings`
    model.get_output_embeddings = lambda: model.own_head
    hidden, labels = torch.randn(5, 8), torch.arange(5)
    expected = model.own_head(hidden).log_softmax(-1)[labels, labels]
    head = use_op_linear(model)
    assert head is model.own_head
    torch.testing.assert_close(head(hidden, op=linear_token_logps, labels=labels), expected)
    with pytest.raises(TypeError, match="bias"):
        head(hidden, op=linear_ppo_loss, labels=labels)
    model.own_head = nn.Sequential(head)
    with pytest.raises(ModelError, match="Module: its output layer is a Sequential"):
        use_op_linear(model)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
