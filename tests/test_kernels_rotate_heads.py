"""The rotation of heads: the reference by hand, the GPU kernel interpreted."""

import functools

import jax.numpy as jnp
import kernel_inputs as ki
import numpy as np
import pytest
from gpu_interpreter import run_with_races

from pallas_kernels.aot import compile_for
from pallas_kernels.cases import by_name, num_bytes, tagged
from pallas_kernels.rotate_heads import rotate_heads
from pallas_kernels.rotate_heads.cases import ROTATE_CASES
from pallas_kernels.rotate_heads.gpu import RotateConfig, rotate_heads_gpu

EPS = 1e-5
SMALL = tagged(ROTATE_CASES, "small")
small_cases = ki.each_case(SMALL)
rotate = functools.partial(rotate_heads, eps=EPS, impl="reference")


def test_rotation_by_hand():
    # One token, one KV head, two queries, D = 2: one pair, turned by 90 degrees.
    qkv = jnp.asarray([[[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]]]])
    q, rows = rotate(qkv, jnp.zeros((1, 1)), jnp.ones((1, 1)))
    assert q.tolist() == [[[-2, 1], [-4, 3]]]
    assert rows.tolist() == [[[-6, 5, 7, 8]]]


def test_norm_by_hand():
    # Roots of the mean square: 5, 13 and, with eps, 2; angles are 0.
    heads = [[1.0, 7.0], [7.0, 17.0], [0.0, 0.0], [9.0, 9.0]]
    q, rows = rotate_heads(
        jnp.asarray([[heads[:2] + heads[3:]], [heads[:1] + heads[2:]]]),
        *(jnp.ones((2, 1)), jnp.zeros((2, 1))),
        *(jnp.asarray([10.0, 100.0]), jnp.asarray([26.0, 13.0])),
        impl="reference",
        eps=1e-12,
    )
    np.testing.assert_allclose(q, [[[2, 140]], [[2, 140]]], rtol=1e-6)
    np.testing.assert_allclose(rows, [[[14, 17, 9, 9]], [[0, 0, 9, 9]]], rtol=1e-6)


def test_norm_adds_eps_to_the_mean_square():
    qkv = jnp.asarray([[[[1.0, 1.0]] * 3]])
    ones = jnp.ones(2)
    turn = jnp.ones((1, 1)), jnp.zeros((1, 1))
    q, _ = rotate_heads(qkv, *turn, ones, ones, eps=3.0, impl="reference")
    np.testing.assert_allclose(q, [[[0.5, 0.5]]], rtol=1e-6)


def test_norm_is_rounded_before_the_rotation():
    inputs = ki.rotate_inputs(by_name(ROTATE_CASES, "rotate_bf16"))
    wide = inputs.qkv[:, 0, 0].astype(np.float32)
    power = np.mean(wide * wide, axis=-1, keepdims=True)
    normed = wide / np.sqrt(power + EPS) * inputs.q_scale.astype(np.float32)

    def turned(x):
        first, second = np.split(x.astype(np.float32), 2, axis=-1)
        return (first * inputs.cos - second * inputs.sin).astype(jnp.bfloat16)

    first = rotate(*inputs)[0][:, 0, : inputs.cos.shape[1]]
    same_if_rounded = np.mean(first == turned(normed.astype(jnp.bfloat16)))
    same_if_not = np.mean(first == turned(normed))
    assert same_if_rounded > 0.99 > 0.9 > same_if_not


def test_parts_are_summed_in_order_and_rounded_before_anything_else():
    # In order, the first sum loses its 1; 257 + 0.5 rounds to 258 in bfloat16.
    heads = jnp.asarray([[2.0**25, 257.0], [1.0, 0.5], [-(2.0**25), 0.0]])
    qkv = jnp.zeros((3, 1, 1, 3, 16)).at[..., :2].set(heads[:, None, None, None])
    turn = jnp.ones((1, 8)), jnp.zeros((1, 8))
    for impl in ("reference", "gpu_interpret"):
        q, rows = rotate_heads(qkv, *turn, dtype=jnp.bfloat16, impl=impl)
        assert q.dtype == rows.dtype == jnp.bfloat16
        for row in (q[0, 0], rows[0, 0, :16], rows[0, 0, 16:]):
            assert row[:2].tolist() == [0.0, 258.0]


