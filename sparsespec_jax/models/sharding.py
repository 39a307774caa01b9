"""A model cut over the devices of one mesh axis: who has which part of each weight.

    embed/weight            [V, hidden]              by V
    layer_I/qkv             [hidden, H, G+2, D]      by H, its bias too
    layer_I/out             [N*D, hidden]            by N
    layer_I/gate_up         [hidden, 2, inner]       by inner, its bias too
    layer_I/down            [inner, hidden]          by inner
    lm_head                 [hidden, V]              by V

Norms, and the biases behind the two sums, are on every device. Where there are fewer KV
heads than devices, each stands on several of them, with its share of the query heads:
such a model is one of as many KV heads as devices (`with_heads_for`).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from sparsespec_jax.array_types import Array
from sparsespec_jax.models.collectives import MODEL_AXIS
from sparsespec_jax.models.config import ModelConfig

P = PartitionSpec
_REPLICATED = P()
# By module and parameter; what is not named is on every device.
_SPECS = {
    ("embed", "weight"): P(MODEL_AXIS),
    ("lm_head", "kernel"): P(None, MODEL_AXIS),
    ("qkv", "kernel"): P(None, MODEL_AXIS),
    ("qkv", "bias"): P(MODEL_AXIS),
    ("out", "kernel"): P(MODEL_AXIS),
    ("gate_up", "kernel"): P(None, None, MODEL_AXIS),
    ("gate_up", "bias"): P(None, MODEL_AXIS),
    ("down", "kernel"): P(MODEL_AXIS),
}
# Weights in 8 bits are made where their kernel is, each device's behind the others'.
_IN_8_BITS = ("values", "scale")
_BESIDE_NORMS = ("lm_head", "qkv", "out", "gate_up", "down")


def model_mesh(degree: int) -> Mesh | None:
    """The first `degree` devices as a mesh of one axis; None for one device.

    Raises:
      ValueError: there are fewer devices.
    """
    if degree == 1:
        return None
    devices = jax.devices()
    if degree > len(devices):
        raise ValueError(
            f"tensor_parallel is {degree}, this process has {len(devices)} "
            f"{devices[0].platform} device(s): lower it (a CPU makes as many as "
            "XLA_FLAGS=--xla_force_host_platform_device_count says)"
        )
    return Mesh(devices[:degree], (MODEL_AXIS,))


def num_devices(params: Any) -> int:
    """Devices that parameters lie on; 1 for arrays of the host."""
    weight = params["embed"]["weight"]
    return len(weight.devices()) if isinstance(weight, jax.Array) else 1


def check_cut(config: ModelConfig, degree: int) -> None:
    """ValueError, naming the size, unless `degree` devices can share a model."""
    sizes = {
        "num_heads": config.num_heads,
        "intermediate_size": config.intermediate_size,
        "vocab_size": config.vocab_size,
    }
    for name, size in sizes.items():
        if size % degree:
            raise ValueError(_uncut(degree, name, size, config))
    heads = config.num_kv_heads
    if heads % degree and degree % heads:
        raise ValueError(_uncut(degree, "num_kv_heads", heads, config))


def _uncut(degree, name, size, config):
    fit = [n for n in range(1, config.num_heads + 1) if _fits(config, n)]
    return (
        f"tensor_parallel is {degree}, the model's {name} is {size}, which "
        f"{degree} devices cannot share evenly: use one of {', '.join(map(str, fit))}"
    )


def _fits(config, degree):
    sizes = config.num_heads, config.intermediate_size, config.vocab_size
    heads = config.num_kv_heads
    is_even = heads % degree == 0 or degree % heads == 0
    return is_even and not any(size % degree for size in sizes)


def with_heads_for(config: ModelConfig, degree: int) -> ModelConfig:
    """The same model with a KV head for each device at least; see the module."""
    heads = max(config.num_kv_heads, degree)
    return dataclasses.replace(config, num_kv_heads=heads)


def shard_of(config: ModelConfig, degree: int) -> ModelConfig:
    """What one of `degree` devices has of a model, as a model of its own."""
    if degree == 1:
        return config
    whole = with_heads_for(config, degree)
    return dataclasses.replace(
        whole,
        vocab_size=whole.vocab_size // degree,
        intermediate_size=whole.intermediate_size // degree,
        num_heads=whole.num_heads // degree,
        num_kv_heads=whole.num_kv_heads // degree,
    )


def kernel_spec(module: str) -> PartitionSpec:
    """The PartitionSpec of a module's kernel."""
    return _SPECS[module, "kernel"]


