"""Writes a run's report: report.html, which needs no other file, and its figures as PNG beside it."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from rto_fast.errors import DataError
from rto_fast.reporting import draw, figures
from rto_fast.reporting.page import page
from rto_fast.reporting.run_files import read_runs
from rto_fast.system.progress import progress
from rto_fast.system.writing import check_own, check_target, is_file, own_folder, write_file, write_own


def write_report(folders: Sequence[str | Path], output: str | Path | None = None) -> Path:
    """Writes the report of a run, or one page that compares several.

    Args:
        folders: the runs' output folders.
        output: the page's file; by default report.html in the run's folder, or compare.html in the first of several runs.
            The PNG files go into figures/ beside report.html and into NAME_figures/ beside another file. A pipe or a device
            gets none.
    Returns:
        The path of the page.
    Raises:
        DataError: a folder holds no run, or the page cannot be written.
    """
    runs = read_runs(folders)
    path = Path(output) if output else runs[0].folder / ("report.html" if len(runs) == 1 else "compare.html")
    pictures = path.parent / ("figures" if path.stem == "report" else f"{path.stem}_figures")
    drawn: list[tuple[str, list[tuple[str, str]]]] = []
    try:
        if output:
            write: Callable[[Path, str | bytes], None] = write_file
            has_pictures = is_file(path)
            check_target(path)
            if has_pictures:
                pictures.mkdir(parents=True, exist_ok=True)
        else:
            write, has_pictures = write_own, True
            check_own(path)
            own_folder(pictures)
        sections = figures.sections(runs)
        with progress("drawing the report", sum(len(panels) for _, panels in sections), "figures") as phase:
            for title, panels in sections:
                shown = []
                for panel in panels:
                    svg, png = draw.render(panel)
                    shown.append((panel.title, svg))
                    if has_pictures:
                        write(pictures / f"{_file_name(panel.slug)}.png", png)
                    phase.advance()
                drawn.append((title, shown))
        write(path, page(runs, drawn))
    except OSError as error:
        raise DataError(f"{error.filename or path}: cannot be written ({error.strerror}); see --output") from error
    return path


def _file_name(slug: str) -> str:
    """A plain file name: stages and metrics in metrics.jsonl may have any name."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", slug).lstrip(".")[:120]
