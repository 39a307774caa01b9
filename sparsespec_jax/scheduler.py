"""Which request does what in which step: slots, phases, pages. Host only, no jax.

Each admitted request holds a slot and goes through prefill chunks, one seed verify
and then cycles of K drafts and one verify. Its phase, the residue mod (K + 1) of its
verify steps, does not depend on outcomes, so plans can be made any number of steps
ahead of them. What planning needs of a slot is kept in arrays over slots: a step
costs array operations and Python work for what changes.
"""

from collections import deque
from typing import NamedTuple

import numpy as np

from sparsespec_jax import plan as plan_lib
from sparsespec_jax.page_allocator import PageAllocator
from sparsespec_jax.plan import budget_tokens, pages_for
from sparsespec_jax.request import Request, Status

NO_PHASE = -1


class PlannedVerifies(NamedTuple):
    """The verify lanes 0..n-1 of a dispatched step, kept until its outcome is read."""

    requests: list[Request]
    num_rows: np.ndarray  # int64 [n], most rows that each commits (drafts + 1)
    num_queries: int  # Q of the step


class _Slots:
    """Facts of every slot, one array each; S slots."""

    def __init__(self, num_slots):
        self.params = np.zeros((num_slots, plan_lib.NUM_SLOT_PARAMS), np.int32)
        self.phase = np.full(num_slots, NO_PHASE, np.int32)
        self.is_running = np.zeros(num_slots, bool)
        # Committed length if every verification in flight accepts everything.
        self.reach = np.zeros(num_slots, np.int64)
        self.limit = np.zeros(num_slots, np.int64)
        self.budget_ratio = np.zeros(num_slots, np.float32)
        self.min_budget = np.zeros(num_slots, np.int32)
        self.full_pages = np.zeros(num_slots, np.int64)  # allocated
        self.draft_pages = np.zeros(num_slots, np.int64)

    def put(self, slot, request):
        """Fill a slot's row for a new holder."""
        self.params[slot] = request.slot_params
        self.phase[slot] = NO_PHASE
        self.is_running[slot] = False
        self.reach[slot] = len(request.tokens)
        self.limit[slot] = request.limit
        self.budget_ratio[slot] = request.budget_ratio
        self.min_budget[slot] = request.min_budget
        self.full_pages[slot] = 0
        self.draft_pages[slot] = 0


