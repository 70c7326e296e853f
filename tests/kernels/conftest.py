"""Fixtures of the kernel tests. They import kernel modules directly: `from rto_fast.kernels import advantages`."""

import numpy
import pytest
import torch
import triton


def version(module):
    return tuple(int(part) for part in module.__version__.split(".")[:2])


@pytest.fixture(scope="session")
def device():
    if torch.cuda.is_available():
        return torch.device("cuda")
    if version(triton) < (3, 7) and version(numpy) >= (2, 5):
        pytest.skip("Triton 3.6's interpreter does not run on NumPy 2.5: use NumPy 2.4, Triton 3.7 or a GPU")
    return torch.device("cpu")


@pytest.fixture(autouse=True)
def poison_uninitialised_memory():
    """torch.empty is full of NaN (integers: their maximum), so that an output a kernel forgot to write is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
