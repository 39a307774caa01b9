"""What crosses the border between host and device each step: numpy and plain ints.

A `StepPlan` is a set of named int32 views into one buffer, so a step costs a single
host-to-device copy; a step's outcome comes back as one int32 array, decoded by
`StepOutcome`. Floats travel as their bit patterns.
"""

import dataclasses
import functools
import hashlib
import math
from typing import NamedTuple

import numpy as np

from sparsespec_jax.config import MAX_INT

# Columns of `slot_params`.
SEED_LOW, SEED_HIGH, TEMPERATURE, TOP_K, TOP_P, MIN_P, LIMIT, LOGPROB_MODE = range(8)
BUDGET_RATIO, MIN_BUDGET = 8, 9
STOP_IDS = 10
NUM_STOP_IDS = 8  # that the device looks for; the host looks for all
NUM_SLOT_PARAMS = STOP_IDS + NUM_STOP_IDS

NO_TOKEN = -1
# Values of `seed_counts` for a verification of all drafts, or of none of them.
NOT_SEED, PENDING_ONLY = -1, -2
FULL_TABLE, DRAFT_TABLE = 0, 1
RESTORE_CHUNKS = 2  # most chunks that come back from host memory in one step
_SMALLEST = float(np.finfo(np.float32).tiny)  # that no device takes for 0
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

    @property
    def num_queries(self):
        """Rows of a verification, Q = K + 1."""
        return self.num_draft_tokens + 1

    @functools.cached_property
    def verify_lanes(self):
        """Verifications per step, E = ceil(S / cycle)."""
        return -(-self.num_slots // self.cycle)

    @functools.cached_property
    def cycle(self):
        """Steps from one verification of a slot to the next: K + 1, or fewer."""
        if self.drafts_at_once:
            return 1
        steps = self.num_draft_tokens
        return 1 + (steps if self.draft_steps is None else min(self.draft_steps, steps))

    @functools.cached_property
    def draft_lanes(self):
        """Draft lanes per step, A: all slots less those that verify in every step.

        More, up to the slots, where that makes the step's tokens a multiple of 8. None
        where no step drafts a token. Verifications are spread evenly; while they are
        not, a slot too many misses a draft.
        """
        if self.cycle == 1:
            return 0
        least = self.num_slots - self.num_slots // self.cycle
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

    def fields(self, *, prefill):
        """Names and shapes of the plan's arrays, in buffer order."""
        shapes = {
            "slot_params": (self.num_slots, NUM_SLOT_PARAMS),
            "draft_slots": (self.draft_lanes,),
            "verify_slots": (self.verify_lanes,),
            "seed_counts": (self.verify_lanes,),
            "seed_starts": (self.verify_lanes,),
            "seed_tokens": (self.verify_lanes, self.num_queries),
            "table_updates": (self.max_table_updates, 4),
        }
        if prefill:
            shapes |= {
                "prefill_slots": (self.prefill_lanes,),
                "prefill_starts": (self.prefill_lanes,),
                "prefill_counts": (self.prefill_lanes,),
                "prefill_tokens": (self.prefill_lanes, self.prefill_chunk),
            }
        return shapes

    @functools.cached_property
    def _layouts(self):
        """(name, place in the buffer, shape) of every field, by `prefill`."""
        layouts = {}
        for prefill in (False, True):
            fields, end = self.fields(prefill=prefill), 0
            layouts[prefill] = []
            for name, shape in fields.items():
                start, end = end, end + math.prod(shape)
                layouts[prefill].append((name, slice(start, end), shape))
        return layouts

    def unpack(self, buffer, *, prefill):
        """Views of a packed plan (numpy or jax array) by field name."""
        return {
            name: buffer[place].reshape(shape)
            for name, place, shape in self._layouts[prefill]
        }

    def new_plan(self, *, prefill):
        """An empty plan: nothing drafted, verified, prefilled or changed."""
        end = self._layouts[prefill][-1][1].stop
        plan = StepPlan(np.zeros(end, np.int32), prefill, self)
        views = plan.views
        views["draft_slots"][:] = self.num_slots  # out of range: idle
        views["verify_slots"][:] = self.num_slots
        views["seed_counts"][:] = NOT_SEED
        views["table_updates"][:, 1] = self.num_slots  # out of range: dropped
        if prefill:
            views["prefill_slots"][:] = self.num_slots
        return plan


@dataclasses.dataclass(frozen=True, eq=False)
class StepPlan:
    """One step's orders: a packed int32 buffer and how to read it."""

    buffer: np.ndarray
    prefill: bool
    shape: StepShape

    @functools.cached_property
    def views(self):
        """The plan's arrays by name, sharing memory with the buffer."""
        return self.shape.unpack(self.buffer, prefill=self.prefill)


def put_seed(views, lane, start, tokens):
    """Order a seed verify of `tokens` at positions start..; views of a StepPlan."""
    views["seed_counts"][lane] = len(tokens) - 1
    views["seed_starts"][lane] = start
    views["seed_tokens"][lane, : len(tokens)] = tokens


def put_prefill(views, lane, slot, start, tokens):
    """Order a prompt chunk of `tokens` at positions start.. of a slot."""
    views["prefill_slots"][lane] = slot
    views["prefill_starts"][lane] = start
    views["prefill_counts"][lane] = len(tokens)
    views["prefill_tokens"][lane, : len(tokens)] = tokens


class PlannedVerifies(NamedTuple):
    """The verify lanes 0..n-1 of a dispatched step, kept until its outcome is read."""

    requests: list  # of Request
    num_rows: np.ndarray  # int64 [n], most rows that each commits (drafts + 1)
    num_queries: int  # Q of the step
    is_whole: np.ndarray  # bool [n], all draft steps of a cycle lie behind


class PageMove(NamedTuple):
    """Copy the pages of one chunk to host memory, or from there into the pool."""

    to_host: bool
    chunk: int  # host chunk
    pages: tuple[int, ...]  # pool pages, at most the pages of a chunk


# Columns of an outcome row, one row per verify lane.
NUM_EMITTED, NUM_ACCEPTED, IS_DONE = range(3)
OUTCOME_HEADER = 3


class CascadeCounts(NamedTuple):
    """What a cascade did in one cycle: more columns of an outcome row."""

    drafts: int  # judged by the verification
    steps: int  # draft steps that fed tokens
    guesses: int  # tokens that they checked
    tail_keys: int  # keys that they read behind the selected and the verified ones


class StepOutcome(NamedTuple):
    """What a step's verify lanes produced, as numpy arrays with a leading lane axis."""

    num_emitted: np.ndarray  # [E] tokens in this outcome, 0 for an idle lane
    num_accepted: np.ndarray  # [E] accepted drafts; NOT_SEED for a seed verify
    is_done: np.ndarray  # [E] the device saw a stop token or the length limit
    tokens: np.ndarray  # [E, Q] emitted tokens, first num_emitted are valid
    logprobs: np.ndarray  # float32 [E, Q]
    cascade: np.ndarray | None  # [E, 4], CascadeCounts of each lane

    @classmethod
    def from_packed(cls, packed, num_queries):
        """Decode the device's int32 [E, 3 + 2 Q], or [E, 7 + 2 Q], array."""
        packed = np.asarray(packed)
        header = packed.shape[1] - 2 * num_queries
        counts = packed[:, OUTCOME_HEADER:header]
        tokens = packed[:, header : header + num_queries]
        bits = np.ascontiguousarray(packed[:, header + num_queries :])
        return cls(
            num_emitted=packed[:, NUM_EMITTED],
            num_accepted=packed[:, NUM_ACCEPTED],
            is_done=packed[:, IS_DONE].astype(bool),
            tokens=tokens,
            logprobs=bits.view(np.float32),
            cascade=counts if counts.size else None,
        )


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


def stop_ids(eos_ids, sampling):
    """Token ids that end a request, a frozenset."""
    eos = () if sampling.ignore_eos else tuple(eos_ids)
    return frozenset(eos) | frozenset(sampling.stop_token_ids)


def slot_params(sampling, sample, limit, stops, speculation):
    """The device's record of a request, int32 [NUM_SLOT_PARAMS].

    `sample` counts the samples of a prompt, `limit` the tokens at which the request
    ends, `stops` are its stop token ids, of which the first few fit. A temperature
    that a device may round to 0 is 0.
    """
    params = np.full(NUM_SLOT_PARAMS, NO_TOKEN, np.int32)
    text = f"{sampling.seed}/{sample}".encode()
    digest = hashlib.blake2b(text, digest_size=8).digest()
    params[SEED_LOW : SEED_HIGH + 1] = np.frombuffer(digest, np.int32)
    floats = {
        TEMPERATURE: sampling.temperature * (sampling.temperature >= _SMALLEST),
        TOP_P: sampling.top_p,
        MIN_P: sampling.min_p,
        BUDGET_RATIO: speculation.budget_ratio,
    }
    params[list(floats)] = np.array(list(floats.values()), np.float32).view(np.int32)
    params[MIN_BUDGET] = speculation.min_budget
    params[TOP_K] = min(sampling.top_k, MAX_INT)
    params[LIMIT] = limit
    params[LOGPROB_MODE] = sampling.logprobs == "processed"
    known = sorted(i for i in stops if i <= MAX_INT)[:NUM_STOP_IDS]
    params[STOP_IDS : STOP_IDS + len(known)] = known
    return params
