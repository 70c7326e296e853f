"""`python -m rto_fast.data`, streaming, and bad data through real command lines."""

import gzip
import json
import os
import re
import subprocess
import sys
import time
import warnings

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from rto_fast.config.options import parse
from rto_fast.data import __main__ as data_command
from rto_fast.data import sources
from rto_fast.data.look import Page, histogram
from rto_fast.data.sources import load_examples
from rto_fast.data.world import build_tokenizer
from rto_fast.errors import ConfigError, DataError, UserError
from rto_fast.system.terminal import visible, wants_styles
from tests.data.rows import LINE, PAIR, jsonl, world


@pytest.fixture
def tokenizer_folder(tmp_path):
    build_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


def shown(capsys, *arguments):
    data_command.main([str(argument) for argument in arguments])
    return capsys.readouterr().out


# What the command shows


def test_the_embedded_world_is_shown_as_tokens(capsys):
    out = shown(capsys, "embedded:preferences", "--data.limit", 100)
    assert "layout  explicit prompt" in out and re.search(r"chosen +← chosen +\(\d+ words", out)
    assert "100 read: as data.preferences 90 to train on, 10 held out" in out and "no exact duplicates" in out
    assert "lengths in tokens" in out and "nothing cut" in out and "█" in out
    assert out.count("── ") == 3 and "<user> " in out and "⟦" in out and "<eos>⟧" in out
    assert "\x1b" not in out  # capsys is no terminal


def test_without_a_tokenizer_roles_and_words_are_shown(capsys, tmp_path):
    row = {"prompt": [{"role": "user", "content": "sky?"}], "completion": "blue and so on", "answer": 3}
    out = shown(capsys, jsonl(tmp_path / "a.jsonl", [row] * 2 + [row | {"completion": "blue"}]), "--examples", 1)
    assert "prompt/response" in out and "response  ← completion   (4 words" in out and "1 message" in out
    assert "for reward functions: answer" in out and "3 read: as data.sft 2 to train on" in out
    assert "exact duplicates dropped: 1" in out and "prompts with more than one example: 1" in out
    assert "lengths in words" in out and "--tokenizer DIR" in out
    assert "user: sky?\nresponse: ⟦blue and so on⟧" in out and out.count("── ") == 1


def test_what_the_limits_cut_is_shown(capsys, tmp_path):
    options = ["--tokenizer", "embedded", "--data.max_response_tokens", 20, "--data.max_prompt_tokens", 32]
    out = shown(capsys, world(tmp_path / "a.jsonl"), *options, "--data.cache_dir", tmp_path / "cache")
    assert re.search(r"limit +32 \(\d+ over\) +20 \(\d+ over\)", out)
    assert re.search(r"preferences: a.jsonl: 180 examples, \d+ prompts dropped \(> 32 tokens\), \d+ responses cut", out)
    assert "(cut: no end token)" in out


def test_a_source_may_hold_prompts_or_messages(capsys, tmp_path):
    assert "as data.prompts 9 to train on, 1 held out" in shown(
        capsys, jsonl(tmp_path / "p.jsonl", [{"prompt": f"{i} red cup"} for i in range(10)]), "--tokenizer", "embedded"
    )
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    out = shown(capsys, jsonl(tmp_path / "m.jsonl", [{"messages": messages}]))
    assert "layout  messages" in out and "response  ← messages, the last" in out


def test_a_split_and_mapped_columns(capsys, tmp_path):
    source = jsonl(tmp_path / "a.jsonl", [{"q": str(i), "a": "b"} for i in range(10)])
    columns = '{"prompt": "q", "response": "a"}'
    out = shown(capsys, f"{source}[train[:4]]", "--data.columns", columns)
    assert "prompt    ← q" in out and "4 read: as data.sft" in out
    assert "6 read: as data.sft" in shown(capsys, f"{source}[train[40%:]]", "--data.columns", columns)


def test_colours_only_on_a_terminal_and_never_with_no_color(monkeypatch):
    class Terminal:
        def isatty(self):
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert not wants_styles()
    monkeypatch.setattr("sys.stdout", Terminal())
    assert wants_styles()
    monkeypatch.setenv("NO_COLOR", "1")
    assert not wants_styles()
    assert Page(True).paint("a\n\nb", "loss") == "\x1b[32ma\x1b[0m\n\n\x1b[32mb\x1b[0m"
    assert Page(False).paint("a", "loss") == "⟦a⟧" and Page(False).paint("a", "context") == "a"


def test_data_cannot_command_the_terminal(capsys, tmp_path):
    evil = "\x1b]0;title\x07\x1b[2Jblue\r\u202eabc\x9b1m"
    row = {"prompt": evil, "chosen": evil, "rejected": "green", "col\x1b[2J": 1}
    out = shown(capsys, jsonl(tmp_path / "a.jsonl", [row]))
    assert not set(out) & set("\x1b\x07\r\u202e\x9b") and "\\x1b[2J" in out
    assert visible("a\tb\nü 漢 \U0001f600") == "a\tb\nü 漢 \U0001f600"


