"""`python -m rto_fast.data SOURCE [--tokenizer DIR]`: what a run would load from a source, seen before the run.

It shows the detected layout, counts, duplicates and leaks, lengths, what the limits cut, and examples as the model will see
them.
"""

import dataclasses
import warnings
from dataclasses import dataclass

from rto_fast.config import Config, DataConfig, ModelConfig
from rto_fast.config.fields import CountOr0, Location, check_fields
from rto_fast.config.help import Command
from rto_fast.config.options import parse
from rto_fast.errors import ConfigError
from rto_fast.system.command_line import as_command
from rto_fast.system.notices import Notice
from rto_fast.system.terminal import one_line, say, wants_styles


@dataclass
class InspectConfig:
    """What is looked at, and how."""

    source: Location | None = None
    """A file, a folder, the name of an HF dataset or `embedded:NAME`; `name[test]` names a split."""
    tokenizer: Location | None = None
    """Directory or hub id of the model or its tokenizer. Without it lengths are in words."""
    trust_remote_code: bool = False
    """Allow the tokenizer's directory to run its own Python code."""
    examples: CountOr0 = 3
    """Number of examples that are shown."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.source:
            raise ConfigError("expected a source: a file, a folder, the name of an HF dataset or embedded:NAME")
        Config(model=ModelConfig(path="any"), data=self.data)


INSPECT = Command(
    "rto_fast.data",
    "Shows what a run would load from a source: layout, counts, duplicates, lengths, what the limits cut, and examples as "
    "the model will see them.",
    {
        "pairs.jsonl": "a file as it is detected, with lengths in words",
        "pairs.jsonl --tokenizer DIR": "lengths in tokens, what the limits cut, and the loss mask",
        "'HuggingFaceH4/ultrafeedback_binarized[test_prefs]' --data.limit 1000": "a split of an HF dataset",
    },
    positional="source",
)


def main(arguments: list[str] | None = None) -> None:
    """Prints what there is to say about a source."""
    options = parse(InspectConfig, arguments, INSPECT)
    from rto_fast.data.look import Page, look  # after the options: --help and mistakes in them need no torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", Notice)
        look(
            options.source or "",
            options.data,
            Page(wants_styles()),
            say,
            tokenizer_path=options.tokenizer,
            trust_remote_code=options.trust_remote_code,
            examples_shown=options.examples,
        )
    for message in dict.fromkeys(str(warning.message) for warning in caught if isinstance(warning.message, Notice)):
        say("\nnote: ", one_line(message))


def command() -> None:
    with as_command(only_prints=True):
        main()


if __name__ == "__main__":
    command()
