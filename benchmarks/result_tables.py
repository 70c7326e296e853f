"""Markdown tables of the results of `benchmarks/gpu.py`, for its parts and for the page that collects them."""

from benchmarks import rollout_tables
from benchmarks.rollout_tables import markdown_table, quantity


def kernel_cell(record):
    if "median_ms" not in record:
        return "—"
    share = [] if record["percent_of_limit"] is None else [f"{record['percent_of_limit']:.0f} %"]
    if "percent_of_sustained_limit" in record:
        share.append(f"{record['percent_of_sustained_limit']:.0f} % sustained")
    memory = [] if record["peak_bytes"] is None else [f"{record['peak_bytes'] / 2**20:,.0f} MB"]
    return f"{record['median_ms']:.3g} ms ({', '.join(share + memory)})"


def kernel_table(records):
    """A table with a row a provider and a column a shape: median (% of limit, extra memory)."""
    shapes = list(dict.fromkeys((r["model"], r["tokens"]) for r in records))
    cells = {(r["provider"], r["model"], r["tokens"]): kernel_cell(r) for r in records}
    lines = [
        "| | " + " | ".join(f"{model}, T={tokens}" for model, tokens in shapes) + " |",
        "|---" * (len(shapes) + 1) + "|",
    ]
    for provider in dict.fromkeys(r["provider"] for r in records):
        row = [cells.get((provider, *shape), "") for shape in shapes]
        if set(row) - {"", "—"}:
            lines.append(f"| {provider} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def kernel_groups(result, part=None):
    """Records by (group, phase, mask), in the order of measurement, of one part or of all."""
    groups = {}
    for record in result["kernels"]:
        if part not in (None, record["part"]):
            continue
        groups.setdefault((record["group"], record["phase"], record["mask"]), []).append(record)
    return groups


def kernels(result, part=None):
    """A table for each op and pass."""
    parts = []
    for (group, phase, mask), records in kernel_groups(result, part).items():
        title = f"**{group}**, {phase}" + (", half of the tokens masked out" if mask == "half" else "")
        parts.append(f"{title}: median (% of limit, extra memory)\n\n{kernel_table(records)}")
    return parts


def passes(records):
    """Scoring and training passes, a row for each model, phase and kind of layers."""
    rows = [
        [
            r["model"],
            r["phase"],
            r["layers"],
            f"{1e3 * r['seconds']:.1f}",
            f"{1e3 * r['predicted_seconds']:.1f}",
            f"{r['flops_per_second'] / 1e12:.3g}",
            f"{1e3 * r['host_seconds']:.1f}",
            quantity(r["kernels"], "{:,}"),
            quantity(r["peak_bytes"] and r["peak_bytes"] / 2**30, "{:.1f}"),
        ]
        for r in records
        if "seconds" in r
    ]
    head = ["model", "pass", "layers", "ms", "predicted for ours", "TFLOP/s", "host, ms", "kernels", "GiB"]
    return [f"**Passes** of 16,384 packed tokens\n\n{markdown_table(head, rows)}"] if rows else []


def iterations(records):
    """Whole iterations, ours and TRL's."""

    def of_phases(values, form):
        return " / ".join(form.format(values[p]) for p in ("rollout", "score", "update")) if values else "—"

    rows = [
        [
            r["model"],
            f"{r['responses']} × ({r['prompt_tokens']} + {r['response_tokens']})",
            r["provider"],
            f"{r['seconds']:.3g}",
            of_phases(r.get("phases"), "{:.3g}"),
            of_phases({p: 100 * share for p, share in r.get("mfu", {}).items()}, "{:.0f} %"),
            of_phases(r.get("launches"), "{:,}"),
            quantity(r["peak_bytes"] and r["peak_bytes"] / 2**30, "{:.1f}"),
        ]
        for r in records
        if "seconds" in r
    ]
    head = ["model", "tokens", "", "s an iteration", "rollout / score / update, s", "MFU", "launches", "GiB"]
    return [f"**An iteration** of RTO\n\n{markdown_table(head, rows)}"] if rows else []


def comparisons(records):
    """This checkout beside another, in turns."""
    rows = [
        [
            r["model"],
            {"step": "a decode step", "uniform": "a rollout", "iteration": "an iteration"}[r["what"]],
            f"{r['sequences']:,}",
            f"{1e3 * r['before']:.4g}",
            f"{1e3 * r['after']:.4g}",
            f"{100 * (r['after'] / r['before'] - 1):+.1f} %",
        ]
        for r in records
        if "before" in r and "after" in r
    ]
    head = ["model", "", "sequences", "before, ms", "after, ms", ""]
    return [f"**Before and after**, in turns\n\n{markdown_table(head, rows)}"] if rows else []


def missing(records, what):
    """What was not measured, and why."""
    lines = dict.fromkeys(
        f"- {r.get('model', '')}, {r.get('provider', r.get('layers'))}: {r['error']}" for r in records if "error" in r
    )
    return [f"{what} not measured:\n\n" + "\n".join(lines)] if lines else []


def part_table(result, part):
    """What a part of `benchmarks/gpu.py` has measured."""

    def of(name):
        return [record for record in result[name] if record.get("part") == part]

    tables = [
        *([f"tests: {result['tests']}"] if part == "tests" else []),
        *passes(of("passes")),
        *missing(of("passes"), "Passes"),
        *iterations(of("iterations")),
        *missing(of("iterations"), "Iterations"),
        *comparisons(of("comparisons")),
        *missing(of("comparisons"), "Comparisons"),
        *rollout_tables.results(of("rollout")),
        *kernels(result, part),
    ]
    return "\n\n".join(tables)
