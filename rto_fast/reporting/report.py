"""A run's report: report.html, one file that needs nothing else, and its figures as PNG beside it."""

import os
import re
import tempfile
from pathlib import Path

from rto_fast.errors import DataError
from rto_fast.reporting import draw, figures
from rto_fast.reporting.page import page
from rto_fast.reporting.progress import progress
from rto_fast.reporting.run_files import read_runs


def write_report(folders, output=None):
    """Writes the report of a run, or one page that compares several.

    Args:
        folders: the runs' output folders. output: the page's file; by default report.html in the run's folder, and
            compare.html in the first one's for several. PNGs go beside it, into figures/ (compare_figures/, by its name).
    Returns:
        Path of the page.
    Raises:
        DataError: a folder that holds no run, or a place that cannot be written to.
    """
    runs = read_runs(folders)
    path = Path(output) if output else runs[0].folder / ("report.html" if len(runs) == 1 else "compare.html")
    if path.is_dir():
        raise DataError(f"{path}: is a folder; give the report's file, {path / 'report.html'} say")
    pictures = path.parent / ("figures" if path.stem == "report" else f"{path.stem}_figures")
    drawn = []
    try:
        pictures.mkdir(parents=True, exist_ok=True)
        sections = [(title, list(panels)) for title, panels in figures.sections(runs)]
        with progress("drawing the report", sum(len(panels) for _, panels in sections), "figures") as phase:
            for title, panels in sections:
                shown = []
                for panel in panels:
                    svg, png = draw.render(panel)
                    shown.append((panel.title, svg))
                    _replace(pictures / f"{_file_name(panel.slug)}.png", png)
                    phase.advance()
                drawn.append((title, shown))
        _replace(path, page(runs, drawn).encode("utf-8"))
    except OSError as error:
        raise DataError(f"{error.filename or path}: cannot be written ({error.strerror}); see --output") from error
    return path


def _file_name(slug):
    """A name for a file from one that holds a stage's or a metric's: no folders, no surprises."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", slug).lstrip(".")[:120]


def _replace(path, content):
    """Writes a file as a whole or not at all."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(name, 0o644)  # mkstemp's files are their owner's alone
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
