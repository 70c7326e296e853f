import math

import pytest
import torch

from rto_fast.losses import bradley_terry, dpo


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


CHOSEN, REJECTED = [0.3, -2.0, 8.0], [1.1, -2.0, -7.0]


def losses(**options):
    chosen, rejected = torch.tensor(CHOSEN, dtype=torch.float64), torch.tensor(REJECTED, dtype=torch.float64)
    return dpo(chosen, rejected, **options).tolist()


def test_dpo_is_the_papers_equation_7():
    expected = [-math.log(sigmoid(0.4 * (c - r))) for c, r in zip(CHOSEN, REJECTED)]
    assert losses(beta=0.4) == pytest.approx(expected, rel=1e-12)


def test_label_smoothing_mixes_in_the_flipped_label():
    expected = [
        -0.9 * math.log(sigmoid(0.4 * (c - r))) - 0.1 * math.log(sigmoid(-0.4 * (c - r)))
        for c, r in zip(CHOSEN, REJECTED)
    ]
    assert losses(beta=0.4, label_smoothing=0.1) == pytest.approx(expected, rel=1e-12)


def test_ipo_regresses_the_margin_to_half_over_beta():
    assert losses(beta=0.4, loss="ipo") == pytest.approx([(c - r - 1.25) ** 2 for c, r in zip(CHOSEN, REJECTED)])


def test_an_unknown_loss_is_refused():
    with pytest.raises(ValueError, match="hinge"):
        losses(beta=0.4, loss="hinge")


def test_bradley_terry_gradient_is_the_probability_of_being_wrong():
    chosen, rejected = torch.tensor([0.5], requires_grad=True), torch.tensor([2.0], requires_grad=True)
    bradley_terry(chosen, rejected).sum().backward()
    assert chosen.grad.item() == pytest.approx(-sigmoid(1.5), rel=1e-6)
    assert rejected.grad.item() == pytest.approx(sigmoid(1.5), rel=1e-6)
