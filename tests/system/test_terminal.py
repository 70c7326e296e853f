"""What is printed cannot command the terminal, and what cannot be printed ends no run."""

import ast
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from rto_fast import plan, push, report
from rto_fast.config import DataConfig
from rto_fast.data.run_data import RunData
from rto_fast.data.world import build_tokenizer
from rto_fast.reporting.log import RunLog
from tests.embedded_world import preference_rows

ROOT = Path(report.__file__).parent.parent
EVIL = "\x1b]0;title\x07\x1b[2Jblue\r\u202eabc\x9b1m\x7f\u2028\u2066\ud800\x00"
NAME = EVIL[:-2]  # as a file can have it
ACTING = set(EVIL) - set("]0;titleblue[2Jabc1m")
ASCII_LOCALE = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}


def test_text_is_made_visible_and_what_scripts_need_stays():
    from rto_fast.system.terminal import one_line, visible

    assert not set(visible(EVIL)) & ACTING and "\\x1b[2Jblue\\x0d\\u202eabc\\x9b1m\\x7f" in visible(EVIL)
    kept = "a\tb\nü 漢 \U0001f469\u200d\U0001f4bb हिन्\u200dदी \u05e9\u05dc"
    assert visible(kept) == kept and one_line(kept) == kept.replace("\t", "\\t").replace("\n", "\\n")


def test_our_own_styles_are_kept_and_nobody_elses(capsys):
    from rto_fast.system.terminal import Styled, say, styled

    bold = styled(f"a{EVIL}\nb", "1")
    say("x\x1b[0m", bold, "\x1b[0m")
    say(Styled("\n").join(["\x1b[0m", "\x1b[0m" + bold + "\x1b[0m"]))
    say(f"{bold}")  # a style that was lost on the way is spelled out
    out = capsys.readouterr().out
    assert out.count("\x1b[1m") == 4 == out.count("\x1b[0m") and not set(out) & (ACTING - {"\x1b"})


# Who prints, and what prints by itself. `showwarning` and hooks are what `rto_fast.system.terminal` sets.
PRINTING = {"print", "print_exc", "print_exception", "print_stack", "basicConfig", "StreamHandler", "writelines"}
IN_TERMINAL = {"argparse.ArgumentParser", "sys.stdout.write", "sys.stderr.write", "stream.write"}


def printing(node):
    """The name of what prints, or None."""
    if not isinstance(node, ast.Call):
        return None
    name = ast.unparse(node.func)
    ends_with_text = name in ("sys.exit", "SystemExit") and any(
        isinstance(a, ast.JoinedStr) or (isinstance(a, ast.Constant) and isinstance(a.value, str)) for a in node.args
    )
    is_printing = name.rpartition(".")[2] in PRINTING or name in IN_TERMINAL or name == "warnings.warn"
    writes = name == "os.write" and ast.unparse(node.args[0]) in ("1", "2")
    return name if is_printing or ends_with_text or writes else None


def test_one_module_prints():
    found = {}
    for path in [*ROOT.glob("rto_fast/**/*.py"), *ROOT.glob("benchmarks/*.py")]:
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        names = {printing(node) for node in nodes} - {None}
        names |= {n.id for n in nodes if isinstance(n, ast.Name) and n.id == "print"}  # handed on
        if names:
            found[path.relative_to(ROOT).as_posix()] = names
    assert found == {"rto_fast/system/terminal.py": {"stream.write"}, "rto_fast/system/notices.py": {"warnings.warn"}}


def test_names_of_files_and_columns_do_not_command_the_terminal(tmp_path, capsys):
    row = {"prompt": "3 red cup", "chosen": "three red cups", "rejected": "four", NAME: NAME}
    name = f"a\n{NAME}.jsonl"
    (tmp_path / name).write_text(f"{json.dumps(row)}\n" * 40)
    log = RunLog(tmp_path)
    tokenizer = build_tokenizer()
    data = RunData(DataConfig(preferences=str(tmp_path / name)), tokenizer, [tokenizer.eos_token_id], log.say)
    assert data.pair_examples
    log.warning("rto", 1, "name", f"{name} is evil", NAME)
    out = capsys.readouterr().out
    assert not set(out) & ACTING and "exact duplicates dropped: 39" in out
    assert all(line.startswith((str(tmp_path), "preferences", "warning: rto, step 1: ")) for line in out.splitlines())


