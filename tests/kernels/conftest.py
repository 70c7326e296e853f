"""Fixtures of the kernel tests. They import kernel modules directly: `from rto_fast.kernels import advantages`."""

import pytest
import torch


@pytest.fixture(autouse=True)
def poison_uninitialised_memory():
    """Fills torch.empty with NaN (integers: their maximum), so that a test sees an output that no kernel wrote."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
