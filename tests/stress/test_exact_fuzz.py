"""One of the random rollouts that `python -m tests.stress.exact_fuzz` tries by the hundred."""

from collections import Counter

import pytest
import torch

from tests.rollout.test_exact import as_on_a_gpu  # noqa: F401  an autouse fixture
from tests.stress.exact_fuzz import case

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has its own tests: test_exact_cuda.py")


def test_random_rollouts_are_those_of_training_passes():
    counts = Counter()
    case(3, counts)  # one with LoRA that takes seconds
    assert counts["rollouts"] and counts["tokens"]