@pytest.mark.parametrize("command", [report.main, plan.main, push.main])
def test_mistakes_on_the_command_line_are_one_line_without_commands(command, capsys):
    with pytest.raises((SystemExit, ValueError)) as refusal:
        command(["a", "--repo", "b/c", "--private", EVIL, f"--{EVIL}"])
    err = capsys.readouterr().err
    if refusal.type is SystemExit:  # argparse's
        assert refusal.value.code == 2 and err.startswith("rto_fast: ") and err.count("\n") == 1
    assert not set(err) & ACTING


def test_a_stream_that_somebodys_code_has_closed_ends_no_run(tmp_path, monkeypatch):
    for stream in (open(tmp_path / "closed", "w"), open(tmp_path / "ascii", "w", encoding="ascii"), None):
        monkeypatch.setattr("sys.stdout", stream)
        if stream and stream.name.endswith("closed"):
            stream.close()
        log = RunLog(tmp_path)
        log.say("±")
        with log.stage("sft", 1) as stage:
            stage.step({"loss": 1.0}, show=("loss",))
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


# A command, and how its streams may end. `{}`: what it does.
COMMAND = """
import logging, os, subprocess, sys, threading, warnings
from rto_fast.system.command_line import as_command
EVIL = {evil!r}
def main():
    {body}
with as_command({options}):
    main()
"""
PRINTS = """
    for i in range(2000):
        print(i, "± 漢字 \\u202e", EVIL)  # a reward function's
    sys.stderr.write("± 漢字 \\ud800" * 9999)
    subprocess.run(["echo", "a child's"], stderr=subprocess.DEVNULL)
    assert sorted(os.listdir("/proc/self/fd"))[:3] == ["0", "1", "2"]
    with open("done", "w") as file:
        assert file.fileno() > 2
    warnings.warn("a library's " + EVIL)
"""


def start(folder, body, options="", **streams):
    code = COMMAND.format(evil=EVIL, body=body.strip(), options=options)
    environment = ENVIRONMENT | streams.pop("environment", {})
    (folder / "program.py").write_text(code, encoding="utf-8")
    return subprocess.Popen([sys.executable, "program.py"], cwd=folder, env=environment, **streams)


def closed_pipe():
    reading, writing = os.pipe()
    os.close(reading)
    return writing


def closed_socket():
    ours, theirs = socket.socketpair()
    ours.close()
    return theirs.detach()


def gone_terminal():
    ours, theirs = os.openpty()
    os.close(ours)
    return theirs


def full_disk():
    return os.open("/dev/full", os.O_WRONLY)


def read_only():
    return os.open(os.devnull, os.O_RDONLY)


@pytest.mark.parametrize(
    "end", [closed_pipe, closed_socket, gone_terminal, full_disk, read_only], ids=lambda f: f.__name__
)
def test_a_stream_that_cannot_be_written_ends_no_command(end, tmp_path):
    stream = end()
    process = start(tmp_path, PRINTS, stdout=stream, stderr=stream)
    assert process.wait(60) == 0 and (tmp_path / "done").exists()
    process = start(tmp_path, PRINTS, stdout=stream, stderr=subprocess.PIPE, text=True)
    error = process.communicate(timeout=60)[1]
    os.close(stream)
    assert process.returncode == 0 and "Exception ignored" not in error and "Traceback" not in error, error[-2000:]


@pytest.mark.parametrize("closed", [(1,), (2,), (1, 2), (0, 1, 2)], ids=str)
def test_closed_streams_are_no_files_of_the_run(closed, tmp_path):
    process = start(
        tmp_path,
        PRINTS,
        preexec_fn=lambda: [os.close(number) for number in closed],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    assert process.wait(60) == 0 and (tmp_path / "done").read_text() == ""


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "latin-1"},
        {"PYTHONIOENCODING": "ascii", "PYTHONUNBUFFERED": "1"},
        ASCII_LOCALE,
    ],
    ids=["ascii", "latin-1", "unbuffered", "POSIX"],
)
def test_what_an_encoding_lacks_is_spelled(environment, tmp_path):
    body = PRINTS + "    from rto_fast.system.terminal import say\n    say('0.5 ± 0.1', EVIL)\n"
    process = start(tmp_path, body, stdout=subprocess.PIPE, stderr=subprocess.PIPE, environment=environment)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 0, error[-2000:]
    text = out.decode(environment.get("PYTHONIOENCODING", "ascii"))
    assert "\\u6f22\\u5b57" in text and ("0.5 +/- 0.1" in text or "0.5 ± 0.1" in text)


