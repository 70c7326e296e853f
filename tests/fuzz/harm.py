"""What cases are made of: nasty values, nasty documents, harmed files, and names that an output should not have."""

import contextlib
import dataclasses
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rto_fast.config import Config

# As YAML writes them; a command line has the same texts, apart from what an argument cannot hold.
VALUES = (
    ".nan nan .inf -.inf inf 0 -0.0 -1 1 2 3.5 0.5 -1000 1e-320 1e308 1e30 9223372036854775807 9223372036854775808 "
    "-9223372036854775809 100000 1e3 true false null ~ '' ' ' [] [2,2] [.nan,.nan] [1] {} {a:b} {prompt:null} 0x10 1_000 "
    "2026-11-26 !!binary 'a:b' auto none embedded default / . .. ./- -dash --seed --help ~/x ~nobody/x /dev/null /dev/full "
    "/dev/zero /proc/self/mem os:system builtins:print json:loads nowhere:f a/b/c 'a b' @ % ${HOME} \u202e \u00e9 \U0001f600"
).split(" ") + ["9" * 5000, "x" * 300, "[" * 2000, "\x1b[31mred", "a\nb", "a\x00b", "\x9b2J", "&a [*a]", "*a", "{" * 50]


def leaves(cls: type, prefix: str = "") -> Iterator[str]:
    """Every key of a configuration that is no section."""
    for field in dataclasses.fields(cls):
        if isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
            yield from leaves(field.type, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


KEYS = list(leaves(Config))


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
        ]
        text += dice.choice(extra) + "\n"
    if dice.random() < 0.1:
        text = text[: dice.randrange(len(text))]
    return text


def damage(dice: random.Random, path: Path) -> str:
    """Harms a file as disks, editors and strangers do; returns how."""
    content = path.read_bytes() if path.is_file() else b""
    how = dice.choice(
        ("bytes", "cut", "empty", "noise", "json", "folder", "gone", "null", "dangling", "repeat", "escape")
    )
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
    else:
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
    """One value in a JSON text (or in one line of it) is another."""
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
    """A path that a command may be told to write to."""
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
