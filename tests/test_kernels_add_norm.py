"""The sum with its norm: the reference by hand, the GPU kernel interpreted."""

import functools

import jax.numpy as jnp
import kernel_inputs as ki
import numpy as np
import pytest
from gpu_interpreter import run_with_races

from pallas_kernels.add_norm import add_norm
from pallas_kernels.add_norm.cases import NORM_CASES
from pallas_kernels.add_norm.gpu import NormConfig, add_norm_gpu
from pallas_kernels.aot import compile_for
from pallas_kernels.cases import by_name, num_bytes, tagged

EPS = 1e-5
SMALL = tagged(NORM_CASES, "small")
small_cases = ki.each_case(SMALL)
add = functools.partial(add_norm, eps=EPS, impl="reference")


def test_sum_and_norm_by_hand():
    # Sums (3, 1) and (-1, 7); with eps their mean squares are 9 and 29.
    x, y = jnp.asarray([[1.0, 2.0], [0.0, 3.0]]), jnp.asarray([[2.0, -1.0], [-1.0, 4]])
    scale = jnp.asarray([10.0, 100.0])
    stream, normed = add_norm(x, y, scale, eps=4.0, impl="reference")
    assert stream.tolist() == [[3, 1], [-1, 7]]
    wanted = [[10, 100 / 3], [-10 / 29**0.5, 700 / 29**0.5]]
    np.testing.assert_allclose(normed, wanted, rtol=1e-6)


def test_parts_are_summed_in_order_and_rounded_before_the_stream_is_added():
    x, scale = jnp.asarray([[1.0, -256.0]], jnp.bfloat16), jnp.ones(2, jnp.bfloat16)
    # In order, the first sum loses its 1; 257 + 0.5 rounds to 258 in bfloat16.
    y = jnp.asarray([[[2.0**25, 257.0]], [[1.0, 0.5]], [[-(2.0**25), 0.0]]])
    for impl in ("reference", "gpu_interpret"):
        pad = ((0, 0), (0, 0), (0, 30))
        args = jnp.pad(x, pad[1:]), jnp.pad(y, pad), jnp.pad(scale, pad[2:])
        stream, _ = add_norm(*args, eps=EPS, impl=impl)
        assert stream[0, :2].tolist() == [1.0, 2.0]


def test_norm_is_that_of_the_rounded_sum():
    inputs = ki.norm_inputs(by_name(NORM_CASES, "norm_narrow"))
    wide = inputs.x.astype(np.float32) + inputs.y.astype(np.float32)

    def normed(x):
        power = np.mean(x * x, axis=-1, keepdims=True)
        x = x / np.sqrt(power + EPS) * inputs.scale.astype(np.float32)
        return x.astype(jnp.bfloat16)

    got = add(*inputs)[1]
    rounded = wide.astype(jnp.bfloat16).astype(np.float32)
    assert np.mean(got == normed(rounded)) > 0.99 > 0.9 > np.mean(got == normed(wide))


@small_cases
def test_norm_on_a_gpu_agrees_with_the_reference(case):
    inputs = ki.norm_inputs(case)
    actual = run_with_races(add_norm_gpu, inputs, eps=EPS)
    ki.assert_norms_agree(actual, add(*inputs))


@small_cases
@pytest.mark.parametrize("num_tokens", [1, 2])
def test_a_token_does_not_depend_on_its_neighbours(case, num_tokens):
    x, y, scale = ki.norm_inputs(case)
    kernel = functools.partial(add_norm, eps=EPS, impl="gpu_interpret")
    every = kernel(x, y, scale)
    some = kernel(x[:num_tokens], y[..., :num_tokens, :], scale)
    for few, all_of_them in zip(some, every, strict=True):
        ki.assert_same_bits(few, all_of_them[:num_tokens])


def lose_last_element(inputs):
    """The last element of a row is not added to the mean square of its sum."""
    x, y = inputs.x.copy(), inputs.y.copy()
    x[:, -1] = y[..., -1] = 0
    return inputs._replace(x=x, y=y)


def next_scale(inputs):
    """Factors belong to the element before their own."""
    return inputs._replace(scale=np.roll(inputs.scale, 1))


def next_token(inputs):
    """The projection of the token behind is added."""
    return inputs._replace(y=np.roll(inputs.y, 1, axis=-2))


@ki.each_case([c for c in SMALL if c.num_parts])
def test_norm_on_a_gpu_shows_a_lost_part(case):
    inputs = ki.norm_inputs(case)
    actual = add_norm(
        inputs.x, inputs.y[:-1], inputs.scale, eps=EPS, impl="gpu_interpret"
    )
    with pytest.raises(AssertionError):
        ki.assert_norms_agree(actual, add(*inputs))


@pytest.mark.parametrize("fault", [lose_last_element, next_scale, next_token])
@small_cases
def test_norm_on_a_gpu_shows_faults(case, fault):
    inputs = ki.norm_inputs(case)
    actual = add_norm(*fault(inputs), eps=EPS, impl="gpu_interpret")
    with pytest.raises(AssertionError):
        ki.assert_norms_agree(actual, add(*inputs))


@small_cases
def test_norm_on_a_gpu_shows_a_lost_eps(case):
    inputs = ki.norm_inputs(case)
    actual = add_norm(*inputs, eps=0.0, impl="gpu_interpret")
    with pytest.raises(AssertionError):
        ki.assert_norms_agree(actual, add(*inputs))


@pytest.mark.usefixtures("optimized_programs")
@pytest.mark.parametrize("target", ["v5e", "tpu7x"])
def test_norm_compiles_for_a_tpu(target):
    pytest.importorskip("libtpu")
    case = by_name(NORM_CASES, "norm_136")
    fn = functools.partial(add_norm, eps=EPS, impl="tpu")
    compiled = compile_for(target, fn, *case.shapes)
    assert compiled.temp_bytes <= num_bytes(case.shapes[0])


@pytest.mark.usefixtures("no_type_checks")
def test_norm_rejects_what_does_not_fit():
    x, scale = jnp.zeros((2, 64)), jnp.zeros(64)
    for args, word in (
        ((x[0], x, scale), "x has shape"),
        ((x[:0], x[:0], scale), "no axis may be empty"),
        ((x.astype(jnp.int32), x, scale), "x has dtype"),
        ((x, x[:1], scale), "y has shape"),
        ((x, x[None, :1], scale), "y has shape"),
        ((x, jnp.zeros((0, 2, 64)), scale), "no parts"),
        ((x, x[None].astype(jnp.bfloat16), scale), "y has dtype"),
        ((x, x.astype(jnp.bfloat16), scale), "y has dtype"),
        ((x, x, scale[:1]), "scale has shape"),
        ((x, x, scale.astype(jnp.bfloat16)), "scale has dtype"),
    ):
        with pytest.raises(ValueError, match=word):
            add(*args)


def test_norm_on_a_gpu_refuses_other_row_sizes():
    x, scale = jnp.zeros((1, 48)), jnp.zeros(48)
    with pytest.raises(NotImplementedError, match="rows have 48 elements"):
        add_norm(x, x, scale, eps=EPS, impl="gpu_interpret")


def test_config_rejects_other_vectors():
    with pytest.raises(ValueError, match="vector is 16"):
        NormConfig(vector=16)


@pytest.mark.gpu
@ki.each_case(NORM_CASES)
def test_norm_on_the_device(case):
    inputs = ki.norm_inputs(case)
    ki.assert_norms_agree(add_norm(*inputs, eps=EPS, impl="gpu"), add(*inputs))