def test_what_only_prints_ends_with_its_reader(tmp_path):
    body = "from rto_fast.system.terminal import say\n    for i in range(10**9): say(i)"
    process = start(tmp_path, body, "only_prints=True", stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "0\n"
    process.stdout.close()
    assert process.wait(60) == 0 and process.stderr.read() == ""
    process.stderr.close()


BODIES = {
    "traceback": "raise RuntimeError(EVIL)",
    "traceback of a thread": "thread = threading.Thread(target=lambda: int(EVIL)); thread.start(); thread.join()",
    "warning": "warnings.warn(EVIL)",
    "log line": "logging.getLogger(EVIL).warning('%s', EVIL)",
    "mistake": "open(EVIL[:-2])",
}


@pytest.mark.parametrize("kind", BODIES)
def test_what_python_prints_by_itself_is_escaped(kind, tmp_path):
    process = start(tmp_path, BODIES[kind], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, error = process.communicate(timeout=60)
    text = error.decode("utf-8")
    assert not out and "\\x1b" in text and not set(text) & ACTING
    if kind == "warning":
        assert text.startswith("warning: ") and text.count("\n") == 1 and "(UserWarning, " in text


def test_a_warning_of_ours_is_one_line_and_said_once(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "2 red cup"}\n' * 3 + "{}\n")
    body = """from rto_fast.data.sources import load_examples
    for _ in range(3):
        with warnings.catch_warnings():
            load_examples("rows.jsonl", invalid="skip")
    """
    process = start(tmp_path, body, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    out, error = process.communicate(timeout=60)
    assert (
        not out
        and error.count("\n") == 1
        and error.startswith("warning: rows.jsonl: 1 unusable rows skipped, the first")
    )


def test_a_run_is_not_ended_by_what_it_prints(tmp_path):
    """In an ASCII locale; the reader of stdout leaves after a line, stderr is closed."""

    def line(row):
        return json.dumps(row, ensure_ascii=False) + "\n"

    rows = [row | {"chosen": "три ± ✓"} for row in preference_rows(30, seed=3)]
    (tmp_path / "pairs.jsonl").write_text("".join(map(line, rows)), encoding="utf-8")
    arguments = [
        "--config",
        "default",
        "--output_dir",
        "run",
        "--data.preferences",
        "pairs.jsonl",
        "--data.sft",
        "null",
        "--data.eval_prompts",
        "null",
        "--sft.max_steps",
        "1",
        "--dpo.max_steps",
        "1",
        "--rto.enabled",
        "false",
        "--eval.function",
        "rto_fast.data.world:gold_reward",
        "--rollout.max_new_tokens",
        "4",
        "--eval.prompts",
        "2",
    ]
    program = (
        "from rto_fast import train; from rto_fast.reporting import finish; finish.report_run = lambda *_: None; "
        "train.command()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        preexec_fn=lambda: os.close(2),
        env=ENVIRONMENT | ASCII_LOCALE,
    )
    assert process.stdout.readline()
    process.stdout.close()
    assert process.wait(200) == 0
    assert (tmp_path / "run" / "dpo" / "README.md").exists()


def test_without_a_run_a_warning_is_pythons_own_in_the_name_of_the_caller(tmp_path):
    (tmp_path / "skipped.jsonl").write_text('{"prompt": "2 red cup"}\n' * 3 + "{}\n")
    data = RunData(DataConfig(prompts=str(tmp_path / "skipped.jsonl"), invalid="skip"), build_tokenizer(), [2], print)
    with pytest.warns(UserWarning, match="1 unusable rows skipped") as caught:
        assert data.prompt_examples
    assert [warning.filename for warning in caught] == [__file__]
