"""Damages runs at random moments and resumes them until they end. Each must end like an undisturbed run.

    python -m tests.stress.faults --minutes 5 [--ranks 2] [--seed 0]

The runs train the embedded world's model. They are killed, stopped, deprived of disk and memory, and their files are
damaged. The imports of a process take seconds, so this process imports everything once, and each session of a run is a
fork of it that calls the command `rto_fast.train`. The sessions draw no report and write no model card: figures take
longer than all training here, and nothing depends on them.
"""

import argparse
import contextlib
import importlib
import json
import math
import os
import random
import resource
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from pathlib import Path

os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}

import deepspeed  # noqa: E402, F401
import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from tensorboard.compat.proto.event_pb2 import Event  # noqa: E402, F401

import rto_fast.data.world  # noqa: E402
import rto_fast.training.stop  # noqa: E402
import rto_fast.training.zero  # noqa: E402, F401
from rto_fast.config import load_config  # noqa: E402
from rto_fast.reporting import finish  # noqa: E402
from rto_fast.train import command  # noqa: E402

STAGES = ("sft", "reward_model", "dpo", "rto")
OPTIONS = """
--threads 1 --data.limit 48 --data.held_out 4 --data.cache_dir null --eval.prompts 8 --rollout.max_new_tokens 8
--sft.batch_size 40 --sft.max_steps 3 --reward_model.max_steps 3
--dpo.batch_size 4 --dpo.max_steps 3 --rto.iterations 3 --rto.prompts_per_rollout 8
--rto.batch_size 4 --eval.every 2 --eval.keep_best true --keep_checkpoints 2 --save_every 1
""".split()
MODELS = {*STAGES, "rto_critic", "rto_best"}
LOGS = ("metrics.jsonl", "samples.jsonl", "tokens.jsonl", "warnings.jsonl")
LIMIT = 60.0  # seconds in which what is left of a run must end by itself
CLOSE = 1e-3  # relative: the same run in float32 on another number of ranks


class Lost(Exception):
    """A run was lost, or did not print what it should have."""


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def fork(arguments, output, environment, prepare):
    """Starts a process that runs the command with its output in a file; returns its id."""
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.environ.update(environment)
        sys.argv = ["rto_fast.train", *map(str, arguments)]
        prepare()
        command()
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def warm_up(ranks):
    """Imports and compiles what every fork would need."""
    assert threading.active_count() == 1  # others would be missing in a fork
    finish.report_run = finish.publish_run = lambda *_: None
    load_config([])
    importlib.import_module("transformers.models.llama.modeling_llama")
    if ranks > 1:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")


class Session:
    """A run's processes between a start and an end."""

    def __init__(self, arguments, output, ranks=1, prepare=lambda: None):
        output.unlink(missing_ok=True)
        self.output, self.codes = output, {}
        world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
        self.processes = [
            fork(arguments, output, world | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, prepare)
            for rank in range(ranks)
        ]

    def said(self):
        return self.output.read_text(errors="replace") if self.output.exists() else ""

    def poll(self):
        """Whether all processes have ended."""
        for process in self.processes:
            if process not in self.codes:
                found, status = os.waitpid(process, os.WNOHANG)
                if found:
                    self.codes[process] = os.waitstatus_to_exitcode(status)
        return len(self.codes) == len(self.processes)

    def run(self, seconds, until=lambda: False, every=0.01):
        """Waits until it ends or `until` is true, `seconds` at most; returns whether it has ended."""
        end = time.monotonic() + seconds
        while not self.poll() and time.monotonic() < end and not until():
            time.sleep(every)
        return self.poll()

    def send(self, number, ranks=None):
        for rank, process in enumerate(self.processes):
            if process not in self.codes and (ranks is None or rank in ranks):
                os.kill(process, number)

    def end(self):
        """Waits for the end and returns the exit codes by rank. What takes too long is killed: `Lost`."""
        if not self.run(LIMIT):
            self.send(signal.SIGKILL)
            self.run(LIMIT)
            raise Lost(f"hangs: no end within {LIMIT:.0f} s; it said: {self.said()[-500:]}")
        return [self.codes[process] for process in self.processes]


