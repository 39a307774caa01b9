"""How does the temperature of the text move acceptance?

Claim: arXiv 2512.01278, section 5, samples at T = 0.6 to 0.65; speculative decoding is
known to accept less of a flatter law.
Command: python -m experiments.study --study sweep_temperature --output RUN
Expected: greedy above T = 0.65 above T = 1; the ratio test a little above shared noise.
Cost: about 20 s a row on an H100.
"""

from experiments.study_config import Row, Study


def get_study():
    """Four temperatures, and the ratio test where sampling is random."""
    rows = [
        Row(policy=policy, temperature=t)
        for policy in ("pillar", "window")
        for t in (0.0, 0.3, 0.65, 1.0)
    ]
    rows += [Row(temperature=t, acceptor="ratio_test") for t in (0.65, 1.0)]
    return Study(
        claim="acceptance at T = 0.6 to 0.65 (arXiv 2512.01278, section 5)",
        x="temperature",
        series="policy",
        rows=tuple(rows),
    )
