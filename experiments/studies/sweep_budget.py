"""How much of the context must a draft read?

Claim: arXiv 2512.01278, ablation of s: acceptance saturates near 5 % of the context.
Command: python -m experiments.study --study sweep_budget --output RUN
Expected on contexts of 500 to 3,000 tokens: no saturation at 5 % yet, because
acceptance follows the absolute budget, and 5 % is 25 to 150 tokens without a floor.
Cost: about 20 s a row on an H100.
"""

from experiments.study_config import Study, grid


def get_study():
    """Four policies, budgets of 1 to 40 % of the context."""
    return Study(
        claim="acceptance saturates at s = 0.05 (arXiv 2512.01278, ablation)",
        x="budget_ratio",
        series="policy",
        rows=grid(
            policy=("pillar", "window", "vegas", "oracle"),
            budget_ratio=(0.05, 0.02, 0.1, 0.2, 0.4),
        ),
    )
