"""numerics="exact": what makes the bits of a row its own, part by part."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.models import TINY
from pallas_kernels.paged_attention import LaneGroup
from sparsespec_jax import Engine, EngineConfig, SpeculationConfig, sampling, sizes
from sparsespec_jax.device import attention_probe, row_probe
from sparsespec_jax.device.lanes import token_rows
from sparsespec_jax.host.feeding import Feeding
from sparsespec_jax.models import products
from sparsespec_jax.models.config import PRESETS
from sparsespec_jax.models.products import HEADS_CUTS, Projection, exact_parts
from sparsespec_jax.models.transformer import causal_attend, forward, init_params
from tests.fake_device import make_request, make_shape

QWEN = PRESETS["qwen3-8b"]


@pytest.mark.parametrize(
    ("size_in", "size_out", "parts"),
    [
        (4096, 6144, 2),  # Qwen3-8B: heads, out, gate and up, down, vocabulary
        (4096, 4096, 4),
        (4096, 24576, 1),
        (12288, 4096, 6),
        (4096, 151936, 1),
        (1536, 2048, 3),  # Qwen2.5-1.5B
        (1536, 1536, 3),
        (8960, 1536, 7),
        (1536, 17920, 1),
        (576, 960, 3),  # SmolLM2-135M
        (1536, 576, 4),
        (96, 64, 1),  # too short to be cut
    ],
)
def test_parts_follow_from_the_weight_alone(size_in, size_out, parts):
    """Parts that an H200 left whole are chosen, none that it cut."""
    assert exact_parts(size_in, size_out) == parts


# (length of a part, columns, parts) of experiments/results/row_bits_h200.json whose
# bits moved with the number of rows.
CUT_BY_XLA = [
    (4096, 6144, 1), (4096, 4096, 1), (2048, 4096, 2), (12288, 4096, 1),
    (3072, 4096, 4), (768, 1536, 2), (8960, 1536, 1), (1792, 1536, 5),
]  # fmt: skip


@pytest.mark.parametrize(("length", "size_out", "parts"), CUT_BY_XLA)
def test_no_part_that_moved_is_chosen(length, size_out, parts):
    assert exact_parts(length * parts, size_out) != parts


def test_a_weight_without_an_exact_form_is_refused():
    with pytest.raises(ValueError, match=r"\[1000, 64\] has no exact form: use numer"):
        exact_parts(1000, 64)
    config = dataclasses.replace(QWEN, vocab_size=512)
    with pytest.raises(ValueError, match="a vocabulary of 512 tokens behind 4096"):
        products.check_products(config)
    products.check_products(QWEN)


@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 9])
@pytest.mark.parametrize("size_out", [256, 32768])
def test_exact_products_are_products(rows, size_out, use_bias):
    """Numbers small enough that every order of the sum gives the same."""
    rng = np.random.default_rng(0)
    x = rng.integers(-3, 4, (rows, 1024)).astype(jnp.bfloat16)
    kernel = rng.integers(-3, 4, (1024, size_out)).astype(jnp.bfloat16)
    bias = rng.integers(-3, 4, size_out).astype(jnp.bfloat16)
    params = {"kernel": kernel} | ({"bias": bias} if use_bias else {})
    wanted = x.astype(np.float32) @ kernel.astype(np.float32)
    wanted = wanted + use_bias * bias.astype(np.float32)
    for cuts in (None, HEADS_CUTS):
        project = Projection((size_out,), jnp.bfloat16, use_bias, cuts=cuts, exact=True)
        got = project.apply({"params": params}, x)
        if cuts and not use_bias:  # left to the kernel that takes it
            assert got.dtype == jnp.float32 and got.shape[0] == exact_parts(
                1024, size_out
            )
            got = got.sum(0)
        else:
            assert got.dtype == jnp.bfloat16
        np.testing.assert_array_equal(
            np.asarray(got.astype(jnp.bfloat16)), wanted.astype(jnp.bfloat16)
        )


@pytest.mark.parametrize("size", [1, 2, 5, 97, 1000])
def test_row_sums_have_one_order(size):
    rng = np.random.default_rng(size)
    values = rng.normal(size=(7, size)).astype(np.float32)
    got = np.asarray(jax.jit(sampling.row_sums, static_argnames="exact")(
        jnp.asarray(values), exact=True
    ))  # fmt: skip

    def halves(row):  # by hand: numpy adds single numbers
        row = [*row, *[np.float32(0)] * ((1 << (size - 1).bit_length()) - size)]
        while len(row) > 1:
            half = len(row) // 2
            row = [a + b for a, b in zip(row[:half], row[half:], strict=True)]
        return row[0]

    np.testing.assert_array_equal(got, [halves(row) for row in values])
    loose = sampling.row_sums(jnp.asarray(values), exact=False)
    np.testing.assert_allclose(got, loose, rtol=1e-5, atol=1e-5)


def test_fast_models_need_no_exact_form():
    """1,000 is no multiple of 64: exact products are refused, fast ones are not."""
    config = dataclasses.replace(TINY, hidden_size=1000, num_layers=1)
    with pytest.raises(ValueError, match="has no exact form"):
        products.check_products(config)
    tokens = jnp.arange(3)
    hidden, _ = forward(
        config, init_params(config, seed=0), tokens, tokens, causal_attend, (None,)
    )
    assert hidden.shape == (3, 1000)


def test_exact_laws_are_the_laws():
    rng = np.random.default_rng(1)
    logits = jnp.asarray(rng.normal(size=(6, 301)) * 3, jnp.float32)
    law = sampling.Law(
        seed=jnp.asarray(rng.integers(0, 2**32, (6, 2)), jnp.uint32),
        temperature=jnp.asarray([0, 0.65, 1, 1, 0.5, 2], jnp.float32),
        top_k=jnp.asarray([0, 5, 0, 40, 0, 3], jnp.int32),
        top_p=jnp.asarray([1, 0.9, 0.5, 1, 0.8, 1], jnp.float32),
        min_p=jnp.asarray([0, 0, 0, 0.1, 0.05, 0], jnp.float32),
        processed_logprobs=jnp.asarray([0, 1, 1, 1, 0, 1], bool),
    )
    places = jnp.arange(6, dtype=jnp.int32)
    tokens = sampling.choose(logits, law, places, filters=True)
    again = sampling.choose(logits, law, places, filters=True, exact=True)
    np.testing.assert_array_equal(tokens, again)
    loose = sampling.logprobs(logits, law, tokens, filters=True)
    exact = sampling.logprobs(logits, law, tokens, filters=True, exact=True)
    np.testing.assert_allclose(exact, loose, atol=1e-5)


def test_feeding_by_hand():
    """A prompt of 9 tokens and 7 emitted ones, k = 3: rows of 4."""
    shape = make_shape(slots=2, k=3, pages=40)
    request = make_request(0, 9, 20)
    request.tokens.extend(range(100, 107))
    fast, exact = Feeding(exact=False), Feeding(exact=True)
    assert fast.prefill_target(request, shape) == 16 - 4
    assert fast.next_seed(request, shape)[0] == 12
    assert exact.prefill_target(request, shape) == 8
    assert exact.next_chunk(request, shape) == (0, 8)
    request.prefilled = 8
    start, tail, is_last = exact.next_seed(request, shape)
    assert (start, list(tail), is_last) == (8, [8, 100, 101, 102], False)
    request.prefilled = 12
    start, tail, is_last = exact.next_seed(request, shape)
    assert (start, list(tail), is_last) == (12, [103, 104, 105, 106], True)
    # Pages of 4: the token behind the prompt's first 8 is fed by every sample.
    assert exact.num_shared_pages(request, shape) == 2
    assert fast.num_shared_pages(request, shape) == 1


def resolved(gpu_model, impl="gpu_interpret", dtype=jnp.bfloat16, **options):
    params = jax.tree.map(lambda x: x.astype(dtype), gpu_model.params)
    model = dataclasses.replace(gpu_model, params=params)
    config = dict(numerics="exact", prefill_chunk=128, impl=impl, max_length=64)
    return sizes.resolve(
        model,
        SpeculationConfig(min_budget=4),
        EngineConfig(**config | options),
    )


def test_what_cannot_be_exact_is_refused_by_name(gpu_model):
    assert resolved(gpu_model).exact
    assert not resolved(gpu_model, numerics="fast").exact
    for message, options in {
        "needs kernels for GPUs, this engine has 'reference'": dict(impl="reference"),
        "bfloat16 weights, these are float32": dict(dtype=jnp.float32),
        "prefill_chunk above 64, got 64": dict(prefill_chunk=64),
    }.items():
        with pytest.raises(ValueError, match=message + ".*use numerics='fast'"):
            resolved(gpu_model, **options)
    with pytest.raises(ValueError, match="numerics must be one of .*'precise'"):
        EngineConfig(numerics="precise")


# -- the look before -------------------------------------------------------------------


SHAPES = [make_shape(slots=4, k=k, pages=40, chunk=66) for k in (0, 3)]


def probe(gpu_model):
    options = dict(impl="gpu_interpret", compiler_options={})
    row_probe.check_rows(gpu_model.config, gpu_model.params, SHAPES, **options)


def test_the_steps_of_an_engine_are_tried():
    # Plain: 4 tokens. k = 3: a lane of 4 rows, and drafts. Both with chunks, without.
    scored = [token_rows(shape).verify.stop for shape in SHAPES]
    assert scored[0] == 4 and scored[1] > 4
    wanted = {(72, 128)} | {(n, c) for n in scored for c in (0, 66)}
    assert set(row_probe.numbers_of_rows(SHAPES)) == wanted


@pytest.mark.parametrize("part", row_probe.PARTS + row_probe.PROMPT_PARTS)
@pytest.mark.parametrize("size", [70, 200])
def test_a_part_that_depends_on_the_number_of_rows_is_named(
    gpu_model, monkeypatch, part, size
):
    """One bit of one row of one part, in steps of one size; the parts before agree."""

    def rows(params, tokens, positions, *, num_prompt, **options):
        names = row_probe.PARTS + row_probe.PROMPT_PARTS * (num_prompt > 0)
        parts = {name: np.ones((4, 5), np.float32) for name in names}
        if len(tokens) == size and is_planted:
            parts[part].view(np.int32)[3, 2] ^= 1
        return parts

    monkeypatch.setattr(row_probe, "_rows", rows)
    is_planted = False
    probe(gpu_model)
    is_planted = True
    name = re.escape(part)
    with pytest.raises(RuntimeError, match=f"kept: {name} of a.*use numerics='fast'"):
        probe(gpu_model)


def test_every_step_is_tried_with_the_same_first_tokens(gpu_model):
    many = row_probe._inputs(gpu_model.config, 600, 300)
    for count, prompts in ((1, 0), (8, 66), (72, 128)):
        few = row_probe._inputs(gpu_model.config, count, prompts)
        for found, wanted in zip(few, many, strict=True):
            np.testing.assert_array_equal(found[:count], wanted[:count])
            np.testing.assert_array_equal(found[count:], wanted[600 : 600 + prompts])
    assert len(set(many[0])) > 50 and len(set(many[1])) > 300


@pytest.fixture
def fresh_probe():
    row_probe._compiled.cache_clear()
    yield
    row_probe._compiled.cache_clear()


def test_rows_that_stand_alone_pass(gpu_model, fresh_probe):
    probe(gpu_model)


def test_a_cut_that_depends_on_the_number_of_rows_is_named(
    gpu_model, fresh_probe, monkeypatch
):
    """A real product of a real step, not a part made up."""
    contract = products.contract

    def cut(x, kernel, out_dtype, *, axis=0, exact=False):
        if len(x) < 72 or axis:
            return contract(x, kernel, out_dtype, axis=axis, exact=exact)
        flat = kernel.reshape(len(kernel), -1)
        # Each part as bfloat16 has it, whatever a compiler thinks of excess precision.
        y = jax.lax.reduce_precision(products.contract_in_parts(x, flat, 2), 8, 7).sum(
            0
        )
        return y.reshape(len(x), *kernel.shape[1:]).astype(out_dtype)

    monkeypatch.setattr(products, "contract", cut)
    engine = EngineConfig(
        numerics="exact", prefill_chunk=128, impl="gpu_interpret", max_length=64,
        num_slots=2,
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="cannot be kept: queries .*numerics='fast'"):
        Engine(gpu_model, engine=engine)


# -- attention -------------------------------------------------------------------------


@pytest.fixture
def short_pieces(monkeypatch):
    """Attention of pieces of 64 keys, quick to interpret."""
    everywhere = {"verify": LaneGroup(1, 3, 64), "prefill": LaneGroup(1, 66, 64)}
    for name, value in dict(PIECE=64, _VISIBLE=133, _EVERYWHERE=everywhere).items():
        monkeypatch.setattr(attention_probe, name, value)


def look_at_attention(gpu_model, chunk=66):
    shape = make_shape(slots=3, k=2, pages=40, page_size=64, chunk=chunk)
    options = dict(impl="gpu_interpret", compiler_options={})
    attention_probe.check_attention(gpu_model.config, [shape], **options)


def test_attention_that_stands_alone_passes(gpu_model, short_pieces):
    look_at_attention(gpu_model)


def test_chunks_may_be_longer_than_what_a_compared_row_sees(
    gpu_model, short_pieces, monkeypatch
):
    seen = []

    def compiled(groups, impl, options):
        def run(queries, pool, pages, lengths, counts):
            seen.append((lengths, counts, pages.shape[1] * pool.shape[2]))
            return np.ones(queries.shape, np.float32)

        return run

    monkeypatch.setattr(attention_probe, "_compiled", compiled)
    look_at_attention(gpu_model, chunk=200)
    assert max(counts.max() for _, counts, _ in seen) == 200
    for lengths, counts, room in seen:
        assert (lengths >= counts).all() and lengths.max() <= room


@pytest.mark.parametrize("part", ["verify", "prefill"])
@pytest.mark.parametrize("cause", ["a neighbour", "rows of its own lane", "the step"])
def test_attention_that_depends_on_others_is_named(
    gpu_model, short_pieces, monkeypatch, part, cause
):
    """One bit of the compared row, if the cause is there."""
    place = {"verify": 1, "prefill": 2}[part]  # the lanes of the step before

    def compiled(groups, impl, options):
        starts = np.cumsum([0, *(g.num_lanes * g.num_queries for g in groups)])
        lanes = np.cumsum([0, *(g.num_lanes for g in groups)])

        def run(queries, pool, pages, lengths, counts):
            out = np.ones(queries.shape, np.float32)
            if len(groups) < 3:
                return out  # of what every engine tries, or a step without chunks
            lane = lanes[place]
            others = np.delete(counts, [lanes[1], lanes[2]])
            is_there = {
                "a neighbour": others.any(),
                "rows of its own lane": counts[lane] > 1,
                "the step": True,
            }[cause]
            out.view(np.int32)[starts[place], 1, 5] ^= int(is_there)
            return out

        return run

    monkeypatch.setattr(attention_probe, "_compiled", compiled)
    name = attention_probe.PARTS[part]
    beside = {"a neighbour": "among others", "the step": "alone"}.get(cause, "")
    with pytest.raises(RuntimeError, match=f"kept: {name} has other bits {beside}"):
        look_at_attention(gpu_model)
