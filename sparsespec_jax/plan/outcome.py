"""A step's outcome: one int32 array, packed and read here alone. No jax."""

from typing import NamedTuple

import numpy as np

SEED = -1  # in place of the accepted drafts of a seed verify, which has none to judge
_NUM_EMITTED, _NUM_ACCEPTED, _IS_DONE, _HEADER = range(4)


class PlannedVerifies(NamedTuple):
    """The verify lanes 0..n-1 of a dispatched step, kept until its outcome is read."""

    requests: list  # of Request
    num_rows: np.ndarray  # int64 [n], most rows that each commits (drafts + 1)
    num_queries: int  # Q of the step
    is_whole: np.ndarray  # bool [n], all draft steps of a cycle lie behind
    is_replay: np.ndarray  # bool [n], feeds known tokens alone: what it emits is known
    seed_starts: np.ndarray  # int64 [n], first position that a seed verify feeds
    chunks: list  # (Request, first position, number of tokens) of each prompt chunk
    num_top: int = 0  # likeliest tokens that the step tells with each token
    prompts: "PromptRows | None" = None  # what the step tells of prompts


class PromptRows(NamedTuple):
    """Sizes of what a step tells of prompts: rows of verifications, then of chunks."""

    num_lanes: int  # E
    num_queries: int  # Q
    num_chunks: int  # F, 0 in a step without prompt chunks
    chunk: int  # C
    num_top: int

    @property
    def num_ints(self):
        """Integers that hold all of it."""
        rows = self.num_lanes * self.num_queries + self.num_chunks * self.chunk
        return rows * (1 + 2 * self.num_top)


class PromptTold(NamedTuple):
    """Of rows that were fed: what the model says of the token behind each.

    Rows of all verifications come first, then those of all prompt chunks. Only rows of
    known tokens mean something.
    """

    logprobs: np.ndarray  # float32 [R]
    top_tokens: np.ndarray  # int32 [R, top], best first
    top_logprobs: np.ndarray  # float32 [R, top]

    def rows(self, first, count):
        """(log-probabilities, likeliest tokens as in `top_of`) of `count` rows."""
        rows = slice(first, first + count)
        found = zip(self.top_tokens[rows], self.top_logprobs[rows], strict=True)
        tops = [tuple(zip(ids.tolist(), x.tolist(), strict=True)) for ids, x in found]
        return self.logprobs[rows].tolist(), tops


class CascadeCounts(NamedTuple):
    """What a cascade did in one cycle: more columns of an outcome row."""

    drafts: int  # judged by the verification
    steps: int  # draft steps that fed tokens
    guesses: int  # tokens that they checked
    tail_keys: int  # keys that they read behind the selected and the verified ones


