"""Named shapes of attention of prompt chunks, frozen as those of `cases`.

CHUNK_CASES run in an interpreter within seconds, PREFILL_CASES are for a device.
"""

import numpy as np

from pallas_kernels.cases import H100, AttentionCase

CHUNK = frozenset({"chunk"})
_SMOLLM2 = dict(num_heads=3, group_size=3, head_size=64)

CHUNK_CASES = (
    # Prompt chunks: a first one, one behind other keys, a short one, an idle one.
    AttentionCase(
        name="chunk_ragged",
        groups=((2, 1), (4, 40)),
        kv_lengths=(9, 0, 40, 300, 0, 147),
        q_lengths=(1, 0, 40, 35, 0, 2),
        head_step=5,
        num_heads=2,
        page_size=16,
        extra_columns=1,
        tags=CHUNK,
    ),
    # Ends at, and one behind, the edge of a page and of a block of 128 keys.
    AttentionCase(
        name="chunk_edges",
        groups=((3, 33),),
        kv_lengths=(128, 129, 256),
        num_heads=1,
        tags=CHUNK,
    ),
    AttentionCase(
        name="chunk_d64",
        groups=((2, 50),),
        kv_lengths=(193, 64),
        q_lengths=(50, 43),
        page_size=8,
        tags=CHUNK,
        **_SMOLLM2,
    ),
    AttentionCase(
        name="chunk_g5",
        groups=((1, 30),),
        kv_lengths=(270,),
        num_heads=1,
        group_size=5,
        page_size=128,
        tags=CHUNK,
    ),
    AttentionCase(
        name="chunk_g8",
        groups=((1, 20),),
        kv_lengths=(139,),
        q_lengths=(17,),
        num_heads=2,
        group_size=8,
        head_size=64,
        page_size=32,
        tags=CHUNK,
    ),
)

# Steps of an engine that reads prompts.
PREFILL_CASES = (
    AttentionCase(
        name="prefill_6k", groups=((4, 512),), kv_lengths=(6144,) * 4, tags=H100
    ),
    AttentionCase(
        name="prefill_12k", groups=((4, 512),), kv_lengths=(12288,) * 4, tags=H100
    ),
    AttentionCase(
        name="prefill_step",
        groups=((64, 1), (8, 9), (4, 512)),
        kv_lengths=(410,) * 64 + (8192,) * 8 + (12288, 9216, 6144, 512),
        mass_group=1,
        mass_rows="edges",
        tags=H100,
    ),
    AttentionCase(
        name="prefill_d64",
        groups=((64, 1), (4, 256)),
        kv_lengths=(410,) * 64 + (8192, 4096, 2048, 256),
        page_size=16,
        tags=H100,
        **_SMOLLM2,
    ),
    AttentionCase(
        name="prefill_g5",
        groups=((4, 512),),
        kv_lengths=(12288,) * 4,
        group_size=5,
        tags=H100,
    ),
)


def num_flops(case: AttentionCase) -> int:
    """Returns the floating-point operations of both products over visible keys."""
    queries = case.q_length_array()[:, None].astype(np.int64)
    earlier = case.kv_length_array() - queries
    seen = (queries * earlier + queries * (queries + 1) // 2).sum()
    return int(seen) * case.group_size * 4 * case.head_size
