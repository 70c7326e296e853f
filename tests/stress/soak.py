"""Measures memory over many steps: RTO iterations of the embedded default's model, with logs, checkpoints and checks.

    python -m tests.stress.soak --steps 2000

Writes the resident set size every 50 steps and prints its slope by least squares over the last three quarters.
"""

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}

import numpy as np  # noqa: E402

from rto_fast import train  # noqa: E402
from rto_fast.rto.trainer import RTOTrainer  # noqa: E402

EVERY = 50
# A run of 100,000 steps may grow by 1 GiB. Growth counts where it is more than twice its standard error.
ALLOWED = 2**20 / 1e5  # KiB a step
OPTIONS = """
--threads 1 --data.limit 256 --data.held_out 4 --eval.prompts 8 --sft.max_steps 20 --reward_model.max_steps 5
--dpo.max_steps 5 --rto.prompts_per_rollout 8 --rto.batch_size 4 --rto.ppo_epochs 1
--rollout.max_new_tokens 12 --eval.every 100 --eval.keep_best true --save_every 100
""".split()


def resident():
    """KiB of this process in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024


def slope(steps, sizes):
    """(KiB a step, its standard error) by least squares."""
    (a, _), covariance = np.polyfit(steps, sizes, 1, cov=True)
    return a, covariance[0, 0] ** 0.5


def main(arguments=None):
    """Returns whether memory is flat."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.stress.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument(
        "--output", type=Path, help="the measurements, one JSON object a line; default: in a new folder"
    )
    options = parser.parse_args(arguments)
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    output = options.output or folder / "memory.jsonl"
    measured, started, step = [], time.perf_counter(), RTOTrainer.step

    def measuring(trainer):
        metrics = step(trainer)
        if trainer.step_count % EVERY == 0:
            gc.collect()
            measured.append((trainer.step_count, resident()))
            record = {"step": trainer.step_count, "rss_kib": resident(), "objects": len(gc.get_objects())}
            record["seconds"] = round(time.perf_counter() - started, 1)
            with open(output, "a") as file:
                file.write(json.dumps(record) + "\n")
        return metrics

    RTOTrainer.step = measuring
    train.main([*OPTIONS, "--rto.iterations", str(options.steps), "--output_dir", str(folder / "run")])
    steps, sizes = zip(*measured[len(measured) // 4 :])
    a, error = slope(steps, sizes)
    flat = a - 2 * error < ALLOWED
    seconds = time.perf_counter() - started
    first, begin, end = (
        f"{size / 1024:.1f} MiB at step {at}" for at, size in (measured[0], measured[len(measured) // 4], measured[-1])
    )
    print(f"\n{options.steps} RTO steps in {seconds:.0f} s; resident {first}, {begin}, {end}")
    print(
        f"slope over the last three quarters {a:.2f} ± {error:.2f} KiB a step, allowed {ALLOWED:.1f}: "
        f"{'flat' if flat else 'it grows'}; measurements in {output}"
    )
    return flat


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
