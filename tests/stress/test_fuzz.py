"""A few of the nasty configurations and command lines that `python -m tests.stress.fuzz` tries by the thousand."""

import subprocess
import sys
from pathlib import Path


def test_nasty_configurations_and_command_lines_end_well_or_in_one_line():
    command = [sys.executable, "-m", "tests.stress.fuzz", "--minutes", "0.25"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and "broken 0\n" in done.stdout, done.stdout + done.stderr
