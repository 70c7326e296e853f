"""What a run says while it works: a live line per stage, metrics.jsonl, samples.jsonl."""

import json
import sys
import time
from pathlib import Path

from tqdm import tqdm


def _number(value):
    return value.item() if hasattr(value, "item") else value


def short(value):
    """A number in at most five significant characters, for the live line."""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


class RunLog:
    """Writes to `output_dir`; every record holds the stage, the step and the seconds since the run began."""

    def __init__(self, output_dir, quiet=False):
        self.folder = Path(output_dir)
        self.start = time.perf_counter()
        self.quiet = quiet

    def _append(self, name, record):
        with open(self.folder / name, "a") as file:
            file.write(json.dumps(record) + "\n")

    def say(self, text):
        if not self.quiet:
            tqdm.write(text, file=sys.stdout)

    def stage(self, name, total):
        return StageLog(self, name, total)

    def metrics(self, stage, step, values):
        values = {key: _number(value) for key, value in values.items()}
        seconds = round(time.perf_counter() - self.start, 3)
        self._append("metrics.jsonl", {"stage": stage, "step": step, "seconds": seconds} | values)
        return values

    def samples(self, stage, step, samples):
        for sample in samples:
            self._append("samples.jsonl", {"stage": stage, "step": step} | sample)


class StageLog:
    """The live line of one stage: `with log.stage("dpo", 100) as stage: stage.step({...}, show=("loss",))`."""

    def __init__(self, log, name, total):
        self.log, self.name, self.count = log, name, 0
        # On a terminal the line is redrawn; in a file or CI log ten lines per stage are enough.
        live = sys.stdout.isatty()
        self.bar = tqdm(
            total=total, desc=f"{name:<12}", file=sys.stdout, disable=log.quiet, dynamic_ncols=live, leave=True,
            mininterval=0.1 if live else 1e9, miniters=None if live else max(1, total // 10), unit="step",
            bar_format="{desc} {n_fmt}/{total_fmt} {percentage:3.0f}% [{elapsed}<{remaining}] {postfix}",
        )  # fmt: skip
        self.live = live

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()

    def step(self, values, show):
        """Records a finished step; the keys in `show` appear on the live line."""
        self.count += 1
        values = self.log.metrics(self.name, self.count, values)
        self.bar.set_postfix_str(" ".join(f"{key}={short(values[key])}" for key in show if key in values), refresh=False)
        self.bar.update(1)
        return values
