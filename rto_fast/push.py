"""`python -m rto_fast.push RUN_DIR --repo OWNER/NAME`: a run's final model on the Hugging Face Hub."""

import sys

from rto_fast.config.fields import Location
from rto_fast.config.options import argument
from rto_fast.reporting.hub import push
from rto_fast.system.command_line import as_command
from rto_fast.system.terminal import ArgumentParser, say


def main(arguments: list[str] | None = None) -> str | None:
    """Pushes a run's model; returns the repository's address, None after a dry run."""
    parser = ArgumentParser(
        prog="python -m rto_fast.push",
        description="Uploads a finished run's final model (safetensors, configuration, tokenizer, model card, images) to "
        "the Hugging Face Hub, and nothing else.",
    )
    parser.add_argument("run", type=argument(Location), metavar="RUN_DIR", help="the output_dir of a finished run")
    parser.add_argument(
        "--repo",
        required=True,
        type=argument(str),
        metavar="OWNER/NAME",
        help="the repository; made if it is not there",
    )
    parser.add_argument("--private", choices=["true", "false"], default="true", help="default: true")
    parser.add_argument(
        "--dry_run", action="store_true", help="list what would be uploaded; no network is used and nothing is written"
    )
    options = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    url = push(options.run, options.repo, private=options.private == "true", dry_run=options.dry_run)
    if url:
        say(f"pushed: {url}")
    return url


def command() -> None:
    with as_command():
        main()


if __name__ == "__main__":
    command()
