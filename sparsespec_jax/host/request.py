"""What the host knows of one request. No jax."""

import array
import dataclasses
import enum

import numpy as np

from sparsespec_jax.host.prompt_logprobs import PromptLogprobs
from sparsespec_jax.plan.edits import RequestEdits


class Status(enum.Enum):
    """Where a request is in its life."""

    WAITING = "waiting"  # no slot yet
    PREFILL = "prefill"  # has a slot; prompt chunks remain
    READY = "ready"  # its tokens are in the cache; waits for its phase
    RUNNING = "running"  # drafts and verifies
    PREEMPTED = "preempted"  # keeps its slot, but not all of its pages
    FINISHED = "finished"


@dataclasses.dataclass(eq=False, slots=True)
class Request:
    """One request; its tokens lag the device by up to `lag` steps.

    Only the scheduler writes to it.
    """

    request_id: int
    tokens: array.array  # int32: prompt, then every emitted token the host has seen
    num_prompt: int
    limit: int  # tokens (prompt and output) at which it ends
    slot_params: np.ndarray  # int32 [NUM_SLOT_PARAMS]
    budget_ratio: float
    min_budget: int
    expected_length: int | None = None  # tokens it will have (`oracle` only)
    prompt_group: int | None = None  # the same for all samples of a prompt
    edits: RequestEdits | None = None  # what it changes of its logits
    prompt_logprobs: PromptLogprobs | None = None  # None: nobody asks for them
    is_scored: bool = False  # has all of its tokens: only what they score is wanted
    status: Status = Status.WAITING
    slot: int = -1  # -1 while it holds none
    prefilled: int = 0  # first tokens that have KV or will by the steps planned
    prefill_reads: int = 0  # KV tokens that its prompt chunks read
    is_seeded: bool = False  # the device holds its length and pending token
    is_returning: bool = False  # preempted, and its pages have begun to come back
    verifies_in_flight: int = 0  # planned, outcome not read

    @property
    def committed(self):
        """Committed length the host knows of (the newest token is pending)."""
        return len(self.tokens) - 1


def token_array(tokens):
    """Token ids as the compact array that a Request keeps."""
    return array.array("i", tokens)
