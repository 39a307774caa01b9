"""The host loop: plan, dispatch, read the outcome `lag` steps later, commit.

This file alone holds both the device state and the request records.
"""

import dataclasses
import time
from collections import deque

import jax

from sparsespec_jax import plan as plan_lib
from sparsespec_jax import sizes
from sparsespec_jax.config import (
    MAX_STOP_TOKEN_IDS,
    EngineConfig,
    SamplingParams,
    SpeculationConfig,
)
from sparsespec_jax.metrics import DecodeStats, RequestMetrics
from sparsespec_jax.plan import StepOutcome
from sparsespec_jax.results import DecodeResult, StreamEvent
from sparsespec_jax.scheduler import Request, Scheduler
from sparsespec_jax.selection import resolve_policy
from sparsespec_jax.state import new_state, pool_bytes_per_page
from sparsespec_jax.step import make_step, step_options
from sparsespec_jax.text import OutputText, encode_prompt


@dataclasses.dataclass(eq=False)
class _Output:
    """The growing output of one request."""

    request: Request
    sampling: SamplingParams
    prompt_index: int
    sample_index: int
    text: OutputText
    stop_ids: frozenset
    metrics: RequestMetrics
    submitted_s: float
    logprobs: list = dataclasses.field(default_factory=list)
    last_start: int = 0  # committed length at the last verification read
    last_tail: int = 0  # rows that verification left behind the selected ones
    given_text: int = 0  # characters of the text that a stream has seen


