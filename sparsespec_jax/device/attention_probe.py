"""A look before exact numerics: does attention of a row depend on the rows beside it?

Pieces of keys at fixed places make it the row's own (`paged_attention`, `piece`). Here
it is tried with the lanes of every step that an engine may run: one row of a made-up
text, alone and among other lanes, as the only row of its lane and as the first of all;
and one row of a prompt chunk likewise. Their bits must be those of a call that every
engine tries.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.paged_attention import PIECE, LaneGroup, paged_attention
from sparsespec_jax.device.attention import lane_groups
from sparsespec_jax.models.config import ModelConfig
from sparsespec_jax.plan.shape import StepShape, pages_for

PARTS = {"verify": "attention of a verified token", "prefill": "that of a prompt chunk"}
_VISIBLE = 2 * PIECE + 77  # keys that a compared row sees, of three pieces
# What every engine tries: verifications of 9 rows, chunks of 128, one lane each.
_EVERYWHERE = {
    "verify": LaneGroup(1, 9, PIECE),
    "prefill": LaneGroup(1, 128, PIECE),
}


def check_attention(
    config: ModelConfig,
    shapes: Sequence[StepShape],
    *,
    impl: str,
    compiler_options: dict,
) -> None:
    """RuntimeError, naming the part, unless attention of a row is its own.

    The shapes are those of the steps of one engine.
    """
    attend = _Attend(config, shapes, impl, compiler_options)
    wanted = attend.rows(_EVERYWHERE, others=False, is_only=False)
    for groups in _layouts(shapes):
        for others, is_only in ((False, True), (True, True), (True, False)):
            found = attend.rows(groups, others=others, is_only=is_only)
            for name, row in found.items():
                if row.tobytes() != wanted[name].tobytes():
                    beside = "among others" if others else "alone"
                    rows = 1 if is_only else groups[name].num_queries
                    raise RuntimeError(
                        f"numerics='exact' cannot be kept: {PARTS[name]} has other "
                        f"bits {beside}, as one of {rows} rows, in a step of "
                        f"{groups}: use numerics='fast', and report device and versions"
                    )


def _layouts(shapes):
    """LaneGroups by name of every step of these shapes, each once."""
    layouts = [
        lane_groups(part, piece=PIECE, num_chunks=chunks)
        for shape in shapes
        for part, chunks in shape.parts()
        if part.part != "draft"  # drafts may be anything
    ]
    return list({str(layout): layout for layout in layouts}.values())


class _Attend:
    """Attention over one made-up text, by any lanes."""

    def __init__(self, config, shapes, impl, compiler_options):
        self.page_size = shapes[0].page_size
        widest = [group for layout in _layouts(shapes) for group in layout.values()]
        most = max(g.num_queries for g in (*widest, *_EVERYWHERE.values()))
        self.num_pages = pages_for(_VISIBLE + most, self.page_size)
        rng = np.random.default_rng(0)

        def normal(*shape):
            return jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)

        heads, size = config.num_kv_heads, config.head_dim
        self.query = normal(heads * config.group_size, size)
        self.pool = normal(self.num_pages, heads, self.page_size, 2 * size)
        self.impl, self.options = impl, tuple(compiler_options.items())

    def rows(self, groups, *, others, is_only):
        """The compared row [N, D] of each group that has one, as numpy arrays.

        others: whether the other lanes have rows too; is_only: whether the compared
        row is the only one of its lane.
        """
        lanes = [g for g in groups.values() for _ in range(g.num_lanes)]
        rng = np.random.default_rng(1)
        counts = np.array([rng.integers(1, g.num_queries + 1) for g in lanes])
        counts *= others
        lengths = (counts + rng.integers(0, _VISIBLE, len(lanes))) * (counts > 0)
        places, first_row, first_lane = {}, 0, 0
        for name, group in groups.items():
            if name in PARTS:
                count = 1 if is_only else group.num_queries
                counts[first_lane] = count
                lengths[first_lane] = _VISIBLE - 1 + count
                places[name] = first_row
            first_row += group.num_lanes * group.num_queries
            first_lane += group.num_lanes
        run = _compiled(tuple(groups.values()), self.impl, self.options)
        queries = jnp.broadcast_to(self.query, (first_row, *self.query.shape))
        pages = np.broadcast_to(np.arange(self.num_pages), (len(lanes), self.num_pages))
        out = run(queries, self.pool, jnp.asarray(pages, jnp.int32), lengths, counts)
        return {name: np.asarray(out[place]) for name, place in places.items()}


@functools.cache
def _compiled(groups, impl, options):
    def run(queries, pool, pages, lengths, counts):
        lengths = jnp.broadcast_to(lengths[:, None], (len(lengths), pool.shape[1]))
        return paged_attention(
            queries, pool, pages, lengths.astype(jnp.int32), counts.astype(jnp.int32),
            groups=groups, impl=impl,
        ).out  # fmt: skip

    return jax.jit(run, compiler_options=dict(options) or None)
