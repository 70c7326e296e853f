"""What docs/ says is true: its commands are ones that can be given, its options and files exist."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from rto_fast.config import load_config

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
COMMANDS = [
    (page.name, command)
    for page in [ROOT / "README.md", *PAGES]
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.S)
    for command in block.replace("\\\n", " ").splitlines()
]


def test_there_are_pages_and_commands():
    assert PAGES and len(COMMANDS) > 8


@pytest.mark.parametrize("page, command", [c for c in COMMANDS if "rto_fast.train " in c[1]])
def test_training_commands_can_be_given(page, command, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)
    arguments = words[words.index("rto_fast.train") + 1 :]
    if "--resume" not in arguments:  # that needs a run
        load_config(arguments)


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_the_launchers_know_their_options(launcher):
    words, *_ = [shlex.split(c) for _, c in COMMANDS if c.startswith(launcher)]
    options = [word.partition("=")[0] for word in words[: words.index("rto_fast.train")] if word.startswith("--")]
    usage = subprocess.run([launcher, "--help"], capture_output=True, text=True).stdout
    assert options and all(re.search(rf"{option.replace('_', '[-_]')}\b", usage) for option in options)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_options_and_files_exist(page):
    text, config = page.read_text(), load_config([])
    sections = [name for name, value in vars(config).items() if hasattr(value, "__dataclass_fields__")]
    for section, name in re.findall(rf"`({'|'.join(sections)})\.(\w+)", text):
        assert hasattr(getattr(config, section), name), f"{section}.{name}"
    for name in re.findall(r"\]\(((?!http)[\w./]+)\)", text):
        assert (page.parent / name).exists(), name


def test_the_slurm_script(tmp_path):
    """Its syntax, and what its processes are started with, by stand-ins for SLURM's commands."""
    script = ROOT / "configs" / "slurm.sbatch"
    subprocess.run(["bash", "-n", script], check=True)
    stubs = {
        "scontrol": "echo first-node; echo second-node",
        "srun": 'shift; SLURM_PROCID=3 SLURM_LOCALID=1 exec "$@"',
        "python": 'echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $MASTER_PORT $*"',
    }
    for name, body in stubs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)

    def started():
        environment = {
            "PATH": f"{tmp_path}:/usr/bin:/bin",
            "SLURM_NTASKS": "16",
            "SLURM_JOB_ID": "12345",
            "SLURM_JOB_NODELIST": "n[1-2]",
            "RUN": "run",
        }
        run = subprocess.run(
            ["bash", script], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
        )
        rank, _, command = run.stdout.strip().partition(" -m rto_fast.train ")
        assert rank == "3 1 16 first-node 32345"
        return shlex.split(command)

    assert started() == ["--config", "configs/llama3_8b_ultrafeedback.yaml", "--output_dir", "run"]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "progress.json").touch()
    assert started() == ["--resume", "run"]
