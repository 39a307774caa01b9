"""What is the best set for the same bytes, if every draft step may choose anew?

Claim: arXiv 2512.01278, section 4.1: the mass of one verification is enough; here, that
choosing at every step by a small index of the keys closes most of the gap to the
per-step oracle, bytes of the index included.
Command: python -m experiments.study --study equal_bytes --output RUN
Expected: at s = 0.05 the 4-bit index is next to the oracle; with the bytes of the index
taken off the budget of a draft step, the 2-bit index still closes a third of the gap
from PillarAttn to the oracle. Bytes are those of the model that is measured, in its
--dtype; experiments/results has budgets for SmolLM2 in bfloat16.
Cost: about 20 s a row on an H100.
"""

import dataclasses

from experiments.study_config import Row, Study

SETTINGS = (
    ("pillar", 0.05), ("oracle", 0.05), ("pillar", 0.1), ("oracle", 0.1),
    ("index", 0.05), ("index_2bit", 0.05), ("index", 0.1), ("index_2bit", 0.1),
)  # fmt: skip


def get_study():
    """Equal budgets, and equal bytes of a draft step; by decoding and in replay."""
    rows = []
    for policy, s in SETTINGS:
        rows.append(Row(policy=policy, budget_ratio=s))
        if rows[-1].index_bits is not None:
            rows.append(dataclasses.replace(rows[-1], less_index=True))
    replayed = [dataclasses.replace(row, mode="replay") for row in rows]
    return Study(
        claim="one verification's mass is enough (arXiv 2512.01278, section 4.1); a "
        "small index read in every draft step foresees better for the same bytes",
        x="budget_ratio",
        series="policy",
        rows=tuple(rows + replayed),
    )
