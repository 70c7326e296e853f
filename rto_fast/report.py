"""`python -m rto_fast.report RUN_DIR [RUN_DIR ...]`: a run's report, or several runs compared in one page."""

from dataclasses import dataclass, field
from pathlib import Path

from rto_fast.config.fields import Location, check_fields
from rto_fast.config.help import Command
from rto_fast.config.options import parse
from rto_fast.errors import ConfigError
from rto_fast.system.command_line import as_command
from rto_fast.system.terminal import one_line, say
from rto_fast.system.writing import own_descriptor

REPORT = Command(
    "rto_fast.report",
    "Writes a run's report (RUN_DIR/report.html), or one page that compares several runs (compare.html in the folder of the "
    "first). It is one file that needs no network; its figures are also PNG files beside it.",
    {
        "runs/own": "the report of one run, finished or not",
        "runs/default runs/ppo_baseline": "two runs, compared",
        "runs/own --output - > page.html": "the page on stdout",
    },
    positional="run_dir",
)


@dataclass
class ReportOptions:
    """The runs, and where the page goes."""

    run_dir: list[Location] = field(default_factory=list)
    """The output_dir of a run; of several runs to compare them."""
    output: Location | None = None
    """File to write the page to instead; `-` is stdout."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.run_dir:
            raise ConfigError("RUN_DIR: expected the output_dir of a run, or of several")


def main(arguments: list[str] | None = None) -> Path:
    """Writes the report; returns its path."""
    options = parse(ReportOptions, arguments, REPORT)
    from rto_fast.reporting.page import write_report  # after the options: --help needs no matplotlib

    output = "/dev/stdout" if options.output == "-" else options.output
    path = write_report(options.run_dir, output)
    say(f"report: {one_line(path)}", err=own_descriptor(path) == 1)
    return path


def command() -> None:
    with as_command():
        main()


if __name__ == "__main__":
    command()
