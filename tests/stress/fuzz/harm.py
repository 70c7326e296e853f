"""The ingredients of cases: nasty values and documents, damaged files, and names that an output should not have."""

import contextlib
import dataclasses
import gzip
import json
import math
import random
import typing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv

from rto_fast.config import Config
from rto_fast.config.fields import Range, fields_of

# As they are written in YAML. The command line uses the same texts, except those that an argument cannot hold.
VALUES = (
    ".nan nan .inf -.inf inf 0 -0.0 -1 1 2 3.5 0.5 -1000 1e-320 1e308 1e30 9223372036854775807 9223372036854775808 "
    "-9223372036854775809 100000 1e3 true false null ~ '' ' ' [] [2,2] [.nan,.nan] [1] {} {a:b} {prompt:null} 0x10 1_000 "
    "2026-11-26 !!binary 'a:b' auto none embedded default / . .. ./- -dash --seed --help ~/x ~nobody/x /dev/null /dev/full "
    "/dev/zero /proc/self/mem os:system builtins:print json:loads nowhere:f a/b/c 'a b' @ % ${HOME} \u202e \u00e9 \U0001f600"
).split(" ") + ["9" * 5000, "x" * 300, "[" * 2000, "\x1b[31mred", "a\nb", "a\x00b", "\x9b2J", "&a [*a]", "*a", "{" * 50]


KEYS = [key for key, hint in fields_of(Config).items() if not dataclasses.is_dataclass(hint)]
# Environment variables that a shell, a container or an earlier launcher leaves behind.
ENVIRONMENTS: list[dict[str, str]] = [
    {"RANK": "1"},
    {"RANK": ""},
    {"WORLD_SIZE": ""},
    {"WORLD_SIZE": "two"},
    {"WORLD_SIZE": "2", "RANK": "7"},
    {"LOCAL_RANK": "-1"},
    {"HOME": "/nonexistent"},
    {"HOME": ""},
    {"COLUMNS": "0"},
    {"COLUMNS": "x"},
    {"TERM": "\x1b"},
    {"TMPDIR": "/nonexistent"},
    {"HF_HOME": "/dev/null"},
    {"TRITON_INTERPRET": "1"},
]


def near_values(key: str) -> list[str]:
    """The choices of a field, or the bounds of its range and values just outside."""
    values: list[str] = []

    def look(hint: Any) -> None:
        if typing.get_origin(hint) is typing.Literal:
            values.extend(map(str, typing.get_args(hint)))
        elif hint is bool:
            values.extend(["true", "false"])
        for rule in getattr(hint, "__metadata__", ()):
            if isinstance(rule, Range):
                ends = [rule.low, rule.high]
                values.extend(map(repr, [*ends, ends[0] - 1, ends[1] + 1, *(math.nextafter(end, 0.5) for end in ends)]))
        for part in typing.get_args(hint) if typing.get_origin(hint) is not typing.Literal else ():
            look(part)

    look(fields_of(Config).get(key))
    return values


