"""The README is true: its example runs, its commands are CI's, what it names exists."""

import re
from pathlib import Path

import pytest
import torch

from rto_fast.config import load_config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


def scope_of(name):
    """What the README's example that holds `name` defines."""
    (block,) = (b for b in BLOCKS if name in b)
    scope = {}
    exec(compile(block, "README.md", "exec"), scope)
    return scope


def test_the_first_example_trains():
    scope = scope_of("loss.backward()")
    assert scope["loss"].isfinite() and scope["lm_head"].grad.abs().sum() > 0


def test_the_example_that_generates():
    scope = scope_of("NativeEngine")
    batch, old_logps, rollout = scope["batch"], scope["old_logps"], scope["rollout"]
    assert len(rollout.response_ids) == 8 and batch.num_sequences == 8
    assert old_logps.shape == batch.labels.shape and (old_logps[batch.response_mask] < 0).all()


def test_the_example_for_trl():
    scope = scope_of("selective_log_softmax")
    logits, index = torch.randn(2, 5, 11), torch.randint(0, 11, (2, 5))
    row_mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    expected = (logits / 0.7).log_softmax(-1).gather(-1, index[..., None])[..., 0] * row_mask
    torch.testing.assert_close(scope["selective_log_softmax"](logits, index, 0.7, row_mask), expected)
    hidden, weight = torch.randn(2, 5, 4), torch.randn(11, 4)
    rows = (hidden @ weight.T / 0.7).log_softmax(-1)
    logps, entropy = scope["chunked_logprobs"](hidden, weight, index, 0.7)
    torch.testing.assert_close(logps, rows.gather(-1, index[..., None])[..., 0])
    torch.testing.assert_close(entropy, -(rows.exp() * rows).sum(-1))


def test_the_trl_example_is_a_drop_in():
    trl = pytest.importorskip("trl.trainer.utils", reason="trl is in the bench extra")
    logits, index = torch.randn(2, 5, 11), torch.randint(0, 11, (2, 5))
    ours = scope_of("selective_log_softmax")["selective_log_softmax"](logits, index)
    torch.testing.assert_close(ours, trl.selective_log_softmax(logits, index))


def test_the_example_for_openrlhf():
    scope = scope_of("get_advantages_and_returns")
    kl, values, r = torch.randn(2, 6), torch.randn(2, 6), torch.tensor([0.5, 30.0])
    mask = torch.tensor([[0, 1, 1, 1, 0, 0], [1, 1, 0, 1, 1, 1]]).bool()  # a hole: a tool's output
    rewards = scope["compute_reward"](r, 0.1, kl, mask)
    expected = -0.1 * kl * mask
    expected[0, 3] += 0.5
    expected[1, 5] += 10.0
    torch.testing.assert_close(rewards, expected)
    advantages, returns = scope["get_advantages_and_returns"](values, rewards, mask, 0.9, 0.8)
    for row in range(2):
        carry = following = 0.0
        for t in reversed(mask[row].nonzero()[:, 0].tolist()):
            carry = rewards[row, t] + 0.9 * following - values[row, t] + 0.9 * 0.8 * carry
            following = values[row, t]
            torch.testing.assert_close(advantages[row, t], carry)
            torch.testing.assert_close(returns[row, t], carry + values[row, t])
    assert not advantages[~mask].any()
    logits, labels = torch.randn(2, 6, 7), torch.randint(0, 7, (2, 6))
    torch.testing.assert_close(
        scope["log_probs_from_logits"](logits, labels), logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    )


def test_ci_runs_the_readmes_test_command():
    command = 'pip install -e ".[dev]" && pytest -n 2 --dist loadfile'
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
        assert hasattr(getattr(load_config([]), stage), name), f"{stage}.{name}"
    for option in re.findall(r"--((?:data|sft|model|rto|dpo)\.\w+)", text):
        stage, name = option.split(".")
        assert hasattr(getattr(load_config([]), stage), name), option
