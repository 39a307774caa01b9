"""The device state over a mesh: what is cut, and functions that run on every device.

Pages, counts and memories are cut by KV head, arrays of the vocabulary by token. Page
tables, plans, lengths and tokens are the same on every device, and each computes them
for itself from the same numbers.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sparsespec_jax.array_types import Outcome, PlanBuffer
from sparsespec_jax.device.editing import SlotEdits, load_slot, put_slot, slot_edits
from sparsespec_jax.device.state import DecodeState, LayerCache
from sparsespec_jax.models.collectives import MODEL_AXIS
from sparsespec_jax.models.config import ModelConfig
from sparsespec_jax.models.sharding import (
    check_cut,
    num_devices,
    param_specs,
    shardings,
)
from sparsespec_jax.plan.edits import StepExtras
from sparsespec_jax.policies.base import Policy, head_axis_of_memory
from sparsespec_jax.proposers.base import Cascade, FromTexts

P = PartitionSpec
POOL = P(None, MODEL_AXIS)  # [P, H, ps, KV]; counts [S, H] likewise
CHUNK = P(None, None, MODEL_AXIS)  # pages of all layers: [L, C, H, ps, KV]
_OF_VOCABULARY = ("bias", "ends", "counts", "in_prompt")  # fields of SlotEdits


def on_shards(
    function: Callable, mesh: Mesh, in_specs: Any, out_specs: Any
) -> Callable:
    """A function that runs on every device of a mesh over what that device has."""
    return jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )


def step_on(
    mesh: Mesh,
    policy: Policy,
    run: Callable,
    params: dict[str, Any],
    state: DecodeState,
    buffer: PlanBuffer,
) -> tuple[DecodeState, Outcome]:
    """(state, outcome) of `run(params, state, buffer)` on every device of a mesh.

    Arrays without elements stay outside: XLA (jaxlib 0.11.2) ends the process by a
    segmentation fault if one enters or leaves a program of several devices.
    """
    specs = jax.tree.leaves(state_specs(state, policy, mesh))
    leaves, tree = jax.tree.flatten(state)
    kept = [place for place, leaf in enumerate(leaves) if leaf.size]
    empty = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]

    def run_shard(params, arrays, buffer):
        own = [jnp.zeros(x.shape, x.dtype) if not x.size else None for x in empty]
        for place, array in zip(kept, arrays, strict=True):
            own[place] = array
        state, outcome = run(params, jax.tree.unflatten(tree, own), buffer)
        arrays = jax.tree.leaves(state)
        return [arrays[place] for place in kept], outcome

    of_arrays = [specs[place] for place in kept]
    in_specs = param_specs(params), of_arrays, P()
    run_shards = on_shards(run_shard, mesh, in_specs, (of_arrays, P()))
    arrays, outcome = run_shards(params, [leaves[place] for place in kept], buffer)
    for place, array in zip(kept, arrays, strict=True):
        leaves[place] = array
    return jax.tree.unflatten(tree, leaves), outcome


def mesh_of(array: jax.Array) -> Mesh | None:
    """The mesh that an array lies on; None on one device."""
    sharding = array.sharding
    return sharding.mesh if isinstance(sharding, NamedSharding) else None


def state_specs(state: Any, policy: Policy, mesh: Mesh) -> Any:
    """PartitionSpecs in the place of the arrays of a DecodeState of all devices."""
    specs = jax.tree.map(lambda _: P(), state)
    layers = tuple(_layer_specs(cache, policy, mesh) for cache in state.layers)
    return specs._replace(layers=layers, edits=edit_specs(state.edits))


def _layer_specs(cache, policy, mesh):
    counts, memory = cache.draft_counts, cache.policy_state
    by_head = P()
    if memory.size:
        num_heads, degree = cache.kv_pages.shape[1], mesh.shape[MODEL_AXIS]
        axis = head_axis_of_memory(policy, num_heads, degree)
        by_head = P(*[None] * (1 + axis), MODEL_AXIS)  # behind the slots
    of_heads = [x if x is None else POOL for x in (counts, cache.codes)]
    return LayerCache(POOL, of_heads[0], by_head, of_heads[1])


def edit_specs(edits: Any) -> Any:
    """PartitionSpecs in the place of what a SlotEdits holds; of None, None."""
    return _edit_specs(edits, P(None, MODEL_AXIS))


def _edit_specs(edits, of_vocabulary):
    if edits is None:
        return None
    found = {
        name: of_vocabulary if name in _OF_VOCABULARY else P()
        for name in SlotEdits._fields
        if getattr(edits, name) is not None
    }
    return SlotEdits(**dict.fromkeys(SlotEdits._fields) | found)


def made_on(mesh: Mesh | None, make: Callable, specs: Callable, *arrays: Any) -> Any:
    """The pytree that `make(*arrays)` gives, each device making its own part.

    `specs` gives its PartitionSpecs. Without a mesh it is made on the default device.
    """
    if mesh is None:
        return make(*arrays)
    wanted = shardings(mesh, specs(jax.eval_shape(make, *arrays)))
    return jax.jit(make, out_shardings=wanted)(*arrays)


def edits_on(
    mesh: Mesh | None, extras: StepExtras, num_slots: int, vocab_size: int, old: Any
) -> SlotEdits:
    """`slot_edits` on the devices of a mesh, or on the default device."""
    make = functools.partial(slot_edits, extras, num_slots, vocab_size)
    return made_on(mesh, make, edit_specs, old)


def load_slot_on(
    mesh: Mesh | None, edits: SlotEdits, slot: int, arrays: dict[str, Any]
) -> SlotEdits:
    """`load_slot` on the devices of a mesh, or on the default device."""
    if mesh is None:
        return load_slot(edits, slot, arrays)
    load = _loader(mesh, jax.tree.structure(edits))
    return load_slot(edits, slot, arrays, load)


@functools.cache
def _loader(mesh, structure):
    some = jax.tree.unflatten(structure, [True] * structure.num_leaves)
    specs, of_slot = edit_specs(some), _edit_specs(some, P(MODEL_AXIS))
    load = on_shards(put_slot, mesh, (specs, P(), of_slot), specs)
    return jax.jit(load, donate_argnums=0)


def check_tensor_parallel(
    config: ModelConfig, params: Any, degree: int, policy: Policy, proposer: Any
) -> None:
    """ValueError, naming the value and what would do, unless devices can share a model.

    params: where they lie is looked at.
    """
    if (held := num_devices(params)) not in (1, degree):
        raise ValueError(
            f"tensor_parallel is {degree}, the weights lie on {held} devices: use "
            f"EngineConfig(tensor_parallel={held}), or load the model with "
            f"tensor_parallel={degree}"
        )
    if degree == 1:
        return
    check_cut(config, degree)
    if policy.state_shape:
        head_axis_of_memory(policy, max(config.num_kv_heads, degree), degree)
    reads_texts = proposer is None or isinstance(proposer, FromTexts | Cascade)
    if not reads_texts:
        raise ValueError(
            f"tensor_parallel is {degree}, and proposer {type(proposer).__name__} "
            "reads weights that devices share: use one that drafts from texts "
            "('ngram', 'cascade'), 'self', or tensor_parallel=1"
        )
