"""What a command refuses or says before it imports torch."""

import json
import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "numpy", "matplotlib", "datasets", "deepspeed", "peft", "triton", "huggingface_hub")
# Runs the command with modules that must not be imported; a module of None raises ImportError when it is.
SCRIPT = """
import json, sys
sys.modules.update(dict.fromkeys(json.loads(sys.argv[1])))
sys.argv[1:] = sys.argv[2:]
from rto_fast.train import command
command()
"""


def train(*arguments, cwd):
    command = [sys.executable, "-c", SCRIPT, json.dumps(HEAVY), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=cwd)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--help"], ""),
        (["--print_config"], ""),
        (["--sft.lrr", "1"], "unknown key --sft.lrr"),
        (["--sft.lr", "-1"], "sft.lr: expected"),
        (["--data.preferences", "null", "--data.sft", "null"], "data.preferences: no preference data is given"),
        (["--output_dir", "full"], "output_dir: full exists and is not empty"),
        (["--resume", "missing"], "--resume missing: no run to continue"),
    ],
)
def test_mistakes_and_help_import_no_heavy_module(arguments, error, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    done = train(*arguments, cwd=tmp_path)
    assert "ImportError" not in done.stderr and "ModuleNotFoundError" not in done.stderr
    assert error in done.stderr and done.returncode == (2 if error else 0)


def test_the_first_line_comes_before_any_heavy_import(tmp_path):
    done = train("--output_dir", "run", "--sft.max_steps", "2", cwd=tmp_path)
    assert done.returncode == 1 and "import of torch halted" in done.stderr
    assert done.stdout.startswith("rto-fast ") and "sft, reward_model, dpo, rto in run" in done.stdout
    assert not (tmp_path / "run").exists()
