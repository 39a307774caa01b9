"""What "auto" stands for in a SpeculationConfig: one rule, before an engine is made.

The schedule and the weights of drafts follow from where their kernel runs. The number
of drafts is one of a few, all compiled at the start; which of them is asked of measured
step times as texts grow (`tuning.calibrate`, `cost_model.Chooser`). No jax.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from sparsespec_jax.config import AUTO, SpeculationConfig

# With k the rate changes slowly near its best: few choices are near any other.
NUM_DRAFT_TOKENS = 0, 2, 4, 8, 12
# Where steps are not timed: a CPU shows what is decoded, not how fast a device would.
UNTIMED = SpeculationConfig().num_draft_tokens
_TIMED = "gpu", "tpu"  # kernels whose steps are worth timing


def settled(
    speculation: SpeculationConfig,
    *,
    impl: str,
    dtype: str,
    fits: Callable[[SpeculationConfig], bool],
) -> SpeculationConfig:
    """The SpeculationConfig without "auto".

    - `num_draft_tokens`: the largest of NUM_DRAFT_TOKENS, the others as
      `draft_token_choices`, on a GPU or TPU; elsewhere the default.
    - `draft_weights`: "int8" if a GPU runs their kernel on bfloat16 weights, the model
      drafts itself, its steps may be aligned, and the copy fits beside the pool;
      otherwise None.
    - `schedule`: "aligned" with "int8" and "mixed" without: in full precision both
      take as long, and mixed steps read prompts beside decoding.

    Args:
      speculation: what was asked for.
      impl: the kernels that run.
      dtype: of the model's weights.
      fits: whether an engine of such a SpeculationConfig can be made.
    """
    if speculation.chooses_k:
        drafts, choices = UNTIMED, ()
        if impl in _TIMED:
            drafts, choices = NUM_DRAFT_TOKENS[-1], NUM_DRAFT_TOKENS[:-1]
        speculation = dataclasses.replace(
            speculation, num_draft_tokens=drafts, draft_token_choices=choices
        )
    schedule, weights = speculation.schedule, speculation.draft_weights
    if AUTO not in (schedule, weights):
        return speculation
    with_8_bits = dict(schedule="aligned", draft_weights="int8")
    if weights == AUTO:
        can = impl == "gpu" and dtype == "bfloat16" and schedule != "mixed"
        can = can and (speculation.proposer == "self" or speculation.is_cascade)
        can = can and fits(dataclasses.replace(speculation, **with_8_bits))
        weights = "int8" if can else None
    if schedule == AUTO:
        schedule = "aligned" if weights else "mixed"
    return dataclasses.replace(speculation, schedule=schedule, draft_weights=weights)
