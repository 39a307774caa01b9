"""Scheduler and page accounting on simulated outcomes: no jax, no model."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from sparsespec_jax.host.page_allocator import OutOfPagesError, PageAllocator
from sparsespec_jax.host.request import Status
from sparsespec_jax.host.scheduler import Scheduler
from sparsespec_jax.plan.shape import budget_tokens
from tests.fake_device import (
    CHUNK_PAGES,
    FakeDevice,
    make_request,
    make_shape,
    simulate,
)

SIZES = st.lists(
    st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=14
)
LOAD = dict(
    k=st.sampled_from([0, 1, 3, 8]),
    slots=st.integers(1, 9),
    lag=st.integers(0, 2),
    sizes=SIZES,
    lanes=st.integers(1, 3),
    seed=st.integers(0, 1000),
    aligned=st.booleans(),
)


def make_scheduler(
    requests, *, k, slots, lanes, spare, aligned=False, cascade=None, **options
):
    """A scheduler whose pool has `spare` pages more than the largest request needs."""
    sizes = dict(slots=slots, k=k, lanes=lanes, is_aligned=aligned, **(cascade or {}))
    probe = Scheduler(make_shape(pages=1000, **sizes))
    most = max(probe.kv.pages_needed(r) for r in requests)
    shape = make_shape(pages=most + spare, **sizes)
    return Scheduler(shape, chunk_pages=CHUNK_PAGES, **options)


def check_all_ended(scheduler, requests):
    assert all(len(r.tokens) == r.limit for r in requests)
    assert scheduler.kv.num_free == scheduler.shape.num_pages
    assert scheduler.kv.num_available == scheduler.shape.num_pages


@settings(max_examples=400, deadline=None)
@given(
    spare=st.integers(0, 40),
    policy=st.sampled_from(["offload", "recompute", "reserve", "oracle"]),
    chunks=st.integers(0, 60),
    grouped=st.booleans(),
    exact=st.booleans(),
    **LOAD,
)
def test_every_request_ends_under_any_load(
    k, slots, lag, spare, sizes, lanes, seed, aligned, policy, chunks, grouped, exact
):
    """The smallest legal pool included; the device checks every row it reads."""
    requests = [
        make_request(i, p, n, group=p if grouped else None)
        for i, (p, n) in enumerate(sizes)
    ]
    scheduler = make_scheduler(
        requests, k=k, slots=slots, lanes=lanes, spare=spare, aligned=aligned,
        kv_policy=policy, num_host_chunks=chunks, exact=exact,
    )  # fmt: skip
    device = FakeDevice(scheduler.shape, np.random.default_rng(seed), exact=exact)
    simulate(scheduler, device, requests, lag=lag)
    check_all_ended(scheduler, requests)
    counters = scheduler.kv.counters
    if policy in ("reserve", "oracle"):
        assert counters.preemptions == 0
    if policy != "offload" or not chunks:
        assert counters.spilled_pages == 0
    assert counters.restored_pages <= counters.spilled_pages
    enough = slots * (scheduler.shape.table_width // CHUNK_PAGES + 2)
    if policy == "offload" and chunks >= enough:
        assert counters.recomputed_tokens == 0


@settings(max_examples=80, deadline=None)
@given(
    share=st.sampled_from([0.05, 0.3, 1.0]),
    policy=st.sampled_from(["offload", "recompute"]),
    chunks=st.integers(1, 60),
    exact=st.booleans(),
    **LOAD,
)
def test_preemption_abort_and_other_k_at_any_step(
    k, slots, lag, sizes, lanes, seed, aligned, share, policy, chunks, exact
):
    rng = np.random.default_rng(seed)
    requests = [make_request(i, p, n) for i, (p, n) in enumerate(sizes)]
    scheduler = make_scheduler(
        requests, k=k, slots=slots, lanes=lanes, spare=20, aligned=aligned,
        kv_policy=policy, num_host_chunks=chunks, exact=exact,
    )  # fmt: skip

    aborted = []

    def disturb(step):
        if rng.random() < share / 20:
            known = [r for r in requests if r.status is not Status.FINISHED]
            aborted.append(known[rng.integers(len(known))])
            scheduler.release(aborted[-1])
        active = [r for r in scheduler.slots if r is not None]
        # For ever at every step would let nobody end.
        if active and step < 60 and rng.random() < share:
            scheduler.preempt(active[rng.integers(len(active))])
        if rng.random() < share / 10:
            scheduler.set_num_draft_tokens(int(rng.integers(k + 1)))

    device = FakeDevice(scheduler.shape, rng, exact=exact)
    simulate(scheduler, device, requests, lag=lag, disturb=disturb)
    check_all_ended(scheduler, [r for r in requests if r not in aborted])


@settings(max_examples=100, deadline=None)
@given(
    draft_steps=st.integers(1, 8),
    num_guesses=st.integers(1, 7),
    share=st.sampled_from([0.0, 0.1]),
    **LOAD | {"k": st.sampled_from([2, 5, 8])},
)
def test_a_cascade_has_the_pages_for_what_it_may_draft(
    k, draft_steps, num_guesses, slots, lag, sizes, lanes, seed, aligned, share
):
    """The device checks that the host plans for as many rows as there can be."""
    rng = np.random.default_rng(seed)
    requests = [make_request(i, p, n) for i, (p, n) in enumerate(sizes)]
    cascade = dict(draft_steps=min(k, draft_steps), num_guesses=min(k - 1, num_guesses))
    scheduler = make_scheduler(
        requests, k=k, slots=slots, lanes=lanes, spare=20, aligned=aligned,
        cascade=cascade, num_host_chunks=20,
    )  # fmt: skip

    def disturb(step):
        if rng.random() < share:
            scheduler.set_num_draft_tokens(int(rng.integers(k + 1)))

    device = FakeDevice(scheduler.shape, rng)
    simulate(scheduler, device, requests, lag=lag, disturb=disturb)
    check_all_ended(scheduler, requests)


def test_pressure_spills_the_youngest_and_restores_before_admitting():
    shape = make_shape(slots=4, k=1, pages=40)
    scheduler = Scheduler(shape, num_host_chunks=40, chunk_pages=CHUNK_PAGES)
    requests = [make_request(i, 4, 50) for i in range(6)]
    seen = []

    def disturb(step):
        preempted = {r.request_id for r in requests if r.status is Status.PREEMPTED}
        active = {r.request_id for r in scheduler.slots if r} - preempted
        if preempted:
            seen.append(preempted)
            assert max(active, default=-1) < min(preempted)
        del step

    simulate(
        scheduler, FakeDevice(shape, np.random.default_rng(0)), requests,
        lag=1, disturb=disturb,
    )  # fmt: skip
    assert seen and scheduler.kv.counters.spilled_pages > 0
    check_all_ended(scheduler, requests)


def test_samples_of_a_prompt_share_its_pages():
    shape = make_shape(slots=4, k=1, pages=200)
    scheduler = Scheduler(shape)
    requests = [make_request(i, 30, 20, group=0) for i in range(4)]
    steps = simulate(
        scheduler, FakeDevice(shape, np.random.default_rng(0)), requests, lag=1
    )
    # 28 of 30 prompt tokens precede the seed verify: seven pages of four.
    assert scheduler.kv.counters.shared_pages == 3 * 7
    alone = Scheduler(shape)
    own = [make_request(i, 30, 20) for i in range(4)]
    device = FakeDevice(shape, np.random.default_rng(0))
    assert steps < simulate(alone, device, own, lag=1)
    check_all_ended(scheduler, requests)


def test_the_oracle_must_be_told_the_lengths():
    request = make_request(0, 4, 4)
    request.expected_length = None
    with pytest.raises(ValueError, match="needs the length of every request"):
        Scheduler(make_shape(slots=1, k=0, pages=9), kv_policy="oracle").add(request)


def test_each_request_verifies_once_per_cycle_and_lanes_suffice():
    shape = make_shape(slots=18, k=8, pages=2000)
    scheduler = Scheduler(shape)
    for i in range(18):
        scheduler.add(make_request(i, 10, 50))
    last, per_step = {}, []
    for step in range(400):
        _, planned, _ = scheduler.plan()
        per_step.append(len(planned.requests))
        scheduler.commit(planned, planned.num_rows, ())
        for request in planned.requests:
            if request.request_id in last:
                gap = step - last[request.request_id]
                # Shorter only while requests come in and phases are evened out.
                assert gap == shape.num_queries or (gap < 9 and step < 100)
            last[request.request_id] = step
    assert max(per_step) <= shape.verify_lanes == 2
    assert per_step[100:] == [2] * 300  # balanced: two of eighteen in every step


@pytest.mark.parametrize(
    ("slots", "k", "lanes"),
    [(1, 8, 1), (9, 8, 8), (24, 8, 22), (64, 8, 64), (128, 8, 121), (256, 8, 235)],
)
def test_draft_lanes_are_for_the_slots_that_do_not_verify(slots, k, lanes):
    shape = make_shape(slots=slots, k=k, pages=9)
    assert shape.draft_lanes == lanes
    tokens = lanes + shape.verify_lanes * shape.num_queries
    least = slots - slots // (k + 1)
    assert lanes == least or (tokens % 8 == 0 and least < lanes <= slots)


def test_a_slot_too_many_misses_a_draft_and_nothing_else():
    """Ten slots in five of nine phases: in the others all want to draft, in 9 lanes."""
    shape = make_shape(slots=10, k=8, pages=2000)
    assert shape.draft_lanes == 9
    scheduler, requests = Scheduler(shape), [make_request(i, 9, 40) for i in range(10)]
    wanted = []

    def disturb(step):
        arrays = scheduler.arrays
        if step > 30 and arrays.is_running.all():
            arrays.phase[:] = np.arange(10) // 2
            wanted.append(np.sum(arrays.phase != scheduler._step % shape.cycle))

    device = FakeDevice(shape, np.random.default_rng(0))
    simulate(scheduler, device, requests, lag=1, disturb=disturb)
    check_all_ended(scheduler, requests)
    assert max(wanted) == 10
    assert scheduler.num_missed_drafts == wanted.count(10)


def test_phases_balance_context_not_counts():
    shape = make_shape(slots=8, k=1, pages=4000, max_length=4000, chunk=4000)
    scheduler = Scheduler(shape)
    for i, prompt in enumerate([3000, 20, 20, 20, 20, 20]):
        scheduler.add(make_request(i, prompt, 10))
    for _ in range(20):
        scheduler.plan()
    by_phase = {0: 0, 1: 0}
    for request in scheduler.slots:
        if request is not None:
            by_phase[int(scheduler.arrays.phase[request.slot])] += 1
    # The long request has a phase to itself, but for the four-lane limit.
    assert sorted(by_phase.values()) == [2, 4]


def test_phases_are_evened_out_when_requests_leave():
    shape = make_shape(slots=12, k=2, pages=4000, max_length=4000, chunk=4000, lanes=12)
    scheduler = Scheduler(shape)
    requests = [make_request(i, 500 if i < 8 else 10, 900) for i in range(10)]
    device = FakeDevice(shape, np.random.default_rng(0))
    imbalance = []

    def disturb(step):
        if step == 40:  # all the context of a phase goes
            phases = scheduler.arrays.phase
            leaving = [r for r in requests if phases[r.slot] == 0]
            for request in leaving:
                scheduler.release(request)
            requests[:] = [r for r in requests if r not in leaving]
        if step > 60 and scheduler.num_active == len(requests):
            loads = scheduler.arrays.phase_tokens(shape.cycle)
            imbalance.append(loads.max() / loads.mean())

    simulate(scheduler, device, list(requests), lag=1, disturb=disturb)
    # Five or six long requests in three phases; without moves two share four.
    assert len(imbalance) > 50 and np.mean(imbalance) < 1.3


def test_a_request_that_can_never_fit_is_refused_with_the_figures():
    scheduler = Scheduler(make_shape(slots=1, k=0, pages=3))
    with pytest.raises(ValueError, match=r"20 tokens can need 5 pages, the pool has 3"):
        scheduler.add(make_request(0, 10, 10))


def test_first_come_first_served_even_if_a_later_one_would_fit():
    scheduler = Scheduler(make_shape(slots=3, k=0, pages=12), kv_policy="reserve")
    for i, new in enumerate([30, 30, 2]):
        scheduler.add(make_request(i, 2, new))
    scheduler.plan()
    assert [r.request_id for r in scheduler.slots if r] == [0]
    assert len(scheduler.waiting) == 2


class AllocatorMachine(RuleBasedStateMachine):
    """Any sequence of calls keeps pages apart and counted."""

    def __init__(self):
        super().__init__()
        self.pool = PageAllocator(20)
        self.held = []  # one list of pages per reader

    @rule(count=st.integers(0, 8))
    def allocate(self, count):
        if count > self.pool.num_free:
            with pytest.raises(OutOfPagesError):
                self.pool.allocate(count)
            return
        pages = self.pool.allocate(count)
        assert not set(pages) & {page for held in self.held for page in held}
        self.held.append(pages)

    @rule(which=st.integers(0, 9), count=st.integers(0, 8))
    def share(self, which, count):
        if which < len(self.held):
            pages = self.held[which][:count]
            self.pool.share(pages)
            self.held.append(list(pages))

    @rule(which=st.integers(0, 9))
    def free(self, which):
        if which < len(self.held):
            self.pool.free(self.held.pop(which))

    @rule(page=st.integers(0, 19))
    def free_pages_cannot_be_shared_or_freed(self, page):
        if not self.pool.references(page):
            with pytest.raises(OutOfPagesError):
                self.pool.free([page])
            with pytest.raises(OutOfPagesError):
                self.pool.share([page])

    @invariant()
    def references_are_counted(self):
        pages = [page for held in self.held for page in held]
        assert self.pool.num_free == 20 - len(set(pages))
        assert all(self.pool.references(p) == pages.count(p) for p in range(20))


TestAllocator = AllocatorMachine.TestCase
TestAllocator.settings = settings(max_examples=50, deadline=None)


@given(st.integers(0, 200_000), st.floats(0.001, 1.0), st.integers(0, 500))
@settings(max_examples=200, deadline=None)
def test_budget_is_monotone_and_within_bounds(length, ratio, floor):
    options = dict(ratio=ratio, floor=floor, cap=100_000)
    budget = budget_tokens(length, **options)
    assert 0 <= budget <= length
    assert budget <= budget_tokens(length + 1, **options)
    assert budget >= min(length, floor, 100_000)
