"""The specification of paged attention, in plain jnp with float32 inside.

It is also what the engine runs on CPU, so keys are read in chunks of pages and only
as many chunks as the longest lane of a group needs.
"""

import functools
import math

import jax
import jax.numpy as jnp

from pallas_kernels.array_types import KvPagesOfD, PageTable, PerHead, PerLane, Queries
from pallas_kernels.paged_attention.api import AttentionOutput, LaneGroup

_CHUNK_TOKENS = 512


@functools.partial(
    jax.jit, static_argnames=("groups", "scale", "mass_group", "mass_rows")
)
def paged_attention_reference(
    q: Queries,
    kv_pages: KvPagesOfD,
    page_table: PageTable,
    kv_lengths: PerHead,
    q_lengths: PerLane,
    *,
    groups: tuple[LaneGroup, ...],
    scale: float | None = None,
    mass_group: int | None = None,
    mass_rows: str = "all",
) -> AttentionOutput:
    """Returns what `api.paged_attention` documents; same arguments, no checks."""
    num_q_heads, head_size = q.shape[1:]
    num_heads = kv_pages.shape[1]
    scale = head_size**-0.5 if scale is None else scale
    outs, mass, lane, token = [], None, 0, 0
    for index, (num_lanes, num_queries, _) in enumerate(groups):
        lanes = slice(lane, lane + num_lanes)
        tokens = slice(token, token + num_lanes * num_queries)
        grouped = (num_lanes, num_queries, num_heads, num_q_heads // num_heads)
        attend = _attend_and_weigh if index == mass_group else _attend
        out, probabilities = attend(
            q[tokens].reshape(*grouped, head_size),
            kv_pages,
            page_table[lanes],
            kv_lengths[lanes],
            q_lengths[lanes],
            scale,
        )
        outs.append(out.reshape(-1, num_q_heads, head_size).astype(q.dtype))
        if index == mass_group:
            mass = _mass(probabilities, kv_lengths[lanes], q_lengths[lanes], mass_rows)
        lane, token = lanes.stop, tokens.stop
    return AttentionOutput(jnp.concatenate(outs), mass)


class _Keys:
    """K and V of a lane group, read in chunks of `size` keys."""

    def __init__(self, kv_pages, page_table, kv_lengths):
        page_size, table_width = kv_pages.shape[2], page_table.shape[1]
        self.chunk_pages = min(table_width, max(1, _CHUNK_TOKENS // page_size))
        self.size = self.chunk_pages * page_size
        width = math.ceil(table_width / self.chunk_pages) * self.chunk_pages
        self.padded = width * page_size
        self.num_keys = table_width * page_size
        self.num_chunks = (jnp.max(kv_lengths) + self.size - 1) // self.size
        self._table = jnp.pad(page_table, ((0, 0), (0, width - table_width)))
        self._pages = kv_pages
        self._lengths = kv_lengths

    def read(self, i):
        """K and V of chunk i, float32 [lanes, H, keys, D]: matrices as they lie."""
        pages = jax.lax.dynamic_slice_in_dim(
            self._table, i * self.chunk_pages, self.chunk_pages, 1
        )
        # Columns past a length may hold anything: read some page, mask it later.
        head = jnp.arange(self._pages.shape[1])[None, :, None]
        rows = self._pages.at[pages[:, None], head].get(mode="clip")
        rows = rows.reshape(*self._lengths.shape, self.size, -1).astype(jnp.float32)
        k, v = jnp.split(rows, 2, axis=-1)
        position = i * self.size + jnp.arange(self.size)[None, None]
        used = position < self._lengths[:, :, None]
        return k, jnp.where(used[..., None], v, 0.0)  # 0 * NaN would be NaN


def _rows_by_head(q):
    """[lanes, Q, H, G, D] to [lanes, H, Q * G, D]: one matrix per KV head."""
    lanes, num_queries, num_heads, group_size, head_size = q.shape
    q = q.astype(jnp.float32).transpose(0, 2, 1, 3, 4)
    return q.reshape(lanes, num_heads, num_queries * group_size, head_size)


def _by_query(rows, num_queries):
    """The inverse of `_rows_by_head`."""
    lanes, num_heads, _, head_size = rows.shape
    rows = rows.reshape(lanes, num_heads, num_queries, -1, head_size)
    return rows.transpose(0, 2, 1, 3, 4)


def _attend(q, kv_pages, page_table, kv_lengths, q_lengths, scale):
    """Returns (out [lanes, Q, H, G, D], None), by a running softmax over chunks."""
    num_queries, group_size = q.shape[1], q.shape[3]
    keys = _Keys(kv_pages, page_table, kv_lengths)
    rows = _rows_by_head(q)

    def add(i, carry):
        highest, total, out = carry
        k, v = keys.read(i)
        logits = jnp.einsum("lhrd,lhkd->lhrk", rows, k, **_EXACT) * scale
        visible = _visible(
            kv_lengths, q_lengths, num_queries, i * keys.size + jnp.arange(keys.size)
        )
        visible = jnp.repeat(visible, group_size, axis=2)
        logits = jnp.where(visible, logits, -jnp.inf)
        new_highest = jnp.maximum(highest, logits.max(-1))
        safe = jnp.where(jnp.isfinite(new_highest), new_highest, 0.0)
        weights = jnp.exp(logits - safe[..., None])
        shrink = jnp.exp(highest - safe)
        new = jnp.einsum("lhrk,lhkd->lhrd", weights, v, **_EXACT)
        return (
            new_highest,
            total * shrink + weights.sum(-1),
            out * shrink[..., None] + new,
        )

    lowest = jnp.full(rows.shape[:3], -jnp.inf)
    start = (lowest, jnp.zeros_like(lowest), jnp.zeros_like(rows))
    _, total, out = jax.lax.fori_loop(0, keys.num_chunks, add, start)
    out = out / jnp.where(total == 0.0, 1.0, total)[..., None]
    return _by_query(out, num_queries), None


def _attend_and_weigh(q, kv_pages, page_table, kv_lengths, q_lengths, scale):
    """Returns out [lanes, Q, H, G, D] and probabilities [lanes, H, Q, G, W*ps]."""
    num_queries, group_size = q.shape[1], q.shape[3]
    keys = _Keys(kv_pages, page_table, kv_lengths)
    rows = _rows_by_head(q)

    def add_logits(i, logits):
        new = jnp.einsum("lhrd,lhkd->lhrk", rows, keys.read(i)[0], **_EXACT) * scale
        return jax.lax.dynamic_update_slice_in_dim(logits, new, i * keys.size, 3)

    logits = jnp.zeros((*rows.shape[:3], keys.padded), jnp.float32)
    logits = jax.lax.fori_loop(0, keys.num_chunks, add_logits, logits)
    logits = logits.reshape(*rows.shape[:2], num_queries, group_size, -1)
    visible = _visible(kv_lengths, q_lengths, num_queries, jnp.arange(keys.padded))
    probabilities = _masked_softmax(logits, visible[:, :, :, None])
    flat = probabilities.reshape(*rows.shape[:3], -1)

    def add_values(i, out):
        p = jax.lax.dynamic_slice_in_dim(flat, i * keys.size, keys.size, 3)
        return out + jnp.einsum("lhrk,lhkd->lhrd", p, keys.read(i)[1], **_EXACT)

    out = jax.lax.fori_loop(0, keys.num_chunks, add_values, jnp.zeros_like(rows))
    return _by_query(out, num_queries), probabilities[..., : keys.num_keys]


_EXACT = dict(precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def _visible(kv_lengths, q_lengths, num_queries, key):
    """Returns bool [lanes, H, Q, keys]: which query sees which key of `key`."""
    query = jnp.arange(num_queries)[None, None, :, None]
    key = key[None, None, None, :]
    q_lengths = q_lengths[:, None, None, None]
    last = kv_lengths[:, :, None, None] - q_lengths + query
    return (query < q_lengths) & (key <= last)


def _masked_softmax(logits, visible):
    """Returns the softmax over visible keys; all zero where nothing is visible."""
    highest = jnp.max(logits, axis=-1, keepdims=True, where=visible, initial=-jnp.inf)
    highest = jnp.where(jnp.isfinite(highest), highest, 0.0)
    weights = jnp.where(visible, jnp.exp(logits - highest), 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return weights / jnp.where(total == 0.0, 1.0, total)


def _mass(probabilities, kv_lengths, q_lengths, mass_rows):
    """Returns the mean probability of each candidate key, [lanes, H, W*ps]."""
    num_queries, group_size, num_keys = probabilities.shape[2:]
    query = jnp.arange(num_queries)[None]
    used = query < q_lengths[:, None]
    if mass_rows == "edges":
        used &= (query == 0) | (query == q_lengths[:, None] - 1)
    weights = used / jnp.maximum(used.sum(1, keepdims=True) * group_size, 1)
    mass = jnp.einsum("lhqgk,lq->lhk", probabilities, weights, **_EXACT)
    candidates = (kv_lengths - q_lengths[:, None])[:, :, None]
    return jnp.where(jnp.arange(num_keys)[None, None] < candidates, mass, 0.0)