def write_data(rows: list[dict], stage: Path) -> None:
    """Writes preference pairs in every format into `stage`/data."""
    folder = stage / "data"
    folder.mkdir()
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "pairs.jsonl").write_text(lines)
    (folder / "pairs.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (folder / "pairs.json").write_text(json.dumps(rows))
    (folder / "texts.txt").write_text("".join(f"{row['prompt']}\n" for row in rows))
    (folder / "none").write_text(lines)
    chats = [
        {
            name: [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[name]}]
            for name in ("chosen", "rejected")
        }
        for row in rows
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    for name, table in (("pairs", rows), ("chats", chats)):
        pq.write_table(pa.Table.from_pylist(table), folder / f"{name}.parquet")
    csv.write_csv(
        pa.Table.from_pylist([{name: str(value) for name, value in row.items()} for row in rows]), folder / "pairs.csv"
    )


def document(dice: random.Random, values: dict[str, str]) -> str:
    """A YAML file with these values, sometimes one that no careful person would write."""
    sections: dict[str, list[str]] = {}
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        sections.setdefault(section, []).append(f"{name}: {value}")
    lines = sections.pop("", [])
    for section, entries in sections.items():
        lines += [f"{section}:", *(f"  {entry}" for entry in entries)]
    text = "\n".join(["model:", "  path: embedded", "data:", "  preferences: embedded:preferences", *lines]) + "\n"
    if dice.random() < 0.3:
        extra = [
            "rto:",
            "rto:\n  kl_coef: 0.1",
            "? [a]\n: b",
            "---",
            "\t",
            "1: 2",
            "seed: &a 3\nthreads: *a",
            "...",
            "null: 1",
            "<<: {seed: 1}\n<<: {seed: 2}",
            "seed: !" + "x" * 3000,
            "seed: *" + "x" * 3000,
            "\ufeffseed: 1",
            "seed: 010",
            "rollout: {vllm: {a: '1e3', '1e3': [1:30, ~, '~', \"\\e[2J\"]}}",
            "%YAML 9.9",
            "rto.lr: 0.1",
            "seed: !!int ''",
        ]
        text += dice.choice(extra) + "\n"
    if dice.random() < 0.1:
        text = text[: dice.randrange(len(text))]
    return text.replace("\n", dice.choice(["\n"] * 7 + ["\r\n", "\r", "\x85"]))


def damage(dice: random.Random, path: Path) -> str:
    """Damages a file as disks, editors and other programs do; returns a description."""
    content = path.read_bytes() if path.is_file() else b""
    how = dice.choice("bytes cut empty noise json folder gone null dangling repeat escape unharmed".split())
    if how == "bytes" and content:
        array = bytearray(content)
        for _ in range(dice.randint(1, 8)):
            array[dice.randrange(len(array))] = dice.randrange(256)
        path.write_bytes(array)
    elif how == "cut":
        path.write_bytes(content[: dice.randint(0, len(content))])
    elif how == "noise":
        path.write_bytes(dice.randbytes(dice.choice([1, 100, 5000])))
    elif how == "json":
        path.write_text(_mutated(dice, content))
    elif how == "repeat":
        path.write_bytes(content * 2)
    elif how == "escape":
        path.write_bytes(content.replace(b"e", b"\\u001b[2J", dice.randint(1, 5)))
    elif how != "unharmed":
        path.unlink(missing_ok=True)
        if how == "folder":
            path.mkdir()
        elif how == "null":
            path.symlink_to("/dev/null")
        elif how == "dangling":
            path.symlink_to("nowhere")
        elif how != "gone":
            path.touch()
    return f"{how} {path.name}"


def _mutated(dice: random.Random, content: bytes) -> str:
    """Replaces one value in a JSON text (or in one line of it)."""
    lines = content.decode(errors="replace").splitlines() or [""]
    with contextlib.suppress(ValueError):
        return json.dumps(_replaced(dice, json.loads("\n".join(lines))))
    number = dice.randrange(len(lines))
    with contextlib.suppress(ValueError):
        lines[number] = json.dumps(_replaced(dice, json.loads(lines[number])))
    return "\n".join(lines) + "\n"


def _replaced(dice: random.Random, tree: Any) -> Any:
    if isinstance(tree, dict | list) and tree and dice.random() < 0.85:
        key = dice.choice(list(tree) if isinstance(tree, dict) else range(len(tree)))
        tree[key] = _replaced(dice, tree[key])
        return tree
    nasty = [None, True, -1, 0, 2**63, 10**30, 1e308, float("nan"), float("inf"), "", "x", "\x1b[2J", "../../x", "a\0b"]
    return dice.choice([*nasty, [], {}, [[]], {"a": None}, "9" * 100])


def output_name(dice: random.Random, folder: Path) -> str:
    """A path that may be given to a command as its output."""
    (folder / "file").write_text("old\n")
    (folder / "folder").mkdir(exist_ok=True)
    for link, target in (("link", "file"), ("device", "/dev/null"), ("full", "/dev/full"), ("away", "nowhere")):
        with contextlib.suppress(FileExistsError):
            (folder / link).symlink_to(target)
    names = [
        "file",
        "folder",
        "link",
        "device",
        "full",
        "away",
        "/dev/null",
        "a/b/c",
        "a b",
        "-a",
        "\x1b[31mx",
        "a\nb",
        "é",
    ]
    return dice.choice([*names, "x" * 300, "", ".", "/", "file/x", "a\0b", "~nobody/x", "\udcff"])
