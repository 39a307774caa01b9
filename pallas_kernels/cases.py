"""What the cases of all operations share: named shapes, one call of an operation each.

Every operation has a `cases.py` and, for the cases that are timed, a `bench.py`. Tests,
benchmarks and tuning use the same cases.

Tags: "small" runs in an interpreter within seconds, "shared" too (one index list for
all heads); "h100" and "tpu" are shapes of real loads, compiled for that platform
without a device and timed on one; "timed" ones are timed only.

Frozen: a recorded measurement names its case, so a case never changes its meaning.
Add a case under a new name instead.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

SMALL = frozenset({"small"})
LARGE = frozenset({"h100", "tpu"})
H100 = frozenset({"h100"})
TPU = frozenset({"tpu"})
TIMED = frozenset({"timed"})

# Heads of SmolLM2: no power of two.
SMOLLM2 = dict(num_heads=3, group_size=3, head_size=64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One call of an operation, whose cases add its sizes."""

    name: str
    tags: frozenset[str] = LARGE

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of the call that depend on the case."""
        return {}

    @property
    def shapes(self) -> tuple[jax.ShapeDtypeStruct | None, ...]:
        """Array arguments of the call, without values."""
        raise NotImplementedError


def int32(*shape: int) -> jax.ShapeDtypeStruct:
    """Returns an array of integers without values."""
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def num_bytes(array: jax.ShapeDtypeStruct) -> int:
    """Returns the bytes that an array takes."""
    return array.size * array.dtype.itemsize


def by_name(cases: tuple, name: str):
    """Returns the case called `name`."""
    found = [case for case in cases if case.name == name]
    if not found:
        names = ", ".join(case.name for case in cases)
        raise ValueError(f"no case is called {name!r}; there are {names}")
    return found[0]


def tagged(cases: tuple, tag: str) -> tuple:
    """Returns the cases that carry `tag`."""
    return tuple(case for case in cases if tag in case.tags)
