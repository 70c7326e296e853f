"""The comparisons of kernels. Each case has an op, a pass, a shape, inputs, and the functions that are compared.

`benchmarks/test_kernels.py` and `benchmarks/gpu.py` run the same cases through the same `run`.
"""

from dataclasses import dataclass

import torch

from benchmarks import loops, peers
from benchmarks.costs import limit
from benchmarks.shapes import (
    CPU_SHAPES,
    Shape,
    advantages_inputs,
    linear_inputs,
    logits_inputs,
    loss_mask,
    policy_inputs,
    ppo_inputs,
)
from benchmarks.timing import gemms, measure
from rto_fast import ops

GRAPH = "ours, CUDA graph"
SUSTAINED = "the op's FLOPs in large GEMMs"


@dataclass
class Case:
    group: str
    phase: str  # "forward", "backward" (its forward pass is not timed) or "forward+backward"
    shape: Shape
    functions: dict
    inputs: object  # function without arguments that returns tensors
    differentiable: int = 0  # number of inputs, from the first, that get a gradient
    mask: str = "full"
    graph: bool = False  # on a GPU also times our function as a CUDA graph, where no launch waits for Python
    overwritten: bool = False  # the functions may overwrite their first input, so each call gets a copy
    op: str = ""  # name in the cost model, if not that of the group
    random: bool = False  # results are random, so they are not compared

    @property
    def name(self):
        return f"{self.group} {self.phase} {self.shape.name} T={self.shape.tokens} {self.mask}"

    @property
    def providers(self):
        """The names of the providers, in the order of the tables."""
        return [*self.functions, *([GRAPH] if self.graph else [])]


def _provider(case, function, inputs):
    """A provider (see `benchmarks.timing`) that prepares one call of the case's pass."""
    backward = case.phase != "forward"

    def arguments():
        if not backward:
            return list(inputs)
        first = inputs[0].detach().clone() if case.overwritten else inputs[0].detach()
        leaves = [t.detach().requires_grad_() for t in (first, *inputs[1 : case.differentiable])]
        return [*leaves, *inputs[case.differentiable :]]

    def value(args):
        with torch.set_grad_enabled(backward):
            # Autograd forbids overwriting a leaf, but not the result of an op.
            return function(args[0].view_as(args[0]) if case.overwritten and backward else args[0], *args[1:])

    def gradients(output, args):
        upstream = torch.linspace(-1, 1, output.numel(), device=output.device).view_as(output) if output.dim() else None
        return torch.autograd.grad(output, args[: case.differentiable], upstream)

    def prepare():
        args = arguments()
        if case.phase == "forward":
            return lambda: value(args)
        if case.phase == "forward+backward":
            return lambda: gradients(value(args), args)
        output = value(args)
        return lambda: gradients(output, args)

    return prepare


def _graph(prepare):
    """A provider that captures one call and replays it."""
    state = {}

    def provider():
        if not state:
            call = prepare()
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # compiles and allocates outside the capture
                call()
            torch.cuda.current_stream().wait_stream(stream)
            call, state["graph"] = prepare(), torch.cuda.CUDAGraph()
            with torch.cuda.graph(state["graph"]):
                state["output"] = call()

        def replay():
            state["graph"].replay()
            return state["output"]

        return replay

    return provider


def run(case, clock, ceilings, **options):
    """Measures a case; returns a record (a dict) for each provider."""
    if clock.is_cuda:
        torch.compiler.reset()  # each case compiles for its own shapes
    inputs = case.inputs()
    providers = {
        name: function if isinstance(function, str) else _provider(case, function, inputs)
        for name, function in case.functions.items()
    }
    if case.graph:
        providers[GRAPH] = _graph(providers["ours"]) if clock.is_cuda else "needs a GPU"
    kept = 0.5 if case.mask == "half" else 1.0
    least = limit(case.op or case.group, case.phase, case.shape, kept)
    bytes_ms = 1e3 * least.bytes / ceilings["copy_bytes_per_s"]
    flops_ms = 1e3 * least.flops / ceilings["gemm_flops_per_s"]
    done = 0.0
    if flops_ms > bytes_ms:  # takes turns with the providers, as the second, so that slow ones do not use up its time
        gemm, done = gemms(clock, least.flops)
        providers = {"ours": providers["ours"], SUSTAINED: gemm} | providers
    measured, records = measure(providers, clock, **options), []
    sustained_ms = None
    if "median_ms" in (gemm_time := measured.pop(SUSTAINED, {})):
        sustained_ms = max(bytes_ms, gemm_time["median_ms"] * least.flops / done)
    for name, found in measured.items():
        if case.random:
            found.pop("deviation", None)
        if "median_ms" in found:
            found["percent_of_limit"] = 100 * max(bytes_ms, flops_ms) / found["median_ms"]
            if sustained_ms is not None:
                found["percent_of_sustained_limit"] = 100 * sustained_ms / found["median_ms"]
        records.append(
            {
                "group": case.group,
                "phase": case.phase,
                "model": case.shape.name,
                "tokens": case.shape.tokens,
                "hidden_size": case.shape.hidden_size,
                "vocab_size": case.shape.vocab_size,
                "mask": case.mask,
                "provider": name,
                "limit_ms": max(bytes_ms, flops_ms),
                "limited_by": "copy bandwidth" if bytes_ms > flops_ms else "GEMM rate",
                **found,
            }
        )
    return records


