"""Continuous batching: which sequences are decoded together, in which slots and on which pages."""

import time
from dataclasses import dataclass, field
from itertools import accumulate, count

import torch

from rto_fast.rollout.attention import Prefill
from rto_fast.rollout.base import nan_logits
from rto_fast.rollout.cache import to_device
from rto_fast.system.progress import advance

PREFILL_TOKENS = 16384  # prompt tokens computed at once


@dataclass(eq=False)
class Request:
    """A prompt with the samples of it that wait. Its keys and values are computed once for all that begin together, and
    kept while others wait and pages are not short."""

    ids: list[int]
    rows: list[int]
    response: list[int] = field(default_factory=list)  # of a sample that lost its pages and is to go on
    pages: list[int] | None = None
    hidden: torch.Tensor | None = None  # [D] of the last token

    def __post_init__(self):
        self.tokens = self.ids + self.response


@dataclass(eq=False)
class Sequence:
    """A sample that is being decoded."""

    age: int
    row: int
    ids: list[int]
    capacity: int  # tokens it can come to
    pages: list[int]
    length: int  # tokens in the cache; while steps are under way, at most so many
    slot: int


class Scheduler:
    """Decodes prompts with the slots and pages there are; results are in `state` afterwards.

    Args:
        model: `RolloutModel` that is `decoding`. step: `DecodeStep`. limits: for each row the most tokens.
        slots: sequences decoded at once. ahead: steps between two looks at what is done. prefill_tokens: prompt tokens
            computed at once.
    """

    def __init__(self, model, cache, state, step, requests, limits, *, slots, ahead, prefill_tokens):
        self.model, self.cache, self.state, self.step = model, cache, state, step
        self.limits, self.ahead, self.prefill_tokens = limits, ahead, prefill_tokens
        # Long ones first: begun last, they would decode alone at the end.
        self.waiting = sorted(requests, key=lambda r: -len(r.ids))
        self.running = []  # in the order of their slots: 0, 1, …
        self.slots, self.device = slots, state.rows.device
        self.ages = count()
        self.preemptions = self.slot_steps = self.begun = 0
        self.seconds = {"prefill": 0.0, "decode": 0.0}

    def run(self):
        earlier = None
        while self.waiting or self.running:
            start = time.perf_counter()
            self._admit()
            admitted = time.perf_counter()
            self._decode()
            latest = self._look()
            # On a GPU the look is at what was done before the steps just begun: the host need not wait for those.
            self._retire(*(earlier or latest)())
            earlier = latest if self.device.type == "cuda" else None
            self.seconds["prefill"] += admitted - start
            self.seconds["decode"] += time.perf_counter() - admitted

    def _look(self):
        """A function that returns, for every row, whether it is done and whether it is NaN, as of now."""
        status = torch.stack([self.state.done, self.state.logps.isnan().any(1)])
        if not status.is_cuda:
            return status.tolist
        host = torch.empty(status.shape, dtype=torch.bool, pin_memory=True)
        host.copy_(status, non_blocking=True)
        event = torch.cuda.Event()
        event.record()

        def wait():
            event.synchronize()
            return host.tolist()

        return wait

    def _decode(self):
        # A sequence that may be as long as it can become needs no more steps, only a look.
        steps = min(self.ahead, max(s.capacity - 1 - s.length for s in self.running))
        if not steps:
            return
        self._reserve()
        bucket = self.step.bucket(len(self.running))
        pages = self._row_of_pages() if bucket == len(self.running) else None
        for step in range(steps):
            # A graph needs no length; what a CPU reads must end where the longest does: a page may end there too.
            longest = None if self.device.type == "cuda" else self._longest(step)
            self.step(bucket, longest, pages)
        for sequence in self.running:
            sequence.length = min(sequence.length + steps, sequence.capacity - 1)
        self.slot_steps += bucket * steps

    def _longest(self, step):
        """Tokens to attend to in a step from now, of the longest sequence at most."""
        return max(min(s.length + step, s.capacity - 1) for s in self.running) + 1

    def _retire(self, done, invalid):
        # The last row takes what idle slots write.
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

    def _compact(self):
        """Closes the gaps between slots and, for a CPU, those between pages where each sequence has one."""
        moved = []
        if self.device.type != "cuda" and all(len(s.pages) == 1 for s in self.running):
            holes = [page for page in range(len(self.running)) if not self.cache.ref_counts[page]]
            moved = [s for s in self.running if s.pages[0] >= len(self.running)][: len(holes)]
            self.cache.copy([s.pages[0] for s in moved], holes[: len(moved)])
            for sequence in moved:
                old, sequence.pages = sequence.pages, self.cache.take(1)  # the lowest free page: the next hole
                self.cache.give(old)
            self.running.sort(key=lambda s: s.pages[0])
        self.state.reorder([s.slot for s in self.running])
        for slot, sequence in enumerate(self.running):
            sequence.slot = slot
        self._tell_pages([(s, 0, s.pages[0]) for s in moved])

    def _tell_pages(self, updates):
        """Writes (sequence, index of the block, page) into the block tables."""
        if updates:
            self.state.add_pages(*zip(*((s.slot, block, page) for s, block, page in updates)))

    def _row_of_pages(self):
        """(first, last + 1) where each sequence has one page and these follow each other: what a CPU reads in place."""
        pages = [s.pages[0] for s in self.running if len(s.pages) == 1]
        first = pages[0] if pages else 0
        return (first, first + len(pages)) if pages == list(range(first, first + len(self.running))) else None

    # Pages for the steps to come

    def _reserve(self):
        """Takes pages for the steps to come; where there are none, from what began last."""
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
        self._tell_pages([update for update in updates if update[0] in self.running])

    def _drop_prompt_pages(self):
        """Gives back what was kept for samples that wait; their prompt is computed again."""
        kept = [prompt for prompt in self.waiting if prompt.pages]
        for prompt in kept:
            self.cache.give(prompt.pages)
            prompt.pages = prompt.hidden = None
        return bool(kept)

    def _preempt(self, sequence):
        """Takes a sequence's pages; it goes on later, from what it has said."""
        self.preemptions += 1
        self.running.remove(sequence)
        self.cache.give(sequence.pages)
        if not self.state.done[sequence.row]:
            self.waiting.insert(0, Request(sequence.ids, [sequence.row], self.state.result(sequence.row)))

    # Beginning

    def _admit(self):
        free, waiting = self.slots - len(self.running), sum(len(p.rows) for p in self.waiting)
        # A prefill holds up all that is being decoded: not for a single free slot.
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
            if prompt.pages is None:
                prompt.pages = self.cache.take(self.cache.pages_for(len(prompt.tokens)))
                fresh.append((prompt, prompt.pages))
            rows, prompt.rows = prompt.rows[:number], prompt.rows[number:]
            # Pages are taken now, so that the next prompt sees what is left; they are filled after the prefill.
            pages, *copies = self._pages_of_samples(prompt, number, keep)
            growing += sum(self._grows(own, self._capacity(prompt, row)) for own, row in zip(pages, rows))
            admitted.append((prompt, rows, pages, *copies))
            free -= number
            if prompt.rows:
                break
            self.waiting.pop(0)
        if admitted:
            self._prefill(fresh)
            self._begin(admitted)

    def _capacity(self, prompt, row):
        return len(prompt.ids) + self.limits[row]

    def _grows(self, pages, capacity):
        return len(pages) < self.cache.pages_for(capacity)

    def _fitting(self, prompt, free, growing):
        """(number of samples there are pages for, whether the prompt can be kept for the others).

        A page is left to each of the `growing` sequences, which need more: else what begins now is soon preempted.
        """
        own = self.cache.pages_for(len(prompt.tokens)) if prompt.pages is None else 0
        spare = len(self.cache.free) - own - growing
        # A sample also needs one of its own: a copy of the prompt's last page, if that is not full, or the one after it.
        # The copy is spared by the last sample, which takes over the prompt's pages.
        partial = bool(len(prompt.tokens) % self.cache.page_size)
        number = max(0, min(free, len(prompt.rows), spare + partial)) if spare >= 0 else 0
        return number, number < len(prompt.rows) and number <= spare

    def _pages_of_samples(self, prompt, number, keep):
        """(pages of each sample, pages to be copied, where to)."""
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
            prompt.pages = None
        return pages, sources, targets

    def _prefill(self, fresh):
        """Computes (prompt, pages), `prefill_tokens` at a time: a longer prompt goes in pieces."""
        chunks, room = [[]], self.prefill_tokens
        for prompt, pages in fresh:
            begin, length = 0, len(prompt.tokens)
            while begin < length:
                # A prompt that fits a chunk is not split over two: the rest of one needs slower attention.
                if room < min(length - begin, self.prefill_tokens):
                    chunks.append([])
                    room = self.prefill_tokens
                end = min(begin + room, length)
                chunks[-1].append((prompt, pages, begin, end))
                room -= end - begin
                begin = end
        for chunk in filter(None, chunks):
            prefill_chunk(self.model, self.cache, chunk)

    def _begin(self, admitted):
        """Draws the first token of each sample and puts it into a slot."""
        hidden, sequences, sources, targets = [], [], [], []
        for prompt, rows, pages, copied, copies in admitted:
            for row, own in zip(rows, pages):
                slot, capacity = len(self.running) + len(sequences), self._capacity(prompt, row)
                sequences.append(Sequence(next(self.ages), row, prompt.ids, capacity, own, len(prompt.tokens), slot))
            hidden += [prompt.hidden] * len(rows)
            sources, targets = sources + copied, targets + copies
        self.cache.copy(sources, targets)
        slots = self.state.start(
            len(self.running),
            [s.row for s in sequences],
            [s.length for s in sequences],
            [self.limits[s.row] for s in sequences],
            [s.length - len(s.ids) for s in sequences],
            [s.pages for s in sequences],
        )
        self.running += sequences
        self.begun += len(sequences)
        self.state.draw_first(slots, self.model.logits(torch.stack(hidden)), self.step.sampler)
        if self.device.type != "cuda" and not self._row_of_pages():
            self._compact()


