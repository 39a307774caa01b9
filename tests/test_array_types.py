"""Array types of the engine: checked in tests; users neither need nor pay for them."""

import ast
import pathlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.models import TINY
from sparsespec_jax import EngineConfig, SpeculationConfig, sampling, sizes
from sparsespec_jax.array_types import Array
from sparsespec_jax.device import (
    acceptance,
    attention,
    cascade,
    editing,
    per_step,
    proposing,
    row_places,
    step,
)
from sparsespec_jax.device.context import StepContext, step_options
from sparsespec_jax.device.lanes import make_lanes
from sparsespec_jax.device.state import new_state
from sparsespec_jax.models import transformer
from sparsespec_jax.models.transformer import init_params
from sparsespec_jax.plan.buffer import StepPlan
from sparsespec_jax.plan.edits import StepExtras
from sparsespec_jax.policies import base, keys, mass, select
from sparsespec_jax.proposers import eagle
from sparsespec_jax.proposers.base import (
    FromTexts,
    NGram,
    ProposalView,
    resolve_proposer,
)
from tests.test_kernels_types import run_alone

PACKAGE = pathlib.Path(__file__).parents[1] / "sparsespec_jax"
CHECKED = (
    "sampling.py", "models/rope.py", "models/transformer.py", "device/*.py",
    "policies/*.py", "proposers/*.py",
)  # fmt: skip

E, K, V, T, R, S, X, H, D = 3, 4, 11, 6, 7, 8, 20, 2, 16
Q = K + 1


def zeros(*shape, dtype=jnp.int32):
    return np.zeros(shape, dtype)


def floats(*shape):
    return np.zeros(shape, np.float32)


def make_law(rows):
    number, flag = floats(rows), zeros(rows, dtype=bool)
    seed = zeros(rows, 2, dtype=np.uint32)
    return sampling.Law(seed, number, zeros(rows), number, number, flag)


def make_view(**changes):
    ints = zeros(E)
    view = base.SelectionView(
        mass=floats(E, H, X),
        queries=floats(E, Q, 2 * H, D),
        keys=lambda: floats(E, H, X, D),
        num_queries=ints,
        lengths=ints,
        budgets=ints,
        is_first=zeros(E, dtype=bool),
        state=None,
        seeds=zeros(E, 2, dtype=np.uint32),
        layer_index=0,
        num_kv_heads=H,
        num_keys=X,
    )
    return view._replace(**changes)


OPTIONS = base.SelectionOptions(
    cap=7, per_layer=False, num_recent=0, num_sinks=1, impl="reference"
)


def make_proposal_view():
    ints, flags, texts = zeros(E), zeros(E, dtype=bool), zeros(E, X)
    features = floats(E, Q, 5)
    return ProposalView(ints, ints, ints, flags, ints, texts, features, params=None)


def traced(policy="pillar", **options):
    """(StepContext, DecodeState, StepLanes, step plan) of a small engine."""
    speculation = SpeculationConfig(num_draft_tokens=K, policy=policy, **options)
    config = EngineConfig(
        num_slots=S, page_size=4, max_length=64, prefill_lanes=2, prefill_chunk=8
    )
    shape = sizes.make_shape(speculation, config, config.max_length, "reference")
    parts = dict(
        policy=select.resolve_policy(policy),
        proposer=resolve_proposer(speculation.proposer),
    )
    context = StepContext(
        model=TINY, shape=shape, options=step_options(speculation), filters=False,
        impl="reference", **parts,
    )  # fmt: skip
    state = new_state(TINY, shape, kv_dtype=jnp.float32, draft_top_m=2, **parts)
    plan = jax.tree.map(jnp.asarray, StepPlan.empty(shape, prefill=True).views)
    return context, state, make_lanes(context, state, plan), plan


