"""Times the compiled steps of an engine on its device, for the cost model.

    engine = Engine(model, speculation=SpeculationConfig(draft_token_choices=(0, 4)))
    engine.choose_with(Chooser(load_or_measure(engine)))

Steps run on made-up caches: every slot at the same context length, nothing read back.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np

from sparsespec_jax.config import SamplingParams
from sparsespec_jax.host.automatic import UNTIMED
from sparsespec_jax.host.cost_model import Chooser, CostModel
from sparsespec_jax.loading.user_cache import user_cache_dir
from sparsespec_jax.models.transformer import params_dtype
from sparsespec_jax.plan.buffer import StepPlan
from sparsespec_jax.plan.slot_params import slot_params

_ROUNDS = 3  # the first one is not counted
_STEPS = 24  # of a round at least, in whole cycles, none of them waited for
_LEAST_CONTEXT = 4  # tokens: then the shares make two lengths
_SHARES = (0.05, 0.3, 1.0)  # context lengths, of the longest that fits


def start_choosing(engine) -> None:
    """Let an engine choose k by its step times, as num_draft_tokens="auto" asks for.

    Texts too short for steps to be timed are decoded with the default k.

    Raises:
      ValueError: as `load_or_measure`.
    """
    if len(engine.draft_token_choices) < 2:
        return
    if has_room(engine):
        engine.choose_with(Chooser(load_or_measure(engine)))
    else:
        engine.set_num_draft_tokens(UNTIMED)


def load_or_measure(engine, directory=None) -> CostModel:
    """The CostModel of an engine: measured once per device, then read.

    Args:
      engine: an Engine that has begun no request.
      directory: where results are kept; default: step_costs in the user's cache.

    Raises:
      ValueError: the engine has begun requests, or its pool is too small for any cache.
    """
    key = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "model": str(engine.model.config),
        "dtype": str(params_dtype(engine.params)),
        "shape": str(engine.shape),
        "speculation": str(engine.speculation),
        "impl": engine.impl,
    }
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    folder = pathlib.Path(directory or user_cache_dir() / "step_costs")
    path = folder / f"{digest}.json"
    if path.exists():
        steps = json.loads(path.read_text())["steps"]
        steps = {int(k): tuple(map(tuple, v)) for k, v in steps.items()}
        return CostModel(steps, runs_cycles=engine.shape.runs_cycles)
    model = CostModel(measure(engine), runs_cycles=engine.shape.runs_cycles)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"key": key, "steps": model.steps}, indent=1))
    temporary.replace(path)
    return model


def measure(engine, lengths=None) -> dict[int, tuple[tuple[float, float], ...]]:
    """Context tokens and seconds of a step, by k; see CostModel.

    Args:
      engine: an Engine that has begun no request; its caches are overwritten.
      lengths: context lengths to measure; default: three up to the longest that fits.

    Raises:
      ValueError: the engine has begun requests, a length does not fit, or the proposer
        is a cascade, whose drafts per step depend on the text.
    """
    if engine.speculation.is_cascade:
        raise ValueError(
            "step times say nothing of the cycles of proposer='cascade', which make a "
            "number of drafts that depends on the text: choose k by hand"
        )
    if engine.has_work and engine.num_steps:
        raise ValueError(
            "the engine has begun requests that are unfinished: measure before"
        )
    longest = longest_context(engine)
    if lengths is None:
        lengths = sorted({max(2, int(longest * share)) for share in _SHARES})
    if max(lengths) > longest or min(lengths) < 1:
        raise ValueError(f"lengths must lie in [1, {longest}], got {lengths}")
    steps, slots = {}, engine.shape.num_slots
    for k in engine.draft_token_choices:
        steps[k] = tuple((float(n * slots), _time(engine, k, n)) for n in lengths)
    engine.device_steps.replace_state(**_state_fields(engine, 0, idle=True))
    return steps


def longest_context(engine) -> int:
    """Tokens that every slot can hold at once, with room for the timed cycles.

    Raises:
      ValueError: there are none.
    """
    if not has_room(engine):
        shape = engine.shape
        raise ValueError(
            f"{shape.num_pages} pages and texts of {engine.max_length} tokens leave no "
            f"room to time steps of {shape.num_slots} caches: raise num_pages or "
            "max_length"
        )
    return _longest(engine)


def has_room(engine) -> bool:
    """Whether the engine's texts can be long enough for its steps to be timed."""
    return _longest(engine) >= _LEAST_CONTEXT


