"""Gives pytest-benchmark times that were measured before, because the providers of a group are timed in turns."""

import pytest


class Replay:
    """A timer that advances by a measured time at each call of `round`."""

    def __init__(self):
        self.now, self.seconds = 0.0, iter(())

    def __call__(self):
        return self.now

    def round(self):
        self.now += next(self.seconds)


REPLAY = Replay()
replayed = pytest.mark.benchmark(timer=REPLAY)


def replay(benchmark, group, record, seconds):
    """Shows `seconds`, the rounds of a record, as a row of a group; skips a peer that was not measured, with the reason."""
    if "error" in record and record["provider"].startswith("ours"):
        pytest.fail(record["error"])
    if not seconds:
        pytest.skip(record.get("skipped") or record["error"])
    REPLAY.seconds, benchmark.group = iter(seconds), group
    benchmark.extra_info |= {key: value for key, value in record.items() if value is not seconds}
    benchmark.pedantic(REPLAY.round, rounds=len(seconds))
