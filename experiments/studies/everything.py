"""All rows of the other studies, each once: what a GPU is asked for in one go.

Claim: those of the other studies.
Command: python -m experiments.study --study everything --part 1/8 --output PART
Expected: see the other studies. `python -m experiments.join_studies` makes their run
directories from the parts.
Cost: 47 engines and 20 replays; ten parts at a time on one H100 take minutes.
"""

from experiments.study_config import Row, Study, load_study

# In the order of worth: what comes first is there when time runs out.
STUDIES = (
    "policies", "ladder", "equal_bytes", "sweep_budget", "sweep_temperature",
    "sweep_context", "sweep_k", "ablations", "cascade",
)  # fmt: skip
GREEDY = ("pillar", "oracle", "window", "vegas", "quest", "full")


def get_study():
    """Rows in the order of worth, the greedy ones behind the table of policies."""
    rows = [row for name in STUDIES for row in load_study(name)[0].rows]
    greedy = [Row(policy=p, temperature=0.0) for p in GREEDY if p != "full"]
    greedy.append(Row(policy="full", temperature=0.0, budget_ratio=1.0))
    return Study(
        claim="see the other studies",
        x="policy",
        series="mode",
        rows=tuple(dict.fromkeys([*rows[:25], *greedy, *rows[25:]])),
    )