def test_histogram():
    lines = histogram({"a": [1, 9, 9, 9, 40], "b": [20]}, {"a": 10, "b": 30})
    assert [line.split()[0] for line in lines[1:5]] == ["0–7", "8–15", "16–31", "32–63"]
    assert lines[2].split()[1:] == ["█" * 16, "3"] and "10 (1 over)" in lines[-1] and "30 (0 over)" in lines[-1]
    assert histogram({"a": []})[-1].split() == ["longest", "0"]


def test_responses_that_are_not_read_are_mentioned(capsys, tmp_path):
    source = jsonl(tmp_path / "a.jsonl", [{"prompt": "q"}, PAIR, {"prompt": "r", "response": "s"}])
    assert "note: " + source + ": the responses of 2 rows are not read, the first" in shown(capsys, source)
    tools = [{"type": "function", "function": {"name": "weather"}}]
    source = jsonl(tmp_path / "a.jsonl", [{"prompt": "q", "tools": tools}])
    assert "not read" not in shown(capsys, source)  # they are no response


# Reading no more than is needed


def test_a_limit_leaves_the_rest_of_a_file_unread(tmp_path):
    (tmp_path / "a.jsonl").write_text(LINE * 3 + "no JSON\n")
    assert len(load_examples(tmp_path / "a.jsonl", limit=3)) == 3
    assert len(load_examples(tmp_path / "a.jsonl", split="train[:2]")) == 2
    with pytest.raises(DataError, match="a.jsonl:4: malformed JSON"):
        load_examples(tmp_path / "a.jsonl")


def test_a_hub_data_set_is_streamed(tmp_path, monkeypatch):
    read = []

    def rows():
        for i in range(3000):
            read.append(i)
            yield PAIR | {"prompt": str(i)}

    def load_dataset(name, config, split, streaming=False):
        assert streaming and split == "train"
        return datasets.IterableDataset.from_generator(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    examples = load_examples("org/name", limit=5, streaming=True)
    assert [e.prompt for e in examples] == list("01234") and examples[4].origin == "org/name[4]"
    assert read == list(range(1000))  # the rows that tell the layout, once each
    read.clear()
    assert load_examples("org/name", limit=1005, streaming=True)[-1].prompt == "1004" and read == list(range(1005))
    assert [e.prompt for e in load_examples("org/name", split="train[2:4]", streaming=True)] == ["2", "3"]
    with pytest.raises(DataError, match="a stream does not tell"):
        load_examples("org/name", split="train[90%:]", streaming=True)
    with pytest.raises(ConfigError, match="data.limit: expected a number with data.streaming"):
        parse(data_command.InspectConfig, ["org/name", "--data.streaming", "true"], data_command.INSPECT)


def test_a_stream_that_breaks_off_is_one_line(monkeypatch):
    class Broken:
        def __iter__(self):
            yield PAIR
            raise ConnectionError("gone\nfor good")

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: Broken())
    with pytest.raises(
        DataError, match="org/name: .* the hub did not give split 'train': gone for good; check the name"
    ):
        load_examples("org/name", limit=5, streaming=True)


# Bad input


def bomb(path, content=b"x" * 2**20, times=8):
    path.write_bytes(b"".join([gzip.compress(content)] * times))
    return path


