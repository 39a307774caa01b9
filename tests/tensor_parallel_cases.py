"""What scripts on eight forced devices run for tests/test_tensor_parallel.py."""

import dataclasses
import pathlib
import re
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from experiments import models
from experiments.models import TINY
from sparsespec_jax import (
    Engine,
    EngineConfig,
    Model,
    Policy,
    SamplingParams,
    load_model,
    sampling,
    save_checkpoint,
    score,
    sizes,
)
from sparsespec_jax.device import acceptance, editing, row_probe, sharding
from sparsespec_jax.models import products
from sparsespec_jax.models.collectives import MODEL_AXIS
from sparsespec_jax.models.sharding import model_mesh
from sparsespec_jax.models.transformer import init_params
from sparsespec_jax.plan.buffer import StepPlan
from sparsespec_jax.plan.edits import ANY_TOKEN, StepExtras, edit_fields
from sparsespec_jax.policies.select import POLICIES
from tests.engine_helpers import (
    ENGINE,
    LAWS,
    SPECULATION,
    make_prompts,
    num_compilations,
    run,
    tokens_of,
)

# Two layers where policies differ by layer, KV heads for four devices; eight devices
# have each of them twice.
CUT = dataclasses.replace(TINY, vocab_size=96, num_heads=8, num_kv_heads=4)
ONE_LAYER = dataclasses.replace(CUT, num_layers=1)
PROMPTS = make_prompts(CUT.vocab_size)
FILTERED = tuple(
    dataclasses.replace(
        law, temperature=1.5, top_k=20, top_p=0.9, min_p=0.05, logprobs="processed",
        top_logprobs=3,
    )
    if number % 2
    else law
    for number, law in enumerate(LAWS)
)  # fmt: skip
# Tokens on both ends of the vocabulary, words of several tokens through `edits`.
EDITED = tuple(
    dataclasses.replace(
        law, presence_penalty=0.5, frequency_penalty=0.3, repetition_penalty=1.2,
        logit_bias={1: 2.0, 90: 2.0}, min_tokens=min(3, law.max_tokens),
        stop_token_ids=(7, 95), top_logprobs=2,
    )
    for law in LAWS
)  # fmt: skip
GREEDY = tuple(dataclasses.replace(law, temperature=0) for law in LAWS)
# (laws, options of speculation, options of the engine) by name.
CASES = {f"policy {name}": (LAWS, dict(policy=name), {}) for name in POLICIES}
CASES |= {
    "per layer": (LAWS, dict(scope="layer"), {}),
    "top-p per layer": (LAWS, dict(scope="layer", policy="top_p"), {}),
    "churn per layer": (LAWS, dict(scope="layer", policy="pillar_churn"), {}),
    "lag 0": (LAWS, {}, dict(lag=0)),
    "lag 2, spilled": (LAWS, {}, dict(lag=2, num_pages=40)),
    "index, spilled": (LAWS, dict(policy="index"), dict(lag=2, num_pages=40)),
    "recomputed": (LAWS, {}, dict(num_pages=40, kv_policy="recompute")),
    "lookup": (LAWS, dict(proposer="ngram"), {}),
    "cascade, edits, spilled": (
        EDITED,
        dict(proposer="cascade"),
        dict(lag=2, num_pages=40),
    ),
    "aligned, 8 bits": (LAWS, dict(schedule="aligned", draft_weights="int8"), {}),
    "filters": (FILTERED, {}, {}),
    "edits, filters": (EDITED[:3] + FILTERED[3:], {}, dict(lag=2)),
    "greedy ratio test": (
        GREEDY,
        dict(acceptor="ratio_test", draft_top_m=30),
        dict(num_pages=40),
    ),
}


def model_of(config):
    return Model(
        name="cut", config=config, params=init_params(config, 0), tokenizer=None
    )


def differences(config, degrees, names):
    """Cases and degrees whose output is not that of plain decoding on one device.

    With the greatest difference of log-probabilities of those that are.
    """
    model, plain, wrong, largest = model_of(config), {}, [], 0.0
    for name in names:
        laws, speculation, engine = CASES[name]
        if laws not in plain:
            plain[laws] = run(model, PROMPTS, laws, num_draft_tokens=0)
        for degree in degrees:
            engine = engine | dict(tensor_parallel=degree)
            got = run(model, PROMPTS, laws, engine=engine, **speculation)
            assert got.stats.to_dict()["tensor_parallel"] == degree
            if told(got) != told(plain[laws]):
                wrong.append((name, degree))
            else:
                largest = max(largest, _distance(got, plain[laws]))
    return wrong, largest


