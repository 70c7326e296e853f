"""The configuration of the data: `data`."""

from dataclasses import dataclass, field
from typing import Literal

from rto_fast.config.fields import Count, CountOr0, FolderAtHome, Location, Positive


@dataclass
class DataConfig:
    """Preference pairs, demonstrations and prompts, and how they become tokens."""

    preferences: Location | None = None
    """Preference pairs for the reward model and DPO: a file, a directory, or the name of an HF dataset (`name` or
    `name:config`). Every source may name its split, `name[test]`; the default is train. `embedded:preferences` is the
    generated world that comes with the package."""
    sft: Location | None = None
    """Demonstrations for the SFT stage. Default: the chosen responses of `preferences`."""
    prompts: Location | None = None
    """Prompts of the RTO stage. Default: the prompts of `preferences`."""
    eval_prompts: Location | None = None
    """Prompts on which policies are compared. Default: some are held out of `preferences`, or of `prompts`."""
    invalid: Literal["error", "skip"] = "error"
    """What happens at a row that cannot be used (a missing value, another layout than most rows, a malformed line, a
    conversation that the chat template refuses): error stops the run, skip leaves the row out and counts it."""
    columns: dict[str, str] = field(default_factory=dict)
    """Names of your columns where they are not detected: {"prompt": "question", "chosen": "best"}."""
    limit: Count | None = None
    """Read at most this many examples of each source. Of a local file no more is read than that takes, but always the first
    1,000 rows, from which the layout is detected."""
    streaming: bool = False
    """Read HF datasets as a stream, so that only the first `limit` examples are downloaded (and always the first 1,000
    rows)."""
    deduplicate: bool = True
    """Of examples with exactly the same prompt and responses, keep only the first."""
    prompt_format: Literal["auto", "chat", "text"] = "auto"
    """How a prompt that is given as text is used. chat: it becomes one user message; text: it is used as it is; auto: chat
    if the tokenizer has a chat template. Except with chat, text that is chat-templated already stays as it is."""
    thinking: Literal["auto", "on", "off"] = "auto"
    """Whether the model thinks before it answers, for chat templates that support it. on and off set the template's
    `enable_thinking`; off also removes a `<think>` at the end of a prompt. auto is on if there are thoughts in the responses
    that the run trains on."""
    max_prompt_tokens: Count = 1024
    """`overlong_prompt` says what happens to longer prompts."""
    max_response_tokens: Count = 1024
    """Longer responses of the data are cut and get no end-of-sequence token."""
    overlong_prompt: Literal["drop", "truncate_left"] = "drop"
    """drop leaves out examples whose prompt is too long; truncate_left keeps the last tokens of the prompt."""
    held_out: CountOr0 = 256
    """Pairs held out of `preferences` (at most about a tenth of them) to measure preference accuracy and the mean and
    standard deviation of the reward model's scores. A prompt is held out with all its pairs, so that the number is only
    approached where prompts are repeated."""
    cache_dir: FolderAtHome | None = "~/.cache/rto_fast"
    """Folder where token ids are kept by content, for the next run on the same texts; null tokenises every time."""
    max_unpacked_gib: Positive = 4.0
    """A compressed file (.gz, .parquet, a saved dataset) is refused if its rows take more memory than this, in GiB."""
