"""Host time per step: planning and committing, without a model or a device.

    python -m experiments.host_cost --output experiments/results/host_cost.json

Drives the scheduler and the output records with simulated outcomes at a full load and
prints microseconds per step, of this thread's processor time. A device step takes 2 to
10 ms. Then the loop of every lag, with dispatches and device steps that only take time:
milliseconds from step to step. A minute on two cores.
"""

from __future__ import annotations

import sys
import time
from collections import deque

import numpy as np
from absl import flags

from experiments import launch, record
from sparsespec_jax import SamplingParams, SpeculationConfig, plan
from sparsespec_jax.host.dispatcher import Dispatcher
from sparsespec_jax.host.metrics import RequestMetrics
from sparsespec_jax.host.outputs import Output, Outputs
from sparsespec_jax.host.request import Request, token_array
from sparsespec_jax.host.scheduler import Scheduler
from sparsespec_jax.host.text import OutputText
from sparsespec_jax.plan import NOT_SEED, StepOutcome, StepShape

_REQUESTS = flags.DEFINE_list("num_requests", ["256", "1024"], "Loads to time.")
_CONTEXT = flags.DEFINE_integer(
    "context", 16_384, "Tokens of each request.", lower_bound=1
)
_STEPS = flags.DEFINE_integer("num_steps", 500, "Steps timed.", lower_bound=1)
_DISPATCH_MS = flags.DEFINE_float(
    "dispatch_ms", 2.0, "Time of a dispatch, without the GIL.", lower_bound=0
)
_DEVICE_MS = flags.DEFINE_float(
    "device_ms", 1.5, "Time of a step on the device.", lower_bound=0
)
_COMMIT = flags.DEFINE_string("commit", None, "Commit to record if git cannot say.")
_OUTPUT = flags.DEFINE_string("output", None, "Results file; default: print only.")

_NUM_DRAFTS, _PAGE_SIZE, _NEW_TOKENS = 8, 64, 8192


def make_shape(num_slots, context):
    """StepShape of the paper's k and budget with pages for every slot."""
    table = plan.pages_for(context + _NEW_TOKENS + _NUM_DRAFTS, _PAGE_SIZE)
    budget = (context + _NEW_TOKENS) // 20
    draft = plan.pages_for(budget + 2 * _NUM_DRAFTS + 2, _PAGE_SIZE)
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
        slot_params=plan.slot_params(sampling, 0, limit, frozenset(), speculation),
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
    accepted = np.where(is_seed, NOT_SEED, rng.integers(0, rows, lanes))
    count = np.where(is_seed, 1, accepted + 1)
    count[len(planned.requests) :] = 0
    packed = np.zeros((lanes, plan.OUTCOME_HEADER + 2 * rows), np.int32)
    packed[:, plan.NUM_EMITTED], packed[:, plan.NUM_ACCEPTED] = count, accepted
    return packed


def full_load(num_requests, context):
    """(Scheduler, Outputs) with a request for every slot; steps until all decode."""
    shape = make_shape(num_requests, context)
    scheduler = Scheduler(shape)
    outputs = Outputs(
        scheduler,
        max_budget=shape.max_budget,
        max_draft_tokens=_NUM_DRAFTS,
        with_acceptance=True,
    )
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
        outputs.commit(planned, outcome, 0, [], None)
        times["commit"].append(time.thread_time() - start)
    lanes = scheduler.shape.verify_lanes
    row = {"num_requests": num_requests, "verify_lanes": lanes}
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
            outputs.commit(planned, outcome, 0, [], None)
    return 1e3 * (time.perf_counter() - start) / num_steps


def main():
    """Time every load and print a line each."""
    with launch.checking():
        counts = list(map(int, _REQUESTS.value))
        if not counts or min(counts) < 1:
            raise ValueError("--num_requests takes numbers of at least 1")
        for count in counts:
            make_shape(count, _CONTEXT.value)
    rows = []
    for count in counts:
        rows.append(measure(count, _CONTEXT.value, _STEPS.value))
        seconds = 1e-3 * _DISPATCH_MS.value, 1e-3 * _DEVICE_MS.value
        rows[-1]["loop_ms_by_lag"] = [
            measure_loop(count, _CONTEXT.value, _STEPS.value, lag, *seconds)
            for lag in (0, 1, 2)
        ]
        print(rows[-1], flush=True)
    if _OUTPUT.value:
        own_flags = flags.FLAGS.get_key_flags_for_module(sys.modules[__name__])
        header = record.results_header(own_flags, commit=_COMMIT.value)
        record.write_results(_OUTPUT.value, header | {"rows": rows})


if __name__ == "__main__":
    launch.run(main)
