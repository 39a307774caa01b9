"""The compiled step: plan in, outcome out, state donated. The only jit of the engine.

One step runs, for all slots at once and in a fixed shape: one draft (of a cascade, one
or more) of every drafting slot, the verification of the slots whose cycle ends, and
optionally prefill chunks. Acceptance, commitment and stop checks happen here, so
nothing waits for the host.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sparsespec_jax import plan as plan_lib
from sparsespec_jax import sampling
from sparsespec_jax.device import acceptance, cascade
from sparsespec_jax.device.attention import StepLanes, VerifyLanes, make_attend
from sparsespec_jax.device.state import DecodeState
from sparsespec_jax.models.transformer import forward_with_features, logits
from sparsespec_jax.proposers.base import keep_history, propose

# If pool and weights fill more than 80 % of a GPU, XLA takes what is left for nothing
# and computes values twice to save some: launches for a few kilobytes.
GPU_COMPILER_OPTIONS = {"xla_disable_hlo_passes": "rematerialization"}


class StepOptions(NamedTuple):
    """What of a SpeculationConfig the compiled step depends on; budgets are data."""

    acceptor: str
    mass_rows: str
    scope: str
    num_recent: int
    num_sinks: int
    draft_top_m: int
    forced_probability: float | None


def step_options(speculation):
    """StepOptions of a SpeculationConfig."""
    return StepOptions(*(getattr(speculation, name) for name in StepOptions._fields))


class _Verification(NamedTuple):
    """Inputs of the verify lanes, [E] and [E, Q]."""

    lanes: VerifyLanes
    tokens: jax.Array  # int32 [E, Q], pending token, then drafts
    is_seed: jax.Array  # bool [E], the drafts are prompt tokens, known to be right


@functools.cache
def make_step(model_config, shape, *, policy, options, filters, impl, proposer=None):
    """The jitted `step(params, state, buffer, prefill=bool) -> (state, outcome)`.

    `buffer` is a packed StepPlan; the outcome is what StepOutcome.from_packed reads.
    `state` is donated. `filters` says whether any request may use top-k, top-p or
    min-p. Engines of equal options share the function and what it compiled.
    """

    def step(params, state, buffer, *, prefill):
        plan = shape.unpack(buffer, prefill=prefill)
        state = _update_tables(state, plan["table_updates"])
        verification = _verification(state, plan, shape)
        lanes = _step_lanes(state, plan, verification, shape)
        guesses = cascade.guess(state, lanes, shape, proposer)
        tokens, positions = _tokens(state, plan, verification, lanes, guesses, shape)
        attend, fill = make_attend(
            lanes, shape, policy, options, impl, num_layers=model_config.num_layers
        )
        hidden, layers, features = forward_with_features(
            model_config, params, tokens, positions, attend, state.layers,
            getattr(proposer, "feature_layers", ()), impl=impl,
        )  # fmt: skip
        num_drafts = shape.num_draft_rows
        rows = num_drafts + shape.verify_lanes * shape.num_queries
        scores = logits(model_config, params, hidden[:rows])
        state = state._replace(layers=tuple(fill(layers)))
        with jax.named_scope("sample"):
            verified, laws = _accept(
                scores[num_drafts:], state, plan, verification, shape, options,
                filters,
            )  # fmt: skip
            if shape.draft_lanes:
                state = _store_drafts(
                    scores[:num_drafts], state, plan, lanes, guesses, options, filters
                )
            state, outcome = _commit(
                state, plan, verification, verified, laws, scores[num_drafts:], shape,
                filters,
            )  # fmt: skip
        if shape.num_guesses:
            fed = tokens[num_drafts:]
            state = keep_history(state, plan, verification.lanes, fed, shape)
        elif proposer is not None and shape.num_draft_tokens:
            state = propose(
                state, plan, verification.lanes, tokens, features, params, shape,
                proposer,
            )  # fmt: skip
        return state, outcome

    return jit_step(step, impl)


def jit_step(step, impl):
    """The jitted form of a function `step(params, state, buffer, prefill=bool)`."""
    return jax.jit(
        step,
        static_argnames="prefill",
        donate_argnums=1,
        compiler_options=GPU_COMPILER_OPTIONS if impl == "gpu" else None,
    )


def _update_tables(state, updates):
    """Apply the host's page-table changes: rows of (table, slot, column, page)."""
    table, slot, column, page = updates.T
    num_slots = state.lengths.size

    def apply(old, which):
        rows = jnp.where(table == which, slot, num_slots)  # out of range: dropped
        return old.at[rows, column].set(page, mode="drop")

    return state._replace(
        full_table=apply(state.full_table, plan_lib.FULL_TABLE),
        draft_table=apply(state.draft_table, plan_lib.DRAFT_TABLE),
    )


