"""What crosses devices inside a step: every collective of the package stands here.

Each function takes the name of the mesh axis that cuts a model, or None on one device;
then it does nothing that one device would not do, and traces to the same program.
Small results are gathered and added in the order of the devices, so that all of them
hold the same bits, whatever the library below does with sums.
"""

import functools

import jax
import jax.numpy as jnp

from sparsespec_jax.array_types import Array, Floats

MODEL_AXIS = "model"  # of the mesh: KV heads, query heads, inner units, vocabulary


def summed(x: Floats, axis: str | None) -> Floats:
    """The sum of every device's x, in an order that the compiler chooses."""
    return x if axis is None else jax.lax.psum(x, axis)


def gathered(x: Array, axis: str) -> Array:
    """Every device's x, [devices, ...], in the order of the devices."""
    return jax.lax.all_gather(x, axis)


def summed_in_order(x: Array, axis: str | None) -> Array:
    """The sum of every device's x, added one behind the other.

    The bits of a row do not depend on the number of rows. `devices` times the bytes of
    x arrive at each device, so it is for what is small.
    """
    if axis is None:
        return x
    return functools.reduce(jnp.add, gathered(x, axis))


def largest(x: Array, axis: str | None) -> Array:
    """The largest of every device's x, element by element."""
    return x if axis is None else jax.lax.pmax(x, axis)


def num_shards(axis: str | None) -> int:
    """Devices along the axis; 1 without one."""
    return 1 if axis is None else jax.lax.axis_size(axis)


def first_of_shard(size: int, axis: str | None) -> Array | int:
    """Where this device's `size` entries begin among those of all devices."""
    return 0 if axis is None else jax.lax.axis_index(axis) * size
