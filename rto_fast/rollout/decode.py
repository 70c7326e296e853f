"""The decode step: forward pass, draw and bookkeeping, all on the device, so that a CUDA graph can hold it."""

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rto_fast.errors import RolloutError
from rto_fast.models.graphs import asks_the_host, waits_forbidden
from rto_fast.models.head import Head
from rto_fast.ops import sample_tokens
from rto_fast.rollout.attention import DenseDecode, PagedDecode, runs_triton
from rto_fast.rollout.base import Sampling
from rto_fast.rollout.cache import PagedCache, to_device
from rto_fast.rollout.model import RolloutModel
from rto_fast.system.notices import notify

# Each of these batch sizes has a CUDA graph of its own; for sizes in between some slots are idle.
BUCKETS = (1, 2, 4, 8, 16, 32, 64, *range(128, 1024, 64), *range(1024, 8193, 256))


class DecodeState:
    """Tensors that the step reads and writes.

    A slot holds a sequence that is being decoded. A row holds the results of a sample; idle slots write to one more row.

    Args:
        slots: sequences decoded at once.
        samples: samples of the rollout.
        blocks: pages that a sequence can have.
    """

    def __init__(self, slots: int, samples: int, max_new_tokens: int, blocks: int, device: torch.device):
        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.input_ids, self.lengths, self.generated, self.limits = (zeros(slots) for _ in range(4))
        self.idle_row = samples
        self.rows = zeros(slots).fill_(self.idle_row)
        self.active = zeros(slots, dtype=torch.bool)
        self.block_tables = zeros(slots, blocks, dtype=torch.int32)
        shape = (samples + 1, max_new_tokens + 1)  # one column more, where sequences stay that are done
        self.uniforms = zeros(*shape, 2, dtype=torch.float32)
        self.tokens = zeros(*shape)
        self.logps, self.sampling_logps = (zeros(*shape, dtype=torch.float32) for _ in range(2))
        self.done = zeros(samples + 1, dtype=torch.bool)
        self.counts = zeros(samples + 1)

    def fits(self, slots: int, samples: int, max_new_tokens: int, blocks: int) -> bool:
        return (
            len(self.rows) >= slots
            and self.idle_row >= samples
            and self.tokens.shape[1] > max_new_tokens
            and self.block_tables.shape[1] >= blocks
        )

    def reset(self, uniforms: Tensor) -> None:
        """Makes every slot idle. uniforms: the rollout's random numbers, [samples, max new tokens, 2]."""
        self.rows.fill_(self.idle_row)
        for tensor in (self.active, self.generated, self.lengths, self.done, self.counts, self.logps):
            tensor.zero_()
        self.uniforms[: uniforms.shape[0], : uniforms.shape[1]] = uniforms

    def start(self, first: int, sequences: list[tuple[int, int, int, int, list[int]]]) -> slice:
        """Puts sequences, (row, length, limit, generated, pages) each, into the slots from `first` on; returns these."""
        slots, width = slice(first, first + len(sequences)), self.block_tables.shape[1]
        numbers = [[*numbers, *pages, *[0] * (width - len(pages))] for *numbers, pages in sequences]
        table = to_device(numbers, torch.int64, self.rows.device)
        for column, tensor in enumerate((self.rows, self.lengths, self.limits, self.generated)):
            tensor[slots] = table[:, column]
        self.block_tables[slots] = table[:, 4:]
        self.active[slots] = True
        return slots

    def reorder(self, order: list[int]) -> None:
        """Moves slot order[i] to slot i; all further slots become idle."""
        count = len(order)
        index = to_device(order, torch.int64, self.rows.device)
        for tensor in (self.input_ids, self.lengths, self.generated, self.limits, self.block_tables, self.rows):
            tensor[:count] = tensor[index]
        self.active[:count] = self.active[index]
        self.active[count:] = False
        self.rows[count:] = self.idle_row

    def add_pages(self, slots: Sequence[int], blocks: Sequence[int], pages: Sequence[int]) -> None:
        """Writes `pages[i]` as the block `blocks[i]` of slot `slots[i]`."""
        slot, block, page = to_device([slots, blocks, pages], torch.int64, self.rows.device)
        self.block_tables[slot, block] = page.int()

    def result(self, row: int) -> list[int]:
        """The tokens of a row so far. Waits for the device."""
        return self.tokens[row, : int(self.counts[row])].tolist()

    def draws(self, slots: slice, min_new_tokens: int) -> tuple[Tensor, Tensor]:
        """(random numbers [slots, 2] of the slots' next tokens, whether these may be stop tokens)."""
        generated = self.generated[slots]
        return self.uniforms[self.rows[slots], generated], generated >= min_new_tokens

    def finish(self, slots: slice, drawn: tuple[Tensor, Tensor, Tensor], stop_ids: Tensor, grow: bool) -> None:
        """Records the tokens drawn for `slots`; see `rto_fast.kernels.decode_step.finish_step`."""
        if runs_triton(self.rows):
            from rto_fast.kernels.decode_step import finish_step
        else:
            from rto_fast.kernels.decode_reference import finish_step
        finish_step(
            drawn,
            stop_ids,
            self.rows[slots],
            self.generated[slots],
            self.active[slots],
            self.limits[slots],
            self.lengths[slots],
            self.input_ids[slots],
            self.tokens,
            self.logps,
            self.sampling_logps,
            self.counts,
            self.done,
            grow=grow,
        )

    def draw_first(self, slots: slice, logits: Tensor, sampler: "Sampler") -> None:
        """Draws the first tokens of `slots` from the last logits of their prompts, [slots, V], and records them."""
        drawn = sampler(logits, *self.draws(slots, sampler.min_new_tokens), fresh=True)
        self.finish(slots, drawn, sampler.stop_ids, grow=False)


