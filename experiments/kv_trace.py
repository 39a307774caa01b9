"""Length traces replayed through the real Scheduler: no model, no device, no jax."""

from __future__ import annotations

import dataclasses
import time

import numpy as np

from sparsespec_jax.host.request import Request, Status, token_array
from sparsespec_jax.host.scheduler import Scheduler
from sparsespec_jax.plan.shape import RESTORE_CHUNKS, StepShape, pages_for
from sparsespec_jax.plan.slot_params import NUM_SLOT_PARAMS


@dataclasses.dataclass(frozen=True, kw_only=True)
class TraceOptions:
    """A load and the pool that serves it.

    One simulated token stands for `scale` tokens: lengths, page size and budget floor
    are divided by it, so pages and their number are those of the full-size load, and
    one simulated cycle stands for `scale` cycles.
    """

    num_requests: int = 100_000
    mean_length: float = 13_000.0  # tokens of an output, lognormal
    std_length: float = 7_600.0
    longest: int = 32_768
    prompt_length: int = 512
    num_slots: int = 256
    num_drafts: int = 8
    accepted: float = 6.16  # mean accepted drafts
    page_size: int = 64
    pool_share: float = 0.75  # of what all slots hold on average
    budget_ratio: float = 0.05
    min_budget: int = 192
    chunk_pages: int = 16
    scale: int = 32
    seed: int = 0


def lengths(options, count):
    """Output tokens of `count` requests, lognormal of the options' moments."""
    variance = np.log1p((options.std_length / options.mean_length) ** 2)
    mean = np.log(options.mean_length) - variance / 2
    rng = np.random.default_rng(options.seed)
    drawn = rng.lognormal(mean, np.sqrt(variance), count)
    return np.clip(drawn, options.scale, options.longest).astype(np.int64)


