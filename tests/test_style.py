"""ruff's rules and format hold in all code, mypy's types in the package."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(find_spec("ruff") is None, reason="needs ruff (the dev extra)")
@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=" ".join)
def test_ruff(command):
    folders = ["rto_fast", "kernels", "benchmarks", "tests", "docs/token_rewards.py"]
    process = subprocess.run(
        [sys.executable, "-m", "ruff", *command, *folders], cwd=ROOT, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stdout


@pytest.mark.skipif(find_spec("mypy") is None, reason="needs mypy (the dev extra)")
def test_mypy():
    process = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
