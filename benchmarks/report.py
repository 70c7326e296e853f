"""Turns `benchmarks/results/*.json` into tables and plots, and keeps `benchmarks/README.md` up to date.

    python -m benchmarks.report [--static] [--cpu]

Writes the sections between markers of benchmarks/README.md: predictions of kernels and rollouts; results, if there are
any; with --static the machine-code table of `python -m benchmarks.static`; with --cpu the times of the CPU path and of
rollouts on this machine. Also writes a short table to docs/benchmarks.md at its marker `kernel-results`, and
plots beside the results.
"""

import platform
import re
import subprocess
import sys
from itertools import chain

import torch

from benchmarks import decode_cases, pass_costs, result_tables, rollout_tables
from benchmarks.cases import cpu_cases, run
from benchmarks.command_line import ArgumentParser
from benchmarks.roofline import DECODE_OPS, FOLDER, VECTOR_OPS, load_results, markdown, plot, save
from benchmarks.shapes import MODELS
from benchmarks.timing import Clock, ceilings
from rto_fast.system.terminal import protect, say
from rto_fast.system.writing import write_file

NO_RESULTS = "No GPU results yet: `python benchmarks/gpu.py` on a machine with a GPU writes them."
HEADLINE = (
    ("token_logps", "forward"),
    ("token_logps", "backward"),
    ("linear_token_logps", "forward"),
    ("linear_ppo_loss", "forward+backward"),
)


def replace_section(path, name, text):
    """Puts `text` between <!-- name --> and <!-- /name --> of a file; False if the file has no such markers."""
    content = path.read_text(encoding="utf-8")
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    if not pattern.search(content):
        return False
    write_file(path, pattern.sub(lambda match: f"{match[1]}{text.strip()}\n{match[2]}", content))
    return True


def results_section(results):
    """Markdown of all result files."""
    parts = []
    for result in results:
        ceilings, tests = result["ceilings"], result.get("tests", {})
        versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items() if number)
        parts.append(
            f"### {result['gpu']}\n\nCommit {result['commit']}, {result['date']} UTC; {versions}. Measured in the same run: "
            f"copy {ceilings['copy_bytes_per_s'] / 1e12:.2f} TB/s, GEMM {ceilings['gemm_flops_per_s'] / 1e12:.0f} TFLOP/s "
            "in a burst."
        )
        if tests:
            parts[-1] += (
                f" Tests: {tests.get('passed', 0):,} passed, {tests.get('failed', 0) + tests.get('error', 0)} failed, "
                f"{tests.get('skipped', 0)} skipped."
            )
        parts += result_tables.kernels(result)
        missing = {}
        for r in result["kernels"]:
            if "median_ms" not in r:
                models = missing.setdefault((r["group"], r["provider"], r.get("skipped") or r["error"]), {})
                models[r["model"]] = None
        if missing:
            lines = [f"- {op}, {name} ({', '.join(found)}): {why}" for (op, name, why), found in missing.items()]
            parts.append("Not measured:\n\n" + "\n".join(lines))
        if notes := result.get("notes"):
            parts.append("\n".join(f"- {note}" for note in notes))
        parts += rollout_tables.results(result.get("rollout", []))
        for name, table in (("passes", result_tables.passes), ("iterations", result_tables.iterations)):
            parts += table(result.get(name, [])) + result_tables.missing(result.get(name, []), name.capitalize())
    return "\n\n".join(parts) or NO_RESULTS


def _machine():
    return f"{platform.processor() or platform.machine()}, one thread, torch {torch.__version__}, float32"


def cpu_section():
    """Measures the CPU cases now, in one thread."""
    torch.set_num_threads(1)
    clock = Clock("cpu")
    rates = ceilings(clock)
    groups = {}
    for case in chain(cpu_cases(), decode_cases.cpu_cases()):
        records = run(case, clock, rates, rounds=9, seconds=2.5)
        for record in records:  # limits are those of 16-bit tensors on GPUs
            record["percent_of_limit"] = None
            record.pop("percent_of_sustained_limit", None)
        groups.setdefault((case.group, case.phase, case.mask), []).extend(records)
    parts = [
        f"{_machine()}; float32 GEMM "
        f"{rates['gemm_flops_per_s'] / 1e9:.0f} GFLOP/s, copy {rates['copy_bytes_per_s'] / 1e9:.0f} GB/s."
    ]
    for (group, phase, mask), records in groups.items():
        parts.append(
            f"**{group}**, {phase}"
            + (", half masked out" * (mask == "half"))
            + f"\n\n{result_tables.kernel_table(records)}"
        )
    return "\n\n".join(parts)


def cpu_rollout_section():
    """Measures the CPU's rollouts now, in one thread."""
    from benchmarks import rollout_cpu  # here, because it imports models of transformers, which predictions do not need

    torch.set_num_threads(1)
    records = [r for case in rollout_cpu.WORKLOADS for r in rollout_cpu.records(*case, rounds=5, seconds=20.0)]
    return f"{_machine()}.\n\n{rollout_tables.cpu(records)}"


