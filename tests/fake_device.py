"""A device of integers: runs plans, and checks every row that a step would read."""

import numpy as np

from sparsespec_jax.host.request import Request, Status, token_array
from sparsespec_jax.plan.buffer import ALL_DRAFTS
from sparsespec_jax.plan.shape import (
    RESTORE_CHUNKS,
    StepShape,
    budget_tokens,
    pages_for,
)
from sparsespec_jax.plan.slot_params import NUM_SLOT_PARAMS

RATIO, FLOOR = 0.3, 2
CHUNK_PAGES = 3
_SPAN = 1 << 20  # tags of a request: positions, then rows of its draft cache
_DRAFT = 1 << 19


def make_shape(
    *, slots, k, pages, page_size=4, max_length=64, chunk=8, lanes=1, **cascade
):
    table = pages_for(max_length + k, page_size)
    draft = pages_for(max_length + 2 * k + 1, page_size) if k else 1
    return StepShape(
        num_slots=slots,
        num_draft_tokens=k,
        num_pages=pages,
        page_size=page_size,
        table_width=table,
        draft_table_width=draft,
        max_budget=max_length,
        prefill_lanes=lanes,
        prefill_chunk=chunk,
        restore_pages=RESTORE_CHUNKS * CHUNK_PAGES,
        **cascade,
    )


def make_request(request_id, num_prompt, new, *, group=None, end=None):
    """A request of `num_prompt` tokens that emits `new`; `end` caps it earlier."""
    return Request(
        request_id=request_id,
        tokens=token_array(range(num_prompt)),
        num_prompt=num_prompt,
        limit=num_prompt + new,
        budget_ratio=RATIO,
        min_budget=FLOOR,
        slot_params=np.zeros(NUM_SLOT_PARAMS, np.int32),
        prompt_group=group,
        expected_length=num_prompt + (new if end is None else end),
    )