def _longest(engine):
    shape = engine.shape
    longest = min(_full_pages(shape) * shape.page_size, engine.max_length)
    return longest - room_for(shape.num_draft_tokens)


def room_for(num_draft_tokens) -> int:
    """Tokens by which the timed steps may lengthen a slot's text."""
    return _STEPS + 2 * num_draft_tokens + 1  # a step commits one at most


def _full_pages(shape):
    """Pages of a slot's full table when all slots share the pool evenly."""
    drafts = shape.draft_table_width if shape.num_draft_steps else 0
    return shape.num_pages // shape.num_slots - drafts


def made_up_cycle(engine, k, length):
    """Put `length` made-up tokens into every slot; returns the plans of a cycle.

    They go to `run_plan` in turn, as often as wanted: steps of `k` drafts, in
    each of which another part of the slots verifies; or one step, if it is a cycle.
    """
    shape = engine.shape.with_draft_tokens(k)
    engine.device_steps.replace_state(**_state_fields(engine, length))
    phases = 1 if shape.runs_cycles else shape.num_queries
    return [_plan(engine, shape, phase) for phase in range(phases)]


def _time(engine, k, length) -> float:
    """Median seconds of a step of k drafts with `length` tokens in every slot.

    Of an aligned step, which is a cycle: of 1 / (k + 1) of it.
    """
    times = []
    for _ in range(_ROUNDS):
        plans = made_up_cycle(engine, k, length)  # texts as long as before
        steps = plans * -(-_STEPS // (k + 1))
        jax.block_until_ready(engine.device_steps.state.lengths)
        start = time.perf_counter()
        for plan in steps:
            outcome = run_plan(engine, plan)
        outcome.block_until_ready()
        cycles = len(steps) / len(plans)
        times.append((time.perf_counter() - start) / cycles / (k + 1))
    return float(np.median(times[1:]))  # the first fills the draft caches


def _state_fields(engine, length, *, idle=False):
    """Small arrays of a state in which every slot is at `length`, or none is used."""
    shape, slots = engine.shape, engine.shape.num_slots
    full = min(_full_pages(shape), shape.table_width)
    page = np.arange(slots * full, dtype=np.int32).reshape(slots, full)
    table = np.full((slots, shape.table_width), shape.num_pages, np.int32)
    table[:, :full] = page
    draft = np.arange(slots * shape.draft_table_width, dtype=np.int32)
    draft = slots * full + draft.reshape(slots, -1)
    if idle:
        table[:] = shape.num_pages
    if idle or not shape.num_draft_steps:
        draft = np.full_like(draft, shape.num_pages)
    return {
        "full_table": jnp.asarray(table),
        "draft_table": jnp.asarray(draft),
        "lengths": jnp.full(slots, length, jnp.int32),
        "num_drafted": jnp.zeros(slots, jnp.int32),
        "draft_tails": jnp.zeros(slots, jnp.int32),
        "done": jnp.full(slots, idle),
    }


def run_plan(engine, plan):
    """Dispatch a made-up plan as the engine's next step; the packed outcome to come."""
    return engine.device_steps.submit(engine.params, False, plan).result()


def _plan(engine, shape, phase):
    """A step in which the slots of `phase` verify and all others draft."""
    plan = StepPlan.empty(shape, prefill=False)
    views = plan.views
    law = SamplingParams(temperature=1.0, ignore_eos=True)
    views["slot_params"][:] = slot_params(
        law, 0, engine.max_length + 1, (), engine.speculation
    )
    slots = np.arange(shape.num_slots)
    now = slots % shape.num_queries == phase
    drafting, verifying = slots[~now][: shape.draft_lanes], slots[now]
    if shape.runs_cycles:
        drafting = verifying = slots
    views["verify_slots"][: len(verifying)] = verifying
    views["draft_slots"][: len(drafting)] = drafting
    return plan
