"""How far is PillarAttn from the best set of the same size, and where is it lost?

Claim: arXiv 2512.01278, section 4.1: the mass of one verification picks the critical
tokens of the next k drafts.
Command: python -m experiments.study --study ladder --output RUN
Expected: PillarAttn's recall of candidate mass near 0.8 on SmolLM2 and 0.9 or more
of the per-step oracle's; hindsight (the best set of the round) between the two.
Each row also holds the oracles of equal count, per KV head and per query head.
Cost: 20 contexts on one H100, about 10 s a row; minutes a row on two CPU cores.
"""

from experiments.replay import HINDSIGHT
from experiments.study_config import Row, Study

RUNGS = (
    "full", "oracle", HINDSIGHT, "pillar", "pillar_decay", "vegas", "pillar_last",
    "pillar_anchors", "quest_step", "quest", "double_sparsity", "window", "random",
)  # fmt: skip


def get_study():
    """All rungs at s = 0.05 on identical queries."""
    return Study(
        claim="one verification's attention mass picks the tokens that the next k "
        "drafts need (arXiv 2512.01278, section 4.1)",
        x="policy",
        series="mode",
        y="recall",
        rows=tuple(
            Row(mode="replay", policy=p, budget_ratio=1.0 if p == "full" else 0.05)
            for p in RUNGS
        ),
    )
