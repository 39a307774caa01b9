"""Which request does what in which step: slots, phases, pages. Host only, no jax.

Each admitted request holds a slot and goes through prefill chunks, one seed verify
and then cycles of K drafts and one verify. The phase, the residue mod (K + 1) of its
verify steps, never changes, so plans do not depend on outcomes and can be made any
number of steps ahead of them.
"""

import dataclasses
import enum
from collections import deque
from typing import NamedTuple

import numpy as np

from sparsespec_jax import plan as plan_lib
from sparsespec_jax.page_allocator import PageAllocator
from sparsespec_jax.plan import budget_tokens, pages_for


class Status(enum.Enum):
    """Where a request is in its life."""

    WAITING = "waiting"  # no slot yet
    PREFILL = "prefill"  # has a slot; prompt chunks remain
    READY = "ready"  # prompt in the cache; waits for its phase
    RUNNING = "running"  # drafts and verifies
    FINISHED = "finished"


@dataclasses.dataclass(eq=False)
class Request:
    """What the host knows of one request; lengths lag the device by `lag` steps."""

    request_id: int
    tokens: list  # prompt, then every emitted token that the host has seen
    num_prompt: int
    limit: int  # tokens (prompt and output) at which it ends
    slot_params: np.ndarray  # int32 [NUM_SLOT_PARAMS]
    budget_ratio: float
    min_budget: int
    status: Status = Status.WAITING
    slot: int = -1
    phase: int = -1
    prefilled: int = 0  # prompt tokens whose prefill was planned
    verifies_in_flight: int = 0  # planned, outcome not read
    num_full_pages: int = 0
    num_draft_pages: int = 0

    @property
    def committed(self):
        """Committed length the host knows of (the newest token is pending)."""
        return len(self.tokens) - 1

    @property
    def is_active(self):
        """True while it holds a slot."""
        return self.status in (Status.PREFILL, Status.READY, Status.RUNNING)


class PlannedVerify(NamedTuple):
    """One verify lane of a dispatched step, kept until its outcome is read."""

    lane: int
    request: Request
    num_drafts: int


