"""What planning needs of every slot, one array per fact. No jax."""

import numpy as np

from sparsespec_jax.plan.slot_params import NUM_SLOT_PARAMS

NO_PHASE = -1
_TOLERANCE = 1.03  # load of a phase over the mean that is left alone


class SlotArrays:
    """Facts of S slots: a step costs operations on these and no loop over slots."""

    def __init__(self, num_slots):
        self.params = np.zeros((num_slots, NUM_SLOT_PARAMS), np.int32)
        self.request_id = np.full(num_slots, -1, np.int64)
        self.phase = np.full(num_slots, NO_PHASE, np.int32)
        self.is_running = np.zeros(num_slots, bool)
        self.is_suspended = np.zeros(num_slots, bool)
        # Draft steps since the last verification.
        self.drafted = np.zeros(num_slots, np.int64)
        # Committed length if every verification in flight accepts everything.
        self.reach = np.zeros(num_slots, np.int64)
        self.limit = np.zeros(num_slots, np.int64)
        self.budget_ratio = np.zeros(num_slots, np.float32)
        self.min_budget = np.zeros(num_slots, np.int32)

    def put(self, slot, request):
        """Fill a slot's row for a new holder."""
        self.params[slot] = request.slot_params
        self.request_id[slot] = request.request_id
        self.reach[slot] = len(request.tokens)
        self.limit[slot] = request.limit
        self.budget_ratio[slot] = request.budget_ratio
        self.min_budget[slot] = request.min_budget

    def suspend(self, slot):
        """Take a slot out of drafting and verification."""
        self.phase[slot] = NO_PHASE
        self.is_running[slot] = False
        self.is_suspended[slot] = True

    def clear(self, slot):
        """Forget the holder."""
        self.suspend(slot)
        self.is_suspended[slot] = False
        self.request_id[slot] = -1
        self.reach[slot] = 0

    def draft(self, now, slots, shape):
        """Count the drafts of a step: (slots that draft, others without a lane).

        They are those beside the `slots` that verify, or in an aligned step these
        before they verify, but for first verifications.
        """
        if shape.runs_cycles:
            drafting = slots[self.is_running[slots]]
            self.drafted[drafting] = shape.num_draft_steps
            return drafting, 0
        wanted = np.flatnonzero(self.is_running & (self.phase != now))
        drafting = wanted[: shape.draft_lanes]
        self.drafted[drafting] += 1
        return drafting, wanted.size - drafting.size

    def num_rows(self, slots, shape):
        """Most rows that running slots verify: their drafts and the pending token."""
        if not shape.draft_lanes:
            return np.full(slots.size, shape.num_queries)
        drafts = self.drafted[slots] * shape.draft_queries
        return np.minimum(drafts, shape.num_draft_tokens) + 1

    def is_whole(self, slots, num_draft_steps):
        """Bool [n]: all draft steps of a cycle lie before the verification to come."""
        return self.is_running[slots] & (self.drafted[slots] == num_draft_steps)

    def phase_tokens(self, cycle):
        """Context that each of the `cycle` phases verifies, float [cycle]."""
        has_phase = self.phase != NO_PHASE
        phases = self.phase[has_phase]
        return np.bincount(phases, self.reach[has_phase], minlength=cycle)

    def assign_phases(self, ready, now, cycle, lanes):
        """Give requests the phase with the least context to read.

        Verification cost grows with context, so phases are balanced by tokens, within
        the number of verify lanes; among equals the phase that comes up first wins.
        """
        if not ready:
            return
        counts = np.bincount(self.phase[self.phase != NO_PHASE], minlength=cycle)
        counts, loads = counts.tolist(), self.phase_tokens(cycle).tolist()
        order = [(now + i) % cycle for i in range(cycle)]
        for request in ready:
            free = (p for p in order if counts[p] < lanes)
            phase = min(free, key=loads.__getitem__)
            self.phase[request.slot] = phase
            counts[phase] += 1
            loads[phase] += len(request.tokens)

    def rebalance(self, now, cycle, lanes):
        """Move a request of phase `now`, verified just now, to the lightest phase.

        Requests leave at any time, so phases drift apart. The one moved has a short
        cycle once, of the drafts it makes until its new phase comes.
        """
        loads = self.phase_tokens(cycle)
        if loads[now] <= _TOLERANCE * loads.mean():
            return
        counts = np.bincount(self.phase[self.phase != NO_PHASE], minlength=cycle)
        lightest = int(np.argmin(np.where(counts < lanes, loads, np.inf)))
        gap = loads[now] - loads[lightest]
        slots = np.flatnonzero((self.phase == now) & (self.reach < gap))
        if counts[lightest] < lanes and counts[now] > 1 and slots.size:
            best = np.argmin(np.abs(self.reach[slots] - gap / 2))
            self.phase[slots[best]] = lightest
