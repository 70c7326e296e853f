"""Metrics for other eyes: TensorBoard always, Weights & Biases or trackio where asked for."""

import importlib
import math
import os
import socket
import time

from rto_fast.errors import CheckpointError, ConfigError
from rto_fast.reporting.run_files import number, read_records


class TensorBoard:
    """One event file a stage, in `folder`/<stage>: steps of different stages do not mix.

    Args:
        record: the run's metrics.jsonl. A resumed run writes its stages' event files anew from it: TensorBoard orders files
            by the clock in their names, and what was logged after the checkpoint comes again.
        run: the run's name, with which the names of its files end: others' are left alone.
    """

    def __init__(self, folder, record, run):
        self.folder, self.record, self.run, self.writers = folder, record, run, {}

    def log(self, stage, step, values):
        """`record` holds these values already."""
        try:
            if stage in self.writers:
                self._add(stage, step, values)
            else:
                self._begin(stage)
        except OSError as error:
            raise CheckpointError(f"{self.folder / stage} could not be written: {error.strerror}") from error

    def _begin(self, stage):
        # Not torch's SummaryWriter: it writes in a thread, which would die of a full disk with a traceback of its own.
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        (self.folder / stage).mkdir(parents=True, exist_ok=True)
        for path in (self.folder / stage).glob(f"events.out.tfevents.*.{self.run}"):
            path.unlink()
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}.{self.run}"
        self.writers[stage] = RecordWriter(open(self.folder / stage / name, "wb", buffering=0))
        self.writers[stage].write(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())
        for line in read_records(self.record, []):  # what cannot be read has been said
            step = number(line.get("step"))
            if line.get("stage") == stage and math.isfinite(step):
                self._add(stage, int(step), {k: v for k, v in line.items() if k not in ("stage", "step", "seconds")})

    def _add(self, stage, step, values):
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        numbers = [(name, number(value)) for name, value in values.items() if math.isfinite(number(value))]
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in numbers]
        event = Event(wall_time=time.time(), step=step, summary=Summary(value=scalars))
        self.writers[stage].write(event.SerializeToString())

    def close(self):
        for writer in self.writers.values():
            writer.close()


class Service:
    """wandb, or trackio, which has its interface.

    Raises:
        ConfigError: it is not installed.
    """

    def __init__(self, name, project, run, config):
        try:
            self.module = importlib.import_module(name)
        except ImportError as error:
            raise ConfigError(f"track.service: {name} cannot be imported ({error}); pip install {name}") from error
        self.module.init(project=project, name=run, config=config)

    def log(self, stage, step, values):
        # A service counts its own steps; ours, which begin anew in each stage, are a metric.
        self.module.log({f"{stage}/{name}": value for name, value in values.items()} | {f"{stage}/step": step})

    def close(self):
        self.module.finish()