def _verification(state, plan, shape):
    """Collect what each verify lane feeds: a slot's drafts, or the prompt's tail."""
    slots = plan["verify_slots"]
    counts = plan["seed_counts"]
    is_seed = counts >= 0
    in_range = slots < shape.num_slots
    live = in_range & (is_seed | ~state.done.at[slots].get(mode="clip"))

    def of_slot(array):
        return array.at[slots].get(mode="clip")

    is_bare = counts == plan_lib.PENDING_ONLY
    drafted = jnp.where(is_bare, 0, of_slot(state.num_drafted))
    drafts = jnp.where(is_seed, counts, drafted)
    starts = jnp.where(is_seed, plan["seed_starts"], of_slot(state.lengths))
    tokens = of_slot(state.tokens)[:, : shape.num_queries]
    tokens = jnp.where(is_seed[:, None], plan["seed_tokens"], tokens)
    params = of_slot(plan["slot_params"])
    starts = jnp.where(live, starts, 0)
    lanes = VerifyLanes(
        slots=jnp.where(live, slots, shape.num_slots),
        starts=starts,
        num_rows=jnp.where(live, drafts + 1, 0),
        seeds=sampling.law_of(params).seed,
        budgets=_budgets(params, starts, shape),
        is_seed=is_seed & live,
    )
    return _Verification(lanes, tokens, is_seed & live)


def _budgets(params, lengths, shape):
    """Tokens to select int32 [...] at `lengths`, by the requests' own budgets."""
    return plan_lib.budget_tokens(
        lengths,
        ratio=sampling.as_float(params[:, plan_lib.BUDGET_RATIO]),
        floor=params[:, plan_lib.MIN_BUDGET],
        cap=shape.max_budget,
        xp=jnp,
    )


def _step_lanes(state, plan, verification, shape):
    """Where every token of the step reads and writes."""
    slots = plan["draft_slots"]

    def of_slot(array):
        return array.at[slots].get(mode="clip")

    active = (slots < shape.num_slots) & ~of_slot(state.done)
    drafted, tails = of_slot(state.num_drafted), of_slot(state.draft_tails)
    rows = jnp.ones_like(drafted)
    if shape.num_guesses:
        left = shape.num_draft_tokens - drafted
        active &= left > 0
        rows = jnp.minimum(left, shape.draft_queries)
    none = jnp.zeros(0, jnp.int32)
    draft_params = of_slot(plan["slot_params"])
    draft_starts = jnp.maximum(of_slot(state.lengths) - tails, 0)
    return StepLanes(
        draft_slots=slots,
        draft_active=active,
        draft_rows=rows,
        draft_tails=tails + drafted,
        draft_seeds=sampling.law_of(draft_params).seed,
        draft_starts=draft_starts,
        draft_budgets=_budgets(draft_params, draft_starts, shape),
        draft_counts=state.draft_counts,
        draft_table=state.draft_table,
        full_table=state.full_table,
        verify=verification.lanes,
        prefill_slots=plan.get("prefill_slots", none),
        prefill_starts=plan.get("prefill_starts", none),
        prefill_counts=plan.get("prefill_counts", none),
    )


