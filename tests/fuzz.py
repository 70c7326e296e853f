"""Nasty configurations and command lines, by the thousand: each ends well, or in one line that says what is wrong.

    python -m tests.fuzz [--minutes 5] [--seed 0]

Two kinds of cases take turns. A configuration has random values in random fields, on the command line or in a YAML file; it is
loaded and planned in this process. A command line is a whole command on harmed files, folders and streams, in a fork of this
process, which has imported everything. Whatever the case, these hold:

- The command ends by itself, or at SIGTERM where it was given much to do.
- Its exit code is 0 or 2; 2 comes with one line, without a traceback.
- No control character of a file or an option reaches the terminal.
- No file outside of what the command was told to write has changed.
- No process of it is left.

Exits with 1 if one did not hold. `--only CASE` repeats a case that was printed.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import importlib
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ |= {
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}

import yaml  # noqa: E402

from rto_fast import plan, train  # noqa: E402
from rto_fast.command_line import run_command  # noqa: E402
from rto_fast.config import Config, dump_config, load_config  # noqa: E402
from rto_fast.data.world import preference_rows  # noqa: E402
from rto_fast.errors import UserError  # noqa: E402

SECONDS = 40.0  # in which a command ends, or is asked to; a tiny run takes three
GRACE = 20.0  # seconds from SIGTERM to the end
MEMORY = 16 << 30  # bytes of addresses that a command may have
SAID = 2000  # the longest line that is read as one
STAGES = ("sft", "reward_model", "dpo", "rto")
TINY = [
    "--threads=1", "--data.limit=48", "--data.held_out=4", "--data.cache_dir=null", "--eval.prompts=8",
    "--rollout.max_new_tokens=8", "--sft.batch_size=40", "--dpo.batch_size=4", "--rto.iterations=1",
    "--rto.prompts_per_rollout=8", "--rto.batch_size=4", *(f"--{stage}.max_steps=1" for stage in STAGES[:3]),
]  # fmt: skip
# As YAML writes them; a command line has the same texts, apart from what an argument cannot hold.
VALUES = (
    ".nan nan .inf -.inf inf 0 -0.0 -1 1 2 3.5 0.5 -1000 1e-320 1e308 1e30 9223372036854775807 9223372036854775808 "
    "-9223372036854775809 100000 1e3 true false null ~ '' ' ' [] [2,2] [.nan,.nan] [1] {} {a:b} {prompt:null} 0x10 1_000 "
    "2026-11-26 !!binary 'a:b' auto none embedded default / . .. ./- -dash --seed --help ~/x ~nobody/x /dev/null /dev/full "
    "/dev/zero /proc/self/mem os:system builtins:print json:loads nowhere:f a/b/c 'a b' @ % ${HOME} \u202e \u00e9 \U0001f600"
).split(" ") + ["9" * 5000, "x" * 300, "[" * 2000, "\x1b[31mred", "a\nb", "a\x00b", "\x9b2J", "&a [*a]", "*a", "{" * 50]
KINDS: dict[str, Callable[["Case"], None]] = {}


class Broken(Exception):
    """One of the rules did not hold."""


class Case:
    """What one case may use: random numbers of its own, and a folder.

    Attributes:
        dice: its random numbers.
        folder: empty, its own, and the working directory of its command.
        stage: what was made once, to be copied (`run`, a finished run; `pairs.jsonl`).
        told: what it did, for whoever reads of its failure.
    """

    def __init__(self, seed: str, folder: Path, stage: Path) -> None:
        self.dice, self.folder, self.stage, self.told = random.Random(seed), folder, stage, ""

    def value(self) -> str:
        return self.dice.choice(VALUES)

    def assignments(self, keys: list[str], most: int) -> dict[str, str]:
        chosen = self.dice.sample(keys, self.dice.randint(1, most))
        return {key: self.value() for key in chosen}


def kind(function: Callable[[Case], None]) -> Callable[[Case], None]:
    KINDS[function.__name__] = function
    return function


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


def one_line(error: BaseException) -> None:
    """Raises Broken unless this is how a mistake is told."""
    text = str(error)
    if not text.strip() or "\n" in text or len(text) > SAID:
        raise Broken(f"a mistake of {len(text)} characters in {len(text.splitlines())} lines: {text[:300]!r}")


@kind
def configuration(case: Case) -> None:
    """Random values in random fields: a configuration that can be planned and saved, or one line."""
    values = case.assignments(KEYS, 3)
    if case.dice.random() < 0.5:
        text = document(case.dice, values)
        (case.folder / "run.yaml").write_text(text, encoding="utf-8")
        arguments = ["--config", "run.yaml"]
        case.told = repr(text)
    else:
        arguments = [f"--{key}={value}" for key, value in values.items()]
        case.told = repr(arguments)
    try:
        config = load_config(arguments)
    except UserError as error:
        one_line(error)
        return
    (case.folder / "again.yaml").write_text(dump_config(config))
    if dump_config(load_config(["--config", "again.yaml"])) != dump_config(config):
        raise Broken("the saved configuration reads back as another one")
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            plan.main([*arguments, "--gpus", "8xH200"])
    except UserError as error:
        one_line(error)


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


def digest(folder: Path) -> dict[str, str]:
    """{path below the folder: hash of what is there}."""
    found = {}
    for path in sorted(folder.rglob("*")):
        what = os.readlink(path).encode() if path.is_symlink() else path.read_bytes() if path.is_file() else b"folder"
        found[str(path.relative_to(folder))] = hashlib.sha256(what).hexdigest()
    return found


def streams(dice: random.Random, output: Path) -> tuple[str, Callable[[], None]]:
    """(name, what a fork calls to get its standard output and error)."""

    def open_at(path: str | Path, *descriptors: int) -> None:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for descriptor in descriptors:
            os.dup2(file, descriptor)

    def broken_pipe() -> None:
        reader, writer = os.pipe()
        os.dup2(writer, 1)
        os.close(reader)
        os.close(writer)

    def wrapped(encoding: str) -> None:
        sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), encoding=encoding, line_buffering=True)
        sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), encoding=encoding, line_buffering=True)

    def closed() -> None:
        os.close(1)
        sys.stdout = None  # type: ignore[assignment]  # as Python itself starts with `>&-`

    encoding = dice.choice(["utf-8", "utf-8", "ascii", "latin-1"])
    special = {"broken pipe": broken_pipe, "full": lambda: open_at("/dev/full", 1), "closed": closed}
    name = dice.choice([encoding] * 4 + list(special))

    def connect() -> None:
        open_at(output, 1, 2)
        special.get(name, lambda: None)()
        wrapped(encoding)
        if name == "closed":
            closed()

    return name, connect


def entry(module: str) -> Callable[[], None]:
    """What `python -m MODULE` calls."""
    imported = importlib.import_module(module)
    return importlib.import_module(f"{module}.__main__" if hasattr(imported, "__path__") else module).command


def command(case: Case, module: str, arguments: list[str]) -> None:
    """Runs `python -m MODULE ARGUMENTS` in a fork, and checks the rules."""
    output = case.folder.parent / "output.txt"
    output.unlink(missing_ok=True)
    name, connect = streams(case.dice, output)
    case.told += f" in {case.folder}: python -m {module} {arguments!r}, output: {name}"
    precious = case.folder.parent / "precious"
    before = digest(precious)
    code, asked = _fork(case.folder, module, arguments, connect)
    said = output.read_text(errors="replace") if output.exists() else ""
    _check(code, asked, name, said)
    if digest(precious) != before:
        raise Broken("files of others have changed")


def _fork(folder: Path, module: str, arguments: list[str], connect: Callable[[], None]) -> tuple[int, bool]:
    """(exit code, whether it had to be asked to end)."""
    sys.stdout.flush()
    process = os.fork()
    if not process:
        code = 1
        try:
            os.setsid()
            os.chdir(folder)
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            connect()
            sys.argv = [module, *arguments]
            entry(module)()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        except BaseException:
            traceback.print_exc()
        finally:
            for stream in filter(None, (sys.stdout, sys.stderr)):
                try:
                    stream.flush()
                except (OSError, ValueError):
                    code = 120  # as Python ends then
            os._exit(code)
    asked = not _wait(process, SECONDS)
    if asked:
        os.kill(process, signal.SIGTERM)
        if not _wait(process, GRACE):
            os.killpg(process, signal.SIGKILL)
            os.waitpid(process, 0)
            raise Broken(f"did not end within {SECONDS:.0f} s, nor {GRACE:.0f} s after SIGTERM")
    _, status = os.waitpid(process, 0)
    _nobody_left(process)
    return os.waitstatus_to_exitcode(status), asked


def _wait(process: int, seconds: float) -> bool:
    """Whether it ends within that time; its status is left to be read."""
    end = time.monotonic() + seconds
    while os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def _nobody_left(group: int) -> None:
    end = time.monotonic() + 2.0
    while time.monotonic() < end:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.02)
    os.killpg(group, signal.SIGKILL)
    raise Broken("a process of it is left")


def _check(code: int, asked: bool, stream: str, said: str) -> None:
    if "Traceback" in said or "Exception ignored" in said:
        raise Broken("a traceback: " + said[-1500:])
    if code not in (0, 2) and not (stream in ("broken pipe", "full") and code in (120, 141)):
        raise Broken(f"exit code {code}: {said[-500:]}")
    if found := re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1a\x1c-\x1f\x7f-\x9f\u202a-\u202e]|\x1b(?!\[[0-9;]*[mK])", said):
        raise Broken(f"the control character {found[0]!r} was printed: {said[max(0, found.start() - 100) :][:300]!r}")
    if code == 2 and not any(0 < len(line) < SAID for line in said.splitlines()[-1:]):
        raise Broken(f"exit code 2 without one line that says why: {said[-SAID:]!r}")


def _names(case: Case) -> str:
    """A path that a command may be told to write to."""
    (case.folder / "file").write_text("old\n")
    (case.folder / "folder").mkdir(exist_ok=True)
    for link, target in (("link", "file"), ("device", "/dev/null"), ("full", "/dev/full"), ("away", "nowhere")):
        with contextlib.suppress(FileExistsError):
            (case.folder / link).symlink_to(target)
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
    return case.dice.choice([*names, "x" * 300, "", ".", "/", "file/x", "a\0b", "~nobody/x", "\udcff"])


def _run(case: Case) -> Path:
    return Path(shutil.copytree(case.stage / "run", case.folder / "run", symlinks=True))


def _harmed_run(case: Case) -> Path:
    """A copy of the finished run, a file or two of it harmed."""
    run = _run(case)
    for _ in range(case.dice.randint(1, 2)):
        files = [path for path in sorted(run.rglob("*")) if path.is_file() and not path.is_symlink()]
        case.told += f" {damage(case.dice, case.dice.choice(files))};"
    return run


@kind
def training(case: Case) -> None:
    """A tiny run with nasty values, into a nasty folder."""
    values = case.assignments(KEYS, 2)
    folder = _names(case) if case.dice.random() < 0.3 else "out"
    arguments = [*TINY, f"--output_dir={folder}", *(f"--{key}={value}" for key, value in values.items())]
    command(case, "rto_fast.train", arguments)


@kind
def harmed_data(case: Case) -> None:
    """A tiny run, or a look, at a harmed file."""
    suffix = case.dice.choice([".jsonl", ".json", ".csv", ".parquet", ".jsonl.gz", ".txt", ""])
    path = case.folder / f"\x1b[1mpairs{suffix}"
    shutil.copy(case.stage / "pairs.jsonl", path)
    case.told = damage(case.dice, path)
    if case.dice.random() < 0.7:
        command(case, "rto_fast.data", [str(path), "--data.cache_dir=null", f"--examples={case.dice.choice([0, 2])}"])
    else:
        command(case, "rto_fast.train", [*TINY, "--output_dir=out", f"--data.preferences={path}"])


@kind
def resuming(case: Case) -> None:
    """A finished or unfinished run goes on with harmed files, and with links where its folders were."""
    run = _harmed_run(case)
    if case.dice.random() < 0.5:  # as if it had not finished
        for name in case.dice.sample(["rto", "dpo", "rto_critic", "reward_model"], 2):
            shutil.rmtree(run / name, ignore_errors=True)
    if case.dice.random() < 0.5:
        name = case.dice.choice(["checkpoints", "tensorboard", "rto", "sft"])
        shutil.rmtree(run / name, ignore_errors=True)
        with contextlib.suppress(FileExistsError):
            (run / name).symlink_to(case.folder.parent / "precious")
    command(case, "rto_fast.train", ["--resume", "run"])


@kind
def reporting(case: Case) -> None:
    run = _harmed_run(case)
    more = ["--output", _names(case)] if case.dice.random() < 0.6 else []
    command(case, "rto_fast.report", [run.name, *more])


@kind
def pushing(case: Case) -> None:
    run = _harmed_run(case)
    repo = case.dice.choice(["me/model", "me", "a/b/c", case.value()])
    command(case, "rto_fast.push", [run.name, f"--repo={repo}", "--dry_run"])


@kind
def planning(case: Case) -> None:
    options = {"gpus": "8xH200 cpu 0xH200 -1xH200 8xx 9999999999999xH100 x 1x".split(), "examples": "0 -1 x 10".split()}
    arguments = [f"--{key}={case.dice.choice([*values, case.value()])}" for key, values in options.items()]
    arguments = case.dice.sample(arguments, case.dice.randint(0, 2))
    arguments += [f"--{key}={value}" for key, value in case.assignments(KEYS, 2).items()]
    command(case, "rto_fast.plan", arguments)


@kind
def evaluating(case: Case) -> None:
    """A model of a run, harmed or not, with nasty options."""
    run = _harmed_run(case) if case.dice.random() < 0.7 else _run(case)
    keys = "data prompts reward reward_model reference preferences held_out dpo_model rollout.max_new_tokens seed show".split()
    keys += "columns limit tokenizer threads micro_batch_tokens max_prompt_tokens rollout.temperature".split()
    given = {
        "model": f"{run.name}/sft",
        "prompts": "embedded:eval_prompts",
        "limit": "4",
        "rollout.max_new_tokens": "4",
    }
    given |= {"reward": "rto_fast.data.world:gold_reward", "output": _names(case), "threads": "1"}
    given |= case.assignments(keys, 2)
    command(case, "rto_fast.evaluate", [f"--{key}={value}" for key, value in given.items()])


def prepare(stage: Path) -> None:
    """Imports everything, and makes what cases copy."""
    for module in ("train", "evaluate", "report", "push", "plan", "data"):
        entry(f"rto_fast.{module}")
    rows = preference_rows(40, seed=3)
    (stage / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with contextlib.redirect_stdout(io.StringIO()):
        train.main([*TINY, f"--output_dir={stage / 'run'}"])


def try_case(name: str, folder: Path) -> str:
    """One case, in an empty folder beside `precious`; returns what did not hold, or nothing."""
    place = folder / "case"
    shutil.rmtree(place, ignore_errors=True)
    (place / "here").mkdir(parents=True)
    (place / "precious" / "checkpoints" / "step_000001").mkdir(parents=True)
    (place / "precious" / "checkpoints" / "step_000001" / "thesis.txt").write_text("years of work\n")
    case = Case(name, place / "here", folder)
    old = Path.cwd()
    os.chdir(case.folder)
    try:
        KINDS[name.split(":")[0]](case)
    except Broken as reason:
        return f"{case.told}\n    {reason}"
    except Exception:
        return f"{case.told}\n    " + traceback.format_exc()[-2500:]
    finally:
        os.chdir(old)
    return ""


def main(arguments: list[str] | None = None) -> int:
    """Returns how many cases broke a rule."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="See the top of this file.")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", metavar="CASE", help="one case, such as training:0:17")
    options = parser.parse_args(arguments)
    tried: Counter[str] = Counter()
    broken: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as temporary:
        folder = Path(temporary)
        prepare(folder)
        started, number = time.monotonic(), 0
        dice = random.Random(options.seed)
        while time.monotonic() - started < 60 * options.minutes and not (options.only and number):
            # A configuration takes milliseconds, a command seconds.
            what = "configuration" if number % 40 else dice.choice([name for name in KINDS if name != "configuration"])
            name = options.only or f"{what}:{options.seed}:{number}"
            number += 1
            tried[name.split(":")[0]] += 1
            if reason := try_case(name, folder):
                broken[name.split(":")[0]] += 1
                print(f"\n{name}: {reason}", flush=True)
    for name, count in tried.items():
        print(f"{name:<14}  {count:>6} tried  {broken[name]:>4} broken")
    print(f"tried {tried.total()}, broken {broken.total()}")
    return broken.total()


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