def told(results):
    """Token ids, and the ids of the likeliest tokens told with each."""
    ids = [[[token for token, _ in each] for each in r.top_logprobs or ()]
           for r in results]  # fmt: skip
    return tokens_of(results), ids


def _distance(results, others):
    return max(
        float(np.abs(np.subtract(a.logprobs, b.logprobs)).max())
        for a, b in zip(results, others, strict=True)
    )


def plain_and_drafted(degree):
    """Whether plain and drafted text is one device's, and what an engine's step is."""
    model = model_of(ONE_LAYER)
    wanted = run(model, PROMPTS, num_draft_tokens=0)
    cut = dict(tensor_parallel=degree)
    plain = run(model, PROMPTS, num_draft_tokens=0, engine=cut)
    config = dataclasses.replace(ENGINE, max_length=256, **cut)
    speculation = dataclasses.replace(SPECULATION, num_draft_tokens=4)
    with Engine(model, speculation=speculation, engine=config) as engine:
        engine.warm_up()
        compiled = num_compilations(engine)
        engine.update_params(model.params)  # the same: they find their places again
        ids = [engine.add_request(*pair) for pair in zip(PROMPTS, LAWS, strict=True)]
        results = {}
        while engine.has_work:
            results |= {result.request_id: result for result in engine.step()}
        found = [results[number] for number in ids]
        state = engine.device_steps.state
        return {
            "same": [tokens_of(each) == tokens_of(wanted) for each in (plain, found)],
            "distance": _distance(found, wanted),
            "accepted": engine.stats(1.0).total.mean_accepted_draft_tokens,
            "compiled": [compiled, num_compilations(engine)],
            "pool": _shares(state.layers[0].kv_pages),
            "table": _shares(engine.params["embed"]["weight"]),
            "kv_bytes": engine.kv_bytes_per_token,
            "gathered": gathered(engine),
            "rows": engine.shape.draft_lanes
            + engine.shape.verify_lanes * engine.shape.num_queries,
        }


def _shares(array):
    """Elements that each device has, and those of all."""
    return sorted(shard.data.size for shard in array.addressable_shards), array.size


def gathered(engine):
    """Elements of every array that the lowered step gathers, and its sums."""
    plan = StepPlan.empty(engine.shape, prefill=False)
    steps = engine.device_steps
    step = steps.step_function(False, engine.shape)
    text = step.lower(engine.params, steps.state, plan.buffer, prefill=False).as_text()
    assert "all_to_all" not in text and "collective_permute" not in text
    found = re.findall(r'"stablehlo.all_gather".*-> tensor<([\dx]+)x[fi]32>', text)
    sizes = [int(np.prod([int(n) for n in shape.split("x")])) for shape in found]
    return sizes, len(re.findall('"stablehlo.all_reduce"', text))


def preempted_and_resumed(degree):
    """(same tokens, pages restored, resumed tokens are the same) at a degree."""
    model, cut = model_of(ONE_LAYER), dict(tensor_parallel=degree)
    wanted = tokens_of(run(model, PROMPTS, num_draft_tokens=0))
    config = dataclasses.replace(
        ENGINE, lag=2, max_length=80, num_pages=40, host_chunk_pages=2, **cut
    )
    rng = np.random.default_rng(0)
    with Engine(model, speculation=SPECULATION, engine=config) as engine:
        ids = [engine.add_request(*pair) for pair in zip(PROMPTS, LAWS, strict=True)]
        results, half = {}, {}
        while engine.has_work:
            scheduler = engine._scheduler
            active = [r for r in scheduler.slots if r is not None]
            if len(active) > 2 and rng.random() < 0.3:
                scheduler.preempt(active[rng.integers(len(active))])
            results |= {result.request_id: result for result in engine.step()}
            half |= {found.request_id: found for found in engine.progress({})}
        restored = engine.kv_usage["restored_pages"]
        same = [results[number].token_ids for number in ids] == wanted
        again = engine.resume_request(PROMPTS[-1], LAWS[-1], half[ids[-1]])
        resumed = None
        while engine.has_work:
            for result in engine.step():
                resumed = result.request_id == again and result.token_ids
    return same, restored, tuple(resumed) == wanted[-1]


def scores(degree):
    """Largest difference of scores from those of one device."""
    model = model_of(ONE_LAYER)
    outputs = make_prompts(CUT.vocab_size, lengths=range(3, 10))
    law = SamplingParams(temperature=0.7, top_k=30, logprobs="processed")
    one, many = (
        score(model, PROMPTS, outputs, sampling=law,
              engine=EngineConfig(num_slots=2, prefill_chunk=16, tensor_parallel=n))
        for n in (1, degree)
    )  # fmt: skip
    one, many = (np.nan_to_num(np.concatenate(x), neginf=-99.0) for x in (one, many))
    return float(np.abs(one - many).max())