class BadDays:
    """A run from its start to its end, damaged on the way.

    Args:
        dice: `random.Random`. ranks: of each session. resize: another number of them each time. longest: seconds until a
            harm at a random moment.
    """

    def __init__(self, folder, dice, ranks, resize, longest):
        self.folder, self.dice, self.ranks, self.resize, self.longest = folder, dice, ranks, resize, longest
        self.sessions = 0

    def start(self, *options, prepare=lambda: None, output=".txt"):
        self.sessions += 1
        begun = (self.folder / "progress.json").exists()
        arguments = ["--resume", self.folder] if begun else [*OPTIONS, "--output_dir", self.folder]
        ranks = self.dice.randint(1, self.ranks) if self.resize else self.ranks
        return Session([*arguments, *options], self.folder.with_suffix(output), ranks, prepare)

    def is_over(self):
        return (self.folder / "results.json").exists()

    def finish(self):
        session = self.start()
        if any(session.end()):
            raise Lost(f"exit codes {session.codes}: {session.said()[-500:]}")

    def checkpoints(self):
        return sorted(self.folder.glob("checkpoints/*-*[0-9]"), key=lambda path: path.stat().st_ctime_ns)

    def parts(self):
        return [*self.folder.glob(".*.part"), *self.folder.glob("checkpoints/.*.part")]

    # Faults: each runs one session, and returns whether the fault came before the session ended by itself.

    def kill(self, prepare=lambda: None):
        """SIGKILL at any moment."""
        session = self.start(prepare=prepare)
        if session.run(self.dice.uniform(0, self.longest)):
            return self._whole(session)
        session.send(signal.SIGKILL)
        session.end()
        return True

    def kill_writing(self):
        """SIGKILL while a checkpoint, a model or `progress.json` is being written."""
        session, skipped = self.start(), self.dice.randrange(8)
        seen = set()

        def writes():
            seen.update((path.name, path.stat().st_ino) for path in self.parts() if path.exists())
            return len(seen) > skipped

        with contextlib.suppress(FileNotFoundError):  # it was there a moment ago
            session.run(LIMIT, writes, every=0.0003)
        if session.poll():
            return self._whole(session)
        time.sleep(self.dice.choice([0, 0, 0.001, 0.003]))
        session.send(signal.SIGKILL)
        session.end()
        return True

    def kill_one(self):
        """SIGKILL of one rank after the ranks have joined: the others end by themselves."""
        session = self.start()
        session.run(LIMIT, session.said)
        if session.run(self.dice.uniform(0, self.longest)):
            return self._whole(session)
        victim = self.dice.randrange(len(session.processes))
        session.send(signal.SIGKILL, [victim])
        session.end()
        codes = [session.codes[process] for process in session.processes]
        if 0 in codes and not self.is_over():
            raise Lost(f"rank {victim} was killed, and the exit codes are {codes}: {session.said()[-500:]}")
        return True

    def terminate(self):
        """A scheduler's SIGTERM: the run ends with exit code 0 and prints how to continue."""
        session = self.start()
        if session.run(self.dice.uniform(0, self.longest)):
            return self._whole(session)
        session.send(signal.SIGTERM)
        codes, said = session.end(), session.said()
        if set(codes) == {-signal.SIGTERM} and not said:  # before the command had begun
            return True
        if any(codes):
            raise Lost(f"SIGTERM: exit codes {codes}: {said[-500:]}")
        if self.is_over():
            return False
        how = f"; go on with: python -m rto_fast.train --resume {self.folder}"
        if how not in said and "stopped before the first step; start it again" not in said:
            raise Lost(f"SIGTERM: it does not say how to go on: {said[-500:]}")
        if "stopped in " in said:  # and the state is that of the step it names
            stage, _, step = said.rpartition("stopped in ")[2].partition(";")[0].partition(" after step ")
            progress = json.loads((self.folder / "progress.json").read_text())
            if progress["points"][-1]["checkpoint"] != f"{stage}-{int(step):08d}":
                raise Lost(f"SIGTERM: the state was not saved: {said[-500:]}")
        return True

    def stop_twice(self):
        """A second signal, of either kind, during the last step or the checkpoint that the first signal has started."""
        session = self.start(prepare=lambda: setattr(rto_fast.training.stop, "ECHO", 0.0))
        if session.run(self.dice.uniform(0, self.longest)):
            return self._whole(session)
        first, second = self.dice.choices([signal.SIGINT, signal.SIGTERM], k=2)
        session.send(first)
        session.run(self.dice.choice([0.001, 0.01, 0.03, 0.1]), every=0.0005)
        session.send(second)
        # While a process is in foreign code, for example joins the ranks, two signals in quick succession arrive as one.
        if not session.run(5.0):
            session.send(second)
        codes = session.end()
        allowed = {0, 130, -signal.SIGINT, -signal.SIGTERM}
        if self.ranks > 1:  # one that took the second signal for an echo finds the other gone
            allowed.add(1)
        if not allowed.issuperset(codes):
            raise Lost(f"two signals: exit codes {codes}: {session.said()[-500:]}")
        return not self.is_over()

    def damage(self):
        """Truncates checkpoint files, flips a bit of them or deletes them: the run notices, and uses an older checkpoint."""
        if not self.checkpoints():
            self.kill()
        found = self.checkpoints()[-self.dice.choice([1, 1, 2]) :]
        for folder in found:
            path = self.dice.choice(sorted(folder.iterdir()))
            content = bytearray(path.read_bytes())
            match self.dice.randrange(3):
                case 0:
                    del content[self.dice.randrange(len(content)) :]
                case 1:
                    content[self.dice.randrange(len(content))] ^= 1 << self.dice.randrange(8)
            path.write_bytes(content) if content else path.unlink()
        if not found:
            return False
        session = self.start()
        session.run(LIMIT, lambda: "is damaged (" in session.said())
        said = session.said()
        session.send(signal.SIGKILL)
        session.end()
        newest = json.loads((self.folder / "progress.json").read_text())["points"]
        if "is damaged (" not in said and any(p["checkpoint"] for p in newest):
            raise Lost(f"damage in {[path.name for path in found]} was not found: {said[-500:]}")
        return True

    def full_disk(self):
        """Limits the size of files at random: the system refuses larger writes, as on a full disk."""
        size = int(math.exp(self.dice.uniform(math.log(8e3), math.log(2e6))))
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        session = self.start(prepare=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard)))
        codes = session.end()
        if not any(codes):
            return self._whole(session)
        said = session.said()
        if 0 in codes or "File too large" not in said or (len(codes) == 1 and "Traceback" in said):
            raise Lost(f"full disk ({size:,} bytes): exit codes {codes}: {said[-500:]}")
        return True

    def clock(self):
        """The clock jumps by years, forwards and back, and files come from the future; then SIGKILL."""
        for path in self.folder.rglob("*"):
            if path.exists():
                os.utime(path, (self.dice.uniform(1e8, 4e9),) * 2)
        real, dice = time.time, random.Random(self.dice.random())

        def jump():
            time.time = lambda: real() + dice.uniform(-1e9, 1e9)

        return self.kill(prepare=jump)

    def hanging_reward(self):
        """A reward function that does not return."""
        calls, real = self.dice.randrange(3), rto_fast.data.world.gold_reward

        def hang():
            left = iter(range(calls))

            def hangs(prompts, responses, finished=None):
                if next(left, None) is None:
                    time.sleep(1e6)
                return real(prompts, responses, finished)

            rto_fast.data.world.gold_reward = hangs

        session = self.start("--reward_model.timeout", "0.5", prepare=hang)
        codes, said = session.end(), session.said()
        if not any(codes):
            return self._whole(session)
        if 0 in codes or "no scores for" not in said:
            raise Lost(f"hanging reward: exit codes {codes}: {said[-500:]}")
        return True

    def fight(self):
        """Two runs for the folder, at once or one after the other, as new ones or resumed: one is told that the other has
        it, and that one is killed; whatever comes next finds its lock."""
        sessions = [self.start()]
        sessions[0].run(self.dice.choice([0.0, self.dice.uniform(0, self.longest)]))
        if sessions[0].poll():
            return self._whole(sessions[0])
        sessions.append(self.start(output=".second.txt"))
        sessions[0].run(LIMIT, sessions[1].poll)
        sessions.sort(key=lambda session: not session.poll())
        refused, winner = sessions
        code, said = refused.end()[0], refused.said()
        if self.is_over():  # one had ended before the other began
            if {code, winner.end()[0]} - {0, 2}:
                raise Lost(f"two runs, one after the other: {said[-500:]} {winner.said()[-500:]}")
            return False
        holder = f"is in use: process {winner.processes[0]} on {socket.gethostname()} "
        if code != 2 or holder not in said or "Traceback" in said:
            raise Lost(f"two runs: exit code {code}, not {holder!r}: {said[-500:]}")
        if winner.run(self.dice.uniform(0, self.longest)):
            return self._whole(winner)
        winner.send(signal.SIGKILL)
        winner.end()
        return True

    def _whole(self, session):
        codes = session.end()
        if any(codes) or not self.is_over():
            raise Lost(f"ended by itself, exit codes {codes}: {session.said()[-500:]}")
        return False


