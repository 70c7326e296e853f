"""Estimates with 95 % confidence intervals, and win rates, from plain tensors in float64.

The caller chooses between `mean` and `rate`, because the values do not show which of the two they need: a KL may be 0 in
all samples, and a score 1, without being the outcomes of trials.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch

Z = NormalDist().inv_cdf(0.975)
# Standard deviation of the slope's Gaussian prior, in log-odds. It is wide (the scale of Gelman et al. 2008, arXiv
# 0901.4011), but keeps the slope finite where the length difference separates wins from losses.
SLOPE_DEVIATION = 2.5

Numbers = torch.Tensor | Sequence[float]


@dataclass(frozen=True)
class Estimate:
    """A mean or a rate; `low` and `high` bound its 95 % confidence interval (NaN where there is none)."""

    value: float
    low: float
    high: float
    count: int


@functools.cache
def t_quantile(degrees: int) -> float:
    """The 97.5 % quantile of Student's t: with x = √ν·tan θ its density is cos^(ν−1) θ on a bounded interval."""
    if degrees > 1000:
        return Z
    theta = torch.linspace(0, math.pi / 2, 200_001, dtype=torch.float64)
    area = torch.cumulative_trapezoid(theta.cos() ** (degrees - 1), theta)
    index = int(torch.searchsorted(area, 0.95 * area[-1]))
    return math.sqrt(degrees) * math.tan(theta[index + 1])


def mean(values: Numbers) -> Estimate:
    """The mean of values [N] on any scale (scores, lengths, nats), with Student's t interval; see `rate` for outcomes."""
    values = torch.as_tensor(values, dtype=torch.float64)
    count, value = len(values), values.mean().item()
    if count < 2:
        return Estimate(value, math.nan, math.nan, count)
    half = t_quantile(count - 1) * values.std(correction=1).item() / math.sqrt(count)
    return Estimate(value, value - half, value + half, count)


def rate(outcomes: Numbers) -> Estimate:
    """The mean of outcomes [N] in [0, 1], with Wilson's score interval (JASA 22, 1927).

    Outcomes between 0 and 1, such as ties, vary less than a coin of the same mean: the interval is then conservative.
    """
    outcomes = torch.as_tensor(outcomes, dtype=torch.float64)
    count, value = len(outcomes), outcomes.mean().item()
    shrink = 1 + Z**2 / count
    middle = (value + Z**2 / (2 * count)) / shrink
    half = Z / shrink * math.sqrt(value * (1 - value) / count + Z**2 / (4 * count**2))
    return Estimate(value, max(middle - half, 0.0), min(middle + half, 1.0), count)


def wins(ours: Numbers, theirs: Numbers) -> torch.Tensor:
    """[N] float64: 1 where ours is higher, ½ where they tie, 0 elsewhere."""
    ours, theirs = torch.as_tensor(ours).double().cpu(), torch.as_tensor(theirs).double().cpu()
    return (ours > theirs).double() + 0.5 * (ours == theirs)


def logistic_regression(
    features: torch.Tensor, outcomes: torch.Tensor, precision: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fits a logistic regression by Newton's method; a step is halved until it improves the penalised likelihood.

    Args:
        features: [N, K] float64.
        outcomes: [N] float64 in [0, 1]; ½ is half a win.
        precision: [K] float64, the precision of each coefficient's Gaussian prior; 0 for no prior.

    Returns:
        The coefficients [K], and their covariance [K, K].
    """
    weights = features.new_zeros(features.shape[1])

    def objective(w: torch.Tensor) -> torch.Tensor:
        logits = features @ w
        return (outcomes * logits - torch.nn.functional.softplus(logits)).sum() - 0.5 * (precision * w * w).sum()

    def curvature(w: torch.Tensor) -> torch.Tensor:
        p = torch.sigmoid(features @ w)
        return (features * (p * (1 - p))[:, None]).T @ features + torch.diag(precision)

    for _ in range(100):
        gradient = features.T @ (outcomes - torch.sigmoid(features @ weights)) - precision * weights
        step = torch.linalg.solve(curvature(weights), gradient)
        if step.abs().max() < 1e-10:
            break
        while objective(weights + step) < objective(weights) and step.abs().max() > 1e-12:
            step = step / 2
        weights = weights + step
    return weights, torch.linalg.inv(curvature(weights))


def length_controlled_win_rate(outcomes: Numbers, lengths: Numbers, reference_lengths: Numbers) -> Estimate:
    """The win rate between answers of equal length.

    This is P(win) at Δlength = 0 in a logistic regression of the win on tanh(Δlength / std Δlength), the length term of
    length-controlled AlpacaEval 2 (arXiv 2404.04475). Its term for the difficulty of an instruction is left out: it needs
    many models on the same instructions.

    Args:
        outcomes: [N], from `wins`.
        lengths: [N], of our answers.
        reference_lengths: [N], of the answers that they are compared with.
    """
    outcomes = torch.as_tensor(outcomes, dtype=torch.float64)
    if (outcomes == 0).all() or (outcomes == 1).all():  # the log-odds are infinite whatever the lengths
        return rate(outcomes)
    difference = torch.as_tensor(lengths, dtype=torch.float64) - torch.as_tensor(reference_lengths, dtype=torch.float64)
    scale = difference.std(correction=0)
    length_term = torch.tanh(difference / scale) if scale > 0 else torch.zeros_like(difference)
    features = torch.stack([torch.ones_like(length_term), length_term], 1)
    prior = features.new_tensor([0.0, SLOPE_DEVIATION**-2])
    weights, covariance = logistic_regression(features, outcomes, prior)
    half = Z * covariance[0, 0].sqrt()
    value, low, high = torch.sigmoid(torch.stack([weights[0], weights[0] - half, weights[0] + half])).tolist()
    return Estimate(value, low, high, len(outcomes))
