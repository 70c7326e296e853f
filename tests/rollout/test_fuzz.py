"""A few of the random rollouts that `python -m tests.rollout.fuzz` tries by the thousand."""

from collections import Counter

import pytest
from fuzz import case


@pytest.mark.parametrize("seed", range(16))
def test_random_rollouts_are_what_an_oracle_draws(seed):
    case(seed, Counter())
