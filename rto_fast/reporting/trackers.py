"""Trackers of metrics: TensorBoard in every run, Weights & Biases or trackio where the configuration asks for one."""

import importlib
import math
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rto_fast.errors import CheckpointError, ConfigError
from rto_fast.reporting.metric_names import SECONDS
from rto_fast.reporting.run_files import number, read_records

if TYPE_CHECKING:
    from tensorboard.summary.writer.record_writer import RecordWriter


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
