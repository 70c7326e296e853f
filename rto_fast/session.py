"""What the stages of a run, and an evaluation, share, and the folder of a run: one run uses it at a time."""

import contextlib
import dataclasses
import functools
import gc
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from rto_fast.config import Config, Stage, dump_config
from rto_fast.data.run_data import RunData, Use
from rto_fast.data.tokenizing import stop_token_ids
from rto_fast.data.visited import Visits
from rto_fast.data.world import build_model, build_tokenizer
from rto_fast.errors import ConfigError
from rto_fast.models.directory import check_stop_ids, load_tokenizer
from rto_fast.models.loading import resolve_dtype
from rto_fast.models.model import Model
from rto_fast.models.supplied import Supplied, check_models, supplied_models
from rto_fast.reporting.log import Finding, RunLog, Service, TensorBoard
from rto_fast.reporting.public import public
from rto_fast.rollout import Sampling
from rto_fast.system import deepspeed_import
from rto_fast.system.output_folder import UNSTARTED, refuse_what_is_there, usable
from rto_fast.system.run_lock import RunLock, refuse_if_in_use
from rto_fast.system.threads import use_threads
from rto_fast.training import ranks
from rto_fast.training.budget import TokenBudget, unplanned_budget
from rto_fast.training.checkpoint import Checkpoints
from rto_fast.training.launch import local_rank
from rto_fast.training.order import visits_of
from rto_fast.training.saving import save_model
from rto_fast.training.state_files import write_text
from rto_fast.training.stop import StopRequest


@dataclass(frozen=True)
class Session:
    """What all commands that load models and data share; `rto_fast.evaluate` needs no more."""

    config: Config
    models: tuple[Supplied, ...]  # named by the configuration; the policy starts from the first
    device: str
    dtype: torch.dtype
    tokenizer: PreTrainedTokenizerBase  # the policy's
    stop_ids: list[int]  # tokens that end a response, EOS first
    sampling: Sampling
    data: RunData  # loads a source when it is first used

    @property
    def base(self) -> str:
        """The directory or hub id of the model that the policy starts from."""
        return self.models[0].path

    @property
    def placement(self) -> dict[str, Any]:
        """The keyword arguments of `load_model` that are the same for all models."""
        return {
            "device": self.device,
            "dtype": self.dtype,
            "trust_remote_code": self.config.model.trust_remote_code,
        }


@dataclass(frozen=True)
class TrainingSession(Session):
    """What the stages of a training run share."""

    folder: Path  # the run's output
    log: RunLog
    checkpoints: Checkpoints

    def budget(self, stage: Stage) -> TokenBudget:
        """The tokens that a pass of a stage may have."""
        return self.checkpoints.budgets.get(stage) or unplanned_budget(self.config)

    def warn_of_model(self, finding: Finding) -> None:
        self.log.warning("models", 0, *finding)

    def done(self, stage: str) -> str | None:
        """The model of a stage that was trained before this run was resumed; None if the stage is still to be trained."""
        if stage not in self.checkpoints.done:
            return None
        self.log.say(f"{stage}: already trained")
        return str(self.folder / stage)

    def finish(self, stage: str, path: str) -> str:
        """Records that a stage has trained the model at `path`; returns `path`."""
        gc.collect()  # DeepSpeed's engines are reference cycles that hold a model's weights and moments
        self.checkpoints.finish(stage)
        return path


def open_session(
    config: Config,
    models: Sequence[Supplied],
    device: str,
    say: Callable[[str], object],
    visits: Callable[[Use, int], Visits | None] = lambda use, count: None,
) -> Session:
    """Loads the tokenizer, checks the models' files and prepares the data.

    Args:
        config: The configuration.
        models: The models that it names; the policy starts from the first.
        device: From `prepare_process`.
        say: Is called with a line of text for each report of the data.
        visits: Which examples are used, see `RunData`.

    Raises:
        ModelError: A model or the tokenizer cannot be used.
    """
    base, trust = models[0], config.model.trust_remote_code
    if trust:
        deepspeed_import.reveal()  # a model's own code may import it
    tokenizer = load_tokenizer(config.model.tokenizer or base.path, trust_remote_code=trust)
    check_models(models, tokenizer)
    stop_ids = stop_token_ids(tokenizer, base.generation_config())
    size = base.config().get_text_config().vocab_size
    check_stop_ids(stop_ids, base.path, size)
    return Session(
        config=config,
        models=tuple(models),
        device=device,
        dtype=resolve_dtype(config.model.dtype, device),
        tokenizer=tokenizer,
        stop_ids=stop_ids,
        sampling=Sampling.of(config.rollout, stop_ids),
        data=RunData(config.data, tokenizer, stop_ids, say, size, visits),
    )


