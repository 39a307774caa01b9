"""The dense chain: its reference by hand and against separate operations."""

import functools

import jax
import jax.numpy as jnp
import kernel_inputs as ki
import numpy as np
import pytest

from pallas_kernels.add_norm import add_norm
from pallas_kernels.aot import compile_for
from pallas_kernels.cases import by_name, tagged
from pallas_kernels.dense_cases import CHAIN_CASES
from pallas_kernels.dense_chain import (
    NUM_COUNTERS,
    ChainWeights,
    dense_chain,
    new_counters,
)
from pallas_kernels.dense_chain.gpu import dense_chain_gpu

EPS = 1e-5
SMALL = tagged(CHAIN_CASES, "small")
small_cases = pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
chain = functools.partial(dense_chain, eps=EPS, impl="reference")
ROUNDINGS = ("out", "norm", "gate_up", "gated", "down", "next_norm")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_chain_by_hand(dtype):
    def array(*rows):
        return jnp.asarray(rows, dtype)

    weights = ChainWeights(
        # (1, 2) makes (2, -1), and the stream (7, 1): mean square with eps 49.
        out=array([0, 1], [1, -1]),
        norm=array(7, 14),
        # (7, 2) makes gates 32 and -64, whose silu is 32 and 0, of ups 1 and 5.
        gate_up=array([[4, -8], [1, 1]], [[2, -4], [-3, -1]]),
        # (32, 0) makes (-3, 7), and the stream (4, 8): mean square with eps 64.
        down=array([-3 / 32, 7 / 32], [1, 1]),
        next_norm=array(2, 3),
        # of (1, 3)
        qkv=array([1, 2, 3], [4, 5, 6]),
    )
    args = array([1, 2]), array([5, 2]), weights, new_counters()
    stream, projected, _ = dense_chain(*args, eps=24.0, impl="reference")
    assert (stream.dtype, projected.dtype) == (dtype, jnp.float32)
    np.testing.assert_allclose(stream, [[4, 8]], rtol=1e-6)
    np.testing.assert_allclose(projected, [[[13, 17, 21]]], rtol=1e-6)


def separate(inputs, without=None):
    """Stream and projection or norm of one operation after the other.

    `without` names a rounding of `ROUNDINGS` that is left out.
    """
    mixed, stream, weights, _ = inputs
    dtype = mixed.dtype

    def rounded(x, name):
        return x if name == without else x.astype(dtype)

    def product(x, kernel):
        wide = (a.astype(np.float32) for a in (x, kernel))
        return jnp.dot(*wide, precision=jax.lax.Precision.HIGHEST)

    def add(x, y, scale, name):
        x, normed = add_norm(x, y[None], scale, eps=EPS, impl="reference")
        if name == without:
            wide = (a.astype(jnp.float32) for a in (x, jnp.zeros_like(x), scale))
            normed = add_norm(*wide, eps=EPS, impl="reference")[1]
        return x, normed

    y = product(mixed, weights.out)
    if without == "out":
        stream, y = (stream.astype(np.float32) + y).astype(dtype), 0 * y
    stream, normed = add(stream, y, weights.norm, "norm")
    inner = product(normed, weights.gate_up.reshape(stream.shape[1], -1))
    gate, up = jnp.split(rounded(inner, "gate_up").astype(np.float32), 2, axis=1)
    gated = rounded(jax.nn.silu(gate) * up, "gated")
    y = product(gated, weights.down)
    if without == "down":
        stream, y = (stream.astype(np.float32) + y).astype(dtype), 0 * y
    stream, normed = add(stream, y, weights.next_norm, "next_norm")
    if weights.qkv is None:
        return stream, normed
    return stream, product(normed, weights.qkv)[None]


@small_cases
def test_chain_agrees_with_separate_operations(case):
    inputs = ki.chain_inputs(case)
    actual, expected = chain(*inputs)[:2], separate(inputs)
    for got, wanted in zip(actual, expected, strict=True):
        assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape)
        got, wanted = (np.asarray(x, np.float32) for x in (got, wanted))
        # Sums of other orders round to the neighbour now and then.
        bound = 1e-5 if case.dtype == "float32" else 2e-2
        np.testing.assert_allclose(got, wanted, rtol=bound, atol=bound)
        assert np.mean(np.abs(got - wanted)) <= bound / 20


@pytest.mark.parametrize("without", ROUNDINGS)
def test_chain_rounds_wherever_it_says(without):
    inputs = ki.chain_inputs(by_name(CHAIN_CASES, "chain_bf16"))
    actual, exact = chain(*inputs)[1], separate(inputs)[1]
    other = separate(inputs, without)[1]
    # Less than a hundredth of what a lost rounding does.
    assert np.linalg.norm(actual - exact) < 0.01 * np.linalg.norm(actual - other)


def test_a_last_layer_ends_in_its_norm():
    inputs = ki.chain_inputs(by_name(CHAIN_CASES, "chain_bf16"))
    stream, projected, _ = chain(*inputs)
    last = inputs._replace(weights=inputs.weights._replace(qkv=None))
    same_stream, normed, _ = chain(*last)
    ki.assert_same_bits(same_stream, stream)
    assert (normed.dtype, normed.shape) == (stream.dtype, stream.shape)
    product = normed.astype(np.float32) @ inputs.weights.qkv.astype(np.float32)
    np.testing.assert_allclose(projected.sum(0), product, rtol=1e-4, atol=1e-5)