def param_specs(params: Any) -> Any:
    """PartitionSpecs of a parameter tree, weights in 8 bits included."""

    def spec(path, _):
        module, name = path[-2].key, path[-1].key
        if name in _IN_8_BITS and module in _BESIDE_NORMS:
            return P(MODEL_AXIS)
        return _SPECS.get((module, name), _REPLICATED)

    return jax.tree_util.tree_map_with_path(spec, params)


def shardings(mesh: Mesh, specs: Any) -> Any:
    """NamedShardings of PartitionSpecs."""
    return jax.tree.map(functools.partial(NamedSharding, mesh), specs)


def loading_specs(config: ModelConfig, params: Any, degree: int) -> Any:
    """PartitionSpecs of a parameter tree with the KV heads that its file has.

    Heads that will stand on several devices are cut by `hidden` until they do.
    """
    specs = param_specs(params)
    if config.num_kv_heads % degree == 0:
        return specs
    first = P(MODEL_AXIS) if config.hidden_size % degree == 0 else _REPLICATED

    def spec(path, made):
        if path[-2].key != "qkv":
            return made
        return first if path[-1].key == "kernel" else _REPLICATED

    return jax.tree_util.tree_map_with_path(spec, specs)


def loading_shardings(config: ModelConfig, params: Any, mesh: Mesh | None) -> Any:
    """Shardings of a parameter tree as it is loaded; without a mesh, of one device."""
    if mesh is None:
        device = SingleDeviceSharding(jax.devices()[0])
        return jax.tree.map(lambda _: device, params)
    return shardings(mesh, loading_specs(config, params, mesh.size))


def place_params(config: ModelConfig, params: Any, mesh: Mesh) -> Any:
    """A model's parameters on the devices of a mesh, with heads for each of them.

    Of arrays that are in their place nothing is copied. No device gets more than its
    part and the norms.
    """
    degree = mesh.shape[MODEL_AXIS]
    placed = jax.device_put(params, loading_shardings(config, params, mesh))
    copies = degree // config.num_kv_heads
    if copies <= 1:
        return placed
    for name, layer in placed.items():
        if "qkv" in layer:
            placed[name] = layer | {"qkv": _repeated(layer["qkv"], mesh, copies)}
    return placed


def _repeated(qkv, mesh, copies):
    """Weights of queries and KV rows with every KV head `copies` times."""
    specs = {name: _SPECS["qkv", name] for name in qkv}
    repeat = functools.partial(_repeat_heads, copies=copies)
    return {
        name: jax.jit(
            functools.partial(repeat, axis=array.ndim - 3),
            out_shardings=NamedSharding(mesh, specs[name]),
        )(array)
        for name, array in qkv.items()
    }


def _repeat_heads(array: Array, *, copies: int, axis: int) -> Array:
    """[.., H, G + 2, D] to [.., H * copies, G / copies + 2, D]."""
    heads, size = array.shape[axis], array.shape[-1]
    queries, rows = jnp.split(array, [array.shape[axis + 1] - 2], axis + 1)
    lead = array.shape[:axis]
    queries = queries.reshape(*lead, heads * copies, -1, size)
    rows = jnp.repeat(rows, copies, axis)
    return jnp.concatenate([queries, rows], axis + 1)