def headline(results):
    """The short table of docs/benchmarks.md: our function and the best peer, for the shapes of the three models."""
    lines = []
    for result in results:
        lines += [f"{result['gpu']}, commit {result['commit']}, T = 8192: ours ms (% of limit) / fastest peer ms", ""]
        lines += ["| | " + " | ".join(s.name for s in MODELS) + " |", "|---" * (len(MODELS) + 1) + "|"]
        for op, phase in HEADLINE:
            row = []
            for shape in MODELS:
                records = [
                    r
                    for r in result_tables.kernel_groups(result).get((op, phase, "full"), ())
                    if (r["model"], r["tokens"]) == (shape.name, shape.tokens) and "median_ms" in r
                ]
                ours = [r for r in records if r["provider"] == "ours"]
                peers = [r["median_ms"] for r in records if not r["provider"].startswith("ours")]
                best = f" / {min(peers):.3g}" if peers else ""
                row.append(f"{ours[0]['median_ms']:.3g} ({ours[0]['percent_of_limit']:.0f} %){best}" if ours else "—")
            if set(row) != {"—"}:
                lines.append(f"| {op} {phase} | " + " | ".join(row) + " |")
        lines.append("")
    return "\n".join(lines)


def _lines(axis, records, x, y):
    for provider in dict.fromkeys(r["provider"] for r in records):
        points = sorted((r[x], y(r)) for r in records if r["provider"] == provider and y(r) is not None)
        if points:
            axis.plot(*zip(*points), marker="o", ms=4, label=provider)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xlabel({"tokens": "T", "vocab_size": "V"}[x])
    axis.grid(True, which="both", lw=0.2)


def plot_group(path, title, records):
    """Plots time, extra memory and % of limit against T (of the model with most values) and V (for the T with most)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = [r for r in records if "median_ms" in r]

    def most(key, other):
        """The records with that value of `key` which has most values of `other`."""
        values = {r[key]: {s[other] for s in records if s[key] == r[key]} for r in records}
        chosen = max(values, key=lambda value: len(values[value]))
        return chosen, [r for r in records if r[key] == chosen]

    def gigabytes(record):
        return record["peak_bytes"] / 2**30 if record["peak_bytes"] else None

    figure, axes = plt.subplots(1, 5, figsize=(21, 4), constrained_layout=True)
    model, over_tokens = most("model", "tokens")
    tokens, over_vocab = most("tokens", "vocab_size")
    for first, x, found, where in ((0, "tokens", over_tokens, model), (2, "vocab_size", over_vocab, f"T={tokens}")):
        for axis, name, y in (
            (axes[first], "ms", lambda r: r["median_ms"]),
            (axes[first + 1], "extra GB", gigabytes),
        ):
            _lines(axis, found, x, y)
            axis.set_title(f"{name}, {where}", fontsize=9)
    shares = {r["provider"]: r["percent_of_limit"] for r in over_vocab if r["model"] == over_vocab[0]["model"]}
    axes[4].barh(list(shares)[::-1], list(shares.values())[::-1])
    axes[4].set_title(f"% of limit, {over_vocab[0]['model']}, T={tokens}", fontsize=9)
    axes[0].legend(fontsize=7)
    figure.suptitle(title)
    save(figure, path, dpi=90)
    plt.close(figure)


def write_plots(folder, stem, result):
    """Draws a PNG for each group; returns their paths."""
    paths = []
    for (group, phase, mask), records in result_tables.kernel_groups(result).items():
        if group in VECTOR_OPS + DECODE_OPS or mask != "full" or not any("median_ms" in r for r in records):
            continue
        paths.append(folder / f"{stem}-{group}-{phase.replace('+', '-')}.png")
        plot_group(paths[-1], f"{group}, {phase}: {result['gpu']}, commit {result['commit']}", records)
    return paths


def main():
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--static", action="store_true", help="also refresh the machine-code table (takes minutes)")
    parser.add_argument("--cpu", action="store_true", help="also measure the CPU path now, and write its tables")
    options = parser.parse_args()
    readme, results = FOLDER / "README.md", load_results()
    replace_section(readme, "predictions", markdown())
    replace_section(readme, "rollout-bounds", rollout_tables.bounds())
    replace_section(readme, "pass-predictions", pass_costs.predictions())
    plot(FOLDER / "roofline.png", results)
    replace_section(readme, "results", results_section(results))
    if options.cpu:
        replace_section(readme, "cpu", cpu_section())
        replace_section(readme, "rollout-cpu", cpu_rollout_section())
    if options.static:
        command = [sys.executable, "-m", "benchmarks.static"]
        process = subprocess.run(command, cwd=FOLDER.parent, capture_output=True, text=True)
        if process.returncode:
            say(f"python -m benchmarks.static failed:\n{process.stderr}", err=True)
            sys.exit(1)
        replace_section(readme, "static", f"```\n{process.stdout.strip()}\n```")
    for path, result in zip(sorted((FOLDER / "results").glob("*.json")), results):
        for png in write_plots(path.parent, path.stem, result):
            say(f"wrote {png}")
    if results:
        replace_section(FOLDER.parent / "docs" / "benchmarks.md", "kernel-results", headline(results))
        say(headline(results))
    else:
        say(NO_RESULTS)


if __name__ == "__main__":
    protect()
    main()
