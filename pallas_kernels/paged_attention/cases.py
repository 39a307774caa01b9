"""Named shapes of paged attention, frozen (see `pallas_kernels.cases`).

Names begin with what the lanes of a case do: "verify", "draft", "chunk" and "prefill"
(prompts); "mixed" and "step" have several groups of them, as steps of an engine do.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.cases import H100, LARGE, SMALL, SMOLLM2, TIMED, TPU, Case, int32
from pallas_kernels.paged_attention.api import PIECE, LaneGroup

CHUNK = frozenset({"chunk"})  # small ones, for the launch of prompt chunks


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionCase(Case):
    """One call of `paged_attention`."""

    groups: tuple[tuple[int, ...], ...]  # (num_lanes, num_queries), some with a piece
    kv_lengths: tuple[int, ...]  # keys, one per lane
    q_lengths: tuple[int, ...] | None = None  # one per lane; None: every row is valid
    head_step: int = 0  # KV head h has h * head_step keys less (queries at least)
    num_heads: int = 8  # KV heads
    group_size: int = 4  # query heads per KV head
    head_size: int = 128
    page_size: int = 64
    extra_columns: int = 0  # table columns that no lane uses
    mass_group: int | None = None
    mass_rows: str = "all"
    dtype: str = "bfloat16"

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of the call."""
        return dict(
            groups=tuple(LaneGroup(*group) for group in self.groups),
            mass_group=self.mass_group,
            mass_rows=self.mass_rows,
        )

    @property
    def shapes(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Arrays of the call: three pages of the pool are in no table."""
        H, D, lanes = self.num_heads, self.head_size, self.num_lanes
        q = (self.num_tokens, H * self.group_size, D)
        pool = (self.num_used_pages + 3, H, self.page_size, 2 * D)
        q, pool = (jax.ShapeDtypeStruct(s, jnp.dtype(self.dtype)) for s in (q, pool))
        return q, pool, int32(lanes, self.table_width), int32(lanes, H), int32(lanes)

    @property
    def num_lanes(self) -> int:
        """Lanes of all groups."""
        return sum(lanes for lanes, *_ in self.groups)

    @property
    def num_tokens(self) -> int:
        """Query rows of all groups, padding included."""
        return sum(lanes * queries for lanes, queries, *_ in self.groups)

    @property
    def table_width(self) -> int:
        """Columns of the page table."""
        longest = max(1, *self.kv_lengths)
        return -(-longest // self.page_size) + self.extra_columns

    @property
    def num_used_pages(self) -> int:
        """Pages that hold at least one visible key."""
        return sum(-(-length // self.page_size) for length in self.kv_lengths)

    @property
    def num_kv_bytes(self) -> int:
        """Bytes of K and V that a call must read once (visible keys only)."""
        row_bytes = 2 * self.head_size * jnp.dtype(self.dtype).itemsize
        return int(self.kv_length_array().sum()) * row_bytes

    @property
    def num_flops(self) -> int:
        """Floating-point operations of both products over visible keys."""
        queries = self.q_length_array()[:, None].astype(np.int64)
        earlier = self.kv_length_array() - queries
        seen = (queries * earlier + queries * (queries + 1) // 2).sum()
        return int(seen) * self.group_size * 4 * self.head_size

    def q_length_array(self) -> np.ndarray:
        """Returns q_lengths, int32 [lanes]; a lane without keys is idle."""
        full = [queries for lanes, queries, *_ in self.groups for _ in range(lanes)]
        q_lengths = np.asarray(self.q_lengths or full, np.int32)
        return np.where(np.asarray(self.kv_lengths) == 0, 0, q_lengths).astype(np.int32)

    def kv_length_array(self) -> np.ndarray:
        """Returns kv_lengths, int32 [lanes, H]."""
        lengths = np.asarray(self.kv_lengths)[:, None]
        shorter = lengths - self.head_step * np.arange(self.num_heads)
        least = np.minimum(lengths, self.q_length_array()[:, None])
        return np.maximum(shorter, least).astype(np.int32)


def _case(name, groups, kv_lengths, **sizes):
    return AttentionCase(name=name, groups=groups, kv_lengths=kv_lengths, **sizes)


def _tiny(name, groups, kv_lengths, **sizes):
    tiny = dict(num_heads=2, page_size=8, dtype="float32", tags=SMALL)
    return _case(name, groups, kv_lengths, **{**tiny, **sizes})


def _verify(name, num_keys, num_lanes=14, num_queries=9, **sizes):
    groups, lengths = ((num_lanes, num_queries),), (num_keys,) * num_lanes
    return _case(name, groups, lengths, mass_group=0, **sizes)


def _draft(name, num_keys, num_lanes=114, **sizes):
    return _case(name, ((num_lanes, 1),), (num_keys,) * num_lanes, **sizes)


def _chunk(name, groups, kv_lengths, **sizes):
    return _case(name, groups, kv_lengths, tags=CHUNK, **sizes)


def _prefill(name, num_keys, **sizes):
    return _case(name, ((4, 512),), (num_keys,) * 4, **{"tags": H100, **sizes})


_TINY_CASES = (
    # One lane of one token; one key.
    _tiny("one_key", ((1, 1),), (1,)),
    # Lengths one below, at and one above a page; an idle lane; an unused column.
    _tiny("page_edges", ((5, 1),), (7, 8, 9, 0, 16), extra_columns=1),
    # Verification with short and idle lanes, mass of all rows.
    _tiny(
        "verify_ragged", ((4, 3),), (21, 40, 3, 0), q_lengths=(3, 1, 3, 0), mass_group=0
    ),
    _tiny(
        "verify_edges",
        ((4, 4),),
        (30, 33, 24, 9),
        q_lengths=(4, 3, 1, 2),
        mass_group=0,
        mass_rows="edges",
    ),
    # A whole engine step: draft lanes (ragged over heads), verify lanes, a prefill.
    _tiny(
        "step",
        ((3, 1), (2, 5), (1, 16)),
        (17, 0, 12, 50, 64, 31),
        q_lengths=(1, 0, 1, 5, 5, 13),
        head_step=3,
        mass_group=1,
        extra_columns=2,
    ),
    # Nothing to do, as when an engine warms up.
    _tiny("idle", ((3, 1), (2, 5)), (0,) * 5, mass_group=1),
    _tiny("idle_plain", ((64, 1),), (0,) * 64),
    # First chunk of a prompt: no candidates yet.
    _tiny("prefill_first", ((2, 12),), (12, 5), q_lengths=(12, 5), mass_group=0),
    _tiny("step_d64", ((2, 1), (2, 3)), (19, 16, 33, 25), mass_group=1, **SMOLLM2),
    _tiny("verify_g5", ((2, 2),), (18, 24), mass_group=0, group_size=5),
    _tiny("verify_g8", ((2, 2),), (17, 9), mass_group=0, group_size=8, head_size=64),
    # Several key blocks of a kernel, real page size.
    _tiny(
        "verify_long", ((1, 1), (2, 9)), (320, 1345, 1024), mass_group=1, page_size=64
    ),
    _tiny(
        "step_bf16",
        ((2, 1), (2, 9)),
        (130, 64, 200, 129),
        mass_group=1,
        page_size=64,
        dtype="bfloat16",
    ),
)

_LARGE_CASES = (
    _verify("verify_8k", 8192),
    _verify("verify_32k", 32768),
    _verify("verify_131k", 131072, num_lanes=2),
    _verify("verify_8k_edges", 8192, mass_rows="edges"),
    _draft("draft_410", 410),
    _draft("draft_1638", 1638),
    # The table of a long context beside short drafts: 1 MiB of page ids.
    _draft("draft_wide_table", 410, num_lanes=128, extra_columns=2041, tags=TPU),
    _case("mixed", ((114, 1), (14, 9)), (410,) * 114 + (8192,) * 14, mass_group=1),
    # Short drafts beside few long verifications, as in an engine of 64 slots.
    _case(
        "step_2560",
        ((57, 1), (7, 9)),
        (137,) * 57 + (2565,) * 7,
        mass_group=1,
        mass_rows="edges",
    ),
    _case(
        "mixed_ragged",
        ((112, 1), (14, 9), (1, 256)),
        (
            *(64 + 13 * i for i in range(112)),
            *(1000 + 1777 * i for i in range(14)),
            4096,
        ),
        mass_group=1,
    ),
    _verify("verify_8k_d64", 8192, **SMOLLM2),
    _verify("verify_8k_g5", 8192, group_size=5),
    _verify("verify_8k_g8", 8192, num_queries=16, num_heads=4, group_size=8),
    _draft("plain_8k", 8192, num_lanes=128, tags=LARGE),
)

_CHUNK_CASES = (
    # Prompt chunks: a first one, one behind other keys, a short one, an idle one.
    _chunk(
        "chunk_ragged",
        ((2, 1), (4, 40)),
        (9, 0, 40, 300, 0, 147),
        q_lengths=(1, 0, 40, 35, 0, 2),
        head_step=5,
        num_heads=2,
        page_size=16,
        extra_columns=1,
    ),
    # Ends at, and one behind, the edge of a page and of a block of 128 keys.
    _chunk("chunk_edges", ((3, 33),), (128, 129, 256), num_heads=1),
    _chunk(
        "chunk_d64", ((2, 50),), (193, 64), q_lengths=(50, 43), page_size=8, **SMOLLM2
    ),
    _chunk("chunk_g5", ((1, 30),), (270,), num_heads=1, group_size=5, page_size=128),
    _chunk(
        "chunk_g8",
        ((1, 20),),
        (139,),
        q_lengths=(17,),
        num_heads=2,
        group_size=8,
        head_size=64,
        page_size=32,
    ),
)

# Plain decoding, and steps of an engine whose drafts see 5 % of the keys.
_STEP_SIZES = dict(mass_group=1, mass_rows="edges", tags=TIMED)
_STEP_CASES = (
    _draft("plain_2560", 2560, num_lanes=64, tags=TIMED),
    _draft("plain_12800", 12800, num_lanes=24, tags=TIMED),
    _draft("plain_1500", 1500, num_lanes=128, tags=TIMED),
    _case(
        "step_12800",
        ((21, 1), (3, 9)),
        (649,) * 21 + (12805,) * 3,
        **_STEP_SIZES,
    ),
    _case(
        "step_1500",
        ((114, 1), (14, 9)),
        (84,) * 114 + (1505,) * 14,
        **_STEP_SIZES,
    ),
)

# Rows that are summed in pieces: Qwen3-8B, Qwen2.5-1.5B and SmolLM2.
_QWEN_1_5B = dict(num_heads=2, group_size=6)
_PIECE_CASES = tuple(
    _case(f"{kind}_pieces_{model}", groups, lengths, **sizes, **mass, tags=H100)
    for model, sizes in (("8b", {}), ("1b5", _QWEN_1_5B), ("135m", SMOLLM2))
    for kind, groups, lengths, mass in (
        ("plain", ((64, 1, PIECE),), (2560,) * 64, {}),
        (
            "step",
            ((57, 1), (7, 9, PIECE)),
            (137,) * 57 + (2565,) * 7,
            dict(mass_group=1, mass_rows="edges"),
        ),
    )
)

# Steps of an engine that reads prompts.
_PREFILL_CASES = (
    _prefill("prefill_6k", 6144, tags=TIMED),
    _prefill("prefill_12k", 12288),
    _case(
        "prefill_step",
        ((64, 1), (8, 9), (4, 512)),
        (410,) * 64 + (8192,) * 8 + (12288, 9216, 6144, 512),
        mass_group=1,
        mass_rows="edges",
        tags=H100,
    ),
    _case(
        "prefill_d64",
        ((64, 1), (4, 256)),
        (410,) * 64 + (8192, 4096, 2048, 256),
        page_size=16,
        tags=H100,
        **SMOLLM2,
    ),
    _prefill("prefill_g5", 12288, group_size=5),
)

ATTENTION_CASES = (
    *_TINY_CASES,
    *_LARGE_CASES,
    *_CHUNK_CASES,
    *_STEP_CASES,
    *_PIECE_CASES,
    *_PREFILL_CASES,
)
