"""Tries nasty configurations and command lines by the thousand: each ends well, or in one line that says what is wrong.

    python -m tests.stress.fuzz [--minutes 5] [--seed 0]

There are two kinds of cases. A configuration has random values in random fields, on the command line, in YAML files, or
in both; this process loads it and makes its plan. A command line is a whole command on harmed files, folders, streams,
rewards and environments; it runs in a fork of this process, which has imported everything. Only `rto_fast.report` draws
reports, since drawing one takes longer than a run. In every case:

- The command ends by itself, or at SIGTERM where it was given much to do; at a second one, if a step lasts.
- Its exit code is 0 or 2; 2 comes with one line, without a traceback.
- No control character of a file or an option reaches the terminal.
- No file of others is changed or removed, in a folder that a link of the run leads to either.
- The case leaves no process behind.

Exits with 1 if a case broke one of these rules. `--only CASE` repeats a case that was printed.
"""

import argparse
import contextlib
import io
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

os.environ |= {
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


from rto_fast import train  # noqa: E402
from rto_fast.reporting import finish  # noqa: E402
from tests.embedded_world import preference_rows  # noqa: E402

from .cases import KINDS, TINY, Case  # noqa: E402
from .command import Broken, entry  # noqa: E402
from .harm import write_data  # noqa: E402


def prepare(stage: Path) -> None:
    """Imports everything, and makes what cases copy."""
    for module in ("train", "evaluate", "report", "push", "plan", "data"):
        entry(f"rto_fast.{module}")
    write_data(preference_rows(40, seed=3), stage)
    with contextlib.redirect_stdout(io.StringIO()):
        train.main([*TINY, f"--output_dir={stage / 'run'}"])
    finish.report_run = lambda *_: None


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
        return f"{case.told[:1000]}\n    {reason}"
    except Exception:
        return f"{case.told[:1000]}\n    " + traceback.format_exc()[-2500:]
    finally:
        os.chdir(old)
    return ""


def main(arguments: list[str] | None = None) -> int:
    """Returns how many cases broke a rule."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.stress.fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
            # A configuration takes a fifth of a second, a command some seconds.
            what = "configuration" if number % 10 else dice.choice([name for name in KINDS if name != "configuration"])
            name = options.only or f"{what}:{options.seed}:{number}"
            number += 1
            tried[name.split(":")[0]] += 1
            if reason := try_case(name, folder):
                broken[name.split(":")[0]] += 1
                print(f"\n{name}: {reason}"[:4000], flush=True)
    for name, count in tried.items():
        print(f"{name:<14}  {count:>6} tried  {broken[name]:>4} broken")
    print(f"tried {tried.total()}, broken {broken.total()}")
    return broken.total()


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
