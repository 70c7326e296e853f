"""The README is true: its example runs, its commands are CI's, what it names exists."""

import re
from pathlib import Path

import pytest

from rto_fast.config import Config, load_config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, re.S))
def test_python_examples_run(block):
    scope = {}
    exec(compile(block, "README.md", "exec"), scope)
    assert scope["loss"].isfinite() and scope["lm_head"].grad.abs().sum() > 0


def test_ci_runs_the_readmes_test_command():
    command = 'pip install -e ".[dev]" && pytest'
    assert f"\n{command}\n" in README
    pattern = re.search(r"grep -m1 -E '(.*?)' README.md", (ROOT / ".ci" / "run").read_text())[1]
    assert [line for line in README.splitlines() if re.search(pattern, line)] == [command]


def test_named_files_exist():
    for name in re.findall(r"`((?:configs|tests|rto_fast|kernels|benchmarks)/[\w./]+)`", README):
        assert (ROOT / name).exists(), name
    tree = README.split("## The house")[1]
    for name in re.findall(r"\b(\w+\.py)\b", tree):
        assert list(ROOT.glob(f"*/{name}")), name


def test_named_options_exist():
    text = re.sub(r"\n +", " ", README)
    for stage, name in re.findall(r"`(data|sft|reward_model|dpo|rto|rollout|eval|model)\.(\w+)", text):
        assert hasattr(getattr(Config(), stage), name), f"{stage}.{name}"
    for option in re.findall(r"--((?:data|sft|model|rto|dpo)\.\w+)", text):
        stage, name = option.split(".")
        assert hasattr(getattr(load_config([]), stage), name), option
