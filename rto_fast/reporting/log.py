"""What a run says while it works: a live line per stage, metrics.jsonl and the other logs, trackers."""

import json
import math
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

from rto_fast.errors import CheckpointError
from rto_fast.reporting.run_files import read_records
from rto_fast.system import terminal
from rto_fast.system.notices import Notice


class Finding(NamedTuple):
    """Something wrong with a run that its user should know."""

    name: str  # a word for the records, such as entropy_collapses
    what: str
    remedy: str


ON_THE_LINE = {"tokens_per_second": "tok/s", "clip_fraction": "clip"}  # else the line outgrows a terminal


def _number(value):
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value  # JSON has no NaN


def short(value):
    """A number in at most five significant characters, for the live line."""
    if value is None or isinstance(value, int):
        return "-" if value is None else f"{value:,}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


class RunLog:
    """Writes to `output_dir`; every record holds the stage, the step and the seconds since the run began.

    Args:
        silent: says and writes nothing, as on all ranks but one.
    """

    def __init__(self, output_dir, trackers=(), silent=False):
        self.folder, self.trackers, self.silent = Path(output_dir), trackers, silent
        self.start = time.perf_counter()
        self.warned: list[dict] = []  # by this process

    def _append(self, name, record):
        if self.silent:
            return
        try:
            with open(self.folder / name, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise CheckpointError(f"{self.folder / name} could not be written: {error.strerror}") from error

    def say(self, text):
        if not self.silent:
            terminal.say(text)

    def take_notices(self) -> None:
        """From here on the package's own warnings go through this log, as `warning` does it, and other libraries' are shown
        as before; until the caller leaves its `warnings.catch_warnings`."""
        show = warnings.showwarning

        def receive(message: Warning | str, *place: Any, **options: Any) -> None:
            if isinstance(message, Notice):
                self.warning(message.stage, 0, message.name, message.what, remedy="")
            else:
                show(message, *place, **options)

        warnings.simplefilter("always", Notice)
        warnings.showwarning = receive

    def seconds(self):
        """Since the run began, without the time between its sessions."""
        return time.perf_counter() - self.start

    def stage(self, name, total, done=0):
        return StageLog(self, name, total, done)

    def metrics(self, stage, step, values):
        values = {key: _number(value) for key, value in values.items()}
        seconds = round(self.seconds(), 3)
        self._append("metrics.jsonl", {"stage": stage, "step": step, "seconds": seconds} | values)
        finite = {key: value for key, value in values.items() if isinstance(value, (int, float))}
        for tracker in self.trackers:
            tracker.log(stage, step, finite)
        return values

    def close(self):
        for tracker in self.trackers:
            tracker.close()

    def warning(self, stage, step, name, what, remedy):
        """Says and records a `Finding`, or a `Notice`, once; step 0: of no step. remedy: may be
        empty."""
        record = {"stage": stage, "step": step, "name": name, "what": what, "remedy": remedy}
        if self.silent or record in self.warned:
            return
        self.warned.append(record)
        place = f"{stage}, step {step}: " if step else ""
        self.say(terminal.one_line(f"warning: {place}{what}{f'; {remedy}' if remedy else ''}"))
        path = self.folder / "warnings.jsonl"
        if record not in read_records(path, []):  # a resumed run checks its models again
            self._append("warnings.jsonl", record)

    def warning_over(self, stage, step, name):
        """`step` was the last that a warning held for."""
        self._append("warnings.jsonl", {"stage": stage, "step": step, "name": name, "over": True})

    def samples(self, stage, step, samples):
        for sample in samples:
            self._append("samples.jsonl", {"stage": stage, "step": step} | sample)

    def tokens(self, stage, step, records):
        """What single tokens earned, see `rto_fast.rto.token_records`."""
        for record in records:
            record = {
                key: [_number(v) for v in value] if isinstance(value, list) else _number(value)
                for key, value in record.items()
            }
            self._append("tokens.jsonl", {"stage": stage, "step": step} | record)


class StageLog:
    """The live line of one stage: `with log.stage("dpo", 100) as stage: stage.step({...}, show=("loss",))`.

    On a terminal one line is redrawn; in a file or a CI log a line is printed for every fifth of the stage.
    """

    def __init__(self, log, name, total, done=0):
        self.log, self.name, self.total, self.count, self.done = log, name, total, done, done
        self.live, self.line = not log.silent and terminal.is_live(), ""
        self.start = self.last = time.perf_counter()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.live:
            terminal.redraw(self.line, err=False)
            terminal.leave_line()

    def step(self, values, show):
        """Records a finished step; the keys in `show` appear on the line. Returns the values as numbers."""
        self.count += 1
        now = time.perf_counter()
        values = {"tokens_per_second": values["tokens"] / (now - self.last)} | values if "tokens" in values else values
        self.last = now
        values = self.log.metrics(self.name, self.count, values)
        self.line = self._line({key: values[key] for key in show if key in values})
        if self.live:
            terminal.redraw(self.line, err=False)
        elif self.count * 5 // self.total > (self.count - 1) * 5 // self.total:
            self.log.say(self.line)
        return values

    def _line(self, values):
        elapsed = time.perf_counter() - self.start
        left = elapsed / (self.count - self.done) * (self.total - self.count)
        figures = "  ".join(f"{ON_THE_LINE.get(key, key)} {short(value)}" for key, value in values.items())
        return f"{self.name:<12} {self.count:>5}/{self.total} {elapsed:>5.0f} s, {left:.0f} s left  {figures}"
