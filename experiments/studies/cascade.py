"""How many draft steps does a cascade need for the drafts of sparse self-speculation?

Claim: TriForce, arXiv 2404.11912: a smaller model below the sparse one makes drafting
cheaper. SparseSpec (arXiv 2512.01278) reports up to 1.76 times the throughput of it.
Command: python -m experiments.study --study cascade --output RUN
Expected: with 8 draft steps the acceptance of sparse self-speculation; with fewer, what
the hits of the lookup make up for, little in a text that does not repeat itself.
Cost: about 20 s a row on an H100.
"""

from experiments.study_config import Row, Study


def get_study():
    """Draft steps of a cycle of at most 8 drafts, by guesses per draft step."""
    sizes = [(steps, guesses) for steps in (2, 4, 6) for guesses in (1, 3)] + [(8, 3)]
    return Study(
        claim="a smaller model below the sparse one makes drafting cheaper (TriForce, "
        "arXiv 2404.11912)",
        x="draft_steps",
        series="num_guesses",
        rows=tuple(
            Row(proposer="cascade", draft_steps=steps, num_guesses=guesses)
            for steps, guesses in sizes
        ),
    )
