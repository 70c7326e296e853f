"""The README is true: its example runs, its commands are those of CI, its tables are what was measured."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_example_trains():
    (example,) = re.findall(r"```python\n(.*?)```", README, re.S)
    scope = {}
    exec(compile(example, "README.md", "exec"), scope)
    assert scope["loss"].isfinite()
    assert all(scope[name].grad.abs().sum() > 0 for name in ("hidden", "lm_head"))


def test_ci_runs_the_readmes_test_command():
    command = 'pip install -e ".[dev]" && pytest -n 2 --dist loadfile'
    assert f"\n{command}\n" in README
    pattern = re.search(r"grep -m1 -E '(.*?)' README.md", (ROOT / ".ci" / "run").read_text())[1]
    assert [line for line in README.splitlines() if re.search(pattern, line)] == [command]


def test_it_fits_a_reader():
    lines = README.splitlines()
    assert len(lines) <= 130 and max(map(len, lines)) <= 160


RESULTS = json.loads((ROOT / "benchmarks" / "results" / "nvidia-h200.json").read_text())


def kernel_times(group, phase, model):
    """{provider: median milliseconds} at 8192 tokens, nothing masked out."""
    wanted = {"group": group, "phase": phase, "model": model, "tokens": 8192, "mask": "full"}
    records = [record for record in RESULTS["kernels"] if wanted.items() <= record.items() and "median_ms" in record]
    return {record["provider"]: record["median_ms"] for record in records}


@pytest.mark.parametrize(
    "group, phase, model, named, provider",
    [
        ("linear_ppo_loss", "forward+backward", "Llama-3-8B", "torch", "torch"),
        ("linear_ppo_loss", "forward+backward", "Qwen3-0.6B", "TRL", "TRL + PPO"),
        ("token_logps", "forward", "Llama-3-8B", "Liger", "Liger"),
        ("token_logps", "backward", "Llama-3-8B", "TRL", "TRL"),
    ],
)
def test_the_speed_of_kernels_is_what_was_measured(group, phase, model, named, provider):
    times = kernel_times(group, phase, model)
    peers = {name: time for name, time in times.items() if not name.startswith("ours")}
    assert min(peers, key=peers.__getitem__) == provider  # the fastest one
    title = re.escape(f"| `{group}`, {phase.replace('+', ' + ')}, {model}'s head")
    (row,) = re.findall(rf"{title} \| (.*) \| (.*) \| `", README)
    ours, peer = (float(re.search(r"[\d.]+", cell)[0]) for cell in row)
    assert ours == float(f"{times['ours']:.3g}") and peer == float(f"{times[provider]:.3g}") and named in row[1]
    assert ("**" in row[0]) == (ours < peer)


def test_the_speed_of_rollouts_and_iterations_is_what_was_measured():
    records = [r for r in RESULTS["rollout"] if (r["model"], r.get("workload")) == ("Qwen3-0.6B", "short")]
    speeds = {record["provider"]: round(record["tokens_per_second"]) for record in records}
    ours = speeds.pop("ours")
    assert f"**{ours:,} tokens/s** | {max(speeds.values()):,} tokens/s (transformers' `generate`)" in README
    (part,) = RESULTS["iterations"]
    assert max(speeds, key=speeds.__getitem__) == "HF generate" and round(part["parameters"] / 1e6) == 307
    seconds = sum(part["phases"].values())
    sizes = [part[name] for name in ("responses", "prompt_tokens", "response_tokens")]
    assert f"{sizes[0]} × ({sizes[1]} + {sizes[2]}) tokens | **{seconds:.1f} s**" in README