class Scheduler:
    """Admits, balances and plans. One `plan()` per step; no device data needed."""

    def __init__(self, shape):
        self.shape = shape
        self.allocator = PageAllocator(shape.num_pages)
        self.waiting = deque()
        self.slots = [None] * shape.num_slots
        self._cycle = shape.num_queries
        self._step = 0
        self._phase_counts = [0] * self._cycle

    @property
    def has_work(self):
        """True while any request waits or holds a slot."""
        return bool(self.waiting) or any(r is not None for r in self.slots)

    def pages_needed(self, request):
        """Pages (full and draft) that a request can come to hold."""
        full = self._full_pages(request.limit)
        return full + self._draft_pages(request, request.limit)

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

    def selected_tokens(self, request, length):
        """Tokens that a verification at committed `length` selects for drafting."""
        if not self.shape.num_draft_tokens:
            return 0
        return int(
            budget_tokens(
                length,
                ratio=request.budget_ratio,
                floor=request.min_budget,
                cap=self.shape.max_budget,
            )
        )

    def release(self, request):
        """Take a request out, wherever it is; its slot and pages become free."""
        if request.status is Status.WAITING:
            self.waiting.remove(request)
        elif request.is_active:
            self.slots[request.slot] = None
            self.allocator.free(request.request_id)
            if request.phase >= 0:
                self._phase_counts[request.phase] -= 1
        request.status = Status.FINISHED

    def plan(self):
        """Plan one step: (StepPlan or None if idle, verify lanes to expect)."""
        self._admit()
        phase = self._step % self._cycle
        self._step += 1
        active = [r for r in self.slots if r is not None]
        prefilling = [r for r in active if r.status is Status.PREFILL]
        prefilling.sort(key=lambda r: r.request_id)
        prefilling = prefilling[: self.shape.prefill_lanes]
        self._assign_phases(active)
        verifying = [r for r in active if r.phase == phase]
        drafting = [
            r for r in active if r.status is Status.RUNNING and r.phase != phase
        ]
        if not (prefilling or verifying or drafting):
            return None, []
        plan = self.shape.new_plan(prefill=bool(prefilling))
        views = plan.views
        updates = _TableUpdates(views["table_updates"])
        for request in active:
            views["slot_params"][request.slot] = request.slot_params
        for request in drafting:
            views["draft_mask"][request.slot] = 1
        planned = [
            self._plan_verify(views, lane, request, updates)
            for lane, request in enumerate(verifying)
        ]
        for lane, request in enumerate(prefilling):
            self._plan_prefill(views, lane, request, updates)
        return plan, planned

    def _admit(self):
        """Give slots to waiting requests, first come first served, while pages last.

        The pages of the whole request are promised, so growth never fails.
        """
        for slot, holder in enumerate(self.slots):
            if holder is not None or not self.waiting:
                continue
            request = self.waiting[0]
            needed = self.pages_needed(request)
            if not self.allocator.can_promise(needed):
                return
            self.waiting.popleft()
            self.allocator.promise(request.request_id, needed)
            request.slot = slot
            self.slots[slot] = request
            request.status = (
                Status.PREFILL if self._prefill_target(request) else Status.READY
            )

    def _prefill_target(self, request):
        """Prompt tokens that prefill chunks feed; the seed verify feeds the rest."""
        return max(0, len(request.tokens) - self.shape.num_queries)

    def _assign_phases(self, active):
        """Give ready requests the phase with the least context to read.

        Verification cost grows with context, so phases are balanced by tokens, within
        the number of verify lanes; among equals the phase that comes up first wins.
        """
        ready = [r for r in active if r.status is Status.READY and r.phase < 0]
        if not ready:
            return
        loads = [0] * self._cycle
        for request in active:
            if request.phase >= 0:
                loads[request.phase] += len(request.tokens)
        now = (self._step - 1) % self._cycle
        order = [(now + i) % self._cycle for i in range(self._cycle)]
        for request in sorted(ready, key=lambda r: r.request_id):
            lanes = self.shape.verify_lanes
            free = [p for p in order if self._phase_counts[p] < lanes]
            request.phase = min(free, key=lambda p: loads[p])
            self._phase_counts[request.phase] += 1
            loads[request.phase] += len(request.tokens)

    def _plan_verify(self, views, lane, request, updates):
        num_drafts = self.shape.num_draft_tokens
        if request.status is Status.READY:
            start = self._prefill_target(request)
            tail = request.tokens[start:]
            num_drafts = len(tail) - 1
            views["seed_counts"][lane] = num_drafts
            views["seed_starts"][lane] = start
            views["seed_tokens"][lane, : len(tail)] = tail
            request.status = Status.RUNNING
            longest = start
        else:
            longest = request.committed
            longest += request.verifies_in_flight * self.shape.num_queries
        views["verify_slots"][lane] = request.slot
        self._grow_full(request, longest + self.shape.num_queries, updates)
        self._grow_draft(request, longest, updates)
        request.verifies_in_flight += 1
        return PlannedVerify(lane, request, num_drafts)

    def _plan_prefill(self, views, lane, request, updates):
        target = self._prefill_target(request)
        start = request.prefilled
        count = min(self.shape.prefill_chunk, target - start)
        views["prefill_slots"][lane] = request.slot
        views["prefill_starts"][lane] = start
        views["prefill_counts"][lane] = count
        views["prefill_tokens"][lane, :count] = request.tokens[start : start + count]
        self._grow_full(request, start + count, updates)
        request.prefilled = start + count
        if request.prefilled == target:
            request.status = Status.READY

    def _grow_full(self, request, num_tokens, updates):
        """Allocate full pages for the first `num_tokens` tokens."""
        most = self._full_pages(request.limit)
        needed = min(most, pages_for(num_tokens, self.shape.page_size))
        count = max(0, needed - request.num_full_pages)
        pages = self.allocator.allocate(request.request_id, count)
        updates.add(plan_lib.FULL_TABLE, request.slot, request.num_full_pages, pages)
        request.num_full_pages += count

    def _grow_draft(self, request, length, updates):
        """Allocate draft pages for a selection made at committed `length`."""
        needed = self._draft_pages(request, min(length, request.limit))
        count = max(0, needed - request.num_draft_pages)
        pages = self.allocator.allocate(request.request_id, count)
        updates.add(plan_lib.DRAFT_TABLE, request.slot, request.num_draft_pages, pages)
        request.num_draft_pages += count

    def _full_pages(self, limit):
        # The last verification may feed K drafts past the limit.
        return pages_for(limit + self.shape.num_draft_tokens, self.shape.page_size)

    def _draft_pages(self, request, length):
        if not self.shape.num_draft_tokens:
            return 0
        rows = self.selected_tokens(request, length)
        # Rows just verified, then the drafts of the next cycle behind them.
        rows += self.shape.num_queries + self.shape.num_draft_tokens
        return pages_for(rows, self.shape.page_size)


class _TableUpdates:
    """Appends page-table changes to a plan."""

    def __init__(self, rows):
        self._rows = rows
        self._used = 0

    def add(self, table, slot, first_column, pages):
        end = self._used + len(pages)
        rows = self._rows[self._used : end]
        rows[:, 0] = table
        rows[:, 1] = slot
        rows[:, 2] = np.arange(first_column, first_column + len(pages))
        rows[:, 3] = pages
        self._used = end