BAD = {
    "malformed line": (LINE + '{"prompt": "q", \n', "a.jsonl:2: malformed JSON: "),
    "deep": ("[" * 100000, "a.jsonl:1: JSON that cannot be read"),
    "digits": ('{"prompt": ' + "9" * 5000 + "}", "a.jsonl:1: JSON that cannot be read"),
    "empty": ("", "a.jsonl: no examples in split 'train': it is empty; give other data, or another split"),
    "missing column": (json.dumps({"question": "q"}), "no known layout in columns question; map them with columns"),
    "missing value": (LINE + json.dumps(PAIR | {"chosen": None}), "a.jsonl:2: chosen is missing or null"),
    "empty response": (LINE + json.dumps(PAIR | {"chosen": ""}), "a.jsonl:2: empty response: chosen is ''; remove"),
    "surrogate": (json.dumps(PAIR | {"chosen": "\ud800"}), "a.jsonl:1: chosen holds half of a surrogate pair"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_end_in_one_line(tmp_path, monkeypatch, capsys, name):
    text, message = BAD[name]
    (tmp_path / "a.jsonl").write_text(text)
    monkeypatch.setattr(sys, "argv", ["data", str(tmp_path / "a.jsonl")])
    with pytest.raises(SystemExit) as stop:
        data_command.command()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("rto_fast: ") and message in error and error.count("\n") == 1


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.parquet"])
def test_a_decompression_bomb_is_refused(tmp_path, name):
    path = tmp_path / name
    if path.suffix == ".parquet":
        rows = [PAIR | {"prompt": "x" * 100_000}] * 80
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)  # one string, kept once
        assert path.stat().st_size < 300_000
    else:
        bomb(path)
        assert path.stat().st_size < 20_000
    with pytest.raises(DataError, match="unpacks to more than 0.004 GiB; raise data.max_unpacked_gib if that is meant"):
        load_examples(path, max_unpacked_gib=0.004)


def test_a_line_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("rto_fast.data.files.LONGEST_ROW", 2**20)
    with pytest.raises(DataError, match="a.jsonl.gz:1: a line of 1,048,576 characters or more; write one row a line"):
        load_examples(bomb(tmp_path / "a.jsonl.gz"))


def test_prompts_longer_than_the_budget(tmp_path):
    source = world(tmp_path / "a.jsonl", 20)
    with pytest.raises(UserError, match="18 prompts dropped .*none is left: raise max_prompt_tokens or set overlong"):
        data_command.main([source, "--tokenizer", "embedded", "--data.max_prompt_tokens", "2"])


def test_tokenizers_without_template_or_end(tmp_path, tokenizer_folder, capsys):
    source = world(tmp_path / "a.jsonl", 20)
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "plain")
    out = shown(capsys, source, "--tokenizer", tmp_path / "plain", "--data.prompt_format", "chat")
    assert "note: the tokenizer has no chat template: messages become a 'Human: ... Assistant:' transcript" in out
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "endless")
    with pytest.raises(UserError, match="no stop token: set eos_token of the tokenizer"):
        data_command.main([source, "--tokenizer", str(tmp_path / "endless")])
    with pytest.raises(UserError, match="cannot load a tokenizer from this directory"):
        data_command.main([source, "--tokenizer", str(tmp_path)])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--data.limt", "3"], "unknown key --data.limt; did you mean --data.limit?"),
        (
            ["x.jsonl", "--data.limit", "0"],
            "data.limit: expected a whole number from 1 to 2,147,483,647, or null, got 0",
        ),
        (["x.jsonl", "--data.max_unpacked_gib", "0"], "data.max_unpacked_gib: expected a number above 0"),
        (["x.jsonl", "--data.invalid", "ignore"], "data.invalid"),
        ([], "source"),
    ],
)
def test_mistakes_in_the_options_are_named(arguments, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse(data_command.InspectConfig, arguments, data_command.INSPECT)


def command(*arguments, module="rto_fast.data", **environment):
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | environment,
    )
    assert time.monotonic() - started < 60
    return done


def assert_refused(done, message):
    assert done.returncode == 2 and done.stderr.startswith("rto_fast: ") and done.stderr.count("\n") == 1, done.stderr
    assert message in done.stderr


def test_the_command_line(tmp_path):
    source = world(tmp_path / "a.jsonl")
    done = command(
        source, "--tokenizer", "embedded", "--data.cache_dir", tmp_path / "cache", LC_ALL="C", PYTHONUTF8="0"
    )
    assert done.returncode == 0 and "explicit prompt" in done.stdout and "<eos>" in done.stdout, done.stderr
    (tmp_path / "b.jsonl").write_text(LINE + "{")
    assert_refused(command(tmp_path / "b.jsonl"), "b.jsonl:2: malformed JSON")


def test_a_hub_name_without_network():
    assert_refused(
        command("nobody/nothing", HF_HUB_OFFLINE="1"), "nobody/nothing: no such local file or folder, and the hub"
    )


@pytest.mark.skipif("RTO_FAST_DATA" not in os.environ, reason="RTO_FAST_DATA names no folder with real data")
@pytest.mark.skipif("RTO_FAST_SMOLLM2" not in os.environ, reason="RTO_FAST_SMOLLM2 names no tokenizer")
def test_real_data_with_a_real_tokenizer(capsys, tmp_path):
    source, cache = f"{os.environ['RTO_FAST_DATA']}/hh_helpful.jsonl.gz", tmp_path / "cache"
    options = [source, "--tokenizer", os.environ["RTO_FAST_SMOLLM2"], "--data.cache_dir", cache]
    first = shown(capsys, *options)
    assert "<|im_start|>assistant\n" in first and "<|im_end|>⟧" in first and list(cache.iterdir())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert shown(capsys, *options) == first


def test_a_command_that_reads_for_long_says_so(tmp_path, monkeypatch, capsys):
    source, read = world(tmp_path / "a.jsonl", 30), sources.read_rows

    def slowly(*arguments):
        for number, row in enumerate(read(*arguments)):
            time.sleep(6.0 * (number == 20))
            yield row

    monkeypatch.setattr(sources, "read_rows", slowly)
    monkeypatch.setattr(sources, "WINDOW", 10)
    monkeypatch.setattr(sys, "argv", ["data", source, "--data.limit", "40"])
    data_command.command()
    lines = [line for line in capsys.readouterr().err.splitlines() if "a.jsonl: " in line]
    assert re.fullmatch(r"reading .*a\.jsonl: 20 of 40 rows, [56](\.\d)? s, about [56](\.\d)? s left", lines[0])
