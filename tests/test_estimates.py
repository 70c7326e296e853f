import math

import pytest
import torch

from rto_fast.estimates import (
    Z,
    length_controlled_win_rate,
    logistic_regression,
    mean,
    rate,
    t_quantile,
    wins,
)


def bounds(estimate):
    return estimate.low, estimate.high


@pytest.mark.parametrize(
    "degrees, quantile",
    [
        (1, 12.7062),
        (2, 4.30265),
        (3, 3.18245),
        (10, 2.22814),
        (30, 2.04227),
        (255, 1.96931),
        (1000, 1.96234),
        (10**6, 1.95996),
    ],
)
def test_students_quantiles_are_the_tables(degrees, quantile):
    assert t_quantile(degrees) == pytest.approx(quantile, rel=2e-4)


def test_the_interval_of_a_mean():
    estimate = mean([1.0, 2.0, 4.0])
    half = 4.30265 * math.sqrt(7 / 3 / 3)
    assert estimate.value == pytest.approx(7 / 3) and estimate.count == 3
    assert bounds(estimate) == pytest.approx((7 / 3 - half, 7 / 3 + half), rel=1e-3)
    assert all(map(math.isnan, bounds(mean([3.5]))))


def test_the_interval_of_a_rate_solves_wilsons_equation():
    """Its bounds are the rates p from which the observed one is exactly Z standard errors of p away."""
    for successes, count in ((1, 4), (37, 100), (5, 6)):
        estimate = rate([1.0] * successes + [0.0] * (count - successes))
        for p in bounds(estimate):
            assert (estimate.value - p) ** 2 == pytest.approx(Z**2 * p * (1 - p) / count)
    nothing, everything = rate([False] * 4), rate([True] * 4)
    assert bounds(nothing) == pytest.approx((0, Z**2 / (4 + Z**2))) and nothing.value == 0
    assert bounds(everything) == pytest.approx((4 / (4 + Z**2), 1)) and everything.value == 1


@pytest.mark.parametrize("values", [[0.0] * 8, [1.0] * 8, [0.0, 1.0, 1.0], [1.0, 0.0], [0.5] * 3, [2.0] * 3])
def test_the_kind_of_an_interval_does_not_depend_on_the_values(values):
    """A mean moves with its values, and so does its interval; a rate's cannot."""
    estimate, moved = mean(values), mean([value + 5 for value in values])
    assert (moved.value, *bounds(moved)) == pytest.approx((estimate.value + 5, estimate.low + 5, estimate.high + 5))
    if len(set(values)) == 1:
        assert bounds(estimate) == (values[0], values[0])
    assert rate([min(value, 1.0) for value in values]).high - rate([min(value, 1.0) for value in values]).low > 0.1


def test_intervals_cover_the_truth_as_often_as_they_say():
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(2000, 5, generator=generator, dtype=torch.float64)
    covered = sum(low <= 0 <= high for low, high in (bounds(mean(row)) for row in draws)) / 2000
    assert 0.935 < covered < 0.965
    coins = (torch.rand(2000, 40, generator=generator) < 0.3).double()
    covered = sum(low <= 0.3 <= high for low, high in (bounds(rate(row)) for row in coins)) / 2000
    assert 0.93 < covered < 0.975
    ties = torch.multinomial(torch.tensor([0.2, 0.5, 0.3]), 2000 * 40, True, generator=generator).view(2000, 40) / 2
    covered = sum(low <= 0.55 <= high for low, high in (bounds(rate(row)) for row in ties)) / 2000
    assert covered > 0.95  # ties vary less than coins


def test_wins_count_ties_half():
    assert wins([3.0, 1.0, 2.0], torch.tensor([1.0, 1.0, 5.0])).tolist() == [1.0, 0.5, 0.0]


