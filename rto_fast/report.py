"""`python -m rto_fast.report RUN_DIR [RUN_DIR ...]`: a run's report, or several runs compared in one page."""

from pathlib import Path

from rto_fast.config.fields import Location
from rto_fast.config.options import argument
from rto_fast.system.command_line import as_command
from rto_fast.system.terminal import ArgumentParser, one_line, say
from rto_fast.system.writing import own_descriptor


def main(arguments: list[str] | None = None) -> Path:
    """Writes the report; returns its path."""
    parser = ArgumentParser(
        prog="python -m rto_fast.report",
        description="Writes a run's report (RUN_DIR/report.html), or one page that compares several runs "
        "(compare.html in the first one's folder). One file, no network; its figures as PNG beside it.",
    )
    parser.add_argument(
        "runs", nargs="+", type=argument(Location), metavar="RUN_DIR", help="the output_dir of a run, finished or not"
    )
    parser.add_argument(
        "--output", type=argument(Location), metavar="FILE", help="where to write the page instead; - is stdout"
    )
    options = parser.parse_args(arguments)
    from rto_fast.reporting.report import write_report  # after the options: --help needs no matplotlib

    output = "/dev/stdout" if options.output == "-" else options.output
    path = write_report(options.runs, output)
    say(f"report: {one_line(path)}", err=own_descriptor(path) == 1)
    return path


def command() -> None:
    with as_command():
        main()


if __name__ == "__main__":
    command()
