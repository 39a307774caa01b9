"""Accepted drafts per verification, by policy and budget, on contexts of known length.

    python -m experiments.acceptance --output experiments/results/acceptance

Re-measures the paper's acceptance claim (arXiv 2512.01278, section 5: 6.16 of 8 drafts
at s = 0.05 on Qwen3 reasoning traces) on a model small enough for any machine. Expected
on SmolLM2-135M, k = 8, T = 0.65, no budget floor: PillarAttn 3.1-4.2 at s = 0.05,
4.1-5.2 at 0.1, 4.9-6.1 at 0.2; sliding window 2.3-3.3 at 0.05; a full-attention draft
exactly 8 in float32. About 4 minutes on an H100, 90 on two CPU cores.

Every policy decodes the same contexts with the same seeds, so the tokens must be the
same too: the exit status is 1 if one differs from plain decoding (shared noise). Rows
that are written down as a set are a study, see `experiments.study`.
"""

from __future__ import annotations

import dataclasses

from experiments import drawing, experiment, models
from experiments.options import option
from experiments.study_bench import OnContexts, Setting
from experiments.study_config import Row
from sparsespec_jax import sizes
from sparsespec_jax.policies.select import resolve_policy


@dataclasses.dataclass(frozen=True, kw_only=True)
class AcceptanceConfig(Setting):
    """Which policies, and how they draft."""

    rows: tuple[str, ...] = option(
        (
            "pillar:0.05", "window:0.05", "full:1", "pillar:0.1", "pillar:0.2",
            "random:0.05",
        ),
        "What to measure, in order: policy:budget_ratio.",
    )  # fmt: skip
    num_draft_tokens: int = option(8, "Drafts per cycle.", at_least=1)
    min_budget: int = option(0, "Tokens a draft reads at least.", at_least=0)
    temperature: float = option(0.65, "Temperature; 0 is greedy.", at_least=0)
    proposer: str = option("self", "Who drafts.", choices=("self", "ngram", "cascade"))
    draft_steps: int | None = option(
        None, "Cascade: draft steps of a cycle.", kind=int, at_least=1
    )
    num_guesses: int | None = option(
        None, "Cascade: guesses per draft step.", kind=int, at_least=1
    )
    acceptor: str = option("shared_noise", "Acceptor.")
    mass_rows: str = option("all", "Verify rows that count.")
    scope: str = option("kv_head", "Selection per kv_head or layer.")


def parse_row(text, own, **fields):
    """The Row of "policy:budget_ratio", checked; `own` is a user's Policy or None."""
    name, _, ratio = text.partition(":")
    try:
        ratio = float(ratio)
    except ValueError:
        raise ValueError(f"--rows takes policy:budget_ratio, got {text!r}") from None
    policy = own if own and name == own.name else resolve_policy(name)
    row = Row(policy=policy.name, budget_ratio=ratio, **fields)
    sizes.check_cascade(row.speculation(policy), policy)
    return row


class Acceptance(OnContexts):
    """Policies and budgets that the command names."""

    claim = "PillarAttn has 6.16 of 8 drafts accepted at s = 0.05"
    Config = AcceptanceConfig
    SMOKE = models.smoke(
        "model", "num_draft_tokens", "num_slots", "page_size", "prefill_chunk",
        max_tokens=11, rows=("pillar:0.2", "window:0.2"),
    )  # fmt: skip

    def wanted(self, own):
        """One Row for each of --rows."""
        names = {field.name for field in dataclasses.fields(Row)}
        options = dataclasses.asdict(self.config)
        fields = {name: options[name] for name in names & options.keys()}
        del fields["contexts"]  # here a file, there a range of lengths
        return [parse_row(text, own, **fields) for text in self.config.rows]

    def describe(self, records):
        """Accepted drafts by policy and budget."""
        return {
            f"{r['policy']}:{r['budget_ratio']:g}": self.headline(r) for r in records
        }

    @staticmethod
    def figure(axes, summary, records):
        """Accepted drafts of every policy and budget."""
        del summary
        points = {
            f"{drawing.policy(r['policy'])}, {100 * r['budget_ratio']:g} %": (
                drawing.interval_of(r["mean_accepted_draft_tokens"])
            )
            for r in records
        }
        drawing.dots(axes, {"": points}, x="mean_accepted_draft_tokens")


if __name__ == "__main__":
    experiment.run(Acceptance)
