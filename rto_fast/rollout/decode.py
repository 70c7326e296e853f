"""The decode step: forward pass, draw, bookkeeping. All of it on the device, so that a CUDA graph can hold it."""

import time
import warnings
from collections import Counter

import torch

from rto_fast.errors import RolloutError
from rto_fast.ops import sample_tokens
from rto_fast.rollout.attention import DenseDecode, PagedDecode, runs_triton
from rto_fast.rollout.cache import to_device
from rto_fast.system.notices import notify

# Batch sizes that get a graph of their own; between them slots stay idle.
BUCKETS = (1, 2, 4, 8, 16, 32, 64, *range(128, 1024, 64), *range(1024, 8193, 256))


class DecodeState:
    """Tensors the step reads and writes. A slot holds a sequence being decoded; a row, the results of a sample (one more
    row takes what idle slots write)."""

    def __init__(self, slots, samples, max_new_tokens, blocks, device):
        def zeros(*shape, dtype=torch.int64):
            return torch.zeros(shape, dtype=dtype, device=device)

        self.input_ids, self.lengths, self.generated, self.limits = (zeros(slots) for _ in range(4))
        self.rows = zeros(slots).fill_(samples)
        self.active = zeros(slots, dtype=torch.bool)
        self.block_tables = zeros(slots, blocks, dtype=torch.int32)
        shape = (samples + 1, max_new_tokens + 1)  # a sequence that is done stays at its end: one column more
        self.uniforms = zeros(*shape, 2, dtype=torch.float32)
        self.tokens = zeros(*shape)
        self.logps, self.sampling_logps = (zeros(*shape, dtype=torch.float32) for _ in range(2))
        self.done = zeros(samples + 1, dtype=torch.bool)
        self.counts = zeros(samples + 1)

    @property
    def idle_row(self):
        return len(self.tokens) - 1

    def fits(self, slots, samples, max_new_tokens, blocks):
        return (
            len(self.rows) >= slots
            and self.idle_row >= samples
            and self.tokens.shape[1] > max_new_tokens
            and self.block_tables.shape[1] >= blocks
        )

    def reset(self, uniforms):
        """Makes every slot idle, and takes the [samples, max new tokens, 2] random numbers of a rollout."""
        self.rows.fill_(self.idle_row)
        for tensor in (self.active, self.generated, self.lengths, self.done, self.counts, self.logps):
            tensor.zero_()
        self.uniforms[: uniforms.shape[0], : uniforms.shape[1]] = uniforms

    def start(self, first, rows, lengths, limits, generated, pages):
        """Puts sequences into the slots from `first` on (lists of numbers; pages: a list of lists); returns the slots."""
        slots, width = slice(first, first + len(rows)), self.block_tables.shape[1]
        table = [
            numbers + own + [0] * (width - len(own)) for *numbers, own in zip(rows, lengths, limits, generated, pages)
        ]
        table = to_device(table, torch.int64, self.rows.device)
        for column, tensor in enumerate((self.rows, self.lengths, self.limits, self.generated)):
            tensor[slots] = table[:, column]
        self.block_tables[slots] = table[:, 4:]
        self.active[slots] = True
        return slots

    def reorder(self, order):
        """Slot i becomes what slot order[i] was; slots after them become idle."""
        count = len(order)
        order = to_device(order, torch.int64, self.rows.device)
        for tensor in (self.input_ids, self.lengths, self.generated, self.limits, self.block_tables, self.rows):
            tensor[:count] = tensor[order]
        self.active[:count] = self.active[order]
        self.active[count:] = False
        self.rows[count:] = self.idle_row

    def add_pages(self, slots, blocks, pages):
        slots, blocks, pages = to_device([slots, blocks, pages], torch.int64, self.rows.device)
        self.block_tables[slots, blocks] = pages.int()

    def result(self, row):
        """Tokens so far of a row; waits for the device."""
        return self.tokens[row, : int(self.counts[row])].tolist()

    def draws(self, slots, min_new_tokens):
        """(the random numbers of the next tokens of `slots`, a slice; whether these may be stop tokens)."""
        generated = self.generated[slots]
        return self.uniforms[self.rows[slots], generated], generated >= min_new_tokens

    def finish(self, slots, drawn, stop_ids, grow):
        """Records what was drawn for `slots`, in place; see `rto_fast.kernels.decode_step.finish_step`."""
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

    def draw_first(self, slots, logits, sampler):
        """Draws and records what a prefill's last logits [slots, V] lead to."""
        drawn = sampler(logits, *self.draws(slots, sampler.min_new_tokens), fresh=True)
        self.finish(slots, drawn, sampler.stop_ids, grow=False)


