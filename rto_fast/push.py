"""`python -m rto_fast.push RUN_DIR --repo OWNER/NAME` uploads a run's final model to the Hugging Face Hub."""

from dataclasses import dataclass

from rto_fast.config.fields import Location, Word, check_fields
from rto_fast.config.help import Command
from rto_fast.config.options import parse
from rto_fast.errors import ConfigError
from rto_fast.reporting.hub import push
from rto_fast.system.command_line import as_command
from rto_fast.system.terminal import say

PUSH = Command(
    "rto_fast.push",
    "Uploads the final model of a finished run to the Hugging Face Hub: safetensors, configuration, tokenizer, model card "
    "and images, and nothing else.",
    {
        "runs/own --repo OWNER/NAME --dry_run": "list what would be uploaded",
        "runs/own --repo OWNER/NAME": "push to a private repository, which is made if it does not exist",
        "runs/own --repo OWNER/NAME --private false": "push to a public one",
    },
    positional="run_dir",
    switches=("dry_run",),
)


@dataclass
class PushOptions:
    """The run, and where its model goes."""

    run_dir: Location | None = None
    """The output_dir of a finished run."""
    repo: Word | None = None
    """OWNER/NAME of the repository. It is made if it does not exist."""
    private: bool = True
    """Make the repository private if it does not exist."""
    dry_run: bool = False
    """List what would be uploaded. No network is used and nothing is written."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.run_dir:
            raise ConfigError("RUN_DIR: expected the output_dir of a finished run")
        if not self.repo:
            raise ConfigError("--repo: expected OWNER/NAME")


def main(arguments: list[str] | None = None) -> str | None:
    """Pushes a run's model; returns the repository's address, None after a dry run."""
    options = parse(PushOptions, arguments, PUSH)
    assert options.run_dir and options.repo
    url = push(options.run_dir, options.repo, private=options.private, dry_run=options.dry_run)
    if url:
        say(f"pushed: {url}")
    return url


def command() -> None:
    with as_command():
        main()


if __name__ == "__main__":
    command()