def open_training(config: Config, stop: StopRequest, lock: RunLock | None = None) -> TrainingSession:
    """Begins or reopens a run in its folder (see `claimed_output`), and opens the session in it.

    Args:
        config: The configuration.
        stop: Asks the run to end.
        lock: The run's lock on its folder.

    Raises:
        UserError: The folder, the device or a model cannot be used.
    """
    folder = Path(config.resume or config.output_dir)
    if ranks.is_main() and not config.resume:
        with usable(folder):
            refuse_what_is_there(folder)
            (folder / UNSTARTED).touch()  # the run cannot be resumed yet
            (folder / "warnings.jsonl").unlink(missing_ok=True)
        write_text(folder / "config.yaml", dump_config(config))
    ranks.barrier()
    if not (folder / "config.yaml").exists():
        raise ConfigError(f"output_dir: {folder} is not the same folder on every node; give one that all nodes see")
    log = RunLog(folder, silent=not ranks.is_main())
    log.take_notices()
    checkpoints = Checkpoints(
        folder,
        log,
        keep=config.keep_checkpoints,
        resume=bool(config.resume),
        stop=stop,
        lock=lock,
        interval=config.checkpoint_interval,
    )
    if ranks.is_main():
        log.trackers = [TensorBoard(folder / "tensorboard", folder / "metrics.jsonl", checkpoints.run)]
        if config.track.service:
            settings = public(dataclasses.asdict(config))
            log.trackers.append(Service(config.track.service, config.track.project, folder.resolve().name, settings))
    device = prepare_process(config)
    torch.manual_seed(config.seed)
    base = config.sft.model or config.model.path
    assert base  # a configuration without one is refused when it is read
    if base == "embedded" and not config.sft.model:
        base = save_model(Model(build_model(config.seed)), build_tokenizer(), folder / "base")
    visits = functools.partial(visits_of, config)
    session = open_session(config, supplied_models(config, base), device, log.say, visits)
    return TrainingSession(**vars(session), folder=folder, log=log, checkpoints=checkpoints)


def prepare_process(config: Config) -> str:
    """Sets the number of CPU threads, turns off what libraries print about files and a missing GPU; returns the device."""
    has_gpu = torch.cuda.is_available()
    if config.device == "cuda" and not has_gpu:
        raise ConfigError("device: cuda was asked for and there is none; use --device cpu")
    use_cuda = has_gpu and config.device != "cpu"
    if use_cuda and local_rank() >= torch.cuda.device_count():
        raise ConfigError(
            f"device: process {local_rank()} of this machine has no GPU, there are {torch.cuda.device_count()}"
        )
    device = f"cuda:{local_rank()}" if use_cuda else "cpu"
    logging.disable_progress_bar()
    if device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when deepspeed is imported
    use_threads(config.threads)
    return device


@contextlib.contextmanager
def claimed_output(config: Config) -> Iterator[RunLock | None]:
    """Locks the run's folder for this run. The lock is None on all ranks but the main one.

    Raises:
        ConfigError: another run uses the folder, it cannot be used, or it is not empty for a new run. Nothing is changed.
    """
    if not ranks.is_main():
        yield None
        return
    folder = Path(config.resume or config.output_dir)
    made = [each for each in (folder, *folder.parents) if not os.path.lexists(each)]
    with usable(folder):
        refuse_if_in_use(folder)
        if not config.resume:
            refuse_what_is_there(folder)
            folder.mkdir(parents=True, exist_ok=True)
    lock = RunLock(folder)
    try:
        with usable(folder):
            lock.take()
        yield lock
    finally:
        lock.release()
        with contextlib.suppress(OSError):  # empty folders of a run that was refused before it wrote anything
            for each in made:
                each.rmdir()
