"""How an index of keys lies in memory: codes of few bits, page by page.

Keys of a page are rounded in groups: each channel of a group to 2**bits levels between
its smallest and its largest value (KIVI, arXiv 2402.02750, rounds keys by channel).
Of a group and KV head, one row of int32 words:

    [ range of channel 0 .. D-1 | words of channel 0 | words of channel 1 | ... ]

A range is what level -2**bits would be in bfloat16 (low half) and the step between
levels in bfloat16 (high half): 2**bits + level is one operation from the bits of a
level, so a key is widened by one multiplication and addition. Words hold up to 32 bits
of one channel. Neighbouring keys lie in
neighbouring words, so that the lanes of a warp, which take a word each, have
neighbouring keys in every field:

    block of 8 words, 4 bits:  word w = 0..7, field f = 0..7 is key 8 f + w
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

WORD_BITS = 32
WORDS_AT_ONCE = 8  # of a block: lanes of a warp that share a channel
_LARGE = 1e30
LEAST_STEP = 1e-30  # of a channel whose keys are all alike


@dataclasses.dataclass(frozen=True)
class CodeLayout:
    """Sizes of the codes of one page and KV head."""

    page_size: int
    head_size: int
    bits: int
    group: int  # keys that are rounded together; divides the page size

    def __post_init__(self):
        if self.bits not in (2, 4, 8):
            raise ValueError(f"bits is {self.bits}: codes have 2, 4 or 8")
        if self.group < 1 or self.page_size % self.group:
            raise ValueError(
                f"group is {self.group}, page_size {self.page_size}: groups of keys "
                "must divide a page"
            )

    @property
    def levels(self) -> int:
        """Levels of a code."""
        return 2**self.bits

    @property
    def groups(self) -> int:
        """Groups of a page."""
        return self.page_size // self.group

    @property
    def fields(self) -> int:
        """Keys of one word, all of which lie in one group."""
        return math.gcd(self.group, WORD_BITS // self.bits)

    @property
    def words(self) -> int:
        """Words of one channel of a group."""
        return self.group // self.fields

    @property
    def block_words(self) -> int:
        """Words whose keys are interleaved."""
        return math.gcd(self.words, WORDS_AT_ONCE)

    @property
    def row(self) -> int:
        """Words of a group and KV head."""
        return self.head_size * (1 + self.words)

    def shape(self, num_pages: int, num_heads: int) -> tuple[int, ...]:
        """Shape of the codes of a pool."""
        return num_pages, num_heads, self.groups, self.row


def code_layout(
    page_size: int, head_size: int, bits: int, largest_group: int
) -> CodeLayout:
    """Returns the layout with the largest groups that divide a page."""
    group = math.gcd(page_size, largest_group)
    return CodeLayout(page_size, head_size, bits, group)


def encode(keys: jax.Array, is_used: jax.Array, layout: CodeLayout) -> jax.Array:
    """Returns the rows of words int32 [..., row] of groups of keys [..., group, D].

    Keys that are not used ([..., group] False) may be NaN; their codes are 0. Of a
    group without any the row is 0.
    """
    is_used = is_used[..., None]
    keys = jnp.where(is_used, keys, 0).astype(jnp.float32)
    low = jnp.where(is_used, keys, _LARGE).min(-2)
    high = jnp.where(is_used, keys, -_LARGE).max(-2)
    has_keys, levels = is_used.any(-2), layout.levels
    step = jnp.where(has_keys, (high - low) / (levels - 1), 0.0).astype(jnp.bfloat16)
    wide_step = step.astype(jnp.float32)
    base = jnp.where(has_keys, low - levels * wide_step, 0.0).astype(jnp.bfloat16)
    level = keys - base.astype(jnp.float32)[..., None, :]
    level /= jnp.maximum(wide_step, LEAST_STEP)[..., None, :]
    level = jnp.clip(jnp.round(level) - levels, 0, levels - 1)
    level = jnp.where(is_used, level, 0).astype(jnp.uint32)
    lead, size = level.shape[:-2], layout.head_size
    fields, block = layout.fields, layout.block_words
    level = level.reshape(*lead, -1, fields, block, size)
    shift = layout.bits * jnp.arange(fields, dtype=jnp.uint32)
    words = (level << shift[:, None, None]).sum(-3, dtype=jnp.uint32)
    words = words.reshape(*lead, layout.words, size).swapaxes(-1, -2)
    ranges = _bits_of(base) | _bits_of(step) << 16
    parts = (ranges, words.reshape(*lead, -1))
    return jax.lax.bitcast_convert_type(jnp.concatenate(parts, -1), jnp.int32)


def _bits_of(x):
    return jax.lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32)


def ranges_of(rows: jax.Array, layout: CodeLayout) -> tuple[jax.Array, jax.Array]:
    """Returns (values of level -2**bits, steps) float32 [..., D] of rows of words."""
    words = rows[..., : layout.head_size]
    base = jax.lax.bitcast_convert_type(words << 16, jnp.float32)
    step = jax.lax.bitcast_convert_type(words & jnp.int32(-65536), jnp.float32)
    return base, step


def decode(rows: jax.Array, layout: CodeLayout) -> jax.Array:
    """Returns the rounded keys of rows of words, bfloat16 [..., group, D]."""
    lead, size = rows.shape[:-1], layout.head_size
    base, step = ranges_of(rows, layout)
    words = rows[..., size:].reshape(*lead, size, layout.words).swapaxes(-1, -2)
    fields, block = layout.fields, layout.block_words
    words = words.reshape(*lead, -1, 1, block, size)
    shift = layout.bits * jnp.arange(fields, dtype=jnp.int32)
    level = (words >> shift[:, None, None]) & (layout.levels - 1)
    level = level.reshape(*lead, layout.group, size).astype(jnp.float32)
    keys = (level + layout.levels) * step[..., None, :] + base[..., None, :]
    return keys.astype(jnp.bfloat16)