def test_parts_give_what_their_rounded_sum_gives():
    case = by_name(ROTATE_CASES, "rotate_parts")
    inputs = ki.rotate_inputs(case)
    whole = (inputs.qkv[0] + inputs.qkv[1] + inputs.qkv[2]).astype(jnp.bfloat16)
    actual = rotate(*inputs, **case.options)
    expected = rotate(*inputs._replace(qkv=whole))
    for got, wanted in zip(actual, expected, strict=True):
        ki.assert_same_bits(got, wanted)


def test_a_rotation_keeps_the_product_of_two_tokens_equally_far_apart():
    case = by_name(ROTATE_CASES, "rotate_ragged")
    x = ki.rotate_inputs(case).qkv[:1].astype(np.float32)
    angle = 0.3 * np.arange(1, case.head_size // 2 + 1, dtype=np.float32)

    def product(query, key):
        tables = [
            np.stack([f(query * angle), f(key * angle)]) for f in (np.cos, np.sin)
        ]
        q, rows = rotate(np.repeat(x, 2, axis=0), *tables)
        return jnp.vdot(q[0, 0], rows[1, 0, : case.head_size])

    np.testing.assert_allclose(product(7, 5), product(4, 2), rtol=1e-3)
    assert abs(product(7, 5) - product(7, 2)) > 0.1 * abs(product(7, 5))


@small_cases
def test_rotation_on_a_gpu_agrees_with_the_reference(case):
    inputs = ki.rotate_inputs(case)
    actual = run_with_races(rotate_heads_gpu, inputs, eps=EPS, **case.options)
    ki.assert_rotations_agree(actual, rotate(*inputs, **case.options))


@pytest.mark.parametrize("name", ["rotate_bf16", "rotate_parts"])
@pytest.mark.parametrize("num_tokens", [1, 7, 8, 9])
def test_a_token_does_not_depend_on_its_neighbours(num_tokens, name):
    case = by_name(ROTATE_CASES, name)
    qkv, *tables = ki.rotate_inputs(case)
    kernel = functools.partial(
        rotate_heads, eps=EPS, impl="gpu_interpret", **case.options
    )
    every = kernel(qkv, *tables)
    last = [x[-num_tokens:] for x in tables[:2]]
    some = kernel(qkv[..., -num_tokens:, :, :, :], *last, *tables[2:])
    for few, all_of_them in zip(some, every, strict=True):
        ki.assert_same_bits(few, all_of_them[-num_tokens:])


def swap_scales(inputs):
    """Queries take the factor of keys."""
    return inputs._replace(q_scale=inputs.k_scale, k_scale=inputs.q_scale)


def next_position(inputs):
    """Every token is turned as its neighbour is."""
    return inputs._replace(cos=np.roll(inputs.cos, 1, 0), sin=np.roll(inputs.sin, 1, 0))


def turn_back(inputs):
    """Angles have the wrong sign."""
    return inputs._replace(sin=-inputs.sin)


def next_pair(inputs):
    """A pair takes the frequency of its neighbour."""
    return inputs._replace(cos=np.roll(inputs.cos, 1, 1), sin=np.roll(inputs.sin, 1, 1))


def swap_heads(inputs):
    """KV heads 0 and 1 are taken for each other."""
    return inputs._replace(qkv=inputs.qkv[:, ::-1])


def swap_key_and_value(inputs):
    """A key is stored as the value."""
    order = [*range(inputs.qkv.shape[2] - 2), -1, -2]
    return inputs._replace(qkv=inputs.qkv[:, :, order])


@pytest.mark.parametrize(
    "fault",
    [swap_scales, next_position, turn_back, next_pair, swap_heads, swap_key_and_value],
)
def test_rotation_on_a_gpu_shows_faults(fault):
    inputs = ki.rotate_inputs(by_name(ROTATE_CASES, "rotate_bf16"))
    actual = rotate_heads(*fault(inputs), eps=EPS, impl="gpu_interpret")
    with pytest.raises(AssertionError):
        ki.assert_rotations_agree(actual, rotate(*inputs))


@ki.each_case([c for c in SMALL if c.num_parts])
def test_rotation_on_a_gpu_shows_a_lost_part(case):
    inputs, options = ki.rotate_inputs(case), case.options
    fewer = inputs._replace(qkv=inputs.qkv[:-1])
    actual = rotate_heads(*fewer, eps=EPS, impl="gpu_interpret", **options)
    with pytest.raises(AssertionError):
        ki.assert_rotations_agree(actual, rotate(*inputs, **options))


def test_rotation_on_a_gpu_shows_a_lost_eps():
    inputs = ki.rotate_inputs(by_name(ROTATE_CASES, "rotate_bf16"))
    actual = rotate_heads(*inputs, eps=0.0, impl="gpu_interpret")
    with pytest.raises(AssertionError):
        ki.assert_rotations_agree(actual, rotate(*inputs))


@pytest.mark.usefixtures("optimized_programs")
@pytest.mark.parametrize("target", ["v5e", "tpu7x"])
@pytest.mark.parametrize("name", ["rotate_136", "rotate_136_parts", "rotate_d64"])
def test_rotation_compiles_for_a_tpu(target, name):
    pytest.importorskip("libtpu")
    case = by_name(ROTATE_CASES, name)
    fn = functools.partial(rotate_heads, eps=EPS, impl="tpu", **case.options)
    compiled = compile_for(target, fn, *case.shapes)
    assert compiled.temp_bytes <= 2 * num_bytes(case.shapes[0])


@pytest.mark.usefixtures("no_type_checks")
def test_rotation_rejects_what_does_not_fit():
    qkv, table, scale = jnp.zeros((2, 1, 3, 4)), jnp.zeros((2, 2)), jnp.zeros(4)
    for args, word in (
        ((qkv[0], table, table), "qkv has shape"),
        ((qkv[:, :, :2], table, table), "each KV head needs a query, a key"),
        ((qkv[..., :3], table, table), "of an even size"),
        ((qkv.astype(jnp.int32), table, table), "qkv has dtype"),
        ((qkv, table[:1], table), "cos has shape"),
        ((qkv, table, table.astype(jnp.bfloat16)), "sin has dtype"),
        ((qkv, table, table, scale), "k_scale is None"),
        ((qkv, table, table, None, scale), "q_scale is None"),
        ((qkv, table, table, scale[:2], scale), "q_scale has shape"),
        ((qkv, table, table, scale, scale.astype(jnp.bfloat16)), "k_scale has dtype"),
    ):
        with pytest.raises(ValueError, match=word):
            rotate(*args)


@pytest.mark.usefixtures("no_type_checks")
def test_rotation_rejects_dtypes_that_do_not_fit():
    qkv, table = jnp.zeros((2, 1, 3, 4)), jnp.zeros((2, 2))
    scale = jnp.zeros(4)
    for args, dtype, word in (
        ((qkv[None], table, table), None, "dtype is None"),
        ((qkv[None], table, table), jnp.int32, "dtype is int32, expected bfloat16"),
        ((qkv[None].astype(jnp.bfloat16), table, table), jnp.bfloat16, "qkv has dtype"),
        ((qkv, table, table), jnp.bfloat16, "expected that of qkv, float32"),
        ((qkv[None], table, table, scale, scale), jnp.bfloat16, "q_scale has dtype"),
        ((qkv[:0][None], table, table), jnp.float32, "no axis may be empty"),
        ((jnp.zeros((0, 2, 1, 3, 4)), table, table), jnp.float32, "may be empty"),
    ):
        with pytest.raises(ValueError, match=word):
            rotate(*args, dtype=dtype)


def test_rotation_on_a_gpu_refuses_other_head_sizes():
    qkv, table = jnp.zeros((1, 1, 3, 24)), jnp.zeros((1, 12))
    with pytest.raises(NotImplementedError, match="head size is 24:"):
        rotate_heads(qkv, table, table, impl="gpu_interpret")


def test_config_rejects_other_numbers_of_lanes():
    with pytest.raises(ValueError, match="lanes is 32"):
        RotateConfig(lanes=32)


@pytest.mark.gpu
@ki.each_case(ROTATE_CASES)
def test_rotation_on_the_device(case):
    inputs, options = ki.rotate_inputs(case), case.options
    actual = rotate_heads(*inputs, eps=EPS, impl="gpu", **options)
    ki.assert_rotations_agree(actual, rotate(*inputs, **options))
