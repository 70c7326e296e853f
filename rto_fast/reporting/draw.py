"""Draws each panel of a report with matplotlib, as SVG in the page's colours and as PNG."""

import io
import logging
import math
import re
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure  # not pyplot: no global figures, no window, whatever the backend
from matplotlib.transforms import Bbox

from rto_fast.reporting.markup import brief, visible

# Okabe and Ito's colours, evened out in lightness: distinct on white, on near-black and for most colour-blind readers.
COLORS = ["#3d86d8", "#e07a1f", "#1fa37a", "#c65fa0", "#a88a1e", "#7c74d6", "#4fa6b8", "#c4513f"]
# The SVG's text and grid have these colours until the page's own take their place.
INK, GRID = "#1b1f24", "#d0d7df"
STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "semibold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.linewidth": 0.6,
    "axes.formatter.use_mathtext": False,
    "axes.unicode_minus": True,
    "text.parse_math": False,  # a run's name may hold dollar signs
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.5,
    "svg.fonttype": "none",  # text stays text: the file is small and a reader can select it
    "svg.hashsalt": "rto-fast",  # the same run gives the same file
}
MAX_POINTS, SMOOTH_FROM = 600, 60


@dataclass
class Panel:
    """One small figure of a report."""

    slug: str  # the PNG's name
    title: str
    series: Mapping[str, tuple[Sequence[Any], Sequence[float]]]  # {label: (x, y)}; bars have names of categories as x
    kind: Literal["lines", "points", "stack", "bars"] = "lines"
    xlabel: str = "step"
    colors: dict[str, str] = field(default_factory=dict)  # {label: colour}, where it is not the next one of `COLORS`

    @property
    def is_drawable(self) -> bool:
        """Whether any number in it is finite."""
        return any(math.isfinite(value) for _, values in self.series.values() for value in values)

    def color(self, label: str) -> str:
        return self.colors.get(label, COLORS[list(self.series).index(label) % len(COLORS)])


def draw_lines(axes: Axes, panel: Panel) -> None:
    for label, points in panel.series.items():
        x, y = thin(*points)
        color = panel.color(label)
        dashes: dict[str, Any] = {"linestyle": (0, (4, 2))} if label == "sum" else {}
        if len(x) >= SMOOTH_FROM:  # the noise of single batches is pale, with its moving average over it
            axes.plot(x, y, color=color, alpha=0.28, linewidth=0.8)
            axes.plot(x, smooth(y), color=color, label=_label(label), **dashes)
        else:
            # A number between gaps has no line, so it needs a marker to be seen.
            axes.plot(
                x, y, color=color, label=_label(label), marker="o" if len(x) <= 15 else None, markersize=3, **dashes
            )


def draw_points(axes: Axes, panel: Panel) -> None:
    style: dict[str, Any] = {"marker": "o", "markersize": 3.5, "linestyle": "none", "alpha": 0.7}
    for label, points in panel.series.items():
        axes.plot(*thin(*points), color=panel.color(label), label=_label(label), **style)


def draw_stack(axes: Axes, panel: Panel) -> None:
    colors = [panel.color(label) for label in panel.series]
    x = next(iter(panel.series.values()))[0]
    if len(x) == 1:  # an area needs two ends
        x = [x[0] - 0.5, x[0] + 0.5]
    heights = [list(y) if len(y) == len(x) else list(y) * 2 for _, y in panel.series.values()]
    axes.stackplot(x, heights, labels=[_label(label) for label in panel.series], colors=colors, alpha=0.85, linewidth=0)
    axes.margins(x=0)


def draw_bars(axes: Axes, panel: Panel) -> None:
    categories = list(dict.fromkeys(name for names, _ in panel.series.values() for name in names))
    height = 0.8 / len(panel.series)
    for index, (label, (names, values)) in enumerate(panel.series.items()):
        at = [i + (index - (len(panel.series) - 1) / 2) * height for i in range(len(categories))]
        lengths = dict(zip(names, values))
        widths = [lengths.get(name, 0.0) for name in categories]
        axes.barh(at, widths, height=height, color=panel.color(label), label=_label(label))
    axes.set_yticks(range(len(categories)), [_label(name) for name in categories])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)


DRAW = {"lines": draw_lines, "points": draw_points, "stack": draw_stack, "bars": draw_bars}


def _label(text: str) -> str:
    text = brief(text)
    return f" {text}" if text.startswith("_") else text  # matplotlib hides labels that begin with one


def draw(panel: Panel) -> Figure:
    figure = Figure(figsize=(4.6, 2.9), dpi=150, facecolor="white")
    axes = figure.add_axes((0.12, 0.25, 0.85, 0.6))
    DRAW[panel.kind](axes, panel)
    axes.locator_params(axis="x" if panel.kind == "bars" else "both", nbins=6)  # ticks take most of a figure's time
    _arrange(figure, axes, panel)
    return figure


