"""What is the best set for the same bytes, if every draft step may choose anew?

Claim: arXiv 2512.01278, section 4.1: the mass of one verification is enough; here, that
choosing at every step by a small index of the keys closes most of the gap to the
per-step oracle, bytes of the index included.
Command: python -m experiments.study --study equal_bytes --output_dir RUN
Expected: at s = 0.05 the 4-bit index is next to the oracle; with the bytes of the index
taken off the budget of a draft step, the 2-bit index still closes a third of the gap
from PillarAttn to the oracle.
Cost: about 20 s a row on an H100.
"""

from experiments.study_config import Row, Study
from sparsespec_jax.selection import POLICIES

HEAD_DIM = 64  # SmolLM2's, whose K and V of a key have 32 bits per channel


def less_index(policy, budget_ratio):
    """The budget that leaves a draft step the bytes of `budget_ratio`."""
    return round(budget_ratio - POLICIES[policy].index_bits / (32 * HEAD_DIM), 4)


def get_study():
    """Equal budgets, and equal bytes of a draft step; by decoding and in replay."""
    settings = [("pillar", 0.05), ("oracle", 0.05), ("pillar", 0.1), ("oracle", 0.1)]
    for s in (0.05, 0.1):
        for policy in ("index", "index_2bit"):
            settings += [(policy, s), (policy, less_index(policy, s))]
    decoded = [Row(policy=p, budget_ratio=s) for p, s in settings]
    replayed = [Row(mode="replay", policy=p, budget_ratio=s) for p, s in settings]
    return Study(
        claim="one verification's mass is enough (arXiv 2512.01278, section 4.1); a "
        "small index read in every draft step foresees better for the same bytes",
        x="budget_ratio",
        series="policy",
        rows=tuple(decoded + replayed),
    )
