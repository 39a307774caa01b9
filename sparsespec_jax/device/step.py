"""The compiled step: plan in, outcome out, state donated. The only jit of the engine.

One step runs, for all slots at once and in a fixed shape: one draft (of a cascade, one
or more) of every drafting slot, the verification of the slots whose cycle ends, and
optionally prefill chunks. An aligned step runs a whole cycle: all drafts of all slots,
one after the other, then all verifications; or prompt chunks alone. Acceptance,
commitment and stop checks happen here, so nothing waits for the host.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from sparsespec_jax import sampling
from sparsespec_jax.array_types import (
    DraftScores,
    Guesses,
    Logits,
    Outcome,
    PerToken,
    PlanBuffer,
    TableUpdates,
)
from sparsespec_jax.device import acceptance, cascade, editing, prompt_logprobs
from sparsespec_jax.device.attention import make_attend
from sparsespec_jax.device.context import StepContext, StepOptions
from sparsespec_jax.device.lanes import (
    StepLanes,
    add,
    make_lanes,
    put,
    take,
    token_rows,
)
from sparsespec_jax.device.proposing import keep_history, propose
from sparsespec_jax.device.sharding import step_on
from sparsespec_jax.device.state import DecodeState
from sparsespec_jax.models.collectives import MODEL_AXIS
from sparsespec_jax.models.config import ModelConfig
from sparsespec_jax.models.draft_weights import DRAFT_WEIGHTS
from sparsespec_jax.models.sharding import shard_of
from sparsespec_jax.models.transformer import forward_with_features, logits
from sparsespec_jax.plan.buffer import DRAFT_TABLE, FULL_TABLE, orders_of, unpack
from sparsespec_jax.plan.edits import NO_EXTRAS, StepExtras
from sparsespec_jax.plan.outcome import SEED, PromptTold, StepOutcome
from sparsespec_jax.plan.shape import StepShape
from sparsespec_jax.policies.base import Policy
from sparsespec_jax.proposers.base import RememberingProposer

# If pool and weights fill more than 80 % of a GPU, XLA takes what is left for nothing
# and computes values twice to save some: launches for a few kilobytes.
GPU_COMPILER_OPTIONS = {"xla_disable_hlo_passes": "rematerialization"}
# Where a value is rounded must not depend on what XLA fuses at some number of rows.
EXACT_COMPILER_OPTIONS = {"xla_allow_excess_precision": False}


@functools.cache
def make_step(
    model_config: ModelConfig,
    shape: StepShape,
    *,
    policy: Policy,
    options: StepOptions,
    filters: bool,
    impl: str,
    proposer: Any = None,
    extras: StepExtras = NO_EXTRAS,
    exact: bool = False,
    mesh: Mesh | None = None,
) -> Callable:
    """The jitted `step(params, state, buffer, prefill=bool) -> (state, outcome)`.

    `buffer` is a packed StepPlan; the outcome is what StepOutcome.from_packed reads.
    `state` is donated. Arguments are those of StepContext. Engines of equal options
    share the function and what it compiled. With a mesh, params and state are those of
    all its devices, which each run the step over their part.
    """
    axis, degree = (None, 1) if mesh is None else (MODEL_AXIS, mesh.size)
    context = StepContext(
        model=shard_of(model_config, degree), shape=shape, policy=policy,
        proposer=proposer, options=options, filters=filters, impl=impl, extras=extras,
        exact=exact, axis=axis,
    )  # fmt: skip

    def step(params, state, buffer, *, prefill):
        run = functools.partial(run_step, context, prefill=prefill)
        if mesh is not None:
            run = functools.partial(step_on, mesh, policy, run)
        return run(params, state, buffer)

    return jit_step(step, impl, exact=exact)


def jit_step(step: Callable, impl: str, *, exact: bool = False) -> Callable:
    """The jitted form of a function `step(params, state, buffer, prefill=bool)`."""
    options = step_compiler_options(impl, exact=exact)
    return jax.jit(
        step,
        static_argnames="prefill",
        donate_argnums=1,
        compiler_options=options or None,
    )


def step_compiler_options(impl: str, *, exact: bool) -> dict:
    """What the compiler of a step is told."""
    options = GPU_COMPILER_OPTIONS if impl == "gpu" else {}
    return options | EXACT_COMPILER_OPTIONS if exact else options


def run_step(
    context: StepContext,
    params: dict[str, Any],
    state: DecodeState,
    buffer: PlanBuffer,
    *,
    prefill: bool,
) -> tuple[DecodeState, Outcome]:
    """One step over a state: (state, packed outcome)."""
    shape = context.shape
    plan = unpack(shape, buffer, prefill=prefill)
    state = update_tables(state, plan["table_updates"])
    if not shape.runs_cycles:
        return _verify(context, params, state, plan)
    if prefill:
        return _read_prompts(context.of("prompt"), params, state, plan)
    orders = orders_of(shape.of("draft"), plan)
    weights = params.get(DRAFT_WEIGHTS, params)

    def draft(_, state):
        return _draft(context.of("draft"), weights, state, orders)

    state = jax.lax.fori_loop(0, shape.num_draft_steps, draft, state)
    orders = orders_of(shape.of("verify"), plan)
    return _verify(context.of("verify"), params, state, orders)


def _verify(context, params, state, plan):
    """All lanes that a plan has, mixed: (state, packed outcome)."""
    lanes = make_lanes(context, state, plan)
    guesses = cascade.guess(context, state, lanes.draft)
    state, tokens, hidden, features = _pass(context, params, state, lanes, guesses)
    rows = token_rows(context.shape)
    scored = hidden[: rows.verify.stop]
    scores = logits(context.model, params, scored, exact=context.exact)
    with jax.named_scope("sample"):
        edited = edit_verified(context, state, lanes, scores[rows.verify])
        verified, laws = _accept(context, state, lanes, edited)
        if context.is_drafting and not context.shape.part:
            state = store_drafts(context, state, lanes, guesses, scores[rows.draft])
        told = scores[rows.verify]
        if context.extras.edits:
            told = jnp.where(laws.processed_logprobs[:, None], edited, told)
        outcome = _outcome(context, state, lanes, verified, laws, told)
        if context.extras.prompt_logprobs:
            of_prompts = hidden[rows.prefill], scores[rows.verify]
            told = prompt_logprobs.tell(context, params, lanes, *of_prompts)
            outcome = outcome._replace(prompts=PromptTold(*told))
        state = _commit(context, state, lanes.verify, verified, outcome.is_done)
    if context.shape.num_guesses:
        state = keep_history(context, state, lanes, tokens)
    elif context.proposer is not None and context.shape.num_draft_tokens:
        state = propose(context, state, lanes, tokens, features, params)
    return state, outcome.pack(jnp, _as_int)


def _draft(context, params, state, plan):
    """One draft of every slot that drafts in an aligned step: the state."""
    lanes = make_lanes(context, state, plan)
    guesses = cascade.guess(context, state, lanes.draft)
    state, _, hidden, _ = _pass(context, params, state, lanes, guesses)
    scores = logits(
        context.model, params, hidden, impl=context.impl, in_8_bits=context.in_8_bits
    )
    with jax.named_scope("sample"):
        return store_drafts(context, state, lanes, guesses, scores)


def _read_prompts(context, params, state, plan):
    """Prompt chunks alone: (state, packed outcome of no lanes)."""
    plan = orders_of(context.shape, plan)
    lanes = make_lanes(context, state, plan)
    guesses = cascade.guess(context, state, lanes.draft)
    state, tokens, hidden, _ = _pass(context, params, state, lanes, guesses)
    if context.shape.num_guesses:
        state = keep_history(context, state, lanes, tokens)
    told, extras = None, context.extras
    if extras.prompt_logprobs:
        none = jnp.zeros((0, context.model.vocab_size), jnp.float32)
        told = PromptTold(*prompt_logprobs.tell(context, params, lanes, hidden, none))
    return state, StepOutcome.packed_of_none(
        jnp, context.shape, extras.top_logprobs, told, _as_int
    )


def _pass(context, params, state, lanes, guesses):
    """The lanes' tokens through all layers: (state, tokens, hidden, features)."""
    tokens, positions = feed(context, state, lanes, guesses)
    attend, fill = make_attend(context, lanes)
    hidden, layers, features = forward_with_features(
        context.model, params, tokens, positions, attend, state.layers,
        _feature_layers(context), impl=context.impl, exact=context.exact,
        num_prompt=lanes.prefill.tokens.size, in_8_bits=context.in_8_bits,
        axis=context.axis,
    )  # fmt: skip
    return state._replace(layers=tuple(fill(layers))), tokens, hidden, features


