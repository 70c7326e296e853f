"""Every mistake and every fault through the command line: one line that names the thing and the remedy, exit code 2."""

import asyncio
import contextlib
import ctypes
import gzip
import json
import os
import resource
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rto_fast import train
from rto_fast.config import load_config
from rto_fast.data.tokenizing import Prompt
from rto_fast.data.world import build_model, build_tokenizer, preference_rows
from rto_fast.errors import ConfigError, ModelError, RewardError
from rto_fast.models.loading import causal_logps
from rto_fast.models.model import Model
from rto_fast.reporting.page import page
from rto_fast.reporting.run_files import read_runs
from rto_fast.rewards import Completion, RewardFunction
from rto_fast.run import Run
from rto_fast.system.command_line import run_command
from rto_fast.training.optimizer import Schedule
from rto_fast.training.saving import save_model
from rto_fast.training.supervised import SupervisedTrainer

ROWS = preference_rows(40, seed=3)
ROW = ROWS[0]


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def chat(row):
    return {k: [{"role": "user" if k == "prompt" else "assistant", "content": v}] for k, v in row.items()}


REWARDS = b"""
import asyncio, time
calls = []
def lengths(prompts, responses): return [float(len(text)) for text in responses]
def flaky(prompts, responses):
    calls.append(1)
    if len(calls) == 4: raise ConnectionError("server gone\\nfor good")
    return lengths(prompts, responses)
def raises(prompts, responses): raise KeyError("colour")
def ends(prompts, responses): raise SystemExit(0)
def hangs(prompts, responses): time.sleep(60)
def cancelled(prompts, responses): raise asyncio.CancelledError
def interrupted(prompts, responses): raise KeyboardInterrupt("by the reward")
def closed(prompts, responses): raise GeneratorExit
def greedy(prompts, responses): raise MemoryError
def nan(prompts, responses): return [float("nan")] * len(prompts)
def short(prompts, responses): return [1.0]
def graded(prompts, responses, answer): return [1.0] * len(prompts)
"""
FILES = {
    "pairs.jsonl": lines(*ROWS),
    "chat.jsonl": lines(*map(chat, ROWS)),
    "malformed.jsonl": lines(ROW) + b'{"prompt": ',
    "empty.jsonl": b"",
    "question.jsonl": lines({"question": "q", "answer": "a"}),
    "prompts.jsonl": lines(*({"prompt": row["prompt"]} for row in ROWS)),
    "silent.jsonl": lines(ROW, ROW | {"chosen": " "}),
    "noise.jsonl": bytes(range(128, 256)),
    "zeros.jsonl": bytes(512),
    "cut.jsonl.gz": gzip.compress(lines(*ROWS))[:-40],
    "bomb.jsonl.gz": gzip.compress(b"x" * 2**20) * 8,
    "headless.csv": "".join(f'"{r["prompt"]}","{r["chosen"]}","{r["rejected"]}"\n' for r in ROWS).encode(),
    "notes/readme.txt": b"no data here",
    "typo.yaml": b"rto:\n  kl_coeff: 0.1\n",
    "noise.yaml": bytes(range(128, 256)),
    "faulty_rewards.py": REWARDS,
    "faulty_syntax.py": b"def f(:\n",
    "faulty_import.py": b"import sys\nsys.exit(0)\n",
}


def write_models(folder):
    """`model`, and copies that cannot be used."""
    model, tokenizer = build_model(0), build_tokenizer()
    save_model(Model(model), tokenizer, folder / "model")
    weights = (folder / "model" / "model.safetensors").read_bytes()
    for name in ("bare", "endless", "larger", "weightless", "pickled", "cut"):
        shutil.copytree(folder / "model", folder / name)
    for name in ("weightless", "pickled"):
        (folder / name / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pickled" / "pytorch_model.bin")
    (folder / "cut" / "model.safetensors").write_bytes(weights[:-100])
    for name in ("bare", "endless"):
        (folder / name / "chat_template.jinja").unlink()
    for name in ("config.json", "generation_config.json"):
        file = folder / "endless" / name
        file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": None}))
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder / "bare")
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder / "endless")
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["unheard-of"])
    tokenizer.chat_template = tokenizer.chat_template.replace("<assistant>", "unheard-of").replace(
        "'<' + m['role'] + '> '", "(m['role'] == 'user' and '<user> ' or 'unheard-of ')"
    )
    tokenizer.save_pretrained(folder / "larger")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("errors")
    for name, content in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    write_models(folder)
    return folder