def device_borders():
    """Calls of what steps are made of: drafts with guesses, and without."""
    context, state, lanes, plan = traced(
        proposer="cascade", draft_steps=3, num_guesses=2
    )
    drafts = zeros(context.shape.draft_lanes, context.shape.draft_queries)
    guesses, tokens = drafts[:, 1:], zeros(num_tokens(context))
    scores = floats(drafts.size, TINY.vocab_size)
    q = floats(tokens.size, TINY.num_heads, TINY.head_dim)
    rows = floats(tokens.size, TINY.num_kv_heads, 2 * TINY.head_dim)
    attend, _ = attention.make_attend(context, lanes)
    per_step_context, other, others, _ = traced("quest_step")
    few = q[: num_tokens(per_step_context)]
    _, fill = attention.make_attend(per_step_context, others)
    attend_drafts = partial(per_step.attend_drafts, per_step_context, OPTIONS, 0)
    counts = zeros(S, TINY.num_kv_heads)
    extras = StepExtras(bias=True, penalties=True, num_words=2, word_tokens=5)
    edits = editing.slot_edits(extras, S, TINY.vocab_size, None)
    lane_slots, after, included = zeros(3), zeros(3, 6), zeros(3, 4)
    edited = edits, floats(12, TINY.vocab_size), lane_slots, lane_slots, after, included
    verified = lanes.verify.tokens, lanes.verify.slots
    return [
        (editing.edit, *edited),
        (editing.advance, edits, lanes.verify, *verified),
        (partial(cascade.guess, context), state, lanes.draft),
        (cascade.num_kept, guesses, drafts, lanes.draft),
        (cascade.record, state, lanes.draft, drafts, drafts[:, 0]),
        (cascade.counts, state, lanes.verify),
        (step.update_tables, state, plan["table_updates"]),
        (partial(step.feed, context), state, lanes, guesses),
        (partial(step.store_drafts, context), state, lanes, guesses, scores),
        (partial(proposing.keep_history, context), state, lanes, tokens),
        (partial(attend, 0), q, rows, state.layers[0]),
        (fill, other.layers),
        (attend_drafts, few, few, other.layers[0].kv_pages, others),
        (row_places.row_places, lanes, context.shape, counts),
        (row_places.tail_places, lanes, context.shape, lanes.verify.budgets[:, None]),
    ]


def num_tokens(context):
    """T of a step with prompt chunks."""
    shape = context.shape
    chunks = shape.prefill_lanes * shape.prefill_chunk
    return shape.num_draft_rows + shape.verify_lanes * shape.num_queries + chunks


def sampling_borders():
    ids, logits, law = zeros(R), floats(R, V), make_law(R)
    return [
        (partial(sampling.choose, filters=True), logits, law, ids),
        (partial(sampling.logprobs, filters=True), logits, law, ids),
        (partial(sampling.probabilities, filters=True), logits, law),
        (partial(sampling.top_logprobs, count=2, filters=True), logits, law),
        (sampling.keep_mask, logits, law),
        (partial(sampling.uniform, stream=0), law.seed, ids),
        (sampling.gumbel, law.seed, ids, zeros(R, 3)),
    ]


def model_borders():
    params = init_params(TINY, 0)
    forward = partial(transformer.forward, TINY, params)
    rest = transformer.causal_attend, (None,) * TINY.num_layers
    return [
        (transformer.causal_attend, 0, floats(T, 4, D), floats(T, H, 2 * D), None),
        (forward, zeros(T), zeros(T), *rest),
    ]


def acceptance_borders():
    judged = floats(E, Q, V), make_law(E * Q), zeros(E, Q), zeros(E, K), zeros(E)
    draft_law = acceptance.DraftLaw(zeros(E, K, 2), floats(E, K, 2))
    drawn = floats(R, V), make_law(R), zeros(R)
    plain = dict(filters=False)
    return [
        (partial(acceptance.shared_noise, **plain), *judged),
        (partial(acceptance.forced, probability=0.5, **plain), *judged),
        (partial(acceptance.ratio_test, **plain), *judged, draft_law),
        (partial(acceptance.draft_from_top_m, num_kept=2, **plain), *drawn),
        (acceptance.count_prefix, zeros(E, K, dtype=bool), zeros(E)),
    ]


def policy_borders():
    view, picks, mass_of = make_view(), zeros(E, H, 7), floats(E, H, X)
    key_rows = floats(E, H, X, D), zeros(E, 1, X, dtype=bool)
    return [
        (base.run_policy, select.POLICIES["pillar"], view, OPTIONS),
        (base.top_tokens, view, mass_of, OPTIONS),
        (base.as_mask, view, picks, picks[..., 0]),
        (mass.force_recent, view, mass_of, 0.5),
        (mass.last_row_mass, view),
        (keys.page_scores, view, 4),
        (keys.label_scores, view, 4),
        (partial(keys.coded_keys, bits=2, page_size=4), *key_rows),
        (select.window, view, OPTIONS),
    ]


def proposer_borders():
    attended = floats(2, 5, 4, D), *[floats(2, 6, H, D)] * 2
    return [
        (NGram().propose, zeros(E, X), zeros(E), K),
        (FromTexts(NGram()).propose_from, make_proposal_view(), None, K),
        (eagle.attention, *attended, zeros(2, 5, 6, dtype=bool)),
    ]


def refusal(function, args):
    """The first line of what refuses a call before it runs, or None."""
    leaves, tree = jax.tree.flatten(args)
    arrays = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, Array)}

    def call(arrays):
        mixed = [arrays.get(i, leaf) for i, leaf in enumerate(leaves)]
        function(*jax.tree.unflatten(tree, mixed))

    try:
        jax.eval_shape(call, arrays)
    except Exception as error:
        return str(error).partition("\n")[0]
    return None


