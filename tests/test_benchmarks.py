"""The benchmarks' arithmetic, and that their scripts run from start to end on a machine without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import costs, loops, peers, report, roofline, shapes, timing  # noqa: E402
from rto_fast import ops  # noqa: E402

ROOT = Path(__file__).parents[1]
H200 = costs.DEVICES["H200"]
# Limits in ms on an H200 (790 TFLOP/s, 4.3 TB/s) at T = 8192, worked out by hand: Llama-3-8B, Qwen3-0.6B, Gemma3-270M.
LIMITS = {
    ("token_logps", "forward"): (0.49, 0.58, 1.0),  # 2TV bytes
    ("token_logps", "backward"): (0.98, 1.16, 2.0),  # 4TV bytes
    ("linear_token_logps", "forward"): (10.9, 3.2, 3.5),  # 2TVD FLOP
    ("linear_ppo_loss", "forward+backward"): (32.7, 9.7, 10.4),  # 6TVD FLOP
    ("linear_token_logps", "forward+backward"): (43.6, 12.9, 13.9),  # 8TVD FLOP: the backward pass recomputes
}


def run(*command, **environment):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | environment
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, env=environment, timeout=300
    )


@pytest.mark.parametrize("op, phase", LIMITS)
def test_limits(op, phase):
    found = [costs.milliseconds([costs.limit(op, phase, shape)], H200) for shape in shapes.MODELS]
    assert found == pytest.approx(LIMITS[op, phase], rel=0.01)


@pytest.mark.parametrize("device", costs.DEVICES.values(), ids=costs.DEVICES)
def test_a_prediction_is_never_below_its_limit(device):
    for op, phase, shape, limit, prediction in costs.table(device):
        assert limit <= prediction, (op, phase, shape)
        assert prediction < 2 * limit or op in roofline.VECTOR_OPS, (op, phase, shape)  # those are launch-bound


def test_masked_tokens_cost_nothing():
    full, half = (costs.limit("linear_ppo_loss", "forward+backward", shapes.LLAMA3_8B, kept) for kept in (1.0, 0.5))
    assert half.flops == full.flops / 2


def test_peers_compute_the_same():
    device, shape = torch.device("cpu"), shapes.TINY
    inputs = {
        "token_logps": shapes.logits_inputs(shape, "cpu", torch.float32),
        "linear_token_logps": shapes.linear_inputs(shape, "cpu", torch.float32),
        "linear_ppo_loss": shapes.ppo_inputs(shape, "cpu", torch.float32, "half"),
        "ppo_policy_loss": shapes.policy_inputs(100, "cpu"),
    }
    for group, arguments in inputs.items():
        functions = getattr(peers, group)(device)
        usable = [f for f in functions.values() if not isinstance(f, str)]
        assert len(usable) >= 2
        for function in usable:
            torch.testing.assert_close(function(*arguments), functions["ours"](*arguments), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loop", [loops.rto_padded_loop, loops.rto_sequence_loop, loops.rto_scan])
def test_loops_compute_the_same(loop):
    arguments = shapes.advantages_inputs(300, 7, "cpu")
    expected = ops.rto_advantages(*arguments)
    advantages, returns, token_rewards = loop(*arguments)
    torch.testing.assert_close(advantages, expected.advantages, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(returns, expected.returns, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(token_rewards, expected.token_rewards)


def test_inputs_look_like_training():
    hidden, weight, labels, old_logps, _, mask = shapes.ppo_inputs(shapes.CPU_SHAPES[0], "cpu", torch.float32, "half")
    logps = ops.linear_token_logps(hidden, weight, labels)
    clipped = ((logps - old_logps).exp() - 1).abs() > 0.2
    assert 0.01 < clipped.float().mean() < 0.2 and 0.4 < mask.float().mean() < 0.6
    assert logps.max() > -0.2 and logps.min() < -5


def test_every_way_to_fail_is_a_result():
    def fails():
        raise RuntimeError("no such GPU\nlong story")

    providers = {"ours": lambda: lambda: torch.ones(3), "fails": fails, "absent": "no module named absent"}
    found = timing.measure(providers, timing.Clock("cpu"), rounds=5)
    assert (
        found["ours"]["rounds"] == 5
        and found["ours"]["q20_ms"] <= found["ours"]["median_ms"] <= found["ours"]["q80_ms"]
    )
    assert "no such GPU" in found["fails"]["error"] and found["absent"] == {"skipped": "no module named absent"}


def test_peak_memory_is_seen():
    clock = timing.Clock("cpu")
    peak = clock.peak_bytes(lambda: torch.ones(1 << 24).exp().sum())
    assert peak is None or 100e6 < peak < 300e6  # two tensors of 67 MB at once


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_gpu_script_says_so():
    process = run("benchmarks/gpu.py")
    assert process.returncode == 2
    assert process.stderr.count("\n") == 1 and "no CUDA device" in process.stderr


def test_gpu_script_and_report(tmp_path):
    """All parts but the tests, which would start pytest again."""
    parts = ("kernels", "scaling", "advantages", "end_to_end")
    process = run("benchmarks/gpu.py", "--cpu-smoke", "--out", str(tmp_path), "--only", *parts)
    assert process.returncode == 0, process.stdout + process.stderr
    result = json.loads((tmp_path / "cpu-smoke.json").read_text())
    groups = {record["group"] for record in result["kernels"]}
    assert groups >= {op for op, _ in LIMITS} | {"rto_advantages", "gae", "ppo_policy_loss", "ppo_value_loss"}
    assert not [record for record in result["kernels"] if "error" in record] and result["notes"] == []
    ours = [record for record in result["kernels"] if record["provider"] == "ours"]
    assert ours and all(record["median_ms"] > 0 and record["limit_ms"] > 0 for record in ours)
    assert all(record.get("deviation") is None or record["deviation"] < 1e-3 for record in result["kernels"])
    assert result["end_to_end"]["tokens_per_second"] > 0 and result["end_to_end"]["losses_finite"]

    pytest.importorskip("matplotlib")
    assert "| ours |" in report.results_section([result]) and report.headline([result])
    paths = report.write_plots(tmp_path, "smoke", result)
    roofline.plot(tmp_path / "roofline.png", [result])
    assert len(paths) >= 5 and all(path.stat().st_size > 10_000 for path in [*paths, tmp_path / "roofline.png"])


def test_sections_are_replaced(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("a\n<!-- x -->\nold\n<!-- /x -->\nb\n")
    assert report.replace_section(path, "x", "new \\1") and not report.replace_section(path, "y", "new")
    assert path.read_text() == "a\n<!-- x -->\nnew \\1\n<!-- /x -->\nb\n"


def test_the_readme_holds_todays_predictions():
    assert roofline.markdown() in (ROOT / "benchmarks" / "README.md").read_text(), "run python -m benchmarks.report"