class Sampler:
    """`Sampling` as a function of logits, random numbers, and whether a stop token may be drawn."""

    def __init__(self, sampling, head, device):
        # A divisor of the logits divides like the temperature, where there is one.
        self.divisor = head.divisor if sampling.temperature == 0 else 1.0
        self.options = dict(
            temperature=sampling.temperature * head.divisor,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            softcap=head.softcap,
        )
        self.min_new_tokens = sampling.min_new_tokens
        self.stop_ids = torch.tensor(sampling.stop_ids, dtype=torch.int64, device=device)

    def __call__(self, logits, uniforms, stop_allowed, fresh=False):
        """fresh: some may have said nothing yet. Once all have said a token, a minimum of one forbids nothing more."""
        if self.divisor != 1.0:
            logits = logits / self.divisor
        forbids = self.min_new_tokens > (0 if fresh else 1) and len(self.stop_ids)
        stops = {"stop_ids": self.stop_ids, "stop_allowed": stop_allowed} if forbids else {}
        return sample_tokens(logits, uniforms, **stops, **self.options)


class DecodeStep:
    """One step of the first `count` slots; on a GPU as CUDA graphs, one a bucket."""

    def __init__(self, model, cache, state, sampler, use_graphs):
        self.model, self.cache, self.state, self.sampler = model, cache, state, sampler
        self.steps, self.graphs, self.pool, self.capture_seconds = Counter(), {}, None, 0.0
        self.use_graphs = use_graphs and state.rows.is_cuda

    def bucket(self, count):
        if not runs_triton(self.state.rows):
            return count
        return min((b for b in BUCKETS if count <= b <= len(self.state.rows)), default=len(self.state.rows))

    def __call__(self, count, longest, pages=None):
        """`longest`, `pages`: see `DenseDecode`; nothing a graph knows of."""
        self.steps[count] += 1
        if count in self.graphs:
            self.graphs[count].replay()
        elif self.use_graphs:
            self._first(count)
        else:
            self.run(count, longest, pages)

    def _first(self, count):
        """A bucket's first step runs eagerly: it compiles kernels and initialises libraries, which a capture must not, and
        shows whether something waits for the device, which a capture cannot survive."""
        before = torch.cuda.get_sync_debug_mode()
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Synchronization debug mode")  # is a prototype, torch says once
                torch.cuda.set_sync_debug_mode("error")
            self.run(count)
        except RuntimeError as error:  # an architecture that asks the host (experts routed by `nonzero`, say)
            if "synchronizing" not in str(error):
                raise
            self.use_graphs = False
            notify("rollout", "no_cuda_graphs", f"rollout: decodes without CUDA graphs: {str(error).splitlines()[0]}")
        finally:
            torch.cuda.set_sync_debug_mode(before)
        if self.use_graphs:
            self._capture(count)
        else:
            self.run(count)  # from the beginning: what a step changes, it changes last

    def run(self, count, longest=None, pages=None):
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
        drawn = self.sampler(logits, *draws)
        state.finish(slots, drawn, self.sampler.stop_ids, grow=True)

    def _capture(self, count):
        start, graph = time.perf_counter(), torch.cuda.CUDAGraph()
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        try:
            # thread_local: what other threads do to the device (pinned memory, NCCL) is no part of it.
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                self.run(count)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            # A capture that breaks off leaves torch's allocator and streams as they should not stay: no going on.
            raise RolloutError(
                f"the decode step cannot be captured as a CUDA graph ({str(error).splitlines()[0]}); start again with "
                "--rollout.cuda_graphs false"
            ) from error
        self.graphs[count] = graph
        self.capture_seconds += time.perf_counter() - start
