"""Continuous batching: decides which sequences are decoded together, in which slots and on which pages."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate, chain, count, islice

import torch
from torch import Tensor

from rto_fast.batch import padded_size
from rto_fast.rollout.attention import Prefill
from rto_fast.rollout.base import nan_logits
from rto_fast.rollout.cache import PagedCache, to_device
from rto_fast.rollout.decode import DecodeState, DecodeStep
from rto_fast.rollout.model import RolloutModel
from rto_fast.system.progress import advance

PREFILL_TOKENS = 16384  # prompt tokens computed at once


@dataclass(eq=False)
class Request:
    """A prompt with those of its samples that wait for a slot.

    The prompt's keys and values are computed once for all samples that begin together. They are kept for those that begin
    later, unless pages run short.
    """

    ids: list[int]
    rows: list[int]  # of the samples
    response: list[int] = field(default_factory=list)  # so far, of a sample that was preempted
    pages: list[int] = field(default_factory=list)  # of the prompt, while its keys and values are kept
    hidden: Tensor = field(init=False, repr=False)  # [D], of the prompt's last token, once it is computed

    def __post_init__(self) -> None:
        self.tokens = self.ids + self.response


# Tokens begin … end of a prompt and the prompt's pages: (prompt, pages, begin, end).
Piece = tuple[Request, list[int], int, int]
# (prompt, rows of the samples that begin, their pages, pages to copy, pages to copy them to).
Admitted = tuple[Request, list[int], list[list[int]], list[int], list[int]]


@dataclass(eq=False)
class Sequence:
    """A sample that is being decoded."""

    age: int
    row: int
    ids: list[int]
    capacity: int  # tokens of the prompt and the longest response
    pages: list[int]
    length: int  # tokens in the cache; an upper bound while steps are running
    slot: int


class Scheduler:
    """Decodes prompts with the given slots and pages. The results are in `state` afterwards.

    Args:
        model: is `decoding`.
        requests: the prompts.
        limits: the maximal number of tokens of each row.
        slots: sequences decoded at once.
        ahead: steps between two looks at which sequences are done.
        prefill_tokens: prompt tokens computed at once.
    """

    def __init__(
        self,
        model: RolloutModel,
        cache: PagedCache,
        state: DecodeState,
        step: DecodeStep,
        requests: list[Request],
        limits: list[int],
        *,
        slots: int,
        ahead: int,
        prefill_tokens: int,
    ):
        self.model, self.cache, self.state, self.step = model, cache, state, step
        self.limits, self.ahead, self.prefill_tokens = limits, ahead, prefill_tokens
        # Long prompts first. If they began last, they would be decoded alone at the end.
        self.waiting = sorted(requests, key=lambda r: -len(r.ids))
        self.running: list[Sequence] = []  # in the order of their slots 0, 1, …
        self.slots, self.device = slots, state.rows.device
        self.ages = count()
        self.preemptions = self.slot_steps = self.begun = 0
        self.seconds = {"prefill": 0.0, "decode": 0.0}

    def run(self) -> None:
        earlier = None
        while self.waiting or self.running:
            start = time.perf_counter()
            self._admit()
            admitted = time.perf_counter()
            self._decode()
            latest = self._look()
            # On a GPU this is the state before the steps that have just begun, so that the host need not wait for them.
            self._retire(*(earlier or latest)())
            earlier = latest if self.device.type == "cuda" else None
            self.seconds["prefill"] += admitted - start
            self.seconds["decode"] += time.perf_counter() - admitted

    def _look(self) -> Callable[[], list[list[bool]]]:
        """Copies the present state; the function returned gives (is done, has a NaN) of every row."""
        status = torch.stack([self.state.done, self.state.logps.isnan().any(1)])
        if not status.is_cuda:
            return status.tolist
        host = torch.empty(status.shape, dtype=torch.bool, pin_memory=True)
        host.copy_(status, non_blocking=True)
        event = torch.cuda.Event()
        event.record()

        def wait() -> list[list[bool]]:
            event.synchronize()
            return host.tolist()

        return wait

    def _decode(self) -> None:
        # A sequence that may have reached its capacity needs a look, not more steps.
        steps = min(self.ahead, max(s.capacity - 1 - s.length for s in self.running))
        if not steps:
            return
        self._reserve()
        bucket = self.step.bucket(len(self.running))
        pages = self._row_of_pages() if bucket == len(self.running) else None
        for step in range(steps):
            # A graph needs no length. A CPU must not read beyond the longest sequence, where its pages may end.
            longest = 0 if self.device.type == "cuda" else self._longest(step)
            self.step(bucket, longest, pages)
        for sequence in self.running:
            sequence.length = min(sequence.length + steps, sequence.capacity - 1)
        self.slot_steps += bucket * steps

    def _longest(self, step: int) -> int:
        """An upper bound of the tokens that any sequence attends to, `step` steps from now."""
        return max(min(s.length + step, s.capacity - 1) for s in self.running) + 1

    def _retire(self, done: list[bool], invalid: list[bool]) -> None:
        """Ends sequences.

        Args:
            done: of every row, whether its sequence is done.
            invalid: of every row, whether it has a NaN. The last row belongs to idle slots.
        Raises:
            RolloutError: a sequence has a NaN.
        """
        if True in invalid[:-1]:
            row = invalid.index(True)
            position = int(self.state.logps[row].isnan().int().argmax())
            raise nan_logits(f"response {row} (counted over prompts and samples), token {position}")
        ended = [s for s in self.running if done[s.row]]
        for sequence in ended:
            self.cache.give(sequence.pages)
        if ended:
            advance(len(ended))
            self.running = [s for s in self.running if not done[s.row]]
            self._compact()

    def _compact(self) -> None:
        """Closes gaps between slots. On a CPU also closes those between pages, if each sequence has one page."""
        moved = []
        if self.device.type != "cuda" and all(len(s.pages) == 1 for s in self.running):
            holes = [page for page in range(len(self.running)) if not self.cache.ref_counts[page]]
            moved = [s for s in self.running if s.pages[0] >= len(self.running)][: len(holes)]
            self.cache.copy([s.pages[0] for s in moved], holes[: len(moved)])
            for sequence in moved:
                old, sequence.pages = sequence.pages, self.cache.take(1)  # the lowest free page, which is the next hole
                self.cache.give(old)
            self.running.sort(key=lambda s: s.pages[0])
        self.state.reorder([s.slot for s in self.running])
        for slot, sequence in enumerate(self.running):
            sequence.slot = slot
        self._write_pages([(s, 0, s.pages[0]) for s in moved])

    def _write_pages(self, updates: list[tuple[Sequence, int, int]]) -> None:
        """Writes (sequence, index of the block, page) into the block tables."""
        if updates:
            self.state.add_pages(*zip(*((s.slot, block, page) for s, block, page in updates)))

    def _row_of_pages(self) -> tuple[int, int] | None:
        """(first, last + 1) if each sequence has one page and these follow each other: a CPU reads those in place."""
        pages = [s.pages[0] for s in self.running if len(s.pages) == 1]
        first = pages[0] if pages else 0
        return (first, first + len(pages)) if pages == list(range(first, first + len(self.running))) else None

    # Pages for the steps to come

    def _reserve(self) -> None:
        """Takes pages for the next steps. If none are free, preempts the sequences that began last."""
        updates, before = [], len(self.running)
        for sequence in sorted(self.running, key=lambda s: s.age):
            needed = self.cache.pages_for(min(sequence.length + self.ahead, sequence.capacity))
            while len(sequence.pages) < needed and sequence in self.running:
                if page := self.cache.take(1):
                    updates.append((sequence, len(sequence.pages), page[0]))
                    sequence.pages += page
                elif not self._drop_prompt_pages():
                    self._preempt(max(self.running, key=lambda s: s.age))
        if len(self.running) < before:
            self._compact()
        self._write_pages([update for update in updates if update[0] in self.running])

    def _drop_prompt_pages(self) -> bool:
        """Frees the pages kept for waiting samples, whose prompts are then computed again; False if there are none."""
        kept = [prompt for prompt in self.waiting if prompt.pages]
        for prompt in kept:
            self.cache.give(prompt.pages)
            prompt.pages = []
        return bool(kept)

    def _preempt(self, sequence: Sequence) -> None:
        """Frees a sequence's pages. It continues later from the tokens it has."""
        self.preemptions += 1
        self.running.remove(sequence)
        self.cache.give(sequence.pages)
        if not self.state.done[sequence.row]:
            self.waiting.insert(0, Request(sequence.ids, [sequence.row], self.state.result(sequence.row)))

    # Beginning

    def _admit(self) -> None:
        """Begins as many waiting samples as slots and pages allow."""
        free, waiting = self.slots - len(self.running), sum(len(p.rows) for p in self.waiting)
        # A prefill delays all running sequences, so it is not done for a single free slot.
        if not waiting or (self.running and free < min(waiting, max(8, self.slots // 20), (self.slots + 1) // 2)):
            return
        admitted, fresh = [], []
        growing = sum(self._grows(s.pages, s.capacity) for s in self.running)
        while self.waiting and free:
            prompt = self.waiting[0]
            number, keep = self._fitting(prompt, free, growing)
            if not number:
                if not self.running and not admitted and self._drop_prompt_pages():
                    continue
                break
            if not prompt.pages:
                prompt.pages = self.cache.take(self.cache.pages_for(len(prompt.tokens)))
                fresh.append((prompt, prompt.pages))
            rows, prompt.rows = prompt.rows[:number], prompt.rows[number:]
            # Pages are taken now, so that the next prompt sees what is left. They are filled after the prefill.
            pages, sources, targets = self._pages_of_samples(prompt, number, keep)
            growing += sum(self._grows(own, len(prompt.ids) + self.limits[row]) for own, row in zip(pages, rows))
            admitted.append((prompt, rows, pages, sources, targets))
            free -= number
            if prompt.rows:
                break
            self.waiting.pop(0)
        if admitted:
            self._prefill(fresh)
            self._begin(admitted)

    def _grows(self, pages: list[int], capacity: int) -> bool:
        return len(pages) < self.cache.pages_for(capacity)

    def _fitting(self, prompt: Request, free: int, growing: int) -> tuple[int, bool]:
        """(number of samples that can begin, whether the prompt's pages can be kept for the others).

        Leaves one page to each of the `growing` sequences, or else what begins now would soon be preempted.
        """
        own = 0 if prompt.pages else self.cache.pages_for(len(prompt.tokens))
        spare = len(self.cache.free) - own - growing
        # Each sample also needs a page of its own: a copy of the prompt's last page if that is not full, else a new one.
        # The last sample needs no copy, because it takes over the prompt's pages.
        partial = bool(len(prompt.tokens) % self.cache.page_size)
        number = max(0, min(free, len(prompt.rows), spare + partial)) if spare >= 0 else 0
        return number, number < len(prompt.rows) and number <= spare

    def _pages_of_samples(
        self, prompt: Request, number: int, keep: bool
    ) -> tuple[list[list[int]], list[int], list[int]]:
        """(pages of each sample, pages to copy, pages to copy them to)."""
        shared, rest = len(prompt.tokens) // self.cache.page_size, prompt.pages[-1:]
        if len(prompt.tokens) % self.cache.page_size == 0:
            rest = []
        pages, sources, targets = [], [], []
        for _ in range(number if keep else number - 1):
            own = self.cache.take(len(rest))
            self.cache.share(prompt.pages[:shared])
            pages.append(prompt.pages[:shared] + own)
            sources, targets = sources + rest, targets + own
        if not keep:
            pages.append(list(prompt.pages))
            prompt.pages = []
        return pages, sources, targets

    def _prefill(self, fresh: list[tuple[Request, list[int]]]) -> None:
        """Computes the keys and values of prompts on their pages, `prefill_tokens` at a time; longer prompts in pieces."""
        chunks: list[list[Piece]] = [[]]
        room = self.prefill_tokens
        for prompt, pages in fresh:
            begin, length = 0, len(prompt.tokens)
            while begin < length:
                # A prompt that fits into a chunk is not split over two: its second piece would need slower attention.
                if room < min(length - begin, self.prefill_tokens):
                    chunks.append([])
                    room = self.prefill_tokens
                end = min(begin + room, length)
                chunks[-1].append((prompt, pages, begin, end))
                room -= end - begin
                begin = end
        for chunk in filter(None, chunks):
            prefill_chunk(self.model, self.cache, chunk)

    def _begin(self, admitted: list[Admitted]) -> None:
        """Puts samples into slots and draws their first tokens."""
        hidden, sequences, sources, targets = [], [], [], []
        for prompt, rows, pages, copied, copies in admitted:
            for row, own in zip(rows, pages):
                slot, capacity = len(self.running) + len(sequences), len(prompt.ids) + self.limits[row]
                sequences.append(Sequence(next(self.ages), row, prompt.ids, capacity, own, len(prompt.tokens), slot))
            hidden += [prompt.hidden] * len(rows)
            sources, targets = sources + copied, targets + copies
        self.cache.copy(sources, targets)
        starts = [(s.row, s.length, self.limits[s.row], s.length - len(s.ids), s.pages) for s in sequences]
        slots = self.state.start(len(self.running), starts)
        self.running += sequences
        self.begun += len(sequences)
        count = len(hidden)
        hidden += hidden[-1:] * (self.step.bucket(count) - count)  # a size that decode steps have too
        self.state.draw_first(slots, self.model.logits(torch.stack(hidden))[:count], self.step.sampler)
        if self.device.type != "cuda" and not self._row_of_pages():
            self._compact()


def prefill_chunk(model: RolloutModel, cache: PagedCache, pieces: list[Piece]) -> None:
    """Computes the keys and values of pieces of prompts. The last piece of a prompt sets its `hidden`."""
    slots = [_slots(cache, pages, begin, end) for _, pages, begin, end in pieces]
    ids = [token for prompt, _, begin, end in pieces for token in prompt.tokens[begin:end]]
    positions = [position for _, _, begin, end in pieces for position in range(begin, end)]
    read = None
    if any(begin for _, _, begin, _ in pieces):
        read = [_slots(cache, pages, 0, end) for _, pages, _, end in pieces]
    more = padded_size(len(ids), coarse=False) - len(ids) if model.looks_at_sizes else 0
    if more:  # one more sequence, whose keys go nowhere; what it reads does not matter
        slots, ids, positions = [*slots, [-1] * more], ids + [0] * more, positions + [0] * more
        read = None if read is None else [*read, [0] * more]
    tensors = to_device([list(chain(*slots)), ids, positions], torch.int64, cache.device)
    bounds, cu_seqlens = _bounds(slots, cache.device)
    earlier = None
    if read is not None:
        earlier = to_device(list(chain(*read)), torch.int64, cache.device), _bounds(read, cache.device)[1]
    view = Prefill(cache, tensors[0], cu_seqlens, max(map(len, slots)), earlier)
    hidden = model.hidden(tensors[1], tensors[2], view)
    for (prompt, _, _, end), last in zip(pieces, bounds[1:]):
        if end == len(prompt.tokens):
            prompt.hidden = hidden[last - 1].clone()  # a view would keep all hidden states


def _slots(cache: PagedCache, pages: list[int], begin: int, end: int) -> list[int]:
    """Where tokens begin … end of a prompt are in the cache: page · page_size + offset."""
    size = cache.page_size
    whole = chain(*(range(page * size, (page + 1) * size) for page in pages[begin // size : cache.pages_for(end)]))
    return list(islice(whole, begin % size, begin % size + end - begin))


def _bounds(pieces: list[list[int]], device: torch.device) -> tuple[list[int], Tensor]:
    """Bounds of pieces that follow each other, as numbers and on the device."""
    bounds = list(accumulate(map(len, pieces), initial=0))
    return bounds, to_device(bounds, torch.int32, device)
