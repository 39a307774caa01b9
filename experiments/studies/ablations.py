"""Which parts of PillarAttn matter: rows, scope, recents, history?

Claim: arXiv 2512.01278, section 4.1, averages all k + 1 rows per KV head; Vegas
(arXiv 2602.07223) takes two rows and one set per layer.
Command: python -m experiments.study --study ablations --output RUN
Expected: all variants within each other's intervals; the last row alone worst.
Cost: about 20 s a row on an H100.
"""

from experiments.study_config import Row, Study


def get_study():
    """One switch at a time, by decoding and in replay."""
    variants = [
        Row(),
        Row(mass_rows="edges"),
        Row(policy="pillar_last"),
        Row(scope="layer"),
        Row(num_recent=8),
        Row(policy="pillar_decay"),
        Row(policy="pillar_window"),
        Row(policy="pillar_widened"),
        Row(policy="pillar_mixed"),
        Row(policy="pillar_churn"),
        Row(policy="pillar_anchors"),
    ]
    fields = ("policy", "mass_rows", "scope", "num_recent")
    replayed = [
        Row(mode="replay", **{f: getattr(row, f) for f in fields}) for row in variants
    ]
    return Study(
        claim="all k + 1 rows, per KV head (arXiv 2512.01278, section 4.1)",
        x="policy",
        series="mode",
        rows=tuple(variants + replayed),
    )
