"""Timing: CUDA events, a cold L2, providers that take turns, medians and quantiles, and peak memory.

A provider is a function without arguments that prepares one call (its inputs, or the forward pass before a timed
backward pass) and returns the call; only the call is timed. The inputs of the call, or its output if gradients are
timed, are freed with it, so that no provider's tensors stay alive while another one runs.
"""

import ctypes
import gc
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

FLUSH_BYTES = 256 << 20  # written before each timed call; more than twice the L2 of any GPU here (B200: 126 MB)


class Clock:
    """Times calls on `device` in seconds."""

    def __init__(self, device):
        self.device = torch.device(device)
        self.is_cuda = self.device.type == "cuda"
        self.flush = torch.empty(FLUSH_BYTES if self.is_cuda else 0, dtype=torch.int8, device=device)

    def __call__(self, call):
        if not self.is_cuda:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # The flush empties L2. The sleep, about a millisecond, keeps the GPU busy while the CPU gets ahead, so that the
        # CPU's part of a launch is hidden as in training.
        torch.cuda._sleep(2_000_000)
        self.flush.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def peak_bytes(self, call):
        """The most memory taken at once during a call, beyond that before it; None if not known."""
        gc.collect()
        if not self.is_cuda:
            return _peak_resident_bytes(call)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def _status_bytes(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) << 10


def _peak_resident_bytes(call):
    """Peak resident memory according to Linux, which includes temporaries inside of torch's operators."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    except (OSError, AttributeError):
        return None
    before = _status_bytes("VmRSS")
    call()
    return max(0, _status_bytes("VmHWM") - before)


def summary(seconds):
    """Median, 20 % and 80 % quantiles in ms."""
    ordered = sorted(1e3 * s for s in seconds)
    low, high = (ordered[round(q * (len(ordered) - 1))] for q in (0.2, 0.8))
    return {"median_ms": statistics.median(ordered), "q20_ms": low, "q80_ms": high, "rounds": len(ordered)}


def _first(output):
    while isinstance(output, (tuple, list)):
        output = output[0]
    return output.detach()


def _deviation(output, expected):
    """‖a − b‖ / ‖b‖ of at most a million elements of two results, so that a wrong function does not win unnoticed."""
    output, expected = (t.reshape(-1)[: 1 << 20].double() for t in (output, expected))
    if output.shape != expected.shape:
        return None  # the peer has a different loss
    return ((output - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def measure(providers, clock, *, rounds=20, seconds=5.0, warmup=2, prepare_seconds=math.inf):
    """Times providers in turn.

    Args:
        providers: {name: provider, or the reason (text) why there is none}.
        rounds: at most; seconds: for all rounds together, with at least 3 rounds.
        prepare_seconds: no provider's first call (peers compile and tune then, for minutes) begins later than this.
    Returns:
        {name: {"seconds": [...], median_ms, q20_ms, q80_ms, rounds, peak_bytes, deviation (from the first provider)}
        or {"skipped" or "error": reason}}.
    """
    results, ready, expected, start = {}, {}, None, time.perf_counter()
    for name, provider in providers.items():
        if isinstance(provider, str):
            results[name] = {"skipped": provider}
            continue
        if time.perf_counter() - start > prepare_seconds:
            results[name] = {"skipped": "the peers before it took the case's time"}
            continue
        try:
            output = _first(provider()())
            if expected is None:
                expected = output.reshape(-1)[: 1 << 20].clone()
            deviation = _deviation(output, expected)
            del output
            for _ in range(warmup - 1):
                clock(provider())
            peak = clock.peak_bytes(provider())
            results[name] = {"peak_bytes": peak, "deviation": deviation, "seconds": []}
            ready[name] = provider
        # Peers fail for reasons of their own, such as GPU features, compile errors or memory; the reason is the result.
        except Exception as error:
            results[name] = {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}"}
            if clock.is_cuda:
                gc.collect()
                torch.cuda.empty_cache()
    deadline = time.perf_counter() + seconds
    for done in range(rounds):
        if not ready or (done >= 3 and time.perf_counter() > deadline):
            break
        names = list(ready)
        for name in names[done % len(names) :] + names[: done % len(names)]:
            try:
                results[name]["seconds"].append(clock(ready[name]()))
            except Exception as error:  # one that fails now, for example for lack of memory, must not stop the others
                results[name] = {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}"}
                del ready[name]
    for name in ready:
        results[name] |= summary(results[name]["seconds"])
    return results


def gemms(clock: Clock, flops: float) -> tuple[Callable, float]:
    """(provider of a call that does about `flops` in large GEMMs, one after the other; the FLOPs that it does).

    This is what a device reaches for as long as an op of this many FLOPs runs. A GPU's power limit lowers its clock
    within milliseconds, so the rate of a single GEMM is that of a burst.
    """
    width, dtype = (8192, torch.bfloat16) if clock.is_cuda else (512, torch.float32)
    count = max(1, round(flops / (2.0 * width**3)))
    a, b = (torch.randn(width, width, device=clock.device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)

    def call():
        for _ in range(count):
            torch.mm(a, b, out=out)
        return out

    return lambda: call, 2.0 * count * width**3


def ceilings(clock):
    """What this device reaches: {"copy_bytes_per_s", "gemm_flops_per_s"}, with bfloat16 in cuBLAS, or float32 on a CPU.

    "gemm_flops_per_s" is the rate of a single GEMM.
    """
    size = 1 << 30 if clock.is_cuda else 1 << 26
    source = torch.ones(size, dtype=torch.int8, device=clock.device)
    target = torch.empty_like(source)
    gemm, flops = gemms(clock, 0.0)
    providers = {"copy": lambda: lambda: target.copy_(source), "gemm": gemm}
    found = measure(providers, clock, rounds=20, seconds=2.0, warmup=3)
    return {
        "copy_bytes_per_s": 2e3 * size / found["copy"]["median_ms"],
        "gemm_flops_per_s": 1e3 * flops / found["gemm"]["median_ms"],
    }
