"""Where a step's rows of K and V go: pages and offsets of full and draft caches."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class RowPlaces(NamedTuple):
    """Where rows of K and V go; a page past the pool drops its row."""

    pages: jax.Array  # int32 [n, H], or [n, 1] for all heads
    offsets: jax.Array  # int32, like pages: row inside the page


def row_places(lanes, shape, counts):
    """RowPlaces of the step's tokens, in lane order; counts [S, H or 1]."""
    row = jnp.arange(shape.draft_queries)[None, :, None]
    place = (lanes.of_draft(counts) + lanes.draft_tails[:, None])[:, None] + row
    is_fed = lanes.draft_active[:, None, None] & (row < lanes.draft_rows[:, None, None])
    place = jnp.where(is_fed, place, -1)
    table = lanes.of_draft(lanes.draft_table)
    verify = lanes.verify
    places = [
        _places(shape, table, place),
        _span(shape, lanes, verify.slots, verify.starts, verify.num_rows,
              shape.num_queries),
    ]  # fmt: skip
    if lanes.prefill_slots.size:
        places.append(
            _span(
                shape,
                lanes,
                lanes.prefill_slots,
                lanes.prefill_starts,
                lanes.prefill_counts,
                shape.prefill_chunk,
            )
        )
    return places


def _span(shape, lanes, slots, starts, counts, num_rows):
    """RowPlaces of positions starts.. of the slots' full tables, `num_rows` each."""
    row = jnp.arange(num_rows)[None]
    place = jnp.where(row < counts[:, None], starts[:, None] + row, -1)
    table = lanes.full_table.at[slots].get(mode="clip")
    return _places(shape, table, place[..., None])


def tail_places(lanes, shape, selected):
    """RowPlaces of the verified rows in the draft caches, behind the selected ones."""
    verify = lanes.verify
    row = jnp.arange(shape.num_queries)[None, :, None]
    place = selected[:, None, :] + row
    place = jnp.where(row < verify.num_rows[:, None, None], place, -1)
    table = lanes.draft_table.at[verify.slots].get(mode="clip")
    return _places(shape, table, place)


def _places(shape, tables, places):
    """RowPlaces of cache indices `places` [lanes, n, H or 1] of tables [lanes, W].

    Rows with a negative place or no page are dropped.
    """
    lanes, num, heads = places.shape
    column = jnp.maximum(places, 0) // shape.page_size
    pages = jnp.take_along_axis(
        tables,
        column.reshape(lanes, num * heads),
        axis=1,
        mode="fill",
        fill_value=shape.num_pages,
    ).reshape(places.shape)
    pages = jnp.where((places >= 0) & (pages >= 0), pages, shape.num_pages)
    flat = (lanes * num, heads)
    return RowPlaces(pages.reshape(flat), (places % shape.page_size).reshape(flat))


def concatenate(places):
    """RowPlaces of a list, one behind the other."""
    heads = max(place.pages.shape[1] for place in places)
    return RowPlaces(
        *(
            jnp.concatenate([jnp.broadcast_to(p, (p.shape[0], heads)) for p in field])
            for field in zip(*places, strict=True)
        )
    )
