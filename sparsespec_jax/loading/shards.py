"""Where published tensors go while a model is loaded: one device, or parts on several.

A device is sent its part of a tensor and nothing else, straight from the host.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sparsespec_jax.models.collectives import MODEL_AXIS
from sparsespec_jax.models.config import ModelConfig
from sparsespec_jax.models.sharding import loading_specs
from sparsespec_jax.models.transformer import param_shapes

P = PartitionSpec
_BY_OUTPUT, _BY_INPUT = P(MODEL_AXIS), P(None, MODEL_AXIS)
_HEADS = ("q", "k", "v")
# Of kernels [out, in] and biases [out]; what is not named goes to every device.
_SPECS = {
    **dict.fromkeys(("embed", "lm_head", *_HEADS, "gate", "up"), _BY_OUTPUT),
    **dict.fromkeys([f"{name}_bias" for name in (*_HEADS, "gate", "up")], _BY_OUTPUT),
    **dict.fromkeys(("out", "down"), _BY_INPUT),
}


@dataclasses.dataclass(frozen=True)
class Destination:
    """The devices that a model is loaded to."""

    config: ModelConfig
    mesh: Mesh | None = None  # None: the default device

    @property
    def has_own_heads(self) -> bool:
        """True if each device gets KV heads of its own."""
        return self.config.num_kv_heads % self.mesh.size == 0

    def spec(self, name: str) -> PartitionSpec:
        """How a published tensor is cut; see `loading_specs`."""
        if name.removesuffix("_bias") not in _HEADS or self.has_own_heads:
            return _SPECS.get(name, P())
        is_cut = self.config.hidden_size % self.mesh.size == 0
        return _BY_INPUT if name in _HEADS and is_cut else P()

    def put(self, name: str, array: np.ndarray) -> jax.Array:
        """A published tensor on the devices; it belongs to the result from then on."""
        if self.mesh is None:
            # Where the device's memory is the host's, taken over without a copy.
            return jax.device_put(array, may_alias=True)
        return jax.device_put(array, NamedSharding(self.mesh, self.spec(name)))

    def fused(self, fuse: Callable, raw: dict[str, jax.Array]) -> dict:
        """`fuse(raw, config=)` of a layer's tensors, on each device of its parts."""
        if self.mesh is None:
            return fuse(raw, config=self.config)
        return _fused(fuse, self, tuple(raw))(raw)

    def transposed(self, transpose: Callable, array: jax.Array) -> jax.Array:
        """`transpose` of a table [V, hidden] that is cut by V."""
        if self.mesh is None:
            return transpose(array)
        return _on(transpose, self.mesh, _BY_OUTPUT, _BY_INPUT)(array)


def _on(function, mesh, in_specs, out_specs):
    mapped = jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )
    return jax.jit(mapped)


@functools.lru_cache(maxsize=4)
def _fused(fuse, destination, names):
    """The compiled `fuse` for layers of these tensors."""
    config, degree = destination.config, destination.mesh.size
    heads = config.num_kv_heads // (degree if destination.has_own_heads else 1)
    own = dataclasses.replace(config, num_kv_heads=heads)
    specs = {name: destination.spec(name) for name in names}
    made = loading_specs(config, param_shapes(config)["layer_0"], degree)
    return _on(functools.partial(fuse, config=own), destination.mesh, (specs,), made)
