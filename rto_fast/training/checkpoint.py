"""Checkpoints of a run: what is done, the states of the stage under way, and how long its logs were at each of them."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch

from rto_fast.errors import CheckpointError, UserError
from rto_fast.reporting.log import RunLog
from rto_fast.reporting.progress import progress
from rto_fast.training import ranks
from rto_fast.training.order import ShuffledIndices
from rto_fast.training.state_files import find_damage, load_state, save_state, sync, write_text
from rto_fast.training.stop import StopRequest

LOGS = ("metrics.jsonl", "samples.jsonl", "tokens.jsonl", "warnings.jsonl")


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
    resumed run cuts them: no record appears twice.

    Args:
        stop: what asks the run to end.
    """

    def __init__(
        self, folder: str | Path, log: RunLog, *, keep: int = 2, resume: bool = False, stop: StopRequest | None = None
    ):  # fmt: skip
        self.folder, self.log, self.keep, self.stop = Path(folder), log, keep, stop or StopRequest()
        self.path = self.folder / "progress.json"
        self.done: list[str] = []
        self.best: float | None = None  # evaluation so far
        self.points: list[dict[str, Any]] = [self._point(None)]
        if resume:
            self._read()

    def _read(self):
        try:
            progress = json.loads(self.path.read_text())
            self.done, self.points = progress["done"], progress["points"]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"--resume: {self.path} cannot be read ({error!r}): nothing to go on from") from error
        self._sweep()  # a kill may have come before it
        self._drop_damaged()
        point = self.points[-1]
        for name in LOGS if ranks.is_main() else ():
            path = self.folder / name
            if path.exists():
                os.truncate(path, min(path.stat().st_size, point["logs"].get(name, 0)))
        self.best = point["best"]
        self.log.start -= point["seconds"]

    def _sweep(self):
        """Removes the checkpoints that are of no more use, and what a kill left of one."""
        folder, kept = self.folder / "checkpoints", {point["checkpoint"] for point in self.points}
        for path in folder.glob("*") if ranks.is_main() else ():
            if path.name not in kept:
                shutil.rmtree(path, ignore_errors=True)
        if ranks.is_main() and kept == {None}:
            shutil.rmtree(folder, ignore_errors=True)

    def _drop_damaged(self):
        """Goes back to the last checkpoint whose files are whole, or to the beginning of the stage."""
        good = len(self.points)
        while ranks.is_main() and (name := self.points[good - 1]["checkpoint"]):
            with progress(f"looking at the checkpoint {name}"):
                damage = find_damage(self.folder / "checkpoints" / name)
            if damage is None:
                break
            good -= 1
            before = self.points[good - 1]["checkpoint"] or "the beginning of the stage"
            self.log.say(f"checkpoint {name} is damaged ({damage}); goes on from {before}")
        self.points = self.points[: int(ranks.from_main(torch.tensor(good)))]

    def _point(self, checkpoint, unfinished=False):
        """A point from which the run can go on: this moment. unfinished: it has still to be evaluated."""
        paths = [self.folder / name for name in LOGS if (self.folder / name).exists()]
        for path in paths if ranks.is_main() else ():
            sync(path)
        sizes = {path.name: path.stat().st_size for path in paths}
        point = {"checkpoint": checkpoint, "logs": sizes, "seconds": self.log.seconds(), "best": self.best}
        return point | ({"unfinished": True} if unfinished else {})

    def _write(self):
        if ranks.is_main():
            write_text(self.path, json.dumps({"done": self.done, "points": self.points}))
        ranks.barrier()

    @contextlib.contextmanager
    def resumable(self) -> Iterator[None]:
        """From here on the run can be resumed, be it from its beginning; what ends it says how."""
        self._write()
        self.stop.folder = self.folder
        try:
            yield
        except (UserError, OSError) as error:
            error.add_note(f"once that is mended, go on with: python -m rto_fast.train --resume {self.folder}")
            raise

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

    def save(self, stage: str, trainer: Trainer, unfinished: bool = False) -> None:
        """The state of `trainer` after its last whole step. unfinished: its evaluation failed, and is to be done."""
        name = f"{stage}-{trainer.step_count:08d}"
        folder = self.folder / "checkpoints"
        with progress(f"writing the checkpoint {name}"):
            save_state(folder / name, trainer.state_dict())
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
        try:
            with progress(f"reading the checkpoint {name}"):
                state = load_state(folder)
                trainer.load_state_dict(state)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise CheckpointError(f"{folder}: not a checkpoint of this run's {stage} stage ({reason}); resume with the "
                                  "options it was begun with") from error  # fmt: skip
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
