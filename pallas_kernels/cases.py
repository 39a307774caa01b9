"""Named shapes of every kernel. Tests, benchmarks and tuning use the same ones.

Tags: "small" runs in an interpreter within seconds, "shared" too (one index list for
all heads); "h100" and "tpu" are shapes of real loads for that platform, to compile or
to time.

Frozen: a recorded measurement names its case, so a case never changes its meaning.
Add a case under a new name instead.
"""

import dataclasses

import numpy as np

SMALL = frozenset({"small"})
LARGE = frozenset({"h100", "tpu"})
H100 = frozenset({"h100"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionCase:
    """One call of `paged_attention`."""

    name: str
    groups: tuple[tuple[int, int], ...]  # (num_lanes, num_queries)
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
    tags: frozenset[str] = LARGE

    @property
    def num_lanes(self) -> int:
        """Lanes of all groups."""
        return sum(lanes for lanes, _ in self.groups)

    @property
    def num_tokens(self) -> int:
        """Query rows of all groups, padding included."""
        return sum(lanes * queries for lanes, queries in self.groups)

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
        row_bytes = 2 * self.head_size * (2 if self.dtype == "bfloat16" else 4)
        return int(self.kv_length_array().sum()) * row_bytes

    def q_length_array(self) -> np.ndarray:
        """Returns q_lengths, int32 [lanes]; a lane without keys is idle."""
        full = [queries for lanes, queries in self.groups for _ in range(lanes)]
        q_lengths = np.asarray(self.q_lengths or full, np.int32)
        return np.where(np.asarray(self.kv_lengths) == 0, 0, q_lengths).astype(np.int32)

    def kv_length_array(self) -> np.ndarray:
        """Returns kv_lengths, int32 [lanes, H]."""
        lengths = np.asarray(self.kv_lengths)[:, None]
        shorter = lengths - self.head_step * np.arange(self.num_heads)
        least = np.minimum(lengths, self.q_length_array()[:, None])
        return np.maximum(shorter, least).astype(np.int32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatherCase:
    """One call of `gather_kv`."""

    name: str
    num_lanes: int
    context: int  # rows of the source table
    cap: int
    counts: tuple[int, ...] | None = None  # one per lane; None: cap
    head_step: int = 0  # KV head h has h * head_step rows less
    is_shared: bool = False  # one list for all heads
    num_heads: int = 8
    head_size: int = 128
    page_size: int = 64
    dtype: str = "bfloat16"
    tags: frozenset[str] = LARGE

    @property
    def num_lists(self) -> int:
        """Index lists of a lane."""
        return 1 if self.is_shared else self.num_heads

    @property
    def num_copied_bytes(self) -> int:
        """Bytes that a call reads, and again that it writes."""
        row_bytes = 2 * self.head_size * (2 if self.dtype == "bfloat16" else 4)
        row_bytes *= self.num_heads // self.num_lists
        return int(self.count_array().sum()) * row_bytes

    def count_array(self) -> np.ndarray:
        """Returns counts, int32 [lanes, lists]."""
        counts = np.asarray(self.counts or (self.cap,) * self.num_lanes)[:, None]
        fewer = counts - self.head_step * np.arange(self.num_lists)
        return np.maximum(fewer, 0).astype(np.int32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WriteCase:
    """One call of `write_rows`."""

    name: str
    num_rows: int
    num_copies: int = 0
    copies_from: int = 0
    num_heads: int = 8
    head_size: int = 128
    page_size: int = 64
    num_pages: int = 2048
    is_shared: bool = True  # one place for all heads
    dtype: str = "bfloat16"
    tags: frozenset[str] = LARGE

    @property
    def num_places(self) -> int:
        """Rows stored, those stored a second time included."""
        return self.num_rows + self.num_copies


@dataclasses.dataclass(frozen=True, kw_only=True)
class RotateCase:
    """One call of `rotate_heads`."""

    name: str
    num_tokens: int
    num_heads: int = 8
    group_size: int = 4
    head_size: int = 128
    is_normed: bool = True
    num_parts: int = 0  # of the projection; 0: it comes as one array of `dtype`
    dtype: str = "bfloat16"
    tags: frozenset[str] = LARGE

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[T, H, G + 2, D] of the projection."""
        return self.num_tokens, self.num_heads, self.group_size + 2, self.head_size

    @property
    def projection(self) -> tuple[tuple[int, ...], str]:
        """Shape and dtype in which the projection comes, with its parts."""
        if self.num_parts:
            return (self.num_parts, *self.shape), "float32"
        return self.shape, self.dtype


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormCase:
    """One call of `add_norm` on [T, N]."""

    name: str
    shape: tuple[int, int]
    dtype: str = "bfloat16"
    num_parts: int = 0  # of what is added; 0: it comes as one array like x
    tags: frozenset[str] = LARGE


_SMOLLM2 = dict(num_heads=3, group_size=3, head_size=64)
_TINY = dict(num_heads=2, page_size=8, dtype="float32", tags=SMALL)

ATTENTION_CASES = (
    # One lane of one token; one key.
    AttentionCase(name="one_key", groups=((1, 1),), kv_lengths=(1,), **_TINY),
    # Lengths one below, at and one above a page; an idle lane; an unused column.
    AttentionCase(
        name="page_edges",
        groups=((5, 1),),
        kv_lengths=(7, 8, 9, 0, 16),
        extra_columns=1,
        **_TINY,
    ),
    # Verification with short and idle lanes, mass of all rows.
    AttentionCase(
        name="verify_ragged",
        groups=((4, 3),),
        kv_lengths=(21, 40, 3, 0),
        q_lengths=(3, 1, 3, 0),
        mass_group=0,
        **_TINY,
    ),
    AttentionCase(
        name="verify_edges",
        groups=((4, 4),),
        kv_lengths=(30, 33, 24, 9),
        q_lengths=(4, 3, 1, 2),
        mass_group=0,
        mass_rows="edges",
        **_TINY,
    ),
    # A whole engine step: draft lanes (ragged over heads), verify lanes, a prefill.
    AttentionCase(
        name="step",
        groups=((3, 1), (2, 5), (1, 16)),
        kv_lengths=(17, 0, 12, 50, 64, 31),
        q_lengths=(1, 0, 1, 5, 5, 13),
        head_step=3,
        mass_group=1,
        extra_columns=2,
        **_TINY,
    ),
    # Nothing to do, as when an engine warms up.
    AttentionCase(
        name="idle",
        groups=((3, 1), (2, 5)),
        kv_lengths=(0,) * 5,
        mass_group=1,
        **_TINY,
    ),
    AttentionCase(name="idle_plain", groups=((64, 1),), kv_lengths=(0,) * 64, **_TINY),
    # First chunk of a prompt: no candidates yet.
    AttentionCase(
        name="prefill_first",
        groups=((2, 12),),
        kv_lengths=(12, 5),
        q_lengths=(12, 5),
        mass_group=0,
        **_TINY,
    ),
    AttentionCase(
        name="step_d64",
        groups=((2, 1), (2, 3)),
        kv_lengths=(19, 16, 33, 25),
        mass_group=1,
        **{**_TINY, **_SMOLLM2},
    ),
    AttentionCase(
        name="verify_g5",
        groups=((2, 2),),
        kv_lengths=(18, 24),
        mass_group=0,
        group_size=5,
        **_TINY,
    ),
    AttentionCase(
        name="verify_g8",
        groups=((2, 2),),
        kv_lengths=(17, 9),
        mass_group=0,
        group_size=8,
        head_size=64,
        **_TINY,
    ),
    # Several key blocks of a kernel, real page size.
    AttentionCase(
        name="verify_long",
        groups=((1, 1), (2, 9)),
        kv_lengths=(320, 1345, 1024),
        mass_group=1,
        **{**_TINY, "page_size": 64},
    ),
    AttentionCase(
        name="step_bf16",
        groups=((2, 1), (2, 9)),
        kv_lengths=(130, 64, 200, 129),
        mass_group=1,
        **{**_TINY, "page_size": 64, "dtype": "bfloat16"},
    ),
    AttentionCase(
        name="verify_8k", groups=((14, 9),), kv_lengths=(8192,) * 14, mass_group=0
    ),
    AttentionCase(
        name="verify_32k", groups=((14, 9),), kv_lengths=(32768,) * 14, mass_group=0
    ),
    AttentionCase(
        name="verify_131k", groups=((2, 9),), kv_lengths=(131072,) * 2, mass_group=0
    ),
    AttentionCase(
        name="verify_8k_edges",
        groups=((14, 9),),
        kv_lengths=(8192,) * 14,
        mass_group=0,
        mass_rows="edges",
    ),
    AttentionCase(name="draft_410", groups=((114, 1),), kv_lengths=(410,) * 114),
    AttentionCase(name="draft_1638", groups=((114, 1),), kv_lengths=(1638,) * 114),
    # The table of a long context beside short drafts: 1 MiB of page ids.
    AttentionCase(
        name="draft_wide_table",
        groups=((128, 1),),
        kv_lengths=(410,) * 128,
        extra_columns=2041,
        tags=frozenset({"tpu"}),
    ),
    AttentionCase(
        name="mixed",
        groups=((114, 1), (14, 9)),
        kv_lengths=(410,) * 114 + (8192,) * 14,
        mass_group=1,
    ),
    # Short drafts beside few long verifications, as in an engine of 64 slots.
    AttentionCase(
        name="step_2560",
        groups=((57, 1), (7, 9)),
        kv_lengths=(137,) * 57 + (2565,) * 7,
        mass_group=1,
        mass_rows="edges",
    ),
    AttentionCase(
        name="mixed_ragged",
        groups=((112, 1), (14, 9), (1, 256)),
        kv_lengths=tuple(64 + 13 * i for i in range(112))
        + tuple(1000 + 1777 * i for i in range(14))
        + (4096,),
        mass_group=1,
    ),
    AttentionCase(
        name="verify_8k_d64",
        groups=((14, 9),),
        kv_lengths=(8192,) * 14,
        mass_group=0,
        **_SMOLLM2,
    ),
    AttentionCase(
        name="verify_8k_g5",
        groups=((14, 9),),
        kv_lengths=(8192,) * 14,
        mass_group=0,
        group_size=5,
    ),
    AttentionCase(
        name="verify_8k_g8",
        groups=((14, 16),),
        kv_lengths=(8192,) * 14,
        mass_group=0,
        num_heads=4,
        group_size=8,
    ),
    AttentionCase(
        name="plain_8k", groups=((128, 1),), kv_lengths=(8192,) * 128, tags=LARGE
    ),
)

GATHER_CASES = (
    GatherCase(
        name="few_rows",
        num_lanes=3,
        context=40,
        cap=19,
        counts=(19, 8, 0),
        head_step=3,
        num_heads=2,
        page_size=8,
        dtype="float32",
        tags=SMALL,
    ),
    GatherCase(
        name="few_rows_bf16",
        num_lanes=2,
        context=64,
        cap=33,
        counts=(33, 16),
        head_step=1,
        num_heads=3,
        page_size=16,
        tags=SMALL,
    ),
    GatherCase(
        name="few_rows_d64",
        num_lanes=2,
        context=48,
        cap=20,
        counts=(17, 20),
        num_heads=3,
        head_size=64,
        page_size=16,
        dtype="float32",
        tags=SMALL,
    ),
    GatherCase(
        name="page_64",
        num_lanes=2,
        context=256,
        cap=70,
        counts=(70, 64),
        num_heads=2,
        tags=SMALL,
    ),
    GatherCase(
        name="shared_rows",
        num_lanes=2,
        context=64,
        cap=33,
        counts=(33, 16),
        is_shared=True,
        num_heads=3,
        page_size=16,
        tags=frozenset({"shared"}),
    ),
    GatherCase(
        name="gather_layer",
        num_lanes=14,
        context=32768,
        cap=1638,
        is_shared=True,
        tags=frozenset({"tpu"}),
    ),
    GatherCase(name="gather_512b", num_lanes=14, context=32768, cap=1638),
    GatherCase(name="gather_410", num_lanes=14, context=8192, cap=410),
    GatherCase(
        name="gather_d64",
        num_lanes=14,
        context=8192,
        cap=410,
        num_heads=3,
        head_size=64,
    ),
)

WRITE_CASES = (
    WriteCase(
        name="one_row",
        num_rows=1,
        num_heads=1,
        page_size=8,
        num_pages=3,
        dtype="float32",
        tags=SMALL,
    ),
    # Draft rows, then verified ones that are stored again.
    WriteCase(
        name="write_step",
        num_rows=7,
        num_copies=4,
        copies_from=3,
        num_heads=2,
        page_size=8,
        num_pages=6,
        tags=SMALL,
    ),
    WriteCase(
        name="write_per_head",
        num_rows=5,
        num_copies=3,
        copies_from=1,
        num_heads=3,
        head_size=64,
        page_size=16,
        num_pages=5,
        is_shared=False,
        tags=SMALL,
    ),
    # Steps of an engine: 64 slots, plain and with 8 verifications; a small model.
    WriteCase(name="write_plain", num_rows=64),
    WriteCase(name="write_136", num_rows=136, num_copies=72, copies_from=64),
    WriteCase(
        name="write_d64",
        num_rows=517,
        num_copies=261,
        copies_from=256,
        num_heads=3,
        head_size=64,
    ),
)

ROTATE_CASES = (
    RotateCase(name="single", num_tokens=1, head_size=16, dtype="float32", tags=SMALL),
    # Tokens that no tile divides, without and with a norm.
    RotateCase(
        name="rotate_ragged", num_tokens=11, is_normed=False, tags=SMALL, **_SMOLLM2
    ),
    RotateCase(name="rotate_bf16", num_tokens=9, num_heads=2, tags=SMALL),
    RotateCase(name="rotate_parts", num_tokens=9, num_heads=2, num_parts=3, tags=SMALL),
    RotateCase(
        name="rotate_parts_d64",
        num_tokens=5,
        is_normed=False,
        num_parts=2,
        tags=SMALL,
        **_SMOLLM2,
    ),
    # Steps of an engine: a large model, a small one, a prompt chunk beside the first.
    RotateCase(name="rotate_136", num_tokens=136),
    RotateCase(name="rotate_136_parts", num_tokens=136, num_parts=2),
    RotateCase(name="rotate_d64", num_tokens=512, is_normed=False, **_SMOLLM2),
    RotateCase(name="rotate_2184", num_tokens=2184),
)

NORM_CASES = (
    # Rows of a CTA, and of a warp; tokens that its warps do not divide; parts.
    NormCase(name="norm_wide", shape=(3, 1280), dtype="float32", tags=SMALL),
    NormCase(name="norm_narrow", shape=(9, 576), tags=SMALL),
    NormCase(name="norm_parts", shape=(3, 256), num_parts=3, tags=SMALL),
    NormCase(name="norm_parts_narrow", shape=(5, 96), num_parts=2, tags=SMALL),
    NormCase(name="norm_136", shape=(136, 4096)),
    NormCase(name="norm_136_parts", shape=(136, 4096), num_parts=2),
    NormCase(name="norm_49_parts", shape=(49, 4096), num_parts=8),
    NormCase(name="norm_512", shape=(512, 576)),
    NormCase(name="norm_2184", shape=(2184, 4096)),
)


def by_name(cases: tuple, name: str):
    """Returns the case called `name`."""
    found = [case for case in cases if case.name == name]
    if not found:
        names = ", ".join(case.name for case in cases)
        raise ValueError(f"no case is called {name!r}; there are {names}")
    return found[0]


def tagged(cases: tuple, tag: str) -> tuple:
    """Returns the cases that carry `tag`."""
    return tuple(case for case in cases if tag in case.tags)