class Sampler:
    """Draws tokens as `sampling` says, from logits that `head` has not divided or capped yet."""

    def __init__(self, sampling: Sampling, head: Head, device: torch.device):
        self.sampling, self.softcap = sampling, head.softcap
        # A divisor of the logits acts like the temperature. Greedy decoding has none, so the logits are divided.
        self.divisor = head.divisor if sampling.temperature == 0 else 1.0
        self.temperature = sampling.temperature * head.divisor
        self.min_new_tokens = sampling.min_new_tokens
        self.stop_ids = torch.tensor(sampling.stop_ids, dtype=torch.int64, device=device)

    def __call__(
        self, logits: Tensor, uniforms: Tensor, stop_allowed: Tensor, fresh: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `rto_fast.ops.sample_tokens`.

        Args:
            fresh: some sequences have no token yet. Once all have one, min_new_tokens = 1 forbids nothing more.
        """
        if self.divisor != 1.0:
            logits = logits / self.divisor
        forbids = self.min_new_tokens > (0 if fresh else 1) and len(self.stop_ids)
        return sample_tokens(
            logits,
            uniforms,
            temperature=self.temperature,
            top_k=self.sampling.top_k,
            top_p=self.sampling.top_p,
            min_p=self.sampling.min_p,
            softcap=self.softcap,
            stop_ids=self.stop_ids if forbids else None,
            stop_allowed=stop_allowed if forbids else None,
        )


class DecodeStep:
    """Decodes one token of each of the first `count` slots. On a GPU each bucket of batch sizes has its CUDA graph."""

    def __init__(
        self, model: RolloutModel, cache: PagedCache, state: DecodeState, sampler: Sampler, use_graphs: bool
    ) -> None:
        self.model, self.cache, self.state, self.sampler = model, cache, state, sampler
        self.steps, self.capture_seconds = Counter[int](), 0.0
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.pool: Any = None  # memory that all graphs share
        self.use_graphs = use_graphs and state.rows.is_cuda

    def bucket(self, count: int) -> int:
        """The number of slots that a step of `count` sequences runs."""
        if not runs_triton(self.state.rows):
            return count
        return min((b for b in BUCKETS if count <= b <= len(self.state.rows)), default=len(self.state.rows))

    def __call__(self, count: int, longest: int, pages: tuple[int, int] | None = None) -> None:
        """Runs the step. `longest` and `pages` are those of `DenseDecode`; a graph does not need them."""
        self.steps[count] += 1
        if count in self.graphs:
            self.graphs[count].replay()
        elif self.use_graphs:
            self._first(count)
        else:
            self.run(count, longest, pages)

    def _first(self, count: int) -> None:
        """Runs a bucket's first step eagerly, then captures it.

        The eager step compiles kernels and initialises libraries, which is forbidden during a capture. It also shows
        whether the model waits for the device, which would break the capture.
        """
        try:
            with waits_forbidden():
                self.run(count)
        except RuntimeError as error:  # for example experts that are routed by `nonzero`
            if not asks_the_host(error):
                raise
            self.use_graphs = False
            notify("rollout", "no_cuda_graphs", f"rollout: decodes without CUDA graphs: {str(error).splitlines()[0]}")
        if self.use_graphs:
            self._capture(count)
        else:
            self.run(count)  # from its beginning: a step changes its state only at its end

    def run(self, count: int, longest: int = 0, pages: tuple[int, int] | None = None) -> None:
        state, slots = self.state, slice(0, count)
        tables, lengths, active = state.block_tables[slots], state.lengths[slots], state.active[slots]
        if runs_triton(lengths):
            from rto_fast.kernels.decode_step import begin_step

            where, kv_lengths, *draws = begin_step(
                lengths,
                active,
                tables,
                state.rows[slots],
                state.generated[slots],
                state.uniforms,
                page_size=self.cache.page_size,
                min_new_tokens=self.sampler.min_new_tokens,
            )
            decode = PagedDecode(self.cache, tables, where, kv_lengths)
        else:
            draws = state.draws(slots, self.sampler.min_new_tokens)
            decode = DenseDecode(self.cache, tables, lengths, active, longest, pages)
        logits = self.model.logits(self.model.hidden(state.input_ids[slots], lengths, decode))
        state.finish(slots, self.sampler(logits, *draws), self.sampler.stop_ids, grow=True)

    def _capture(self, count: int) -> None:
        start, graph = time.perf_counter(), torch.cuda.CUDAGraph()
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        try:
            # thread_local: other threads may use the device meanwhile (pinned memory, NCCL).
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                self.run(count)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            # A capture that failed leaves torch's allocator and streams in a bad state, so the run must end.
            raise RolloutError(
                f"the decode step cannot be captured as a CUDA graph ({str(error).splitlines()[0]}); start again with "
                "--rollout.cuda_graphs false"
            ) from error
        self.graphs[count] = graph
        self.capture_seconds += time.perf_counter() - start
