"""The device state: one donated pytree that only the compiled step replaces."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sparsespec_jax.array_types import (
    DraftTable,
    FullTable,
    HeadCounts,
    KeyCodes,
    KvPages,
    PageTable,
    PerSlot,
    RowsOfTables,
    SameCounts,
    SlotCounters,
    SlotFlags,
    SlotMemory,
    SlotTexts,
    SlotTokens,
)
from sparsespec_jax.device.acceptance import DraftLaw
from sparsespec_jax.device.editing import SlotEdits
from sparsespec_jax.device.lanes import take
from sparsespec_jax.models.config import ModelConfig
from sparsespec_jax.plan.shape import StepShape
from sparsespec_jax.policies.base import Policy
from sparsespec_jax.proposers.base import RememberingProposer


class LayerCache(NamedTuple):
    """What one layer keeps between steps."""

    kv_pages: KvPages
    # Selected rows at the head of a draft cache; None if counts are fixed.
    draft_counts: HeadCounts | None
    policy_state: SlotMemory  # what the policy remembers; often empty
    # The index of a policy's keys, page by page like the pool; None without one.
    codes: KeyCodes | None = None


class DecodeState(NamedTuple):
    """Everything the device knows of the requests in its slots."""

    layers: tuple[LayerCache, ...]
    draft_counts: SameCounts | None  # of all layers if counts are fixed
    full_table: FullTable  # P where no page is
    draft_table: DraftTable
    lengths: PerSlot  # committed length L
    tokens: SlotTokens  # the pending token, then the drafts
    num_drafted: PerSlot  # drafts made in this cycle
    draft_tails: PerSlot  # committed rows behind the selected ones
    done: SlotFlags  # stopped or never started
    draft_law: DraftLaw  # of slots and drafts; empty unless the ratio test needs it
    history: SlotTexts  # token ids for a proposer, else empty
    proposer_memory: Any  # pytree of a proposer that remembers, else None
    # CascadeCounts of this cycle but for the drafts; None if no cascade.
    cascade_counts: SlotCounters | None
    edits: SlotEdits | None = None  # of logits; None while no request asks for any


def new_state(
    model_config: ModelConfig,
    shape: StepShape,
    *,
    kv_dtype: Any,
    draft_top_m: int,
    policy: Policy,
    proposer: Any = None,
) -> DecodeState:
    """An empty DecodeState; pages hold zeros."""
    slots, rows = shape.num_slots, shape.num_queries
    pool = (
        shape.num_pages,
        model_config.num_kv_heads,
        shape.page_size,
        2 * model_config.head_dim,
    )
    drafts = (slots, shape.num_draft_tokens, draft_top_m)
    fixed_counts, remembered = policy.fixed_counts, (0,)
    num_keys = shape.table_width * shape.page_size
    if policy.state_shape and shape.draft_lanes:
        remembered = policy.state_shape(model_config.num_kv_heads, num_keys)

    index = None
    if shape.num_draft_steps:
        index = policy.index_layout(shape.page_size, model_config.head_dim)

    def layer():
        counts = jnp.zeros((slots, model_config.num_kv_heads), jnp.int32)
        memory = jnp.zeros((slots, *remembered), jnp.float32)
        counts = None if fixed_counts else counts
        codes = None if index is None else jnp.zeros(index.shape(*pool[:2]), jnp.int32)
        return LayerCache(jnp.zeros(pool, kv_dtype), counts, memory, codes)

    return DecodeState(
        layers=tuple(layer() for _ in range(model_config.num_layers)),
        draft_counts=jnp.zeros((slots, 1), jnp.int32) if fixed_counts else None,
        full_table=jnp.full((slots, shape.table_width), shape.num_pages, jnp.int32),
        draft_table=jnp.full(
            (slots, shape.draft_table_width), shape.num_pages, jnp.int32
        ),
        lengths=jnp.zeros(slots, jnp.int32),
        tokens=jnp.zeros((slots, rows), jnp.int32),
        num_drafted=jnp.zeros(slots, jnp.int32),
        draft_tails=jnp.zeros(slots, jnp.int32),
        done=jnp.ones(slots, bool),
        draft_law=DraftLaw(
            jnp.zeros(drafts, jnp.int32), jnp.zeros(drafts, jnp.float32)
        ),
        history=jnp.zeros((slots, num_keys * shape.keeps_history), jnp.int32),
        proposer_memory=proposer.init_memory(shape)
        if isinstance(proposer, RememberingProposer)
        else None,
        cascade_counts=jnp.zeros((slots, 3), jnp.int32) if shape.num_guesses else None,
    )


def read_rows(kv_pages: KvPages, tables: PageTable) -> RowsOfTables:
    """Rows of page tables; junk where no page is."""
    pages = take(kv_pages, tables).swapaxes(1, 2)
    return pages.reshape(*pages.shape[:2], -1, pages.shape[-1])


def pool_bytes_per_page(
    model_config: ModelConfig, page_size: int, kv_dtype: Any
) -> int:
    """Bytes of one page over all layers."""
    row = 2 * model_config.head_dim * jnp.dtype(kv_dtype).itemsize
    heads = model_config.num_kv_heads * model_config.num_layers
    return heads * page_size * row


def bytes_per_page(
    model_config: ModelConfig, shape: StepShape, kv_dtype: Any, policy: Policy
) -> int:
    """Bytes of one page over all layers, those of an index of its keys included."""
    total = pool_bytes_per_page(model_config, shape.page_size, kv_dtype)
    layout = policy.index_layout(shape.page_size, model_config.head_dim)
    if layout is None or not shape.num_draft_steps:
        return total
    words = math.prod(layout.shape(1, model_config.num_kv_heads))
    return total + 4 * words * model_config.num_layers


def committed(arrays: Any) -> Any:
    """The same arrays, bound to where they are; nothing is copied.

    Pages that come back from host memory are bound to their device, and a step whose
    inputs changed from free to bound would compile again. NumPy's arrays are copied to
    the default device.
    """

    def bind(array):
        array = jnp.asarray(array)
        return jax.device_put(array, array.sharding)

    return jax.tree.map(bind, arrays)
