"""Rewards as strangers write them; `--reward_model.function tests.stress.fuzz.rewards:NAME`."""

import asyncio
import os
import random
import time

import torch


def fine(prompts, responses):
    return [len(response) / 10 for response in responses]


def wrong_count(prompts, responses):
    return [0.0] * (len(responses) + random.choice([-1, 1]))


def no_number(prompts, responses):
    return [
        random.choice([None, "1", "x\x1b[2J", [], {}, b"1", float("nan"), -float("inf"), 10**400, True, 1e39])
    ] * len(responses)


def no_list(prompts, responses):
    return random.choice([None, 1.0, "x" * len(responses), {}, iter([0.0]), object(), torch.zeros(len(responses), 2)])


def with_gradient(prompts, responses):
    return torch.ones(len(responses), 1, requires_grad=True)[:, 0]


def raises(prompts, responses):
    raise random.choice(
        [KeyError, OSError, SystemExit, asyncio.CancelledError, MemoryError, AssertionError, StopIteration]
    )("\x1b[2J\nno\udcff reward" * random.choice([0, 1, 500]))


def edits(prompts, responses):
    for texts in (prompts, responses):
        texts.clear()
    return [0.0]


def leaves_a_mess(prompts, responses):
    os.environ.clear()
    os.chdir("/")
    torch.set_grad_enabled(False)
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    random.seed(0)
    return [0.5] * len(responses)


def hangs(prompts, responses):
    time.sleep(100)


async def later(prompts, responses):
    return [0.0] * len(responses)


def of_columns(prompts, responses, answer, *, label=None):
    return [0.0] * len(responses)


def of_one(prompt):
    return 0.0


class Model(torch.nn.Module):
    pass


constant = 1.0
NAMES = [
    "fine",
    "wrong_count",
    "no_number",
    "no_list",
    "with_gradient",
    "raises",
    "edits",
    "leaves_a_mess",
    "hangs",
    "later",
    "of_columns",
    "of_one",
    "Model",
    "constant",
    "nobody",
    "",
]
