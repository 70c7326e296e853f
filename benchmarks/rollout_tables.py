"""Markdown tables of the rollout benchmark: bounds for GPUs, and results of a GPU and of a CPU."""

from benchmarks.costs import DEVICES, rollout_seconds, step_seconds
from benchmarks.decoders import DECODERS, workloads

STEP = "step"  # as in benchmarks/rollout.py, which would import transformers


def markdown_table(head, rows):
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def quantity(value, form="{:.3g}"):
    return "—" if value is None else form.format(value)


def bounds():
    """Bound → prediction of our engine on each GPU: ms for a step of 256 sequences, tokens/s for whole workloads."""
    rows = []
    for decoder in DECODERS:
        cells = []
        for device in DEVICES.values():
            found = [1e3 * step_seconds(decoder, device, ours=ours) for ours in (False, True)]
            cells.append(" → ".join(f"{ms:.3g}" for ms in found))
        rows.append([decoder.name, "a step, ms", *cells])
        for workload in list(workloads().values())[:2]:
            cells = []
            for device in DEVICES.values():
                found = [rollout_seconds(decoder, workload, device, ours=ours) for ours in (False, True)]
                cells.append(" → ".join(f"{workload.response_tokens / seconds:,.0f}" for seconds in found))
            rows.append([decoder.name, f"{workload.name}, tokens/s", *cells])
    return markdown_table(["model", "256 sequences", *DEVICES], rows)


def results(records):
    """Tables of the records of a GPU; an empty list if there are none."""
    measured = [r for r in records if "seconds" in r]
    parts, steps = [], [r for r in measured if r["workload"] == STEP]
    rows = [
        [
            r["model"],
            r["workload"],
            r["provider"],
            f"{r['tokens_per_second']:,.0f} ({r['percent_of_bound']:.0f} %)",
            f"{r['seconds']:.3g}",
            quantity(r["prefill_seconds"]),
            quantity(r["capture_seconds"]),
            quantity(r["occupancy"] and 100 * r["occupancy"], "{:.0f} %"),
            quantity(r["peak_bytes"] and r["peak_bytes"] / 2**30, "{:.1f}"),
        ]
        for r in measured
        if r["workload"] != STEP
    ]
    if rows:
        head = ["model", "lengths", "", "tokens/s (% of bound)", "s", "of it prefill", "capture, s", "occupancy", "GiB"]
        parts.append(f"**Rollout** of 256 sequences\n\n{markdown_table(head, rows)}")
    if steps:
        buckets = sorted({r["sequences"] for r in steps})
        cells = {
            (r["model"], r["sequences"]): f"{1e3 * r['seconds']:.3g} ({r['percent_of_bound']:.0f} %)" for r in steps
        }
        most = {r["model"]: f"{r['tokens_per_second']:,.0f}" for r in steps if r["sequences"] == buckets[-1]}
        rows = [
            [model, *(cells.get((model, bucket), "—") for bucket in buckets), most.get(model, "—")]
            for model in dict.fromkeys(r["model"] for r in steps)
        ]
        head = ["sequences", *map(str, buckets), f"tokens/s of {buckets[-1]}"]
        parts.append(
            f"**A decode step**, contexts of 512 to 544 tokens: ms (% of bound)\n\n{markdown_table(head, rows)}"
        )
    missing = [r for r in records if "seconds" not in r]
    if missing:
        lines = dict.fromkeys(
            f"- {r['model']}, {r['workload']}, {r['provider']}: {r.get('skipped') or r['error']}" for r in missing
        )
        parts.append("Rollouts not measured:\n\n" + "\n".join(lines))
    return parts


def cpu(records):
    """A table with a row a provider and a column a model: tokens/s (seconds)."""
    columns = list(dict.fromkeys((r["model"], r["workload"]) for r in records))
    cells = {
        (r["provider"], r["model"], r["workload"]): f"{r['tokens_per_second']:,.0f} tokens/s ({r['seconds']:.3g} s)"
        for r in records
        if "seconds" in r
    }
    rows = [
        [provider, *(cells.get((provider, *column), "—") for column in columns)]
        for provider in dict.fromkeys(r["provider"] for r in records)
    ]
    return markdown_table(["", *(f"{model}, {workload}" for model, workload in columns)], rows)
