"""Host time per step: planning and committing, without a model or a device.

    python -m experiments.host_cost --output experiments/results/host_cost

Drives the scheduler and the output records with simulated outcomes at a full load and
prints microseconds per step, of this thread's processor time. A device step takes 2 to
10 ms. Then the loop of every lag, with dispatches and device steps that only take time:
milliseconds from step to step. A minute on two cores.
"""

from __future__ import annotations

import dataclasses
import time
from collections import deque

import numpy as np

from experiments import drawing, experiment
from experiments.experiment import Experiment
from experiments.options import Options, option
from sparsespec_jax import SamplingParams, SpeculationConfig
from sparsespec_jax.host.commit import commit
from sparsespec_jax.host.dispatcher import Dispatcher
from sparsespec_jax.host.metrics import RequestMetrics
from sparsespec_jax.host.outputs import Output, Outputs
from sparsespec_jax.host.request import Request, token_array
from sparsespec_jax.host.scheduler import Scheduler
from sparsespec_jax.host.text import OutputText
from sparsespec_jax.plan.outcome import SEED, StepOutcome
from sparsespec_jax.plan.shape import StepShape, pages_for
from sparsespec_jax.plan.slot_params import slot_params


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostCostConfig(Options):
    """What is timed."""

    num_requests: tuple[int, ...] = option((256, 1024), "Loads to time.", at_least=1)
    context: int = option(16_384, "Tokens of each request.", at_least=1)
    num_steps: int = option(500, "Steps timed.", at_least=1)
    dispatch_ms: float = option(2.0, "Time of a dispatch, without the GIL.", at_least=0)
    device_ms: float = option(1.5, "Time of a step on the device.", at_least=0)


_NUM_DRAFTS, _PAGE_SIZE, _NEW_TOKENS = 8, 64, 8192


def make_shape(num_slots, context):
    """StepShape of the paper's k and budget with pages for every slot."""
    table = pages_for(context + _NEW_TOKENS + _NUM_DRAFTS, _PAGE_SIZE)
    budget = (context + _NEW_TOKENS) // 20
    draft = pages_for(budget + 2 * _NUM_DRAFTS + 2, _PAGE_SIZE)
    return StepShape(
        num_slots=num_slots,
        num_draft_tokens=_NUM_DRAFTS,
        num_pages=num_slots * (table + draft),
        page_size=_PAGE_SIZE,
        table_width=table,
        draft_table_width=draft,
        max_budget=budget,
        prefill_lanes=1,
        prefill_chunk=context,
    )


def make_output(request_id, context):
    """An Output of a request with `context` prompt tokens."""
    limit = context + _NEW_TOKENS
    sampling, speculation = SamplingParams(), SpeculationConfig()
    request = Request(
        request_id=request_id,
        tokens=token_array([1]) * context,
        num_prompt=context,
        limit=limit,
        slot_params=slot_params(sampling, 0, limit, frozenset(), speculation),
        budget_ratio=speculation.budget_ratio,
        min_budget=speculation.min_budget,
    )
    return Output(
        request=request,
        sampling=sampling,
        prompt_index=request_id,
        sample_index=0,
        text=OutputText(None, ()),
        stop_ids=frozenset(),
        metrics=RequestMetrics(max_draft_tokens=_NUM_DRAFTS),
        submitted_s=0.0,
    )


def random_outcome(planned, step_plan, rng):
    """What a device would say: 1 to 9 tokens of every verify lane."""
    lanes, rows = step_plan.shape.verify_lanes, step_plan.shape.num_queries
    is_seed = step_plan.views["seed_counts"] >= 0
    accepted = np.where(is_seed, SEED, rng.integers(0, rows, lanes))
    count = np.where(is_seed, 1, accepted + 1)
    count[len(planned.requests) :] = 0
    return StepOutcome(
        num_emitted=count.astype(np.int32),
        num_accepted=accepted.astype(np.int32),
        is_done=np.zeros(lanes, bool),
        tokens=np.zeros((lanes, rows), np.int32),
        logprobs=np.zeros((lanes, rows), np.float32),
        cascade=None,
    ).pack(np, lambda floats: floats.view(np.int32))