def _arrange(figure: Figure, axes: Axes, panel: Panel) -> None:
    """Sets title, label, legend and margins. Each text is measured once, matplotlib's layout takes half the time."""
    renderer, point = FigureCanvasAgg(figure).get_renderer(), figure.dpi / 72
    inside, width, height = axes.bbox.frozen(), figure.bbox.width, figure.bbox.height
    ticks_x, ticks_y = (axis.get_tightbbox(renderer) or inside for axis in (axes.xaxis, axes.yaxis))
    label = inside.y0 - ticks_x.y0 + 3 * point  # from the axes to the top of the label, which is 12 points high
    bottom = label + 16 * point
    legend = None
    if panel.kind == "stack" or len(panel.series) > 1:
        # The legend stands below the axes, where it hides nothing, in as many columns as about 56 characters allow.
        columns = max(1, min(3, len(panel.series), 56 // (5 + max(len(_label(name)) for name in panel.series))))
        legend = axes.legend(loc="upper center", ncols=columns, borderaxespad=0, borderpad=0)
        bottom += legend.get_window_extent(renderer).height + 4 * point
    lines = textwrap.wrap(visible(panel.title), 52)
    factor = 11 if axes.yaxis.get_offset_text().get_text() else 0  # points of a text such as 1e-5, above the axis
    box = Bbox.from_extents(
        min(inside.x0 - ticks_y.x0 + 4 * point, 0.6 * width),  # long names are cut, the axes are not
        min(bottom, 0.6 * height),
        width - max(4 * point, ticks_x.x1 - inside.x1) - 4 * point,
        height - (12 * len(lines) + 9 + factor) * point,
    )
    axes.set_position(box.transformed(figure.transFigure.inverted()))
    # Texts that are placed here are not placed anew in each drawing.
    axes.set_title("\n".join(lines), y=1.0, pad=6 + factor)
    axes.set_xlabel(panel.xlabel)
    middle = (box.x0 + box.x1) / 2 / width
    axes.xaxis.set_label_coords(middle, (box.y0 - label) / height, figure.transFigure)
    axes.yaxis.set_label_coords(0.0, 0.5)
    if legend:
        legend.set_bbox_to_anchor((middle, (box.y0 - label - 16 * point) / height), figure.transFigure)


def thin(x: Sequence[float], y: Sequence[float]) -> tuple[Sequence[float], Sequence[float]]:
    """Groups neighbouring points into at most `MAX_POINTS` points.

    Returns:
        The last x of each group, and the mean of its y; NaN where all of them are.
    """
    size = -(-len(x) // MAX_POINTS)
    if size <= 1:
        return x, y
    groups = [(x[i : i + size], [v for v in y[i : i + size] if v == v]) for i in range(0, len(x), size)]
    return [a[-1] for a, _ in groups], [sum(b) / len(b) if b else float("nan") for _, b in groups]


def smooth(y: Sequence[float]) -> list[float]:
    """The moving average over a fifteenth of the curve; NaN where there is nothing to average."""
    half = max(1, len(y) // 30)
    windows = ([v for v in y[max(0, i - half) : i + half + 1] if v == v] for i in range(len(y)))
    return [sum(w) / len(w) if w else float("nan") for w in windows]


def render(panel: Panel) -> tuple[str, bytes]:
    """Draws a panel; returns the SVG for the page and the PNG file."""
    svg, png = io.StringIO(), io.BytesIO()
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # "building the font cache", "font family not found"
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a glyph that the font does not have is a box, not a line in the run's output
        figure = draw(panel)
        # `savefig` would draw everything once more.
        FigureCanvasAgg(figure).print_png(png, pil_kwargs={"compress_level": 1})
        for patch in (figure.patch, *(axes.patch for axes in figure.axes)):
            patch.set_visible(False)
        FigureCanvasSVG(figure).print_svg(svg, metadata={"Date": None, "Creator": None})
    return _inline(svg.getvalue(), panel.slug), png.getvalue()


def _inline(svg: str, slug: str) -> str:
    """An SVG file as an element of the page: without a prologue, with ids that begin with `slug`, in the page's colours."""
    svg = svg[svg.index("<svg") :]
    prefix = re.sub(r"\W", "-", slug)
    svg = re.sub(r'(<[^<>]* )id="', rf'\1id="{prefix}-', svg)
    svg = svg.replace("url(#", f"url(#{prefix}-").replace('xlink:href="#', f'xlink:href="#{prefix}-')
    svg = re.sub(r"(<metadata>.*?</metadata>|<!--.*?-->)", "", svg, flags=re.S)
    svg = svg.replace(INK, "currentColor").replace(GRID, "var(--line)")
    return re.sub(r'width="[\d.]+pt" height="[\d.]+pt"|height="[\d.]+pt" width="[\d.]+pt"', 'role="img"', svg, count=1)
