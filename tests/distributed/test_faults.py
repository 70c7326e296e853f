"""Two real processes on a bad day: one of them dies, fails, or a scheduler stops both."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")


def begin(folder, prepare=lambda: None):
    """A run of two ranks, SFT and DPO, that has done its first step."""
    arguments = [*faults.OPTIONS, "--rto.enabled", "false", "--eval.prompts", "2", "--output_dir", folder]
    session = faults.Session(arguments, folder.with_suffix(".txt"), 2, prepare)
    session.run(faults.LIMIT, (folder / "metrics.jsonl").exists)
    return session


def outcome(session):
    started = time.monotonic()
    codes = session.end()
    return {"codes": codes, "said": session.said(), "seconds": time.monotonic() - started}


def kill(folder, rank):
    session = begin(folder)
    session.send(signal.SIGKILL, [rank])
    return outcome(session)


def fail(folder, error):
    """In a backward pass of rank 1, while the other waits for its gradients."""

    def backward(*_):
        raise error

    def prepare():
        if os.environ["RANK"] == "1":
            ZeroOptimizer.backward = backward

    return outcome(begin(folder, prepare))


def terminate(folder):
    session = begin(folder)
    session.send(signal.SIGTERM)
    stopped = outcome(session)
    resumed = outcome(faults.Session(["--resume", folder], folder.with_suffix(".txt"), 2))
    metrics = [(r["stage"], r["step"]) for r in faults.records(folder / "metrics.jsonl")]
    return stopped | {"resumed": resumed, "metrics": metrics}


def main(folder):
    outcomes = {
        "rank 1 killed": kill(folder / "a", 1),
        "rank 0 killed": kill(folder / "b", 0),
        "rank 1 failed": fail(folder / "c", IndexError("no such token")),
        "rank 1 out of memory": fail(folder / "d", torch.OutOfMemoryError("CUDA out of memory.")),
        "terminated": terminate(folder / "e"),
    }
    (folder / "outcomes.json").write_text(json.dumps(outcomes))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Of every bad day: from one process that imports everything once and forks the ranks."""
    folder = tmp_path_factory.mktemp("faults")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    }
    subprocess.run([sys.executable, __file__, str(folder)], env=environment, check=True, timeout=300)
    return json.loads((folder / "outcomes.json").read_text())


def lines(said):
    """What a run said of its end."""
    return [line for line in said.splitlines() if line.startswith("rto_fast: ")]


@pytest.mark.parametrize("dead, alive", [(1, 0), (0, 1)])
def test_a_rank_that_is_killed_ends_the_other(outcomes, dead, alive):
    found = outcomes[f"rank {dead} killed"]
    assert found["codes"][dead] == -signal.SIGKILL and found["codes"][alive] == 1
    (line,) = lines(found["said"])
    assert line.startswith(f"rto_fast: rank {dead} is gone") and "--resume goes on from its last checkpoint" in line
    assert found["seconds"] < 60


def test_a_rank_that_fails_ends_the_other_with_its_error(outcomes):
    found = outcomes["rank 1 failed"]
    (line,) = lines(found["said"])
    assert line.startswith(
        "rto_fast: rank 1: IndexError: no such token; what sft trained after its last checkpoint is not"
    )
    assert "; go on with: python -m rto_fast.train --resume" in line and line.count("--resume") == 1
    assert found["codes"] == [1, 1] and found["seconds"] < 30


def test_a_rank_of_zero_that_runs_out_of_memory_ends_all(outcomes):
    found = outcomes["rank 1 out of memory"]
    (line,) = lines(found["said"])
    assert line.startswith(
        "rto_fast: rank 1: sft: out of memory: lower model.micro_batch_tokens (with DeepSpeed a step cannot"
    )
    assert found["codes"] == [1, 2] and found["seconds"] < 30


def test_a_scheduler_that_stops_both(outcomes):
    found = outcomes["terminated"]
    first, line = lines(found["said"])
    assert first.startswith(
        "rto_fast: stopping: the present step ends first and is saved; a second signal ends the run"
    )
    assert found["codes"] == [0, 0] and "; go on with: python -m rto_fast.train --resume" in line
    assert found["resumed"]["codes"] == [0, 0]
    assert [step for name, step in found["metrics"] if name == "sft"] == [1, 2, 3]


if __name__ == "__main__":
    from rto_fast.training.zero import ZeroOptimizer
    from tests.stress import faults

    faults.warm_up(2)
    main(Path(sys.argv[1]))