@small_cases
def test_a_token_does_not_depend_on_its_neighbours(case):
    inputs = ki.chain_inputs(case)
    last = inputs._replace(mixed=inputs.mixed[-2:], stream=inputs.stream[-2:])
    stream, projected, _ = chain(*inputs)
    few_streams, few_projected, _ = chain(*last)
    pairs = (few_streams, stream[-2:]), (few_projected, projected[..., -2:, :])
    for few, of_all in pairs:
        np.testing.assert_allclose(
            *(np.asarray(x, np.float32) for x in (few, of_all)), rtol=2e-2, atol=2e-2
        )


@pytest.mark.parametrize("impl", ["reference", "tpu_interpret"])
def test_counters_are_handed_back_as_they_come(impl):
    assert new_counters().tolist() == [0] * NUM_COUNTERS
    assert new_counters().dtype == jnp.int32
    inputs = ki.chain_inputs(by_name(CHAIN_CASES, "chain_last"))
    counters = np.arange(NUM_COUNTERS, dtype=np.int32)
    result = chain(*inputs._replace(counters=counters), impl=impl)
    np.testing.assert_array_equal(result[2], counters)
    for got, wanted in zip(result[:2], chain(*inputs)[:2], strict=True):
        ki.assert_same_bits(got, wanted)


def test_float32_products_ask_for_full_precision():
    inputs = ki.chain_inputs(by_name(CHAIN_CASES, "chain_f32"))
    text = jax.jit(chain).lower(*inputs).as_text()
    dots = [line for line in text.splitlines() if "dot_general" in line]
    assert len(dots) == 4
    assert all(line.count("HIGHEST") == 2 for line in dots)


@pytest.mark.parametrize("target", ["v5e", "tpu7x"])
def test_chain_compiles_for_a_tpu(target):
    pytest.importorskip("libtpu")
    inputs = ki.chain_inputs(by_name(CHAIN_CASES, "chain_bf16"))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), inputs)
    compile_for(target, functools.partial(chain, impl="tpu"), *shapes)


def test_chain_rejects_what_does_not_fit():
    inputs = ki.chain_inputs(by_name(CHAIN_CASES, "chain_f32"))
    mixed, stream, weights, counters = inputs
    half = jnp.bfloat16
    rows = (
        (inputs._replace(mixed=mixed[0]), "mixed has shape"),
        (inputs._replace(mixed=mixed.astype(np.int32)), "mixed has dtype"),
        (inputs._replace(stream=stream[:1]), "stream has shape"),
        (inputs._replace(stream=stream.astype(half)), "stream has dtype"),
        (inputs._replace(mixed=mixed[:, :0]), "no axis may be empty"),
        (inputs._replace(counters=counters[1:]), "counters has shape"),
        (inputs._replace(counters=counters + 0.5), "counters has dtype"),
    )
    changed = (
        dict(out=weights.out.T),
        dict(norm=weights.norm[1:]),
        dict(gate_up=weights.gate_up[:, :1]),
        dict(down=weights.down[1:]),
        dict(next_norm=weights.next_norm[:, None]),
        dict(qkv=weights.qkv[1:]),
    )
    cases = list(rows)
    for change in changed:
        (name,) = change
        wrong = {name: getattr(weights, name).astype(half)}
        for fields, word in ((change, "shape"), (wrong, "dtype")):
            other = inputs._replace(weights=weights._replace(**fields))
            cases.append((other, f"{name} has {word}"))
    empty = weights._replace(qkv=weights.qkv[:, :0])
    cases.append((inputs._replace(weights=empty), "qkv has shape .* may be empty"))
    for args, word in cases:
        with pytest.raises(ValueError, match=word):
            chain(*args)


def test_the_interpreted_kernel_equals_the_reference():
    rng = np.random.default_rng(0)
    tokens, width, inner, projected = 72, 1024, 512, 1536

    def array(*shape, scale=1.0, mean=0.0):
        return jnp.asarray(mean + scale * rng.normal(size=shape), jnp.bfloat16)

    weights = ChainWeights(
        out=array(width, width, scale=width**-0.5),
        norm=array(width, scale=0.1, mean=1.0),
        gate_up=array(width, 2, inner, scale=width**-0.5),
        down=array(inner, width, scale=inner**-0.5),
        next_norm=array(width, scale=0.1, mean=1.0),
        qkv=array(width, projected, scale=width**-0.5),
    )
    rows = array(tokens, width), array(tokens, width)
    args = *rows, weights, new_counters()
    expected = chain(*args)
    got = dense_chain_gpu(*args, eps=EPS, interpret=True, num_ctas=8)
    for result, wanted in zip(
        (got[0], got[1].sum(0)), (expected[0], expected[1].sum(0)), strict=True
    ):
        error = np.linalg.norm(np.float32(result) - np.float32(wanted))
        assert error < 2e-3 * np.linalg.norm(np.float32(wanted))
