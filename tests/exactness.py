"""What the tests of exactness share: are a sampler's log-probs those of training passes, to the bit?"""

import pytest
import torch
import torch.nn.functional as F

from rto_fast.batch import micro_batches
from rto_fast.config import RTOConfig
from rto_fast.models.attention import PACKED
from rto_fast.models.model import Model
from rto_fast.rollout.exactness import trained_logps
from rto_fast.rto.update import MicroBatch, policy_loss

PASS_TOKENS = 8192


def packings(count, seed):
    """Two ways to pack responses: all in one batch, and in an order of chance one alone and then the others."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return [[list(range(count))], [part for part in (order[:1], order[1:]) if part]]


def as_model(model):
    """A `Model` whose passes attend as in training."""
    model = model if isinstance(model, Model) else Model(model)
    model.module.set_attn_implementation(PACKED)
    return model


def differing(model, rollout, temperature=1.0, seed=0):
    """The number of tokens whose log-prob is not the sampler's, in training passes of two packings.

    Args:
        seed: of the order of the responses in the second packing.
    """
    model, sampled, found = as_model(model), rollout.logps.cpu(), 0
    assert len(sampled) == rollout.num_tokens > 0 and sampled.isfinite().all()
    lengths = [len(p) + len(r) for p, r in zip(rollout.prompt_ids, rollout.response_ids)]
    for groups in packings(len(lengths), seed):
        parts = (micro_batches([lengths[i] for i in rows], PASS_TOKENS) for rows in groups)
        passes = [[rows[i] for i in part] for rows, group in zip(groups, parts) for part in group]
        found += (trained_logps(model, rollout, passes, temperature) != sampled).sum().item()
    return found


def first_step(model, rollout, temperature=1.0, backward=torch.Tensor.backward):
    """The metrics of PPO's loss on a whole rollout with the sampler's log-probs as the old ones; leaves its gradients."""
    model = as_model(model)
    batch, old, _ = rollout.pack(model.device)
    advantages, zeros = torch.linspace(-1, 1, len(old), device=old.device), torch.zeros_like(old)
    inputs = MicroBatch(batch, float(rollout.num_tokens), old, zeros, advantages, zeros)
    metrics = model.learn(policy_loss, inputs, RTOConfig(), temperature, backward=backward)
    return {name: float(value) for name, value in metrics.items()}


MM, ADDMM, LINEAR = torch.mm, torch.addmm, F.linear


class RowProducts:
    """Within it, torch's products of 32 and 16 bits on a CPU are summed in float64 and rounded once.

    So a row has the same bits in a product of any number of rows, which MKL does not promise. On a GPU this is the work of
    `rto_fast.kernels.gemm.linear`.

    Args:
        planted: the number of a product, from 0, in which one element of each row is made the next larger number.
    """

    def __init__(self, planted: int = -1):
        self.left = planted

    def __enter__(self):
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(torch, "mm", self.mm)
        self.patch.setattr(torch, "addmm", self.addmm)
        self.patch.setattr(F, "linear", self.linear)

    def __exit__(self, *error):
        self.patch.undo()

    def mm(self, a, b, *, out=None):
        return self.rounded(MM(a.double(), b.double()), a.dtype, out)

    def addmm(self, total, a, b, *, beta=1, alpha=1, out=None):
        # With beta = 0 it is not read, and may be NaN.
        wide = ADDMM(total.double(), a.double(), b.double(), beta=beta, alpha=alpha)
        return self.rounded(wide, a.dtype, out)

    def linear(self, x, weight, bias=None):
        return self.rounded(LINEAR(x.double(), weight.double(), None if bias is None else bias.double()), x.dtype)

    def rounded(self, product, dtype, out=None):
        product = product.to(dtype if out is None else out.dtype)
        if self.left == 0:
            product[..., -1] = torch.nextafter(product[..., -1], torch.full((), torch.inf, dtype=product.dtype))
        self.left -= 1
        return product if out is None else out.copy_(product)
