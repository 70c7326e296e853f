"""Metrics for other eyes: TensorBoard always, Weights & Biases or trackio where asked for."""

import importlib

from rto_fast.errors import ConfigError


class TensorBoard:
    """One event file a stage, in `folder`/<stage>: steps of different stages do not mix."""

    def __init__(self, folder):
        self.folder, self.writers = folder, {}

    def log(self, stage, step, values):
        if stage not in self.writers:
            from torch.utils.tensorboard import SummaryWriter  # slow to import: not before there is something to say

            # What a run that was resumed logged after its checkpoint is hidden: it comes again.
            self.writers[stage] = SummaryWriter(str(self.folder / stage), purge_step=step, flush_secs=10)
        for name, value in values.items():
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
