"""Metrics for other eyes: TensorBoard always, Weights & Biases or trackio where asked for."""

import importlib
import json
import shutil

from rto_fast.errors import ConfigError


class TensorBoard:
    """One event file a stage, in `folder`/<stage>: steps of different stages do not mix.

    Args:
        record: the run's metrics.jsonl. A resumed run writes its stages' event files anew from it: TensorBoard orders files
            by the clock in their names, and what was logged after the checkpoint comes again.
    """

    def __init__(self, folder, record):
        self.folder, self.record, self.writers = folder, record, {}

    def log(self, stage, step, values):
        """`record` holds these values already."""
        if stage in self.writers:
            self._add(stage, step, values)
            return
        from torch.utils.tensorboard import SummaryWriter  # slow to import: not before there is something to say

        shutil.rmtree(self.folder / stage, ignore_errors=True)
        self.writers[stage] = SummaryWriter(str(self.folder / stage), flush_secs=10)
        with open(self.record) as lines:
            for line in map(json.loads, lines):
                if line["stage"] == stage:
                    self._add(
                        stage, line["step"], {k: v for k, v in line.items() if k not in ("stage", "step", "seconds")}
                    )

    def _add(self, stage, step, values):
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self.writers[stage].add_scalar(name, value, step)

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
