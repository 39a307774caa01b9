"""The model against logits that transformers computed (tests/make_goldens.py)."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from sparsespec_jax.loading.hf_weights import load_hf
from sparsespec_jax.models import products
from sparsespec_jax.models.config import (
    PRESETS,
    LinearScaling,
    Llama3Scaling,
    ModelConfig,
    YarnScaling,
    config_from_json,
    config_to_json,
)
from sparsespec_jax.models.transformer import (
    causal_attend,
    forward,
    forward_with_features,
    init_params,
    logits,
    param_shapes,
)

GOLDENS = Path(__file__).parent / "goldens"
FAMILIES = sorted(path.parent.name for path in GOLDENS.glob("*/expected.npz"))
TOLERANCE = 1e-4
# A wrong formula moves logits (spread 1.5 to 6) by far more than this.
VISIBLE = 1e-2


@functools.cache
def load(name):
    return load_hf(GOLDENS / name, dtype=jnp.float32)


@functools.partial(jax.jit, static_argnames=("config", "attend"))
def run_model(config, params, tokens, positions, *, attend):
    caches = (None,) * config.num_layers
    hidden, _ = forward(config, params, tokens, positions, attend, caches)
    return logits(config, params, hidden)


def compute_logits(config, params, tokens, positions, attend=causal_attend):
    return np.asarray(run_model(config, params, tokens, positions, attend=attend))


def golden(name):
    with np.load(GOLDENS / name / "expected.npz") as expected:
        return tuple(expected[key] for key in ("tokens", "positions", "logits"))


def worst_error(config, params, name):
    """Largest error over consecutive and over far-apart positions."""
    tokens, positions, wanted = golden(name)
    found = [compute_logits(config, params, tokens, row) for row in positions]
    return [float(np.abs(f - w).max()) for f, w in zip(found, wanted, strict=True)]


def test_goldens_cover_what_the_families_differ_in():
    configs = [load(name)[0] for name in FAMILIES]
    assert {c.family for c in configs} == {"llama", "qwen2", "qwen3", "mistral"}
    assert {type(c.rope_scaling) for c in configs} == {
        type(None),
        LinearScaling,
        Llama3Scaling,
        YarnScaling,
    }
    assert {c.head_dim for c in configs} >= {64, 128}
    assert {c.group_size for c in configs} >= {2, 3}
    for flag in (
        "tie_embeddings",
        "qk_norm",
        "attention_bias",
        "attention_out_bias",
        "mlp_bias",
    ):
        assert {getattr(c, flag) for c in configs} == {True, False}, flag


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_those_of_transformers(name):
    config, params = load(name)
    near, far = worst_error(config, params, name)
    print(f"{name}: {near:.2e} at consecutive positions, {far:.2e} far apart")
    assert max(near, far) <= TOLERANCE


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_stays_near_the_float32_logits(name):
    config, params = load_hf(GOLDENS / name, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    tokens, positions, wanted = golden(name)
    found = compute_logits(config, params, tokens, positions[0])
    assert found.dtype == np.float32
    # bfloat16 keeps 8 bits: errors of some percent of the spread.
    error = np.abs(found - wanted[0])
    assert error.mean() < 0.03 * wanted.std()


FAULTS = {
    "llama3_rope": {"rope_scaling": None},
    "llama_biases_linear_rope": {"rope_scaling": LinearScaling(factor=2.0)},
    "qwen3": {"norm_eps": 1e-2},
    "qwen3_yarn": {
        "rope_scaling": YarnScaling(
            factor=4.0, original_max_length=256, attention_factor=1.0
        )
    },
    "mistral": {"rope_theta": 20_000.0},
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_wrong_configuration_shows_in_the_goldens(name):
    config, params = load(name)
    wrong = dataclasses.replace(config, **FAULTS[name])
    assert max(worst_error(wrong, params, name)) > VISIBLE


def test_swapped_heads_show_in_the_goldens():
    config, params = load("llama3_rope")
    kernel = params["layer_1"]["qkv"]["kernel"]
    swapped = {"kernel": kernel[:, :, jnp.array([1, 0, 2, 3, 4])]}
    layer = {**params["layer_1"], "qkv": swapped}
    wrong = {**params, "layer_1": layer}
    assert max(worst_error(config, wrong, "llama3_rope")) > VISIBLE


def test_causal_attend_equals_jax_dot_product_attention():
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.normal(size=(7, heads, 16)), jnp.float32) for heads in (6, 2, 2)
    )
    out, cache = causal_attend(0, q, jnp.concatenate([k, v], axis=-1), "kept")
    wanted = jax.nn.dot_product_attention(q[None], k[None], v[None], is_causal=True)
    np.testing.assert_allclose(out, wanted[0], atol=1e-6)
    assert cache == "kept"


def test_attend_gets_each_layer_once_in_order_and_its_own_cache(tiny_config):
    params = init_params(tiny_config, seed=0)
    seen = []

    def attend(layer_index, q, rows, cache):
        seen.append((layer_index, q.shape, rows.shape))
        return q, cache + 1 + layer_index

    tokens = jnp.array([3, 1, 4], jnp.int32)
    caches = (jnp.float32(10), jnp.float32(20))
    run = functools.partial(forward, tiny_config, attend=attend)
    hidden, caches = jax.jit(run)(
        params, tokens=tokens, positions=tokens, caches=caches
    )
    assert seen == [(i, (3, 4, 16), (3, 2, 32)) for i in range(2)]
    assert [float(c) for c in caches] == [11.0, 22.0]
    assert hidden.shape == (3, 32)


def test_tokens_meet_only_in_attention(tiny_config):
    """The flat token axis: rows in any order, positions given, give the same rows."""
    params = init_params(tiny_config, seed=0)
    tokens = np.array([5, 6, 7, 8], np.int32)
    positions = np.array([0, 9, 2, 40], np.int32)
    order = np.array([2, 0, 3, 1])

    def own_value(layer_index, q, rows, cache):
        k, v = jnp.split(rows, 2, axis=-1)
        return q + jnp.repeat(k + v, 2, axis=1), cache

    straight = compute_logits(tiny_config, params, tokens, positions, own_value)
    mixed = compute_logits(
        tiny_config, params, tokens[order], positions[order], own_value
    )
    np.testing.assert_allclose(mixed, straight[order], atol=1e-6)
    moved = compute_logits(tiny_config, params, tokens, positions + 1, own_value)
    assert np.abs(moved - straight).max() > VISIBLE


@pytest.mark.parametrize("qk_norm", [False, True])
def test_kernels_give_the_hidden_states_of_plain_jnp(tiny_config, qk_norm):
    config = dataclasses.replace(tiny_config, qk_norm=qk_norm)
    params = init_params(config, seed=0)
    tokens = np.arange(5, dtype=np.int32)

    def run(impl):
        args = config, params, tokens, 7 * tokens, causal_attend, (None, None)
        return forward(*args, impl=impl)[0]

    np.testing.assert_allclose(run("gpu_interpret"), run("reference"), atol=1e-5)
    assert np.abs(run("reference")).max() > 1


def test_products_on_a_gpu_are_left_in_parts_for_the_next_norm(tiny_config):
    config = dataclasses.replace(tiny_config, hidden_size=256, intermediate_size=512)
    params = init_params(config, seed=0, dtype=jnp.bfloat16)
    tokens = np.arange(5, dtype=np.int32)
    shapes = {"down": [], "out": []}

    def note(call, args, kwargs, context):
        result = call(*args, **kwargs)
        if context.module.name in shapes:
            shapes[context.module.name].append((result.shape, result.dtype))
        return result

    def run(impl):
        args = config, params, tokens, tokens, causal_attend, (None, None), (0, 1)
        hidden, _, features = forward_with_features(*args, impl=impl)
        return np.asarray(hidden, np.float32), np.asarray(features, np.float32)

    whole = run("reference")
    with nn.intercept_methods(note):
        in_parts = run("gpu_interpret")
    assert {shape for shape, _ in shapes["down"]} == {(4, 5, 256)}
    for ours, plain in zip(in_parts, whole, strict=True):
        error = np.linalg.norm(ours - plain) / np.linalg.norm(plain)
        assert error < 0.01 and np.abs(plain).max() > 1


@pytest.mark.parametrize(
    ("cuts", "num_tokens", "size_in", "features", "parts"),
    [
        ("heads", 136, 4096, (8, 6, 128), 2),
        ("heads", 256, 4096, (8, 6, 128), 1),  # 6 MiB of a part
        ("heads", 256, 576, (3, 5, 64), 1),  # less than 1024 of the sum each
        ("out", 136, 4096, (4096,), 4),
        ("out", 256, 4096, (4096,), 2),
        ("out", 264, 4096, (4096,), 1),
        ("out", 5, 192, (64,), 1),  # less than 128 of the sum each
        ("out", 5, 514, (64,), 2),
        ("down", 24, 12288, (4096,), 4),
        ("down", 64, 12288, (4096,), 8),
        ("down", 136, 12288, (4096,), 2),
        ("down", 512, 1536, (576,), 4),
        (None, 64, 4096, (64,), 1),
    ],
)
def test_products_are_cut_by_their_sizes(cuts, num_tokens, size_in, features, parts):
    rng = np.random.default_rng(0)
    x = rng.integers(-3, 4, (num_tokens, size_in)).astype(jnp.bfloat16)
    kernel = rng.integers(-3, 4, (size_in, *features)).astype(jnp.bfloat16)
    project = products.Projection(
        features,
        jnp.bfloat16,
        cuts=getattr(products, f"{cuts.upper()}_CUTS") if cuts else None,
    )
    got = project.apply({"params": {"kernel": kernel}}, x)
    flat = kernel.astype(np.float32).reshape(size_in, -1)
    wanted = (x.astype(np.float32) @ flat).reshape(num_tokens, *features)
    if parts == 1:
        wanted = wanted.astype(jnp.bfloat16)
        assert got.dtype == jnp.bfloat16
    else:
        assert (got.shape[0], got.dtype) == (parts, jnp.float32)
        got = np.asarray(got).sum(0)
    np.testing.assert_array_equal(got, wanted)


def test_float32_matmuls_ask_for_full_precision(tiny_config):
    """TF32, the default of GPUs, would make exactness tests meaningless."""
    params = init_params(tiny_config, seed=0)

    def run(params, tokens):
        hidden, _ = forward(
            tiny_config, params, tokens, tokens, causal_attend, (None, None)
        )
        return logits(tiny_config, params, hidden)

    text = jax.jit(run).lower(params, jnp.zeros(2, jnp.int32)).as_text()
    dots = [line for line in text.splitlines() if "dot_general" in line]
    # Per layer qkv, out, gate_up, down and two in causal_attend; then the logits.
    assert len(dots) == 2 * 6 + 1
    assert all(line.count("HIGHEST") == 2 for line in dots)


def test_init_params_are_random_and_of_the_declared_shapes(tiny_config):
    config = dataclasses.replace(
        tiny_config, qk_norm=True, attention_bias=True, tie_embeddings=False
    )
    params = init_params(config, seed=3, dtype=jnp.bfloat16)
    wanted = param_shapes(config, jnp.bfloat16)
    same = jax.tree.map(
        lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), params, wanted
    )
    assert all(jax.tree.leaves(same))
    sizes = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert sizes == config.num_params
    again = init_params(config, seed=3, dtype=jnp.bfloat16)
    other = init_params(config, seed=4, dtype=jnp.bfloat16)
    first = jax.tree.leaves(
        jax.tree.map(lambda a, b: bool((a == b).all()), params, again)
    )
    assert all(first)
    kernel = params["layer_0"]["qkv"]["kernel"]
    assert (kernel != params["layer_1"]["qkv"]["kernel"]).any()
    assert (kernel != other["layer_0"]["qkv"]["kernel"]).any()


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        # As the model cards state them.
        ("qwen3-1.7b", 1.7),
        ("qwen3-8b", 8.2),
        ("qwen3-14b", 14.8),
        ("qwen3-32b", 32.8),
        ("llama-3.1-8b", 8.0),
        ("llama-3.1-70b", 70.6),
        ("smollm2-135m", 0.1),
    ],
)
def test_presets_have_the_published_number_of_parameters(name, billions):
    config = PRESETS[name]
    shapes = param_shapes(config)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == config.num_params
    assert round(config.num_params / 1e9, 1) == billions


@pytest.mark.parametrize("name", FAMILIES)
def test_a_configuration_survives_json(name):
    config, _ = load(name)
    assert config_from_json(config_to_json(config)) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kv_heads": 3}, "num_heads .4. must be a multiple of num_kv_heads .3."),
        ({"head_dim": 7}, "head_dim must be even.*7"),
        ({"num_layers": 0}, "num_layers must be an integer from 1.*, got 0"),
        ({"hidden_size": "32"}, "hidden_size must be an integer.*'32'"),
        ({"num_heads": True}, "num_heads must be an integer.*True"),
        ({"norm_eps": float("nan")}, "norm_eps must be a number above 0, got nan"),
        ({"rope_theta": 0}, "rope_theta must be a number above 0, got 0"),
        ({"qk_norm": 1}, "qk_norm must be True or False, got 1"),
        ({"eos_ids": (-1,)}, "eos_ids must be a tuple of token ids"),
        ({"rope_scaling": {"factor": 2}}, "rope_scaling must be None, LinearScaling"),
        ({"family": "gpt2"}, "family must be one of llama"),
    ],
)
def test_impossible_shapes_are_refused(tiny_config, change, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**{**vars(tiny_config), **change})


@pytest.mark.parametrize(
    "make",
    [
        lambda: LinearScaling(factor=0),
        lambda: YarnScaling(factor=2.0, original_max_length=64.0),
        lambda: YarnScaling(factor=2.0, original_max_length=64, beta_fast=0.5),
        lambda: Llama3Scaling(
            factor="8", low_freq_factor=1, high_freq_factor=4, original_max_length=64
        ),
    ],
)
def test_impossible_scalings_are_refused(make):
    with pytest.raises(ValueError, match="factor|original_max_length|beta_fast"):
        make()
