"""The compiled steps of an engine and the device state that they replace.

This file alone holds both. Steps under way never outlive their engine: the runtime
would be taken down under them, and end the process by abort.
"""

import atexit
import functools
import threading
import weakref

import jax

from sparsespec_jax.device.attention_probe import check_attention
from sparsespec_jax.device.context import step_options
from sparsespec_jax.device.offload import HostPages, sent, sent_first
from sparsespec_jax.device.row_probe import check_rows
from sparsespec_jax.device.sharding import (
    edits_on,
    load_slot_on,
    made_on,
    state_specs,
)
from sparsespec_jax.device.state import committed, new_state
from sparsespec_jax.device.step import make_step, step_compiler_options
from sparsespec_jax.host.dispatcher import Dispatcher
from sparsespec_jax.models.draft_weights import with_draft_weights
from sparsespec_jax.models.sharding import (
    place_params,
    shard_of,
    shardings,
    with_heads_for,
)
from sparsespec_jax.models.transformer import params_dtype
from sparsespec_jax.plan.edits import NO_EXTRAS, neutral_arrays
from sparsespec_jax.tuning import compile_cache


def check_exact(model, shapes, impl, mesh=None):
    """Look whether rows of a model stand alone in steps of these StepShapes.

    With a mesh, in those of devices that share the model.

    Raises:
      RuntimeError: they do not; names the part.
    """
    how = dict(impl=impl, compiler_options=step_compiler_options(impl, exact=True))
    check_rows(model.config, model.params, shapes, mesh=mesh, **how)
    check_attention(
        shard_of(model.config, 1 if mesh is None else mesh.size), shapes, **how
    )


