"""Named shapes of the product with a weight in 8 bits, frozen (see `..cases`)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.cases import H100, LARGE, SMALL, TIMED, TPU, Case, num_bytes
from pallas_kernels.matmul.cases import LAYERS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Int8Case(Case):
    """One call of `int8_matmul`: rows [T, in] by a weight (in, out)."""

    num_tokens: int
    weight: tuple[int, int]
    parts: int | None = None  # None: the result is one array like the rows

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of the call."""
        return {"parts": self.parts}

    @property
    def shapes(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Arrays of the call, the weight in the order of the reference."""
        size_in, size_out = self.weight
        return (
            jax.ShapeDtypeStruct((self.num_tokens, size_in), jnp.bfloat16),
            jax.ShapeDtypeStruct((size_out, size_in), jnp.int8),
            jax.ShapeDtypeStruct((size_out,), jnp.float32),
        )

    @property
    def result(self) -> jax.ShapeDtypeStruct:
        """The result of the call."""
        shape = self.num_tokens, self.weight[1]
        if self.parts is None:
            return jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        return jax.ShapeDtypeStruct((self.parts, *shape), jnp.float32)

    @property
    def num_bytes(self) -> int:
        """Bytes of rows, weight, scales and result, each once."""
        return sum(map(num_bytes, (*self.shapes, self.result)))


def _case(name, num_tokens, num_inputs, num_outputs, parts=None, tags=SMALL):
    weight = num_inputs, num_outputs
    return Int8Case(
        name=name, num_tokens=num_tokens, weight=weight, parts=parts, tags=tags
    )


# What the products of a layer are cut into, by what they make: those to the stream and
# the heads have a kernel behind them that sums.
_PARTS = {
    "qwen3_8b": dict(heads=2, out=4, down=4),
    "qwen2_5_1_5b": dict(heads=2, out=4, down=5),
    "smollm2_135m": dict(down=4),
}
ROWS = 1, 8, 24, 64, 72, 128, 136
# Compiled for these platforms too; the others are timed only.
_COMPILED = {
    "int8_qwen3_8b_gate_up_64": LARGE,
    "int8_qwen3_8b_down_128": H100,
    "int8_qwen2_5_1_5b_down_72": TPU,
    "int8_smollm2_135m_heads_1": LARGE,
    "int8_smollm2_135m_gate_up_136": H100,
}


def _of_layers():
    """Returns the products of one layer of each model, of each number of rows."""
    cases = []
    for model, products in LAYERS.items():
        for product, weight in products.items():
            for rows in ROWS:
                name = f"int8_{model}_{product}_{rows}"
                tags = _COMPILED.get(name, TIMED)
                parts = _PARTS[model].get(product)
                cases.append(_case(name, rows, *weight, parts=parts, tags=tags))
    return tuple(cases)


INT8_CASES = (
    # A block; half a block of inputs behind the last whole one; warpgroups of which
    # the last has no outputs; results that leave in several pieces, and in parts.
    _case("int8_single", 1, 128, 64),
    _case("int8_ragged", 24, 192, 320),
    _case("int8_many_rows", 136, 256, 128),
    _case("int8_parts", 8, 512, 192, parts=2),
    *_of_layers(),
)