HARMS = {
    "SIGKILL at any moment": (BadDays.kill, 8),
    "SIGKILL while writing": (BadDays.kill_writing, 5),
    "SIGTERM": (BadDays.terminate, 4),
    "two signals": (BadDays.stop_twice, 4),
    "damaged checkpoint": (BadDays.damage, 2),
    "full disk": (BadDays.full_disk, 2),
    "clock jumps": (BadDays.clock, 2),
    "reward function hangs": (BadDays.hanging_reward, 1),
    "two runs for one folder": (BadDays.fight, 4),
}  # with how often they come


def weights(folder):
    return {path.parent.name: load_file(path) for path in Path(folder).glob("[!.]*/model.safetensors")}


def records(path):
    """The record without values measured in seconds."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in line.items() if "second" not in key} for line in lines]


def compare(found, truth, exactly=True):
    """Raises `Lost` unless two runs ended alike: to the last bit, or up to rounding."""
    ours, theirs = weights(found), weights(truth)
    if not MODELS <= ours.keys() == theirs.keys():
        raise Lost(f"models: {sorted(ours)}")
    for name, tensors in theirs.items():
        for key, value in tensors.items():
            difference = (ours[name][key] - value).norm() / value.norm()
            if not torch.equal(ours[name][key], value) if exactly else not difference < CLOSE:
                raise Lost(f"{name}: {key} differs by {difference:.1e}")
    for name in LOGS if exactly else LOGS[:1]:
        a, b = records(found / name), records(truth / name)
        if not exactly:
            a, b = ([(r["stage"], r["step"]) for r in lines] for lines in (a, b))
        if a != b:
            raise Lost(f"{name} differs: {len(a)} records, not {len(b)}")
    if exactly and (found / "results.json").read_text() != (truth / "results.json").read_text():
        raise Lost("results.json differs")
    left = [path.name for path in [*found.glob(".*"), *found.glob("checkpoints"), *found.glob("run.lock")]]
    if left:
        raise Lost(f"{left} was left behind")


def table(faults, lost):
    rows = [(name, count, count - lost[name], lost[name]) for name, count in faults.items()]
    rows.append(("all", faults.total(), faults.total() - lost.total(), lost.total()))
    width = max(len(name) for name, *_ in rows)
    lines = [f"{'fault':<{width}}  {'times':>6}  {'survived':>8}  {'lost':>5}"]
    return "\n".join(lines + [f"{name:<{width}}  {n:>6}  {s:>8}  {x:>5}" for name, n, s, x in rows])


def live(text):
    if sys.stdout.isatty():
        print(f"\r{text}\033[K", end="", flush=True)


def main(arguments=None):
    """Returns the number of faults after which a run was lost or ended differently."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.stress.faults", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    warm_up(options.ranks)
    dice = random.Random(options.seed)
    harms = dict(HARMS)
    if options.ranks > 1:
        harms["SIGKILL of one rank"] = BadDays.kill_one, 6
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    for name in ("truth", "again"):
        started = time.monotonic()
        BadDays(folder / name, dice, options.ranks, False, 0.0).finish()
        seconds = time.monotonic() - started
    compare(folder / "again", folder / "truth")
    print(f"a run that is left alone takes {seconds:.1f} s and repeats to the last bit; files in {folder}", flush=True)
    faults, lost = Counter(), Counter()
    sessions, runs, started = 0, 0, time.monotonic()
    while time.monotonic() - started < 60 * options.minutes:
        resize = options.ranks > 1 and runs % 2 == 1
        days = BadDays(folder / f"run{runs}", dice, options.ranks, resize, 0.7 * seconds)
        suffered: Counter = Counter()
        try:
            for _ in range(dice.randint(4, 20)):
                if days.is_over() or time.monotonic() - started > 60 * options.minutes:
                    break
                (name,) = dice.choices(list(harms), [weight for _, weight in harms.values()])
                suffered[name] += 1  # also one that is lost by this
                suffered[name] -= not harms[name][0](days)
                so_far = f"{(faults + suffered).total()} faults, {lost.total()} lost"
                live(f"{time.monotonic() - started:.0f} s: {so_far}; run {runs}: {name}")
            if not days.is_over():
                days.finish()
            compare(days.folder, folder / "truth", exactly=not resize)
            shutil.rmtree(days.folder)
        except Lost as reason:
            lost += +suffered or Counter({"none": 1})
            print(f"\nlost: {days.folder} after {dict(+suffered)}: {reason}", flush=True)
        faults += suffered
        sessions, runs = sessions + days.sessions, runs + 1
    how = (
        "to the last bit" if options.ranks == 1 else f"to the last bit, or on 1 to {options.ranks} ranks within {CLOSE}"
    )
    print(
        f"\n{table(faults, lost)}\n\n{runs} runs of {sessions} sessions in {time.monotonic() - started:.0f} s, each "
        f"compared with an undisturbed one: {how}"
    )
    print(f"kills survived {faults.total() - lost.total()}, lost {lost.total()}")
    if not lost:
        shutil.rmtree(folder)
    return lost.total()


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