def _tokens(state, plan, verification, lanes, guesses, shape):
    """Token ids and positions int32 [T] of the step, in lane order."""
    drafted = lanes.of_draft(state.num_drafted)
    newest = state.tokens.at[lanes.draft_slots, drafted].get(mode="clip")
    drafts = jnp.concatenate([newest[:, None], guesses], axis=1)
    tokens = [drafts.ravel(), verification.tokens.ravel()]
    draft_positions = (lanes.of_draft(state.lengths) + drafted)[:, None]
    draft_positions += jnp.arange(shape.draft_queries)[None]
    row = jnp.arange(shape.num_queries)[None]
    verify_positions = verification.lanes.starts[:, None] + row
    positions = [draft_positions.ravel(), verify_positions.ravel()]
    if lanes.prefill_slots.size:
        chunk = jnp.arange(shape.prefill_chunk)[None]
        tokens.append(plan["prefill_tokens"].ravel())
        positions.append((lanes.prefill_starts[:, None] + chunk).ravel())
    return jnp.concatenate(tokens), jnp.concatenate(positions)


def _accept(scores, state, plan, verification, shape, options, filters):
    """Run the acceptor on scores [E * Q, V]; returns Verified and the rows' Law."""
    lanes = verification.lanes
    rows = shape.num_queries
    slots = jnp.minimum(lanes.slots, shape.num_slots - 1)
    laws = sampling.law_of(jnp.repeat(plan["slot_params"][slots], rows, axis=0))
    positions = lanes.starts[:, None] + jnp.arange(rows)[None] + 1
    drafts = verification.tokens[:, 1:]
    num_drafts = jnp.where(verification.is_seed, 0, jnp.maximum(lanes.num_rows - 1, 0))
    stacked = scores.reshape(shape.verify_lanes, rows, -1)
    if options.acceptor == "ratio_test" and shape.num_draft_tokens:
        kept = drafts.shape[1]
        draft_law = jax.tree.map(lambda a: a[slots, :kept], state.draft_law)
        # A seed's drafts are prompt tokens: accept them, then draw from its last row.
        forced = jnp.maximum(lanes.num_rows - 1, 0)
        verified = _ratio_test_or_seed(
            stacked, laws, positions, drafts, num_drafts, draft_law, forced,
            verification.is_seed, filters,
        )  # fmt: skip
    elif options.acceptor == "forced" and shape.num_draft_tokens:
        verified = acceptance.forced(
            stacked, laws, positions, drafts, num_drafts,
            probability=options.forced_probability, filters=filters,
        )  # fmt: skip
    else:
        verified = acceptance.shared_noise(
            stacked, laws, positions, drafts, num_drafts, filters=filters
        )
    forced = jnp.where(verification.is_seed, lanes.num_rows - 1, verified.num_accepted)
    return verified._replace(num_accepted=forced), laws


def _ratio_test_or_seed(
    scores, laws, positions, drafts, num_drafts, draft_law, forced, is_seed, filters
):
    """Ratio test for cycles; the target's own choice for seed verifications."""
    tested = acceptance.ratio_test(
        scores, laws, positions, drafts, num_drafts, draft_law, filters=filters
    )
    plain = acceptance.shared_noise(
        scores, laws, positions, drafts, jnp.zeros_like(forced), filters=filters
    )
    tokens = jnp.where(is_seed[:, None], plain.tokens, tested.tokens)
    return acceptance.Verified(tested.num_accepted, tokens)


