"""Runs everything that needs a GPU, in one command of less than ten minutes or in two, whose results are merged:

    python benchmarks/gpu.py [--out benchmarks/results]
    python benchmarks/gpu.py --only tests kernels scaling advantages
    python benchmarks/gpu.py --only rollout end_to_end

The parts are GPU tests, kernel benchmarks beside their peers, scaling with T, the N x T grid of the advantages,
rollouts, and end-to-end throughput. The parts of a call share nine minutes. In the second call `rollout` has six of
them, in which it also reaches its slow peers. `<out>/<gpu>.json` is written and valid after every record. `python -m
benchmarks.report` makes tables and plots of it. Only torch, triton, transformers and pytest must be installed; missing
peers are listed as such. `--cpu-smoke` runs all parts on tiny shapes on a CPU into a temporary folder. It proves that
the script works; its times mean nothing.
"""

import gc
import json
import re
import subprocess
import sys
import tempfile
import time
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Replaces benchmarks/, the script's own folder, which would shadow other modules.
sys.path[0] = str(ROOT)

import torch  # noqa: E402

from benchmarks import cases, decode_cases  # noqa: E402
from benchmarks.command_line import ArgumentParser  # noqa: E402
from benchmarks.shapes import LLAMA3_8B, MODELS, QWEN3_06B, TINY  # noqa: E402
from benchmarks.timing import Clock, ceilings  # noqa: E402
from rto_fast.system.terminal import protect, say  # noqa: E402
from rto_fast.system.writing import write_file  # noqa: E402

# Seconds of each part, together under nine minutes, so that a run with a slow start still ends within ten. A call of
# fewer parts shares the same seconds among these.
BUDGETS = {"tests": 120, "kernels": 195, "scaling": 30, "advantages": 20, "rollout": 120, "end_to_end": 50}
# Time may run out, so first comes what only a GPU can show.
TESTS = (
    "tests/rollout/test_cuda.py",
    "tests/kernels",
    "tests/test_ops.py",
    "tests/models/test_models.py",
    "tests/rto/test_rto_invariants.py",
    "tests/rollout",
)
PACKAGES = ("torch", "triton", "transformers", "trl", "liger-kernel", "cut-cross-entropy")


def versions():
    found = {"python": sys.version.split()[0], "cuda": torch.version.cuda}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def commit():
    try:
        process = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    except OSError:  # git is not installed
        return "unknown"
    return process.stdout.strip() or "unknown"


