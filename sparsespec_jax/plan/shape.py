"""The static sizes of a compiled step, and what follows from them. No jax."""

import dataclasses
import functools

import numpy as np

RESTORE_CHUNKS = 2  # most chunks that come back from host memory in one step
_TOKENS = 8  # cuBLAS takes multiples of them; XLA pads others, in a launch


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepShape:
    """The static sizes of a compiled step (axis letters in array_types.py)."""

    num_slots: int
    num_draft_tokens: int
    num_pages: int
    page_size: int
    table_width: int
    draft_table_width: int
    max_budget: int  # static width of a selection
    prefill_lanes: int
    prefill_chunk: int
    restore_pages: int = 0  # pages that may come back from host memory in one step
    drafts_at_once: bool = False  # a proposer drafts in the verifying step itself
    draft_steps: int | None = None  # of a cycle, at most; None: one per draft
    num_guesses: int = 0  # tokens that a draft lane checks beside its newest one
    is_aligned: bool = False  # all slots draft, then all verify; prompts by themselves
    part: str = ""  # of an aligned step: "draft", "verify" or "prompt"; "": all of it

    @property
    def num_queries(self):
        """Rows of a verification, Q = K + 1."""
        return self.num_draft_tokens + 1

    @functools.cached_property
    def num_draft_steps(self):
        """Draft steps of a cycle: one per draft, or fewer; 0 if they come at once."""
        if self.drafts_at_once:
            return 0
        steps = self.num_draft_tokens
        return steps if self.draft_steps is None else min(self.draft_steps, steps)

    @property
    def runs_cycles(self):
        """True if one step is a whole cycle of every slot, or prompt chunks alone."""
        return self.is_aligned and self.num_draft_steps > 0

    def parts(self):
        """(shape, prompt chunks) of each pass over the model that steps are made of."""
        if not self.runs_cycles:
            return (self, 0), (self, self.prefill_lanes)
        chunks = {"draft": 0, "verify": 0, "prompt": self.prefill_lanes}
        return tuple((self.of(part), count) for part, count in chunks.items())

    def of(self, part):
        """The shape of a part of an aligned step."""
        return dataclasses.replace(self, part=part)

    @property
    def most_committed(self):
        """Tokens that a verification of the largest K commits, or a few more.

        A draft table has room for twice as many behind the largest selection.
        """
        room = self.draft_table_width * self.page_size - self.max_budget
        return max((room + 1) // 2, self.num_queries)

    @functools.cached_property
    def cycle(self):
        """Steps from one verification of a slot to the next: K + 1, or fewer."""
        return 1 if self.runs_cycles else 1 + self.num_draft_steps

    @functools.cached_property
    def verify_lanes(self):
        """Verifications per step, E = ceil(S / cycle)."""
        if self.part in ("draft", "prompt"):
            return 0
        return -(-self.num_slots // self.cycle)

    @functools.cached_property
    def draft_lanes(self):
        """Draft lanes per step, A: all slots less those that verify in every step.

        More, up to the slots, where that makes the step's tokens a multiple of 8. None
        where no step drafts a token. Verifications are spread evenly; while they are
        not, a slot too many misses a draft. In aligned steps all slots draft; some
        idle lanes beside the verifications only make that multiple.
        """
        if not self.num_draft_steps or self.part == "prompt":
            return 0
        if self.runs_cycles and self.part != "verify":
            return self.num_slots
        least = 0 if self.runs_cycles else self.num_slots - self.num_slots // self.cycle
        verified = self.verify_lanes * self.num_queries
        for lanes in range(least, min(least + _TOKENS, self.num_slots + 1)):
            if (lanes * self.draft_queries + verified) % _TOKENS == 0:
                return lanes
        return least

    @property
    def draft_queries(self):
        """Rows of a draft lane: the newest token and the guesses behind it."""
        return 1 + self.num_guesses

    @property
    def num_draft_rows(self):
        """Rows of all draft lanes, the first of a step."""
        return self.draft_lanes * self.draft_queries

    @property
    def keeps_history(self):
        """True if the device keeps the token ids of every slot's text."""
        return self.drafts_at_once or self.num_guesses > 0

    @functools.cached_property
    def max_table_updates(self):
        """Page-table entries that one step can change."""
        growth = pages_for(self.num_queries, self.page_size) + 1
        chunk = pages_for(self.prefill_chunk, self.page_size) + 1
        per_verify = growth + (self.draft_table_width if self.draft_lanes else 0)
        shared = self.table_width  # one sample takes over its prompt's pages
        lanes = self.verify_lanes * per_verify + self.prefill_lanes * chunk
        return lanes + shared + self.restore_pages

    def with_draft_tokens(self, num_draft_tokens):
        """The shape of steps with another K over the same state."""
        return dataclasses.replace(self, num_draft_tokens=num_draft_tokens)

    def budget_tokens(self, length, *, ratio, floor, xp=np):
        """What a verification at committed `length` selects: `budget_tokens`."""
        cap = self.max_budget
        return budget_tokens(length, ratio=ratio, floor=floor, cap=cap, xp=xp)


def pages_for(num_tokens, page_size):
    """Pages that hold `num_tokens` tokens."""
    return -(-num_tokens // page_size)


def budget_tokens(length, *, ratio, floor, cap, xp=np):
    """Selected tokens at committed `length`: min(L, max(floor, ceil(s L)), cap).

    `xp` is numpy on the host and jax.numpy on the device. The product is taken in
    float32 on both sides so that the pages the host reserves match the rows the
    device writes.
    """
    length = xp.asarray(length, dtype=np.int32)
    ratio = xp.asarray(ratio, dtype=np.float32)
    scaled = xp.ceil(length.astype(np.float32) * ratio).astype(np.int32)
    return xp.minimum(xp.minimum(length, xp.maximum(floor, scaled)), cap)