def _store_drafts(scores, state, plan, lanes, guesses, options, filters):
    """Draw the next drafts of every draft lane from scores [A * Qd, V].

    Drafts follow the model's own law: a guess only decides whether the row behind it
    is one that the model would have fed.
    """
    num_lanes, rows = guesses.shape[0], guesses.shape[1] + 1
    params = lanes.of_draft(plan["slot_params"])
    laws = sampling.law_of(jnp.repeat(params, rows, axis=0))
    row = jnp.arange(rows)[None]
    first = lanes.of_draft(state.num_drafted)[:, None]
    positions = (lanes.of_draft(state.lengths)[:, None] + first + row + 1).ravel()
    slot = lanes.draft_slots[:, None]
    if options.acceptor == "ratio_test":
        drafts, law = acceptance.draft_from_top_m(
            scores, laws, positions,
            num_kept=options.draft_top_m, filters=filters,
        )  # fmt: skip
    else:
        drafts = sampling.choose(scores, laws, positions, filters=filters)
    drafts = drafts.reshape(num_lanes, rows)
    count = cascade.num_kept(guesses, drafts, lanes)
    place = jnp.where(row < count[:, None], first + row, state.tokens.shape[1])
    if options.acceptor == "ratio_test":
        law = jax.tree.map(
            lambda old, new: old.at[slot, place].set(
                new.reshape(num_lanes, rows, -1), mode="drop"
            ),
            state.draft_law,
            law,
        )
        state = state._replace(draft_law=law)
    if guesses.shape[1]:
        state = cascade.record(state, lanes, drafts, count)
    return state._replace(
        tokens=state.tokens.at[slot, place + 1].set(drafts, mode="drop"),
        num_drafted=state.num_drafted.at[lanes.draft_slots].add(count, mode="drop"),
    )


def _commit(state, plan, verification, verified, laws, scores, shape, filters):
    """Advance the verified slots and describe what they emitted."""
    lanes, rows = verification.lanes, shape.num_queries
    live = lanes.num_rows > 0
    chosen_logprobs = sampling.logprobs(
        scores, laws, verified.tokens.ravel(), filters=filters
    ).reshape(-1, rows)
    first = jnp.where(verification.is_seed, verified.num_accepted, 0)
    count = jnp.where(live, verified.num_accepted - first + 1, 0)
    row = jnp.arange(rows)[None]
    emitted = jnp.minimum(first[:, None] + row, rows - 1)
    tokens = jnp.take_along_axis(verified.tokens, emitted, 1)
    chosen_logprobs = jnp.take_along_axis(chosen_logprobs, emitted, 1)

    slots = jnp.minimum(lanes.slots, shape.num_slots - 1)
    params = plan["slot_params"][slots]
    stop_ids = params[:, None, plan_lib.STOP_IDS :]
    is_stop = (tokens[..., None] == stop_ids).any(-1)
    known = lanes.starts[:, None] + emitted + 2  # tokens of the request, this included
    ends = (is_stop | (known >= params[:, plan_lib.LIMIT, None])) & (
        row < count[:, None]
    )
    done = ends.any(1)
    count = jnp.where(done, jnp.argmax(ends, 1) + 1, count)

    def put(old, new):
        return old.at[lanes.slots].set(new, mode="drop")

    pending = jnp.take_along_axis(verified.tokens, verified.num_accepted[:, None], 1)
    counts = state.draft_counts
    state = DecodeState(
        layers=state.layers,
        draft_counts=None if counts is None else put(counts, lanes.budgets[:, None]),
        full_table=state.full_table,
        draft_table=state.draft_table,
        lengths=put(state.lengths, lanes.starts + verified.num_accepted + 1),
        tokens=state.tokens.at[lanes.slots, 0].set(pending[:, 0], mode="drop"),
        num_drafted=put(state.num_drafted, jnp.zeros_like(count)),
        draft_tails=put(state.draft_tails, verified.num_accepted + 1),
        done=put(state.done, done),
        draft_law=state.draft_law,
        history=state.history,
        proposer_memory=state.proposer_memory,
        cascade_counts=state.cascade_counts,
    )
    accepted = jnp.where(verification.is_seed, plan_lib.NOT_SEED, verified.num_accepted)
    bits = jax.lax.bitcast_convert_type(chosen_logprobs, jnp.int32)
    header = jnp.stack([count, accepted, done.astype(jnp.int32)], axis=1)
    if shape.num_guesses:
        state, header = cascade.report(state, lanes, header)
    return state, jnp.concatenate([header, tokens, bits], axis=1)