class Scheduler:
    """Admits, balances and plans. One `plan()` per step; no device data needed."""

    def __init__(self, shape):
        self.shape = shape  # of the current K
        self._widest = shape  # of the largest K: pages are reserved for it
        self.allocator = PageAllocator(shape.num_pages)
        self.waiting = deque()
        self.slots = [None] * shape.num_slots
        self._arrays = _Slots(shape.num_slots)
        self._free_slots = list(range(shape.num_slots - 1, -1, -1))
        self._prefilling = []  # in order of admission
        self._ready = []  # without a phase
        self._step = 0

    @property
    def has_work(self):
        """True while any request waits or holds a slot."""
        return bool(self.waiting) or self.num_active > 0

    @property
    def num_active(self):
        """Requests that hold a slot."""
        return self.shape.num_slots - len(self._free_slots)

    @property
    def context_tokens(self):
        """Tokens that the requests in slots hold, those in flight at their most."""
        return int(self._arrays.reach.sum())

    def pages_needed(self, request):
        """Pages (full and draft) that a request can come to hold."""
        draft = self._draft_pages(
            request.limit, request.budget_ratio, request.min_budget
        )
        return int(self._full_pages(request.limit) + draft)

    def check(self, request):
        """Raise ValueError if the request could never fit."""
        needed = self.pages_needed(request)
        if needed > self.shape.num_pages:
            raise ValueError(
                f"a request of up to {request.limit} tokens can need {needed} pages, "
                f"the pool has {self.shape.num_pages}: raise num_pages or lower "
                "max_tokens"
            )

    def add(self, request):
        """Queue a request; ValueError if it could never fit."""
        self.check(request)
        self.waiting.append(request)

    def release(self, request):
        """Take a request out, wherever it is; its slot and pages become free."""
        if request.status is Status.WAITING:
            self.waiting.remove(request)
        elif request.status is not Status.FINISHED:
            self._unqueue(request)
            slot, request.slot = request.slot, -1
            self.slots[slot] = None
            self._arrays.phase[slot] = NO_PHASE
            self._arrays.is_running[slot] = False
            self._arrays.reach[slot] = 0
            self._free_slots.append(slot)
            self.allocator.free(request.request_id)
        request.status = Status.FINISHED

    def set_num_draft_tokens(self, num_draft_tokens):
        """Plan steps of another K, at most the one the scheduler was made for.

        Running requests drop their drafts and wait for a phase of the new cycle; their
        next verification feeds the pending token alone.
        """
        if num_draft_tokens == self.shape.num_draft_tokens:
            return
        self.shape = self._widest.with_draft_tokens(num_draft_tokens)
        self._step = 0
        self._arrays.phase[:] = NO_PHASE
        self._arrays.is_running[:] = False
        self._prefilling, self._ready = [], []
        active = [r for r in self.slots if r is not None]
        for request in sorted(active, key=lambda r: r.request_id):
            self._enqueue(request)

    def plan(self):
        """Plan one step: (StepPlan or None if idle, PlannedVerifies)."""
        self._admit()
        now = self._step % self.shape.cycle
        self._step += 1
        self._assign_phases(now)
        prefilling = self._prefilling[: self.shape.prefill_lanes]
        arrays = self._arrays
        slots = np.flatnonzero(arrays.phase == now)
        drafting = arrays.is_running & (arrays.phase != now)
        planned = PlannedVerifies(
            [self.slots[slot] for slot in slots.tolist()],
            np.full(slots.size, self.shape.num_queries),
            self.shape.num_queries,
        )
        if not (prefilling or slots.size or drafting.any()):
            return None, planned
        plan = self.shape.new_plan(prefill=bool(prefilling))
        views = plan.views
        views["slot_params"][:] = arrays.params
        views["draft_mask"][:] = drafting
        updates = []
        self._plan_verifies(views, slots, planned, updates)
        for lane, request in enumerate(prefilling):
            self._plan_prefill(views, lane, request, updates)
        if updates:
            views["table_updates"][: len(updates)] = updates
        return plan, planned

    def commit(self, planned, num_committed):
        """Note an outcome: verify lane i committed `num_committed[i]` rows."""
        for request in planned.requests:
            request.verifies_in_flight -= 1
        slots = np.array([r.slot for r in planned.requests], np.int64)
        held = slots >= 0
        surplus = planned.num_rows - np.asarray(num_committed, np.int64)
        self._arrays.reach[slots[held]] -= surplus[held]

    def _admit(self):
        """Give slots to waiting requests, first come first served, while pages last.

        The pages of the whole request are promised, so growth never fails.
        """
        while self.waiting and self._free_slots:
            request = self.waiting[0]
            needed = self.pages_needed(request)
            if not self.allocator.can_promise(needed):
                return
            self.waiting.popleft()
            self.allocator.promise(request.request_id, needed)
            request.slot = self._free_slots.pop()
            self.slots[request.slot] = request
            self._arrays.put(request.slot, request)
            self._enqueue(request)

    def _enqueue(self, request):
        """Put a request that holds a slot where it continues: prefill or ready."""
        missing = not request.is_seeded
        missing = missing and request.prefilled < self._prefill_target(request)
        request.status = Status.PREFILL if missing else Status.READY
        (self._prefilling if missing else self._ready).append(request)

    def _unqueue(self, request):
        if request.status is Status.PREFILL:
            self._prefilling.remove(request)
        elif request in self._ready:
            self._ready.remove(request)

    def _prefill_target(self, request):
        """Tokens that prefill chunks feed; the seed verify feeds the rest."""
        return max(0, len(request.tokens) - self.shape.num_queries)

    def _assign_phases(self, now):
        """Give ready requests the phase with the least context to read.

        Verification cost grows with context, so phases are balanced by tokens, within
        the number of verify lanes; among equals the phase that comes up first wins.
        """
        if not self._ready:
            return
        cycle, lanes = self.shape.cycle, self.shape.verify_lanes
        phases, reach = self._arrays.phase, self._arrays.reach
        has_phase = phases != NO_PHASE
        held = phases[has_phase]
        counts = np.bincount(held, minlength=cycle).tolist()
        loads = np.bincount(held, reach[has_phase], minlength=cycle).tolist()
        order = [(now + i) % cycle for i in range(cycle)]
        for request in self._ready:
            free = (p for p in order if counts[p] < lanes)
            phase = min(free, key=loads.__getitem__)
            phases[request.slot] = phase
            counts[phase] += 1
            loads[phase] += len(request.tokens)
        self._ready = []

    def _plan_verifies(self, views, slots, planned, updates):
        """Fill the verify lanes for `slots` and grow their tables."""
        views["verify_slots"][: slots.size] = slots
        arrays, rows = self._arrays, planned.num_rows
        is_new = ~arrays.is_running[slots]
        for lane in np.flatnonzero(is_new).tolist():
            request = planned.requests[lane]
            rows[lane] = self._plan_first_verify(views, lane, request)
        arrays.is_running[slots] = True
        for request in planned.requests:
            request.verifies_in_flight += 1
        reach = arrays.reach[slots]
        self._grow_full(slots, reach + self.shape.num_queries, updates)
        if self.shape.draft_lanes:
            self._grow_draft(slots, reach, updates)
        arrays.reach[slots] = reach + rows

    def _plan_first_verify(self, views, lane, request):
        """A seed verify, or the pending token alone after a change of K; its rows."""
        request.status = Status.RUNNING
        if request.is_seeded:
            views["seed_counts"][lane] = plan_lib.PENDING_ONLY
            return 1
        start = self._prefill_target(request)
        tail = request.tokens[start:]
        views["seed_counts"][lane] = len(tail) - 1
        views["seed_starts"][lane] = start
        views["seed_tokens"][lane, : len(tail)] = tail
        self._arrays.reach[request.slot] = start
        request.is_seeded = True
        return len(tail)

    def _plan_prefill(self, views, lane, request, updates):
        target = self._prefill_target(request)
        start = request.prefilled
        count = min(self.shape.prefill_chunk, target - start)
        views["prefill_slots"][lane] = request.slot
        views["prefill_starts"][lane] = start
        views["prefill_counts"][lane] = count
        views["prefill_tokens"][lane, :count] = request.tokens[start : start + count]
        slot = np.array([request.slot])
        self._grow_full(slot, np.array([start + count]), updates)
        request.prefilled = start + count
        if request.prefilled == target:
            self._prefilling.remove(request)
            self._enqueue(request)

    def _grow_full(self, slots, num_tokens, updates):
        """Allocate full pages for the first `num_tokens` tokens of each slot."""
        most = self._full_pages(self._arrays.limit[slots])
        needed = np.minimum(most, pages_for(num_tokens, self.shape.page_size))
        held = self._arrays.full_pages
        self._grow(plan_lib.FULL_TABLE, held, slots, needed, updates)

    def _grow_draft(self, slots, lengths, updates):
        """Allocate draft pages for selections made at committed `lengths`."""
        arrays = self._arrays
        needed = self._draft_pages(
            np.minimum(lengths, arrays.limit[slots]),
            arrays.budget_ratio[slots],
            arrays.min_budget[slots],
        )
        held = arrays.draft_pages
        self._grow(plan_lib.DRAFT_TABLE, held, slots, needed, updates)

    def _grow(self, table, held, slots, needed, updates):
        missing = needed - held[slots]
        for lane in np.flatnonzero(missing > 0).tolist():
            slot, count = int(slots[lane]), int(missing[lane])
            first = int(held[slot])
            owner = self.slots[slot].request_id
            for i, page in enumerate(self.allocator.allocate(owner, count)):
                updates.append((table, slot, first + i, page))
            held[slot] = first + count

    def _full_pages(self, limit):
        # The last verification may feed K drafts past the limit.
        return pages_for(limit + self._widest.num_draft_tokens, self.shape.page_size)

    def _draft_pages(self, length, ratio, floor):
        drafts = self._widest.num_draft_tokens
        if not self._widest.draft_lanes:
            return 0
        cap = self.shape.max_budget
        rows = budget_tokens(length, ratio=ratio, floor=floor, cap=cap)
        # Rows just verified, then the drafts of the next cycle behind them.
        return pages_for(rows + 2 * drafts + 1, self.shape.page_size)
