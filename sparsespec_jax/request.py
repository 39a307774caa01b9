"""What the host knows of one request. No jax."""

import array
import dataclasses
import enum

import numpy as np


class Status(enum.Enum):
    """Where a request is in its life."""

    WAITING = "waiting"  # no slot yet
    PREFILL = "prefill"  # has a slot; prompt chunks remain
    READY = "ready"  # its tokens are in the cache; waits for its phase
    RUNNING = "running"  # drafts and verifies
    FINISHED = "finished"


@dataclasses.dataclass(eq=False, slots=True)
class Request:
    """One request; its tokens lag the device by up to `lag` steps."""

    request_id: int
    tokens: array.array  # int32: prompt, then every emitted token the host has seen
    num_prompt: int
    limit: int  # tokens (prompt and output) at which it ends
    slot_params: np.ndarray  # int32 [NUM_SLOT_PARAMS]
    budget_ratio: float
    min_budget: int
    status: Status = Status.WAITING
    slot: int = -1  # -1 while it holds none
    prefilled: int = 0  # tokens whose prefill was planned
    is_seeded: bool = False  # the device holds its length and pending token
    verifies_in_flight: int = 0  # planned, outcome not read

    @property
    def committed(self):
        """Committed length the host knows of (the newest token is pending)."""
        return len(self.tokens) - 1


def token_array(tokens):
    """Token ids as the compact array that a Request keeps."""
    return array.array("i", tokens)
