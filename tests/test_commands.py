"""What `python -m rto_fast.X` prints is said by rto_fast: no library's warning, log line or bar. DeepSpeed stays out."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rto_fast.rewards import RewardFunction
from rto_fast.system import deepspeed_import

PACKAGE = Path(__file__).parent.parent / "rto_fast"
WORLD = ["--rollout.max_new_tokens", "8", "--threads", "1"]
COMMANDS = {
    "train": [
        *WORLD,
        "--output_dir",
        "{run}",
        "--data.limit",
        "40",
        "--eval.prompts",
        "4",
        "--rto.iterations",
        "2",
        "--rto.prompts_per_rollout",
        "4",
        "--eval.every",
        "1",
        "--eval.keep_best",
        "true",
    ],
    "data": ["embedded:preferences", "--data.limit", "40", "--tokenizer", "{run}/base"],
    "evaluate": [
        *WORLD,
        "--model",
        "{run}/rto",
        "--reference",
        "{run}/sft",
        "--data",
        "embedded:eval_prompts",
        "--prompts",
        "4",
        "--reward",
        "rto_fast.data.world:gold_reward",
        "--reward_model",
        "{run}/reward_model",
    ],
    "report": ["{run}"],
    "exact": ["--model", "{run}/rto", "--prompts", "4", "--max_new_tokens", "8"],
    "plan": ["--gpus", "cpu"],
    "push": ["{run}", "--repo", "me/tiny", "--dry_run"],
}
# Runs a command as `python -m` does, and writes down whose code wrote to stdout and stderr: the innermost that is neither
# the standard library's.
SPY = """
import io, json, runpy, sys, sysconfig, types
stdlib, foreign = sysconfig.get_path("stdlib"), []

def writer(frame):
    while frame:
        path = frame.f_code.co_filename
        is_library = (path.startswith(stdlib) and "site-packages" not in path) or path.startswith("<frozen")
        if not is_library and path != "<string>":
            return path
        frame = frame.f_back
    return ""

class Spy(io.TextIOWrapper):
    def write(self, text):
        path = writer(sys._getframe(1))
        if not path.startswith(package) and text.strip():
            foreign.append([path, text])
        return super().write(text)

package, result = sys.argv[1:3]
sys.argv[1:] = sys.argv[4:]
sys.stdout = Spy(sys.stdout.buffer, encoding="utf-8", write_through=True)
sys.stderr = Spy(sys.stderr.buffer, encoding="utf-8", write_through=True)
import rto_fast.system.progress
rto_fast.system.progress.PATIENCE = float("inf")  # on a busy machine any command would show its progress
try:
    runpy.run_module(MODULE, run_name="__main__", alter_sys=True)
finally:
    has_deepspeed = isinstance(sys.modules.get("deepspeed"), types.ModuleType)
    json.dump({"foreign": foreign, "deepspeed": has_deepspeed}, open(result, "w"))
"""


def run(name, folder, *options):
    """(process, what the spy found) of a command in a home where nothing was ever run."""
    arguments = [option.format(run=folder / "run") for option in options]
    result = folder / f"{name}.json"
    home = folder / f"home of {name}"
    home.mkdir(exist_ok=True)
    environment = {key: value for key, value in os.environ.items() if key not in ("DS_ACCELERATOR", "MPLCONFIGDIR")}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HOME": str(home), "HF_HUB_OFFLINE": "1"}
    code = SPY.replace("MODULE", repr(f"rto_fast.{name}"))
    process = subprocess.run(
        [sys.executable, "-c", code, str(PACKAGE), str(result), "--", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    return process, json.loads(result.read_text())


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("commands")
    return {name: run(name, folder, *options) for name, options in COMMANDS.items()}


def test_all_commands_are_looked_at():
    modules = [path for path in PACKAGE.glob("*.py") if 'if __name__ == "__main__":' in path.read_text()]
    packages = [path.parent for path in PACKAGE.glob("*/__main__.py")]
    assert {path.stem for path in modules + packages} == COMMANDS.keys()


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_prints_what_rto_fast_says_and_no_librarys_line(name, outcomes):
    process, found = outcomes[name]
    assert process.returncode == (name == "exact"), process.stderr  # nothing is exact on a CPU
    assert not found["foreign"] and not process.stderr and process.stdout.strip()


@pytest.mark.parametrize("name", COMMANDS)
def test_help_begins_with_what_the_command_does_and_examples(name, tmp_path):
    process, found = run(name, tmp_path, "--help")
    lines = process.stdout.splitlines()
    assert process.returncode == 0 and not found["foreign"] and not process.stderr
    assert lines[0].startswith(f"usage: python -m rto_fast.{name} ") and len(lines[2]) > 40 and len(lines) < 110
    assert lines.index("examples:") < 8 and process.stdout.count(f"  python -m rto_fast.{name}") == 3


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_on_one_cpu_does_not_import_deepspeed(name, outcomes):
    assert outcomes[name][1]["deepspeed"] is False


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
def test_a_reward_function_finds_what_the_command_hides(tmp_path, monkeypatch):
    body = "from importlib.util import find_spec\nthere = find_spec('deepspeed')\n"
    body += "def f(prompts, responses): return [float(bool(there and find_spec('deepspeed')))]\n"
    (tmp_path / "looks_for_deepspeed.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "deepspeed", raising=False)
    with deepspeed_import.hidden():
        function = RewardFunction("looks_for_deepspeed:f", "k")
        assert importlib.util.find_spec("deepspeed") is None
        assert function.function([""], [""]) == [0.0]  # as a library would see it
        assert function._call([""], [type("Completion", (), {"text": ""})], {}).tolist() == [1.0]
        assert importlib.util.find_spec("deepspeed") is None
    assert importlib.util.find_spec("deepspeed")
