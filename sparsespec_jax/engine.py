"""The host loop: plan, dispatch, read the outcome `lag` steps later, commit."""

import contextlib
import dataclasses
import weakref
from collections import deque

from sparsespec_jax import sizes
from sparsespec_jax.config import EngineConfig, SamplingParams, SpeculationConfig
from sparsespec_jax.device.state import committed
from sparsespec_jax.device_steps import DeviceSteps
from sparsespec_jax.host.dispatcher import HostClock
from sparsespec_jax.host.intake import (
    check_progress,
    check_prompt,
    make_output,
    make_request,
)
from sparsespec_jax.host.interrupts import Whole
from sparsespec_jax.host.metrics import DecodeStats
from sparsespec_jax.host.outputs import Outputs
from sparsespec_jax.host.scheduler import Scheduler
from sparsespec_jax.models.same_params import check_same_params
from sparsespec_jax.plan import StepOutcome

_CHOOSE_EVERY = 64  # steps between two calls of `choose_num_draft_tokens`


class Engine(contextlib.AbstractContextManager):
    """Continuous batching of speculative (or, with k = 0, plain) decoding.

    Add requests at any time, call `step()` while `has_work`; finished requests come
    back as DecodeResult. All arrays are allocated on construction, and freed by
    `close()`, at the end of a `with` block, or when nobody holds the engine.

    Ctrl-C in the midst of a call takes effect when the engine is whole again: the next
    `step` goes on with the same tokens, and `last_finished` has the results that the
    interrupted call could not return. If something else cut a step short (an error of
    the device, say), what has finished is still handed out and every further step
    raises RuntimeError; `progress` has the tokens of the others for `resume_request`.

    Args:
      model: a Model (see `load_model`).
      speculation: SpeculationConfig; its `num_draft_tokens` is the largest k.
      engine: EngineConfig.
      choose_num_draft_tokens: None, or a function called every 64 steps as
        `f(num_running=, context_tokens=, acceptance=, host_seconds=)` (requests in
        slots, their tokens, share of recent drafts accepted by position: a tuple of k
        floats, NaN where unknown; processor time that the host's busiest thread needed
        per step since the last call) that returns one of `draft_token_choices`.

    Raises (on construction):
      ValueError: options that do not fit together, the model or the memory.
    """

    def __init__(
        self, model, *, speculation=None, engine=None, choose_num_draft_tokens=None
    ):
        self.speculation = speculation or SpeculationConfig()
        self.config = engine or EngineConfig()
        sizes.check_types(model, self.speculation, self.config)
        self.model = model
        self.params = committed(model.params)
        self.params_version = 0
        resolved = sizes.resolve(model, self.speculation, self.config)
        self.impl, self.max_length = resolved.impl, resolved.max_length
        self.policy, self.proposer = resolved.policy, resolved.proposer
        self.shape = resolved.shape
        self.kv_bytes_per_token = resolved.kv_bytes_per_token
        self.device_steps = DeviceSteps(model, resolved, self.speculation, self.config)
        weakref.finalize(self, self.device_steps.close).atexit = False  # it has its own
        self._scheduler = Scheduler(
            self.shape,
            kv_policy=self.config.kv_policy,
            num_host_chunks=resolved.num_host_chunks,
            chunk_pages=self.config.host_chunk_pages,
        )
        self._choose, self._next_choice = choose_num_draft_tokens, 0
        self._host_clock = HostClock(self.device_steps.dispatcher)
        self._outputs = Outputs(
            self._scheduler,
            max_budget=self.shape.max_budget if self.shape.draft_lanes else 0,
            max_draft_tokens=self.shape.num_draft_tokens,
            with_acceptance=choose_num_draft_tokens is not None,
        )
        self._in_flight = deque()  # (PlannedVerifies, future outcome, params version)
        self._whole = Whole()  # while the records and the device change together
        self._finished, self._events = [], []  # of the current call, or the last one
        self._is_handed_out = True
        self._next_id = 0
        self._filters = False
        self.num_steps = 0

    # -- requests ---------------------------------------------------------------

    @property
    def has_work(self):
        """True while a request is unfinished and the engine is open."""
        return len(self._outputs) > 0 and not self.is_closed

    @property
    def is_prefilling(self):
        """True while a request has emitted nothing."""
        return self._outputs.num_silent > 0

    @property
    def max_new_tokens(self):
        """Tokens that the unfinished requests can still emit."""
        return self._outputs.max_new_tokens

    @property
    def num_emitted_tokens(self):
        """Tokens emitted so far, by all requests."""
        return self._outputs.num_emitted

    def check_request(self, prompt, sampling):
        """Token ids of `prompt`; ValueError if the request could never be served."""
        tokens = check_prompt(self.model, prompt, sampling, self.max_length)
        self._scheduler.check(self._request(tokens, sampling))
        return tokens

    def add_request(
        self, prompt, sampling=None, *, prompt_index=None, expected_tokens=None
    ):
        """Queue a prompt; returns its request id (a list of ids if n > 1).

        The samples of one prompt share its pages. `expected_tokens` is how many tokens
        it will emit, which `kv_policy="oracle"` plans with.

        Raises:
          ValueError: as `check_request`; nothing is queued then.
        """
        self._require_open()
        sampling = sampling or SamplingParams()
        tokens = self.check_request(prompt, sampling)
        with self._whole:
            return self._add_samples(tokens, sampling, prompt_index, expected_tokens)

    def _add_samples(self, tokens, sampling, prompt_index, expected_tokens):
        group = self._next_id if sampling.n > 1 else None
        prompt_index = self._next_id if prompt_index is None else prompt_index
        ids = []
        for sample in range(sampling.n):
            request = self._request(tokens, sampling, sample)
            request.prompt_group = group
            if expected_tokens is not None:
                request.expected_length = len(tokens) + expected_tokens
            self._add(request, sampling, prompt_index, sample)
            ids.append(request.request_id)
        return ids[0] if sampling.n == 1 else ids

    def resume_request(self, prompt, sampling, progress, *, prompt_index=None):
        """Queue a request that an earlier engine began; returns its request id.

        `progress` is its `RequestProgress`; the rest of the text is the one it would
        have had.

        Raises:
          ValueError: as `check_request`, or more tokens than `max_tokens`.
        """
        self._require_open()
        tokens = self.check_request(prompt, sampling)
        check_progress(progress, sampling)
        with self._whole:
            request = self._request(tokens, sampling, progress.sample_index)
            request.tokens.extend(progress.token_ids)
            output = self._add(request, sampling, prompt_index, progress.sample_index)
            self._outputs.resume(output, progress)
        return request.request_id

    def _add(self, request, sampling, prompt_index, sample):
        """Queue a request under the next id; returns its Output."""
        request.request_id, self._next_id = self._next_id, self._next_id + 1
        self._scheduler.add(request)
        self._filters |= sampling.filters
        place = dict(prompt_index=prompt_index, sample=sample)
        output = make_output(self.model, request, sampling, self.speculation, **place)
        self._outputs.add(output)
        return output

    def _request(self, tokens, sampling, sample=0):
        new = dict(request_id=self._next_id, sample=sample)
        return make_request(self.model, tokens, sampling, self.speculation, **new)

    def abort(self, request_id):
        """End a request now; returns its DecodeResult so far ("cancelled").

        Raises:
          KeyError: no unfinished request has this id.
        """
        output = self._outputs.get(request_id)
        if output is None:
            raise KeyError(f"request {request_id} is unknown or finished")
        with self._whole:
            return self._outputs.finish(output, "cancelled", None)

    def set_budget(self, *, budget_ratio, min_budget):
        """Change the draft budget of requests added from now on; compiles nothing.

        Raises:
          ValueError: the budget could exceed what the engine was built for.
        """
        new = dataclasses.replace(
            self.speculation, budget_ratio=budget_ratio, min_budget=min_budget
        )
        sizes.check_budget(new, self.max_length, self.shape)
        self.speculation = new

    @property
    def num_draft_tokens(self):
        """The current k."""
        return self._scheduler.shape.num_draft_tokens

    @property
    def draft_token_choices(self):
        """Every k that the engine may run with, ascending."""
        spec = self.speculation
        return tuple(sorted({*spec.draft_token_choices, spec.num_draft_tokens}))

    def set_num_draft_tokens(self, num_draft_tokens):
        """Go on with another k from the next step; changes no token.

        Every running request drops its unverified drafts and waits for its phase of
        the new cycle, at most k steps. After `warm_up` nothing compiles.

        Raises:
          ValueError: not one of `draft_token_choices`.
        """
        if num_draft_tokens not in self.draft_token_choices:
            raise ValueError(
                f"num_draft_tokens must be one of {self.draft_token_choices}, got "
                f"{num_draft_tokens}: name it in draft_token_choices"
            )
        self._scheduler.set_num_draft_tokens(num_draft_tokens)

    def choose_with(self, chooser):
        """Let `chooser` (see the constructor) pick k every few steps from now on."""
        self._choose = chooser
        self._host_clock.per_step(self.num_steps)  # from now on
        self._outputs.with_acceptance = True

    # -- the loop ---------------------------------------------------------------

    def step(self):
        """Run one step; returns the DecodeResults of requests that finished.

        Raises:
          RuntimeError: the engine is closed, or a step before was cut short.
        """
        return self._step(with_events=False)[0]

    def step_with_events(self):
        """Run one step; returns (finished DecodeResults, StreamEvents).

        Decodes text as it comes, which `step` leaves until it is asked for.
        """
        return self._step(with_events=True)

    @property
    def last_finished(self):
        """DecodeResults of the last call: returned, or not if it was interrupted."""
        return tuple(self._finished)

    def _step(self, *, with_events):
        if not self._begin():
            return self._hand_out()
        self._read(self.config.lag, with_events)  # more if the last call was cut short
        if self._choose is not None and self.num_steps >= self._next_choice:
            self._choose_num_draft_tokens()
        with self._whole:
            plan, planned, moves = self._scheduler.plan()
            outcome = self._dispatch(plan, moves)
            if plan is not None:
                self._in_flight.append((planned, outcome, self.params_version))
                self.num_steps += 1
        if plan is None:
            outcome.result()
        self._read(0 if plan is None else self.config.lag, with_events)
        return self._hand_out()

    def _begin(self):
        """Begin a call that hands out results; False if it can only do that."""
        if self._is_handed_out:
            self._finished, self._events, self._is_handed_out = [], [], False
        if self._whole.broken and self._finished:
            return False
        self._require_open()
        return True

    def _hand_out(self):
        self._is_handed_out = True
        return self._finished, self._events

    def _read(self, keep, with_events):
        """Commit the outcomes of all steps but the last `keep`."""
        while len(self._in_flight) > keep:
            planned, packed, version = self._in_flight[0]
            packed = packed.result()
            packed.block_until_ready()  # an interrupt while waiting loses nothing
            with self._whole:
                self._in_flight.popleft()
                outcome = StepOutcome.from_packed(packed, planned.num_queries)
                events = self._events if with_events else None
                self._outputs.commit(planned, outcome, version, self._finished, events)
        if not self.has_work:  # steps under way are of no use: let them end
            self.device_steps.settle()

    def pause(self):
        """Wait for every step under way; returns the results that came with them.

        Nothing is lost and nothing need be restored: the next `step` goes on. After an
        interrupt, the results that the interrupted call did not return are among them.
        """
        if self._begin():
            self._read(0, with_events=False)
        return self._hand_out()[0]

    def close(self):
        """Wait for the step under way and free the pool; unfinished requests are lost.

        More than once is once. `progress` before it has what they emitted.
        """
        self.device_steps.close()

    def __exit__(self, *exc_info):
        self.close()

    @property
    def is_closed(self):
        """True after `close`."""
        return self.device_steps.state is None

    def _require_open(self):
        if self.is_closed:
            raise RuntimeError("this Engine is closed: make a new one")
        if self._whole.broken:
            raise RuntimeError(
                f"a step of this Engine was cut short ({self._whole.broken}) and it "
                "cannot go on: make a new one; progress({}) has the tokens that "
                "resume_request goes on from"
            )

    def update_params(self, params):
        """Decode with other weights of the same shapes from the next step on.

        KV already written stays; results say how many tokens each version gave.

        Raises:
          ValueError: names, shapes or types differ from those in use.
        """
        self._require_open()
        check_same_params(self.params, params)
        self.params = committed(params)
        self.params_version += 1

    def progress(self, known):
        """RequestProgress of unfinished requests that have emitted something new.

        `known` maps request ids to the number of emitted tokens the caller has.
        """
        return self._outputs.progress(known)

    @property
    def context_tokens(self):
        """Tokens of the requests in slots, those in flight at their most."""
        return self._scheduler.context_tokens

    @property
    def kv_usage(self):
        """Load of the KV cache now and what page pressure cost so far: a dict."""
        scheduler = self._scheduler
        return {
            "utilisation": scheduler.kv.utilisation,
            "num_running": scheduler.num_running,
            "num_preempted": scheduler.num_preempted,
            "num_waiting": len(scheduler.waiting),
            **dataclasses.asdict(scheduler.kv.counters),
        }

    def _choose_num_draft_tokens(self):
        self._next_choice = self.num_steps + _CHOOSE_EVERY
        num_draft_tokens = self._choose(
            num_running=self._scheduler.num_running,
            context_tokens=self._scheduler.context_tokens,
            acceptance=self._outputs.acceptance,
            host_seconds=self._host_clock.per_step(self.num_steps),
        )
        self.set_num_draft_tokens(num_draft_tokens)

    def warm_up(self, *, filters=False):
        """Compile every variant of the step, so that nothing compiles afterwards.

        `filters` says whether requests to come use top-k, top-p or min-p.
        """
        self._require_open()
        self._filters |= filters
        plans = [s.new_plan(prefill=p) for s in self._shapes() for p in (False, True)]
        for plan in plans:
            self.run_plan(plan).block_until_ready()
        with self._whole:
            self.device_steps.warm_up_moves(plans)

    def _shapes(self):
        return [self.shape.with_draft_tokens(k) for k in self.draft_token_choices]

    def run_plan(self, plan, moves=()):
        """Dispatch page moves and a step; its packed outcome, not waited for.

        Without a plan (None) there is no step and no outcome.
        """
        with self._whole:
            outcome = self._dispatch(plan, moves)
        return outcome.result()

    def _dispatch(self, plan, moves):
        return self.device_steps.submit(self.params, self._filters, plan, moves)

    @property
    def num_compilations(self):
        """Variants of the step compiled for options like these, in this process."""
        return self.device_steps.num_compilations(self._shapes())

    @property
    def finished_metrics(self):
        """RequestMetrics of the finished requests, in order of their end."""
        return self._outputs.finished_metrics

    def stats(self, wall_time_s):
        """Totals over the finished requests."""
        return DecodeStats(
            requests=tuple(self.finished_metrics),
            num_slots=self.config.num_slots,
            num_steps=self.num_steps,
            wall_time_s=wall_time_s,
            kv_bytes_per_token=self.kv_bytes_per_token,
            weight_bytes=sizes.weight_bytes(self.model),
            kv_usage=self.kv_usage,
            forced_acceptance=self.speculation.forced_acceptance,
        )