def _feature_layers(context):
    remembers = isinstance(context.proposer, RememberingProposer)
    return context.proposer.feature_layers if remembers else ()


def update_tables(state: DecodeState, updates: TableUpdates) -> DecodeState:
    """Apply the host's page-table changes: rows of (table, slot, column, page)."""
    table, slot, column, page = updates.T
    num_slots = state.lengths.size

    def apply(old, which):
        rows = jnp.where(table == which, slot, num_slots)  # out of range: dropped
        return put(old, page, rows, column)

    return state._replace(
        full_table=apply(state.full_table, FULL_TABLE),
        draft_table=apply(state.draft_table, DRAFT_TABLE),
    )


def feed(
    context: StepContext, state: DecodeState, lanes: StepLanes, guesses: Guesses
) -> tuple[PerToken, PerToken]:
    """Token ids and positions of the step, in lane order."""
    shape, draft, verify, prefill = context.shape, *lanes[:3]
    drafted = take(state.num_drafted, draft.slots)
    newest = take(state.tokens, draft.slots, drafted)
    drafts = jnp.concatenate([newest[:, None], guesses], axis=1)
    tokens = [drafts.ravel(), verify.tokens.ravel()]
    draft_positions = (take(state.lengths, draft.slots) + drafted)[:, None]
    draft_positions += jnp.arange(shape.draft_queries)[None]
    row = jnp.arange(shape.num_queries)[None]
    verify_positions = verify.starts[:, None] + row
    positions = [draft_positions.ravel(), verify_positions.ravel()]
    if prefill.slots.size:
        chunk = jnp.arange(shape.prefill_chunk)[None]
        tokens.append(prefill.tokens.ravel())
        positions.append((prefill.starts[:, None] + chunk).ravel())
    return jnp.concatenate(tokens), jnp.concatenate(positions)


