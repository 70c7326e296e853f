"""The log of a run: a live line for each stage, metrics.jsonl and the other files of records, and the trackers."""

import importlib
import json
import math
import os
import socket
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rto_fast.errors import CheckpointError, ConfigError
from rto_fast.reporting.metric_names import CLIP_FRACTION, SECONDS, TOKENS, TOKENS_PER_SECOND
from rto_fast.reporting.run_files import number, read_records
from rto_fast.system import terminal
from rto_fast.system.notices import Notice

if TYPE_CHECKING:
    from tensorboard.summary.writer.record_writer import RecordWriter

ON_THE_LINE = {TOKENS_PER_SECOND: "tok/s", CLIP_FRACTION: "clip"}  # shorter names, so that the line fits a terminal


class Finding(NamedTuple):
    """Something wrong with a run that its user should know."""

    name: str  # a word for the records, such as entropy_collapses
    what: str
    remedy: str


class TensorBoard:
    """Event files, one a stage, in `folder`/STAGE, so that the steps of different stages do not mix.

    Args:
        folder: holds a folder for each stage.
        record: the run's metrics.jsonl. A resumed run writes its event files anew from it, because TensorBoard orders files
            by the time in their names, and a resumed run logs the steps after its checkpoint a second time.
        run: the run's name, with which the names of its event files end. Other runs' files stay as they are.
    """

    def __init__(self, folder: Path, record: Path, run: str):
        self.folder, self.record, self.run = folder, record, run
        self.writers: dict[str, RecordWriter] = {}

    def log(self, stage: str, step: int, values: dict[str, float]) -> None:
        """Adds the values of a step, which `record` holds already."""
        try:
            if stage in self.writers:
                self._add(stage, step, values)
            else:
                self._begin(stage)
        except OSError as error:
            raise CheckpointError(f"{self.folder / stage} could not be written: {error.strerror}") from error

    def _begin(self, stage: str) -> None:
        # torch's SummaryWriter writes in a thread, which would die of a full disk with a traceback of its own.
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        (self.folder / stage).mkdir(parents=True, exist_ok=True)
        for path in (self.folder / stage).glob(f"events.out.tfevents.*.{self.run}"):
            path.unlink()
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}.{self.run}"
        self.writers[stage] = RecordWriter(open(self.folder / stage / name, "wb", buffering=0))
        self.writers[stage].write(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())
        for line in read_records(self.record, []):  # the log has told the user what cannot be read
            step = number(line.get("step"))
            if line.get("stage") == stage and math.isfinite(step):
                self._add(stage, int(step), {k: v for k, v in line.items() if k not in ("stage", "step", SECONDS)})

    def _add(self, stage: str, step: int, values: Mapping[str, object]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        numbers = [(name, number(value)) for name, value in values.items() if math.isfinite(number(value))]
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in numbers]
        event = Event(wall_time=time.time(), step=step, summary=Summary(value=scalars))
        self.writers[stage].write(event.SerializeToString())

    def close(self) -> None:
        for writer in self.writers.values():
            writer.close()


class Service:
    """wandb, or trackio, which has the same interface.

    Args:
        name: the module.
        project: the project that the run appears in.
        run: the run's name.
        config: the run's configuration, as the service shows it.
    Raises:
        ConfigError: the module is not installed.
    """

    def __init__(self, name: str, project: str, run: str, config: object):
        try:
            self.module = importlib.import_module(name)
        except ImportError as error:
            raise ConfigError(f"track.service: {name} cannot be imported ({error}); pip install {name}") from error
        self.module.init(project=project, name=run, config=config)

    def log(self, stage: str, step: int, values: dict[str, float]) -> None:
        # A service counts its own steps. Ours begin anew in each stage, so they are a metric.
        self.module.log({f"{stage}/{name}": value for name, value in values.items()} | {f"{stage}/step": step})

    def close(self) -> None:
        self.module.finish()


