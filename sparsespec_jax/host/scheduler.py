"""Which request does what in which step: slots, phases, pages. Host only, no jax.

Each admitted request holds a slot and goes through prefill chunks, one seed verify
and then cycles of K drafts and one verify. Its phase, the residue mod (K + 1) of its
verify steps, does not depend on outcomes, so plans can be made any number of steps
ahead of them. An aligned step is a cycle of all slots; prompt chunks have others, which
come first. What planning needs of slots is kept in arrays: a step costs array
operations and Python work for what changes.
"""

import bisect
from collections import deque

import numpy as np

from sparsespec_jax.host.feeding import Feeding, reads_of_chunk
from sparsespec_jax.host.kv_manager import KvManager
from sparsespec_jax.host.page_allocator import OutOfPagesError
from sparsespec_jax.host.prompt_groups import PromptGroups
from sparsespec_jax.host.request import Status
from sparsespec_jax.host.slot_arrays import NO_PHASE, SlotArrays
from sparsespec_jax.plan.buffer import PENDING_ONLY, StepPlan
from sparsespec_jax.plan.outcome import PlannedVerifies
from sparsespec_jax.plan.shape import RESTORE_CHUNKS, pages_for

_HEADROOM = 0.01  # share of the pool left for growth when a request is let in


class Scheduler:
    """Admits, balances, preempts and plans, without device data. Owns the Requests.

    Args:
      shape: StepShape of the largest K.
      kv_policy: one of config.KV_POLICIES.
      num_host_chunks: chunks of pages that host memory can take.
      chunk_pages: pages of a chunk.
      exact: see `feeding`.
    """

    def __init__(
        self, shape, *, kv_policy="offload", num_host_chunks=0, chunk_pages=16,
        exact=False,
    ):  # fmt: skip
        self.shape = shape  # of the current K
        self._widest = shape  # of the largest K: pages are reserved for it
        self._policy = kv_policy
        self.kv = KvManager(shape, num_chunks=num_host_chunks, chunk_pages=chunk_pages)
        self._headroom = max(1, int(_HEADROOM * shape.num_pages))
        self.waiting = deque()
        self.slots = [None] * shape.num_slots
        self.arrays = SlotArrays(shape.num_slots)
        self._free_slots = list(range(shape.num_slots - 1, -1, -1))
        self._prefilling = []  # in order of admission
        self._ready = []  # without a phase
        self._preempted = []  # oldest first
        self._arriving = []  # whose last pages come back with the step planned last
        self._groups = PromptGroups()
        self._feeding = Feeding(exact=exact)
        self._moves = []  # page copies before the next step
        self.num_missed_drafts = 0  # for want of a draft lane
        self._step = 0

    @property
    def has_work(self):
        """True while any request waits or holds a slot."""
        return self.num_active + len(self.waiting) > 0

    @property
    def num_active(self):
        """Requests that hold a slot."""
        return self.shape.num_slots - len(self._free_slots)

    @property
    def num_preempted(self):
        """Requests that hold a slot but not all of their pages."""
        return len(self._preempted) + len(self._arriving)

    @property
    def num_running(self):
        """Requests that hold a slot and all of their pages."""
        return self.num_active - self.num_preempted

    @property
    def context_tokens(self):
        """Tokens that the requests in slots hold, those in flight at their most."""
        return int(self.arrays.reach.sum())

    # -- requests ---------------------------------------------------------------

    def check(self, request):
        """Raise ValueError if the request could never fit."""
        needed = self.kv.pages_needed(request)
        if needed > self.shape.num_pages:
            raise ValueError(
                f"a request of up to {request.limit} tokens can need {needed} pages, "
                f"the pool has {self.shape.num_pages}: raise num_pages or lower "
                "max_tokens"
            )

    def add(self, request):
        """Queue a request; ValueError if it could never fit."""
        self.check(request)
        if self._policy == "oracle" and request.expected_length is None:
            raise ValueError("kv_policy='oracle' needs the length of every request")
        self.waiting.append(request)

    def release(self, request):
        """Take a request out, wherever it is; its slot and pages become free."""
        if request.status is Status.WAITING:
            self.waiting.remove(request)
        elif request.status is not Status.FINISHED:
            self._unqueue(request)
            slot, request.slot = request.slot, -1
            self.slots[slot] = None
            self.arrays.clear(slot)
            self._free_slots.append(slot)
            self.kv.release(slot)
            self._groups.remove(request)
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
        self.arrays.phase[:] = NO_PHASE
        self.arrays.is_running[:] = False
        self._prefilling, self._ready = [], []
        active = [r for r in self.slots if r and r.status is not Status.PREEMPTED]
        for request in sorted(active, key=lambda r: r.request_id):
            self._enqueue(request)

    # -- planning ---------------------------------------------------------------

    def plan(self):
        """Plan one step: (StepPlan or None if idle, PlannedVerifies, page moves).

        The moves come before the step, in order; what comes back from host memory
        is needed by the next step, or by a spill before it.
        """
        updates = []
        self._resume(updates)
        self._admit()
        now = self._step % self.shape.cycle
        self._step += 1
        sizes = self.shape.cycle, self.shape.verify_lanes
        self.arrays.assign_phases(self._ready, now, *sizes)
        self._ready = []
        slots, prefilling, growth = self._lanes(now, updates)
        drafting, num_missed = self.arrays.draft(now, slots, self.shape)
        self.num_missed_drafts += num_missed
        planned = PlannedVerifies(
            [self.slots[slot] for slot in slots.tolist()],
            self.arrays.num_rows(slots, self.shape),
            self.shape.num_queries,
            self.arrays.is_whole(slots, self.shape.num_draft_steps),
            np.zeros(slots.size, bool),
            np.zeros(slots.size, np.int64),
            [(r, *self._feeding.next_chunk(r, self.shape)) for r in prefilling],
        )
        plan = None
        if prefilling or slots.size or updates or drafting.size:
            plan = StepPlan.empty(self.shape, prefill=bool(prefilling))
            plan.views["slot_params"][:] = self.arrays.params
            plan.views["draft_slots"][: drafting.size] = drafting
            self.kv.grow(*growth, updates)
            self._plan_verifies(plan, slots, planned)
            for lane, chunk in enumerate(planned.chunks):
                self._plan_prefill(plan, lane, *chunk)
            if self.shape.draft_lanes:
                self.arrays.rebalance(now, self.shape.cycle, self.shape.verify_lanes)
            if updates:
                plan.views["table_updates"][: len(updates)] = updates
        moves, self._moves = self._moves, []
        return plan, planned, moves

    def commit(self, planned, num_committed, emissions):
        """Take in an outcome: verify lane i committed `num_committed[i]` rows.

        `emissions` are (request, new tokens, whether they are its last).
        """
        for request in planned.requests:
            request.verifies_in_flight -= 1
        slots = np.array([r.slot for r in planned.requests], np.int64)
        held = slots >= 0
        surplus = planned.num_rows - np.asarray(num_committed, np.int64)
        self.arrays.reach[slots[held]] -= surplus[held]
        for request, tokens, is_over in emissions:
            request.tokens.extend(tokens)
            if is_over:
                self.release(request)

    def _admit(self):
        """Give slots to waiting requests, first come first served, while pages last.

        Nobody comes in while a preempted request waits for its pages.
        """
        while self.waiting and self._free_slots and not self.num_preempted:
            request = self.waiting[0]
            promised, room = self._admission_pages(request)
            if self.kv.num_available < room and self.num_active:
                return
            self.waiting.popleft()
            request.slot = self._free_slots.pop()
            self.slots[request.slot] = request
            self.arrays.put(request.slot, request)
            self.kv.promise(request.slot, promised)
            self._groups.add(request)
            self._enqueue(request)

    def _admission_pages(self, request):
        """(pages to promise to a new request, pages that must be available)."""
        if self._policy in ("reserve", "oracle"):
            length = request.expected_length if self._policy == "oracle" else None
            pages = self.kv.pages_needed(request, length)
            return pages, pages
        pages = self.kv.pages_needed(request, len(request.tokens))
        return pages, pages + self._headroom

    def _enqueue(self, request):
        """Put a request that holds a slot where it continues: prefill or ready."""
        target = self._feeding.prefill_target(request, self.shape)
        if not request.is_seeded and request.prefilled < target:
            request.status = Status.PREFILL
            self._prefilling.append(request)
            return
        request.status = Status.READY
        self._ready.append(request)
        if not request.is_seeded:
            start = self._feeding.seed_start(request, self.shape)
            self.arrays.reach[request.slot] = start

    def _unqueue(self, request):
        for queue in (self._prefilling, self._ready, self._preempted, self._arriving):
            if request in queue:
                queue.remove(request)

    def _lanes(self, now, updates):
        """Slots to verify, requests to prefill and the pages that both come to hold.

        Preempts the youngest requests until those pages are free.
        """
        while True:
            slots = np.flatnonzero(self.arrays.phase == now)
            prefilling = self._next_prefills(updates)
            slots = slots[: 0 if prefilling and self.shape.runs_cycles else None]
            growth = self._growth(slots, prefilling)
            if self.kv.missing(*growth).sum() <= self.kv.num_free:
                return slots, prefilling, growth
            if not self._free_pages():
                raise OutOfPagesError("no request is left to take pages from")

    def _growth(self, slots, prefilling):
        """(slots, full pages, draft pages), int [n] each, that the lanes need."""
        arrays, page_size = self.arrays, self.shape.page_size
        reach = arrays.reach[slots]
        most = self.kv.full_pages(arrays.limit[slots])
        full = np.minimum(most, pages_for(reach + self.shape.num_queries, page_size))
        draft = np.zeros_like(full)
        if self.shape.draft_lanes:
            draft += self.kv.draft_pages(
                np.minimum(reach, arrays.limit[slots]),
                arrays.budget_ratio[slots],
                arrays.min_budget[slots],
            )
        if not prefilling:
            return slots, full, draft
        ends = [sum(self._feeding.next_chunk(r, self.shape)) for r in prefilling]
        return (
            np.append(slots, [r.slot for r in prefilling]),
            np.append(full, [pages_for(end, page_size) for end in ends]),
            np.append(draft, [0] * len(ends)),
        )

    def _plan_verifies(self, plan, slots, planned):
        """Fill the verify lanes for `slots`."""
        plan.views["verify_slots"][: slots.size] = slots
        arrays, rows = self.arrays, planned.num_rows
        for lane in np.flatnonzero(~arrays.is_running[slots]).tolist():
            request = planned.requests[lane]
            first = self._plan_first_verify(plan, lane, request)
            planned.seed_starts[lane], rows[lane] = first
            planned.is_replay[lane] = not request.is_seeded
        arrays.is_running[slots] = ~planned.is_replay
        arrays.drafted[slots] = 0
        for request in planned.requests:
            request.verifies_in_flight += 1
        arrays.reach[slots] += rows

    def _plan_first_verify(self, plan, lane, request):
        """(first position, rows) of a seed verify, or of the pending token alone."""
        request.status = Status.RUNNING
        if request.is_seeded:
            plan.views["seed_counts"][lane] = PENDING_ONLY
            return request.committed, 1
        start, tail, is_last = self._feeding.next_seed(request, self.shape)
        plan.seed(lane, start, tail)
        self.arrays.reach[request.slot] = start
        request.is_seeded = is_last
        request.prefilled = self._feeding.fed_by(request, start, tail)
        if not is_last:
            request.prefill_reads += reads_of_chunk(start, len(tail))
        return start, len(tail)

    def _next_prefills(self, updates):
        """Requests whose prompt the next step goes on with, oldest first."""
        chosen = []
        for request in tuple(self._prefilling):
            if len(chosen) == self.shape.prefill_lanes:
                break
            if request.prompt_group is None or self._share_prompt(request, updates):
                chosen.append(request)
        return chosen

    def _share_prompt(self, request, updates):
        """Take over the pages of a prompt that another sample has; True to prefill.

        Only pages that no sample writes again are shared, so none is ever copied.
        False while another sample prefills the prompt, or if nothing is left to do.
        """
        count = self._feeding.num_shared_pages(request, self._widest)
        if request.prefilled or not count or self.shape.keeps_history:
            return True  # a proposer reads the slot's own copy of the prompt
        owner, must_wait = self._groups.owner(request)
        if owner is None:
            return not must_wait
        if len(updates) + count > self.shape.table_width:
            return False  # one takeover a step
        self.kv.share(owner.slot, request.slot, count, updates)
        request.prefilled = count * self.shape.page_size
        if request.prefilled < self._feeding.prefill_target(request, self.shape):
            return True
        self._prefilling.remove(request)
        self._enqueue(request)
        return False

    def _plan_prefill(self, plan, lane, request, start, count):
        behind = request.prompt_logprobs is not None  # its last row tells of one more
        tokens = request.tokens[start : start + count + behind]
        plan.prefill_chunk(lane, request.slot, start, tokens, count)
        request.prefilled = start + count
        request.prefill_reads += reads_of_chunk(start, count)
        if request.prefilled == self._feeding.prefill_target(request, self.shape):
            self._prefilling.remove(request)
            self._enqueue(request)

    # -- preemption -------------------------------------------------------------

    def preempt(self, request):
        """Stop a request and take pages from it: spill a chunk, or drop them all.

        It goes on when they are back, with the tokens it would have had anyway.
        """
        slot = request.slot
        if request.status is not Status.PREEMPTED:
            self._unqueue(request)
            self.arrays.suspend(slot)
            self.kv.free_draft(slot)
            self.kv.promise(slot, 0)
            self.kv.counters.preemptions += 1
            request.status = Status.PREEMPTED
        if request in self._arriving:
            self._arriving.remove(request)
        if request not in self._preempted:
            bisect.insort(self._preempted, request, key=lambda r: r.request_id)
        request.is_returning = False
        if not self.kv.resident[slot]:
            return
        if self._policy == "offload" and self.kv.has_free_chunk:
            self.kv.spill(slot, self._moves)
            return
        lost = len(request.tokens) - 1 if request.is_seeded else request.prefilled
        self.kv.counters.recomputed_tokens += lost
        self.kv.release(slot)
        request.prefilled, request.is_seeded = 0, False

    def _free_pages(self, spare=None):
        """Preempt the youngest that holds or wants pages; False if nobody does."""
        arrays = self.arrays
        concerned = (self.kv.resident > 0) | ~arrays.is_suspended
        ids = np.where(concerned, arrays.request_id, -1)
        if spare is not None:
            ids[spare.slot] = -1
        slot = int(np.argmax(ids))
        if ids[slot] < 0:
            return False
        self.preempt(self.slots[slot])
        return True

    def _resume(self, updates):
        """Bring preempted requests back, oldest first, ahead of new ones."""
        arrived, self._arriving = self._arriving, []
        for request in arrived:
            self._return(request)
        budget = RESTORE_CHUNKS
        while self._preempted:
            request = self._preempted[0]
            if request.verifies_in_flight or not self._has_room(request):
                return
            if not self.kv.next_chunk(request.slot):  # its KV was dropped
                self._return(self._preempted.pop(0))
                continue
            if not budget:
                return
            budget -= 1
            request.is_returning = True
            self.kv.restore(request.slot, self._moves, updates)
            if not self.kv.next_chunk(request.slot):
                self._arriving.append(self._preempted.pop(0))

    def _has_room(self, request):
        """True if a preempted request's (next) pages can come back now."""
        needed = self.kv.pages_needed(request, len(request.tokens))
        needed -= int(self.kv.resident[request.slot])
        if request.is_returning:
            needed = self.kv.next_chunk(request.slot)
        headroom = 0 if request.is_returning else self._headroom
        if self.kv.num_available >= needed + headroom:
            return True
        if self.num_active > len(self._preempted):
            return False  # pages come when one of the others ends
        while self.kv.num_available < needed and self._free_pages(spare=request):
            pass
        return self.kv.num_available >= needed

    def _return(self, request):
        """Let a request with all the KV it can have go on."""
        if request.is_seeded:
            request.prefilled, request.is_seeded = len(request.tokens) - 1, False
        request.is_returning = False
        self.arrays.is_suspended[request.slot] = False
        needed = self.kv.pages_needed(request, len(request.tokens))
        resident = int(self.kv.resident[request.slot])
        self.kv.promise(request.slot, max(0, needed - resident))
        self._enqueue(request)