def edit_verified(
    context: StepContext, state: DecodeState, lanes: StepLanes, scores: Logits
) -> Logits:
    """Scores of verified rows, each edited by the tokens before it, drafts included."""
    if state.edits is None:
        return scores
    verify = lanes.verify
    row = jnp.arange(context.shape.num_queries)[None]
    included = jnp.broadcast_to(row, (verify.slots.size, row.size))
    return editing.edit(
        state.edits, scores, verify.slots, verify.starts, verify.tokens[:, 1:],
        included, axis=context.axis,
    )  # fmt: skip


def _edit_drafting(context, state, lanes, guesses, scores):
    """Scores of drafting rows, edited by drafts and guesses before each."""
    if state.edits is None:
        return scores
    slots = lanes.draft.slots
    drafted = take(state.num_drafted, slots)[:, None]
    after = take(state.tokens, slots)[:, 1 : context.shape.num_queries]
    lane = jnp.arange(slots.size)[:, None]
    behind = drafted + jnp.arange(guesses.shape[1])[None]
    after = put(after, guesses, lane, behind)
    included = drafted + jnp.arange(guesses.shape[1] + 1)[None]
    starts = take(state.lengths, slots)
    rows = slots, starts, after, included
    return editing.edit(state.edits, scores, *rows, axis=context.axis)


