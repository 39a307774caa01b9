"""Named shapes of the product of many rows, frozen (see `pallas_kernels.cases`)."""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.cases import H100, SMALL, Case


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatmulCase(Case):
    """One call of `matmul`: rows [T, in] by a weight [in, out]."""

    num_tokens: int
    weight: tuple[int, int]

    @property
    def shapes(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Arrays of the call."""
        rows = self.num_tokens, self.weight[0]
        return tuple(
            jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in (rows, self.weight)
        )

    @property
    def num_operations(self) -> int:
        """Products and sums of numbers in one call."""
        return 2 * self.num_tokens * self.weight[0] * self.weight[1]


def _case(name, num_tokens, num_inputs, num_outputs, tags=H100):
    weight = num_inputs, num_outputs
    return MatmulCase(name=name, num_tokens=num_tokens, weight=weight, tags=tags)


# (in, out) of the products of a layer: heads, attention's output, gate and up, down.
LAYERS = {
    model: dict(zip(("heads", "out", "gate_up", "down"), weights, strict=True))
    for model, weights in dict(
        qwen3_8b=((4096, 6144), (4096, 4096), (4096, 24576), (12288, 4096)),
        qwen2_5_1_5b=((1536, 2048), (1536, 1536), (1536, 17920), (8960, 1536)),
        smollm2_135m=((576, 960), (576, 576), (576, 3072), (1536, 576)),
    ).items()
}


def _of_layer(model, num_tokens):
    """Returns the products of one layer, by what they make."""
    return tuple(
        _case(f"{model}_{name}_{num_tokens}", num_tokens, *weight)
        for name, weight in LAYERS[model].items()
    )


MATMUL_CASES = (
    # Rows that end in a tile, in its first half, and with it; outputs likewise.
    _case("matmul_single", 1, 64, 64, tags=SMALL),
    _case("matmul_ragged", 300, 192, 320, tags=SMALL),
    _case("matmul_half", 136, 128, 256, tags=SMALL),
    _case("matmul_whole", 256, 128, 576, tags=SMALL),
    *_of_layer("qwen3_8b", 2072),
    *_of_layer("qwen3_8b", 2048),
    *_of_layer("qwen2_5_1_5b", 2072),
    *_of_layer("smollm2_135m", 2072),
    _case("matmul_odd_rows", 601, 1536, 2048),
)