def faults(array, others):
    """Of another dtype; transposed; one shorter than another array of the call."""
    yield array.astype(np.float16)
    if array.size and array.shape != array.T.shape:
        yield array.T
    if any(len(array) == len(other) for other in others):
        yield array[1:]


ROOMS = [
    sampling_borders, model_borders, acceptance_borders, device_borders,
    policy_borders, proposer_borders,
]  # fmt: skip


@pytest.mark.parametrize("borders", ROOMS, ids=lambda room: room.__name__)
def test_a_fault_in_any_array_is_refused_at_the_border(borders):
    """Alone or in a record, at the function that it is passed to and no deeper."""
    for function, *args in borders():
        target = getattr(function, "func", function)
        border = f"the parameters of {target.__module__}.{target.__qualname__}."
        assert refusal(function, args) is None, border
        leaves, tree = jax.tree.flatten(args)
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Array)]
        for place in places:
            others = [leaves[i] for i in places if i != place]
            for fault in faults(leaves[place], others):
                faulty = [*leaves[:place], fault, *leaves[place + 1 :]]
                said = refusal(function, jax.tree.unflatten(tree, faulty))
                assert border in str(said), (fault.shape, fault.dtype, said)


@pytest.mark.parametrize(
    "fault",
    [
        lambda indices, counts: (indices.astype(jnp.int16), counts),
        lambda indices, counts: (indices.swapaxes(0, 1), counts.swapaxes(0, 1)),
        lambda indices, counts: (indices, counts[:, :, None]),
        lambda indices, counts: (indices[1:], counts[1:]),
    ],
)
def test_what_a_policy_returns_is_checked(fault):
    policy = base.Policy("mine", ("mass",), lambda *_: fault(*picks))
    picks = jnp.zeros((E, H, 7), jnp.int32), jnp.zeros((E, H), jnp.int32)
    said = refusal(base.run_policy, (policy, make_view(), OPTIONS))
    assert "the return value of sparsespec_jax.policies.base.run_policy" in str(said)


def test_what_a_proposer_returns_is_checked():
    class Mine:
        def propose(self, history, lengths, num_drafts):
            return jnp.zeros((lengths.size, num_drafts))

    view = make_proposal_view()
    said = refusal(FromTexts(Mine()).propose_from, (view, None, K))
    assert "the return value of sparsespec_jax.proposers.base.FromTexts" in str(said)


def test_records_hold_anything_until_they_are_handed_over():
    """So jax may put whatever it likes into their places."""
    law = make_law(R)
    assert jax.tree.map(lambda x: object(), law).seed is not None
    assert jax.tree.structure(law).unflatten([None] * 6).top_k is None


def test_users_need_no_checker_and_import_none():
    code = (
        "import sys; sys.modules['jaxtyping'] = sys.modules['beartype'] = None;"
        "import jax.numpy as jnp;"
        "from sparsespec_jax import array_types, decode, sampling;"
        "from sparsespec_jax.device import step;"
        "from sparsespec_jax.proposers import eagle;"
        "assert array_types.Logits == array_types.VerifyTokens == array_types.Array;"
        "rows = jnp.zeros((2, 18), jnp.int32);"
        "scores = jnp.array([[1.0, 3.0, 2.0], [5.0, 1.0, 2.0]]);"
        "law = sampling.law_of(rows);"
        "print(sampling.choose(scores, law, rows[:, 0], filters=False))"
    )
    assert run_alone(code) == ["[1", "0]"]


def test_users_are_not_checked():
    """Where jaxtyping is installed, it only spells: nothing is wrapped."""
    code = (
        "import sys; from sparsespec_jax import sampling;"
        "from sparsespec_jax.device import step;"
        "functions = sampling.choose, step.run_step;"
        "print(any(hasattr(f, '__wrapped__') for f in functions));"
        "print('beartype' in sys.modules)"
    )
    assert run_alone(code) == ["False", "False"]


def unspelt(tree, prefix=""):
    """Parameters without annotation of the public functions in a syntax tree."""
    for node in tree.body:
        name = getattr(node, "name", "_")
        if name.startswith("_") and name != "__call__":
            continue
        if isinstance(node, ast.ClassDef):
            yield from unspelt(node, f"{prefix}{name}.")
        elif isinstance(node, ast.FunctionDef):
            args = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
            for arg in args:
                if arg.annotation is None and arg.arg != "self":
                    yield f"{prefix}{name}: {arg.arg}"


def test_public_functions_of_these_rooms_are_annotated():
    """A function without annotations is not checked, and nobody would notice."""
    files = [file for glob in CHECKED for file in PACKAGE.glob(glob)]
    assert len(files) > 20
    for file in files:
        assert not list(unspelt(ast.parse(file.read_text()))), file
    assert list(unspelt(ast.parse("def f(x: int, y, *, z): pass"))) == ["f: y", "f: z"]