def logits_cases(shape, device, dtype):
    functions = peers.token_logps(device)

    def inputs():
        return logits_inputs(shape, device, dtype)

    yield Case("token_logps", "forward", shape, functions, inputs)
    liger = {"Liger": "has no backward pass"} if not isinstance(functions["Liger"], str) else {}
    yield Case("token_logps", "backward", shape, functions | liger, inputs, 1)


def linear_cases(shape, device, dtype):
    functions = peers.linear_token_logps(device)

    def inputs():
        return linear_inputs(shape, device, dtype)

    yield Case("linear_token_logps", "forward", shape, functions, inputs)
    yield Case("linear_token_logps", "forward+backward", shape, functions, inputs, 2)


def linear_ppo_cases(shape, device, dtype, masks=("full", "half")):
    for mask in masks:
        yield Case(
            "linear_ppo_loss",
            "forward+backward",
            shape,
            peers.linear_ppo_loss(device),
            lambda mask=mask: ppo_inputs(shape, device, dtype, mask),
            2,
            mask=mask,
        )


def logits_ppo_cases(shape, device, dtype):
    """Cases of both passes of `token_logps`, whose bound is the bytes that both passes move."""
    length = min(shape.sequence_length, shape.tokens)
    count = shape.tokens // length

    def inputs():
        logits, labels = logits_inputs(shape.at(count * (length + 1)), device, dtype)
        logits, labels = logits.view(count, length + 1, -1), labels.view(count, length + 1)[:, :-1].contiguous()
        with torch.no_grad():
            old_logps = ops.token_logps(logits[:, :-1], labels)
        noise = torch.randn(labels.shape, generator=torch.Generator(device).manual_seed(2), device=device)
        advantages = torch.linspace(-1, 1, count, device=device)
        mask = loss_mask(shape, device, "full").view(count, length)
        return logits, labels, old_logps + 0.1 * noise, advantages, mask

    functions = peers.logits_ppo_loss(device)
    for phase in ("forward", "backward"):
        yield Case("logits_ppo_loss", phase, shape, functions, inputs, 1, overwritten=True, op="token_logps")


def vector_cases(tokens, device):
    shape = Shape("vectors", tokens, 0, 0)
    for group in ("ppo_policy_loss", "ppo_value_loss"):
        functions = getattr(peers, group)(device)
        yield Case(group, "forward+backward", shape, functions, lambda: policy_inputs(tokens, device), 1, graph=True)


def advantages_cases(tokens, sequences, device, slow_peers=True):
    """slow_peers: also compares loops in Python, which take seconds for a million tokens."""
    shape = Shape(f"N={sequences}", tokens, 0, 0)
    functions = {
        "ours": lambda *args: ops.rto_advantages(*args).advantages,
        "torch scan": lambda *args: loops.rto_scan(*args)[0],
        "loop over time (TRL, verl style)": lambda *args: loops.rto_padded_loop(*args)[0],
        "loop over tokens (OpenRLHF style)": lambda *args: loops.rto_sequence_loop(*args)[0],
    }
    if not slow_peers:
        functions["loop over tokens (OpenRLHF style)"] = "takes minutes"
    yield Case(
        "rto_advantages",
        "forward",
        shape,
        functions,
        lambda: advantages_inputs(tokens, sequences, device),
        graph=True,
    )


def gae_cases(tokens, sequences, device, slow_peers=True):
    shape = Shape(f"N={sequences}", tokens, 0, 0)

    def inputs():
        rewards, _, _, values, _, cu_seqlens, mask = advantages_inputs(tokens, sequences, device)
        return torch.where(mask, rewards, 0.0), values, cu_seqlens, mask

    functions = {
        "ours": lambda r, v, c, m: ops.gae(r, v, c, mask=m)[0],
        "torch scan": lambda *args: loops.gae_scan(*args)[0],
        "loop over time (TRL, verl style)": lambda *args: loops.gae_padded_loop(*args)[0],
        "loop over tokens (OpenRLHF style)": lambda *args: loops.gae_sequence_loop(*args)[0],
    }
    if not slow_peers:
        functions["loop over tokens (OpenRLHF style)"] = "takes minutes"
    yield Case("gae", "forward", shape, functions, inputs, graph=True)


def cpu_cases():
    """Cases that a CPU finishes in a minute: our reference beside functions of torch, TRL and OpenRLHF."""
    cpu = torch.device("cpu")
    for shape in CPU_SHAPES:
        for build in (logits_cases, linear_cases):
            yield from build(shape, cpu, torch.float32)
        yield from linear_ppo_cases(shape, cpu, torch.float32, masks=("half",))
    for build in (advantages_cases, gae_cases):
        yield from build(1 << 12, 32, cpu)
    yield from vector_cases(1 << 16, cpu)
