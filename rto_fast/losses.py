"""Losses of the reward model and of DPO. Those of RTO are kernels, see `rto_fast.ops`."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor


def bradley_terry(chosen_scores: Tensor, rejected_scores: Tensor) -> Tensor:
    """The Bradley-Terry loss −log σ(s_chosen − s_rejected) of scores [N] each → [N]."""
    return -F.logsigmoid(chosen_scores - rejected_scores)


def dpo(
    chosen_log_ratios: Tensor,
    rejected_log_ratios: Tensor,
    *,
    beta: float,
    loss: Literal["sigmoid", "ipo"] = "sigmoid",
    label_smoothing: float = 0.0,
) -> Tensor:
    """The loss of direct preference optimisation, from log(π/π_ref) of whole responses.

    Args:
        chosen_log_ratios: [N] float32, nats, summed over the tokens of the chosen response, EOS included.
        rejected_log_ratios: [N] float32, nats, the same for the rejected response.
        loss: "sigmoid" (arXiv 2305.18290, eq. 7; with label smoothing conservative DPO) or "ipo" (arXiv 2310.12036, eq. 17).
    Returns:
        losses [N].
    Raises:
        ValueError: `loss` is neither of the two.
    """
    margin = chosen_log_ratios - rejected_log_ratios
    if loss == "ipo":
        return (margin - 1.0 / (2.0 * beta)).square()
    if loss != "sigmoid":
        raise ValueError(f"loss: expected 'sigmoid' or 'ipo', got {loss!r}")
    return -F.logsigmoid(beta * margin) * (1.0 - label_smoothing) - F.logsigmoid(-beta * margin) * label_smoothing