def loaded(names, degree):
    """[(same values as on one device, greatest share of a device)] of model files.

    The last one once more, saved by this process from its devices.
    """
    how = dict(dtype="float32", tensor_parallel=degree)
    found = [_compared(name, name, how) for name in names]
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(load_model(names[-1], **how), pathlib.Path(folder) / "saved")
        return [*found, _compared(names[-1], pathlib.Path(folder) / "saved", how)]


def _compared(name, other, how):
    one, many = load_model(name, dtype="float32"), load_model(other, **how)
    same = jax.tree.map(lambda a, b: np.array_equal(a, b), one.params, many.params)
    return all(jax.tree.leaves(same)), _greatest_share(many.params)


def random_weights(degree):
    """(same values as on one device, greatest share of a device) of random weights."""
    models.SHAPES["cut"] = CUT
    one, many = (models.random_model("cut", "float32", n) for n in (1, degree))
    same = jax.tree.map(lambda a, b: np.array_equal(a, b), one.params, many.params)
    return all(jax.tree.leaves(same)), _greatest_share(many.params)


def _greatest_share(params):
    """The greatest share of all bytes that one device holds."""
    held, leaves = {}, jax.tree.leaves(params)
    for array in leaves:
        for shard in array.addressable_shards:
            held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
    return max(held.values()) / sum(array.nbytes for array in leaves)


class Reader:
    """A proposer that could read the model's weights."""

    feature_layers = ()

    def init_memory(self, shape):
        """Nothing."""

    def propose_from(self, view, memory, num_drafts):
        """Never called."""
        raise AssertionError


def refusals():
    """What each thing that devices cannot share is refused with."""
    odd = Policy(
        "odd", ("mass",), lambda view, options: None, state_shape=lambda h, x: (3, 7)
    )
    golden = pathlib.Path(__file__).parent / "goldens" / "qwen3"
    on_two = load_model(golden, dtype="float32", tensor_parallel=2)
    model = model_of(ONE_LAYER)
    odd_sizes = (
        dataclasses.replace(ONE_LAYER, intermediate_size=50),
        dataclasses.replace(ONE_LAYER, vocab_size=97),
    )
    odd_models = [dataclasses.replace(model, config=config) for config in odd_sizes]
    tries = (
        lambda: _engine(model, 3),
        lambda: _engine(odd_models[0], 4),
        lambda: _engine(odd_models[1], 2),
        lambda: _engine(model_of(dataclasses.replace(ONE_LAYER, num_heads=16)), 16),
        lambda: _engine(model, 0),
        lambda: _engine(model, 2, policy=odd),
        lambda: _engine(model, 2, proposer=Reader()),
        lambda: _engine(on_two, 4),
        lambda: load_model(golden, tensor_parallel=8),
        lambda: _engine(model, 4),  # with little memory
    )
    found = [_refusal(attempt) for attempt in tries[:-1]]
    free = sizes.free_memory_bytes
    # A page of one KV head: 16 tokens of 2 x 16 float32 values.
    sizes.free_memory_bytes = lambda degree=1: 20 * 2048 + 2048
    found.append(_refusal(tries[-1]))
    sizes.free_memory_bytes = free
    return found


def _engine(model, degree, **speculation):
    config = EngineConfig(max_length=64, tensor_parallel=degree)
    speculation = dataclasses.replace(SPECULATION, **speculation)
    return Engine(model, speculation=speculation, engine=config)


def _refusal(attempt):
    try:
        attempt()
    except ValueError as error:
        return str(error)
    return "nothing was refused"


def probes():
    """What the look before exact numerics says at degree 2: now, and with a fault.

    The fault is a sum over devices that steps of few rows round on the way.
    """
    config = dataclasses.replace(
        ONE_LAYER, vocab_size=128, num_heads=2, num_kv_heads=2, head_dim=64,
        hidden_size=64, intermediate_size=128,
    )  # fmt: skip
    params, shapes = init_params(config, 0, "bfloat16"), []
    sizes_of = EngineConfig(num_slots=4, page_size=32, prefill_chunk=66, max_length=128)
    for k in (0, 3):
        speculation = dataclasses.replace(SPECULATION, num_draft_tokens=k)
        shapes.append(sizes.make_shape(speculation, sizes_of, 128, "gpu"))
    how = dict(impl="reference", compiler_options={}, mesh=model_mesh(2))
    row_probe.check_rows(config, params, shapes, **how)
    whole = products.summed_in_order

    def rounded(x, axis):
        few = jax.lax.reduce_precision(x, 8, 7) if len(x) < 72 else x
        return whole(few, axis)

    products.summed_in_order = rounded
    row_probe._compiled.cache_clear()
    try:
        row_probe.check_rows(config, params, shapes, **how)
    except RuntimeError as error:
        return str(error)
    return "the fault was not noticed"


