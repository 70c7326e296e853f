"""This checkout and another one in turns, on one device, in one run: `benchmarks/gpu.py --only exact --before DIRECTORY`.

Each checkout has a process of its own, which keeps its model while jobs of the same model follow each other, so both see
the same clock rate and temperature. A job is timed by the functions of the checkout that runs it, which both must have.
"""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

ROUNDS = 2  # turns of a decode step; the faster one counts
STEPS = (1, 8, 32, 256)  # sequences
MODELS = ("QWEN3_06B", "LLAMA_20M", "LLAMA3_8B")  # of benchmarks/decoders.py
ITERATION = "0.3B Llama"  # of benchmarks/iteration.py


def jobs(small):
    """[(model, "step" | "uniform" | "iteration", sequences)]; what takes longest comes last."""
    if small:
        return [("TINY", "step", 1), ("TINY", "step", 4), ("TINY", "uniform", 6), ("tiny", "iteration", 8)]
    steps = [(model, "step", sequences) for model in MODELS for sequences in STEPS]
    rollouts = [(model, "uniform", 256) for model in MODELS[:2]]
    return [*steps[:4], rollouts[0], *steps[4:8], rollouts[1], (ITERATION, "iteration", 128), *steps[8:]]


class Checkout:
    """A process that runs the code of one checkout. It answers every job with a record, or with the reason of a failure."""

    def __init__(self, folder: Path, device, rates):
        self.folder = folder
        environment = os.environ | {"PYTHONPATH": str(folder)}
        command = [sys.executable, __file__, str(folder), str(device), json.dumps(rates)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, cwd=folder, env=environment, **pipes)

    def ask(self, job, seconds):
        """The record of a job; the process is ended if it takes longer."""
        timer = threading.Timer(max(seconds, 0.1), self.process.kill)
        timer.start()
        try:
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        return json.loads(line) if line else {"error": f"{self.folder}: its process ended, or time ran out"}

    def close(self):
        self.process.kill()
        self.process.communicate()


def compare(before, after, device, rates, small, deadline):
    """Yields a record for each job: the seconds of both checkouts.

    Args:
        before, after: folders of the checkouts.
        deadline: of `time.perf_counter`.
    """
    checkouts = {"before": Checkout(before, device, rates), "after": Checkout(after, device, rates)}
    try:
        for job in jobs(small):
            record = dict(zip(("model", "what", "sequences"), job)) | {"provider": "ours"}
            for turn in range(ROUNDS if job[1] == "step" else 1):
                for name in list(checkouts) if turn % 2 == 0 else list(checkouts)[::-1]:
                    found = checkouts[name].ask(job, deadline - time.perf_counter())
                    if "seconds" in found:
                        record[name] = min(found["seconds"], record.get(name, float("inf")))
                    elif "error" not in record:
                        late = time.perf_counter() > deadline
                        record["error"] = "out of time" if late else f"{name}: {found.get('error', found)}"
            yield record
            if "error" in record and time.perf_counter() > deadline:
                return
    finally:
        for checkout in checkouts.values():
            checkout.close()


def answer(runner, job, device, rates):
    """The record of a job, by the functions of the checkout that is imported."""
    import torch

    from benchmarks import decoders, iteration, rollout

    model, what, sequences = job
    if what == "iteration":
        runner.decoder, runner.model, runner.engines = None, None, {}
        runner.free()
        settings = {setting.name: setting for setting in (*iteration.SETTINGS, *iteration.SMALL_SETTINGS)}
        found = iteration.measure(settings[model], torch.device(device), rates)
        runner.free()
        return {"seconds": found["seconds"]}
    decoder = getattr(decoders, model)
    is_small = decoder is decoders.TINY
    if what == "step":
        prompt, response = (8, 9) if is_small else (rollout.STEP_CONTEXT, rollout.STEP_TOKENS)
        workload = decoders.equal(sequences, prompt, response, rollout.STEP)
    else:
        workload = decoders.workloads(is_small)["uniform"]
    found = runner.run(rollout.Item(decoder, workload, "ours"))
    return {key: found[key] for key in ("seconds", "tokens_per_second", "error", "skipped") if key in found}


def serve(folder, device, rates):
    """Answers the jobs that come line by line, until there are none."""
    sys.path[0] = folder  # instead of the folder of this script
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what is printed must not mix with the answers
    from benchmarks import rollout

    runner = rollout.Runner(device, rates)
    for line in sys.stdin:
        try:
            found = answer(runner, json.loads(line), device, rates)
        # Whatever stops a job here, for example memory, is a result and no reason to stop.
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}"}
        answers.write(json.dumps(found) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
