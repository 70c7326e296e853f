"""Settings of all tests: Triton's interpreter where there is no GPU, the order of the files, and common fixtures.

Without a GPU the Triton kernels run through Triton's interpreter, and nothing else does. Triton decides when a function is
decorated: for its own functions at its first import, for ours at the import of a kernel module. So the switch is set before
any test module is imported, and stays set inside Triton. It is not left in the environment, where subprocesses and
`rto_fast.ops`, whose CPU path is the torch reference, would see it.
"""

import contextlib
import gc
import os
import signal
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported; tests run beside each other

import numpy  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available() and find_spec("triton") and "TRITON_INTERPRET" not in os.environ:
    os.environ["TRITON_INTERPRET"] = "1"
    import triton

    triton.knobs.runtime.interpret = True
    del os.environ["TRITON_INTERPRET"]


# The files that take longest, longest first: two workers end together if none of these begins last.
LONGEST = (
    "tests/distributed/test_ranks.py",
    "tests/training/test_resume.py",
    "tests/kernels/test_machine_code.py",
    "tests/rollout/test_exact.py",
    "tests/kernels/test_attention.py",
    "tests/kernels/test_sampling.py",
    "tests/kernels/test_exact_attention.py",
    "tests/test_repeatable.py",
    "tests/test_commands.py",
    "tests/models/test_decoder_kernels.py",
    "tests/kernels/test_labels.py",
    "tests/kernels/test_linear_token_logps.py",
    "tests/test_benchmarks.py",
    "tests/rollout/test_model.py",
    "tests/rollout/test_decode.py",
    "tests/planning/test_plan.py",
    "tests/distributed/test_faults.py",
    "tests/kernels/test_rotary.py",
    "tests/models/test_saved_models.py",
    "tests/system/test_kept_runs.py",
    "tests/stress/test_faults.py",
    "tests/stress/test_fuzz.py",
)


def pytest_configure(config):
    """With pytest-xdist, files are given out in the order of collection and not by their number of tests."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    root, order = Path(__file__).parent.parent, {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.relative_to(root).as_posix(), len(LONGEST)))


def pytest_collection_finish():
    """Keeps what is imported by now out of garbage collection: a run collects after each stage, over a million objects."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def limited():
    """`with limited(seconds)` fails where its body takes longer, such as one that reads a pipe nobody writes to."""

    def late(*_):
        pytest.fail("it hangs")

    @contextlib.contextmanager
    def limit(seconds):
        before = signal.signal(signal.SIGALRM, late)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    return limit


@pytest.fixture(scope="session")
def interpreter():
    """Skips where Triton's interpreter does not work."""
    import triton

    versions = [tuple(map(int, module.__version__.split(".")[:2])) for module in (triton, numpy)]
    if versions[0] < (3, 7) and versions[1] >= (2, 4):
        pytest.skip("Triton 3.6's interpreter does not run on NumPy 2.4 and later: use NumPy 2.3, Triton 3.7 or a GPU")


@pytest.fixture(scope="session")
def device(request):
    """The device on which the Triton kernels run in this process; their inputs, models too, must lie on it."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    request.getfixturevalue("interpreter")
    return torch.device("cpu")


def dot_in_order(builder, a, b, accumulator, input_precision, max_num_imprecise_acc):
    """`tl.dot` of Triton's interpreter, which adds one k after the other to the accumulator, each step rounded."""
    total, left, right = accumulator.data, a.data.astype(accumulator.data.dtype), b.data.astype(accumulator.data.dtype)
    for k in range(left.shape[-1]):
        total = total + left[..., :, k, None] * right[..., k, None, :]
    return type(accumulator)(total, accumulator.dtype.scalar)


@pytest.fixture
def ordered_dot(request, monkeypatch):
    """Within the test, `tl.dot` sums in the order of k, so that a test of equal bits has a meaning in the interpreter.

    The bits of an element then depend on its row, its column and the order of k alone. Tensor cores have this property: on
    an H200, products in twelve tiles, by mma.sync and by wgmma, had the same bits as one another and as cuBLAS.
    The interpreter's own product is a BLAS's, whose order of summation depends on the sizes of the tile. `tl.sum` stays
    numpy's. The operands must not be bfloat16, which the interpreter keeps as integers. On a GPU nothing is replaced.
    """
    if torch.cuda.is_available():
        return
    request.getfixturevalue("interpreter")
    from triton.runtime.interpreter import InterpreterBuilder

    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot_in_order)
