"""Finishes a run: its report, its model card and the push to the Hub. An error here is printed and does not end the run."""

from pathlib import Path

from rto_fast.config import Config
from rto_fast.errors import command_line
from rto_fast.reporting.log import RunLog
from rto_fast.system.command_line import error_line


def report_run(folder: Path, log: RunLog) -> None:
    """Writes report.html."""
    try:
        from rto_fast.reporting.page import write_report  # matplotlib is needed here and nowhere else

        log.say(f"\nreport: {write_report([folder])}")
    except Exception as error:
        log.say(f"report: not written ({error_line(error, with_type=True)})")


def publish_run(config: Config, folder: Path, log: RunLog) -> None:
    """Writes the final model's card, and pushes the model where `hub.repo` says so."""
    hub = config.hub
    try:
        from rto_fast.reporting.model_card import write_model_card

        log.say(f"model card: {write_model_card(folder)}")
    except Exception as error:
        log.say(f"model card: not written ({error_line(error, with_type=True)})")
    if not hub.repo:
        return
    try:
        from rto_fast.reporting.hub import push

        log.say(f"pushed: {push(folder, hub.repo, private=hub.private)}")
    except Exception as error:
        again = command_line("rto_fast.push", folder, "--repo", hub.repo)
        log.say(f"push: {error_line(error)}; again with: {again}{'' if hub.private else ' --private false'}")
