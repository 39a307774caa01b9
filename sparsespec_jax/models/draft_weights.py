"""Weights in 8 bits for drafts, made of the target's.

Whatever drafts, verification has the full weights, so the text stays the target's. The
tree is that of the target's parameters, with values and scales in place of the kernels
of all products, the vocabulary's included; norms, biases and the embedding table are
the target's own arrays.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from pallas_kernels.common import is_for_gpu
from pallas_kernels.int8_matmul import choose_parts, pack, quantise
from sparsespec_jax.models.collectives import MODEL_AXIS
from sparsespec_jax.models.config import ModelConfig
from sparsespec_jax.models.products import weight_shapes
from sparsespec_jax.models.sharding import kernel_spec
from sparsespec_jax.models.transformer import Params, params_dtype

# The key among parameters under which the compiled step finds the tree.
DRAFT_WEIGHTS = "draft_weights"


def with_draft_weights(
    config: ModelConfig,
    params: Params,
    *,
    kind: str | None,
    impl: str,
    mesh: Mesh | None = None,
) -> Params:
    """The parameters, and beside them those of drafts; as they are for None."""
    if kind is None:
        return params
    return params | {DRAFT_WEIGHTS: in_8_bits(config, params, impl=impl, mesh=mesh)}


def in_8_bits(
    config: ModelConfig, params: Params, *, impl: str, mesh: Mesh | None = None
) -> Params:
    """The tree that a Transformer with `in_8_bits` takes, see the module's docstring.

    impl: of the kernels, which say how values are laid out.
    mesh: on which the parameters lie; each device makes its own values and scales.
    """
    packs = impl if params_dtype(params) == jnp.bfloat16 else "reference"
    made = jax.tree.map(lambda array: array, params)  # dicts of its own
    for index in range(config.num_layers):
        layer = made[f"layer_{index}"]
        for name, weights in layer.items():
            if "kernel" in weights:
                layer[name] = _in_8_bits(name, weights, packs, mesh)
    if config.tie_embeddings:
        table = {"kernel": params["embed"]["weight"].T}
        return made | {"lm_head": _in_8_bits("lm_head", table, packs, mesh)}
    return made | {"lm_head": _in_8_bits("lm_head", params["lm_head"], packs, mesh)}


def _in_8_bits(module, weights, impl, mesh):
    pack = _packed if mesh is None else _packed_on(mesh, module)
    made = pack(weights["kernel"], impl=impl)
    return {name: x for name, x in weights.items() if name != "kernel"} | made


@functools.partial(jax.jit, static_argnames="impl")
def _packed(kernel, *, impl):
    return pack(quantise(kernel), impl=impl)._asdict()


@functools.cache
def _packed_on(mesh, module):
    """`_packed` on every device of a mesh, of its own part of a module's kernel."""

    def packed(kernel, *, impl):
        pack = functools.partial(_packed.__wrapped__, impl=impl)
        specs = kernel_spec(module), PartitionSpec(MODEL_AXIS)
        return jax.shard_map(
            pack, mesh=mesh, in_specs=specs[0], out_specs=specs[1], check_vma=False
        )(kernel)

    return jax.jit(packed, static_argnames="impl")


def num_bytes(config: ModelConfig, params: Any, *, impl: str) -> int:
    """Bytes that `in_8_bits` takes beside the parameters."""
    make = functools.partial(in_8_bits, config, impl=impl)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    shared = [x for path, x in leaves if path[-1].key != "kernel"]
    return _bytes(jax.tree.leaves(jax.eval_shape(make, params))) - _bytes(shared)


def _bytes(arrays):
    return sum(x.size * x.dtype.itemsize for x in arrays)


def check_served(config: ModelConfig, num_rows: int, dtype: Any, impl: str) -> None:
    """ValueError if no kernel makes the products of so many rows in 8 bits."""
    if not is_for_gpu(impl) or dtype != jnp.bfloat16:
        return
    vocabulary = config.hidden_size, config.vocab_size
    for size_in, size_out in (*weight_shapes(config), vocabulary):
        try:
            choose_parts(num_rows, size_in, size_out)
        except NotImplementedError as error:
            raise ValueError(
                f"draft_weights='int8' with {num_rows} draft rows a step: {error}; "
                "lower num_slots, or use draft_weights=None"
            ) from error
