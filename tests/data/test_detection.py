"""How a source's layout is found, what becomes of rows that do not fit it, transcripts, and messages in text columns."""

import csv
import json
import random
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
from rto_fast.data.run_data import RunData
from rto_fast.data.sources import load_examples
from rto_fast.data.text_messages import decoded, is_transcript, transcript_messages
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
    "mostly empty prompts": ([{**PAIR, "prompt": " "}] * 3 + [PAIR], "4", ":1: empty prompt"),
    "empty messages beside others": ([{**ANSWER, "messages": "", "chosen": "", "rejected": ""}] * 2, "12", ""),
    "mostly empty responses": ([{**ANSWER, "response": ""}] * 3 + [ANSWER], "4", ":1: empty response"),
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


def test_no_layout_is_one_line_that_names_the_empty_columns(tmp_path):
    for rows, message in (
        (
            [{"prompt": "q", "chosen": None, "rejected": "b"}] * 2,
            r":1: no known layout in columns prompt, chosen \(null",
        ),
        ([{"question": "q"}, {"answer": "a"}], ":1: no known layout in columns question, answer; map them"),
        (["{", {"question": "q"}], ":2: no known layout in columns question"),
        (["{", "["], ":1: malformed JSON"),
    ):
        source = jsonl(tmp_path / "a.jsonl", rows)
        for invalid in ("error", "skip"):
            with pytest.raises(DataError, match=f"a.jsonl{message}"):
                load_examples(source, invalid=invalid)


def test_columns_of_nulls_count_like_none(tmp_path):
    for row in (BARE | {"prompt": None}, {"prompt": "q", "response": None, "messages": None}):
        (example,) = load_examples(jsonl(tmp_path / "a.jsonl", [row]))
        assert example.prompt in ("The sky is", "q") and example.response is None
    row = {"prompt": None, "response": None, **MESSAGES}  # parquet has every column in every row
    pyarrow.parquet.write_table(pa.Table.from_pylist([ANSWER | {"messages": None}, row, row]), tmp_path / "a.parquet")
    assert outcome(tmp_path / "a.parquet")[0] == ["1", "2"]


def test_mapped_columns_vote_under_our_names(tmp_path):
    rows = [{"q": None, "best": "a", "worst": "b"}, {"best": "a"}, {"q": "q", "best": "a", "worst": "b"}]
    source = jsonl(tmp_path / "a.jsonl", rows)
    columns = {"prompt": "q", "chosen": "best", "rejected": "worst"}
    found, warning = outcome(source, columns=columns)
    assert found == ["3"] and "a.jsonl:1: prompt is missing or null; found q, best, worst" in warning
    with pytest.raises(DataError, match="a.jsonl:1: no column 'question' for prompt; found q, best, worst"):
        load_examples(source, columns=columns | {"prompt": "question"}, invalid="skip")
    rows = [{"prompt": "q"}, {"prompt": "q"}, {"prompt": "q", "answer": "a"}]
    rows = [{"answer": None, **row} for row in rows[:2]] + rows[2:]
    assert outcome(jsonl(source, rows), columns={"response": "answer"})[0] == ["3"]


