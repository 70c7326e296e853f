"""Stand-ins for a stage's trainer and the run's log, and a checkpoint's state."""

import time

import torch

from rto_fast.training.order import ShuffledIndices

STATE = {
    "a": torch.arange(6.0).view(2, 3).t(),
    "b": [torch.zeros(0), 3, None, ("x", 1.5)],
    "adam": {0: {"step": torch.tensor(2)}, 1: {}},
    "half": torch.ones(3, dtype=torch.bfloat16),
}


class Trainer:
    """Steps of ten items."""

    def __init__(self, size=100, data="one"):
        self.step_count, self.steps = 0, 10
        self.order = ShuffledIndices(size, 0, epochs=1, fingerprint=data)

    def state_dict(self):
        return {"steps": self.step_count, "order": self.order.state_dict()}

    def load_state_dict(self, state):
        self.step_count = state["steps"]
        self.order.load_state_dict(state["order"])
        self.steps = self.step_count + self.order.remaining // 10


class Log:
    start = 0.0

    def __init__(self):
        self.said = []

    def say(self, text):
        self.said.append(text)

    def warning(self, stage, step, name, what, remedy):
        self.said.append(f"{name}: {stage}, step {step}: {what}; {remedy}")

    def seconds(self):
        return time.perf_counter() - self.start


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