class Report:
    """The results so far, written to disk after every change. Parts that are not run again are kept from an earlier run."""

    def __init__(self, path, device, parts):
        self.path, self.part, self.start = path, None, time.perf_counter()
        is_cuda = device.type == "cuda"
        self.data = {
            "gpu": torch.cuda.get_device_name() if is_cuda else "CPU smoke run: times mean nothing",
            "commit": commit(),
            "versions": versions(),
            "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
            "ceilings": {},
            "tests": {},
            "kernels": [],
            "rollout": [],
            "end_to_end": {},
            "notes": [],
            "seconds": {},
        }
        if path.exists() and (old := json.loads(path.read_text()))["commit"] == self.data["commit"]:
            kept = {name: old[name] for name in ("tests", "rollout", "end_to_end") if name in old and name not in parts}
            kept["seconds"] = {name: spent for name, spent in old.get("seconds", {}).items() if name in BUDGETS}
            self.data |= kept | {"kernels": [r for r in old["kernels"] if r["part"] not in parts]}

    def save(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_file(self.path, json.dumps(self.data, indent=1))

    def add(self, records):
        for record in records:
            kept = {key: value for key, value in record.items() if key != "seconds"}
            self.data["kernels"].append({"part": self.part, **kept})
            told = f"{record['median_ms']:10.4f} ms" if "median_ms" in record else record.get("error", "skipped")[:60]
            share = f"{record['percent_of_limit']:5.0f} % of {record['limited_by']}" if "median_ms" in record else ""
            where = f"{record['group']} {record['phase']} {record['model']} T={record['tokens']} {record['mask']}"
            say(f"{where:75} {record['provider']:34} {told} {share}")
        self.save()


def run_tests(report, deadline, small):
    """The counts of pytest's outcomes, which are kept even if time runs out during the tests."""
    tests = ("tests/models/test_models.py",) if small else TESTS
    log = report.path.with_suffix(".tests.log")
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", *tests]
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
    outcomes = re.findall(r"^\S+::.* (PASSED|FAILED|ERROR|SKIPPED|XFAIL)", log.read_text(), re.MULTILINE)
    counts = {name.lower(): outcomes.count(name) for name in dict.fromkeys(outcomes)}
    report.data["tests"] = {"command": " ".join(command[1:]), "exit_code": exit_code, **counts}
    if exit_code is None:
        report.data["tests"]["cut"] = "out of time"
    report.data["tests"]["failures"] = re.findall(r"^(?:FAILED|ERROR) (\S+)", log.read_text(), re.MULTILINE)
    say(f"tests: {counts}, log in {log}")
    report.save()


def run_cases(report, selected, clock, deadline, **options):
    for case in selected:
        if time.perf_counter() > deadline:
            report.data["notes"].append(f"out of time: {case.name}")
            continue
        try:
            report.add(cases.run(case, clock, report.data["ceilings"], **options))
        # A case that cannot be set up must not cost the others their time on the GPU; the exit code reports it.
        except Exception as error:
            report.data["notes"].append(f"failed: {case.name}: {type(error).__name__}: {str(error).splitlines()[:1]}")
        if clock.is_cuda:
            gc.collect()
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
        if build is cases.logits_cases:
            yield from decode_cases.decode_cases(device, small)
    yield from cases.vector_cases(1 << (10 if small else 20), device)


def scaling_cases(device, small):
    """Time and memory against T. The only peer is plain torch, which suffices to compare the slopes."""
    dtype = torch.float32 if small else torch.bfloat16
    for shape in (TINY,) if small else (QWEN3_06B, LLAMA3_8B):
        for tokens in (32, 48) if small else (1024, 2048, 4096, 16384):
            at = shape.at(tokens)
            for build in (cases.linear_ppo_cases, cases.logits_cases):
                for case in build(
                    at, device, dtype, **({"masks": ("full",)} if build is cases.linear_ppo_cases else {})
                ):
                    kept = {name: f for name, f in case.functions.items() if name in ("ours", "torch")}
                    case.functions = kept
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


def run_rollout(report, device, small, deadline):
    try:
        from benchmarks import rollout
    except ImportError as error:  # an unsupported version of transformers must not stop the other parts
        report.data["notes"].append(f"failed: rollout: {error}")
        return
    for record in rollout.run(device, report.data["ceilings"], deadline, small):
        report.data["rollout"].append(record)
        told = record.get("skipped") or record.get("error")
        if "seconds" in record:
            told = f"{record['tokens_per_second']:10,.0f} tokens/s, {record['percent_of_bound']:3.0f} % of the bound"
        where = f"{record['model']} {record['workload']} {record['sequences']}"
        say(f"{where:36} {record['provider']:26} {told} ({record.get('wall_seconds', 0):.0f} s)")
        report.save()


def run_end_to_end(report, device, small):
    try:
        from benchmarks import end_to_end

        report.data["end_to_end"] = end_to_end.measure(device, small=small, iterations=2 if small else 3)
    # Whatever stops the trainer here, for example a package that is not installed, is a result and no reason to stop.
    except Exception as error:
        report.data["end_to_end"] = {"error": f"{type(error).__name__}: {error}"}
    say(f"end to end: {report.data['end_to_end']}")
    report.save()


def main():
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder of the results (default: benchmarks/results)")
    parser.add_argument("--only", nargs="+", choices=BUDGETS, default=list(BUDGETS), help="parts to run")
    parser.add_argument("--cpu-smoke", action="store_true", help="tiny shapes on the CPU, to try the script")
    options = parser.parse_args()
    small = options.cpu_smoke
    if not small and not torch.cuda.is_available():
        say("benchmarks/gpu.py: no CUDA device here; --cpu-smoke tries the script without one", err=True)
        return 2
    device = torch.device("cpu" if small else "cuda")
    folder = options.out or (Path(tempfile.mkdtemp()) if small else ROOT / "benchmarks" / "results")
    name = "cpu-smoke" if small else re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    report = Report(folder / f"{name}.json", device, options.only)
    clock = Clock(device)
    report.data["ceilings"] = ceilings(clock)
    report.save()
    say(f"{report.data['gpu']}: {report.data['ceilings']}")
    rounds = {"rounds": 3, "seconds": 0.1} if small else {"rounds": 20, "seconds": 1.5, "prepare_seconds": 12.0}
    parts = {
        "tests": lambda end: run_tests(report, end, small),
        "kernels": lambda end: run_cases(report, kernel_cases(device, small), clock, end, **rounds),
        "scaling": lambda end: run_cases(report, scaling_cases(device, small), clock, end, **rounds),
        "advantages": lambda end: run_cases(report, advantages_cases(device, small), clock, end, **rounds),
        "rollout": lambda end: run_rollout(report, device, small, end),
        "end_to_end": lambda end: run_end_to_end(report, device, small),
    }
    share = sum(BUDGETS.values()) / sum(BUDGETS[part] for part in options.only)
    for part in options.only:
        report.part, start = part, time.perf_counter()
        parts[part](start + share * BUDGETS[part])
        report.data["seconds"][part] = time.perf_counter() - start
    report.data["seconds"]["all"] = time.perf_counter() - report.start
    report.data["ceilings_after"] = ceilings(clock)
    report.save()
    say(f"wrote {report.path}")
    failed = (
        [note for note in report.data["notes"] if note.startswith("failed")]
        + [
            f"{record['group']} {record['model']}: {record['error']}"
            for record in report.data["kernels"]
            if record["provider"].startswith("ours") and "error" in record
        ]
        + [
            f"rollout of {record['model']}, {record['workload']}: {record['error']}"
            for record in report.data["rollout"]
            if record["provider"] == "ours" and "error" in record
        ]
    )
    say("\n".join(failed))
    # The results say if a test run was cut short (exit code None); one that crashed has failed.
    tests_failed = report.data["tests"].get("failures") or report.data["tests"].get("exit_code") not in (0, None)
    return int(bool(failed or tests_failed or "error" in report.data["end_to_end"]))


if __name__ == "__main__":
    protect()
    sys.exit(main())
