"""A fixture that makes reward functions of source text."""

import importlib

import pytest

from rto_fast.rewards import RewardFunction
from tests.rewards.users_functions import HEAD, NUMBERS, users_side


@pytest.fixture
def function(tmp_path, monkeypatch):
    """Makes a `RewardFunction` of a module's source, which defines `f`."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(source, **options):
        name = f"users_module_{next(NUMBERS)}"
        (tmp_path / f"{name}.py").write_text(HEAD + source)
        importlib.invalidate_caches()
        return RewardFunction(f"{name}:f", "reward_model.function", **options)

    yield make
    if users_side():  # what this test's functions have set is not for those of the next
        users_side()._theirs.clear()
