"""Policies that score keys by the verification's queries instead of its attention.

Published as selectors of every decoding step; here they score once per verification
with the mean over its query rows, which is what a draft of k steps can reuse
(`per_step=True` gives the published form). They keep no index of
the keys between verifications: scoring reads the K half of the cache.
"""

import functools

import jax
import jax.numpy as jnp

from sparsespec_jax.array_types import (
    CandidateFlags,
    ChannelRanges,
    KeyRows,
    VerifyMass,
)
from sparsespec_jax.models.collectives import first_of_shard, num_shards
from sparsespec_jax.policies.base import (
    KeyIndex,
    Policy,
    SelectionView,
    candidates,
    top_tokens,
)

_LARGE = 1e30
NUM_CHANNELS = 16  # that the kernels of a stored index read


def _queries_by_group(view):
    """Valid query rows float32 [E, Q, H, G, D] (others 0) and 1 / their number [E]."""
    lanes, rows, _, size = view.queries.shape
    is_row = jnp.arange(rows)[None] < view.num_queries[:, None]
    queries = jnp.where(is_row[..., None, None], view.queries, 0).astype(jnp.float32)
    queries = queries.reshape(lanes, rows, view.num_kv_heads, -1, size)
    return queries, 1.0 / jnp.maximum(view.num_queries, 1)


