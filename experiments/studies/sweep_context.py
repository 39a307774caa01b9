"""Does acceptance hold as the context grows?

Claim: arXiv 2512.01278, section 5: acceptance stays high over long reasoning traces.
Command: python -m experiments.study --study sweep_context --output RUN
Expected: at a fixed share of the context acceptance grows with length (the set grows);
at a fixed number of tokens it holds or falls, least for verification-guided sets.
Cost: about 20 s a row on an H100.
"""

from experiments.study_config import Row, Study

RANGES = ((500, 1000), (1000, 2000), (2000, 4000), (4000, 8192))
RANGES += ((8192, 16_384), (16_384, 24_576), (24_576, 32_768))


def get_study():
    """A share of 5 % and a fixed 100 tokens, by range of context lengths."""
    return Study(
        claim="acceptance holds over long contexts (arXiv 2512.01278, section 5)",
        x="contexts",
        series="policy",
        rows=tuple(
            Row(policy=policy, contexts=span, budget_ratio=ratio, min_budget=floor)
            for policy in ("pillar", "window")
            for ratio, floor in ((0.05, 0), (1e-3, 100))
            for span in RANGES
        ),
    )
