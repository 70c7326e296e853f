"""Rounding, or a fault: how far apart two forward passes of one policy may be. Every check of that kind asks this file.

Two questions are kept apart.

1. *Does this path compute the model?* (packing against single sequences, decoding against training). Its log-probs are
   compared with the model's own forward pass in a higher precision. The same forward pass in the model's own dtype is
   compared with it too: that is the noise which this model has in any case. A path that is right is as far away as the
   noise; `FACTOR` times the noise is a fault. Measured on SmolLM2-135M in bfloat16, 24 to 96 tokens: right paths are 0.8
   to 1.4 times the noise away; a neighbour that leaks is 14 times, attention scaled by 1.1 is 5 times, logits scaled by
   1.05 are 2.6 times the noise away. The noise itself is 0.02 to 0.17 nats a token, so no constant would do. The noise of
   some tokens is many times that of the others: where the rounding of 16 bits sends a token to another expert. Few tokens
   are compared, so in 16 bits an error counts only if its excess over the limit is `CERTAIN` times the excess's own standard
   error. In float32 that is too rare to matter, and a leak into the first tokens of a sequence alone must be found.

2. *Does PPO notice the difference between sampler and training?* With Δ = log π_training − log π_sampler of the tokens that
   were drawn, PPO's ratio begins at exp(Δ), which is the importance weight that the sampler's samples need. Its mean is 1
   whatever the rounding, for the sampler draws from what it reports. So noise biases nothing, until it is as large as the
   clip: then tokens begin the update outside of it and lose their gradient. KL(sampler ‖ training), by the k3 estimate
   mean(exp(Δ) − 1 − Δ), is half the variance of small Δ; also the bias of the KL penalty. The limits:
   - k3 ≤ clip²/8: the standard deviation of Δ is at most half of the clip (0.005 nats for a clip of 0.2);
   - |mean(exp(Δ)) − 1| ≤ clip/10: a sampler that reports another distribution than it draws from moves the clip itself.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FACTOR = 2.0
CERTAIN = 3.0  # standard errors
OTHER_MODEL = 0.25  # nats a token of KL between sampler and policy: no importance weight mends that


@dataclass(frozen=True)
class Agreement:
    """How far a path is from the truth, beside how far the model's own forward pass is.

    errors, noises: [N], |Δ| of each token for the path and for the model's own pass: of log-probs in nats, or of scores.
    resolution: what float32 resolves of them. precision: that both passes computed in.
    """

    errors: Tensor
    noises: Tensor
    resolution: float
    precision: torch.dtype

    @property
    def error(self) -> float:
        return self.errors.mean().item()

    @property
    def limit(self) -> float:
        """Largest mean error that is rounding: `FACTOR` times the noise, in 16 bits as far as N tokens can tell."""
        limit = FACTOR * (self.noises.mean().item() + self.resolution)
        if self.precision.itemsize > 2:
            return limit
        excess = self.errors - FACTOR * self.noises
        return limit + CERTAIN * excess.std(correction=0).item() / math.sqrt(len(excess))

    @property
    def is_rounding(self) -> bool:
        return self.error <= self.limit  # never for NaN


def compare_logits(path: Tensor, own: Tensor, truth: Tensor, precision: torch.dtype) -> Agreement:
    """Compares two sets of next-token distributions with the true ones, over the tokens that the model would say.

    The mean over those tokens is exact: |Δ log-prob| of every token, weighted with its true probability.

    Args:
        path: [N, V] logits of the path in question, any dtype.
        own: [N, V] logits of the model's own forward pass in the path's precision.
        truth: [N, V] logits of the same in a higher precision.
        precision: that path and own were computed in, whatever dtype their logits have.
    """
    path, own, truth = (logits.double().log_softmax(-1) for logits in (path, own, truth))
    weight = truth.exp()

    def mean(values: Tensor) -> Tensor:
        return torch.where(weight > 0, weight * values.abs(), 0.0).sum(-1)

    return Agreement(mean(path - truth), mean(own - truth), _resolution(mean(truth)), precision)


def compare_values(path: Tensor, own: Tensor, truth: Tensor, precision: torch.dtype) -> Agreement:
    """Compares values, such as a reward model's scores of tokens, as `compare_logits` does; [N] each."""
    path, own, truth = (values.double() for values in (path, own, truth))
    return Agreement((path - truth).abs(), (own - truth).abs(), _resolution(truth), precision)


def _resolution(values: Tensor) -> float:
    return torch.finfo(torch.float32).eps * values.abs().mean().item()


@dataclass(frozen=True)
class Noise:
    """What rounding does to the log-probs of drawn tokens in one model's training forward pass.

    mean: of |Δ log-prob|, nats a token. k3: of exp(Δ) − 1 − Δ, nats a token.
    """

    mean: float
    k3: float

    @classmethod
    def measure(cls, own: Tensor, truth: Tensor) -> "Noise":
        """From log-probs [n] of drawn tokens in the model's dtype, and in a higher precision."""
        delta, resolution = own.double() - truth.double(), _resolution(truth.double())
        k3 = (delta.expm1() - delta).mean().item()
        return cls(delta.abs().mean().item() + resolution, k3 + resolution**2 / 2)

    @property
    def repeated_mean(self) -> float:
        """Largest mean |Δ| between two passes of the same weights: their errors are independent at worst."""
        return FACTOR * math.sqrt(2) * self.mean

    @property
    def repeated_k3(self) -> float:
        """Largest k3 between two passes of the same weights; k3 grows with the square of Δ."""
        return (FACTOR * math.sqrt(2)) ** 2 * self.k3


def mismatch(training: Tensor, sampler: Tensor) -> dict[str, Tensor]:
    """Metrics of the difference between training and sampler, from log-probs [n] of the tokens that were drawn.

    `mismatch_mean` and `mismatch_max` are of |Δ|; see the module for `mismatch_k3` and `mismatch_bias`.
    """
    delta = training - sampler
    ratio = delta.expm1()
    return {
        "mismatch_mean": delta.abs().mean(),
        "mismatch_max": delta.abs().max(),
        "mismatch_k3": (ratio - delta).mean(),
        "mismatch_bias": ratio.mean(),
    }


def clip_width(rto: Any) -> float:
    """The narrower side of PPO's clip (`RTOConfig`)."""
    return min(rto.clip_eps, rto.clip_eps if rto.clip_eps_high is None else rto.clip_eps_high)


def k3_limit(clip: float) -> float:
    """Largest k3 between sampler and training that PPO does not notice, nats a token."""
    return clip**2 / 8


def ppo_notices(metrics: Mapping[str, Any], clip: float) -> bool:
    """Whether a `mismatch` is more than PPO with this clip leaves without effect; NaN is."""
    k3, bias = float(metrics["mismatch_k3"]), float(metrics["mismatch_bias"])
    return not (k3 <= k3_limit(clip) and abs(bias) <= clip / 10)