def page_scores(view: SelectionView, page_size: int) -> VerifyMass:
    """Quest's bound on the logits of each page, spread over its keys.

    Per query head, sum over channels of max(q * min K, q * max K) over the page (Quest,
    arXiv 2406.10774, section 3.3); the mean over rows and group ranks pages for a KV
    head.
    """
    keys = view.keys().astype(jnp.float32)
    lanes, heads, num_keys, size = keys.shape
    num_pages = -(-num_keys // page_size)
    used = candidates(view)[..., None]
    widen = ((0, 0), (0, 0), (0, num_pages * page_size - num_keys), (0, 0))

    def by_page(masked):
        padded = jnp.pad(masked, widen, constant_values=masked.dtype.type(0))
        return padded.reshape(lanes, heads, num_pages, page_size, size)

    present = by_page(jnp.broadcast_to(used, keys.shape))
    paged = by_page(keys)
    low = jnp.where(present, paged, _LARGE).min(3)
    high = jnp.where(present, paged, -_LARGE).max(3)
    has_keys = present.any(3)
    low, high = (jnp.where(has_keys, bound, 0.0) for bound in (low, high))
    queries, share = _queries_by_group(view)
    # max(q * low, q * high) is q+ * high + q- * low with q split by sign.
    positive, negative = jnp.maximum(queries, 0), jnp.minimum(queries, 0)
    scores = jnp.einsum("lqhgd,lhpd->lhp", positive, high)
    scores += jnp.einsum("lqhgd,lhpd->lhp", negative, low)
    scores *= share[:, None, None]
    return jnp.repeat(scores, page_size, axis=-1)[..., :num_keys]


def _key_policy(name, select, per_step, **sizes):
    """A Policy that selects by queries and keys, with the sizes of its scores."""
    needs, select = ("queries", "keys"), functools.partial(select, **sizes)
    return Policy(name, needs, select, fixed_counts=not per_step, per_step=per_step)


def _quest(view, options, *, page_size):
    return top_tokens(view, page_scores(view, page_size), options)


@functools.cache
def quest(
    name: str = "quest", *, page_size: int = 16, per_step: bool = False
) -> Policy:
    """Quest (arXiv 2406.10774): pages whose key bounds promise the largest logits."""
    return _key_policy(name, _quest, per_step, page_size=page_size)


def label_scores(view: SelectionView, num_channels: int) -> VerifyMass:
    """Logits from each KV head's `num_channels` heaviest channels only.

    Double Sparsity (arXiv 2408.07092) ranks channels offline by calibration; here the
    mean |q| |k| over the verification's queries and the candidates ranks them.
    """
    keys = jnp.where(candidates(view)[..., None], view.keys(), 0).astype(jnp.float32)
    queries, share = _queries_by_group(view)
    weight = jnp.abs(queries).sum((1, 3)) * jnp.abs(keys).sum(2)  # [E, H, D]
    threshold = jnp.sort(weight, -1)[..., -num_channels][..., None]
    heavy = jnp.where(weight >= threshold, queries.sum((1, 3)), 0.0)
    return jnp.einsum("lhd,lhkd->lhk", heavy, keys) * share[:, None, None]


def _double_sparsity(view, options, *, num_channels):
    channels = min(num_channels, view.queries.shape[-1])
    return top_tokens(view, label_scores(view, channels), options)


@functools.cache
def double_sparsity(
    name: str = "double_sparsity", *, num_channels: int = 16, per_step: bool = False
) -> Policy:
    """Double Sparsity: tokens by the dot product over the heaviest channels."""
    return _key_policy(name, _double_sparsity, per_step, num_channels=num_channels)


def coded_keys(
    keys: KeyRows, used: CandidateFlags, *, bits: int, page_size: int
) -> tuple[KeyRows, ChannelRanges]:
    """What a `bits`-bit index keeps of keys: (values, ranges).

    Each channel of each page is rounded to 2**bits levels between its smallest and
    largest value over the `used` keys; `ranges` is that span, the mean over pages, a
    measure of how much the channel tells keys apart.
    """
    lanes, heads, num_keys, size = keys.shape
    num_pages = -(-num_keys // page_size)
    widen = ((0, 0), (0, 0), (0, num_pages * page_size - num_keys), (0, 0))

    def by_page(array):
        padded = jnp.pad(array, widen, constant_values=array.dtype.type(0))
        return padded.reshape(*array.shape[:2], num_pages, page_size, -1)

    present, paged = by_page(used[..., None]), by_page(keys)
    low = jnp.where(present, paged, _LARGE).min(3, keepdims=True)
    high = jnp.where(present, paged, -_LARGE).max(3, keepdims=True)
    has_keys = present.any(3, keepdims=True)
    span = jnp.where(has_keys, high - low, 0.0)
    step = jnp.maximum(span, 1e-6) / (2**bits - 1)
    level = jnp.clip(jnp.round((paged - low) / step), 0, 2**bits - 1)
    coded = jnp.where(present, level * step + low, 0.0)
    coded = coded.reshape(lanes, heads, -1, size)[:, :, :num_keys]
    count = jnp.maximum(has_keys.sum((2, 3)), 1)
    return coded, span.sum((2, 3)) / count


def _index(view, options, *, num_channels, bits, page_size):
    coded, ranges = coded_keys(
        view.keys().astype(jnp.float32),
        candidates(view),
        bits=bits,
        page_size=page_size,
    )
    queries, _ = _queries_by_group(view)  # of one row
    queries = queries[:, 0]
    weight = jnp.abs(queries).sum(2) * ranges  # [E, H, D]
    kept = min(num_channels, weight.shape[-1])
    threshold = jnp.sort(weight, -1)[..., -kept][..., None]
    heavy = jnp.where((weight >= threshold)[:, :, None], queries, 0.0)
    logits = jnp.einsum("lhgd,lhkd->lhgk", heavy, coded) * queries.shape[-1] ** -0.5
    used = candidates(view)[:, :, None]
    mass = jax.nn.softmax(jnp.where(used, logits, -_LARGE), -1).mean(2)
    return top_tokens(view, mass, options)


@functools.cache
def index_step(
    name: str = "index", *, num_channels: int = 16, bits: int = 4, page_size: int = 128
) -> Policy:
    """Each draft step picks its keys by an index of `bits`-bit keys.

    The step's query reads its heaviest channels only, chosen for each KV head by
    |q| times the channel's range (SparQ, arXiv 2312.04985, chooses by |q|), of keys
    rounded per channel and page (as KIVI, arXiv 2402.02750, stores them). The estimated
    attention, the mean of the group, ranks the keys. Nothing is trained, and no mass is
    needed of a verification.

    With 16 channels an engine keeps the index and its kernels select by it
    (`pallas_kernels/score_select`), where keys are rounded by groups that divide a page
    of the cache, at most `page_size` keys. `select`, which codes the keys when it
    scores them, serves recorded queries, and engines with another number of channels.
    """
    select = functools.partial(
        _index, num_channels=num_channels, bits=bits, page_size=page_size
    )
    # Two bounds of 16 bits per page and channel.
    read = num_channels * (bits + 32 / page_size)
    is_stored = num_channels == NUM_CHANNELS
    return Policy(
        name,
        ("queries", "keys"),
        select,
        fixed_counts=is_stored,
        per_step=True,
        index_bits=read,
        index=KeyIndex(bits, page_size) if is_stored else None,
    )


def _streaming_heads(view, options, *, page_size, num_streaming):
    scores = page_scores(view, page_size)
    position = jnp.arange(view.num_keys)[None, None]
    # Sinks first, then the newest: a sliding window as scores.
    window = jnp.where(position < options.num_sinks, _LARGE, position)
    head, axis = jnp.arange(view.num_kv_heads)[None, :, None], options.axis
    if axis is not None:
        head += first_of_shard(view.num_kv_heads, axis)
    num_heads = view.num_kv_heads * num_shards(axis)
    streaming = head >= num_heads - num_streaming(num_heads)
    return top_tokens(
        view, jnp.where(streaming, window, scores), options._replace(per_layer=False)
    )


def _half(num_heads):
    return num_heads // 2


@functools.cache
def lserve(name: str = "lserve", *, page_size: int = 16) -> Policy:
    """LServe (arXiv 2502.14866): half of the KV heads slide a window, half are Quest's.

    Which heads stream is calibrated offline there; here it is the upper half.
    """
    select = functools.partial(
        _streaming_heads, page_size=page_size, num_streaming=_half
    )
    return _key_policy(name, select, False)
