"""Decides whether two forward passes of one policy differ by rounding or by a fault, for all checks of that kind.

There are two questions.

1. *Does a path compute the model?* A path is a packed forward pass, or decoding. Its log-probs are compared with those of
   the model's own forward pass in a higher precision. The noise of the model is the same difference for its own forward
   pass in its own dtype. The error of a correct path is about the noise; an error above `FACTOR` times the noise is a fault.
   Measured on SmolLM2-135M in bfloat16, 24 to 96 tokens: correct paths have 0.8 to 1.4 times the noise, a leak from a
   neighbour 14 times, attention scaled by 1.1 5 times, logits scaled by 1.05 2.6 times. The noise is 0.02 to 0.17 nats a
   token, so the limit cannot be a constant. In 16 bits a few tokens have many times the noise of the others, where rounding
   sends a token to another expert. As few tokens are compared, an error in 16 bits is a fault only if it exceeds the limit
   by `CERTAIN` times the standard error of the excess. In float32 this is too rare to matter, and a leak into only the first
   tokens of a sequence must be found.

2. *Does the difference between sampler and training change PPO?* It is asked where there is one: a sampler that is exact
   (`rto_fast.rollout.base.Exactness`) has none. Let Δ = log π_training − log π_sampler of the sampled
   tokens. PPO's ratio starts at exp(Δ), which is the correct importance weight of these samples. Its mean is 1 despite
   rounding, because the sampler draws from the distribution that it reports. So noise causes no bias until it is as large as
   the clip; then tokens start the update outside of the clip and lose their gradient. KL(sampler ‖ training), by the k3
   estimate mean(exp(Δ) − 1 − Δ), is half the variance of Δ if Δ is small, and the bias of the KL penalty. The limits are:
   - k3 ≤ clip²/8: the standard deviation of Δ is at most half of the clip (0.005 nats for a clip of 0.2);
   - |mean(exp(Δ)) − 1| ≤ clip/10: a sampler that draws from another distribution than it reports shifts the clip.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rto_fast.config import RTOConfig

FACTOR = 2.0
CERTAIN = 3.0  # standard errors
OTHER_MODEL = 0.25  # nats a token of KL between sampler and policy, which no importance weight corrects


@dataclass(frozen=True)
class Agreement:
    """The error of a path, and the noise of the model's own forward pass. Log-probs are in nats."""

    errors: Tensor  # [N], |path − truth| of each token
    noises: Tensor  # [N], |own − truth| of each token
    resolution: float  # of float32 for values of this size
    precision: torch.dtype  # in which both passes computed

    @property
    def error(self) -> float:
        return self.errors.mean().item()

    @property
    def limit(self) -> float:
        """The largest mean error that is rounding."""
        limit = FACTOR * (self.noises.mean().item() + self.resolution)
        if self.precision.itemsize > 2:
            return limit
        excess = self.errors - FACTOR * self.noises
        return limit + CERTAIN * excess.std(correction=0).item() / math.sqrt(len(excess))

    @property
    def is_rounding(self) -> bool:
        return self.error <= self.limit  # false for NaN


def compare_logits(path: Tensor, own: Tensor, truth: Tensor, precision: torch.dtype) -> Agreement:
    """Compares next-token distributions by their expected |Δ log-prob| under the true distribution.

    Args:
        path: [N, V] logits of the path, any dtype.
        own: [N, V] logits of the model's own forward pass in the path's precision.
        truth: [N, V] logits of the model's own forward pass in a higher precision.
        precision: in which `path` and `own` were computed, whatever their dtype.
    """
    path, own, truth = (logits.double().log_softmax(-1) for logits in (path, own, truth))
    weight = truth.exp()

    def mean(values: Tensor) -> Tensor:
        return torch.where(weight > 0, weight * values.abs(), 0.0).sum(-1)

    return Agreement(mean(path - truth), mean(own - truth), _resolution(mean(truth)), precision)


def compare_values(path: Tensor, own: Tensor, truth: Tensor, precision: torch.dtype) -> Agreement:
    """Compares values [N], such as scores, with the arguments of `compare_logits`."""
    path, own, truth = (values.double() for values in (path, own, truth))
    return Agreement((path - truth).abs(), (own - truth).abs(), _resolution(truth), precision)


def _resolution(values: Tensor) -> float:
    return torch.finfo(torch.float32).eps * values.abs().mean().item()


@dataclass(frozen=True)
class Noise:
    """The effect of rounding on the log-probs of sampled tokens in a model's training forward pass, in nats a token."""

    mean: float  # of |Δ log-prob|
    k3: float  # mean of exp(Δ) − 1 − Δ

    @classmethod
    def measure(cls, own: Tensor, truth: Tensor) -> "Noise":
        """Measures it from log-probs [n] in the model's dtype and in a higher precision."""
        delta, resolution = own.double() - truth.double(), _resolution(truth.double())
        k3 = (delta.expm1() - delta).mean().item()
        return cls(delta.abs().mean().item() + resolution, k3 + resolution**2 / 2)

    @property
    def repeated_mean(self) -> float:
        """The largest mean |Δ| between two passes of the same weights, whose errors are independent at worst."""
        return FACTOR * math.sqrt(2) * self.mean

    @property
    def repeated_k3(self) -> float:
        """The largest k3 between two passes of the same weights; k3 grows with the square of Δ."""
        return (FACTOR * math.sqrt(2)) ** 2 * self.k3


def mismatch(training: Tensor, sampler: Tensor) -> dict[str, Tensor]:
    """Returns metrics of the difference between training and sampler, from log-probs [n] of the sampled tokens.

    `mismatch_mean` and `mismatch_max` are those of |Δ|; the module's docstring defines `mismatch_k3` and `mismatch_bias`.
    """
    delta = training - sampler
    ratio = delta.expm1()
    return {
        "mismatch_mean": delta.abs().mean(),
        "mismatch_max": delta.abs().max(),
        "mismatch_k3": (ratio - delta).mean(),
        "mismatch_bias": ratio.mean(),
    }


def clip_width(rto: RTOConfig) -> float:
    """Returns the narrower side of PPO's clip."""
    return min(rto.clip_eps, rto.clip_eps if rto.clip_eps_high is None else rto.clip_eps_high)


def k3_limit(clip: float) -> float:
    """Returns the largest k3 between sampler and training that does not change PPO, in nats a token."""
    return clip**2 / 8


def ppo_notices(metrics: Mapping[str, Any], clip: float) -> bool:
    """Returns whether a `mismatch` changes PPO with this clip; NaN does."""
    k3, bias = float(metrics["mismatch_k3"]), float(metrics["mismatch_bias"])
    return not (k3 <= k3_limit(clip) and abs(bias) <= clip / 10)