class FakeDevice:
    """Pages hold tags that say whose row of which position they are."""

    def __init__(self, shape, rng, *, exact=False):
        self.shape, self.rng, self.exact = shape, rng, exact
        slots = shape.num_slots
        self.pool = np.full((shape.num_pages + 1, shape.page_size), -1, np.int64)
        self.full = np.full((slots, shape.table_width), shape.num_pages)
        self.draft = np.full((slots, shape.draft_table_width), shape.num_pages)
        self.draft_rows = np.zeros(slots, np.int64)
        self.drafted = np.zeros(slots, np.int64)
        self.host, self.arriving = {}, []
        self.known = {}  # request id -> tokens known on the device
        self.holder = [None] * slots

    def move(self, moves):
        """Execute page moves; a restored chunk arrives as late as it may."""
        self._arrive()
        for move in moves:
            pages = list(move.pages)
            if move.to_host:
                self._arrive()
                self.host[move.chunk] = self.pool[pages].copy()
            else:
                self.arriving.append((pages, self.host[move.chunk].copy()))

    def _arrive(self):
        for pages, rows in self.arriving:
            self.pool[pages] = rows
        self.arriving = []

    def run(self, plan, planned):
        """One step; (planned, tokens emitted, rows committed) per verify lane."""
        views = plan.views
        updates = views["table_updates"]  # most of them are of no slot
        updates = updates[updates[:, 1] < self.shape.num_slots]
        for table, slot, column, page in updates.tolist():
            (self.full, self.draft)[table][slot, column] = page
        slots = views["verify_slots"][views["verify_slots"] < self.shape.num_slots]
        drafting = views["draft_slots"][views["draft_slots"] < self.shape.num_slots]
        assert drafting.size == len(set(drafting.tolist()))
        assert slots.size == len(planned.requests) == len(set(slots.tolist()))
        if self.shape.runs_cycles:
            assert set(drafting.tolist()) <= set(slots.tolist())
            assert not (plan.prefill and slots.size)
        else:
            assert not set(drafting.tolist()) & set(slots.tolist())
        if plan.prefill:
            self._prefill(views)
        for _ in range(self.shape.num_draft_steps if self.shape.runs_cycles else 1):
            for slot in drafting:
                self._draft(slot)
        emitted = [
            self._verify(views, lane, request, int(num_rows), is_replay)
            for lane, (request, num_rows, is_replay) in enumerate(
                zip(planned.requests, planned.num_rows, planned.is_replay, strict=True)
            )
        ]
        is_seed = views["seed_counts"][: len(emitted)] >= 0
        return planned, emitted, np.where(is_seed, planned.num_rows, emitted)

    def _prefill(self, views):
        for lane, slot in enumerate(views["prefill_slots"]):
            if slot < self.shape.num_slots:
                start, count = (
                    int(views[name][lane])
                    for name in ("prefill_starts", "prefill_counts")
                )
                tokens = views["prefill_tokens"][lane, :count]
                request = self.holder[slot]
                assert list(tokens) == list(request.tokens[start : start + count])
                # Else a token's row would depend on k, or on a preemption.
                assert not self.exact or start + count < request.num_prompt
                self._check(request, self._rows(self.full, slot, 0, start))
                self._write(self.full, slot, start, self._tags(request, start, count))

    def _draft(self, slot):
        """Read the draft cache and append rows to it, of which some are kept."""
        rows, shape = int(self.draft_rows[slot]), self.shape
        fed = min(shape.draft_queries, shape.num_draft_tokens - int(self.drafted[slot]))
        if fed <= 0:  # a cascade made its drafts in fewer steps
            return
        base = self.holder[slot].request_id * _SPAN + _DRAFT
        found = self._rows(self.draft, slot, 0, rows)
        assert (found == base + np.arange(rows)).all()
        self._write(self.draft, slot, rows, base + rows + np.arange(fed))
        kept = self.rng.integers(1, fed + 1) if fed > 1 else fed
        self.draft_rows[slot] += kept
        self.drafted[slot] += kept

    def _verify(self, views, lane, request, most, is_replay):
        slot, known = request.slot, self.known.get(request.request_id)
        is_seed = views["seed_counts"][lane] >= 0
        if is_seed:
            start = int(views["seed_starts"][lane])
            known = start + most
            assert not self.exact or start >= request.num_prompt - 1
            if not is_replay:
                assert known == len(request.tokens)  # nothing may be in flight
            tail = views["seed_tokens"][lane, :most]
            assert list(tail) == list(request.tokens[start:known])
        else:
            start = known - 1
            assert self.drafted[slot] < most or views["seed_counts"][lane] != ALL_DRAFTS
            most = min(most, int(self.drafted[slot]) + 1)
        self.drafted[slot] = 0
        self._check(request, self._rows(self.full, slot, 0, start))
        self._write(self.full, slot, start, self._tags(request, start, most))
        if self.shape.num_draft_tokens:
            cap = self.shape.max_budget
            rows = int(budget_tokens(start, ratio=RATIO, floor=FLOOR, cap=cap)) + most
            base = request.request_id * _SPAN + _DRAFT
            self._write(self.draft, slot, 0, base + np.arange(rows))
            self.draft_rows[slot] = rows
        if is_replay:
            assert known < len(request.tokens)
            return 0
        count = 1 if is_seed else self.rng.integers(1, most + 1)
        count = int(min(count, request.limit - known))
        self.known[request.request_id] = known + count
        return count

    def _tags(self, request, start, count):
        """Tags of positions; samples of one prompt share those of the prompt."""
        position = start + np.arange(count)
        own = request.request_id * _SPAN + position
        if request.prompt_group is None:
            return own
        shared = -2 - request.prompt_group * _SPAN - position
        return np.where(position < request.num_prompt, shared, own)

    def _check(self, request, rows):
        assert (rows == self._tags(request, 0, rows.size)).all()

    def _place(self, table, slot, start, count):
        position = start + np.arange(count)
        page = table[slot, position // self.shape.page_size]
        assert (page < self.shape.num_pages).all()
        return page, position % self.shape.page_size

    def _rows(self, table, slot, start, count):
        return self.pool[self._place(table, slot, start, count)]

    def _write(self, table, slot, start, tags):
        self.pool[self._place(table, slot, start, tags.size)] = tags


def simulate(scheduler, device, requests, *, lag, disturb=None, max_steps=30_000):
    """Run everything to the end; returns the number of steps.

    `disturb(step)` may act on the scheduler between two steps. A request also ends at
    its `expected_length`, which only some schedulers know.
    """
    for request in requests:
        scheduler.add(request)
    in_flight, steps = [], 0
    while scheduler.has_work:
        steps += 1
        assert steps < max_steps, "the scheduler does not end"
        if disturb is not None:
            disturb(steps)
        plan, planned, moves = scheduler.plan()
        check_pages(scheduler)
        device.move(moves)
        device.holder = list(scheduler.slots)
        if plan is not None:
            device.shape = plan.shape
            in_flight.append(device.run(plan, planned))
        while len(in_flight) > (lag if plan is not None else 0):
            planned, emitted, committed = in_flight.pop(0)
            emissions = [
                (r, [7] * count, len(r.tokens) + count >= r.limit)
                for r, count in zip(planned.requests, emitted, strict=True)
                if r.status is not Status.FINISHED
            ]
            scheduler.commit(planned, committed, emissions)
    return steps


def check_pages(scheduler):
    """References add up, and only samples of one prompt share a page."""
    kv, held = scheduler.kv, {}
    for slot in range(scheduler.shape.num_slots):
        for page in kv.pages(slot):
            held.setdefault(page, []).append(scheduler.slots[slot])
    assert kv.num_free == scheduler.shape.num_pages - len(held)
    for page, requests in held.items():
        assert kv.allocator.references(page) == len(requests)
        if len(requests) > 1:
            assert len({r.prompt_group for r in requests} - {None}) == 1