def make_shape(options):
    """StepShape in simulated tokens, with a pool under pressure."""
    scale, drafts = options.scale, options.num_drafts
    page_size = options.page_size // scale
    if page_size * scale != options.page_size:
        raise ValueError(f"scale must divide page_size {options.page_size}, is {scale}")
    length = (options.prompt_length + options.longest) // scale + 1
    budget = max(options.min_budget // scale, int(options.budget_ratio * length) + 1)
    draft_table = pages_for(budget + 2 * drafts + 1, page_size)
    # Met at a random moment, a request is as long as its length squared over twice it.
    spread = 1 + (options.std_length / options.mean_length) ** 2
    context = options.prompt_length + options.mean_length * spread / 2
    rows = context * (1 + options.budget_ratio) / scale + 2 * drafts + 1
    pool = int(options.pool_share * options.num_slots * rows / page_size)
    return StepShape(
        num_slots=options.num_slots,
        num_draft_tokens=drafts,
        num_pages=pool,
        page_size=page_size,
        table_width=pages_for(length + drafts, page_size),
        draft_table_width=draft_table,
        max_budget=budget,
        prefill_lanes=4,
        prefill_chunk=max(1, options.prompt_length // scale),
        restore_pages=RESTORE_CHUNKS * options.chunk_pages,
    )


def acceptance_law(options):
    """Cumulative law of the rows a cycle commits; every draft has the same odds."""
    low, high = 0.0, 1.0
    for _ in range(50):
        p = (low + high) / 2
        mean = sum(p**i for i in range(1, options.num_drafts + 1))
        low, high = (p, high) if mean < options.accepted else (low, p)
    exact = [high**i * (1 - high) for i in range(options.num_drafts)]
    return np.cumsum(exact)


class Replay:
    """One policy over one trace; `run` returns what it cost."""

    def __init__(self, options, policy):
        self.options, self.policy = options, policy
        self.shape = make_shape(options)
        pages = self.shape.table_width * self.shape.num_slots
        self.scheduler = Scheduler(
            self.shape,
            kv_policy=policy,
            num_host_chunks=pages // options.chunk_pages,
            chunk_pages=options.chunk_pages,
        )
        self._lengths = lengths(options, options.num_requests) // options.scale
        self._law = acceptance_law(options)
        self._rng = np.random.default_rng(options.seed + 1)
        self._next = self._finished = 0
        self.samples = []  # (steps, held, used, max / mean of the phases, running)

    def run(self, *, every=64):
        """Serve all requests; a dict of steady-state means and totals."""
        start, steps, busy = (time.perf_counter(), time.process_time()), 0, 0
        in_flight = None
        scheduler = self.scheduler
        while self._finished < self.options.num_requests:
            self._submit()
            plan, planned, _ = scheduler.plan()
            steps += 1
            busy += plan is not None
            if steps % every == 0:
                self._sample(steps)
            if in_flight is not None:
                self._commit(*in_flight)  # of the step before: a lag of one
            in_flight = (plan, planned) if plan is not None else None
        seconds = time.perf_counter() - start[0]
        cpu_seconds = time.process_time() - start[1]
        summary = self._summary(steps, busy)
        return summary | {"seconds": seconds, "cpu_seconds": cpu_seconds}

    def _submit(self):
        """Keep a short queue: the trace never ends before the slots are full."""
        options = self.options
        prompt = max(1, options.prompt_length // options.scale)
        while len(self.scheduler.waiting) < 8 and self._next < options.num_requests:
            index, self._next = self._next, self._next + 1
            end = prompt + max(1, int(self._lengths[index]))
            request = Request(
                request_id=index,
                tokens=token_array([0]) * prompt,
                num_prompt=prompt,
                # What a server knows: the longest output, not the one to come.
                limit=prompt + options.longest // options.scale,
                slot_params=np.zeros(NUM_SLOT_PARAMS, np.int32),
                budget_ratio=options.budget_ratio,
                min_budget=options.min_budget // options.scale,
                expected_length=end,
            )
            self.scheduler.add(request)

    def _commit(self, plan, planned):
        count = len(planned.requests)
        is_seed = plan.views["seed_counts"][:count] >= 0
        draws = self._rng.random(count)
        committed = np.searchsorted(self._law, draws) + 1
        committed = np.where(is_seed, planned.num_rows, committed)
        emitted = np.where(is_seed, 1, committed).tolist()
        emissions = []
        for request, rows in zip(planned.requests, emitted, strict=True):
            if request.status is not Status.FINISHED:
                left = request.expected_length - len(request.tokens)
                emissions.append((request, [0] * min(rows, left), rows >= left))
        self.scheduler.commit(planned, committed, emissions)
        self._finished += sum(is_over for _, _, is_over in emissions)

    def _sample(self, steps):
        scheduler = self.scheduler
        phases = scheduler.arrays.phase_tokens(self.shape.cycle)
        whole = ~scheduler.arrays.is_suspended
        running = (scheduler.kv.resident + scheduler.kv.num_draft)[whole].sum()
        mean = phases.mean()
        self.samples.append(
            (
                steps,
                scheduler.kv.utilisation,
                running / self.shape.num_pages,
                phases.max() / mean if mean else np.nan,
                scheduler.num_running,
            )
        )

    def _summary(self, steps, busy):
        """Means over the middle of the run, where slots neither fill nor drain."""
        samples = np.array(self.samples)
        middle = samples[len(samples) // 10 : -max(1, len(samples) // 10)]
        counters = self.scheduler.kv.counters
        tokens = int(self._lengths.sum())
        thin = middle[:: max(1, len(middle) // 100)]
        return {
            "policy": self.policy,
            "num_requests": self._finished,
            "steps": steps,
            "busy_share": busy / steps,
            "tokens_per_step": tokens / steps,
            "utilisation": float(middle[:, 1].mean()),
            "utilisation_of_running": float(middle[:, 2].mean()),
            "verify_imbalance": float(np.nanmean(middle[:, 3])),
            "verify_imbalance_p95": float(np.nanpercentile(middle[:, 3], 95)),
            "mean_running": float(middle[:, 4].mean()),
            "missed_drafts": self.scheduler.num_missed_drafts,
            "preemptions": counters.preemptions,
            "spilled_pages": counters.spilled_pages,
            "restored_pages": counters.restored_pages,
            "spilled_pages_per_1000_tokens": 1e3
            * counters.spilled_pages
            / (tokens * self.options.scale),
            "recompute_ratio": counters.recomputed_tokens / tokens,
            "series": {
                "step": thin[:, 0].astype(int).tolist(),
                "utilisation": thin[:, 1].round(4).tolist(),
                "verify_imbalance": thin[:, 3].round(3).tolist(),
                "num_running": thin[:, 4].astype(int).tolist(),
            },
        }
