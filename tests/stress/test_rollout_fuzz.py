"""A few of the random rollouts that `python -m tests.stress.rollout_fuzz` tries by the thousand."""

from collections import Counter

import pytest

from tests.stress.rollout_fuzz import case


@pytest.mark.parametrize("seed", range(16))
def test_random_rollouts_are_what_an_oracle_draws(seed):
    case(seed, Counter())
