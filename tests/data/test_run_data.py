"""Sources and layouts. RTO_FAST_DATA names a folder with real preference files for the tests that want them."""

import csv
import gzip
import json
import os
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from rto_fast.data.layouts import find_layout
from rto_fast.data.sources import load_examples
from rto_fast.errors import DataError


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def write(path, rows):
    """Rows in the format of the path's suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(rows) if ".json" in path.suffixes else "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".parquet":
        pa.parquet.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


def load(tmp_path, *rows, **options):
    return load_examples(write(tmp_path / "rows.jsonl", rows), **options)


CHAT = [user("hi"), assistant("hello"), user("sky?")]
HH = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: sky?\n\nAssistant:"
PAIR = {"prompt": "sky?", "chosen": "blue", "rejected": "green"}
LAYOUTS = {
    "explicit plain": ("explicit prompt", PAIR, "sky?"),
    "explicit conversational": (
        "explicit prompt",
        {"prompt": CHAT, "chosen": [assistant("blue")], "rejected": [assistant("green")]},
        CHAT,
    ),
    "explicit, messages and text": ("explicit prompt", {"prompt": CHAT, "chosen": "blue", "rejected": "green"}, CHAT),
    "explicit, whole conversations": (
        "explicit prompt",
        {"prompt": CHAT, "chosen": [*CHAT, assistant("blue")], "rejected": [*CHAT, assistant("green")]},
        CHAT,
    ),
    "explicit HH prompt": ("explicit prompt", {"prompt": HH, "chosen": " blue", "rejected": " green\n"}, CHAT),
    "implicit conversational": (
        "implicit prompt",
        {"chosen": [*CHAT, assistant("blue")], "rejected": [*CHAT, assistant("green")]},
        CHAT,
    ),
    "ultrafeedback": (
        "UltraFeedback",
        {
            "prompt": "sky?",
            "prompt_id": "x",
            "chosen": [user("sky?"), assistant("blue")],
            "rejected": [user("sky?"), assistant("green")],
            "messages": [user("sky?"), assistant("blue")],
            "score_chosen": 8.0,
            "score_rejected": 2.0,
        },
        [user("sky?")],
    ),
    "hh": ("HH transcript", {"chosen": HH + " blue", "rejected": HH + " green"}, CHAT),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_preference_layouts(tmp_path, name):
    layout, row, prompt = LAYOUTS[name]
    (example,) = load(tmp_path, row)
    assert find_layout([("row", row)]) == layout
    assert example.prompt == (prompt if isinstance(prompt, str) else tuple(prompt))
    assert (example.chosen, example.rejected, example.response) == ("blue", "green", None)
    assert example.origin == f"{tmp_path}/rows.jsonl:1"
    assert "messages" not in example.extra and ("score_chosen" in example.extra) == (name == "ultrafeedback")


@pytest.mark.parametrize(
    "chosen, rejected, prompt, answers",
    [
        ("The sky is blue.", "The sky is green.", "The sky is", (" blue.", " green.")),
        ("Colour: blueish", "Colour: blue", "Colour:", (" blueish", " blue")),  # whole words, nothing left empty
        ("Q: sky?\nA: x", "Q: sky?\nA: x and y", "Q: sky?\nA:", (" x", " x and y")),
    ],
)
def test_implicit_plain_prompt_ends_with_a_whole_word(tmp_path, chosen, rejected, prompt, answers):
    (example,) = load(tmp_path, {"chosen": chosen, "rejected": rejected})
    assert example.prompt == prompt and (example.chosen, example.rejected) == answers


@pytest.mark.parametrize(
    "row, layout, prompt, response",
    [
        ({"messages": [*CHAT, assistant("blue")]}, "messages", tuple(CHAT), "blue"),
        ({"messages": CHAT}, "messages", tuple(CHAT), None),
        ({"prompt": "sky?", "response": "blue"}, "prompt/response", "sky?", "blue"),
        ({"prompt": CHAT, "completion": [assistant("blue")]}, "prompt/response", tuple(CHAT), "blue"),
        ({"prompt": CHAT, "answer": 3}, "prompt only", tuple(CHAT), None),
        ({"prompt": "sky?", "response": None}, "prompt only", "sky?", None),
    ],
)
def test_other_layouts(tmp_path, row, layout, prompt, response):
    (example,) = load(tmp_path, row)
    assert find_layout([("row", row)]) == layout
    assert (example.prompt, example.response, example.chosen) == (prompt, response, None)
    assert example.extra == ({"answer": 3} if "answer" in row else {})


def test_repeated_speakers_of_a_transcript_are_joined(tmp_path):
    text = "\n\nHuman: a\n\nHuman: b\n\nAssistant: one\n\ntwo: three"
    (example,) = load(tmp_path, {"chosen": text, "rejected": text + "!"})
    assert example.prompt == (user("a\n\nb"),) and example.rejected == "one\n\ntwo: three!"


def test_columns_are_mapped(tmp_path):
    row = {"question": "sky?", "better": "blue", "worse": "green", "prompt": "unused", "id": 7}
    (example,) = load(tmp_path, row, columns={"prompt": "question", "chosen": "better", "rejected": "worse"})
    assert (example.prompt, example.chosen, example.rejected, example.extra) == ("sky?", "blue", "green", {"id": 7})


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz", "a.parquet", "a.csv", "folder/a.jsonl", "folder/b/a.csv"]
)
def test_local_formats(tmp_path, name):
    rows = [{"prompt": f'q{i}\u2028\n, "x"', "chosen": "a", "rejected": "b", "answer": str(i)} for i in range(5)]
    write(tmp_path / name, rows)
    examples = load_examples(str(tmp_path / Path(name).parts[0]))
    assert [(e.prompt, e.chosen, e.extra) for e in examples] == [
        (r["prompt"], "a", {"answer": r["answer"]}) for r in rows
    ]
    line = {".csv": ":6", ".jsonl": ":3", ".jsonl.gz": ":3"}.get("".join(Path(name).suffixes), "[2]")
    assert examples[2].origin == f"{tmp_path / name}{line}"  # each csv row spans two lines


def test_json_file_with_one_object_a_line(tmp_path):
    (tmp_path / "a.json").write_text(
        "\n".join(json.dumps({"prompt": f"q{i}\u2028"}, ensure_ascii=False) for i in range(3))
    )
    assert [e.origin[-2:] for e in load_examples(tmp_path / "a.json")] == [":1", ":2", ":3"]


def test_conversations_in_parquet(tmp_path):
    write(tmp_path / "a.parquet", [{"prompt": CHAT, "chosen": "blue", "rejected": "green"}])
    assert load_examples(tmp_path / "a.parquet")[0].prompt == tuple(CHAT)


def test_splits_of_a_folder(tmp_path):
    for name in ("train-00000-of-00001", "test_0", "test_prefs"):
        write(tmp_path / f"data/{name}.jsonl", [{"prompt": name}])
    write(tmp_path / "dataset_infos.json", [])

    def found(split):
        return [e.prompt for e in load_examples(tmp_path, split=split)]

    assert found("train") == ["train-00000-of-00001"] and found("test") == ["test_0"]
    assert found("test_prefs") == ["test_prefs"]
    with pytest.raises(DataError, match="no data files for split 'validation'; found test_0.jsonl"):
        found("validation")


@pytest.mark.parametrize(
    "split, expected", [("train[:2]", "01"), ("train[80%:]", "89"), ("train[-3:9]", "78"), ("train[9:99]", "9")]
)
def test_ranges_of_a_split(tmp_path, split, expected):
    assert "".join(e.prompt for e in load(tmp_path, *({"prompt": str(i)} for i in range(10)), split=split)) == expected


def test_limit(tmp_path):
    assert len(load(tmp_path, PAIR, PAIR, PAIR, limit=2)) == 2


def test_save_to_disk(tmp_path):
    train, test = (datasets.Dataset.from_list([PAIR | {"prompt": name}] * 4) for name in ("train", "test"))
    train.save_to_disk(tmp_path / "single")
    datasets.DatasetDict(train=train, test=test).save_to_disk(tmp_path / "splits")
    assert load_examples(tmp_path / "single")[3].origin == f"{tmp_path}/single[3]"
    assert [e.prompt for e in load_examples(tmp_path / "splits", split="test[75%:]")] == ["test"]
    for folder, hint in (("single", "a single saved data set"), ("splits", "there are train, test")):
        with pytest.raises(DataError, match=hint):
            load_examples(tmp_path / folder, split="other")


def test_hub_name(monkeypatch):
    def load_dataset(name, config, split):
        assert (name, split) == ("org/name", "test_prefs")
        return datasets.Dataset.from_list([PAIR | {"config": config}] * 4)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_examples("org/name", split="test_prefs", limit=3)[2].origin == "org/name[2]"
    assert load_examples("org/name:de", split="test_prefs[:1]")[0].extra == {"config": "de"}


@pytest.mark.parametrize("error", [ConnectionError, ValueError, datasets.exceptions.DatasetNotFoundError])
def test_hub_failure_is_one_line(monkeypatch, error):
    def load_dataset(*args, **kwargs):
        raise error("no network\nat all")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError) as caught:
        load_examples("org/name")
    assert str(caught.value) == (
        "org/name: no such local file or folder, and the hub did not give split 'train': no network at all; "
        "check the name, the split and the network, or give a local copy"
    )


@pytest.mark.parametrize(
    "source",
    ["missing.jsonl", "./org/name", "/org/name", "../x", "~/x", "a/b/c", "org/name.parquet", "name", "tests/x"],
)
def test_paths_are_never_hub_names(monkeypatch, tmp_path, source):
    monkeypatch.setattr(datasets, "load_dataset", None)
    (tmp_path / "tests").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="no such file or folder"):
        load_examples(source)


def test_embedded(monkeypatch, tmp_path):
    monkeypatch.setattr("rto_fast.data.sources.files", lambda package: tmp_path)
    write(tmp_path / "embedded/world.jsonl.gz", [PAIR])
    assert load_examples("embedded:world")[0].chosen == "blue"
    with pytest.raises(DataError, match="embedded:word: not in this package; there are world"):
        load_examples("embedded:word")


ROW_ERRORS = {
    "columns": ({"question": "q", "answer": "a"}, r"rows.jsonl:1: no known layout in columns question, answer; map"),
    "half a pair": ({"prompt": "q", "chosen": "a"}, "no known layout in columns prompt, chosen"),
    "empty response": (PAIR | {"rejected": " \n"}, r"rows.jsonl:1: empty response: rejected is ' \\n'; remove the row"),
    "empty prompt": (PAIR | {"prompt": ""}, "empty prompt"),
    "no prefix": ({"chosen": "yes", "rejected": "no"}, "share no prompt"),
    "type": (PAIR | {"chosen": 3}, "chosen must be text or a list of chat messages, found int 3"),
    "last turn": (PAIR | {"prompt": [assistant("a")]}, "must be from the user, found assistant"),
    "no messages": (PAIR | {"prompt": []}, "prompt is an empty list"),
    "message": ({"messages": [{"from": "human", "value": "q"}]}, "a message needs text under 'role' and 'content'"),
    "two messages": (PAIR | {"chosen": [user("a"), user("b")], "prompt": [user("c")]}, "one assistant message"),
    "unlike": ({"chosen": [user("q"), assistant("a")], "rejected": "a"}, "but rejected is text; make them alike"),
    "early difference": (
        {"chosen": HH + " blue", "rejected": HH.replace("hello", "hey") + " green"},
        "differ before their last message",
    ),
}


@pytest.mark.parametrize("name", ROW_ERRORS)
def test_row_errors(tmp_path, name):
    row, message = ROW_ERRORS[name]
    with pytest.raises(DataError, match=message) as caught:
        load(tmp_path, row)
    assert "rows.jsonl:1: " in str(caught.value) and "\n" not in str(caught.value)


def test_missing_columns(tmp_path):
    with pytest.raises(DataError, match=r"rows.jsonl:2: rejected is missing or null; found prompt, chosen"):
        load(tmp_path, PAIR, {"prompt": "q", "chosen": "a"})
    with pytest.raises(DataError, match=r"rows.jsonl:1: no column 'question' for prompt; found prompt, chosen"):
        load(tmp_path, PAIR, columns={"prompt": "question"})
    with pytest.raises(DataError, match="columns: 'promt' is not one of prompt, response"):
        load(tmp_path, PAIR, columns={"promt": "question"})


def test_unusable_rows_can_be_skipped(tmp_path):
    with pytest.warns(UserWarning, match=r"2 unusable rows skipped, the first: .*rows.jsonl:2: empty response"):
        examples = load(tmp_path, PAIR, PAIR | {"chosen": ""}, {"prompt": "q"}, PAIR, invalid="skip")
    assert [e.origin[-1] for e in examples] == ["1", "4"]
    with pytest.raises(DataError, match="invalid: 'drop'"):
        load(tmp_path, PAIR, invalid="drop")


FILE_ERRORS = {
    "a.jsonl": (b'{"prompt": "q"}\n\n{"prompt": \n', r"a.jsonl:3: malformed JSON: .* at column 11: '{\"prompt\":'"),
    "b.jsonl": (b'"text"\n', "b.jsonl:1: expected a JSON object with columns, found str"),
    "a.json": (b'[{"prompt": "q"},\n}]', "a.json:2: malformed JSON"),
    "b.json": (b'{"prompt": "q"}\n{"prompt"}', "b.json:2: malformed JSON"),
    "empty.jsonl": (b"", "no examples in split 'train'"),
    "empty.json": (b"[]", "no examples in split 'train'"),
    "empty.csv": (b"prompt\n", "no examples in split 'train'"),
    "a.csv": (b'prompt,chosen,rejected\n"q\n",a,b\nq,a\n', "a.csv:4: the row does not have the 3 fields"),
    "b.csv": (b'prompt\n"q', "b.csv:2: malformed csv"),
    "a.parquet": (b"text", "a.parquet: not a readable parquet file"),
    "a.jsonl.gz": (b"text", "a.jsonl.gz: cannot be read: Not a gzipped file"),
    "b.jsonl.gz": (gzip.compress(b"text" * 99)[:-9], "b.jsonl.gz: cannot be read: Compressed file ended"),
    "latin.jsonl": ('{"prompt": "ü"}'.encode("latin-1"), "latin.jsonl: not UTF-8 text"),
    "a.txt": (b"text", "a.txt: unknown kind of file; expected .jsonl"),
}


@pytest.mark.parametrize("name", FILE_ERRORS)
def test_file_errors(tmp_path, name):
    content, message = FILE_ERRORS[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load_examples(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_other_source_errors(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no data files for split 'train'; found none that ends in .jsonl"):
        load_examples(tmp_path / "empty")
    with pytest.raises(DataError, match="a single file is split 'train', not 'test'; ranges work"):
        load(tmp_path, PAIR, split="test")
    with pytest.raises(DataError, match=r"split: 'train\[1\]' is not like"):
        load(tmp_path, PAIR, split="train[1]")
    with pytest.raises(DataError, match="no examples"):
        load(tmp_path, PAIR, limit=0)


@pytest.mark.skipif("RTO_FAST_DATA" not in os.environ, reason="RTO_FAST_DATA names no folder with real data")
@pytest.mark.parametrize(
    "name", ["hh_helpful", "hh_harmless", "gsm8k_pref", "pandalm", "gsm8k_sft", "arena_hard_prompts"]
)
def test_real_files(name):
    path = Path(os.environ["RTO_FAST_DATA"]) / f"{name}.jsonl.gz"
    examples = load_examples(path)
    with gzip.open(path, "rt") as file:
        rows = [json.loads(line) for line in file]
    assert [(list(e.prompt), e.chosen, e.rejected, e.response) for e in examples] == [
        (row["prompt"], row.get("chosen"), row.get("rejected"), row.get("response")) for row in rows
    ]
    assert [e.extra["id"] for e in examples] == [row["id"] for row in rows]
