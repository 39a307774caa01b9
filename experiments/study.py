"""A study: rows of policies and settings, measured on the same contexts.

    python -m experiments.study --study policies --output RUN
    python -m experiments.study --study policies --output RUN --resume

The studies are the modules of experiments/studies. A row is measured either by decoding
(mode "decode": drafts follow their own tokens, and every text is compared with plain
decoding) or on a recorded dense text (mode "replay", see experiments/replay.py).
Figures: `python -m experiments.figures`; a page of all of them: `experiments.report`.

Most of a row's time is compilation, on one core. `--part 2/8` measures the second of
eight parts, rows of one engine staying together; run the parts at the same time, each
in a directory of its own, and join those of study everything with `python -m
experiments.join_studies`.
"""

from __future__ import annotations

import dataclasses

from experiments import experiment, figures, models, record, replay
from experiments.options import option
from experiments.study_bench import OnContexts, Setting, without_budget
from experiments.study_config import as_row, load_study, smoke_rows, study_names
from sparsespec_jax.policies.select import resolve_policy


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyConfig(Setting):
    """Which rows, and what they are measured on."""

    study: str = option(text="What to run.", choices=study_names())
    skip: tuple[str, ...] = option((), "Policies to leave out.", is_recorded=False)
    mode: str | None = option(
        None, "Only rows measured so.", choices=("decode", "replay"), is_recorded=False
    )
    known: tuple[str, ...] = option(
        (), "Run directories whose rows are left out.", is_recorded=False
    )


class PolicyStudy(OnContexts):
    """The rows of a module of experiments/studies."""

    claim = "that of the study, see experiments/studies"
    Config = StudyConfig
    SMOKE = models.smoke(
        "model", "num_slots", "page_size", "prefill_chunk",
        max_tokens=11, study="sweep_context",
    )  # fmt: skip

    def __init__(self, config, **how):
        self.study, self.header = load_study(config.study)
        self.claim = self.study.claim
        super().__init__(config, **how)

    def wanted(self, own):
        """The rows of the policies and the mode wanted, the user's own first."""
        config = self.config
        skip = [resolve_policy(name).name for name in config.skip]
        rows = [row for row in self.study.rows if row.policy not in skip]
        if own and rows:
            first = dataclasses.replace(rows[0], policy=own.name, less_index=False)
            rows.insert(0, first)
        for row in rows:
            if row.policy != replay.HINDSIGHT and not (own and row.policy == own.name):
                resolve_policy(row.policy)
        if config.mode:
            rows = [row for row in rows if row.mode == config.mode]
        return rows

    def for_model(self, rows):
        """Those that the runs of --known do not hold."""
        rows, impossible = super().for_model(rows)
        runs = [record.load(path)[1] for path in self.config.known]
        known = [as_row(found) for found in sum(runs, [])]
        rows = [row for row in rows if row not in known]
        if self.is_smoke:  # its heads are too small for an index, and few rows are kept
            rows, impossible = smoke_rows(rows), []
        if not rows:
            raise ValueError("--skip, --mode and --known leave no row to measure")
        return rows, impossible

    def group(self, row):
        """Rows that one engine can measure."""
        row = as_row(row)
        return f"{row.mode} {row.policy} {without_budget(row.speculation('pillar'))}"

    def describe(self, records):
        """What the figure shows."""
        del records
        return axes_of(self.study, self.header)

    def text(self, described, records):
        """Nothing more: every row has been printed."""
        return ""

    figure = staticmethod(figures.study_lines)


def axes_of(study, header):
    """What summary.json says of a study, beside its claim."""
    names = {"x": study.x, "series": study.series, "y": study.y}
    return {"header": header} | names


if __name__ == "__main__":
    experiment.run(PolicyStudy)
