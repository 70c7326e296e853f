"""How a source's layout is found, what becomes of rows that do not fit it, transcripts, and messages in text columns."""

import csv
import json
import re
import warnings
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from rto_fast.config import DataConfig
from rto_fast.data import __main__ as data_command
from rto_fast.data.encoded import decoded
from rto_fast.data.run_data import RunData
from rto_fast.data.sources import load_examples
from rto_fast.data.transcripts import is_transcript, transcript_messages
from rto_fast.errors import DataError


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def jsonl(path: Path, rows: list) -> Path:
    """A dict becomes a row; a text is a line as it stands."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def outcome(source: Path, **options) -> tuple[list[str], str]:
    """(last part of the origin of each example, the warning) with unusable rows skipped."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        examples = load_examples(source, invalid="skip", **options)
    origins = [re.search(r"(\d+)\]?$", example.origin)[1] for example in examples]
    return origins, "\n".join(str(warning.message) for warning in caught)


PAIR = {"prompt": "2 + 2?", "chosen": "It is 4.", "rejected": "It is 5."}
BARE = {"chosen": "The sky is blue.", "rejected": "The sky is green."}
HH = {"chosen": "\n\nHuman: sky?\n\nAssistant: blue", "rejected": "\n\nHuman: sky?\n\nAssistant: green"}
WHOLE = {"chosen": [user("sky?"), assistant("blue")], "rejected": [user("sky?"), assistant("green")]}
ULTRA = {"prompt": "sky?", **WHOLE}
ANSWER = {"prompt": "sky?", "response": "blue"}
MESSAGES = {"messages": [user("sky?"), assistant("blue")]}


# rows; the rows that are usable, counted from 1; the first error
VOTES = {
    "null prompt": ([{**PAIR, "prompt": None}, PAIR, PAIR], "23", ":1: prompt is missing or null"),
    "null prompt, a tie": ([{**PAIR, "prompt": None}, PAIR], "2", ":1: prompt is missing or null"),
    "mostly null prompts": ([{**PAIR, "prompt": None}] * 3 + [PAIR], "4", ":1: prompt is missing or null"),
    "no prompt": ([BARE, PAIR, PAIR], "23", ":1: prompt is missing or null"),
    "a prompt for once": ([PAIR, BARE, BARE], "23", ":1: the row's layout is explicit prompt, but most of .* implicit"),
    "null chosen": ([{**PAIR, "chosen": None}, PAIR], "2", ":1: chosen is missing or null"),
    "null pair": ([{**PAIR, "chosen": None, "rejected": None}, PAIR], "2", ":1: chosen is missing or null"),
    "odd chosen": ([{**PAIR, "chosen": 3}, PAIR], "2", ":1: chosen must be text"),
    "odd prompt": ([{**PAIR, "prompt": 3}, PAIR], "2", ":1: prompt must be text"),
    "half a pair": ([{"prompt": "q", "chosen": "a"}, PAIR], "2", ":1: rejected is missing or null"),
    "empty prompt": ([{**PAIR, "prompt": ""}, PAIR], "2", ":1: empty prompt"),
    "empty chosen": ([{**PAIR, "chosen": ""}, PAIR], "2", ":1: empty response: chosen"),
    "other columns": ([{"question": "q"}, PAIR], "2", ":1: chosen is missing or null; found question"),
    "HH after text": ([BARE, HH, HH], "23", ":1: the row's layout is implicit prompt, but most .* HH transcript"),
    "HH after text, a tie": ([BARE, HH], "2", ":1: the row's layout is implicit prompt"),
    "text after HH": ([HH, HH, BARE], "12", ":3: the row's layout is implicit prompt"),
    "HH among text": ([BARE, HH, BARE], "13", ":2: the row's layout is HH transcript, but most .* implicit prompt"),
    "HH among pairs": ([PAIR, {"prompt": "q", **HH}, PAIR], "13", ":2: the row's layout is HH transcript"),
    "half HH": ([HH, HH, {**HH, "rejected": "green"}], "12", ":3: the row's layout is implicit prompt"),
    "UltraFeedback": ([PAIR, ULTRA, ULTRA], "23", ":1: the row's layout is explicit prompt, .* UltraFeedback"),
    "UltraFeedback, one message": (
        [{"prompt": "q", "chosen": [assistant("a")], "rejected": [assistant("b")]}, ULTRA, ULTRA],
        "23",
        ":1: the row's layout is explicit prompt, but most of the first rows' is UltraFeedback",
    ),
    "UltraFeedback without a prompt": ([WHOLE, {**WHOLE, "prompt": None}, ULTRA, ULTRA, ULTRA], "12345", ""),
    "messages and text mixed": ([PAIR, {**PAIR, "prompt": [user("q")]}, ULTRA], "123", ""),
    "conversations and text mixed": ([WHOLE, BARE, WHOLE], "123", ""),
    "null messages": ([{"messages": None}, MESSAGES, {"messages": []}, MESSAGES], "24", ":1: messages is missing or"),
    "null messages beside others": ([{**ANSWER, "messages": None}] * 3 + [MESSAGES], "123", ":4: prompt is missing"),
    "messages beside null pairs": ([{**MESSAGES, "chosen": None, "rejected": None}] * 2, "12", ""),
    "UltraFeedback with null messages": ([{**ULTRA, "messages": None}, {**ULTRA, **MESSAGES}], "12", ""),
    "null response": ([{**ANSWER, "response": None}] * 3 + [ANSWER], "4", ":1: response is missing or null"),
    "mostly responses": ([{"prompt": "q"}, ANSWER, ANSWER], "23", ":1: response is missing or null"),
    "completions": ([{"prompt": "q", "completion": "a"}, ANSWER, ANSWER], "123", ""),
    "mostly prompts": ([PAIR, ANSWER, *[{"prompt": "q"}] * 3], "12345", "the responses of 2 rows are not read"),
    "a label named chosen": ([{**ANSWER, "chosen": True}] * 2, "12", ""),
    "malformed": (['{"prompt": "q", "cho', PAIR], "2", ":1: malformed JSON"),
    "no object": (["[1, 2]", "3", "null", PAIR], "4", ":1: expected a JSON object with columns, found list"),
    "too deep": (["[" * 100_000, PAIR], "2", ":1: JSON that cannot be read"),
}


@pytest.mark.parametrize("name", VOTES)
def test_most_rows_decide_and_the_others_are_unusable(tmp_path, name):
    rows, usable, message = VOTES[name]
    source = jsonl(tmp_path / "a.jsonl", rows)
    found, warning = outcome(source)
    assert found == list(usable) and re.search(message, warning), warning
    assert bool(message) == bool(warning)
    if len(usable) < len(rows):
        assert warning.startswith(f"{source}: {len(rows) - len(usable)} unusable rows skipped, the first: {source}:")
        with pytest.raises(DataError, match=f"a.jsonl{message}"):
            load_examples(source)
