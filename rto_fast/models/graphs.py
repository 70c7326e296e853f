"""CUDA graphs of whole passes, for models so small that launching kernels takes longer than running them.

The host needs up to 40 µs for each of the 9 kernels of a Llama layer (25 with the backward pass); `pass_time` says where
that is longer than the GPU needs. A graph launches them all at once. It repeats the same kernels on the same addresses. So
a batch is padded to sizes that many batches share (`PackedBatch.padded`) and copied to static tensors, and gradients are
added to buffers that stay where they are (`main_grad`). A replay gives the bits of the eager pass on the same padded batch.

A capture takes tenths of a second: the pass runs once more, the host waits for the device, and cached memory is given back.
Sizes that come once would never repay it, so they are captured when they come for the second time.
"""

import contextlib
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Protocol, Self, TypeVar, cast
from weakref import WeakSet

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rto_fast.batch import PackedBatch
from rto_fast.errors import ModelError
from rto_fast.models.decoder import decoder_of
from rto_fast.models.pass_time import PassSizes
from rto_fast.system.notices import notify

MAX_SIZES = 16  # that a model remembers, with or without a graph: those used last; a run of one setting has about ten

# Of a token in a graph's static tensors: ids, labels, positions and rows of 8 bytes, six float32 columns, a float32 result.
TOKEN_BYTES = 4 * 8 + 7 * 4
GRAPH_BYTES = 2 << 20  # that the driver takes for a graph, about 2 kB a kernel (predicted)

Value = TypeVar("Value")
Run = Callable[..., Mapping[str, Tensor]]  # a pass; returns named results of one shape


def held_bytes(models: int, tokens: float, working: float) -> float:
    """The most that the graphs of all models hold between passes, for the memory plan.

    Args:
        models: with passes that run as graphs.
        tokens: of the largest of these passes.
        working: the most that such a pass takes beside the model's state: activations and the workspace of the output layer.
            All graphs share this memory.
    """
    return working + models * MAX_SIZES * (tokens * TOKEN_BYTES + GRAPH_BYTES)


class Graph(Protocol):
    """Recorded work."""

    def replay(self) -> Tensor: ...


class TrainingInputs(Protocol):
    """What a pass with a backward pass reads: a dataclass of tensors, dataclasses and constants."""

    @property
    def batch(self) -> PackedBatch: ...

    def padded(self, *, coarse: bool = True) -> Self:
        """The same loss, metrics and gradients from tensors of sizes that many batches share; see `PackedBatch.padded`."""
        ...


@contextlib.contextmanager
def waits_forbidden() -> Iterator[None]:
    """Makes torch raise a RuntimeError where the host would wait for the device; see `asks_the_host`."""
    before = torch.cuda.get_sync_debug_mode()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Synchronization debug mode")  # torch warns once that it is a prototype
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def asks_the_host(error: RuntimeError) -> bool:
    """Whether an error inside `waits_forbidden` says that the host would have waited."""
    return "synchronizing" in str(error)


