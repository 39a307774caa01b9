"""Which policy selects best for identical queries, at two temperatures?

Claim: as `policies`: arXiv 2512.01278, section 5.
Command: python -m experiments.study --study policies_replay --output RUN
Expected: the order of decoding (`policies`), all figures nearer to each other, as the
text is fixed and every verification accepts all drafts. At temperature 0 the text is
that of 0.65: greedy texts of a small model repeat themselves, and then any policy does.
Cost: 16 contexts of up to 4,400 tokens on two CPU cores: about 7 minutes for the dense
runs, then about a minute for each policy, both temperatures together.
"""

from experiments.replay import HINDSIGHT
from experiments.studies.policies import POLICIES
from experiments.study_config import Row, Study

TEMPERATURES = 0.65, 0.0


def get_study():
    """All policies at s = 0.05, the hindsight set, and top-p under a wider ceiling."""
    share = {"full": 1.0, "top_p": 0.2}
    rows = [
        Row(
            mode="replay",
            policy=policy,
            budget_ratio=share.get(policy, 0.05),
            temperature=temperature,
            text_temperature=0.65,
        )
        for temperature in TEMPERATURES
        for policy in (*POLICIES, "top_p", HINDSIGHT)
    ]
    return Study(
        claim="PillarAttn's drafts are accepted more often than those of Quest and a "
        "sliding window (arXiv 2512.01278, section 5)",
        x="policy",
        series="temperature",
        y="expected_accepted",
        rows=tuple(rows),
    )
