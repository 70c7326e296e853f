"""The parts of `benchmarks/gpu.py`: what each measures. Every record is saved as soon as it is there."""

import gc
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from benchmarks import attention_cases, cases, decode_cases
from benchmarks.shapes import LLAMA3_8B, MODELS, QWEN3_06B, TINY

ROOT = Path(__file__).resolve().parents[1]
COMPILED = "torch.compile"  # the peers of the last part
# Time may run out, so first comes what only a GPU can show.
TESTS = (
    "tests/rollout/test_exact_cuda.py",
    "tests/rto/test_exact_cuda.py",
    "tests/rollout/test_cuda.py",
    "tests/models/test_graphs_cuda.py",
    "tests/models/test_decoder_kernels.py",
    "tests/kernels",
    "tests/training/test_gradients.py",
    "tests/training/test_waits.py",
    "tests/models",
    "tests/test_batch.py",
    "tests/test_ops.py",
    "tests/test_layer_ops.py",
    "tests/rto/test_rto_invariants.py",
    "tests/rollout",
)


def run_tests(report, deadline, small):
    """The counts of pytest's outcomes, which are kept even if time runs out during the tests."""
    tests = ("tests/models/test_models.py",) if small else TESTS
    log = report.path.with_suffix(".tests.log")
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", *tests]
    if importlib.util.find_spec("xdist") and (os.cpu_count() or 1) >= 8:
        command += ["-n", "12"]
    # The tests of machine code need no GPU and take minutes of compilation.
    command += ["--deselect", "tests/kernels/test_machine_code.py"]
    with open(log, "w") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        try:
            exit_code = process.wait(timeout=max(1, deadline - time.perf_counter()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            exit_code = None
    report.data["tests"] = {"command": " ".join(command[1:]), "exit_code": exit_code, **count_outcomes(log.read_text())}
    if exit_code is None:
        report.data["tests"]["cut"] = "out of time"
    report.data["tests"]["failures"] = re.findall(r"^(?:FAILED|ERROR) (\S+)", log.read_text(), re.MULTILINE)
    report.save()


def count_outcomes(log: str) -> dict[str, int]:
    """Counts pytest's outcomes in the output of `pytest -v`, of one process or of several."""
    outcome = "(PASSED|FAILED|ERROR|SKIPPED|XFAIL)"
    found = re.findall(rf"^\[gw\d+\] \[ *\d+%\] {outcome} |^\S+::.* {outcome}", log, re.MULTILINE)
    outcomes = [first or second for first, second in found]
    return {name.lower(): outcomes.count(name) for name in dict.fromkeys(outcomes)}


def run_cases(report, selected, clock, deadline, compiled=False, **options):
    """Measures cases, without their slow peers or (`compiled`) with these and ours alone."""
    for case in selected:
        if time.perf_counter() > deadline:
            report.data["notes"].append(f"out of time: {case.name}")
            continue
        wanted = ("ours", COMPILED) if compiled else [name for name in case.functions if name != COMPILED]
        case.functions = {name: f for name, f in case.functions.items() if name in wanted}
        if compiled and (COMPILED not in case.functions or isinstance(case.functions[COMPILED], str)):
            continue
        try:
            report.add_case(cases.run(case, clock, report.data["ceilings"], **options))
        # A case that cannot be set up must not cost the others their time on the GPU; the exit code reports it.
        except Exception as error:
            report.data["notes"].append(f"failed: {case.name}: {type(error).__name__}: {str(error).splitlines()[:1]}")
        free(clock)


def free(clock):
    gc.collect()
    if clock.is_cuda:
        torch.cuda.empty_cache()


def kernel_cases(device, small):
    """The most important cases first, because time may run out."""
    dtype = torch.float32 if small else torch.bfloat16
    builders = (
        partial(cases.linear_ppo_cases, masks=("full",)),
        cases.logits_cases,
        cases.linear_cases,
        partial(cases.linear_ppo_cases, masks=("half",)),
        cases.logits_ppo_cases,
    )
    for build in builders:
        for shape in (TINY,) if small else MODELS:
            yield from build(shape, device, dtype)
    yield from cases.vector_cases(1 << (10 if small else 20), device)


def layer_cases(device, small):
    """The kernels of a decoder layer, and those of a decode step."""
    yield from attention_cases.attention_cases(device, small)
    yield from decode_cases.decode_cases(device, small)


def scaling_cases(device, small):
    """Time and memory against T. The only peer is plain torch, which suffices to compare the slopes."""
    dtype = torch.float32 if small else torch.bfloat16
    for shape in (TINY,) if small else (QWEN3_06B, LLAMA3_8B):
        for tokens in (32, 48) if small else (1024, 2048, 4096, 16384):
            at = shape.at(tokens)
            for build in (partial(cases.linear_ppo_cases, masks=("full",)), cases.logits_cases):
                for case in build(at, device, dtype):
                    case.functions = {name: f for name, f in case.functions.items() if name in ("ours", "torch")}
                    yield case


def advantages_cases(device, small):
    if small:
        yield from cases.advantages_cases(256, 4, device)
        yield from cases.gae_cases(256, 4, device)
        return
    # The loops in Python run once, at a size that they finish; their time is linear in T.
    yield from cases.advantages_cases(1 << 14, 32, device)
    yield from cases.advantages_cases(1 << 20, 1024, device, slow_peers=False)
    yield from cases.gae_cases(1 << 20, 1024, device, slow_peers=False)
    for sequences in (8, 64, 1024):
        for length in (512, 4096, 32768):
            if sequences * length <= 1 << 25:
                for case in cases.advantages_cases(sequences * length, sequences, device, slow_peers=False):
                    del case.functions["loop over time (TRL, verl style)"]
                    yield case


def run_rollout(report, device, small, deadline, of_peers):
    from benchmarks import rollout

    # Peers take turns with ours on the short workload.
    items = [
        item
        for item in rollout.plan(small)
        if (item.provider != "ours" or item.workload.name == "short" if of_peers else item.provider == "ours")
    ]
    for record in rollout.run(device, report.data["ceilings"], deadline, items):
        report.add("rollout", record)


def run_passes(report, device, small, deadline, compiled=False):
    from benchmarks import passes

    for record in passes.run(
        device, report.data["ceilings"], deadline, small, passes.SLOW if compiled else passes.FAST
    ):
        report.add("passes", record)


def run_iterations(report, device, settings, deadline):
    from benchmarks import iteration

    for setting in settings:
        if time.perf_counter() > deadline:
            report.data["notes"].append(f"out of time: iteration of {setting.name}")
            continue
        try:
            record = iteration.measure(setting, device, report.data["ceilings"])
        # Whatever stops the trainer here, for example a package that is not installed, is a result and no reason to stop.
        except Exception as error:
            record = {"model": setting.name, "provider": "ours", "error": f"{type(error).__name__}: {error}"}
        report.add("iterations", record)


def run_trl(report, small, deadline):
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "trl.json"
        command = [sys.executable, "-m", "benchmarks.trl_iteration", str(out), *(["--small"] if small else [])]
        limit = max(1, deadline - time.perf_counter())
        try:
            process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit)
        except subprocess.TimeoutExpired:
            reason = f"out of time after {limit:.0f} s"
        else:
            reason = "".join(process.stderr.strip().splitlines()[-1:])
        found = json.loads(out.read_text()) if out.exists() else {"provider": "TRL PPO", "error": reason}
    report.add("iterations", found)


def run_before_after(report, before: Path | None, device, small, deadline):
    from benchmarks import before_after

    if before is None:
        report.data["notes"].append("the part exact needs another checkout: --before DIRECTORY")
        return
    for record in before_after.compare(before.resolve(), ROOT, device, report.data["ceilings"], small, deadline):
        report.add("comparisons", record)


def make_parts(report, device, clock, small: bool, model: Path | None, before: Path | None):
    """{name: function of the part's deadline}."""
    from benchmarks import iteration

    rounds = {"rounds": 3, "seconds": 0.1} if small else {"rounds": 12, "seconds": 1.0, "prepare_seconds": 12.0}
    settings = iteration.SMALL_SETTINGS if small else iteration.SETTINGS
    lora_settings = iteration.SMALL_LORA_SETTINGS if small else iteration.LORA_SETTINGS
    if model is not None:
        settings = (iteration.setting_of(model), *settings)

    def compiled(end: float) -> None:
        run_passes(report, device, small, end - 100, compiled=True)
        run_cases(report, kernel_cases(device, small), clock, end, compiled=True, **rounds)

    return {
        "tests": lambda end: run_tests(report, end, small),
        "passes": lambda end: run_passes(report, device, small, end),
        "iteration": lambda end: run_iterations(report, device, settings, end),
        "exact": lambda end: run_before_after(report, before, device, small, end),
        "layers": lambda end: run_cases(report, layer_cases(device, small), clock, end, **rounds),
        "lora": lambda end: run_iterations(report, device, lora_settings, end),
        "trl": lambda end: run_trl(report, small, end),
        "rollout": lambda end: run_rollout(report, device, small, end, of_peers=False),
        "rollout_peers": lambda end: run_rollout(report, device, small, end, of_peers=True),
        "kernels": lambda end: run_cases(report, kernel_cases(device, small), clock, end, **rounds),
        "scaling": lambda end: run_cases(report, scaling_cases(device, small), clock, end, **rounds),
        "advantages": lambda end: run_cases(report, advantages_cases(device, small), clock, end, **rounds),
        "compiled": compiled,
    }