def _accept(context, state, lanes, scores):
    """Run the acceptor on scores [E * Q, V]; returns Verified and the rows' Law."""
    shape, verify = context.shape, lanes.verify
    how = dict(filters=context.filters, axis=context.axis)
    rows = shape.num_queries
    slots = jnp.minimum(verify.slots, shape.num_slots - 1)
    laws = sampling.law_of(jnp.repeat(lanes.slot_params[slots], rows, axis=0))
    positions = verify.starts[:, None] + jnp.arange(rows)[None] + 1
    drafts = verify.tokens[:, 1:]
    num_drafts = jnp.where(verify.is_seed, 0, jnp.maximum(verify.num_rows - 1, 0))
    stacked = scores.reshape(shape.verify_lanes, rows, -1)
    judged = stacked, laws, positions, drafts, num_drafts
    if context.uses_ratio_test and shape.num_draft_tokens:
        kept = drafts.shape[1]
        draft_law = jax.tree.map(lambda a: a[slots, :kept], state.draft_law)
        # A seed's drafts are prompt tokens: accept them, then draw from its last row.
        forced = jnp.maximum(verify.num_rows - 1, 0)
        verified = _ratio_test_or_seed(judged, draft_law, forced, verify.is_seed, how)
    elif context.options.acceptor == "forced" and shape.num_draft_tokens:
        probability = context.options.forced_probability
        verified = acceptance.forced(*judged, probability=probability, **how)
    else:
        verified = acceptance.shared_noise(*judged, **how, exact=context.exact)
    last = jnp.where(verify.is_seed, verify.num_rows - 1, verified.num_accepted)
    is_known = verify.is_seed[:, None] & (jnp.arange(rows)[None] < last[:, None])
    known = jnp.where(is_known, jnp.pad(drafts, ((0, 0), (0, 1))), verified.tokens)
    return acceptance.Verified(last, known), laws


def _ratio_test_or_seed(judged, draft_law, forced, is_seed, how):
    """Ratio test for cycles; the target's own choice for seed verifications."""
    tested = acceptance.ratio_test(*judged, draft_law, **how)
    plain = acceptance.shared_noise(*judged[:-1], jnp.zeros_like(forced), **how)
    tokens = jnp.where(is_seed[:, None], plain.tokens, tested.tokens)
    return acceptance.Verified(tested.num_accepted, tokens)


def store_drafts(
    context: StepContext,
    state: DecodeState,
    lanes: StepLanes,
    guesses: Guesses,
    scores: DraftScores,
) -> DecodeState:
    """Draw the next drafts of every draft lane from the scores of its rows.

    Drafts follow the model's own law: a guess only decides whether the row behind it
    is one that the model would have fed.
    """
    draft, how = lanes.draft, dict(filters=context.filters, axis=context.axis)
    scores = _edit_drafting(context, state, lanes, guesses, scores)
    num_lanes, rows = guesses.shape[0], guesses.shape[1] + 1
    params = take(lanes.slot_params, draft.slots)
    laws = sampling.law_of(jnp.repeat(params, rows, axis=0))
    row = jnp.arange(rows)[None]
    first = take(state.num_drafted, draft.slots)[:, None]
    positions = take(state.lengths, draft.slots)[:, None] + first + row + 1
    positions, slot = positions.ravel(), draft.slots[:, None]
    if context.uses_ratio_test:
        kept = context.options.draft_top_m
        drafts, law = acceptance.draft_from_top_m(
            scores, laws, positions, num_kept=kept, **how
        )
    else:
        drafts = sampling.choose(scores, laws, positions, **how)
    drafts = drafts.reshape(num_lanes, rows)
    count = cascade.num_kept(guesses, drafts, draft)
    place = jnp.where(row < count[:, None], first + row, state.tokens.shape[1])
    if context.uses_ratio_test:
        law = jax.tree.map(
            lambda old, new: put(old, new.reshape(num_lanes, rows, -1), slot, place),
            state.draft_law,
            law,
        )
        state = state._replace(draft_law=law)
    if guesses.shape[1]:
        state = cascade.record(state, draft, drafts, count)
    return state._replace(
        tokens=put(state.tokens, drafts, slot, place + 1),
        num_drafted=add(state.num_drafted, count, draft.slots),
    )


