"""A step's orders: named int32 views into one buffer, packed and read here alone.

So a step costs a single copy from host to device. No jax.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import numpy as np

from sparsespec_jax.models.option_fields import MAX_INT
from sparsespec_jax.plan.shape import StepShape
from sparsespec_jax.plan.slot_params import NUM_SLOT_PARAMS

# Values of `seed_counts` for a verification of all drafts, or of none of them.
ALL_DRAFTS, PENDING_ONLY = -1, -2
FULL_TABLE, DRAFT_TABLE = 0, 1


class PageMove(NamedTuple):
    """Copy the pages of one chunk to host memory, or from there into the pool."""

    to_host: bool
    chunk: int  # host chunk
    pages: tuple[int, ...]  # pool pages, at most the pages of a chunk


def plan_fields(shape, *, prefill):
    """Names and shapes of a plan's arrays, in buffer order."""
    shapes = {
        "slot_params": (shape.num_slots, NUM_SLOT_PARAMS),
        "draft_slots": (shape.draft_lanes,),
        "verify_slots": (shape.verify_lanes,),
        "seed_counts": (shape.verify_lanes,),
        "seed_starts": (shape.verify_lanes,),
        "seed_tokens": (shape.verify_lanes, shape.num_queries),
        "table_updates": (shape.max_table_updates, 4),
    }
    if prefill:
        shapes |= {
            "prefill_slots": (shape.prefill_lanes,),
            "prefill_starts": (shape.prefill_lanes,),
            "prefill_counts": (shape.prefill_lanes,),
            "prefill_tokens": (shape.prefill_lanes, shape.prefill_chunk),
        }
    return shapes


@functools.cache
def _layout(shape, prefill):
    """(name, place in the buffer, shape) of every field."""
    layout, end = [], 0
    for name, field in plan_fields(shape, prefill=prefill).items():
        start, end = end, end + math.prod(field)
        layout.append((name, slice(start, end), field))
    return layout


def unpack(shape, buffer, *, prefill):
    """Views of a packed plan (numpy or jax array) by field name."""
    return {
        name: buffer[place].reshape(field)
        for name, place, field in _layout(shape, prefill)
    }


def orders_of(shape, plan):
    """What of an unpacked plan concerns a part of an aligned step, a StepShape.

    A part without lanes of a kind has none of their orders; its idle draft lanes come
    first of those that there are.
    """
    lanes = {"draft": shape.draft_lanes, "verify": shape.verify_lanes}
    lanes |= {"seed": shape.verify_lanes}
    orders = {
        name: field[: lanes.get(name.partition("_")[0], len(field))]
        for name, field in plan.items()
    }
    if shape.part == "verify":
        orders["draft_slots"] = np.full(shape.draft_lanes, shape.num_slots, np.int32)
    return orders


@dataclasses.dataclass(frozen=True, eq=False)
class StepPlan:
    """One step's orders: a packed int32 buffer and how to read it."""

    buffer: np.ndarray
    prefill: bool
    shape: StepShape

    @classmethod
    def empty(cls, shape, *, prefill):
        """A plan in which nothing is drafted, verified, prefilled or changed."""
        end = _layout(shape, prefill)[-1][1].stop
        plan = cls(np.zeros(end, np.int32), prefill, shape)
        views = plan.views
        views["draft_slots"][:] = shape.num_slots  # out of range: idle
        views["verify_slots"][:] = shape.num_slots
        views["seed_counts"][:] = ALL_DRAFTS
        views["table_updates"][:, 1] = shape.num_slots  # out of range: dropped
        if prefill:
            views["prefill_slots"][:] = shape.num_slots
        return plan

    @functools.cached_property
    def views(self):
        """The plan's arrays by name, sharing memory with the buffer."""
        return unpack(self.shape, self.buffer, prefill=self.prefill)

    def seed(self, lane, start, tokens):
        """Order a seed verify of `tokens` at positions start.. of a lane's slot."""
        views = self.views
        views["seed_counts"][lane] = len(tokens) - 1
        views["seed_starts"][lane] = start
        views["seed_tokens"][lane, : len(tokens)] = tokens

    def prefill_chunk(self, lane, slot, start, tokens, count):
        """Order a prompt chunk of `count` tokens at positions start.. of a slot.

        `tokens` are those and perhaps the one behind them, which is not fed.
        """
        views = self.views
        views["prefill_slots"][lane] = slot
        views["prefill_starts"][lane] = start
        views["prefill_counts"][lane] = count
        views["prefill_tokens"][lane, : len(tokens)] = tokens


def check_counts(shape):
    """ValueError if a step would count what does not fit into int32."""
    step_tokens = shape.num_draft_rows + shape.verify_lanes * shape.num_queries
    step_tokens += shape.prefill_lanes * shape.prefill_chunk
    plan = sum(math.prod(field) for field in plan_fields(shape, prefill=True).values())
    counts = {
        "tokens of a request": (
            shape.table_width * shape.page_size,
            "max_length or page_size",
        ),
        "tokens in a step": (
            step_tokens,
            "prefill_lanes, prefill_chunk or num_slots",
        ),
        "integers in the plan of a step": (
            plan,
            "host_chunk_pages, prefill_lanes, prefill_chunk or num_slots",
        ),
    }
    for what, (count, options) in counts.items():
        if count > MAX_INT:
            raise ValueError(
                f"the options make up to {count} {what}, at most {MAX_INT} can be "
                f"counted: lower {options}"
            )
