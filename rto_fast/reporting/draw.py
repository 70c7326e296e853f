"""Drawing with matplotlib: one figure a panel, as SVG in the page's colours and as PNG."""

import io
import logging
import re
import textwrap
import warnings

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure  # not pyplot: no global figures, no window, whatever the backend

from rto_fast.reporting.markup import brief, visible

# Told apart on white and on near-black, and by most colour-blind readers (Okabe and Ito's, evened out in lightness).
COLORS = ["#3d86d8", "#e07a1f", "#1fa37a", "#c65fa0", "#a88a1e", "#7c74d6", "#4fa6b8", "#c4513f"]
# Stand-ins in the SVG for the page's own colours.
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
    "text.parse_math": False,  # a run's name with dollar signs is no formula
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.5,
    "svg.fonttype": "none",  # text stays text: small, and the reader's to select
    "svg.hashsalt": "rto-fast",  # the same run gives the same file
}
MAX_POINTS, SMOOTH_FROM = 600, 60


def draw_lines(panel):
    figure, axes = _start(panel)
    for index, (label, (x, y)) in enumerate(panel.series.items()):
        color = panel.colors.get(label, COLORS[index % len(COLORS)])
        x, y = thin(list(x), list(y))
        dashes = {"linestyle": (0, (4, 2))} if label == "sum" else {}
        if len(x) >= SMOOTH_FROM:  # batch noise pale, its moving average over it
            axes.plot(x, y, color=color, alpha=0.28, linewidth=0.8)
            axes.plot(x, smooth(y), color=color, label=_label(label), **dashes)
        else:
            # A lone number between gaps has no line to be seen by.
            axes.plot(
                x, y, color=color, label=_label(label), marker="o" if len(x) <= 15 else None, markersize=3, **dashes
            )
    return _finish(figure, axes, panel)


def draw_points(panel):
    figure, axes = _start(panel)
    for index, (label, (x, y)) in enumerate(panel.series.items()):
        color = panel.colors.get(label, COLORS[index % len(COLORS)])
        x, y = thin(list(x), list(y))
        axes.plot(x, y, color=color, label=_label(label), marker="o", markersize=3.5, linestyle="none", alpha=0.7)
    return _finish(figure, axes, panel)


def draw_stack(panel):
    figure, axes = _start(panel)
    colors = [panel.colors.get(label, COLORS[i % len(COLORS)]) for i, label in enumerate(panel.series)]
    x = next(iter(panel.series.values()))[0]
    if len(x) == 1:  # an area needs two ends
        x = [x[0] - 0.5, x[0] + 0.5]
    heights = [y if len(y) == len(x) else y * 2 for _, y in panel.series.values()]
    axes.stackplot(x, heights, labels=[_label(label) for label in panel.series], colors=colors, alpha=0.85, linewidth=0)
    axes.margins(x=0)
    return _finish(figure, axes, panel, legend=True)


def draw_bars(panel):
    figure, axes = _start(panel)
    categories = list(dict.fromkeys(name for values in panel.series.values() for name in values))
    height = 0.8 / len(panel.series)
    for index, (label, values) in enumerate(panel.series.items()):
        at = [i + (index - (len(panel.series) - 1) / 2) * height for i in range(len(categories))]
        widths = [values.get(name, 0.0) for name in categories]
        axes.barh(at, widths, height=height, color=COLORS[index % len(COLORS)], label=_label(label))
    axes.set_yticks(range(len(categories)), [_label(name) for name in categories])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    return _finish(figure, axes, panel)


def _start(panel):
    figure = Figure(figsize=(4.6, 2.9), dpi=150, facecolor="white", layout="constrained")
    return figure, figure.add_subplot()


def _label(text):
    text = brief(text)
    return f" {text}" if text.startswith("_") else text  # matplotlib hides labels that begin with one


def _finish(figure, axes, panel, legend=False):
    axes.set_title("\n".join(textwrap.wrap(visible(panel.title), 52)))
    axes.set_xlabel(panel.xlabel)
    if legend or len(panel.series) > 1:
        # Below the axes, where it hides nothing; as many columns as about 56 characters allow.
        columns = max(1, min(3, len(panel.series), 56 // (5 + max(len(_label(label)) for label in panel.series))))
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=columns, borderaxespad=0.2)
    return figure


def thin(x, y):
    """At most `MAX_POINTS` points, each the mean of its neighbours; NaN where all of them are."""
    size = -(-len(x) // MAX_POINTS)
    if size <= 1:
        return x, y
    groups = [(x[i : i + size], [v for v in y[i : i + size] if v == v]) for i in range(0, len(x), size)]
    return [a[-1] for a, _ in groups], [sum(b) / len(b) if b else float("nan") for _, b in groups]


def smooth(y):
    """The mean of each point's neighbours, over a fifteenth of the curve; NaN stays where there is nothing to average."""
    half = max(1, len(y) // 30)
    windows = ([v for v in y[max(0, i - half) : i + half + 1] if v == v] for i in range(len(y)))
    return [sum(w) / len(w) if w else float("nan") for w in windows]


def render(panel):
    """(SVG for the page, PNG bytes) of a panel."""
    svg, png = io.StringIO(), io.BytesIO()
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # "building the font cache", "font family not found"
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a glyph that the font does not have is a box, not a line in the run's output
        figure = panel.figure()
        # The canvases' own methods: `savefig` would draw everything once more, for nothing here.
        FigureCanvasAgg(figure).print_png(png, pil_kwargs={"compress_level": 1})
        figure.set_layout_engine("none")  # it stays as it was laid out, which is most of a figure's time
        for artist in (figure, *figure.axes):
            artist.patch.set_visible(False)
        FigureCanvasSVG(figure).print_svg(svg, metadata={"Date": None, "Creator": None})
    return _inline(svg.getvalue(), panel.slug), png.getvalue()


def _inline(svg, slug):
    """An SVG file as an element of a page: without its prologue, its ids its own, its ink the page's."""
    svg = svg[svg.index("<svg") :]
    prefix = re.sub(r"\W", "-", slug)
    svg = re.sub(r'(<[^<>]* )id="', rf'\1id="{prefix}-', svg)
    svg = svg.replace("url(#", f"url(#{prefix}-").replace('xlink:href="#', f'xlink:href="#{prefix}-')
    svg = re.sub(r"(<metadata>.*?</metadata>|<!--.*?-->)", "", svg, flags=re.S)
    svg = svg.replace(INK, "currentColor").replace(GRID, "var(--line)")
    return re.sub(r'width="[\d.]+pt" height="[\d.]+pt"|height="[\d.]+pt" width="[\d.]+pt"', 'role="img"', svg, count=1)
