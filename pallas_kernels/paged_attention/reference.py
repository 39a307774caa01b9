"""The specification of paged attention, in plain jnp with float32 inside.

It is also what the engine runs on CPU, so keys are read in chunks of pages and only
as many chunks as the longest lane of a group needs.
"""

import functools
import math

import jax
import jax.numpy as jnp

from pallas_kernels.paged_attention.api import AttentionOutput, LaneGroup

_CHUNK_TOKENS = 512


@functools.partial(
    jax.jit, static_argnames=("groups", "scale", "mass_group", "mass_rows")
)
def paged_attention_reference(
    q: jax.Array,
    kv_pages: jax.Array,
    page_table: jax.Array,
    kv_lengths: jax.Array,
    q_lengths: jax.Array,
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
    for index, (num_lanes, num_queries) in enumerate(groups):
        lanes = slice(lane, lane + num_lanes)
        tokens = slice(token, token + num_lanes * num_queries)
        grouped = (num_lanes, num_queries, num_heads, num_q_heads // num_heads)
        out, probabilities = _attend_group(
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


def _attend_group(q, kv_pages, page_table, kv_lengths, q_lengths, scale):
    """Returns out [lanes, Q, H, G, D] and probabilities [lanes, H, Q, G, W*ps]."""
    num_lanes, num_queries, num_heads, group_size, head_size = q.shape
    page_size = kv_pages.shape[2]
    table_width = page_table.shape[1]
    chunk_pages = min(table_width, max(1, _CHUNK_TOKENS // page_size))
    padded_width = math.ceil(table_width / chunk_pages) * chunk_pages
    page_table = jnp.pad(page_table, ((0, 0), (0, padded_width - table_width)))
    chunk = chunk_pages * page_size
    num_chunks = (jnp.max(kv_lengths) + chunk - 1) // chunk

    def rows(i, half):  # one chunk of K or V: float32 [lanes, pages, H, ps, D]
        first = i * chunk_pages
        pages = jax.lax.dynamic_slice_in_dim(page_table, first, chunk_pages, 1)
        # Columns past a length may hold anything: read some page, mask it below.
        taken = kv_pages.at[pages].get(mode="clip")
        return jax.lax.split(taken, (head_size, head_size), 4)[half].astype(jnp.float32)

    # [lanes, H, Q * G, D]: the rows of one KV head are one matrix.
    rows_of_q = (num_lanes, num_heads, num_queries * group_size, head_size)
    q = q.astype(jnp.float32).transpose(0, 2, 1, 3, 4).reshape(rows_of_q)

    def add_logits(i, logits):
        new = jnp.einsum("lhrd,lwhpd->lhrwp", q, rows(i, 0), **_EXACT) * scale
        new = new.reshape(*logits.shape[:3], chunk)
        return jax.lax.dynamic_update_slice_in_dim(logits, new, i * chunk, 3)

    logits = jnp.zeros((*rows_of_q[:3], padded_width * page_size), jnp.float32)
    logits = jax.lax.fori_loop(0, num_chunks, add_logits, logits)
    logits = logits.reshape(num_lanes, num_heads, num_queries, group_size, -1)
    visible = _visible(kv_lengths, q_lengths, num_queries, logits.shape[-1])
    probabilities = _masked_softmax(logits, visible[:, :, :, None])
    flat = probabilities.reshape(*rows_of_q[:3], -1)

    def add_values(i, out):
        position = i * chunk + jnp.arange(chunk).reshape(chunk_pages, 1, page_size)
        used = position < kv_lengths[:, None, :, None]  # [lanes, pages, H, ps]
        v = jnp.where(used[..., None], rows(i, 1), 0.0)  # 0 * NaN would be NaN
        p = jax.lax.dynamic_slice_in_dim(flat, i * chunk, chunk, 3)
        p = p.reshape(*p.shape[:3], chunk_pages, page_size)
        return out + jnp.einsum("lhrwp,lwhpd->lhrd", p, v, **_EXACT)

    out = jax.lax.fori_loop(0, num_chunks, add_values, jnp.zeros_like(q))
    out = out.reshape(num_lanes, num_heads, num_queries, group_size, head_size)
    return (
        out.transpose(0, 2, 1, 3, 4),
        probabilities[..., : table_width * page_size],
    )


_EXACT = dict(precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def _visible(kv_lengths, q_lengths, num_queries, num_keys):
    """Returns bool [lanes, H, Q, keys]: which query sees which key."""
    query = jnp.arange(num_queries)[None, None, :, None]
    key = jnp.arange(num_keys)
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
    query = jnp.arange(num_queries)
    used = query < q_lengths[:, None]
    if mass_rows == "edges":
        used &= (query == 0) | (query == q_lengths[:, None] - 1)
    weights = used / jnp.maximum(used.sum(1, keepdims=True) * group_size, 1)
    mass = jnp.einsum("lhqgk,lq->lhk", probabilities, weights, **_EXACT)
    candidates = (kv_lengths - q_lengths[:, None])[:, :, None]
    return jnp.where(jnp.arange(num_keys) < candidates, mass, 0.0)
