"""Engines that keep an index of their keys: its codes are right where drafts select."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.kv_rows import ReadableEngine
from pallas_kernels.score_select import encode
from sparsespec_jax import EngineConfig, SamplingParams, SpeculationConfig, sizes
from sparsespec_jax.device import offload
from sparsespec_jax.host.request import Status
from sparsespec_jax.plan.shape import StepShape
from sparsespec_jax.policies.base import check_index
from sparsespec_jax.policies.keys import index_step
from sparsespec_jax.policies.select import POLICIES
from tests.engine_helpers import SPECULATION, first_layers, run, tokens_of

CONFIG = EngineConfig(num_slots=4, page_size=8, prefill_chunk=16, max_length=96)
INDEX = dataclasses.replace(SPECULATION, policy="index")
PRESSED = dict(num_pages=46, host_chunk_pages=4)  # of 68
OPTIONS = {
    "mixed": (INDEX, {}),
    "two_bits": (dataclasses.replace(INDEX, policy="index_2bit"), {}),
    "aligned": (dataclasses.replace(INDEX, schedule="aligned"), {}),
    "offload": (INDEX, PRESSED),
    "recompute": (INDEX, PRESSED | dict(kv_policy="recompute")),
}


_MOST_GROUPS = CONFIG.num_slots * CONFIG.max_length // CONFIG.page_size
_encode = jax.jit(encode, static_argnums=2)


@pytest.fixture(scope="module")
def model(tiny_model):
    return first_layers(tiny_model, 1)


@pytest.fixture(scope="module")
def load(model):
    """(prompts, laws) of texts of several pages; two samples of one prompt."""
    rng = np.random.default_rng(1)
    lengths = (40, 33, 7, 52, 18, 40)
    prompts = [rng.integers(0, model.config.vocab_size, n).tolist() for n in lengths]
    laws = [
        SamplingParams(temperature=0.65, seed=i, max_tokens=40, ignore_eos=True)
        for i in range(len(prompts))
    ]
    laws[3] = dataclasses.replace(laws[3], n=2)
    return prompts, laws


def wrong_groups(engine):
    """(groups that drafts may read, those of them whose codes are not of their keys).

    A draft reads the keys that were committed when the last verification began.
    """
    state = jax.device_get(engine.device_steps.state)
    shape, layer = engine.shape, state.layers[0]
    model, policy = engine.model.config, engine.policy
    layout = policy.index_layout(shape.page_size, model.head_dim)
    rows, used, found = [], [], []
    for request in engine.running().values():
        if request.status is not Status.RUNNING:
            continue  # preempted: its table is of another time
        slot = request.slot
        start = int(state.lengths[slot] - state.draft_tails[slot])
        for first in range(0, start, layout.group):
            page = int(state.full_table[slot, first // shape.page_size])
            part = first % shape.page_size // layout.group
            at = slice(part * layout.group, (part + 1) * layout.group)
            rows.append(layer.kv_pages[page, :, at, : model.head_dim])
            heads = model.num_kv_heads
            used.append(np.tile(np.arange(layout.group) < start - first, (heads, 1)))
            found.append(layer.codes[page, :, part])
    if not rows:
        return 0, 0
    count = len(rows)
    missing = _MOST_GROUPS - count
    rows, used = (
        np.pad(np.stack(x), ((0, missing), *[(0, 0)] * x[0].ndim)) for x in (rows, used)
    )
    wanted = np.asarray(_encode(rows, used, layout))[:count]
    return count, int((wanted != np.stack(found)).any((1, 2)).sum())


def decode(model, load, speculation, options):
    """(tokens, groups looked at, wrong ones, the engine) of a whole load.

    A request is preempted now and then where pages are few.
    """
    config = dataclasses.replace(CONFIG, **options)
    engine = ReadableEngine(model, speculation=speculation, engine=config)
    ids = [engine.add_request(*pair) for pair in zip(*load, strict=True)]
    results, looked, wrong, steps = {}, 0, 0, 0
    while engine.has_work:
        results |= {r.request_id: r for r in engine.step()}
        steps += 1
        active = [r for r in engine._scheduler.slots if r is not None]
        if options and len(active) > 2 and steps % 9 == 0:
            engine._scheduler.preempt(active[steps % len(active)])
        if steps % 3 == 0:
            counts = wrong_groups(engine)
            looked, wrong = looked + counts[0], wrong + counts[1]
    return [results[i] for i in sorted(results)], looked, wrong, engine, ids


@pytest.fixture(scope="module")
def plain(model, load):
    config = dataclasses.asdict(CONFIG) | dict(kv_policy="reserve")
    return tokens_of(run(model, *load, engine=config, num_draft_tokens=0))


@pytest.mark.parametrize("name", OPTIONS)
def test_codes_are_those_of_the_keys_that_drafts_select_among(model, load, plain, name):
    results, looked, wrong, engine, _ = decode(model, load, *OPTIONS[name])
    assert tokens_of(results) == plain
    assert looked > 100 and wrong == 0
    if OPTIONS[name][1]:
        usage = engine.kv_usage
        assert usage["preemptions"] > 3
        assert (usage["restored_pages"] > 0) == (name == "offload")


def forget_codes(monkeypatch):
    """Pages come back from host memory without their codes."""
    scatter = offload._scatter_pages

    def forget(pools, chunk, pages):
        return scatter(pools, (chunk[0], jnp.zeros_like(chunk[1])), pages)

    monkeypatch.setattr(offload, "_scatter", jax.jit(forget))


def code_too_late(monkeypatch):
    """Of the keys that a verification committed only the newest are coded."""
    monkeypatch.setattr(StepShape, "most_committed", property(lambda self: 1))


@pytest.mark.parametrize(
    ("fault", "name"), [(forget_codes, "offload"), (code_too_late, "mixed")]
)
def test_a_fault_of_the_index_shows_and_changes_no_token(
    model, load, plain, monkeypatch, fault, name
):
    fault(monkeypatch)
    jax.clear_caches()
    results, looked, wrong, *_ = decode(model, load, *OPTIONS[name])
    assert tokens_of(results) == plain
    assert looked > 100 and wrong > 0
    jax.clear_caches()


@pytest.mark.parametrize("schedule", ["mixed", "aligned"])
def test_drafts_that_select_everything_are_dense(model, load, plain, schedule):
    results = run(
        model,
        *load,
        engine=dataclasses.asdict(CONFIG),
        policy="index",
        budget_ratio=1.0,
        schedule=schedule,
    )
    assert tokens_of(results) == plain
    histogram = results.stats.total.accepted_histogram
    assert histogram[:-1] == [0, 0, 0] and histogram[-1] > 20


def test_an_index_takes_memory_of_the_pages(model):
    def needed(policy):
        speculation = SpeculationConfig(policy=policy)
        shape = sizes.make_shape(speculation, CONFIG, 96, "reference")
        return sizes.bytes_per_page(model.config, shape, jnp.bfloat16, POLICIES[policy])

    config = model.config
    words = config.head_dim * (1 + 1) * config.num_kv_heads  # 8 keys of 4 bits
    assert needed("index") - needed("pillar") == 4 * words
    assert index_step("few", num_channels=8).index is None


def test_what_an_index_cannot_do_is_said_before_work(model):
    speculation = dataclasses.replace(INDEX, scope="layer")
    with pytest.raises(ValueError, match="scope='layer' does not go with"):
        ReadableEngine(model, speculation=speculation, engine=CONFIG)
    shape = sizes.make_shape(INDEX, CONFIG, 96, "gpu_interpret")
    for changes, message in (
        (dict(head_dim=16), "head size is 16"),
        (dict(head_dim=128, num_heads=18, num_kv_heads=2), "9 query heads"),
    ):
        config = dataclasses.replace(model.config, **changes)
        rest = shape, "kv_head", jnp.bfloat16, "gpu_interpret"
        with pytest.raises(ValueError, match=message):
            check_index(POLICIES["index"], config, *rest)


@pytest.mark.slow
def test_kernels_of_a_gpu_draft_as_the_reference_does(gpu_model):
    """Interpreted: codes, selection and copies of a whole cycle, and the text."""
    prompt = np.random.default_rng(0).integers(0, 97, 30).tolist()
    law = SamplingParams(temperature=0.65, seed=0, max_tokens=9, ignore_eos=True)

    def decoded(impl, **options):
        engine = dict(num_slots=1, page_size=8, max_length=48, prefill_chunk=32)
        results = run(
            gpu_model, [prompt], [law], engine=engine | dict(impl=impl), **options
        )
        return tokens_of(results), results.stats.total.accepted_histogram

    options = dict(policy="index", num_draft_tokens=2, budget_ratio=0.3)
    text, accepted = decoded("gpu_interpret", **options)
    expected, wanted = decoded("reference", **options)
    assert text == expected and accepted == wanted
    assert text == decoded("reference", num_draft_tokens=0)[0]
