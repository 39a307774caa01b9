"""The model with one launch between two attentions against the model without."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.dense_chain import NUM_COUNTERS, dense_chain
from sparsespec_jax import layer as layer_lib
from sparsespec_jax import model as model_lib
from sparsespec_jax.model import causal_attend, forward_with_features, init_params

TOKENS = np.array([3, 1, 4, 1, 5], np.int32)


def run(config, params, impl="reference", features=()):
    """Hidden states, caches and features; a cache is what its layer attends to."""

    def attend(layer_index, q, rows, cache):
        out, _ = causal_attend(layer_index, q, rows, None)
        return out, cache + rows.astype(jnp.float32).sum()

    caches = tuple(jnp.float32(i) for i in range(config.num_layers))
    args = config, params, TOKENS, 7 * TOKENS, attend, caches, features
    return forward_with_features(*args, impl=impl)


@pytest.fixture
def chain_always(monkeypatch):
    """Chains every model, by any implementation."""
    return lambda: monkeypatch.setattr(model_lib, "is_chained", lambda *_: True)


@pytest.fixture
def reference_on_gpu(monkeypatch):
    """Makes all sizes fit, and lets the reference compute them, in two parts."""

    def halved(*args, impl, **kwargs):
        assert impl.startswith("gpu")
        stream, projected, counters = dense_chain(*args, impl="reference", **kwargs)
        if args[2].qkv is not None:
            projected = jnp.concatenate([projected / 2] * 2)
        seen.append((args[3], args[2].qkv is None))
        return stream, projected, counters + 1

    seen = []
    monkeypatch.setattr(model_lib, "dense_chain", halved)
    monkeypatch.setattr(layer_lib, "chain_fits", lambda *_: True)
    return seen


@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_chained_model_is_the_same_model(
    tiny_config, chain_always, num_layers, qk_norm
):
    config = dataclasses.replace(tiny_config, num_layers=num_layers, qk_norm=qk_norm)
    params = init_params(config, seed=0)
    features = tuple(range(num_layers))
    plain = run(config, params, features=features)
    chain_always()
    chained = run(config, params, features=features)
    assert jax.tree.structure(chained) == jax.tree.structure(plain)
    pairs = zip(jax.tree.leaves(chained), jax.tree.leaves(plain), strict=True)
    for ours, theirs in pairs:
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    assert np.abs(plain[0]).max() > 1


def test_a_chained_model_without_features_returns_none(tiny_config, chain_always):
    params = init_params(tiny_config, seed=0)
    chain_always()
    assert run(tiny_config, params)[2] is None


def test_a_chain_on_a_gpu_stays_near_the_plain_model(tiny_config, reference_on_gpu):
    params = init_params(tiny_config, seed=0, dtype=jnp.bfloat16)
    plain = run(tiny_config, params, features=(0, 1))
    assert not reference_on_gpu
    chained = run(tiny_config, params, "gpu_interpret", features=(0, 1))
    assert len(reference_on_gpu) == tiny_config.num_layers
    for ours, theirs in zip(chained, plain, strict=True):
        ours, theirs = (np.asarray(x, np.float32) for x in (ours, theirs))
        assert np.linalg.norm(ours - theirs) < 0.01 * np.linalg.norm(theirs)


def test_counters_go_from_layer_to_layer(tiny_config, reference_on_gpu):
    config = dataclasses.replace(tiny_config, num_layers=3)
    run(config, init_params(config, seed=0, dtype=jnp.bfloat16), "gpu_interpret")
    counts = [counters.tolist() for counters, _ in reference_on_gpu]
    assert counts == [[i] * NUM_COUNTERS for i in range(3)]
    assert [is_last for _, is_last in reference_on_gpu] == [False, False, True]


def test_a_swapped_weight_shows(tiny_config, chain_always):
    params = init_params(tiny_config, seed=0)
    plain = run(tiny_config, params)[0]
    wrong = {**params, "layer_1": {**params["layer_1"]}}
    for name in ("input_norm", "qkv", "mlp_norm", "out"):
        wrong["layer_1"][name] = params["layer_0"][name]
        chain_always()
        assert np.abs(run(tiny_config, wrong)[0] - plain).max() > 1e-2
        wrong["layer_1"][name] = params["layer_1"][name]


def test_operations_of_a_layer_bear_its_name(tiny_config, chain_always):
    params = init_params(tiny_config, seed=0)
    chain_always()
    lowered = jax.jit(functools.partial(run, tiny_config)).lower(params)
    names = re.findall(r'"(\S*/Transformer/\S*)"', lowered.as_text(debug_info=True))
    for index in range(tiny_config.num_layers):
        for op in ("rotate_heads", "dense_chain"):
            pattern = rf"/Transformer/layer_{index}/jit\({op}_reference\)"
            assert any(re.search(pattern, name) for name in names), (index, op)


def chains(config, sizes=None, dtype=jnp.bfloat16, impl="gpu", num_tokens=5):
    """Whether the model is chained; the sizes that were asked for go to `sizes`."""
    patch = pytest.MonkeyPatch()
    with patch.context() as context:
        note = [] if sizes is None else sizes
        fits = lambda *args: note.append(args) or args[0] < 100  # noqa: E731
        context.setattr(layer_lib, "chain_fits", fits)
        return layer_lib.is_chained(config, dtype, impl, num_tokens)


def test_every_layer_must_fit(tiny_config):
    sizes = []
    assert chains(tiny_config, sizes)
    # N * D, hidden, inner; heads of 4 queries and 2 keys and values, of 16 elements.
    assert sizes == [(5, 64, 32, 48, 128), (5, 64, 32, 48, None)]
    sizes.clear()
    assert chains(dataclasses.replace(tiny_config, num_layers=1), sizes)
    assert sizes == [(5, 64, 32, 48, None)]
    assert not chains(tiny_config, num_tokens=100)


def test_models_that_no_chain_serves(tiny_config):
    for bias in ("attention_bias", "attention_out_bias", "mlp_bias"):
        assert not chains(dataclasses.replace(tiny_config, **{bias: True}))
    assert not chains(tiny_config, dtype=jnp.float32)
    for impl in ("reference", "tpu", "tpu_interpret", None):
        assert not chains(tiny_config, impl=impl)
    assert chains(tiny_config, impl="gpu_interpret")