class StepOutcome(NamedTuple):
    """What a step's verify lanes produced, arrays with a leading lane axis."""

    num_emitted: np.ndarray  # int32 [E] tokens in this outcome, 0 for an idle lane
    num_accepted: np.ndarray  # int32 [E] accepted drafts; SEED for a seed verify
    is_done: np.ndarray  # bool [E] the device saw a stop token or the length limit
    # int32 [E, Q]: first num_emitted are valid. A seed verify's one is followed by what
    # it fed beside its first token, in the last places: see `known_logprobs`.
    tokens: np.ndarray
    logprobs: np.ndarray  # float32 [E, Q]
    cascade: np.ndarray | None  # int32 [E, 4], CascadeCounts of each lane
    # int32 and float32 [E, Q, top], best first, beside `tokens`; None if nobody asks.
    top_tokens: np.ndarray | None = None
    top_logprobs: np.ndarray | None = None
    prompts: PromptTold | None = None  # None if nobody asks

    def known_logprobs(self, lane, num_rows):
        """Log-probabilities of the last tokens that a seed verify of `num_rows` fed."""
        return self.logprobs[lane, self.logprobs.shape[1] - num_rows + 1 :]

    def pack(self, xp, as_int):
        """One int32 array [E, 3 + 2 Q], or with a cascade [E, 7 + 2 Q].

        Behind it come [E, 2 Q top] columns of the likeliest tokens, if they are told,
        and below all lanes rows as wide that hold what is told of prompts.
        `xp` is numpy or jax.numpy, `as_int` gives the bit patterns of float32 values.
        """
        bits = as_int(self.logprobs)
        done = self.is_done.astype(xp.int32)
        header = xp.stack([self.num_emitted, self.num_accepted, done], axis=1)
        if self.cascade is not None:
            header = xp.concatenate([header, self.cascade], axis=1)
        columns = [header, self.tokens, bits]
        if self.top_tokens is not None:
            tops = self.top_tokens, as_int(self.top_logprobs)
            columns += [top.reshape(len(top), -1) for top in tops]
        lanes = xp.concatenate(columns, axis=1)
        return (
            lanes
            if self.prompts is None
            else _with_told(lanes, self.prompts, xp, as_int)
        )

    @staticmethod
    def packed_of_none(xp, shape, num_top, prompts, as_int):
        """The packed outcome of a step of a StepShape that verifies nothing.

        `prompts` is its PromptTold, or None.
        """
        header = _HEADER + len(CascadeCounts._fields) * (shape.num_guesses > 0)
        columns = header + 2 * shape.num_queries * (1 + num_top)
        lanes = xp.zeros((0, columns), xp.int32)
        return lanes if prompts is None else _with_told(lanes, prompts, xp, as_int)

    @classmethod
    def from_packed(cls, packed, num_queries, num_top=0, prompts=None):
        """Read a packed outcome as numpy arrays.

        `num_top`: tokens told with each; `prompts`: PromptRows, if any are told of.
        """
        packed, told = np.asarray(packed), None
        if prompts is not None:
            packed, told = _without_told(packed, prompts)
        end = packed.shape[1] - 2 * num_queries * num_top
        header = end - 2 * num_queries
        counts = packed[:, _HEADER:header]
        tokens = packed[:, header : header + num_queries]
        bits = np.ascontiguousarray(packed[:, header + num_queries : end])
        tops = np.ascontiguousarray(packed[:, end:])
        tops = tops.reshape(len(packed), 2, num_queries, num_top)
        return cls(
            num_emitted=packed[:, _NUM_EMITTED],
            num_accepted=packed[:, _NUM_ACCEPTED],
            is_done=packed[:, _IS_DONE].astype(bool),
            tokens=tokens,
            logprobs=bits.view(np.float32),
            cascade=counts if counts.size else None,
            top_tokens=tops[:, 0] if num_top else None,
            top_logprobs=tops[:, 1].view(np.float32) if num_top else None,
            prompts=told,
        )

    def top_of(self, lane, count, most):
        """For each of a lane's first `count` tokens its `most` likeliest ones.

        Tuples of (token id, log-probability), best first, without tokens that the law
        excludes.
        """
        tokens = self.top_tokens[lane, :count, :most].tolist()
        logprobs = self.top_logprobs[lane, :count, :most].tolist()
        rows = zip(tokens, logprobs, strict=True)
        return [
            tuple(pair for pair in zip(*row, strict=True) if pair[1] > -np.inf)
            for row in rows
        ]


def _with_told(lanes, told, xp, as_int):
    """The packed rows of lanes, and below them a PromptTold in rows as wide."""
    ints = as_int(told.logprobs)[:, None], told.top_tokens, as_int(told.top_logprobs)
    flat = xp.concatenate(ints, axis=1).ravel()
    flat = xp.pad(flat, (0, -flat.size % lanes.shape[1]))
    return xp.concatenate([lanes, flat.reshape(-1, lanes.shape[1])])


def _without_told(packed, prompts):
    """(the packed rows of lanes, PromptTold) of a packed outcome with PromptRows."""
    lanes, below = np.split(packed, [prompts.num_lanes])
    ints = below.ravel()[: prompts.num_ints].reshape(-1, 1 + 2 * prompts.num_top)
    own, tokens, tops = np.split(ints, [1, 1 + prompts.num_top], axis=1)
    own, tops = (np.ascontiguousarray(x).view(np.float32) for x in (own, tops))
    return lanes, PromptTold(own[:, 0], tokens, tops)
