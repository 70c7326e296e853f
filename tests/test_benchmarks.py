"""The arithmetic of the benchmarks; their scripts run from start to end without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import (
    cases,
    costs,
    decode_cases,
    decoders,
    gpu,
    gpu_parts,
    iteration,
    loops,
    pass_costs,
    passes,
    peers,
    report,
    result_tables,
    rollout,
    rollout_cpu,
    rollout_tables,
    roofline,
    shapes,
    timing,
)
from rto_fast import ops
from rto_fast.data import world

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
        # Vector ops and a layer's small kernels are launch-bound, and a filter takes three reads.
        slow = (*roofline.VECTOR_OPS, *costs.LAYER_OPS, costs.SAMPLING_OPS[1])
        assert prediction < 2 * limit or op in slow, (op, phase, shape)
    for decoder in decoders.DECODERS:
        assert costs.step_seconds(decoder, device) < costs.step_seconds(decoder, device, ours=True), decoder.name


# A step of 256 sequences with 512 tokens each, in GB of weights, GB of keys and values, ms on an H200 (4.3 TB/s).
#   Llama-3-8B: 2·(32·(4096·(2·32 + 2·8)·128 + 3·4096·14336) + 4096·128256), 4·32·8·128·131072, (15.01 + 17.18) / 4.3
#   Qwen3-0.6B: 2·(28·(1024·(2·16 + 2·8)·128 + 3·1024·3072) + 1024·151936), 4·28·8·128·131072, (1.19 + 15.03) / 4.3
#   20M Llama:  2·(8·(384·(2·6 + 2·2)·64 + 3·384·1024) + 384·8192), 4·8·2·64·131072, (0.031 + 0.537) / 4.3
STEPS = {
    decoders.LLAMA3_8B: (15.01, 17.18, 7.49),
    decoders.QWEN3_06B: (1.192, 15.03, 3.77),
    decoders.LLAMA_20M: (0.0315, 0.537, 0.132),
}


@pytest.mark.parametrize("decoder", STEPS, ids=lambda decoder: decoder.name)
def test_the_bound_of_a_decode_step(decoder):
    weights, cache, milliseconds = STEPS[decoder]
    empty, full = (costs.decode_step(decoder, 256, tokens) for tokens in (0, 256 * 512))
    assert empty.bytes / 1e9 == pytest.approx(weights, rel=2e-3)
    assert (full.bytes - empty.bytes) / 1e9 == pytest.approx(cache, rel=2e-3)
    assert 1e3 * costs.step_seconds(decoder, H200) == pytest.approx(milliseconds, rel=5e-3)
    # 2 FLOP a weight and token: 15.01 GB of Llama's weights take 256 tokens 3.84·10^12.
    assert empty.flops == 256 * empty.bytes


def test_the_bound_of_a_rollout():
    """Prompts of 3 and 5 tokens and responses of 2 and 4: the prefill gives the first tokens, then there are three steps."""
    decoder, workload = decoders.TINY, decoders.Workload("two", (3, 5), (2, 4))
    device = costs.Device("a byte a second", 1.0, 1e12)
    kv, weights = 2 * 2 * 2 * 16, 2 * 32 * (16 * (2 * 4 + 2 * 2) + 3 * 64) + 32 * 300  # elements
    prefill = 2 * (weights + kv * 8)
    steps = 2 * (weights + kv * (4 + 6)) + 2 * (weights + kv * 7) + 2 * (weights + kv * 8)
    assert costs.rollout_seconds(decoder, workload, device) == pytest.approx(prefill + steps, rel=1e-6)
    assert costs.rollout_seconds(decoder, workload, device, itemsize=4) == pytest.approx(
        2 * (prefill + steps), rel=1e-6
    )
    # FLOPs where they take longer: a prompt's tokens see 1 to 3 and 1 to 5 of them, the head is for the last ones.
    layers, head, attention = weights - 32 * 300, 32 * 300, 4 * 2 * 4 * 16
    flops = costs.prefill(decoder, workload.prompts).flops
    assert flops == 2 * (8 * layers + 2 * head) + attention * (6 + 15)


def test_workloads():
    uniform, log_normal, short = decoders.workloads().values()
    assert len(uniform.prompts) == len(uniform.responses) == 256 == len(log_normal.prompts)
    assert {min(uniform.prompts), min(uniform.responses)} <= set(range(100, 120)) and max(uniform.responses) <= 1024
    assert 270 < sorted(log_normal.responses)[128] < 330 and max(log_normal.responses) == 1024
    assert short.prompts == uniform.prompts and max(short.responses) == max(uniform.responses) // 8
    assert uniform == decoders.workloads()["uniform"]


@pytest.mark.parametrize("decoder", [decoders.TINY, decoders.EMBEDDED, decoders.LLAMA_20M], ids=lambda d: d.name)
def test_models_have_the_sizes_that_are_reckoned_with(decoder):
    model = rollout.build_model(decoder, "meta" if decoder is decoders.LLAMA_20M else "cpu")
    norms = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    assert sum(p.numel() for p in model.parameters()) == decoder.parameters + norms
    assert norms < 0.01 * decoder.parameters
    assert decoders.EMBEDDED.vocab_size == len(world.VOCABULARY)


def test_published_sizes():
    assert [round(d.parameters / 1e6) for d in decoders.DECODERS] == [8030, 596, 19]


def test_a_plan_measures_ours_first():
    items = rollout.plan()
    ours = [item for item in items if item.provider == "ours"]
    assert len(set(items)) == len(items) and items[: len(decoders.DECODERS) * 8] == ours[: len(decoders.DECODERS) * 8]
    assert {item.provider for item in items} == set(rollout.PROVIDERS)


def test_a_rollout_that_fails_or_is_late_is_a_result(monkeypatch):
    class Fails:
        def __init__(self, *_):
            raise RuntimeError("no such model\nlong story")

    monkeypatch.setitem(rollout.PROVIDERS, "ours", Fails)
    runner = rollout.Runner("cpu", {"copy_bytes_per_s": 1e9, "gemm_flops_per_s": 1e9})
    item, late = rollout.plan(small=True)[0], timing.time.perf_counter() - 1
    assert "no such model" in runner.run(item)["error"] and runner.run(item, late)["skipped"] == "out of time"
    assert "no such model" in "".join(rollout_tables.results([runner.run(item)]))


def test_the_cpu_table(monkeypatch):
    monkeypatch.setattr(rollout_cpu, "rates", lambda: {"copy_bytes_per_s": 1e10, "gemm_flops_per_s": 1e10})
    records = rollout_cpu.records(decoders.EMBEDDED, decoders.equal(4, 5, 6, "4 × (5 + 6)"), rounds=1, seconds=0.1)
    assert [r["provider"] for r in records] == ["ours", "HF generate"]
    assert all(r["deviation"] == 0 and r["tokens_per_second"] == pytest.approx(24 / r["seconds"]) for r in records)
    table = rollout_tables.cpu(records)
    assert "| ours |" in table and "embedded, 4 × (5 + 6)" in table and table.count("tokens/s") == 2


def test_attention_peers_compute_the_same():
    device, shape = torch.device("cpu"), costs.decode_shape(decoders.TINY, 5, 90)
    functions, inputs = (
        decode_cases.paged_attention(device),
        decode_cases.attention_inputs(shape, device, torch.float32),
    )
    torch.testing.assert_close(functions["gather + SDPA"](*inputs), functions["ours"](*inputs))
    # FlashAttention's pages hold the same.
    query, *_, lengths, keys, values, tables = inputs
    arguments = keys.transpose(1, 2), values.transpose(1, 2), tables, lengths
    found = decode_cases.paged_reference.paged_attention(query, *arguments, scale=query.shape[-1] ** -0.5)
    torch.testing.assert_close(found, functions["ours"](*inputs))


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


def test_gemms_of_decode_steps(tmp_path):
    process = run("-m", "benchmarks.gemms", "--cpu-smoke", str(tmp_path / "out.json"))
    assert process.returncode == 0, process.stderr
    records = json.loads((tmp_path / "out.json").read_text())
    assert {record["layer"] for record in records} == {"qkv", "o", "gate_up", "down"}
    assert all("median_ms" in r or r["skipped"] == "needs a GPU" for r in records)
    assert "tiny down 32 x 64, 2 rows" in process.stdout
    if not torch.cuda.is_available():
        assert run("-m", "benchmarks.gemms").returncode == 2


def test_gpu_script_and_report(tmp_path):
    """All parts except the tests, which would start pytest again, and TRL, which is not installed."""
    parts = [part for part in gpu.BUDGETS if part not in ("tests", "trl", "compiled")]
    options = ["--cpu-smoke", "--out", str(tmp_path), "--before", str(ROOT)]
    process = run("benchmarks/gpu.py", *options, "--only", *parts)
    assert process.returncode == 0, process.stdout + process.stderr
    result = json.loads((tmp_path / "cpu-smoke.json").read_text())
    groups = {record["group"] for record in result["kernels"]}
    assert groups >= {op for op, _ in LIMITS} | {"rto_advantages", "gae", "ppo_policy_loss", "ppo_value_loss"}
    assert groups >= {"paged_attention", *costs.LAYER_OPS, *costs.SAMPLING_OPS}
    assert not [record for record in result["kernels"] if "error" in record] and result["notes"] == []
    ours = [record for record in result["kernels"] if record["provider"] == "ours"]
    assert ours and all(record["median_ms"] > 0 and record["limit_ms"] > 0 for record in ours)
    assert all(record.get("deviation") is None or record["deviation"] < 1e-3 for record in result["kernels"])
    rollouts = result["rollout"]
    assert {r["provider"] for r in rollouts} == set(rollout.PROVIDERS)
    assert {r["workload"] for r in rollouts} == {"uniform", "log-normal", "short", rollout.STEP}
    assert all(r["tokens_per_second"] > 0 and 0 < r["percent_of_bound"] < 100 for r in rollouts), rollouts
    assert {r["layers"] for r in result["passes"]} == set(passes.FAST)
    assert {r["phase"] for r in result["passes"] if r["layers"] == "ours"} == {"score", "train"}
    values = {r["phase"]: r["value"] for r in result["passes"] if r["layers"] == "ours"}
    assert all(r["value"] == pytest.approx(values[r["phase"]], rel=1e-3) for r in result["passes"] if "value" in r)
    whole = {r["model"]: r for r in result["iterations"]}
    assert set(whole) == {s.name for s in (*iteration.SMALL_SETTINGS, *iteration.SMALL_LORA_SETTINGS)}
    for record in whole.values():
        assert record["loss_is_finite"] and set(record["phases"]) == {"rollout", "score", "update"}, record
    turns = result["comparisons"]
    assert [r["what"] for r in turns] == ["step", "step", "uniform", "iteration"]
    assert all(r["before"] > 0 and r["after"] > 0 for r in turns) and "**Before and after**" in process.stdout
    assert "**Passes**" in process.stdout and "**An iteration**" in process.stdout  # each part ends with its table

    pytest.importorskip("matplotlib")
    section = report.results_section([result])
    assert "| ours |" in section and "| HF continuous batching |" in section and "**A decode step**" in section
    assert report.headline([result])
    paths = report.write_plots(tmp_path, "smoke", result)
    roofline.plot(tmp_path / "roofline.png", [result])
    assert len(paths) >= 5 and all(path.stat().st_size > 10_000 for path in [*paths, tmp_path / "roofline.png"])


RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
OPTIONAL = ("tests", "seconds", "rollout", "passes", "iterations", "notes", "ceilings_after")


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_committed_results_are_in_the_docs(path, tmp_path):
    pytest.importorskip("matplotlib")
    result = json.loads(path.read_text())
    assert report.results_section(roofline.load_results()) in (ROOT / "benchmarks" / "README.md").read_text()
    assert report.headline(roofline.load_results()).strip() in (ROOT / "docs" / "benchmarks.md").read_text()
    names = {png.name for png in report.write_plots(tmp_path, path.stem, result)}
    assert names and names == {png.name for png in path.parent.glob(f"{path.stem}-*.png")}, (
        "run python -m benchmarks.report"
    )


@pytest.mark.parametrize("absent", [*((name,) for name in OPTIONAL), OPTIONAL], ids="-".join)
def test_results_without_an_optional_part(tmp_path, absent):
    """Parts run in separate calls, so readers, and runs that continue a file, must accept files without some parts."""
    result = {name: part for name, part in json.loads(RESULTS[0].read_text()).items() if name not in absent}
    (tmp_path / "some-gpu.json").write_text(json.dumps(result | {"commit": gpu.commit()}))
    section = report.results_section(roofline.load_results(tmp_path))
    assert "**token_logps**, forward" in section
    assert ("passed" in section) == ("tests" not in absent)
    assert ("**An iteration**" in section) == ("iterations" not in absent)
    assert report.headline([result]) and roofline.measured_points([result])
    kept = gpu.Report(tmp_path / "some-gpu.json", torch.device("cpu"), ["advantages"]).data
    assert {r["part"] for r in kept["kernels"]} == {"kernels", "scaling"} and kept["seconds"] == {}
    assert kept["rollout"] == result.get("rollout", []) and kept["tests"] == result.get("tests", {})


def test_a_gemm_bound_op_is_held_against_gemms_that_run_as_long(monkeypatch):
    """A single large GEMM runs at the clock of a burst; 10 GEMMs of 2·512³ FLOPs take as long as the op would."""
    calls = []
    monkeypatch.setattr(timing.torch, "mm", lambda a, b, out: calls.append(out.shape))
    provider, flops = timing.gemms(timing.Clock("cpu"), 10.4 * 2 * 512**3)
    provider()()
    assert len(calls) == 10 and flops == 10 * 2 * 512**3
    monkeypatch.undo()
    case = next(iter(cases.linear_ppo_cases(shapes.CPU_SHAPES[0], torch.device("cpu"), torch.float32, ("half",))))
    case.functions = {"ours": case.functions["ours"]}
    rates = {"copy_bytes_per_s": 1e12, "gemm_flops_per_s": 1e12}
    (record,) = cases.run(case, timing.Clock("cpu"), rates, rounds=3)
    assert record["percent_of_limit"] == pytest.approx(100 * record["limit_ms"] / record["median_ms"])
    assert record["percent_of_limit"] < record["percent_of_sustained_limit"] <= 110  # this CPU is no 1 TFLOP/s device
    assert "% sustained" in result_tables.kernel_cell(record)


def test_outcomes_of_one_process_and_of_several_are_counted():
    serial = "a.py::test_x[1] PASSED [ 50%]\na.py::test_y FAILED [100%]\nFAILED a.py::test_y - boom\n"
    parallel = "[gw0] [ 50%] PASSED a.py::test_x[1] \n[gw11] [100%] FAILED a.py::test_y \nFAILED a.py::test_y\n"
    expected = {"passed": 1, "failed": 1}
    assert gpu_parts.count_outcomes(serial) == gpu_parts.count_outcomes(parallel) == expected


def test_a_pass_costs_what_its_parts_cost():
    """Two sequences of 3 and 5 tokens of the tiny model, by hand."""
    decoder, lengths = decoders.TINY, [3, 5]
    weights, head = 2 * 32 * (16 * (2 * 4 + 2 * 2) + 3 * 64), 32 * 300
    score, train = (build(decoder, lengths, 4) for build in (pass_costs.scoring_pass, pass_costs.training_pass))
    assert score.gemm_flops == 2 * (8 * weights + 4 * head) and train.gemm_flops == 3 * score.gemm_flops
    assert score.attention_flops == 4 * 2 * 4 * 16 * (6 + 15)
    # Norms: 2 of 4 rows of 32; RoPE: 8 heads of 16 twice; the gate: 3 rows of 64; logits in float32, written and read.
    assert score.bytes == 8 * 2 * 2 * (2 * 4 * 32 + 2 * 8 * 16 + 3 * 64) + 8 * 4 * 300
    assert (score.kernels, train.kernels) == (2 * 9, 2 * (9 + 17))


def test_sections_are_replaced(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("a\n<!-- x -->\nold\n<!-- /x -->\nb\n")
    assert report.replace_section(path, "x", "new \\1") and not report.replace_section(path, "y", "new")
    assert path.read_text() == "a\n<!-- x -->\nnew \\1\n<!-- /x -->\nb\n"


def test_the_readme_holds_todays_predictions():
    readme = (ROOT / "benchmarks" / "README.md").read_text()
    assert pass_costs.predictions() in readme, "run python -m benchmarks.report"
    assert roofline.markdown() in readme and rollout_tables.bounds() in readme, "run python -m benchmarks.report"