@pytest.fixture(autouse=True)
def inside(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


SHORT = [
    "--config",
    "default",
    "--threads",
    "1",
    "--data.preferences",
    "pairs.jsonl",
    "--data.sft",
    "null",
    "--data.eval_prompts",
    "null",
    "--sft.max_steps",
    "2",
    "--dpo.max_steps",
    "2",
    "--dpo.batch_size",
    "8",
    "--reward_model.batch_size",
    "4",
    "--rto.iterations",
    "3",
    "--rto.prompts_per_rollout",
    "8",
    "--rto.batch_size",
    "4",
    "--rollout.max_new_tokens",
    "8",
    "--eval.prompts",
    "4",
    "--eval.function",
    "null",
]
SFT = [*SHORT, "--model.path", "model", "--rto.enabled", "false"]  # and DPO
RTO = [*SHORT, "--sft.model", "model", "--rto.dpo_reward_scale", "0", "--rto.advantage", "reinforce_pp"]
LENGTHS = ["--reward_model.function", "faulty_rewards:lengths"]


@pytest.fixture
def start(monkeypatch):
    """The command line, in this process: importing torch takes longer than any of these runs. So does their report."""
    monkeypatch.setattr(Run, "report", lambda self: None)

    def start(*arguments):
        monkeypatch.setattr(sys, "argv", ["train", *map(str, arguments)])
        train.command()

    return start


@pytest.fixture
def refused(start, capsys, tmp_path):
    """Runs the command, into `tmp_path` unless told otherwise, and returns its one line."""

    def refused(*arguments):
        output = [] if {"--output_dir", "--resume"} & set(arguments) else ["--output_dir", tmp_path / "out"]
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            start(*arguments, *output)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.startswith("rto_fast: ") and error.count("\n") == 1, error
        return error

    return refused


def how_to_go_on(folder):
    return f"; once that is mended, go on with: python -m rto_fast.train --resume {folder}\n"


# Mistakes that show before anything is trained

DATA = {
    "missing.jsonl": "missing.jsonl: no such file or folder (from {cwd}); hub data sets are named org/name",
    "malformed.jsonl": "malformed.jsonl:2: malformed JSON: Expecting value at column 11",
    "empty.jsonl": "empty.jsonl: no examples in split 'train': it is empty; give other data, or another split",
    "question.jsonl": "question.jsonl:1: no known layout in columns question, answer; map them with columns, such as",
    "prompts.jsonl": "prompts.jsonl:1: no chosen; this stage needs it: use other data, or map it with columns",
    "silent.jsonl": "silent.jsonl:2: empty response: chosen is ' '; remove the row",
    "noise.jsonl": "noise.jsonl: not UTF-8 text (invalid start byte at byte 0); convert the file",
    "zeros.jsonl": "zeros.jsonl:1: malformed JSON",
    "cut.jsonl.gz": "cut.jsonl.gz: cannot be read: Compressed file ended before the end-of-stream marker",
    "bomb.jsonl.gz": "bomb.jsonl.gz: unpacks to more than 0.004 GiB; raise data.max_unpacked_gib if that is meant",
    "headless.csv": "(a csv begins with a line of their names); map them with columns",
    "notes": "notes: no data files for split 'train'; found none that ends in .jsonl",
    "nobody/nothing": "nobody/nothing: no such local file or folder, and the hub did not give split 'train'",
}


@pytest.mark.parametrize("source", DATA)
def test_data(refused, source):
    line = refused(*RTO, *LENGTHS, "--data.preferences", source, "--data.max_unpacked_gib", "0.004")
    assert DATA[source].format(cwd=os.getcwd()) in line and len(line) < 600


MISTAKES = {
    "prompt budget": (
        [*RTO, *LENGTHS, "--data.max_prompt_tokens", "2"],
        "36 prompts dropped (> 2 tokens); none is left: "
        "raise max_prompt_tokens or set overlong_prompt to truncate_left",
    ),
    "no preferences": ([*RTO, "--data.preferences", "null"], "data.preferences: no preference data is given"),
    "no EOS": (
        [*RTO, "--sft.model", "endless"],
        "no stop token: set eos_token of the tokenizer or eos_token_id of the",
    ),
    "tokenizer of another model": (
        [*SFT, "--model.tokenizer", "larger"],
        "model.path: model has a vocabulary of 49 tokens that is not the policy's (50 tokens)",
    ),
    "tokens that the model lacks": (
        [*SFT, "--model.path", "larger"],
        "the tokenizer makes token 49 of 'unheard-of', the "
        "model has 49 tokens; give the model's own tokenizer, or resize_token_embeddings",
    ),
    "foreign DPO model": (
        [*RTO, "--rto.dpo_reward_scale", "1", "--dpo.model", "larger"],
        "dpo.model: larger has a vocabulary of 49 tokens that is not the policy's (49 tokens)",
    ),
    "no weights": (
        [*RTO, "--sft.model", "weightless"],
        "weightless: no weights in safetensors: there are none; write them",
    ),
    "pickle": (
        [*RTO, "--reward_model.model", "pickled"],
        "pickled: no weights in safetensors: pytorch_model.bin is a "
        "pickle, which can run code, and is not read; write them with model.save_pretrained",
    ),
    "damaged weights": ([*SFT, "--model.path", "cut"], "cut/model.safetensors: damaged weights: "),
    "no model": ([*RTO, "--reward_model.model", "notes"], "notes: cannot load a tokenizer from this directory"),
    "model on the hub": (
        [*RTO, "--sft.model", "nobody/nothing"],
        "nobody/nothing: cannot load a tokenizer from this name (no such directory; tried as a hub id)",
    ),
    "remedy for it": (
        [*RTO, "--dpo.model", "nobody/nothing", "--rto.dpo_reward_scale", "1"],
        "; check the name and the network, or give a local directory\n",
    ),
    "no such module": (
        [*RTO, "--reward_model.function", "absent:f"],
        "reward_model.function: cannot import 'absent:f' "
        "(expected module:function): ModuleNotFoundError: No module named 'absent' in this folder or on "
        "PYTHONPATH\n",
    ),
    "no such function": ([*RTO, "--eval.function", "json:f"], "json/__init__.py has no f\n"),
    "no function": (
        [*RTO, "--reward_model.function", "mine.score"],
        "reward_model.function: expected module:function, such "
        "as mine:score for the function score of mine.py, got 'mine.score'; did you mean mine:score?\n",
    ),
    "broken module": (
        [*RTO, "--reward_model.function", "faulty_syntax:f"],
        "'faulty_syntax:f' (expected module:function): SyntaxError: ",
    ),
    "module that exits": (
        [*RTO, "--reward_model.function", "faulty_import:f"],
        "SystemExit: 0 ({cwd}/faulty_import.py:2)",
    ),
    "one parameter": (
        [*RTO, "--reward_model.function", "builtins:len"],
        "reward_model.function: builtins:len cannot be "
        "called with a list of prompts and a list of responses (too many positional arguments)",
    ),
    "column of a reward": (
        [*RTO, "--reward_model.function", "rto_fast.rewards:gsm8k"],
        "reward_model.function: gsm8k takes the column `answer`, which the data does not have (pairs.jsonl:",
    ),
    "column of a judge": (
        [*RTO, *LENGTHS, "--eval.function", "faulty_rewards:graded"],
        "eval.function: graded takes the column `answer`, which the data does not have (pairs.jsonl:",
    ),
    "key in a file": (["--config", "typo.yaml"], "typo.yaml:2: unknown key rto.kl_coeff; did you mean rto.kl_coef?"),
    "key": ([*RTO, "--rto.kl_coeff", "1"], "command line: unknown key --rto.kl_coeff; did you mean --rto.kl_coef?"),
    "binary configuration": (["--config", "noise.yaml"], "noise.yaml:1: not UTF-8 text; convert the file"),
    "no configuration": (["--config", "absent.yaml"], "--config absent.yaml: No such file or directory"),
    "used folder": (
        [*RTO, "--output_dir", "notes"],
        "output_dir: notes exists and is not empty; give another one with",
    ),
    "a file for a folder": (
        [*RTO, "--output_dir", "typo.yaml/x"],
        "output_dir: typo.yaml/x cannot be used: Not a directory; give another one",
    ),
    "nothing to resume": (
        ["--resume", "notes"],
        "--resume notes: no run to go on with (no progress.json and config.yaml",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(refused, name):
    arguments, message = MISTAKES[name]
    assert message.format(cwd=os.getcwd()) in refused(*arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(refused):
    assert "device: cuda was asked for and there is none; use --device cpu\n" in refused(*RTO, "--device", "cuda")


@contextlib.contextmanager
def as_anybody():
    """root reads every file: for the time being, without CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH (bits 1 and 2)."""
    libc, header, sets = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, sets) == 0
    effective, sets[0] = sets[0], sets[0] & ~0b110
    assert libc.capset(header, sets) == 0
    try:
        yield
    finally:
        sets[0] = effective
        assert libc.capset(header, sets) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="root's capabilities are Linux's")
def test_a_file_or_folder_without_permission(refused, tmp_path):
    secret, closed = tmp_path / "secret.jsonl", tmp_path / "closed"
    secret.write_bytes(FILES["pairs.jsonl"])
    secret.chmod(0)
    closed.mkdir(mode=0)
    with as_anybody():
        assert f"{secret}: cannot be read: [Errno 13] Permission denied" in refused(*SFT, "--data.preferences", secret)
        line = refused(*SFT, "--output_dir", closed / "out")
        assert f"output_dir: {closed / 'out'} cannot be used: Permission denied; give another one" in line
    closed.chmod(0o700)


def test_a_mistake_can_be_mended_in_the_same_folder(refused):
    for name in ("a.jsonl", "b.jsonl"):  # not: the folder is in use
        assert f"rto_fast: {name}: no such file" in refused(*SFT, "--data.preferences", name)


def test_chat_data_without_a_chat_template_is_told_once_and_recorded(start, tmp_path, capfd):
    start(*SFT, "--model.path", "bare", "--data.preferences", "chat.jsonl", "--output_dir", tmp_path / "out")
    out, err = capfd.readouterr()
    what = "the tokenizer has no chat template: messages become a 'Human: ... Assistant:' transcript"
    assert f"\nwarning: {what}\n" in f"\n{out}" and (out + err).count("no chat template") == 1
    records = [json.loads(line) for line in (tmp_path / "out" / "warnings.jsonl").read_text().splitlines()]
    assert [record for record in records if record["what"] == what] == [
        {"stage": "data", "step": 0, "name": "no_chat_template", "what": what, "remedy": ""}
    ]
    assert "no chat template" in page(read_runs([tmp_path / "out"]), [])


def test_an_engine_that_falls_back_is_told_once_and_recorded(start, monkeypatch, tmp_path, capfd):
    def engine(*_):
        raise ModelError("a layer\x1b[2J that it does not know")

    monkeypatch.setattr("rto_fast.rollout.NativeEngine", engine)
    start(*RTO, *LENGTHS, "--eval.every", "1", "--output_dir", tmp_path / "out")
    out, err = capfd.readouterr()
    what = "rollout.engine: falls back to hf (slower): a layer\x1b[2J that it does not know"
    assert f"\nwarning: {what}\n".replace("\x1b", "\\x1b") in out and (out + err).count("falls back") == 1
    records = [json.loads(line) for line in (tmp_path / "out" / "warnings.jsonl").read_text().splitlines()]
    assert [record["name"] for record in records if record["what"] == what] == ["engine_falls_back"]
    assert "falls back to hf" in page(read_runs([tmp_path / "out"]), [])


@pytest.mark.parametrize("debug", [False, True])
def test_the_process(debug, tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "rto_fast.train",
            *SFT,
            "--data.preferences",
            "malformed.jsonl",
            "--output_dir",
            str(tmp_path / "out"),
        ]
        + ["--debug"] * debug,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    if debug:
        assert done.returncode == 1 and "Traceback" in done.stderr and "DataError: malformed.jsonl:2: " in done.stderr
    else:
        assert done.returncode == 2 and done.stderr.startswith("rto_fast: malformed.jsonl:2: malformed JSON")
        assert done.stderr.count("\n") == 1


# Faults on the way: the run is kept


@pytest.mark.parametrize(
    "function, message",
    [
        ("raises", "KeyError: 'colour' ({cwd}/faulty_rewards.py:9)"),
        ("ends", "SystemExit: 0 ({cwd}/faulty_rewards.py:10)"),
        ("cancelled", "CancelledError ({cwd}/faulty_rewards.py:12)"),
        ("hangs", "no scores for 8 responses within 0.2 s (reward_model.timeout)"),
        ("nan", "score nan for the response '"),
        ("short", "returned (1,) scores for 8 responses"),
    ],
)
def test_reward_functions(refused, tmp_path, function, message):
    path, started = f"faulty_rewards:{function}", time.perf_counter()
    options = ["--reward_model.function", path, "--reward_model.timeout", "0.2", "--rto.normalize_scores", "false"]
    line = refused(*RTO, *options)
    assert f"rto_fast: {path}: {message.format(cwd=os.getcwd())}" in line
    assert line.endswith(how_to_go_on(tmp_path / "out")) and time.perf_counter() - started < 20


@pytest.mark.parametrize("timeout", [None, 9.0], ids=["here", "in a thread"])
@pytest.mark.parametrize("function", ["ends", "cancelled", "interrupted", "closed", "greedy"])
def test_no_end_of_a_reward_function_is_the_runs(function, timeout):
    reward = RewardFunction(f"faulty_rewards:{function}", "reward_model.function", timeout=timeout)
    kind = {
        "ends": "SystemExit",
        "cancelled": "CancelledError",
        "interrupted": "KeyboardInterrupt",
        "closed": "GeneratorExit",
        "greedy": "MemoryError",
    }[function]
    with pytest.raises(RewardError, match=f"faulty_rewards:{function}: {kind}.* .*faulty_rewards.py"):
        reward([Completion(Prompt([1], "a", {}, "", None), [1], "b", True)])


def test_a_reward_is_found_in_the_present_folder_by_any_command(tmp_path, monkeypatch):
    """The script `rto-fast` has its own folder on the path of modules, and not the present one."""
    (tmp_path / "rewards_from_here.py").write_text("def score(prompts, responses): return [1.0] * len(responses)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path and path != str(tmp_path)])
    monkeypatch.setattr(sys, "argv", ["rto-fast"])
    found = []
    run_command(lambda arguments: found.append(RewardFunction("rewards_from_here:score", "reward_model.function")))
    assert found


def test_a_module_of_rewards_that_ends_is_refused(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    for kind in ("SystemExit", "GeneratorExit", "KeyboardInterrupt"):
        (tmp_path / f"ends_by_{kind}.py").write_text(f"raise {kind}")
        with pytest.raises(ConfigError, match=f"reward_model.function: cannot import .* {kind}"):
            RewardFunction(f"ends_by_{kind}:f", "reward_model.function")


ENDS = {
    SystemExit(0): "the run was ended by SystemExit: 0",
    GeneratorExit(): "the run was ended by GeneratorExit",
    asyncio.CancelledError("late"): "the run was ended by CancelledError: late",
    MemoryError(): "sft: out of memory: of the CPU. Lower sft.micro_batch_tokens",
}


@pytest.mark.parametrize("end", ENDS, ids=lambda end: type(end).__name__)
def test_whatever_ends_a_step_the_run_says_what_is_lost_and_how_to_go_on(refused, tmp_path, monkeypatch, end):
    def step(self):
        raise end

    monkeypatch.setattr(SupervisedTrainer, "step", step)
    line = refused(*SFT)
    assert line.startswith(f"rto_fast: {ENDS[end]}")
    assert "; what sft trained after its last checkpoint is not saved: a step was under way; " in line
    assert line.endswith(f"go on with: python -m rto_fast.train --resume {tmp_path / 'out'}\n")


def test_a_traceback_ends_with_how_to_go_on(start, tmp_path, monkeypatch):
    def step(self):
        raise RuntimeError("a fault of the program")

    monkeypatch.setattr(SupervisedTrainer, "step", step)
    with pytest.raises(RuntimeError) as fault:
        start(*SFT, "--output_dir", tmp_path / "out")
    assert fault.value.__notes__[-1] == f"go on with: python -m rto_fast.train --resume {tmp_path / 'out'}"


def test_ctrl_c_that_a_library_has_taken_over_ends_as_ours_does(start, tmp_path, monkeypatch, capsys):
    def step(self):
        raise KeyboardInterrupt  # as its handler does

    monkeypatch.setattr(SupervisedTrainer, "step", step)
    monkeypatch.setattr("rto_fast.system.command_line._end_at_next_signal", lambda: None)
    with pytest.raises(SystemExit) as end:
        start(*SFT, "--output_dir", tmp_path / "out")
    said = capsys.readouterr().err
    assert end.value.code == 130 and said.startswith(
        "rto_fast: stopped; what sft trained after its last checkpoint is not"
    )
    assert (
        said.endswith(f"go on with: python -m rto_fast.train --resume {tmp_path / 'out'}\n") and said.count("\n") == 1
    )


def test_the_line_that_says_how_to_go_on_is_one_for_a_shell(refused, folder):
    odd = "-it's  a $HOME run"
    line = refused(*RTO, "--reward_model.function", "faulty_rewards:raises", "--output_dir", odd)
    words = shlex.split(line.partition("go on with: ")[2])
    assert words[:3] == ["python", "-m", "rto_fast.train"]
    assert load_config(words[3:]).resume.endswith(odd) and (folder / odd / "progress.json").exists()


def test_a_judge_that_fails_between_iterations_of_rto(refused, tmp_path):
    line = refused(*RTO, *LENGTHS, "--eval.function", "faulty_rewards:raises", "--eval.every", "1")
    assert "rto_fast: faulty_rewards:raises: KeyError" in line and line.endswith(how_to_go_on(tmp_path / "out"))
    assert (tmp_path / "out" / "checkpoints" / "rto-00000001").is_dir()


@pytest.fixture(scope="module")
def stopped(folder, tmp_path_factory):
    """The folder of a run whose reward function failed in the third iteration of RTO."""
    output = tmp_path_factory.mktemp("stopped") / "out"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Exception, match="server gone") as fault:
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        train.main([*RTO, "--reward_model.function", "faulty_rewards:flaky", "--output_dir", str(output)])
    assert fault.value.__notes__ == [how_to_go_on(output)[2:-1]]
    return output


@pytest.mark.parametrize("option", ["--output_dir", "--resume"])
def test_a_second_run_of_a_folder_while_the_first_lives(start, refused, tmp_path, monkeypatch, option):
    """It begins in the middle of the first one's step."""
    step, lines = SupervisedTrainer.step, []

    def step_and_second_run(self):
        if not lines:
            lines.append("")
            arguments = SFT if option == "--output_dir" else []
            before = sorted((str(path), path.stat().st_mtime_ns) for path in (tmp_path / "out").rglob("*"))
            lines.append(refused(*arguments, option, tmp_path / "out"))
            assert before == sorted((str(path), path.stat().st_mtime_ns) for path in (tmp_path / "out").rglob("*"))
        return step(self)

    monkeypatch.setattr(SupervisedTrainer, "step", step_and_second_run)
    start(*SFT, "--output_dir", tmp_path / "out")
    assert lines[1].startswith(
        f"rto_fast: {tmp_path / 'out'} is in use: process {os.getpid()} on {os.uname().nodename} "
    )
    steps = [(r["stage"], r["step"]) for r in map(json.loads, open(tmp_path / "out" / "metrics.jsonl")) if "lr" in r]
    assert steps == [("sft", 1), ("sft", 2), ("dpo", 1), ("dpo", 2)] and not (tmp_path / "out" / "run.lock").exists()


def test_a_folder_with_somebodys_model_and_configuration_is_no_place_for_a_run(refused, tmp_path):
    """Though a run that ends before its first step leaves files of these names."""
    for name in ("config.yaml", "base/model.safetensors"):
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_text("somebody's")
    assert "out exists and is not empty; give another one with --output_dir" in refused(*SFT)
    assert {path.read_text() for path in (tmp_path / "out").rglob("*") if path.is_file()} == {"somebody's"}


def test_what_was_trained_before_a_reward_function_failed_is_kept(start, stopped, tmp_path):
    resumed, whole = tmp_path / "resumed", tmp_path / "whole"
    shutil.copytree(stopped, resumed)
    start("--resume", resumed)
    start(*RTO, *LENGTHS, "--output_dir", whole)
    ours, theirs = (load_file(path / "rto" / "model.safetensors") for path in (resumed, whole))
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    steps = [(r["stage"], r["step"]) for r in map(json.loads, open(resumed / "metrics.jsonl"))]
    assert steps[:3] == [("rto", 1), ("rto", 2), ("rto", 3)]


def damage_checkpoint(folder):
    (path,) = folder.glob("checkpoints/rto-*/state-00000.safetensors")
    path.write_bytes(path.read_bytes()[:-100])


DAMAGES = {
    "progress": (lambda folder: (folder / "progress.json").write_text('{"done": ['), "progress.json cannot be read"),
    "configuration": (lambda folder: (folder / "config.yaml").write_text("rto: [\n"), "config.yaml:2: not valid YAML"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_run(refused, stopped, tmp_path, name):
    damage, message = DAMAGES[name]
    shutil.copytree(stopped, tmp_path / "out")
    damage(tmp_path / "out")
    assert message in refused("--resume", tmp_path / "out")


@pytest.mark.parametrize(
    "damage, said",
    [
        (
            damage_checkpoint,
            "checkpoint rto-00000002 is damaged (state-00000.safetensors is not as it was written); goes on "
            "from the beginning of the stage",
        ),
        (lambda folder: shutil.rmtree(folder / "checkpoints"), "checkpoint rto-00000002 is damaged (FileNotFoundError"),
        (lambda folder: (folder / "metrics.jsonl").unlink(), "goes on after step 2"),
    ],
    ids=["checkpoint", "no checkpoint", "log"],
)
def test_a_damaged_run_goes_on(start, stopped, tmp_path, capsys, damage, said):
    shutil.copytree(stopped, tmp_path / "out")
    damage(tmp_path / "out")
    start("--resume", tmp_path / "out")
    assert said in capsys.readouterr().out


def test_a_checkpoint_of_another_run(refused, stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "out")
    line = refused("--resume", tmp_path / "out", "--rto.advantage", "gae")
    assert (
        "not a checkpoint of this run's rto stage ('critic_optimizer'); resume with the options it was begun with"
        in line
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            [*SFT, "--sft.lr", "1", "--sft.max_steps", "30", "--sft.epochs", "9", "--sft.batch_size", "4"],
            "sft: the gradient was not finite in 10 steps in a row: lower the learning rate",
        ),
        ([*SFT, "--dpo.lr", "1", "--dpo.max_steps", "4"], "dpo: the gradient was not finite in 2 steps in a row"),
        ([*RTO, "--reward_model.lr", "1"], "reward_model: the gradient was not finite in 10 steps in a row"),
        (
            [*RTO, *LENGTHS, "--rto.advantage", "gae", "--rto.critic_lr", "1", "--rto.iterations", "20"],
            "rto: the gradient was not finite in 10 steps in a row",
        ),
        ([*RTO, *LENGTHS, "--rto.lr", "1"], "the policy's logits are NaN: response 0 "),
        ([*RTO, *LENGTHS, "--rto.lr", "1", "--rollout.engine", "hf"], "the policy's logits are NaN: sequence "),
    ],
    ids=["SFT", "DPO", "reward model", "critic", "policy", "policy, hf"],
)
def test_training_that_diverges(refused, monkeypatch, tmp_path, arguments, message):
    begin = Schedule.__init__

    def begin_too_fast(self, *arguments):
        begin(self, *arguments)
        self.peak_lr = 1e30 if self.peak_lr == 1 else self.peak_lr

    monkeypatch.setattr(
        Schedule, "__init__", begin_too_fast
    )  # no option can: 1 is the most, and a little model bears it
    line = refused(*arguments)
    assert message in line and "lower the learning rate" in line and line.endswith(how_to_go_on(tmp_path / "out"))
    records = [json.loads(line) for line in open(tmp_path / "out" / "metrics.jsonl")]
    assert sum(r.get("skipped", 0) + r.get("critic_skipped", 0) for r in records) > 0


def test_a_step_that_is_skipped_is_counted(start, monkeypatch, capsys, tmp_path):
    factors = [torch.nan]

    def logps(*arguments):
        return causal_logps(*arguments) * (factors.pop() if factors else 1.0)

    monkeypatch.setattr("rto_fast.stages.sft.causal_logps", logps)
    start(*SFT, "--sft.max_steps", "4", "--sft.batch_size", "4", "--output_dir", tmp_path / "out")
    assert "\nsft: optimizer steps skipped for a gradient that was not finite: 1\n" in capsys.readouterr().out


def test_no_memory(refused, monkeypatch):
    def step(self):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.\nmore")

    monkeypatch.setattr(SupervisedTrainer, "step", step)
    assert "sft: out of memory: CUDA out of memory. Tried to allocate 1 GiB. Lower sft.micro_batch" in refused(*SFT)


@contextlib.contextmanager
def full_disk(size):
    """No file may grow beyond `size` bytes: what writes more is told by the system, as it is of a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


FULL = {  # a model has 450 KB, a checkpoint 1.4 MB
    "model": (200_000, [], "out/sft: the model could not be written: "),
    "checkpoint": (600_000, ["--sft.save_every", "1"], "sft-00000001: the checkpoint could not be written: "),
    "log": (6_000, ["--sft.max_steps", "100", "--sft.epochs", "99"], "metrics.jsonl could not be written: "),
}


@pytest.mark.parametrize("name", FULL)
def test_a_full_disk_costs_no_run(start, refused, tmp_path, name):
    size, options, message = FULL[name]
    with full_disk(size):
        line = refused(*SFT, *options, "--sft.batch_size", "2")
    assert message in line and "File too large" in line and line.endswith(how_to_go_on(tmp_path / "out"))
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left <= {"config.yaml", "progress.json", "metrics.jsonl", "tensorboard", "checkpoints"}  # no halves
    start("--resume", tmp_path / "out", "--sft.max_steps", "2")
    records = [json.loads(line) for line in open(tmp_path / "out" / "metrics.jsonl")]
    assert [r["step"] for r in records if r["stage"] == "sft"] == [1, 2] and (tmp_path / "out" / "dpo").is_dir()


def test_a_disk_that_is_full_from_the_beginning(refused, tmp_path):
    with full_disk(1_000):
        line = refused(*SFT)
    assert line == f"rto_fast: {tmp_path / 'out' / 'config.yaml'} could not be written: File too large\n"
    assert not Path(tmp_path / "out" / ".config.yaml.part").exists()
