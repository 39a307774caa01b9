"""The host loop: plan, dispatch, read the outcome `lag` steps later, commit."""

import contextlib
import dataclasses
import weakref
from collections import Counter, deque

from sparsespec_jax import sizes
from sparsespec_jax.config import EngineConfig, SpeculationConfig
from sparsespec_jax.device_steps import DeviceSteps, check_exact
from sparsespec_jax.host import intake
from sparsespec_jax.host.commit import commit
from sparsespec_jax.host.dispatcher import HostClock
from sparsespec_jax.host.edits import EditLoads
from sparsespec_jax.host.interrupts import Whole
from sparsespec_jax.host.metrics import DecodeStats
from sparsespec_jax.host.outputs import Outputs
from sparsespec_jax.host.scheduler import Scheduler
from sparsespec_jax.models.same_params import check_same_params
from sparsespec_jax.plan.buffer import StepPlan
from sparsespec_jax.plan.outcome import StepOutcome
from sparsespec_jax.tuning.calibrate import start_choosing

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
      speculation: SpeculationConfig; its `num_draft_tokens` is the largest k. With
        "auto", steps are timed before the first one, or read from the user's cache.
      engine: EngineConfig.
      choose_num_draft_tokens: None, or what returns one of `draft_token_choices`,
        called every 64 steps as `cost_model.Chooser` is.

    Raises (on construction):
      ValueError: options that do not fit together, the model or the memory.
      RuntimeError: with numerics="exact", a part of the model whose rows depend on
        how many there are on this device, by name.
    """

    def __init__(
        self, model, *, speculation=None, engine=None, choose_num_draft_tokens=None
    ):
        speculation = speculation or SpeculationConfig()
        self.config = engine or EngineConfig()
        sizes.check_types(model, speculation, self.config)
        self.model, self.params_version = model, 0
        resolved = sizes.resolve(model, speculation, self.config)
        self.speculation, self.shape = resolved.speculation, resolved.shape
        self.impl, self.max_length = resolved.impl, resolved.max_length
        self.policy, self.proposer = resolved.policy, resolved.proposer
        self.kv_bytes_per_token = resolved.kv_bytes_per_token
        if resolved.exact:
            shapes = [self.shape.with_draft_tokens(k) for k in self.draft_token_choices]
            check_exact(model, shapes, self.impl, resolved.mesh)
        self.device_steps = DeviceSteps(model, resolved, self.speculation, self.config)
        self.params = self.device_steps.params_of(model.params)
        weakref.finalize(self, self.device_steps.close).atexit = False  # it has its own
        self._scheduler = Scheduler(
            self.shape, kv_policy=self.config.kv_policy, exact=resolved.exact,
            num_host_chunks=resolved.num_host_chunks,
            chunk_pages=self.config.host_chunk_pages,
        )  # fmt: skip
        self._choose, self._next_choice = choose_num_draft_tokens, 0
        self._measures = speculation.chooses_k and choose_num_draft_tokens is None
        self._host_clock = HostClock(self.device_steps.dispatcher)
        is_choosing = choose_num_draft_tokens is not None
        self._outputs = Outputs(self.shape, with_acceptance=is_choosing)
        self._in_flight = deque()  # (PlannedVerifies, future outcome, params version)
        self._edits = EditLoads(model.config.vocab_size)
        self._whole = Whole()  # while the records and the device change together
        self._finished, self._events = [], []  # of the current call, or the last one
        self._is_handed_out = True
        self._next_id, self.num_steps, self._filters = 0, 0, False
        self._steps_of = Counter()  # by k

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

    def add_request(
        self, prompt, sampling=None, *, chat_template_kwargs=None, prompt_index=None,
        expected_tokens=None,
    ):  # fmt: skip
        """Queue a prompt; returns its request id (a list of ids if n > 1).

        The samples of one prompt share its pages. `chat_template_kwargs` as `decode`
        takes them, a dict. `expected_tokens` is how many tokens it will emit, which
        `kv_policy="oracle"` plans with.

        Raises:
          ValueError: what is wrong with the prompt or its SamplingParams, or that the
            request could never be served; nothing is queued then.
        """
        prepared = intake.prepare(self.model, prompt, sampling, chat_template_kwargs)
        more = dict(prompt_index=prompt_index, expected_tokens=expected_tokens)
        return self.submit(prepared, **more)

    def resume_request(
        self, prompt, sampling, progress, *, chat_template_kwargs=None,
        prompt_index=None,
    ):  # fmt: skip
        """Queue a request that an earlier engine began; returns its request id.

        `progress` is its `RequestProgress`; the rest of the text is the one it would
        have had.

        Raises:
          ValueError: as `add_request`, or more tokens than `max_tokens`.
        """
        prepared = intake.prepare(self.model, prompt, sampling, chat_template_kwargs)
        return self.submit(prepared, prompt_index=prompt_index, progress=progress)

    def submit(
        self, prepared, *, prompt_index=None, expected_tokens=None, progress=None,
        scored=None,
    ):  # fmt: skip
        """Queue a PreparedPrompt: a new request, or with `progress` one that goes on.

        Arguments, results and errors as those of `add_request` and `resume_request`.
        With `scored`, token ids of a whole output of `max_tokens` tokens, nothing is
        decoded: the result has these tokens and their log-probabilities (see `score`).
        """
        self._require_open()
        samples, emitted, told = intake.samples_to_queue(
            prepared, self.model, self.max_length, self.shape, progress, scored
        )
        self._prepare_steps(prepared, is_scored=scored is not None)
        first = self._next_id
        prompt_index = first if prompt_index is None else prompt_index
        with self._whole:
            for sample in samples:
                request = intake.make_request(
                    prepared, self.speculation, self._next_id, sample=sample,
                    emitted=emitted, group=first if len(samples) > 1 else None,
                    expected=expected_tokens, is_scored=scored is not None, told=told,
                )  # fmt: skip
                self._scheduler.add(request)
                self._next_id += 1
                output = intake.make_output(
                    self.model, request, prepared, self.speculation,
                    prompt_index=prompt_index, sample=sample,
                )  # fmt: skip
                self._outputs.add(output, progress)
        return first if len(samples) == 1 else list(range(first, self._next_id))

    def _prepare_steps(self, prepared, *, is_scored=False):
        """Let the steps to come do what a request asks for beside the plain law."""
        steps = self.device_steps
        extras = steps.extras.joined(intake.extras_of(prepared, is_scored=is_scored))
        sizes.check_edits(self.model, self.shape, steps.extras, extras)
        with self._whole:
            steps.use(extras)
        self._filters |= prepared.sampling.filters

    def abort(self, request_id):
        """End a request now; returns its DecodeResult so far ("cancelled").

        Raises:
          KeyError: no unfinished request has this id.
        """
        if (output := self._outputs.get(request_id)) is None:
            raise KeyError(f"request {request_id} is unknown or finished")
        with self._whole:
            self._scheduler.release(output.request)
            return self._outputs.finish(output, "cancelled", None)

    def set_budget(self, *, budget_ratio, min_budget):
        """Change the draft budget of requests added from now on; compiles nothing.

        Raises:
          ValueError: the budget could exceed what the engine was built for.
        """
        budget = dict(budget_ratio=budget_ratio, min_budget=min_budget)
        new = dataclasses.replace(self.speculation, **budget)
        sizes.check_budget(new, self.max_length, self.shape)
        self.speculation = new

    @property
    def num_draft_tokens(self):
        """The current k."""
        return self._scheduler.shape.num_draft_tokens

    @property
    def draft_token_choices(self):
        """Every k that the engine may run with, ascending."""
        return self.speculation.all_draft_tokens

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
        self._measure()
        if self._choose is not None and self.num_steps >= self._next_choice:
            self._choose_num_draft_tokens()
        with self._whole:
            plan, planned, moves = self._scheduler.plan()
            planned, loads = self._edits.before(plan, planned, self.device_steps.extras)
            outcome = self._dispatch(plan, moves, loads)
            if plan is not None:
                self._in_flight.append((planned, outcome, self.params_version))
                self.num_steps += 1
                self._steps_of[self.num_draft_tokens] += 1
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
                widths = planned.num_queries, planned.num_top, planned.prompts
                outcome = StepOutcome.from_packed(packed, *widths)
                told = self._finished, self._events if with_events else None
                records = self._scheduler, self._outputs
                commit(*records, planned, outcome, version, *told)
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
        check_same_params(self.model.params, params)
        self.params = self.device_steps.params_of(params)
        self.params_version += 1

    def progress(self, known):
        """RequestProgress of unfinished requests that have emitted something new.

        `known` maps request ids to the number of emitted tokens the caller has.
        """
        return self._outputs.progress(known)

    @property
    def kv_usage(self):
        """Load of the KV cache now and what page pressure cost so far: a dict."""
        return self._scheduler.kv.usage | {
            "num_running": self._scheduler.num_running,
            "num_preempted": self._scheduler.num_preempted,
            "num_waiting": len(self._scheduler.waiting),
        }

    def _measure(self):
        """Time the steps of num_draft_tokens="auto", once, before the first of them."""
        if self._measures:
            self._measures = False
            start_choosing(self)

    def _choose_num_draft_tokens(self):
        self._next_choice = self.num_steps + _CHOOSE_EVERY
        load = dict(
            num_running=self._scheduler.num_running,
            context_tokens=self._scheduler.context_tokens,
            acceptance=self._outputs.acceptance,
            host_seconds=self._host_clock.per_step(self.num_steps),
        )
        self.set_num_draft_tokens(self._choose(**load))

    def warm_up(self, *, filters=False, sampling=()):
        """Compile every variant of the step, so that nothing compiles afterwards.

        `filters` says whether requests to come use top-k, top-p or min-p, `sampling`
        are SamplingParams with the other options that they will have. Before the
        first step, the time of requests counts from its end.
        """
        self._require_open()
        self._measure()
        self._filters |= filters
        for params in sampling:
            self._prepare_steps(intake.prepare(self.model, [0], params))
        plans = [
            StepPlan.empty(self.shape.with_draft_tokens(k), prefill=prefill)
            for k in self.draft_token_choices
            for prefill in (False, True)
        ]
        with self._whole:
            for plan in plans:
                self._dispatch(plan).result().block_until_ready()
            self.device_steps.warm_up_moves(plans)
        self._outputs.start_clock()

    def _dispatch(self, plan, *before):
        return self.device_steps.submit(self.params, self._filters, plan, *before)

    def take_metrics(self):
        """Metrics of finished requests, which `stats` leaves out from now on."""
        return self._outputs.take_metrics()

    def stats(self, wall_time_s):
        """Totals over the finished requests."""
        return DecodeStats(
            requests=tuple(self._outputs.finished_metrics),
            num_slots=self.config.num_slots,
            num_steps=self.num_steps,
            wall_time_s=wall_time_s,
            kv_bytes_per_token=self.kv_bytes_per_token,
            weight_bytes=sizes.weight_bytes(self.model),
            kv_usage=self.kv_usage,
            forced_acceptance=self.speculation.forced_acceptance,
            numerics=self.config.numerics,
            tensor_parallel=self.config.tensor_parallel,
            **sizes.of_drafts(self.model, self.speculation, self.impl),
            min_budget=sizes.floor_of_drafts(self.speculation, self.shape),
            steps_by_num_draft_tokens=dict(sorted(self._steps_of.items())),
        )
