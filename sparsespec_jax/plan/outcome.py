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

    def known_logprobs(self, lane, num_rows):
        """Log-probabilities of the last tokens that a seed verify of `num_rows` fed."""
        return self.logprobs[lane, self.logprobs.shape[1] - num_rows + 1 :]

    def pack(self, xp, as_int):
        """One int32 array [E, 3 + 2 Q], or with a cascade [E, 7 + 2 Q].

        `xp` is numpy or jax.numpy, `as_int` gives the bit patterns of float32 values.
        """
        bits = as_int(self.logprobs)
        done = self.is_done.astype(xp.int32)
        header = xp.stack([self.num_emitted, self.num_accepted, done], axis=1)
        if self.cascade is not None:
            header = xp.concatenate([header, self.cascade], axis=1)
        return xp.concatenate([header, self.tokens, bits], axis=1)

    @staticmethod
    def packed_of_none(xp, shape):
        """The packed outcome of a step of a StepShape that verifies nothing."""
        header = _HEADER + len(CascadeCounts._fields) * (shape.num_guesses > 0)
        return xp.zeros((0, header + 2 * shape.num_queries), xp.int32)

    @classmethod
    def from_packed(cls, packed, num_queries):
        """Read a packed outcome as numpy arrays."""
        packed = np.asarray(packed)
        header = packed.shape[1] - 2 * num_queries
        counts = packed[:, _HEADER:header]
        tokens = packed[:, header : header + num_queries]
        bits = np.ascontiguousarray(packed[:, header + num_queries :])
        return cls(
            num_emitted=packed[:, _NUM_EMITTED],
            num_accepted=packed[:, _NUM_ACCEPTED],
            is_done=packed[:, _IS_DONE].astype(bool),
            tokens=tokens,
            logprobs=bits.view(np.float32),
            cascade=counts if counts.size else None,
        )