class Engine:
    """Continuous batching of speculative (or, with k = 0, plain) decoding.

    Add requests at any time, call `step()` while `has_work`; finished requests come
    back as DecodeResult. All arrays are allocated on construction.

    Raises (on construction):
      ValueError: options that do not fit together, the model or the memory.
    """

    def __init__(self, model, *, speculation=None, engine=None):
        self.model = model
        self.params = model.params
        self.params_version = 0
        self.speculation = speculation or SpeculationConfig()
        self.config = engine or EngineConfig()
        self.impl = sizes.resolve_impl(self.config.impl)
        self.policy = resolve_policy(self.speculation.policy)
        self.max_length = sizes.resolve_max_length(model, self.config)
        sizes.check_vocabulary(model.config, self.speculation)
        self.shape = sizes.make_shape(self.speculation, self.config, self.max_length)
        kv_dtype = self.params["embed"]["weight"].dtype
        sizes.check_memory(model.config, self.shape, kv_dtype)
        ratio_test = self.speculation.acceptor == "ratio_test"
        self._state = new_state(
            model.config,
            self.shape,
            kv_dtype=kv_dtype,
            draft_top_m=self.speculation.draft_top_m if ratio_test else 0,
            fixed_counts=self.policy.fixed_counts,
        )
        self.kv_bytes_per_token = pool_bytes_per_page(model.config, 1, kv_dtype)
        self._scheduler = Scheduler(self.shape)
        self._outputs = {}  # request id -> _Output, until finished
        self._in_flight = deque()  # (planned verifies, device outcome)
        self._next_id = 0
        self._filters = False
        self.num_steps = 0
        self.finished_metrics = []

    # -- requests ---------------------------------------------------------------

    @property
    def has_work(self):
        """True while a request is unfinished."""
        return bool(self._outputs)

    @property
    def is_prefilling(self):
        """True while a request has emitted nothing."""
        requests = (output.request for output in self._outputs.values())
        return any(len(r.tokens) == r.num_prompt for r in requests)

    @property
    def max_new_tokens(self):
        """Tokens that the unfinished requests can still emit."""
        requests = (output.request for output in self._outputs.values())
        return sum(r.limit - len(r.tokens) for r in requests)

    def check_request(self, prompt, sampling):
        """Token ids of `prompt`; ValueError if the request could never be served."""
        tokens = encode_prompt(
            prompt, self.model.tokenizer, self.model.config.vocab_size
        )
        total = len(tokens) + sampling.max_tokens
        if total > self.max_length:
            raise ValueError(
                f"a prompt of {len(tokens)} tokens and max_tokens={sampling.max_tokens}"
                f" make {total}, max_length is {self.max_length}: shorten one of them"
                + ("" if total > self.model.config.max_length else " or raise it")
            )
        if sampling.stop and self.model.tokenizer is None:
            raise ValueError("stop strings need a tokenizer; use stop_token_ids")
        stops = plan_lib.stop_ids(self.model.config.eos_ids, sampling)
        if len(stops) > MAX_STOP_TOKEN_IDS:
            raise ValueError(
                f"at most {MAX_STOP_TOKEN_IDS} stop token ids, EOS included, are "
                f"supported, got {sorted(stops)}"
            )
        self._scheduler.check(self._request(tokens, sampling))
        return tokens

    def add_request(self, prompt, sampling=None, *, prompt_index=None):
        """Queue a prompt; returns its request id (a list of ids if n > 1).

        Raises:
          ValueError: as `check_request`; nothing is queued then.
        """
        sampling = sampling or SamplingParams()
        tokens = self.check_request(prompt, sampling)
        ids = [
            self._add_sample(tokens, sampling, prompt_index, sample)
            for sample in range(sampling.n)
        ]
        return ids[0] if sampling.n == 1 else ids

    def _add_sample(self, tokens, sampling, prompt_index, sample):
        request = self._request(tokens, sampling, sample)
        request_id, self._next_id = self._next_id, self._next_id + 1
        self._scheduler.add(request)
        self._filters |= sampling.filters
        self._outputs[request_id] = _Output(
            request=request,
            sampling=sampling,
            prompt_index=request_id if prompt_index is None else prompt_index,
            sample_index=sample,
            text=OutputText(self.model.tokenizer, sampling.stop),
            stop_ids=plan_lib.stop_ids(self.model.config.eos_ids, sampling),
            metrics=RequestMetrics(
                max_draft_tokens=self.speculation.num_draft_tokens,
                num_prompt_tokens=len(tokens),
            ),
            submitted_s=time.perf_counter(),
        )
        return request_id

    def _request(self, tokens, sampling, sample=0):
        limit = len(tokens) + sampling.max_tokens
        return Request(
            request_id=self._next_id,
            tokens=list(tokens),
            num_prompt=len(tokens),
            limit=limit,
            budget_ratio=self.speculation.budget_ratio,
            min_budget=self.speculation.min_budget,
            slot_params=plan_lib.slot_params(
                sampling,
                sample,
                limit,
                plan_lib.stop_ids(self.model.config.eos_ids, sampling),
                self.speculation,
            ),
        )

    def abort(self, request_id):
        """End a request now; returns its DecodeResult so far ("cancelled").

        Raises:
          KeyError: no unfinished request has this id.
        """
        if request_id not in self._outputs:
            raise KeyError(f"request {request_id} is unknown or finished")
        return self._finish(self._outputs[request_id], "cancelled", None)

    def set_budget(self, *, budget_ratio, min_budget):
        """Change the draft budget of requests added from now on; compiles nothing.

        Raises:
          ValueError: the budget could exceed what the engine was built for.
        """
        new = dataclasses.replace(
            self.speculation, budget_ratio=budget_ratio, min_budget=min_budget
        )
        largest = sizes.largest_budget(new, self.max_length)
        if largest > self.shape.max_budget:
            raise ValueError(
                f"budget_ratio={budget_ratio} and min_budget={min_budget} can select "
                f"{largest} tokens, the engine was built for {self.shape.max_budget}"
            )
        self.speculation = new

    # -- the loop ---------------------------------------------------------------

    def step(self):
        """Run one step; returns the DecodeResults of requests that finished."""
        return self.step_with_events()[0]

    def step_with_events(self):
        """Run one step; returns (finished DecodeResults, StreamEvents)."""
        results, events = [], []
        plan, planned = self._scheduler.plan()
        if plan is not None:
            self._dispatch(plan, planned)
        # With nothing left to plan, read what is still in flight.
        keep = self.config.lag if plan is not None else 0
        while len(self._in_flight) > keep:
            self._read_outcome(results, events)
        return results, events

    def warm_up(self, *, filters=False):
        """Compile both variants of the step, so that nothing compiles afterwards.

        `filters` says whether requests to come use top-k, top-p or min-p.
        """
        self._filters |= filters
        for prefill in (False, True):
            plan = self.shape.new_plan(prefill=prefill)
            self._run(plan).block_until_ready()

    def _dispatch(self, plan, planned):
        outcome = self._run(plan)
        outcome.copy_to_host_async()
        self._in_flight.append((planned, outcome))
        self.num_steps += 1

    def _run(self, plan):
        buffer = jax.device_put(plan.buffer)
        self._state, outcome = self._step(self._filters)(
            self.params, self._state, buffer, prefill=plan.prefill
        )
        return outcome

    def _step(self, filters):
        return make_step(
            self.model.config,
            self.shape,
            policy=self.policy,
            options=step_options(self.speculation),
            filters=filters,
            impl=self.impl,
        )

    @property
    def num_compilations(self):
        """Variants of the step compiled for options like these, in this process."""
        return sum(self._step(filters)._cache_size() for filters in (False, True))

    def _read_outcome(self, results, events):
        planned, packed = self._in_flight.popleft()
        outcome = StepOutcome.from_packed(packed, self.shape.num_queries)
        for verify in planned:
            verify.request.verifies_in_flight -= 1
            output = self._outputs.get(verify.request.request_id)
            if output is None or outcome.num_emitted[verify.lane] == 0:
                continue  # finished or aborted while this step was in flight
            event, result = self._commit(output, verify, outcome)
            events.append(event)
            if result is not None:
                results.append(result)

    def _commit(self, output, verify, outcome):
        """Append a verification's tokens; returns (StreamEvent, result or None)."""
        lane, request = verify.lane, output.request
        self._record(output, verify, int(outcome.num_accepted[lane]))
        count = int(outcome.num_emitted[lane])
        new_tokens, reason, stop = [], None, None
        for i in range(count):
            token = int(outcome.tokens[lane, i])
            new_tokens.append(token)
            request.tokens.append(token)
            output.logprobs.append(float(outcome.logprobs[lane, i]))
            if token in output.stop_ids:
                reason, stop = "stop", token
            elif output.text.push(token):
                reason, stop = "stop", output.text.stop_string
            elif len(request.tokens) >= request.limit:
                reason = "length"
            if reason:
                break
        result = self._finish(output, reason, stop) if reason else None
        text = output.text.text
        event = StreamEvent(
            request.request_id, tuple(new_tokens), text[output.given_text :], reason
        )
        output.given_text = len(text)
        return event, result

    def _record(self, output, verify, num_accepted):
        """Count acceptance and KV traffic of one verification."""
        request, metrics = output.request, output.metrics
        reads = metrics.kv_tokens_read
        if num_accepted == plan_lib.NOT_SEED:  # a seed verify
            start = request.num_prompt - verify.num_drafts - 1
            metrics.time_to_first_token_s = time.perf_counter() - output.submitted_s
            reads.prefill += start * (start + 1) // 2 + request.num_prompt
            tail = verify.num_drafts + 1
        else:
            start, drafts = request.committed, verify.num_drafts
            metrics.record_verification(num_accepted=num_accepted, num_drafted=drafts)
            cached = self._scheduler.selected_tokens(request, output.last_start)
            cached += output.last_tail
            reads.draft += drafts * cached + drafts * (drafts + 1) // 2
            reads.verify += start + drafts + 1
            tail = num_accepted + 1
        reads.gather += self._scheduler.selected_tokens(request, start)
        output.last_start, output.last_tail = start, tail

    def _finish(self, output, reason, stop_reason):
        request = output.request
        self._scheduler.release(request)
        del self._outputs[request.request_id]
        new = request.tokens[request.num_prompt :]
        output.metrics.finish(num_output_tokens=len(new))
        output.metrics.total_time_s = time.perf_counter() - output.submitted_s
        self.finished_metrics.append(output.metrics)
        return DecodeResult(
            request_id=request.request_id,
            prompt_index=output.prompt_index,
            sample_index=output.sample_index,
            prompt_token_ids=tuple(request.tokens[: request.num_prompt]),
            token_ids=tuple(new),
            text=output.text.finish(),
            logprobs=tuple(output.logprobs),
            finish_reason=reason,
            stop_reason=stop_reason,
            metrics=output.metrics,
        )

    def stats(self, wall_time_s):
        """Totals over the finished requests."""
        return DecodeStats(
            requests=tuple(self.finished_metrics),
            num_slots=self.config.num_slots,
            num_steps=self.num_steps,
            wall_time_s=wall_time_s,
            kv_bytes_per_token=self.kv_bytes_per_token,
            weight_bytes=sizes.weight_bytes(self.model),
            forced_acceptance=self.speculation.forced_acceptance,
        )