def prefill_chunk(model, cache, pieces):
    """Runs pieces (prompt, pages, begin, end) of prompts; a prompt's last piece leaves its `hidden`."""
    slot_mapping, ids, positions, lengths, earlier = [], [], [], [], []
    for prompt, pages, begin, end in pieces:
        for page in range(begin // cache.page_size, cache.pages_for(end)):
            first, last = max(begin - page * cache.page_size, 0), min(end - page * cache.page_size, cache.page_size)
            slot_mapping += range(pages[page] * cache.page_size + first, pages[page] * cache.page_size + last)
        ids += prompt.tokens[begin:end]
        positions += range(begin, end)
        lengths.append(end - begin)
        used = pages[: cache.pages_for(end)]
        earlier.append((to_device(used, torch.int64, cache.device), end) if begin else None)
    slot_mapping, ids, positions = to_device([slot_mapping, ids, positions], torch.int64, cache.device)
    bounds = list(accumulate(lengths, initial=0))
    cu_seqlens = to_device(bounds, torch.int32, cache.device)
    hidden = model.hidden(ids, positions, Prefill(cache, slot_mapping, cu_seqlens, lengths, earlier))
    for (prompt, _, _, end), last in zip(pieces, bounds[1:]):
        if end == len(prompt.tokens):
            prompt.hidden = hidden[last - 1].clone()  # a view would keep all of them