def full_load(num_requests, context):
    """(Scheduler, Outputs) with a request for every slot; steps until all decode."""
    shape = make_shape(num_requests, context)
    scheduler = Scheduler(shape)
    outputs = Outputs(shape, with_acceptance=True)
    for i in range(num_requests):
        output = make_output(i, context)
        outputs.add(output)
        scheduler.add(output.request)
    return scheduler, outputs, num_requests + 100  # a prompt a step, a few cycles


def measure(num_requests, context, num_steps):
    """Mean and 95th percentile microseconds of plan and commit at a full load."""
    scheduler, outputs, warm_up = full_load(num_requests, context)
    rng = np.random.default_rng(0)
    times = {"plan": [], "commit": []}
    for _ in range(warm_up + num_steps):
        start = time.thread_time()
        step_plan, planned, _ = scheduler.plan()
        times["plan"].append(time.thread_time() - start)
        packed = random_outcome(planned, step_plan, rng)
        start = time.thread_time()
        outcome = StepOutcome.from_packed(packed, planned.num_queries)
        commit(scheduler, outputs, planned, outcome, 0, [])
        times["commit"].append(time.thread_time() - start)
    lanes = scheduler.shape.verify_lanes
    row = {"verify_lanes": lanes}
    for name, values in times.items():
        micros = 1e6 * np.array(values[warm_up:])
        row[f"{name}_us"] = round(float(micros.mean()), 1)
        row[f"{name}_us_p95"] = round(float(np.percentile(micros, 95)), 1)
    return row


def measure_loop(num_requests, context, num_steps, lag, dispatch_s, device_s):
    """Milliseconds from step to step of a loop like the engine's, without a device."""
    scheduler, outputs, warm_up = full_load(num_requests, context)
    rng, dispatcher = np.random.default_rng(0), Dispatcher(threaded=lag == 2)
    in_flight, device_free = deque(), [0.0]

    def dispatch(planned, step_plan):
        time.sleep(dispatch_s)
        device_free[0] = max(device_free[0], time.perf_counter()) + device_s
        return device_free[0], random_outcome(planned, step_plan, rng)

    for step in range(warm_up + num_steps):
        if step == warm_up:
            start = time.perf_counter()
        step_plan, planned, _ = scheduler.plan()
        future = dispatcher.submit(dispatch, planned, step_plan)
        in_flight.append((planned, future))
        while len(in_flight) > lag:
            planned, future = in_flight.popleft()
            ready, packed = future.result()
            time.sleep(max(0.0, ready - time.perf_counter()))
            outcome = StepOutcome.from_packed(packed, planned.num_queries)
            commit(scheduler, outputs, planned, outcome, 0, [])
    return 1e3 * (time.perf_counter() - start) / num_steps


class HostCost(Experiment):
    """Host time of every load."""

    claim = "the host plans and commits a step in less time than a device step takes"
    Config = HostCostConfig
    SMOKE = dict(num_requests=(2,), context=50, num_steps=4, dispatch_ms=1.0)

    def __init__(self, config, **how):
        super().__init__(config, **how)
        for count in config.num_requests:
            make_shape(count, config.context)

    def rows(self):
        """One for each load."""
        return [{"num_requests": count} for count in self.config.num_requests]

    def measure(self, row):
        """Microseconds of plan and commit; milliseconds from step to step."""
        config, count = self.config, row["num_requests"]
        found = measure(count, config.context, config.num_steps)
        found["loop_ms_by_lag"] = [
            measure_loop(
                count,
                config.context,
                config.num_steps,
                lag,
                1e-3 * config.dispatch_ms,
                1e-3 * config.device_ms,
            )
            for lag in (0, 1, 2)
        ]
        return found

    @staticmethod
    def figure(axes, summary, records):
        """Microseconds of a step by load."""
        del summary
        lines = {
            label: [(record["num_requests"], record[name]) for record in records]
            for name, label in (("plan_us", "planning"), ("commit_us", "committing"))
        }
        drawing.curves(axes, lines, x="requests", y="microseconds a step")


if __name__ == "__main__":
    experiment.run(HostCost)
