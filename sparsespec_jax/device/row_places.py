"""Where a step's rows of K and V go: pages and offsets of full and draft caches."""

from typing import NamedTuple

import jax.numpy as jnp

from sparsespec_jax.array_types import RowPlace, SelectedCounts, SlotCounts
from sparsespec_jax.device.lanes import StepLanes, take
from sparsespec_jax.plan.shape import StepShape


class RowPlaces(NamedTuple):
    """Where rows of K and V go; a page past the pool drops its row."""

    pages: RowPlace
    offsets: RowPlace  # row inside the page


def row_places(
    lanes: StepLanes, shape: StepShape, counts: SlotCounts
) -> list:  # of RowPlaces
    """RowPlaces of the step's tokens, in lane order; counts of selected rows."""
    draft, verify, prefill = lanes.draft, lanes.verify, lanes.prefill
    row = jnp.arange(shape.draft_queries)[None, :, None]
    place = (take(counts, draft.slots) + draft.tails[:, None])[:, None] + row
    is_fed = draft.is_active[:, None, None] & (row < draft.num_rows[:, None, None])
    place = jnp.where(is_fed, place, -1)
    table = take(lanes.draft_table, draft.slots)
    places = [_places(shape, table, place)]

    def add_span(slots, starts, counts, num_rows):
        """Places of positions starts.. of the slots' full tables."""
        row = jnp.arange(num_rows)[None]
        place = jnp.where(row < counts[:, None], starts[:, None] + row, -1)
        table = take(lanes.full_table, slots)
        places.append(_places(shape, table, place[..., None]))

    add_span(verify.slots, verify.starts, verify.num_rows, shape.num_queries)
    if prefill.slots.size:
        add_span(prefill.slots, prefill.starts, prefill.counts, shape.prefill_chunk)
    return places


def tail_places(
    lanes: StepLanes, shape: StepShape, selected: SelectedCounts
) -> RowPlaces:
    """RowPlaces of the verified rows in the draft caches, behind the selected ones."""
    verify = lanes.verify
    row = jnp.arange(shape.num_queries)[None, :, None]
    place = selected[:, None, :] + row
    place = jnp.where(row < verify.num_rows[:, None, None], place, -1)
    table = take(lanes.draft_table, verify.slots)
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


def concatenate(places: list) -> RowPlaces:
    """RowPlaces of a list, one behind the other."""
    heads = max(place.pages.shape[1] for place in places)
    return RowPlaces(
        *(
            jnp.concatenate([jnp.broadcast_to(p, (p.shape[0], heads)) for p in field])
            for field in zip(*places, strict=True)
        )
    )
