"""The checkpoints of a run: which stages are done, the states of the present stage, and the sizes of the logs at each."""

import contextlib
import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from rto_fast.config import Stage
from rto_fast.errors import CheckpointError, Interrupted, TrainingError, UserError, error_text, how_to_go_on
from rto_fast.models.graphs import PassGraphs
from rto_fast.reporting.log import RunLog
from rto_fast.system.output_folder import UNSTARTED
from rto_fast.system.progress import progress
from rto_fast.system.run_lock import RunLock
from rto_fast.system.writing import make_own, sync
from rto_fast.training import ranks
from rto_fast.training.accumulate import Accumulator
from rto_fast.training.budget import TokenBudget
from rto_fast.training.checkpoint_checks import CHECKPOINT, LOGS, find_misfit, new_run, read_progress
from rto_fast.training.optimizer import ScheduledOptimizer
from rto_fast.training.order import ShuffledIndices
from rto_fast.training.state_files import find_damage, is_own_state, load_state, remove_state, save_state, write_text
from rto_fast.training.stop import StopRequest

# The unfinished files that a killed run leaves; see `rto_fast.system.writing`.
UNFINISHED = re.compile(r"\.(progress\.json|results\.json|config\.yaml)\.\d+\.part")


class Trainer:
    """What the training loop steps and a checkpoint saves."""

    steps: int  # of the whole stage
    order: ShuffledIndices
    accumulator: Accumulator
    optimizers: dict[str, ScheduledOptimizer]  # by their names in a checkpoint

    @property
    def step_count(self) -> int:
        """The number of steps done."""
        raise NotImplementedError

    @property
    def skipped(self) -> int:
        """The number of optimizer steps whose gradient was not finite."""
        return sum(optimizer.skipped for optimizer in self.optimizers.values())

    def step(self) -> dict[str, Any]:
        """Takes one step and returns its metrics."""
        raise NotImplementedError

    def check(self) -> None:
        """Checks the optimizer steps so far; see `ScheduledOptimizer.check`."""
        for optimizer in self.optimizers.values():
            optimizer.check()

    def release(self) -> None:
        """Gives back what the stage holds beside the weights that it trains."""
        for optimizer in self.optimizers.values():
            optimizer.release()
        PassGraphs.drop()

    def _parts(self) -> dict[str, ScheduledOptimizer | ShuffledIndices | Accumulator]:
        return {**self.optimizers, "order": self.order, "accumulator": self.accumulator}

    def state_dict(self) -> dict[str, Any]:
        """Returns all that a restored trainer needs to go on exactly as this one would have."""
        return {name: part.state_dict() for name, part in self._parts().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, part in self._parts().items():
            part.load_state_dict(state[name])


class Checkpoints:
    """The checkpoints of the run in `folder`. Every rank calls the same methods at the same time; the main rank writes.

    `progress.json` is the run's memory: the stages that are done, and the points from which the present stage can go on,
    oldest first: its beginning, then each checkpoint that is kept. A point holds the sizes of the logs at that moment, to
    which a resumed run cuts them, so that no record appears twice. The run's name stands there and in each checkpoint: two
    runs may have a link to the same folder, and neither removes what the other wrote. So do the tokens of a pass, by stage.

    Args:
        keep: the number of checkpoints to keep.
        resume: go on with the run that `progress.json` describes.
        stop: asks the run to end.
        lock: the run's lock on its folder, which is checked before anything is saved.
        interval: returns the number of steps between the checkpoints of a stage; 0 saves only where the run is stopped.
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
        interval: Callable[[Stage], int] = lambda stage: 0,
    ):
        self.folder, self.log, self.keep, self.stop = Path(folder), log, keep, stop or StopRequest()
        self.path, self.lock, self.interval = self.folder / "progress.json", lock, interval
        self.run = new_run()
        self.done: list[str] = []
        self.best: float | None = None  # the best evaluation so far
        self.budgets: dict[str, TokenBudget] = {}  # of the stages that are planned
        self.points: list[dict[str, Any]] = [] if resume else [self._point(None)]
        self.named: set[str | None] = set()  # the checkpoints that a resumed run's progress.json names
        if resume:
            self._read()

    def _read(self) -> None:
        progress = read_progress(self.path)
        self.run, self.done, self.points = progress["run"], progress["done"], progress["points"]
        self.budgets = {stage: TokenBudget(**values) for stage, values in progress["budgets"].items()}
        self.named = {point["checkpoint"] for point in self.points}
        self._sweep()  # the run may have been killed before its own
        self._drop_damaged()
        point = self.points[-1]
        for name in LOGS if ranks.is_main() else ():
            self._cut(self.folder / name, point["logs"].get(name, 0))
        self.best = point["best"]
        self.log.start -= point["seconds"]

    def _cut(self, path: Path, size: int) -> None:
        """Drops a log's records of the steps that are done again."""
        try:
            make_own(path, size)
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror}") from error
        there = path.stat().st_size if path.exists() else 0
        if there < size:
            self.log.say(f"{path} has lost records: {there:,} bytes, {size:,} when the checkpoint was made")
        elif there > size:
            os.truncate(path, size)

    def _sweep(self) -> None:
        """Removes this run's checkpoints that are no longer used, and the unfinished files of a kill."""
        for path in list(self.folder.glob(".*.part")) if ranks.is_main() else ():
            if UNFINISHED.fullmatch(path.name):
                path.unlink(missing_ok=True)
        folder, kept = self.folder / "checkpoints", {point["checkpoint"] for point in self.points}
        for path in list(folder.glob("*")) if ranks.is_main() else ():
            name = path.name.removeprefix(".").removesuffix(".part").removesuffix(".old")
            if (
                path.name not in kept
                and CHECKPOINT.fullmatch(name)
                and is_own_state(path, self.run, name in self.named)
            ):
                with contextlib.suppress(OSError):
                    remove_state(path)
        if ranks.is_main() and kept == {None} and not folder.is_symlink():
            with contextlib.suppress(OSError):  # something else is in it
                folder.rmdir()

    def _drop_damaged(self) -> None:
        """Goes back to the last checkpoint whose files are whole, or to the beginning of the stage."""
        good = len(self.points)
        while ranks.is_main() and (name := self.points[good - 1]["checkpoint"]):
            with progress(f"looking at the checkpoint {name}"):
                damage = find_damage(self.folder / "checkpoints" / name, self.run)
            if damage is None:
                break
            good -= 1
            before = self.points[good - 1]["checkpoint"] or "the beginning of the stage"
            self.log.say(f"checkpoint {name} is damaged ({damage}); goes on from {before}")
        self.points = self.points[: int(ranks.from_main(torch.tensor(good)))]

    def log_sizes(self) -> dict[str, int]:
        """The bytes of each log that exists."""
        return {name: (self.folder / name).stat().st_size for name in LOGS if (self.folder / name).exists()}

    def _point(self, checkpoint: str | None, unfinished: dict[str, int] | None = None) -> dict[str, Any]:
        """Describes this moment as a point from which the run can go on.

        Args:
            checkpoint: its name; None at the beginning of a stage.
            unfinished: see `save`.
        """
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
        """Checks that the folder is still this run's.

        Args:
            look: see `RunLock.check`.
        Raises:
            CheckpointError: another run has taken the folder.
        """
        if self.lock and (note := self.lock.check(look)):
            self.log.say(f"warning: {note}")

    def _write(self) -> None:
        self.check_lock()
        if ranks.is_main():
            budgets = {stage: vars(budget) for stage, budget in self.budgets.items()}
            content = {"run": self.run, "budgets": budgets, "done": self.done, "points": self.points}
            write_text(self.path, json.dumps(content))
        ranks.barrier()

    @contextlib.contextmanager
    def resumable(self) -> Iterator[None]:
        """Makes the run resumable, from its beginning at least. Whatever ends the run says how to go on.

        Raises:
            TrainingError: in place of an error that is no `Exception`, such as `SystemExit`, which would end the command
                without a word.
        """
        self._write()
        if ranks.is_main():
            (self.folder / UNSTARTED).unlink(missing_ok=True)
        self.stop.folder = self.folder
        try:
            yield
        except Interrupted:
            raise
        except KeyboardInterrupt as error:  # from another handler of signals than ours
            self.stop.signal = self.stop.signal or signal.SIGINT
            reason = error_text(error, with_type=False, with_notes=True)
            raise self.stop.interrupted("; ".join(filter(None, ["stopped", reason])), together=False) from error
        except Exception as error:
            mended = "once that is mended, " if isinstance(error, (UserError, OSError)) else ""
            error.add_note(mended + how_to_go_on(self.folder))
            raise
        except BaseException as error:
            ended = TrainingError(f"the run was ended by {error_text(error, with_type=True, with_notes=True)}")
            ended.add_note(how_to_go_on(self.folder))
            raise ended from error

    def finish(self, stage: str) -> None:
        """Records that `stage` has written its model, and removes its checkpoints.

        Raises:
            Interrupted: a signal came during the stage.
        """
        self.done, self.points = [*self.done, stage], [self._point(None)]
        self._write()
        self._sweep()
        self.stop.waits = False
        if ranks.any_rank(self.stop.signal is not None):
            raise self.stop.interrupted(f"stopped after {stage}")

    def save(self, stage: str, trainer: Trainer, unfinished: dict[str, int] | None = None) -> None:
        """Saves the state of `trainer` after its last complete step.

        Args:
            unfinished: the `log_sizes` after that step, where what followed it failed and is to be done again.
        """
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
        """Restores the last checkpoint of `stage`, if there is one; returns whether it was saved as `unfinished`."""
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

    def _compare_data(self, stage: str, trainer: Trainer, state: dict[str, Any]) -> None:
        """Says where the data differs from that of the checkpoint, and how the stage goes on."""
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
