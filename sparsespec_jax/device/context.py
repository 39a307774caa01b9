"""What a compiled step is made of: fixed while it is traced, and part of its name."""

import dataclasses
from typing import Any, NamedTuple

from sparsespec_jax.config import SpeculationConfig
from sparsespec_jax.models.config import ModelConfig
from sparsespec_jax.plan.edits import NO_EXTRAS, StepExtras
from sparsespec_jax.plan.shape import StepShape
from sparsespec_jax.policies.base import Policy


class StepOptions(NamedTuple):
    """What of a SpeculationConfig the compiled step depends on; budgets are data."""

    acceptor: str
    mass_rows: str
    scope: str
    num_recent: int
    num_sinks: int
    draft_top_m: int
    forced_probability: float | None
    draft_weights: str | None


def step_options(speculation: SpeculationConfig) -> StepOptions:
    """StepOptions of a SpeculationConfig."""
    return StepOptions(*(getattr(speculation, name) for name in StepOptions._fields))


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepContext:
    """The static arguments of a step."""

    model: ModelConfig
    shape: StepShape
    policy: Policy
    proposer: Any  # None: the model itself; a Cascade or a RememberingProposer
    options: StepOptions
    filters: bool  # whether any request may use top-k, top-p or min-p
    impl: str  # of the kernels
    extras: StepExtras = NO_EXTRAS  # what any request may ask for beside the law
    exact: bool = False  # target rows whose bits do not depend on the others
    # Of the mesh that cuts the model; `model` is then what one device has of it.
    axis: str | None = None

    @property
    def uses_ratio_test(self):
        """True if drafts are judged by their own laws."""
        return self.options.acceptor == "ratio_test"

    @property
    def is_drafting(self):
        """True if the model itself drafts, from the draft caches."""
        return self.shape.num_draft_steps > 0 and self.shape.part != "prompt"

    def of(self, part: str) -> "StepContext":
        """The context of a part of an aligned step; drafts may be anything."""
        exact = self.exact and part != "draft"
        return dataclasses.replace(self, shape=self.shape.of(part), exact=exact)

    @property
    def in_8_bits(self) -> bool:
        """True where the pass over the model has weights in 8 bits."""
        return self.options.draft_weights is not None and self.shape.part == "draft"