def _number(value: Any) -> Any:
    """A tensor of one element as a number, and None for NaN and infinity, which JSON does not have."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def short(value: float | None) -> str:
    """A number in at most five significant characters, for the live line."""
    if value is None or isinstance(value, int):
        return "-" if value is None else f"{value:,}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


class RunLog:
    """Writes the records of a run. Each holds the stage and the step, and those of metrics also the seconds since the run
    began.

    Args:
        output_dir: the run's folder.
        trackers: receive the metrics as well.
        silent: print and write nothing, as on all ranks but one.
    """

    def __init__(self, output_dir: str | Path, trackers: Sequence[TensorBoard | Service] = (), silent: bool = False):
        self.folder, self.trackers, self.silent = Path(output_dir), trackers, silent
        self.start = time.perf_counter()
        self.warned: list[dict] = []  # by this process
        self.said: set[str] = set()  # by `say_once`

    def _append(self, name: str, record: dict[str, Any]) -> None:
        if self.silent:
            return
        try:
            with open(self.folder / name, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise CheckpointError(f"{self.folder / name} could not be written: {error.strerror}") from error

    def say(self, text: str) -> None:
        if not self.silent:
            terminal.say(text)

    def say_once(self, text: str) -> None:
        """Says what this run has not said yet."""
        if text not in self.said:
            self.said.add(text)
            self.say(text)

    def take_notices(self) -> None:
        """Routes this package's own warnings (`Notice`) through `warning`, until the caller leaves its
        `warnings.catch_warnings`. Warnings of other libraries are shown as before."""
        show = warnings.showwarning

        def receive(message: Warning | str, *place: Any, **options: Any) -> None:
            if isinstance(message, Notice):
                self.warning(message.stage, 0, message.name, message.what, remedy="")
            else:
                show(message, *place, **options)

        warnings.simplefilter("always", Notice)
        warnings.showwarning = receive

    def seconds(self) -> float:
        """Seconds since the run began, without the time between its sessions."""
        return time.perf_counter() - self.start

    def stage(self, name: str, total: int, done: int = 0) -> "StageLog":
        return StageLog(self, name, total, done)

    def metrics(self, stage: str, step: int, values: Mapping[str, Any]) -> dict[str, Any]:
        """Records the metrics of a step (numbers, or tensors of one element) and returns them as numbers."""
        values = {key: _number(value) for key, value in values.items()}
        self._append("metrics.jsonl", {"stage": stage, "step": step, SECONDS: round(self.seconds(), 3)} | values)
        finite = {key: value for key, value in values.items() if isinstance(value, (int, float))}
        for tracker in self.trackers:
            tracker.log(stage, step, finite)
        return values

    def close(self) -> None:
        for tracker in self.trackers:
            tracker.close()

    def warning(self, stage: str, step: int, name: str, what: str, remedy: str) -> None:
        """Prints and records a `Finding` or a `Notice`; the same one only once.

        Args:
            step: 0 where the warning does not belong to a step.
            remedy: may be empty.
        """
        record = {"stage": stage, "step": step, "name": name, "what": what, "remedy": remedy}
        if self.silent or record in self.warned:
            return
        self.warned.append(record)
        place = f"{stage}, step {step}: " if step else ""
        self.say(terminal.one_line(f"warning: {place}{what}{f'; {remedy}' if remedy else ''}"))
        if record not in read_records(self.folder / "warnings.jsonl", []):  # a resumed run checks its models again
            self._append("warnings.jsonl", record)

    def warning_over(self, stage: str, step: int, name: str) -> None:
        """Records that `step` was the last one for which a warning held."""
        self._append("warnings.jsonl", {"stage": stage, "step": step, "name": name, "over": True})

    def samples(self, stage: str, step: int, samples: Iterable[dict[str, Any]]) -> None:
        for sample in samples:
            self._append("samples.jsonl", {"stage": stage, "step": step} | sample)

    def tokens(self, stage: str, step: int, records: Iterable[dict[str, Any]]) -> None:
        """Records what single tokens earned; see `rto_fast.rto.metrics`."""
        for record in records:
            record = {
                key: [_number(v) for v in value] if isinstance(value, list) else _number(value)
                for key, value in record.items()
            }
            self._append("tokens.jsonl", {"stage": stage, "step": step} | record)


class StageLog:
    """The live line of one stage: `with log.stage("dpo", 100) as stage: stage.step({...}, show=("loss",))`.

    A terminal shows one line that is redrawn. A file or a CI log gets a line after each fifth of the stage.

    Args:
        log: receives the metrics.
        name: the stage.
        total: steps of the whole stage.
        done: steps that were done before, where the stage is resumed.
    """

    def __init__(self, log: RunLog, name: str, total: int, done: int = 0):
        self.log, self.name, self.total, self.count, self.done = log, name, total, done, done
        self.live, self.line = not log.silent and terminal.is_live(), ""
        self.start = self.last = time.perf_counter()

    def __enter__(self) -> "StageLog":
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            terminal.redraw(self.line, err=False)
            terminal.leave_line()

    def step(self, values: Mapping[str, Any], show: Sequence[str]) -> dict[str, Any]:
        """Records a finished step and returns its metrics as numbers. `show` names those that appear on the line."""
        self.count += 1
        now = time.perf_counter()
        rate = {TOKENS_PER_SECOND: values[TOKENS] / (now - self.last)} if TOKENS in values else {}
        self.last = now
        numbers = self.log.metrics(self.name, self.count, {**rate, **values})
        self.line = self._line({key: numbers[key] for key in show if key in numbers})
        if self.live:
            terminal.redraw(self.line, err=False)
        elif self.count * 5 // self.total > (self.count - 1) * 5 // self.total:
            self.log.say(self.line)
        return numbers

    def _line(self, values: dict[str, Any]) -> str:
        elapsed = time.perf_counter() - self.start
        left = elapsed / (self.count - self.done) * (self.total - self.count)
        figures = "  ".join(f"{ON_THE_LINE.get(key, key)} {short(value)}" for key, value in values.items())
        return f"{self.name:<12} {self.count:>5}/{self.total} {elapsed:>5.0f} s, {left:.0f} s left  {figures}"