def _outcome(context, state, lanes, verified, laws, scores):
    """StepOutcome of the verify lanes: what each emits, up to a stop or its limit.

    `scores` are those that the requests want to be told.
    """
    shape, verify, rows = context.shape, lanes.verify, context.shape.num_queries
    live = verify.num_rows > 0
    how = dict(filters=context.filters, exact=context.exact, axis=context.axis)
    chosen = not context.extras.judges_greedy
    chosen_logprobs = sampling.logprobs(
        scores, laws, verified.tokens.ravel(), **how, chosen=chosen
    ).reshape(-1, rows)
    first = jnp.where(verify.is_seed, verified.num_accepted, 0)
    count = jnp.where(live, verified.num_accepted - first + 1, 0)
    row = jnp.arange(rows)[None]
    emitted = (first[:, None] + row) % rows  # a seed's known tokens come last
    tokens = jnp.take_along_axis(verified.tokens, emitted, 1)
    chosen_logprobs = jnp.take_along_axis(chosen_logprobs, emitted, 1)
    top_tokens = top_logprobs = None
    if top := context.extras.top_logprobs:
        best = sampling.top_logprobs(scores, laws, top, **how)
        top_tokens, top_logprobs = (
            jnp.take_along_axis(x.reshape(-1, rows, top), emitted[..., None], 1)
            for x in best
        )

    slots = jnp.minimum(verify.slots, shape.num_slots - 1)
    params = sampling.read_slot_params(lanes.slot_params[slots])
    stop_ids = params.stop_ids[:, None]
    is_stop = (tokens[..., None] == stop_ids).any(-1)
    known = verify.starts[:, None] + emitted + 2  # tokens of the request, this included
    ends = (is_stop | (known >= params.limit[:, None])) & (row < count[:, None])
    done = ends.any(1)
    return StepOutcome(
        num_emitted=jnp.where(done, jnp.argmax(ends, 1) + 1, count),
        num_accepted=jnp.where(verify.is_seed, SEED, verified.num_accepted),
        is_done=done,
        tokens=tokens,
        logprobs=chosen_logprobs,
        cascade=cascade.counts(state, verify) if shape.num_guesses else None,
        top_tokens=top_tokens,
        top_logprobs=top_logprobs,
    )


def _commit(context, state, verify, verified, done):
    """The state with the verified slots advanced."""
    slots, accepted = verify.slots, verified.num_accepted
    pending = jnp.take_along_axis(verified.tokens, accepted[:, None], 1)
    selected, counts, edits = state.draft_counts, state.cascade_counts, state.edits
    if edits is not None:
        emitted = verified.tokens, accepted
        edits = editing.advance(edits, verify, *emitted, axis=context.axis)
    if selected is not None:
        selected = put(selected, verify.budgets[:, None], slots)
    if counts is not None:
        counts = put(counts, 0, slots)
    return state._replace(
        draft_counts=selected,
        lengths=put(state.lengths, verify.starts + accepted + 1, slots),
        tokens=put(state.tokens, pending[:, 0], slots, 0),
        num_drafted=put(state.num_drafted, jnp.zeros_like(accepted), slots),
        draft_tails=put(state.draft_tails, accepted + 1, slots),
        done=put(state.done, done, slots),
        cascade_counts=counts,
        edits=edits,
    )


def _as_int(floats):
    return jax.lax.bitcast_convert_type(floats, jnp.int32)
