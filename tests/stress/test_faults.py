"""A few of the faults that `python -m tests.stress.faults` injects by the hundred."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")
def test_runs_survive_a_few_bad_days():
    command = [sys.executable, "-m", "tests.stress.faults", "--minutes", "0.25"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and "lost 0\n" in done.stdout, done.stdout + done.stderr
