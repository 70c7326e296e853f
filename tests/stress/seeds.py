"""What the fuzzers of rollouts share: their options, and a loop over seeds until time is up."""

import argparse
import time
from collections import Counter

import torch


def parser(description):
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0, help="of the first case; each has the next")
    return parser


def run(case, options):
    """Calls `case(seed, counts)`; says which seed raised, or what was counted."""
    torch.set_num_threads(1)
    counts, seed, end = Counter(), options.seed, time.monotonic() + 60 * options.minutes
    while time.monotonic() < end:
        try:
            case(seed, counts)
        except BaseException:
            print(f"seed {seed}:")
            raise
        seed += 1
    print(f"{seed - options.seed} engines: " + ", ".join(f"{count:,} {name}" for name, count in counts.items()))