def test_newtons_method_finds_what_a_general_optimizer_finds():
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(60, 3, generator=generator, dtype=torch.float64)
    outcomes = torch.randint(0, 3, (60,), generator=generator).double() / 2
    precision = torch.tensor([0.0, 0.16, 2.0], dtype=torch.float64)
    found, covariance = logistic_regression(features, outcomes, precision)

    def loss(w):
        logits = features @ w
        cross_entropy = torch.nn.functional.binary_cross_entropy_with_logits(logits, outcomes, reduction="sum")
        return cross_entropy + 0.5 * (precision * w.square()).sum()

    weights = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weights], max_iter=200, tolerance_grad=0, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        value = loss(weights)
        value.backward()
        return value

    optimizer.step(closure)
    torch.testing.assert_close(found, weights.detach(), atol=1e-6, rtol=0)
    hessian = torch.autograd.functional.hessian(loss, found)
    torch.testing.assert_close(covariance, torch.linalg.inv(hessian))


def test_without_differences_in_length_it_is_the_win_rate_with_walds_interval():
    outcomes = [1.0] * 30 + [0.0] * 10
    estimate = length_controlled_win_rate(outcomes, [7] * 40, [7] * 40)
    assert estimate.value == pytest.approx(0.75)
    half = Z / math.sqrt(40 * 0.75 * 0.25)  # of the log-odds
    expected = [1 / (1 + math.exp(-(math.log(3) + side * half))) for side in (-1, 1)]
    assert bounds(estimate) == pytest.approx(expected)


def test_two_lengths_have_a_closed_form():
    """With ±d lengths the model is saturated: but for the weak prior, the log-odds at 0 are the mean of both groups'."""
    outcomes = [1.0] * 1600 + [0.0] * 400 + [1.0] * 800 + [0.0] * 1200  # 80 % when longer, 40 % when shorter
    lengths = [20] * 2000 + [10] * 2000
    estimate = length_controlled_win_rate(outcomes, lengths, [15] * 4000)
    log_odds = (math.log(0.8 / 0.2) + math.log(0.4 / 0.6)) / 2
    assert estimate.value == pytest.approx(1 / (1 + math.exp(-log_odds)), abs=1e-3)
    assert estimate.low < estimate.value < estimate.high


def test_a_policy_that_wins_by_length_alone_gets_one_half():
    generator = torch.Generator().manual_seed(2)
    difference = torch.randn(4000, generator=generator) * 10 + 8  # longer on average
    win = (
        torch.rand(4000, generator=generator) < torch.sigmoid(2 * torch.tanh(difference / difference.std()))
    ).double()
    estimate = length_controlled_win_rate(win, 50 + difference, [50.0] * 4000)
    assert rate(win).value > 0.65 and estimate.low < 0.5 < estimate.high and estimate.high - estimate.low < 0.06


def test_swapping_the_two_sides_mirrors_the_rate():
    generator = torch.Generator().manual_seed(3)
    outcomes = torch.randint(0, 3, (50,), generator=generator).double() / 2
    ours, theirs = torch.randint(5, 60, (2, 50), generator=generator)
    one, other = (
        length_controlled_win_rate(outcomes, ours, theirs),
        length_controlled_win_rate(1 - outcomes, theirs, ours),
    )
    assert one.value == pytest.approx(1 - other.value) and one.low == pytest.approx(1 - other.high)


def test_degenerate_outcomes_stay_finite():
    separated = length_controlled_win_rate([1.0] * 5 + [0.0] * 5, [20] * 5 + [10] * 5, [15] * 10)
    assert separated.value == pytest.approx(0.5) and 0 < separated.low < separated.high < 1  # the prior holds the slope
    all_wins = length_controlled_win_rate([1.0] * 8, range(8), [3] * 8)
    assert all_wins == rate([1.0] * 8)
    ties = length_controlled_win_rate([0.5] * 8, range(8), [3] * 8)
    assert ties.value == pytest.approx(0.5)
    one = length_controlled_win_rate([0.5], [3], [4])
    assert one.value == pytest.approx(0.5)
