"""Checkpoints of a run: what is done, the states of the stage under way, and how long its logs were at each of them."""

import contextlib
import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch

from rto_fast.errors import CheckpointError, Interrupted, TrainingError, UserError, error_text, how_to_go_on
from rto_fast.reporting.log import RunLog
from rto_fast.system.progress import progress
from rto_fast.system.writing import make_own, sync
from rto_fast.training import ranks
from rto_fast.training.order import ShuffledIndices
from rto_fast.training.progress_file import CHECKPOINT, LOGS, UNSTARTED, new_run, read_progress
from rto_fast.training.run_lock import RunLock
from rto_fast.training.state_files import OWNER, find_damage, load_state, owner_of, remove_state, save_state, write_text
from rto_fast.training.state_match import find_misfit
from rto_fast.training.stop import StopRequest

# What a kill leaves of the files that a run alone writes; see `rto_fast.system.writing`.
UNFINISHED = re.compile(r"\.(progress\.json|results\.json|config\.yaml)\.\d+\.part")


class Trainer(Protocol):
    """What a stage steps, and a checkpoint holds."""

    steps: int
    order: ShuffledIndices

    @property
    def step_count(self) -> int:
        """Steps done."""

    @property
    def skipped(self) -> int:
        """Optimizer steps whose gradient was not finite."""

    def step(self) -> dict:
        """One step; returns its metrics."""

    def state_dict(self) -> dict: ...
    def load_state_dict(self, state: dict) -> None: ...