def laws_of_cut_logits(degree):
    """Names of what a cut vocabulary gives otherwise than a whole one, bit by bit.

    Log-probabilities and the draft's law are sums, compared with a tolerance.
    """
    mesh, vocab, rows = model_mesh(degree), 96, 40
    rng = np.random.default_rng(0)
    scores = rng.normal(0, 3, (rows, vocab)).astype(np.float32)
    scores[::5, 3] = scores[::5, 90] = 50.0  # equal ones far apart
    scores[1::5] = np.round(scores[1::5])  # and many of them
    law = sampling.Law(
        seed=rng.integers(0, 2**32, (rows, 2), np.uint32),
        temperature=np.float32(rng.choice([0, 0.7, 1.3], rows)),
        top_k=np.int32(rng.choice([0, 1, 7, 60], rows)),
        top_p=np.float32(rng.choice([1, 0.9, 0.3], rows)),
        min_p=np.float32(rng.choice([0, 0.1], rows)),
        processed_logprobs=rng.random(rows) < 0.5,
    )
    places = np.arange(rows, dtype=np.int32)
    tokens = rng.integers(0, vocab, rows, np.int32)
    drafts = rng.integers(0, vocab, (rows // 4, 3), np.int32)
    kept = np.argsort(rng.random((rows // 4, 3, vocab)))[..., :8].astype(np.int32)
    kept[..., 0] = drafts
    draft_law = acceptance.DraftLaw(kept, np.full(kept.shape, 0.125, np.float32))
    extras = StepExtras(True, True, 4, 3)
    fields = {
        name: np.broadcast_to(neutral, (3, *shape)).astype(dtype).copy()
        for name, (shape, dtype, neutral) in edit_fields(extras, vocab).items()
    }
    fields["penalties"][:] = 0.4, 0.3, 1.5
    fields["lengths"][:, 1] = 6
    fields["bias"][:, ::3] = 1.5
    fields["ends"][:, [2, 95]] = True
    fields["counts"][:, rng.integers(0, vocab, 20)] = 2
    fields["in_prompt"][:, rng.integers(0, vocab, 20)] = True
    fields["word_starts"][:] = [[ANY_TOKEN, n] for n in range(4)]
    fields["word_ends"][:] = 0, 47, 48, 95
    edits = editing.SlotEdits(**fields)
    slots, starts = np.int32([2, 0, 1, 3, 2]), np.int32([4, 5, 6, 7, 9])
    after = rng.integers(0, 5, (5, 7), np.int32)
    included = np.broadcast_to(np.int32(range(8)), (5, 8))

    law, draft_law, places, drafts, slots, starts, after, included = jax.tree.map(
        jnp.asarray, (law, draft_law, places, drafts, slots, starts, after, included)
    )

    def run(scores, edits, axis):
        how = dict(filters=True, axis=axis)
        judged = scores.reshape(rows // 4, 4, -1), law, places.reshape(-1, 4), drafts
        count = np.full(rows // 4, 3, np.int32)
        tested = acceptance.ratio_test(*judged, count, draft_law, **how)
        drawn, cut_law = acceptance.draft_from_top_m(
            scores, law, places, num_kept=60, **how
        )
        ids, values = sampling.top_logprobs(scores, law, 50, **how)
        same = {
            "choice": sampling.choose(scores, law, places, **how),
            "mask": sampling.keep_mask(scores, law, axis=axis),
            "ratio test": tested.tokens,
            "accepted": tested.num_accepted,
            "draft": drawn,
            "top ids": ids,
            "edited": editing.edit(
                edits, scores, slots, starts, after, included, axis=axis
            ),
        }
        chosen = sampling.logprobs(scores, law, tokens, **how)
        return same, (chosen, values, cut_law.probs)

    axis = MODEL_AXIS
    cut = dict.fromkeys(("mask", "edited"), P(None, axis))
    names = "choice", "mask", "ratio test", "accepted", "draft", "top ids", "edited"
    specs = {name: cut.get(name, P()) for name in names}, P()
    places_of = P(None, axis), sharding.edit_specs(edits)
    shards = sharding.on_shards(
        lambda scores, edits: run(scores, edits, axis), mesh, places_of, specs
    )
    whole, close = jax.jit(lambda scores, edits: run(scores, edits, None))(
        scores, edits
    )
    found, near = jax.jit(shards)(scores, edits)
    wrong = [name for name in names if not np.array_equal(found[name], whole[name])]
    for a, b in zip(near, close, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert len(set(np.asarray(whole["choice"]).tolist())) > 10
    return wrong
