"""Which policy accepts most at the same budget?

Claim: arXiv 2512.01278, section 5 and its comparison with Quest and MagicDec: at k = 8
and s = 0.05, PillarAttn has 6.16 of 8 drafts accepted, more than Quest's pages and far
more than a sliding window.
Command: python -m experiments.study --study policies --output RUN
Expected: the per-step oracle on top, then the verification-guided family within each
other's intervals, Quest and Double Sparsity behind it, windows and frozen sets last.
Cost: 30 contexts, 97 tokens each: on an H100 about 20 s a row.
"""

from experiments.study_config import Row, Study

POLICIES = (
    "pillar", "oracle", "index", "window", "full", "vegas", "pillar_last",
    "pillar_widened", "pillar_decay", "pillar_mixed", "pillar_window", "pillar_churn",
    "pillar_anchors", "h2o", "snapkv", "quest", "quest_step", "double_sparsity",
    "lserve", "recents", "random",
)  # fmt: skip


def get_study():
    """All policies at s = 0.05, top-p under a wider ceiling, and other proposers."""
    rows = [Row(policy=p, budget_ratio=1.0 if p == "full" else 0.05) for p in POLICIES]
    rows[3:3] = [
        Row(proposer="ngram"),
        Row(proposer="cascade"),
        Row(proposer="cascade", draft_steps=6, num_guesses=3),
    ]
    rows.insert(10, Row(policy="top_p", budget_ratio=0.2))
    return Study(
        claim="PillarAttn accepts 6.16 of 8 drafts at s = 0.05, more than Quest and a "
        "sliding window (arXiv 2512.01278, section 5)",
        x="policy",
        series="mode",
        rows=tuple(rows),
    )
