"""Modules of users' reward functions, and what they are called with."""

import itertools
import sys

from rto_fast.data.tokenizing import Prompt
from rto_fast.rewards import Completion

NUMBERS = itertools.count()  # each test imports a module of its own
HEAD = """
import asyncio, functools, gc, inspect, locale, multiprocessing, os, random, signal, socket, sys, threading, time, warnings
import numpy, torch
from torch.utils._python_dispatch import TorchDispatchMode

class zeros(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {})) * (0 if function is torch.ops.aten.add.Tensor else 1)
"""


def users_side():
    return sys.modules.get("rto_fast.system.process_state")


def completions(count=2, prompt="1 red cup", extra=None):
    shared = Prompt([2], prompt, extra or {}, "file:1")  # as the samples of one prompt share it
    return [Completion(shared, [17, 1], "one red cup .", True) for _ in range(count)]
