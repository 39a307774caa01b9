"""Steps of aligned cycles are those of the engine, and 8-bit products are products."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import aligned_steps, int8_product, made_up, models, row_bits
from pallas_kernels import int8_matmul
from pallas_kernels.aot import compile_for
from pallas_kernels.int8_matmul.tiling import Tiling
from sparsespec_jax import EngineConfig, SpeculationConfig, sizes
from sparsespec_jax.device.context import step_options
from sparsespec_jax.device.state import new_state
from sparsespec_jax.models import transformer as model
from sparsespec_jax.models.config import PRESETS
from sparsespec_jax.plan.buffer import StepPlan
from sparsespec_jax.plan.outcome import StepOutcome
from sparsespec_jax.policies.select import resolve_policy
from sparsespec_jax.tuning import calibrate
from sparsespec_jax.tuning.calibrate import run_plan

K, LENGTH, NEW = 3, 40, 9
PRODUCTS = dict.fromkeys(aligned_steps.PRODUCTS, int8_product.Xla())


@pytest.fixture(scope="module")
def engine():
    tiny = models.tiny_model()
    return aligned_steps.AlignedEngine(
        tiny,
        speculation=SpeculationConfig(
            num_draft_tokens=K,
            draft_token_choices=(0,),
            budget_ratio=0.5,
            min_budget=3,
        ),
        engine=EngineConfig(num_slots=3, page_size=4, max_length=200),
        quantised=aligned_steps.quantise(tiny.config, tiny.params),
        products=PRODUCTS,
    )


def start(engine, weights="bfloat16"):
    engine.draft_with(weights)
    calibrate.made_up_cycle(engine, K, LENGTH)
    made_up.fill_pages(engine)
    engine.device_steps.replace_state(tokens=jnp.zeros((3, K + 1), jnp.int32))


def emitted(engine, plan):
    outcome = StepOutcome.from_packed(run_plan(engine, plan), plan_queries(plan))
    return [
        tokens[:count].tolist()
        for tokens, count in zip(outcome.tokens, outcome.num_emitted, strict=True)
    ]


def plan_queries(plan):
    shape = getattr(plan.shape, "verify", plan.shape)
    return shape.num_queries


@pytest.fixture(scope="module")
def plain_text(engine):
    start(engine)
    plan = aligned_steps.plan_of(engine, engine.shape.with_draft_tokens(0))
    texts = [[], [], []]
    for _ in range(NEW):
        for text, new in zip(texts, emitted(engine, plan), strict=True):
            text += new
    return texts


@pytest.mark.parametrize(
    ("weights", "is_one_program"), [("bfloat16", False), ("int8", True)]
)
def test_aligned_cycles_write_the_text_of_plain_decoding(
    engine, plain_text, weights, is_one_program
):
    start(engine, weights)
    draft = aligned_steps.draft_shape(engine.shape)
    verify = aligned_steps.verify_shape(engine.shape, K)
    assert (verify.draft_lanes + verify.verify_lanes * (K + 1)) % 8 == 0
    draft_plan, verify_plan, cycle_plan = (
        aligned_steps.plan_of(engine, shape)
        for shape in (draft, verify, aligned_steps.CycleShape(draft, verify))
    )
    texts = emitted(engine, verify_plan)  # fills the draft caches
    assert all(len(text) == 1 for text in texts)
    num_accepted = []
    while min(map(len, texts)) < NEW:
        if is_one_program:
            new = emitted(engine, cycle_plan)
        else:
            for i in range(K):
                drafted = np.asarray(run_plan(engine, draft_plan))
                assert drafted.tolist() == [i + 1] * 3
            new = emitted(engine, verify_plan)
        for text, more in zip(texts, new, strict=True):
            text += more
            num_accepted.append(len(more) - 1)
    assert [text[:NEW] for text in texts] == plain_text
    assert max(num_accepted) > 0  # drafts of a half of the context agree at times


def test_a_draft_step_reads_the_draft_caches_alone(engine):
    start(engine)
    verify = aligned_steps.verify_shape(engine.shape, K)
    emitted(engine, aligned_steps.plan_of(engine, verify))
    before = [np.asarray(layer.kv_pages) for layer in engine.device_steps.state.layers]
    draft = aligned_steps.draft_shape(engine.shape)
    run_plan(engine, aligned_steps.plan_of(engine, draft)).block_until_ready()
    after = [np.asarray(layer.kv_pages) for layer in engine.device_steps.state.layers]
    draft_pages = set(
        np.asarray(engine.device_steps.state.draft_table).ravel().tolist()
    )
    for old, new in zip(before, after, strict=True):
        changed = np.nonzero((old != new).any((1, 2, 3)))[0]
        assert len(changed) == 3 and set(changed.tolist()) <= draft_pages


def test_8_bit_products_of_a_model_are_those_of_its_rounded_weights(tiny_model):
    config, params = tiny_model.config, tiny_model.params
    quantised = aligned_steps.quantise(config, params)
    rounded = jax.tree.map(lambda x: x, params)
    for name, weights in quantised.items():
        if name == "lm_head":
            continue
        for product, weight in weights.items():
            kernel = params[name][product]["kernel"]
            wide = (weight.values * weight.scale[:, None]).T.reshape(kernel.shape)
            assert jnp.abs(wide - kernel).max() <= jnp.abs(kernel).max() / 200
            rounded[name] = rounded[name] | {product: {"kernel": wide}}
    tokens = jnp.arange(5, dtype=jnp.int32)
    caches = (None,) * config.num_layers
    args = tokens, tokens, model.causal_attend, caches
    hidden, _ = model.forward(config, rounded, *args)
    head = quantised["lm_head"]
    expected = hidden @ (head.values * head.scale[:, None]).T
    scores, _ = aligned_steps.int8_forward(
        config, params, quantised, *args, impl="reference", products=PRODUCTS
    )
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-5)


def test_a_packed_weight_goes_to_the_kernel_alone():
    weight = int8_matmul.Int8Weight(jnp.ones((64, 128), jnp.int8), jnp.ones(64))
    packed = int8_matmul.pack(weight, impl="gpu")
    with pytest.raises(ValueError, match="does not take a PackedWeight"):
        int8_product.multiply(jnp.ones((8, 128)), packed, int8_product.Xla(), "float32")


def test_parts_of_an_8_bit_product_sum_to_it():
    x = jax.random.normal(jax.random.key(0), (8, 96))
    weight = int8_matmul.quantise(jax.random.normal(jax.random.key(1), (96, 24)))
    whole = int8_product.multiply(x, weight, int8_product.Xla(), jnp.float32)
    parts = int8_product.multiply(x, weight, int8_product.Xla(parts=3), jnp.float32)
    assert parts.shape == (3, 8, 24)
    np.testing.assert_allclose(parts.sum(0), whole, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="parts=5"):
        int8_product.multiply(x, weight, int8_product.Xla(parts=5), jnp.float32)


@pytest.mark.usefixtures("optimized_programs")
def test_a_step_of_8_bit_drafts_compiles_in_place_for_a_gpu():
    pytest.importorskip("jax_cuda13_plugin")
    config = dataclasses.replace(PRESETS["qwen3-1.7b"], num_layers=2, vocab_size=1024)
    speculation = SpeculationConfig()
    shape = sizes.make_shape(
        speculation, EngineConfig(num_slots=8, page_size=64), 2000, "gpu"
    )
    policy = resolve_policy("pillar")
    state = jax.eval_shape(
        functools.partial(
            new_state, config, shape, kv_dtype=jnp.bfloat16, draft_top_m=0,
            policy=policy,
        )
    )  # fmt: skip
    params = model.param_shapes(config, jnp.bfloat16)
    quantised = jax.eval_shape(
        functools.partial(aligned_steps.quantise, config, is_packed=True), params
    )
    products = dict.fromkeys(aligned_steps.PRODUCTS, Tiling(groups=2))
    step = aligned_steps.draft_shape(shape)
    program = aligned_steps._program(
        step,
        config=config,
        policy=policy,
        options=step_options(speculation),
        impl="gpu",
        products=tuple(sorted(products.items())),
    )
    size = StepPlan.empty(step, prefill=False).buffer.size
    compiled = compile_for(
        "h100",
        functools.partial(program.__wrapped__, prefill=False),
        (params, quantised),
        state,
        jax.ShapeDtypeStruct((size,), jnp.int32),
        donate_argnums=1,
    )
    pool_bytes = state.layers[0].kv_pages.size * 2
    assert compiled.temp_bytes < pool_bytes / 4
    assert compiled.alias_bytes >= 2 * pool_bytes
    text = compiled.compiled.as_text()
    assert len(re.findall(r" custom-call\(.*jit\(int8_matmul_gpu\)", text)) == 2 * 4 + 1


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--loads=64x2560x3", "loads are slots x context"),
        ("--product_rows=20", "multiples of 8"),
    ],
)
def test_a_wrong_option_is_named_at_once(parent, option, message, tmp_path):
    output = f"--output={tmp_path / 'out'}"
    done = parent.run_module("experiments.aligned_probe", option, output)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("form", ["batched", "dot", "separate"])
def test_rows_that_depend_on_their_number_are_found(form):
    kernel = jax.random.normal(jax.random.key(0), (12, 5))
    x = jax.random.normal(jax.random.key(1), (16, 12))

    def run(x, kernel, factor=1.0):
        parts = 1 if form == "dot" else 3
        return factor * row_bits.product(x, kernel, parts=parts, form=form)

    np.testing.assert_allclose(run(x, kernel).sum(0), x @ kernel, rtol=1e-5, atol=1e-5)
    tied = row_bits.product(x, kernel.T, parts=3, form=form, is_tied=True)
    np.testing.assert_allclose(tied.sum(0), x @ kernel, rtol=1e-5, atol=1e-5)

    def of_number(x, kernel):
        return run(x, kernel, 1.0 + len(x) * 2.0**-20)

    found = row_bits.bits_of(of_number, x, [kernel], [1, 8, 16])["differ"]
    assert found[8] == 0 and found[1] > 0 and found[16] > 0