def test_rows_after_the_first_thousand_do_not_vote(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", [BARE | {"prompt": "q"}] * 1000 + [BARE] * 3000)
    found, warning = outcome(source)
    assert len(found) == 1000 and "3000 unusable rows skipped" in warning and "a.jsonl:1001: prompt is miss" in warning
    assert outcome(source, split="train[1000:]")[0][0] == "1001"  # of a range, the first rows of the range


def test_an_error_past_the_limit_is_not_met(tmp_path):
    compressed = zlib.compressobj(wbits=31)
    rows = [PAIR | {"noise": random.Random(i).randbytes(400).hex()} for i in range(500)]
    lines = [compressed.compress((json.dumps(row) + "\n").encode()) for row in rows]
    source = tmp_path / "a.jsonl.gz"
    source.write_bytes(b"".join(lines) + compressed.flush(zlib.Z_FULL_FLUSH) + b"\xff" * 99)
    assert len(load_examples(source, limit=300)) == 300
    with pytest.raises(DataError, match="a.jsonl.gz: cannot be read"):
        load_examples(source, invalid="skip")  # nobody knows what followed


def test_files_of_a_folder_share_one_layout(tmp_path):
    jsonl(tmp_path / "a.jsonl", [PAIR] * 3)
    jsonl(tmp_path / "b.jsonl", [{"question": "q", "answer": "a"}, PAIR])
    found, warning = outcome(tmp_path)
    assert found == ["1", "2", "3", "2"] and "b.jsonl:1: chosen is missing or null; found question, answer" in warning


def test_rows_of_a_csv_or_a_list_that_cannot_be_read_are_unusable(tmp_path):
    source = tmp_path / "a.csv"
    source.write_text('prompt,"chosen\n",rejected\nq\n\nq,a,b,c\n"q\nq",a,b\n', newline="")
    columns = {"chosen": "chosen\n"}
    found, warning = outcome(source, columns=columns)
    assert found == ["6"] and "2 unusable rows" in warning
    with pytest.raises(DataError, match="a.csv:3: the row does not have the 3 fields of the header"):
        load_examples(source, columns=columns)
    source = tmp_path / "a.json"
    source.write_text(json.dumps([["q"], PAIR]))
    assert outcome(source)[0] == ["1"]
    with pytest.raises(DataError, match=r"a.json\[0\]: expected a JSON object with columns, found list"):
        load_examples(source)


def shown(capsys, *arguments) -> str:
    data_command.main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def test_the_command_shows_the_layout_of_most_rows(capsys, tmp_path):
    rows = [{"prompt": None, "completion": "a"}, {"prompt": "x", "response": None, "completion": "a b c"}]
    source = jsonl(tmp_path / "a.jsonl", rows)
    out = shown(capsys, source, "--data.invalid", "skip")
    assert "layout  prompt/response" in out and "response  ← completion   (3 words in the first example)" in out
    assert "1 unusable rows skipped" in out and "1 read: as data.sft" in out
    with pytest.raises(DataError, match="a.jsonl:1: prompt is missing or null"):
        data_command.main([str(source)])
    assert "layout  prompt/response" in capsys.readouterr().out
    open_turn, longer = {"messages": [user("a")]}, {"messages": [user("b"), assistant("c d")]}
    out = shown(capsys, jsonl(source, [open_turn, MESSAGES, longer]), "--data.invalid", "skip")
    assert "response  ← messages, the last" in out and "2 read: as data.sft 2 to train on" in out
    assert "a.jsonl:1: no response or chosen" in out
    out = shown(capsys, jsonl(source, [MESSAGES, open_turn, open_turn]))
    assert "3 read: as data.prompts" in out
    with pytest.raises(DataError, match="a.jsonl:1: empty response: response is ''"):
        data_command.main([str(jsonl(source, [ANSWER | {"response": ""}])), "--data.invalid", "skip"])


def test_a_demonstration_without_a_response_is_unusable(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", [MESSAGES, {"messages": [user("open")]}, MESSAGES])
    data = RunData(DataConfig(sft=str(source), invalid="skip", held_out=0), None, [], print)
    with pytest.warns(UserWarning, match="1 unusable rows skipped, the first: .*a.jsonl:2: no response or chosen"):
        assert [example.response for example in data.sft_examples] == ["blue"]
    with pytest.raises(DataError, match="a.jsonl:2: no response or chosen; this stage needs it: remove the row"):
        RunData(DataConfig(sft=str(source)), None, [], print).sft_examples  # noqa: B018


# Transcripts


TRANSCRIPT = "\n\nHuman: a\nb\n\nAssistant: one\n\ntwo: three\n\nHuman: sky?\n\nAssistant: blue\nor so"
MARKER = re.compile(r"\n\n(Human|Assistant): ")
VARIANTS = {
    "as it is": TRANSCRIPT,
    "CRLF": TRANSCRIPT.replace("\n", "\r\n"),
    "lone CR": TRANSCRIPT.replace("\n", "\r"),
    "nothing before": TRANSCRIPT.lstrip(),
} | {
    f"{marker!a} at markers": MARKER.sub(lambda match, marker=marker: marker.replace("Human", match[1]), TRANSCRIPT)
    for marker in (
        "\r\n\r\nHuman: ",
        "\n\r\nHuman: ",
        "\r\rHuman: ",
        " \n \t\nHuman: ",
        " \r\n \r\n Human :",
        "\n\n \t Human: ",
        "\n\nHuman : ",
        "\n\nHuman\u00a0:",
        "\n\nHuman:",
        "\n\n\n\nHuman: ",
        "\n\nHuman:\n",
    )
}


@pytest.mark.parametrize("name", VARIANTS)
def test_transcripts_with_any_line_ends_and_spaces(tmp_path, name):
    row = {"chosen": VARIANTS[name], "rejected": VARIANTS[name] + "\r\ngreen"}
    (example,) = load_examples(jsonl(tmp_path / "a.jsonl", [row]))
    assert example.prompt == (user("a\nb"), assistant("one\n\ntwo: three"), user("sky?"))
    assert (example.chosen, example.rejected) == ("blue\nor so", "blue\nor so\ngreen")  # every line end is \n
    prompt, _, _ = VARIANTS[name].rpartition("blue")
    (example,) = load_examples(jsonl(tmp_path / "a.jsonl", [{"prompt": prompt, "chosen": "x", "rejected": "y"}]))
    assert example.prompt == (user("a\nb"), assistant("one\n\ntwo: three"), user("sky?")) and example.chosen == "x"
    row = {"prompt": prompt, "response": " x\r\ny\n"}  # the last turn stands in another column
    assert load_examples(jsonl(tmp_path / "a.jsonl", [row]))[0].response == "x\ny"


def test_sides_that_differ_in_line_ends_share_their_prompt(tmp_path):
    row = {"chosen": TRANSCRIPT + "!", "rejected": TRANSCRIPT.replace("\n", "\r\n")}
    assert load_examples(jsonl(tmp_path / "a.jsonl", [row]))[0].rejected == "blue\nor so"
    with open(tmp_path / "a.csv", "w", newline="") as file:  # as a spreadsheet under Windows writes it
        csv.writer(file).writerows([["chosen", "rejected"], [row["rejected"], row["chosen"]]])
    assert len(load_examples(tmp_path / "a.csv")[0].prompt) == 3


@pytest.mark.parametrize(
    "text",
    ["Human: a\nAssistant: b", "Humans: a\n\nAssistant: b", "a\n\nHuman: b\n\nAssistant: c", "Human: a", "Human\n: a"],
)
def test_other_text_is_no_transcript(text):
    assert not is_transcript(text)


def test_a_turn_may_mention_the_markers():
    text = "\n\nHuman: who is Human: and\nAssistant: here?\n\nAssistant: \n\nHumans: are"
    assert transcript_messages(text) == (
        user("who is Human: and\nAssistant: here?"),
        assistant("Humans: are"),
    )


def test_markers_with_spaces_are_text_where_plain_ones_alternate():
    quoted = "\n\nHuman: a\n\nAssistant: b  \n\n  Human: I think"  # as in a response of the HH data
    assert transcript_messages(quoted) == (user("a"), assistant("b  \n\n  Human: I think"))
    mixed = "\n\nHuman: a\n\nAssistant: b\n\n Human: c\n\nAssistant: d"
    assert transcript_messages(mixed) == (user("a"), assistant("b"), user("c"), assistant("d"))


# Messages in text columns


ODD = 'it\'s "so"\n\\n, None } {\t\\ "" é \U0001f600 [True]'
SIDE = [user("sky? " + ODD), assistant("blue " + ODD)]
SPELLINGS = {
    "json": json.dumps,
    "json, indented": lambda messages: json.dumps(messages, indent=2, ensure_ascii=False),
    "python": str,
    "JSON of JSON": lambda messages: json.dumps(json.dumps(messages)),
    "numpy": lambda messages: str(np.array(messages, dtype=object)),  # how pandas writes a column of parquet into csv
}


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("name", SPELLINGS)
def test_messages_in_a_text_column_are_messages(tmp_path, name, suffix):
    def load(row: dict):
        row = {key: SPELLINGS[name](value) if isinstance(value, list) else value for key, value in row.items()}
        path = tmp_path / f"a.{suffix}"
        if suffix == "jsonl":
            jsonl(path, [row])
        elif suffix == "parquet":
            pyarrow.parquet.write_table(pa.Table.from_pylist([row]), path)
        else:
            with open(path, "w", newline="") as file:
                csv.writer(file).writerows([row.keys(), row.values()])
        return load_examples(path)[0]

    prompt, answer, other = SIDE[:1], SIDE[1:], [assistant("green")]
    for row in (
        {"prompt": prompt, "chosen": answer, "rejected": other},
        {"prompt": prompt, "chosen": answer[0]["content"], "rejected": other},
        {"prompt": prompt[0]["content"], "chosen": SIDE, "rejected": prompt + other},
        {"chosen": SIDE, "rejected": prompt + other},
    ):
        example = load(row)
        assert (example.prompt, example.chosen, example.rejected) == (tuple(prompt), answer[0]["content"], "green")
    for row in ({"messages": SIDE}, {"prompt": prompt, "response": answer}, {"prompt": prompt, "completion": answer}):
        example = load(row)
        assert (example.prompt, example.response) == (tuple(prompt), answer[0]["content"])


TEXTS = [
    "[",
    "[1, 2, 3]",
    "[citation needed]",
    '[{"name": "get_weather", "arguments": {"city": "Rome"}}]',
    '[{"role": "admin", "name": "Ann"}]',
    '[{"role": "user"}] and so on',
    '[{"role": "user", "content": "hi"}] is how chat templates take messages.',
    "[{'role': 'user', 'content': 'hi'}] isn't JSON",
    '{"role": "admin", "content": "all", "id": 3}',
    '{"role": "admin", "content": "all"}',
    '"[1, 2]"',
    json.dumps('[{"role": "admin"}]'),
    'Write [{"role": "user", "content": "hi"}]',
]


@pytest.mark.parametrize("text", TEXTS)
def test_text_that_begins_with_a_bracket_stays_text(tmp_path, text):
    (example,) = load_examples(jsonl(tmp_path / "a.jsonl", [{"prompt": text, "chosen": text, "rejected": "b"}]))
    assert (example.prompt, example.chosen) == (text, text)


REFUSED = {
    "cut JSON": (
        json.dumps(SIDE)[:-9],
        "chosen looks like a list of chat messages written as text, but cannot be pars",
    ),
    "cut in a key": ('[{"role": "assistant", "con', "cannot be parsed"),
    "cut Python": (str(SIDE)[:-9], "cannot be parsed"),
    "not a literal": ("[{'role': 'assistant', 'content': array(['a'], dtype=object)}]", "cannot be parsed"),
    "elided": ("[{'role': 'assistant', 'content': 'a'} ... {'role': 'user', 'content': 'b'}]", "cannot be parsed"),
    "deep": ('[{"role": ' + "[" * 100_000, "cannot be parsed"),
    "no comma": ('[{"role": "assistant" "content": "a"}]', "cannot be parsed"),
    "other keys": ('[{"from": "gpt", "value": "a"}]', "a message needs text under 'role' and 'content'"),
    "half a message": ('[{"role": "assistant", "content": "a"}, 3]', "a message needs text under"),
    "not in a list": (
        "{'role': 'assistant', 'content': 'a'}",
        "chosen must be text or a list of chat messages, found dict",
    ),
    "a call, not in a list": (
        '{"role": "assistant", "content": null, "tool_calls": [{"function": {"name": "f"}}]}',
        "chosen must be text or a list of chat messages, found dict",
    ),
    "a user's": (
        '[{"role": "user", "content": "a"}]',
        "chosen must add one assistant message to the prompt, found user",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_messages_that_cannot_be_read_are_refused(tmp_path, name):
    text, message = REFUSED[name]
    source = jsonl(tmp_path / "a.jsonl", [PAIR, PAIR | {"chosen": text}])
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        load_examples(source)
    assert str(caught.value).startswith(f"{source}:2: chosen") and "\n" not in str(caught.value)
    assert outcome(source)[0] == ["1"]


def test_columns_that_are_not_used_may_be_damaged(tmp_path):
    row = ULTRA | {"messages": str(SIDE)[:-9]}
    assert load_examples(jsonl(tmp_path / "a.jsonl", [row]))[0].chosen == "blue"


def test_a_long_conversation_fits_into_a_csv_field(tmp_path):
    messages = [user("x" * 200_000), assistant("a")]  # csv's own limit is 131,072 characters
    with open(tmp_path / "a.csv", "w", newline="") as file:
        csv.writer(file).writerows([["messages"], [json.dumps(messages)]])
    assert load_examples(tmp_path / "a.csv")[0].prompt == tuple(messages[:1])


@pytest.mark.parametrize(
    "text",
    [
        "[{'role': '" + "'\"\\" * 300_000,
        "[{'role': " + "} \n" * 300_000,
        '[{"role": ' + "\\" * 1_000_000,
        "[{" * 300_000,
    ],
)
def test_damaged_messages_take_no_longer_than_their_length(text):
    found = decoded(text, "chosen", "a.jsonl:1")
    assert found == text or "cannot be parsed" in str(found)
