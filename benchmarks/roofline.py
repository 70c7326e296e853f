"""Predicted times of every op on four GPUs, and measured ones over them where there are results.

    python -m benchmarks.roofline [--plot benchmarks/roofline.png]

Predictions are arithmetic (see `benchmarks/costs.py`); measured points come from `benchmarks/results/*.json`.
"""

import io
import json
from pathlib import Path

from benchmarks.command_line import ArgumentParser
from benchmarks.costs import DECODE_BATCH, DECODE_CONTEXT, DEVICES, LAYER_OPS, SAMPLING_OPS, table
from benchmarks.shapes import MODELS
from rto_fast.system.terminal import protect, say
from rto_fast.system.writing import write_file

FOLDER = Path(__file__).parent
VECTOR_OPS = ("rto_advantages", "gae", "ppo_policy_loss", "ppo_value_loss")

DECODE_OPS = ("paged_attention", *LAYER_OPS, *SAMPLING_OPS)


def load_results(folder=FOLDER / "results"):
    """The result files of `benchmarks/gpu.py`, oldest name first; [] without any."""
    return [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]


def row_label(op, phase, shape):
    if op in DECODE_OPS:
        context = f" × {DECODE_CONTEXT} tokens" if op == "paged_attention" else ""
        return op, f"{shape.name}, {DECODE_BATCH} sequences{context}"
    return f"{op} {phase}", "1M tokens" if op in VECTOR_OPS else shape.name


def markdown():
    """The table of limits and predictions, limit → prediction in ms."""
    tables = {name: table(device) for name, device in DEVICES.items()}
    lines = [
        "| op, T = 8192 | shape | " + " | ".join(f"{name}" for name in DEVICES) + " |",
        "|---|---|" + "---|" * len(DEVICES),
    ]
    for rows in zip(*tables.values()):
        op, shape = row_label(*rows[0][:3])
        lines.append(f"| {op} | {shape} | " + " | ".join(f"{row[3]:.3g} → {row[4]:.3g}" for row in rows) + " |")
    return "\n".join(lines)


def measured_points(results):
    """{(op, phase, model): [(GPU, ms)]} of our provider, all tokens kept, T = 8192 (vector ops: 2^20)."""
    points = {}
    for result in results:
        for record in result["kernels"]:
            tokens = 1 << 20 if record["group"] in VECTOR_OPS else MODELS[0].tokens
            if record["group"] in DECODE_OPS:
                tokens = record["tokens"]  # of one size only, but for attention
            if record["group"] == "paged_attention":
                tokens = DECODE_BATCH * DECODE_CONTEXT
            if record["provider"] == "ours" and record.get("mask", "full") == "full" and record["tokens"] == tokens:
                if "median_ms" in record:
                    key = record["group"], record["phase"], record["model"]
                    points.setdefault(key, []).append((result["gpu"], record["median_ms"]))
    return points


def save(figure, path, dpi):
    """Writes a matplotlib figure as PNG."""
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=dpi)
    write_file(path, png.getvalue())


def plot(path, results):
    """A panel an op: limit (bar), prediction (circle) and measurement (star) in ms, on each GPU and for each model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    points = measured_points(results)
    panels = [f"{op} {phase}" for op, phase, shape, *_ in table(DEVICES["H200"]) if shape is MODELS[0]]
    figure, axes = plt.subplots(1, len(panels), figsize=(3.4 * len(panels), 4.2), constrained_layout=True)
    colours = dict(zip((shape.name for shape in MODELS), ("tab:blue", "tab:orange", "tab:green")))
    for column, (name, device) in enumerate(DEVICES.items()):
        for op, phase, shape, least, predicted in table(device):
            if op in VECTOR_OPS + DECODE_OPS:
                continue
            axis, x, colour = (
                axes[panels.index(f"{op} {phase}")],
                column + 0.25 * MODELS.index(shape),
                colours[shape.name],
            )
            axis.plot([x - 0.1, x + 0.1], [least, least], color=colour, lw=2)
            axis.plot(x, predicted, "o", mfc="none", color=colour)
            for gpu, ms in points.get((op, phase, shape.name), ()):
                if name in gpu:
                    axis.plot(x, ms, "*", color=colour, ms=10)
    for axis, panel in zip(axes, panels):
        axis.set_title(panel, fontsize=9)
        axis.set_yscale("log")
        for which in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            which("{x:g}")
        axis.set_xticks([column + 0.25 for column in range(len(DEVICES))], list(DEVICES))
        axis.grid(True, axis="y", which="both", lw=0.2)
    axes[0].set_ylabel("ms")
    handles = [plt.Line2D([], [], color=colour, lw=4, label=name) for name, colour in colours.items()]
    handles += [
        plt.Line2D([], [], color="k", lw=2, label="limit"),
        plt.Line2D([], [], ls="", marker="o", mfc="none", color="k", label="predicted"),
        plt.Line2D([], [], ls="", marker="*", ms=10, color="k", label="measured" if points else "measured (none yet)"),
    ]
    axes[0].legend(handles=handles, fontsize=7, loc="lower left")
    figure.suptitle("Limits, predicted and measured times of the log-prob ops, T = 8192, bfloat16")
    save(figure, path, dpi=100)
    plt.close(figure)


def main():
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plot", type=Path, default=FOLDER / "roofline.png", help="where the plot goes")
    options = parser.parse_args()
    results = load_results()
    say("Predictions, no measurements: limit → predicted time of our kernels in ms\n")
    say(markdown())
    for (op, phase, model), found in measured_points(results).items():
        for gpu, ms in found:
            say(f"measured on {gpu}: {op} {phase} {model} {ms:.3f} ms")
    if not results:
        say("\nNo measured results in benchmarks/results yet.")
    plot(options.plot, results)
    say(f"wrote {options.plot}")


if __name__ == "__main__":
    protect()
    main()
