"""Every mistake through the command line: one line that names the thing and the remedy, exit code 2."""

import contextlib
import ctypes
import json
import os
import subprocess
import sys

import pytest
import torch

from rto_fast.errors import ModelError
from rto_fast.reporting.page import page
from rto_fast.reporting.run_files import read_runs
from tests.system.faulty_inputs import FILES, LENGTHS, RTO, SFT

pytestmark = pytest.mark.usefixtures("inside")

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
    "no directory": ([*RTO, "--sft.model", "/no/model"], "/no/model: cannot load a tokenizer: no such directory"),
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
        "--resume notes: no run to continue (no progress.json and config.yaml",
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