class DeviceSteps:
    """Runs steps, in the order in which they are submitted, over one DecodeState.

    Args:
      model: a Model.
      resolved: EngineSizes.
      speculation: SpeculationConfig.
      config: EngineConfig.

    Attributes:
      state: the newest DecodeState, perhaps still being computed; None once closed.
      extras: StepExtras of the steps to come.
      dispatcher: runs the calls that dispatch steps.
    """

    def __init__(self, model, resolved, speculation, config):
        compile_cache.turn_on()
        self._sizes, self._model_config = resolved, model.config
        self._options, self.extras = step_options(speculation), NO_EXTRAS
        self._mesh, ratio_test = resolved.mesh, speculation.acceptor == "ratio_test"
        make = functools.partial(
            new_state,
            with_heads_for(model.config, resolved.degree),
            resolved.shape,
            kv_dtype=params_dtype(model.params),
            draft_top_m=speculation.draft_top_m if ratio_test else 0,
            policy=resolved.policy,
            proposer=resolved.proposer,
        )
        specs = functools.partial(self._specs, resolved.policy)
        self.state = committed(made_on(self._mesh, make, specs))
        self._outcome = None  # of the newest step
        self._host_pages = None
        if resolved.num_host_chunks:
            chunks = resolved.num_host_chunks, config.host_chunk_pages
            self._host_pages = HostPages(self.state, *chunks)
        self.dispatcher = Dispatcher(threaded=config.lag == 2)
        self._lock = threading.RLock()  # of a dispatch; the exit waits for it
        self._is_over = False  # the process ends
        _open.add(self)

    def params_of(self, params):
        """Parameters of the model as steps take them, those of drafts beside them."""
        config, kind = self._model_config, self._options.draft_weights
        how = dict(kind=kind, impl=self._sizes.impl, mesh=self._mesh)
        if self._mesh is not None:
            params = place_params(config, params, self._mesh)
        return committed(with_draft_weights(config, params, **how))

    def use(self, extras):
        """Let the steps to come do these StepExtras, no less than now."""
        if extras == self.extras:
            return
        self.dispatcher.settle()
        if extras.edits:
            sizes = self._sizes.shape.num_slots, self._model_config.vocab_size
            edits = edits_on(self._mesh, extras, *sizes, self.state.edits)
            self.replace_state(edits=edits)
            # Compiled now: a load of no slot.
            self._load(sizes[0], neutral_arrays(extras, sizes[1]))
        self.extras = extras

    def submit(self, params, filters, plan, moves=(), loads=()):
        """A future of the packed outcome of a step behind page moves and loads.

        `params` are what `params_of` gave, `filters` says whether laws with top-k,
        top-p or min-p may be among the requests. `loads` are (slot, arrays) of edits.
        Without a plan (None) there are only moves, and no outcome.

        Raises:
          RuntimeError: closed.
        """
        return self.dispatcher.submit(self._run, params, filters, plan, moves, loads)

    def _run(self, params, filters, plan, moves, loads):
        with self._lock:
            if self.state is None:
                raise RuntimeError("a step was dispatched on a closed engine")
            buffer = None if plan is None else plan.buffer  # copied by the step's call
            if self._host_pages is not None:
                buffer = sent_first(buffer, moves, self._mesh)
                self.state = self._host_pages.move(self.state, moves)
            if plan is None:
                return None
            if self._mesh is not None and self._host_pages is None:
                buffer = sent(buffer, self._mesh)
            for slot, arrays in loads:
                self._load(slot, arrays)
            step = self.step_function(filters, plan.shape)
            self.state, outcome = step(params, self.state, buffer, prefill=plan.prefill)
            outcome.copy_to_host_async()
            self._outcome = outcome
            return outcome

    def _load(self, slot, arrays):
        """Put a slot's arrays of edits in their place."""
        edits = load_slot_on(self._mesh, self.state.edits, slot, arrays)
        self.state = self.state._replace(edits=edits)

    def _specs(self, policy, state):
        return state_specs(state, policy, self._mesh)

    def step_function(self, filters, shape):
        """The jitted step of a shape (see `step.make_step`)."""
        return make_step(
            self._model_config,
            shape,
            policy=self._sizes.policy,
            proposer=self._sizes.proposer,
            options=self._options,
            filters=filters,
            impl=self._sizes.impl,
            extras=self.extras,
            exact=self._sizes.exact,
            mesh=self._mesh,
        )

    def num_compilations(self, shapes):
        """Variants of the step compiled for options like these and these shapes."""
        return sum(
            self.step_function(filters, shape)._cache_size()
            for filters in (False, True)
            for shape in shapes
        )

    def warm_up_moves(self, plans):
        """Compile the copies of pages that go with these plans."""
        if self._host_pages is not None:
            buffers = [sent(plan.buffer, self._mesh) for plan in plans]
            self.state = self._host_pages.warm_up(self.state, buffers)

    def drop_page_copies(self):
        """Leave out the copies of spilled pages, to time what they cost; lossy."""
        self.dispatcher.settle()
        self._host_pages = None

    def replace_state(self, **fields):
        """Put arrays in place of fields of the state, to time made-up caches."""
        self.dispatcher.settle()
        if self._mesh is None:
            self.state = self.state._replace(**committed(fields))
            return
        specs = self._specs(self._sizes.policy, self.state._replace(**fields))
        where = {name: shardings(self._mesh, getattr(specs, name)) for name in fields}
        self.state = self.state._replace(**jax.device_put(fields, where))

    def settle(self):
        """Wait until every step submitted so far has run on the device."""
        self.dispatcher.settle()
        with self._lock:
            self._wait()

    def close(self):
        """Wait for the step under way and free the pool; more than once is once."""
        if self.state is None or self._is_over:
            return
        self.dispatcher.close()
        with self._lock:
            self._wait()
            self.state = self._host_pages = self._outcome = None

    def end_with_process(self):
        """Wait for the step under way; none follows, a thread that asks waits for ever.

        Threads that Python does not wait for stop like this when it ends.
        """
        self._lock.acquire()
        self._wait()
        self._is_over = True

    def _wait(self):
        pages = () if self._host_pages is None else self._host_pages.arrays
        for arrays in (self._outcome, self.state, pages):
            try:
                jax.block_until_ready(arrays)
            except RuntimeError:  # of a step that failed, or arrays that it took along
                pass


_open = weakref.WeakSet()


@atexit.register  # so before what jax registered when it was imported above
def _end_all():
    # Dispatching threads have ended by now: Python waits for those first.
    for steps in list(_open):
        steps.end_with_process()
