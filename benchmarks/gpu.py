"""Measures everything that needs a GPU, in parts of at most four minutes, each of which ends with its table:

    python benchmarks/gpu.py [--minutes 9] [--out benchmarks/results]
    python benchmarks/gpu.py --only passes iteration
    python benchmarks/gpu.py --only iteration --model DIRECTORY
    git worktree add /tmp/before COMMIT && python benchmarks/gpu.py --only exact --before /tmp/before

The parts run in the order of `--help`: first the GPU tests and what decides an iteration's time, last the slow peers, such
as torch.compile. A part that does not fit into the minutes that are left is named and not begun. `<out>/<gpu>.json` is
written and valid after every record; a later call at the same commit adds its parts to it. `python -m benchmarks.report`
makes tables and plots of it. Only torch, triton, transformers and pytest must be installed; missing peers are listed as
such. `--cpu-smoke` runs parts on tiny shapes on a CPU into a temporary folder. It proves that the script works; its times
mean nothing.
"""

import gc
import json
import re
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Replaces benchmarks/, the script's own folder, which would shadow other modules.
sys.path[0] = str(ROOT)

import torch  # noqa: E402

from benchmarks import gpu_parts, result_tables  # noqa: E402
from benchmarks.command_line import ArgumentParser  # noqa: E402
from benchmarks.timing import Clock, ceilings  # noqa: E402
from rto_fast.system.terminal import protect, say  # noqa: E402
from rto_fast.system.writing import write_file  # noqa: E402

# The most seconds of each part, in the order in which they run.
BUDGETS = {
    "tests": 240,
    "passes": 120,
    "iteration": 90,
    "exact": 180,
    "layers": 60,
    "lora": 120,
    "trl": 90,
    "rollout": 120,
    "rollout_peers": 240,
    "kernels": 150,
    "scaling": 30,
    "advantages": 20,
    "compiled": 240,
}
# What is not begun with less time than this: a model must be built, or kernels be compiled.
LEAST_SECONDS = 20
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


LISTS = ("kernels", "passes", "iterations", "rollout", "comparisons")  # of records, each with its part


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
            "passes": [],
            "iterations": [],
            "rollout": [],
            "comparisons": [],
            "notes": [],
            "seconds": {},
        }
        if path.exists() and (old := json.loads(path.read_text()))["commit"] == self.data["commit"]:
            kept = {"tests": old.get("tests", {})} if "tests" not in parts else {}
            kept["seconds"] = {name: spent for name, spent in old.get("seconds", {}).items() if name in BUDGETS}
            for name in LISTS:
                kept[name] = [record for record in old.get(name, []) if record.get("part") not in parts]
            self.data |= kept

    def save(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_file(self.path, json.dumps(self.data, indent=1))

    def add(self, name: str, record: dict) -> None:
        """Adds a record to one of `LISTS`."""
        self.data[name].append({"part": self.part, **record})
        self.save()

    def records(self, name: str) -> list[dict]:
        """The records of this part."""
        return [record for record in self.data[name] if record.get("part") == self.part]

    def add_case(self, records):
        for record in records:
            kept = {key: value for key, value in record.items() if key != "seconds"}
            self.data["kernels"].append({"part": self.part, **kept})
            told = f"{record['median_ms']:10.4f} ms" if "median_ms" in record else record.get("error", "skipped")[:60]
            share = f"{record['percent_of_limit']:5.0f} % of {record['limited_by']}" if "median_ms" in record else ""
            where = f"{record['group']} {record['phase']} {record['model']} T={record['tokens']} {record['mask']}"
            say(f"{where:75} {record['provider']:34} {told} {share}")
        self.save()


def failures(report: Report) -> list[str]:
    """What of ours failed; peers may fail."""
    data = report.data
    found = [note for note in data["notes"] if note.startswith("failed")]
    for name in LISTS:
        for record in data[name]:
            ours = str(record.get("provider", record.get("layers"))).startswith("ours")
            if ours and "error" in record and record["error"] != "out of time":
                found.append(f"{name}: {record['model']}: {record['error']}")
    # The results say if a test run was cut short (exit code None); one that crashed has failed.
    if data["tests"].get("failures") or data["tests"].get("exit_code") not in (0, None):
        found.append(f"tests: {', '.join(data['tests'].get('failures', [])) or 'see the log'}")
    return found


def main():
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder of the results (default: benchmarks/results)")
    parser.add_argument("--only", nargs="+", choices=BUDGETS, default=list(BUDGETS), help="parts to run, in this order")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all parts together (default: 9)")
    parser.add_argument("--model", type=Path, help="folder of a model whose iteration is measured first")
    parser.add_argument(
        "--before", type=Path, help="checkout of another commit, which the part exact compares with this"
    )
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
    parts = gpu_parts.make_parts(report, device, clock, small, options.model, options.before)
    # Garbage is collected between measurements; to search what was imported, too, would take longer than they do.
    gc.collect()
    gc.freeze()
    end = report.start + 60 * options.minutes
    for part in options.only:
        report.part, start = part, time.perf_counter()
        if end - start < LEAST_SECONDS:
            report.data["notes"].append(f"out of time: the part {part}")
            say(f"\n{part}: out of time; --only {part} runs it alone")
            continue
        say(f"\n{part}")
        parts[part](min(end, start + BUDGETS[part]))
        gpu_parts.free(clock)
        report.data["seconds"][part] = time.perf_counter() - start
        report.save()
        say(result_tables.part_table(report.data, part))
        say(f"{part}: {report.data['seconds'][part]:.0f} s")
    report.data["seconds"]["all"] = time.perf_counter() - report.start
    report.data["ceilings_after"] = ceilings(clock)
    report.save()
    say(f"wrote {report.path}")
    failed = failures(report)
    say("\n".join(failed))
    return int(bool(failed))


if __name__ == "__main__":
    protect()
    sys.exit(main())
