"""Who holds which KV page, in the pool and in host memory. Integers only, no jax.

A slot's full table is a list of columns; resident ones come first. Pages are spilled to
host memory in chunks from the end of that list, so that what is missing is a stack of
chunks and the prompt's shared pages stay longest. The draft cache is never spilled: the
first verification after a return fills it anew.
"""

import dataclasses

import numpy as np

from sparsespec_jax.host.page_allocator import PageAllocator
from sparsespec_jax.plan.buffer import DRAFT_TABLE, FULL_TABLE, PageMove
from sparsespec_jax.plan.shape import pages_for


@dataclasses.dataclass(kw_only=True)
class KvCounters:
    """What page pressure cost so far."""

    preemptions: int = 0  # requests suspended for want of pages
    spilled_pages: int = 0  # copied to host memory
    restored_pages: int = 0  # copied back
    recomputed_tokens: int = 0  # whose KV was dropped and computed again
    shared_pages: int = 0  # pages that another sample's prompt had already


class KvManager:
    """Pages of every slot: growth, sharing, spill and restore.

    Args:
      shape: StepShape.
      num_chunks: chunks that host memory holds; 0 if nothing is ever spilled.
      chunk_pages: pages of a chunk.
    """

    def __init__(self, shape, *, num_chunks, chunk_pages):
        num_slots = shape.num_slots
        self._shape = shape  # of the largest K: pages are reserved for it
        self.allocator = PageAllocator(shape.num_pages)
        self.counters = KvCounters()
        self.chunk_pages = chunk_pages
        self._chunks = list(range(num_chunks - 1, -1, -1))  # free host chunks
        self._full = [[] for _ in range(num_slots)]  # resident pages by column
        self._draft = [[] for _ in range(num_slots)]
        self._spilled = [[] for _ in range(num_slots)]  # stack of (chunk, pages)
        self.resident = np.zeros(num_slots, np.int64)  # full pages in the pool
        self.num_draft = np.zeros(num_slots, np.int64)
        self._promised = np.zeros(num_slots, np.int64)  # not yet allocated

    @property
    def num_free(self):
        """Pages that nobody holds."""
        return self.allocator.num_free

    @property
    def num_available(self):
        """Pages that nobody holds or was promised."""
        return self.allocator.num_free - int(self._promised.sum())

    @property
    def utilisation(self):
        """Share of the pool's pages that hold somebody's KV."""
        return 1 - self.allocator.num_free / self.allocator.num_pages

    @property
    def usage(self):
        """Load of the pool, and counts of what page pressure cost: a dict."""
        return {"utilisation": self.utilisation, **dataclasses.asdict(self.counters)}

    @property
    def has_free_chunk(self):
        """True if host memory can take another chunk."""
        return bool(self._chunks)

    # -- sizes ------------------------------------------------------------------

    def full_pages(self, length):
        """Pages for all tokens of requests of `length` tokens (int or array)."""
        # The last verification may feed K drafts past the end.
        end = length + self._shape.num_draft_tokens
        return pages_for(end, self._shape.page_size)

    def draft_pages(self, length, ratio, floor):
        """Pages for the draft caches of requests of `length` tokens."""
        drafts = self._shape.num_draft_tokens
        if not self._shape.draft_lanes:
            return 0
        rows = self._shape.budget_tokens(length, ratio=ratio, floor=floor)
        # Rows just verified, then the drafts of the next cycle behind them.
        return pages_for(rows + 2 * drafts + 1, self._shape.page_size)

    def pages_needed(self, request, length=None):
        """Pages of both kinds of a request with `length` tokens; None: its limit."""
        length = request.limit if length is None else min(length, request.limit)
        draft = self.draft_pages(length, request.budget_ratio, request.min_budget)
        return int(self.full_pages(length) + draft)

    # -- pages ------------------------------------------------------------------

    def promise(self, slot, count):
        """Set `count` pages aside for a slot's growth."""
        self._promised[slot] = count

    def pages(self, slot):
        """All pages of a slot: full ones by column, then draft ones."""
        return (*self._full[slot], *self._draft[slot])

    def num_spilled(self, slot):
        """Pages of a slot that are in host memory."""
        return sum(count for _, count in self._spilled[slot])

    def missing(self, slots, full, draft):
        """Pages that the slots lack for `full` and `draft` pages each, int [n]."""
        return np.maximum(full - self.resident[slots], 0) + np.maximum(
            draft - self.num_draft[slots], 0
        )

    def grow(self, slots, full, draft, updates):
        """Allocate up to `full` and `draft` pages (int arrays [n]) for the slots.

        Appends rows (table, slot, column, page) to `updates`.
        """
        self._grow(FULL_TABLE, slots, full, updates)
        self._grow(DRAFT_TABLE, slots, draft, updates)

    def _grow(self, table, slots, needed, updates):
        is_full = table == FULL_TABLE
        counts, lists = (
            (self.resident, self._full) if is_full else (self.num_draft, self._draft)
        )
        missing = needed - counts[slots]
        lanes = np.flatnonzero(missing > 0)
        if not lanes.size:
            return
        grown, growth = np.asarray(slots)[lanes], missing[lanes]
        counts[grown] += growth
        self._promised[grown] = np.maximum(self._promised[grown] - growth, 0)
        pages, used = self.allocator.allocate(int(growth.sum())), 0
        for slot, count in zip(grown.tolist(), growth.tolist(), strict=True):
            first, new = len(lists[slot]), pages[used : used + count]
            lists[slot] += new
            used += count
            updates += [(table, slot, first + i, page) for i, page in enumerate(new)]

    def share(self, source, target, count, updates):
        """Let slot `target`, which has no pages, read the first pages of `source`."""
        pages = self._full[source][:count]
        self.allocator.share(pages)
        self._full[target] = list(pages)
        self.resident[target] = count
        self.counters.shared_pages += count
        updates.extend((FULL_TABLE, target, i, page) for i, page in enumerate(pages))

    def free_draft(self, slot):
        """Give back a slot's draft pages."""
        self.allocator.free(self._draft[slot])
        self._draft[slot] = []
        self.num_draft[slot] = 0

    def spill(self, slot, moves):
        """Copy a slot's last resident pages, one chunk of them, to host memory."""
        pages = self._full[slot][-self.chunk_pages :]
        del self._full[slot][-self.chunk_pages :]
        chunk = self._chunks.pop()
        moves.append(PageMove(True, chunk, tuple(pages)))
        self._spilled[slot].append((chunk, len(pages)))
        self.resident[slot] -= len(pages)
        self.allocator.free(pages)
        self.counters.spilled_pages += len(pages)

    def next_chunk(self, slot):
        """Pages of the chunk that `restore` would bring back, 0 if none."""
        return self._spilled[slot][-1][1] if self._spilled[slot] else 0

    def restore(self, slot, moves, updates):
        """Bring back the chunk that was spilled last; its pages must be free."""
        chunk, count = self._spilled[slot].pop()
        first = int(self.resident[slot])
        self._grow(FULL_TABLE, [slot], np.array([first + count]), updates)
        moves.append(PageMove(False, chunk, tuple(self._full[slot][first:])))
        self._chunks.append(chunk)
        self.counters.restored_pages += count

    def release(self, slot):
        """Give back everything that a slot holds, in the pool and in host memory."""
        self.free_draft(slot)
        self.allocator.free(self._full[slot])
        self._full[slot] = []
        self._chunks.extend(chunk for chunk, _ in self._spilled[slot])
        self._spilled[slot] = []
        self.resident[slot] = self._promised[slot] = 0