class Checkpoints:
    """The checkpoints of a run in `folder`. Every rank calls the same methods at the same time; the main one writes.

    `progress.json` is the run's memory: stages that are done, and the points from which the one under way can go on, oldest
    first: its beginning, then each checkpoint that is kept. With each are the sizes of the logs at that moment, to which a
    resumed run cuts them: no record appears twice. The run's name is there and in each checkpoint: what another run wrote,
    in a folder that both have a link to, is not removed.

    Args:
        stop: what asks the run to end. lock: the run's, looked at before anything is saved.
    """

    def __init__(
        self,
        folder: str | Path,
        log: RunLog,
        *,
        keep: int = 2,
        resume: bool = False,
        stop: StopRequest | None = None,
        lock: RunLock | None = None,
    ):
        self.folder, self.log, self.keep, self.stop = Path(folder), log, keep, stop or StopRequest()
        self.path, self.lock = self.folder / "progress.json", lock
        self.run = new_run()
        self.done: list[str] = []
        self.best: float | None = None  # evaluation so far
        self.points: list[dict[str, Any]] = [] if resume else [self._point(None)]
        self.named: set[str | None] = set()  # checkpoints of a resumed run, by its own account
        if resume:
            self._read()

    def _read(self):
        progress = read_progress(self.path)
        self.run, self.done, self.points = progress["run"], progress["done"], progress["points"]
        self.named = {point["checkpoint"] for point in self.points}
        self._sweep()  # a kill may have come before it
        self._drop_damaged()
        point = self.points[-1]
        for name in LOGS if ranks.is_main() else ():
            self._cut(self.folder / name, point["logs"].get(name, 0))
        self.best = point["best"]
        self.log.start -= point["seconds"]

    def _cut(self, path, size):
        """A log's records of what is done again are dropped."""
        try:
            make_own(path, size)
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror}") from error
        there = path.stat().st_size if path.exists() else 0
        if there < size:
            self.log.say(f"{path} has lost records: {there:,} bytes, {size:,} when the checkpoint was made")
        elif there > size:
            os.truncate(path, size)

    def _sweep(self):
        """Removes the checkpoints that are of no more use, and what a kill left of one, or of a file that was written."""
        for path in list(self.folder.glob(".*.part")) if ranks.is_main() else ():
            if UNFINISHED.fullmatch(path.name):
                path.unlink(missing_ok=True)
        folder, kept = self.folder / "checkpoints", {point["checkpoint"] for point in self.points}
        for path in list(folder.glob("*")) if ranks.is_main() else ():
            if path.name not in kept and self._is_own(path):
                with contextlib.suppress(OSError):
                    remove_state(path)
        if ranks.is_main() and kept == {None} and not folder.is_symlink():
            with contextlib.suppress(OSError):  # where something else is in it
                folder.rmdir()

    def _is_own(self, path: Path) -> bool:
        """Whether a folder is a checkpoint of this run, whole or in parts, by its name and by what it says itself."""
        name = path.name.removeprefix(".").removesuffix(".part").removesuffix(".old")
        if not CHECKPOINT.fullmatch(name) or not path.is_dir():
            return False
        owner = owner_of(path)
        begun = all(file.name == OWNER and not file.stat().st_size for file in path.iterdir())
        return owner == self.run or (owner is None and (name in self.named or begun))

    def _drop_damaged(self):
        """Goes back to the last checkpoint whose files are whole, or to the beginning of the stage."""
        good = len(self.points)
        while ranks.is_main() and (name := self.points[good - 1]["checkpoint"]):
            folder = self.folder / "checkpoints" / name
            with progress(f"looking at the checkpoint {name}"):
                damage = find_damage(folder)
            if damage is None and owner_of(folder) not in (self.run, None):
                damage = "it is another run's"
            if damage is None:
                break
            good -= 1
            before = self.points[good - 1]["checkpoint"] or "the beginning of the stage"
            self.log.say(f"checkpoint {name} is damaged ({damage}); goes on from {before}")
        self.points = self.points[: int(ranks.from_main(torch.tensor(good)))]

    def log_sizes(self) -> dict[str, int]:
        """Bytes of each log there is."""
        return {name: (self.folder / name).stat().st_size for name in LOGS if (self.folder / name).exists()}

    def _point(self, checkpoint, unfinished=None):
        """A point from which the run can go on: this moment, or as `unfinished` the logs' sizes before what is to be done
        again after the step."""
        sizes = self.log_sizes()
        for name in sizes if ranks.is_main() else ():
            sync(self.folder / name)
        point = {
            "checkpoint": checkpoint,
            "logs": sizes if unfinished is None else unfinished,
            "seconds": self.log.seconds(),
            "best": self.best,
        }
        return point | ({} if unfinished is None else {"unfinished": True})

    def check_lock(self, look: bool = True) -> None:
        """
        Args:
            look: see `RunLock.check`.
        Raises:
            CheckpointError: another run has taken the folder.
        """
        if self.lock and (note := self.lock.check(look)):
            self.log.say(f"warning: {note}")

    def _write(self):
        self.check_lock()
        if ranks.is_main():
            write_text(self.path, json.dumps({"run": self.run, "done": self.done, "points": self.points}))
        ranks.barrier()

    @contextlib.contextmanager
    def resumable(self) -> Iterator[None]:
        """From here on the run can be resumed, be it from its beginning; whatever ends it says how.

        Raises:
            TrainingError: instead of what is no `Exception`, such as `SystemExit`: it would end the command without a word.
        """
        self._write()
        if ranks.is_main():
            (self.folder / UNSTARTED).unlink(missing_ok=True)
        self.stop.folder = self.folder
        try:
            yield
        except Interrupted:
            raise
        except KeyboardInterrupt as error:  # of somebody's own handler of signals
            self.stop.signal = self.stop.signal or signal.SIGINT
            said = error_text(error, with_type=False, with_notes=True)
            raise self.stop.interrupted("; ".join(filter(None, ["stopped", said])), together=False) from error
        except Exception as error:
            mended = "once that is mended, " if isinstance(error, (UserError, OSError)) else ""
            error.add_note(mended + how_to_go_on(self.folder))
            raise
        except BaseException as error:
            ended = TrainingError(f"the run was ended by {error_text(error, with_type=True, with_notes=True)}")
            ended.add_note(how_to_go_on(self.folder))
            raise ended from error

    def is_done(self, stage: str) -> bool:
        return stage in self.done

    def finish(self, stage: str) -> None:
        """`stage` has written its model: its checkpoints are of no more use."""
        self.done, self.points = [*self.done, stage], [self._point(None)]
        self._write()
        self._sweep()
        self.stop.waits = False
        if ranks.any_rank(self.stop.signal is not None):
            raise self.stop.interrupted(f"stopped after {stage}")

    def save(self, stage: str, trainer: Trainer, unfinished: dict[str, int] | None = None) -> None:
        """The state of `trainer` after its last whole step. unfinished: what followed it failed and is to be done again; the
        `log_sizes` before that."""
        self.check_lock()
        name = f"{stage}-{trainer.step_count:08d}"
        folder = self.folder / "checkpoints"
        with progress(f"writing the checkpoint {name}"):
            save_state(folder / name, trainer.state_dict(), self.run)
        beginning, *others = [point for point in self.points if point["checkpoint"] != name]
        self.points = [beginning, *others[max(0, len(others) - self.keep + 1) :], self._point(name, unfinished)]
        self._write()
        self._sweep()

    def restore(self, stage: str, trainer: Trainer) -> bool:
        """Puts `trainer` where the last checkpoint of `stage` was, if there is one; returns whether it was `unfinished`."""
        name = self.points[-1]["checkpoint"]
        if not name or name.rpartition("-")[0] != stage:
            return False
        folder = self.folder / "checkpoints" / name
        with progress(f"reading the checkpoint {name}"):
            state = load_state(folder)
        try:
            if misfit := find_misfit(state, trainer.state_dict()):
                raise ValueError(misfit)
            trainer.load_state_dict(state)
        except (LookupError, TypeError, ValueError, RuntimeError, ArithmeticError) as error:
            raise CheckpointError(
                f"{folder}: not a checkpoint of this run's {stage} stage ({error_text(error)}); resume with the "
                "options it was begun with"
            ) from error
        self.log.say(f"{stage}: goes on after step {trainer.step_count}")
        self._compare_data(stage, trainer, state["order"])
        return self.points[-1].get("unfinished", False)

    def _compare_data(self, stage, trainer, state):
        """Says where the data is another than that of the checkpoint, and how the stage goes on."""
        order = trainer.order
        if difference := order.difference(state):
            how = (
                "the stage goes on as if this had been its data from the beginning "
                f"(trained on {order.visited:,} examples, steps to go: {trainer.steps - trainer.step_count:,}); "
                "for the run as it was begun, give it its own data"
            )
            self.log.warning(stage, trainer.step_count, "data", f"the data has changed: {difference}", how)
        elif "fingerprint" not in state:
            self.log.say(f"{stage}: the checkpoint's version did not record its data; it is taken to be the same")

    def keep_best(self, score: float) -> None:
        self.best = score