class CudaGraph:
    """A CUDA graph of work without arguments, whose result is one tensor.

    All graphs share one pool of memory, for they never run at the same time. The replay of one may therefore overwrite the
    result of another, which is copied before.

    Args:
        run: the work. It runs once before it is captured: this compiles kernels and initialises libraries, which a capture
            forbids, and shows whether the work waits for the device, which would break the capture.
    Raises:
        RuntimeError: the work waits for the device, see `asks_the_host`.
        torch.OutOfMemoryError: there may be memory enough without a graph.
        ModelError: the capture failed.
    """

    stream: torch.cuda.Stream | None = None  # where all are captured: memory is shared within a stream
    live: "WeakSet[CudaGraph]" = WeakSet()
    graph: torch.cuda.CUDAGraph

    def __init__(self, run: Callable[[], Tensor]):
        current = torch.cuda.current_stream()
        CudaGraph.stream = stream = CudaGraph.stream or torch.cuda.Stream()
        stream.wait_stream(current)
        try:
            with torch.cuda.stream(stream), waits_forbidden():
                run()
        finally:
            current.wait_stream(stream)
        # A pool ends with its last graph, and its name cannot be used again.
        pool = next((other.graph.pool() for other in CudaGraph.live), None)
        self.graph = torch.cuda.CUDAGraph()
        try:
            # thread_local: other threads may use the device meanwhile (pinned memory, NCCL, the backward pass's own).
            with torch.cuda.graph(self.graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                self.result = run()
        except RuntimeError as error:
            torch.cuda.set_stream(current)  # torch stays on the stream of a capture whose end raises
            if isinstance(error, torch.OutOfMemoryError) or isinstance(error.__context__, torch.OutOfMemoryError):
                raise torch.OutOfMemoryError(str(error)) from error
            # A capture that failed leaves torch's allocator and streams in a bad state, so the run must end.
            raise ModelError(
                f"a pass cannot be captured as a CUDA graph ({str(error).splitlines()[0]}); start again with "
                "--rollout.cuda_graphs false"
            ) from error
        CudaGraph.live.add(self)

    def replay(self) -> Tensor:
        """Runs the work again; returns a copy of its result."""
        self.graph.replay()
        return self.result.clone()


@dataclass(frozen=True)
class _Recorded:
    """A graph, the static tensors that it reads, and the names of its results."""

    graph: Graph
    inputs: list[Tensor]
    names: list[str]

    def __call__(self, inputs: Any) -> dict[str, Tensor]:
        # Tensors of one dtype are copied by one kernel.
        by_dtype: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        for static, tensor in zip(self.inputs, _tensors(inputs)):
            for side, part in zip(by_dtype.setdefault(static.dtype, ([], [])), (static, tensor)):
                side.append(part)
        for statics, tensors in by_dtype.values():
            torch._foreach_copy_(statics, tensors)
        return dict(zip(self.names, self.graph.replay().unbind()))


class PassGraphs:
    """Runs a model's passes as CUDA graphs: those that `takes`, whose launches would take longer than they do.

    Args:
        module: a transformers model, see `takes_graphs`.
        graph: records work.

    Attributes:
        trains: whether training passes run as graphs; then the buffers of the gradients have to stay where they are.
    """

    everyone: "WeakSet[PassGraphs]" = WeakSet()

    def __init__(self, module: PreTrainedModel, graph: Callable[[Callable[[], Tensor]], Graph] = CudaGraph):
        self.module, self.graph = module, graph
        self.sizes, self.parameters, self.decoder = PassSizes.of(module), list(module.parameters()), decoder_of(module)
        self.addresses: tuple[int, ...] = ()  # of what graphs hold
        self.recorded: OrderedDict[Hashable, _Recorded | None] = OrderedDict()  # used last at the end; None: came once
        self.capture_seconds, self.is_on, self.trains = 0.0, True, False
        PassGraphs.everyone.add(self)

    def takes(self, batch: PackedBatch, *, backward: bool) -> bool:
        """Whether the host may take longer to launch a pass of this batch than the GPU takes to run it."""
        return self.sizes.is_bound_by_launches(batch.num_tokens, len(batch.rows), backward)

    def score(self, function: Callable[..., Tensor], batch: PackedBatch, **options: Any) -> Tensor:
        """Returns `function(module, batch, **options)`: a number for each token, [T], without gradients."""

        def run(inputs: PackedBatch) -> dict[str, Tensor]:
            return {"": function(self.module, inputs, **options)}

        return self._run((function, _key(options)), (batch.padded(),), run)[""][: batch.num_tokens]

    def learn(
        self,
        function: Callable[..., tuple[Tensor, Mapping[str, Tensor]]],
        inputs: TrainingInputs,
        *args: Any,
        factor: float,
        backward: Callable[[Tensor], None],
    ) -> Mapping[str, Tensor]:
        """Runs `function(module, inputs, *args)`, which returns a loss and metrics (0-d), and the backward pass.

        Args:
            factor: of the loss.
            backward: adds the gradient of a loss to `main_grad`, as `Optimizer.backward` does.
        Returns:
            The metrics.
        """

        def run(inputs: TrainingInputs, factor: Tensor) -> Mapping[str, Tensor]:
            loss, metrics = function(self.module, inputs, *args)
            backward(factor * loss)
            return metrics

        self.trains = self.is_on
        padded = inputs.padded(), torch.full((), factor, device=inputs.batch.labels.device)
        return self._run((function, _key(args)), padded, run)

    def _run(self, kind: Hashable, inputs: tuple[Any, ...], run: Run) -> Mapping[str, Tensor]:
        """Returns `run(*inputs)`, of padded inputs: its bits do not tell whether there is a graph of their sizes already."""
        recorded = self._record(kind, inputs, run) if self.is_on else None
        return recorded(inputs) if recorded else run(*inputs)

    def _record(self, kind: Hashable, inputs: tuple[Any, ...], run: Run) -> _Recorded | None:
        """Returns the graph of `run(*inputs)` for inputs of these sizes; None where the pass has to run eagerly."""
        self._follow()
        key = kind, self.module.training, _key(inputs)
        if key not in self.recorded:
            self.recorded[key] = None
            if len(self.recorded) > MAX_SIZES:
                self.recorded.popitem(last=False)
            return None
        recorded = self.recorded.pop(key)
        if recorded is None:
            recorded = self._capture(inputs, run)
            self._follow()  # the first pass of this size may have made a larger table of RoPE
        self.recorded[key] = recorded
        return recorded

    def _follow(self) -> None:
        """Drops the graphs where what they hold has been moved: weights, the buffers of gradients, tables of RoPE."""
        gradients = [p.main_grad for p in self.parameters if hasattr(p, "main_grad")]
        tables = self.decoder.ropes.addresses() if self.decoder else ()
        addresses = *(tensor.data_ptr() for tensor in (*self.parameters, *gradients)), *tables
        if addresses != self.addresses:
            if any(self.recorded.values()):  # the first pass makes tables and buffers, before there is a graph
                self.recorded.clear()
            self.addresses = addresses

    def _capture(self, inputs: tuple[Any, ...], run: Run) -> _Recorded | None:
        start, names = time.perf_counter(), list[str]()
        # The pass runs once before it is captured. With a factor of 0 it adds 0 to the gradients: wherever it breaks off,
        # nothing has to be undone.
        static = _map_tensors(torch.clone, (inputs[0], *map(torch.zeros_like, inputs[1:])))

        def work() -> Tensor:
            results = run(*static)
            names[:] = results
            return torch.stack(list(results.values()))

        try:
            graph = self.graph(work)
        except torch.OutOfMemoryError:
            PassGraphs.give_up()
            _notify("there is not enough memory for them")
            return None
        except RuntimeError as error:  # for example experts that are routed by `nonzero`
            if not asks_the_host(error):
                raise
            self.is_on = self.trains = False
            _notify(str(error).splitlines()[0])
            return None
        self.capture_seconds += time.perf_counter() - start
        return _Recorded(graph, _tensors(static), names)

    @classmethod
    def drop(cls) -> bool:
        """Gives back the memory of all graphs of all models; returns whether there were any."""
        had_any = any(any(graphs.recorded.values()) for graphs in cls.everyone)
        for graphs in cls.everyone:
            graphs.recorded.clear()
        if had_any and torch.cuda.is_available():
            torch.cuda.empty_cache()
        return had_any

    @classmethod
    def give_up(cls) -> bool:
        """As `drop`; from now on all passes of these models run eagerly."""
        for graphs in cls.everyone:
            graphs.is_on = graphs.trains = False
        return cls.drop()


def takes_graphs(module: PreTrainedModel) -> bool:
    """Whether graphs can hold a model's passes: on a GPU, layers of ours, RoPE that does not depend on a batch's longest
    sequence (padded batches claim a longer one)."""
    decoder = decoder_of(module) if module.device.type == "cuda" else None
    return decoder is not None and not decoder.ropes.varies and not module.is_gradient_checkpointing


def _notify(reason: str) -> None:
    notify("model", "no_pass_graphs", f"passes run without CUDA graphs: {reason}")


def _map_tensors(function: Callable[[Tensor], Tensor], value: Value) -> Value:
    """The same with `function` of each tensor, in dataclasses and tuples."""
    if isinstance(value, Tensor):
        return cast(Value, function(value))
    if isinstance(value, tuple):
        return cast(Value, tuple(_map_tensors(function, part) for part in value))
    if is_dataclass(value) and not isinstance(value, type):
        parts = {field.name: _map_tensors(function, getattr(value, field.name)) for field in fields(value)}
        return cast(Value, replace(cast(Any, value), **parts))
    return value


def _tensors(value: Any) -> list[Tensor]:
    """The tensors of a value, in the order of `_map_tensors`."""
    found: list[Tensor] = []

    def find(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    _map_tensors(find, value)
    return found


def _key(value: Any) -> Hashable:
    """What a graph holds of a value: the sizes of tensors, and all else as it is."""
    if isinstance(value, str | float | int | None):
        return value
    if isinstance(value, Tensor):
        return value.shape, value.dtype
    if is_dataclass(value) and not isinstance(value, type):
        return type(value), *map(_key, vars(value).values())
    if isinstance(value, Mapping):
        return tuple((name, _key(part)) for name, part in value.items())
    return tuple(map(_key, value)) if isinstance(value, Sequence) else value
