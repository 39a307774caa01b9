"""Drafts by weights in 8 bits: what they are, and that they change no token."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.models import tiny_model as make_tiny_model
from pallas_kernels.int8_matmul import quantise
from sparsespec_jax import Engine, EngineConfig, SamplingParams, SpeculationConfig
from sparsespec_jax import sizes as sizes_lib
from sparsespec_jax.models import draft_weights
from sparsespec_jax.models import transformer as model_lib
from tests.engine_helpers import ENGINE, SPECULATION, run, tokens_of

INT8 = dict(schedule="aligned", draft_weights="int8")


def rounded(kernel):
    """What a kernel [in, ...] is in 8 bits, in its own shape and dtype."""
    values, scale = quantise(kernel)
    return (values.T * scale).reshape(kernel.shape).astype(kernel.dtype)


def scores_of(config, params, *, impl="reference", in_8_bits):
    """Logits float32 [T, V] of one text, as a draft pass makes them."""
    tokens = jnp.arange(1, 8) * 5 % config.vocab_size
    hidden, _, _ = model_lib.forward_with_features(
        config, params, tokens, jnp.arange(7), model_lib.causal_attend,
        (None,) * config.num_layers, impl=impl, in_8_bits=in_8_bits,
    )  # fmt: skip
    return model_lib.logits(config, params, hidden, impl=impl, in_8_bits=in_8_bits)


@pytest.mark.parametrize(
    "options",
    [
        dict(tie_embeddings=True, qk_norm=True),
        dict(tie_embeddings=False, attention_bias=True, mlp_bias=True),
        dict(tie_embeddings=False, attention_out_bias=True),
    ],
)
def test_products_are_those_of_rounded_kernels(tiny_model, options):
    config = dataclasses.replace(tiny_model.config, **options)
    params = model_lib.init_params(config, 0)
    drafts = draft_weights.in_8_bits(config, params, impl="reference")
    wanted = jax.tree_util.tree_map_with_path(
        lambda path, x: rounded(x) if path[-1].key == "kernel" else x, params
    )
    if config.tie_embeddings:  # the table itself stays: drafts look tokens up in it
        head = {"kernel": rounded(params["embed"]["weight"].T)}
        untied = dataclasses.replace(config, tie_embeddings=False)
        right = scores_of(untied, wanted | {"lm_head": head}, in_8_bits=False)
    else:
        right = scores_of(config, wanted, in_8_bits=False)
    found = scores_of(config, drafts, in_8_bits=True)
    np.testing.assert_allclose(found, right, atol=1e-4)
    full = scores_of(config, params, in_8_bits=False)
    assert 1e-3 < float(jnp.abs(found - full).max()) < 1.0
    shared = draft_weights.in_8_bits(config, params, impl="reference")["embed"]
    assert shared["weight"] is params["embed"]["weight"]


def test_kernels_of_a_gpu_make_the_products_of_the_reference(gpu_model):
    """Interpreted: parts that the next kernel sums, and scores in float32."""
    config = dataclasses.replace(gpu_model.config, vocab_size=128)
    params = model_lib.init_params(config, 0, jnp.bfloat16)
    found, wanted = (
        scores_of(
            config, draft_weights.in_8_bits(config, params, impl=impl), impl=impl,
            in_8_bits=True,
        )
        for impl in ("gpu_interpret", "reference")
    )  # fmt: skip
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, wanted, atol=0.1)


@pytest.fixture(scope="module")
def plain(tiny_model, prompts):
    return run(tiny_model, prompts, num_draft_tokens=0)


@pytest.mark.parametrize(
    "speculation, engine",
    [
        (dict(num_draft_tokens=8, min_budget=1), dict(num_slots=9, lag=2)),
        (dict(), dict(num_pages=40, lag=0, kv_policy="recompute")),
    ],
)
def test_drafts_in_8_bits_change_no_token(
    tiny_model, prompts, plain, speculation, engine
):
    got = run(tiny_model, prompts, engine=engine, **speculation, **INT8)
    assert tokens_of(got) == tokens_of(plain)
    assert got.stats.total.num_accepted_draft_tokens > 0


@pytest.mark.usefixtures("optimized_programs")  # thousands of steps
def test_ten_thousand_cycles_of_worthless_drafts_change_nothing(tiny_model):
    """Weights of drafts are noise, and some of their scores are no numbers."""
    noise = np.random.default_rng(2)

    def spoil(path, x):
        if path[-1].key == "values":
            return jnp.asarray(noise.integers(-127, 128, x.shape), jnp.int8)
        return x.at[::7].set(jnp.nan) if path[-2].key == "lm_head" else x

    engine = Engine(
        tiny_model,
        speculation=dataclasses.replace(SPECULATION, num_draft_tokens=2, **INT8),
        engine=EngineConfig(num_slots=16, page_size=8, max_length=600),
    )
    name = draft_weights.DRAFT_WEIGHTS
    spoilt = jax.tree_util.tree_map_with_path(spoil, engine.params[name])
    engine.params = engine.params | {name: spoilt}
    rng, vocab = np.random.default_rng(1), tiny_model.config.vocab_size
    requests, results, cycles = {}, [], 0
    while cycles < 10_000:
        while len(requests) - len(results) < 16:
            law = SamplingParams(
                temperature=float(rng.choice([0, 0.65, 1])),
                seed=int(rng.integers(1 << 30)),
                max_tokens=int(rng.integers(1, 500)),
            )
            prompt = rng.integers(0, vocab, rng.integers(1, 40)).tolist()
            requests[engine.add_request(prompt, law)] = prompt, law
        finished = engine.step()
        results += finished
        cycles += sum(r.metrics.num_verify_steps for r in finished)
    expected = run(
        tiny_model,
        *zip(*(requests[r.request_id] for r in results), strict=True),
        num_draft_tokens=0,
        engine=dict(num_slots=16, page_size=8, max_length=600),
    )
    assert tokens_of(results) == tokens_of(expected)
    accepted = sum(r.metrics.num_accepted_draft_tokens for r in results)
    assert accepted < cycles / 4


def test_new_weights_are_new_drafts(tiny_model):
    """And the target's alone are compared with those in use."""
    params = model_lib.init_params(tiny_model.config, 5)
    other = dataclasses.replace(tiny_model, params=params)
    speculation = dataclasses.replace(SPECULATION, **INT8)
    engine = Engine(tiny_model, speculation=speculation, engine=EngineConfig())
    engine.update_params(other.params)
    wanted = draft_weights.in_8_bits(other.config, other.params, impl="reference")
    found = engine.params[draft_weights.DRAFT_WEIGHTS]
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert np.array_equal(a, b)
    with pytest.raises(ValueError, match="embed.weight"):
        engine.update_params({"embed": {"weight": jnp.zeros(3)}})


