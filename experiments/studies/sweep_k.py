"""How many drafts per cycle?

Claim: arXiv 2512.01278, ablation of k from 4 to 20: acceptance saturates, 8 is best.
Command: python -m experiments.study --study sweep_k --output RUN
Expected: accepted drafts grow less than k; the chance of each draft given those before
stays level, so staleness within a cycle is not what limits k.
Cost: about 20 s a row on an H100.
"""

from experiments.study_config import Study, grid


def get_study():
    """Three policies, k from 2 to 16."""
    return Study(
        claim="acceptance saturates in k; 8 is best (arXiv 2512.01278, ablation)",
        x="num_draft_tokens",
        series="policy",
        rows=grid(
            num_draft_tokens=(2, 4, 8, 12, 16), policy=("pillar", "oracle", "window")
        ),
    )