def test_bytes_are_counted_and_refused(tiny_model, monkeypatch):
    config, params = tiny_model.config, tiny_model.params
    made = draft_weights.in_8_bits(config, params, impl="reference")
    own = {id(x) for x in jax.tree.leaves(params)}
    new = [x for x in jax.tree.leaves(made) if id(x) not in own]
    counted = draft_weights.num_bytes(config, params, impl="reference")
    assert counted == sum(x.nbytes for x in new) > 0
    speculation = dataclasses.replace(SPECULATION, schedule="aligned")
    engine = dataclasses.replace(ENGINE, max_length=64)
    shape = sizes_lib.resolve(tiny_model, speculation, engine).shape
    page = sizes_lib.pool_bytes_per_page(config, shape.page_size, jnp.float32)
    room = int((shape.num_pages * page + counted / 2) / sizes_lib._MEMORY_SHARE)
    monkeypatch.setattr(sizes_lib, "free_memory_bytes", lambda degree=1: room)
    sizes_lib.resolve(tiny_model, speculation, engine)
    speculation = dataclasses.replace(speculation, draft_weights="int8")
    with pytest.raises(ValueError, match=f"beside {counted} bytes of draft weights"):
        sizes_lib.resolve(tiny_model, speculation, engine)


def test_what_cannot_be_is_refused():
    for options, message in (
        (dict(draft_weights="int8"), "need schedule='aligned': a mixed step verifies"),
        (dict(INT8, proposer="ngram"), "proposer='ngram' makes its own: use proposer="),
        (
            dict(INT8, draft_weights="int4"),
            r"must be one of \('int8', 'auto'\), got 'int4'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            SpeculationConfig(**options)
    config = dataclasses.replace(make_tiny_model().config, vocab_size=128)
    with pytest.raises(ValueError, match="with 300 draft rows a step: .*lower num_sl"):
        draft_weights.check_served(config, 300, jnp.bfloat16, "gpu")
    draft_weights.check_served(config, 300, jnp.float32, "gpu")
