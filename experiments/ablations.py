"""What the engine's parts are worth, end to end: loads with one part changed each.

    python -m experiments.ablations --output experiments/results/ablations_h200

The engine as it is has mixed steps (the paper's unified schedule) and reads outcomes a
step late (its delayed verification). Beside it: aligned steps in full precision, in
which all requests draft and then all verify, and lag 0, which waits for every outcome.
How many tokens each pass over the model has is counted while all slots decode. What the
KV policies are worth is measured by `experiments.offload`.

Weights are random with published shapes and acceptance is forced: what is compared is
time.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from experiments import drawing, experiment
from experiments.experiment import Experiment
from experiments.load_parts import LoadParts, loads_of, measure, model_of
from sparsespec_jax import Engine, SpeculationConfig

WHOLE, PLAIN = "as it is", "plain"
# What is changed of a load.
CHANGES = {
    PLAIN: {},
    WHOLE: {},
    "aligned schedule": {"schedule": "aligned"},
    "lag 0": {"lag": 0},
}
_DRAWN = 120  # passes


class CountedEngine(Engine):
    """An Engine that keeps how many tokens each pass over the model has."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.tokens_of_passes = []  # without prompts

    def _dispatch(self, plan, *before):
        if plan is not None and not plan.prefill:
            self.tokens_of_passes += tokens_of_passes(plan, self.shape.num_slots)
        return super()._dispatch(plan, *before)


def tokens_of_passes(plan, num_slots) -> list[int]:
    """Tokens of the passes of a step: one, or of a cycle its drafts one by one."""
    shape = plan.shape
    drafting = int((plan.views["draft_slots"] < num_slots).sum()) * shape.draft_queries
    verifying = int((plan.views["verify_slots"] < num_slots).sum()) * shape.num_queries
    if not shape.runs_cycles:
        return [drafting + verifying]
    return [drafting] * shape.num_draft_steps + [verifying]


class Ablations(Experiment):
    """A row a load, change and repeat."""

    claim = "the unified schedule makes 1.23 times the tokens, a lag of one step 1.12"
    Config = LoadParts
    SMOKE = dict(
        model="tiny", dtype="float32", max_requests=3, max_tokens=30, prompt_length=40,
        loads=("qwen3_8b_64x512x4096",),
    )  # fmt: skip

    def __init__(self, config, **how):
        super().__init__(config, **how)
        self.loads = loads_of(config)
        self.model = model_of(config, self.loads)

    def rows(self):
        """Those that are compared lie next to each other."""
        return [
            {"load": name, "change": change, "repeat": repeat}
            for name in self.config.loads
            for repeat in range(self.config.repeats)
            for change in CHANGES
        ]

    def measure(self, row):
        """Rates of one run, and the tokens of its passes."""
        change = CHANGES[row["change"]]
        load = dataclasses.replace(self.loads[row["load"]], **change)
        speculation = load.speculation()
        if row["change"] == PLAIN:
            speculation = SpeculationConfig(num_draft_tokens=0)
        counted = []

        def make(*args, **options):
            engine = CountedEngine(*args, **options)
            counted.append(engine.tokens_of_passes)  # and not the engine and its pool
            return engine

        found = measure(load, self.model, speculation, make=make)
        counts = np.array(counted.pop())
        middle = counts[len(counts) // 4 : -(len(counts) // 4) or None]
        return found | {
            "tokens_of_passes": middle[:_DRAWN].tolist(),
            "mean_tokens_of_a_pass": float(middle.mean()),
            "variation_of_tokens": float(middle.std() / middle.mean()),
        }

    def headline(self, found):
        """Rates in all and while all slots are busy."""
        decode = found["decode"]["tokens_per_s"]
        return f"{found['tokens_per_s']:.0f} tokens/s, decoding {decode:.0f}"

    def describe(self, records):
        """By load, the rate of the engine as it is over that of each change."""
        return {"by_load": [self._ratios(name, records) for name in self.config.loads]}

    @staticmethod
    def _ratios(name, records):
        def median(change, pick):
            wanted = name, change
            rows = [r for r in records if (r["load"], r["change"]) == wanted]
            return float(np.median([pick(row) for row in rows]))

        row = {"load": name}
        for key, pick in (
            ("whole_run", lambda r: r["tokens_per_s"]),
            ("decode", lambda r: r["decode"]["tokens_per_s"]),
        ):
            whole = median(WHOLE, pick)
            others = [change for change in CHANGES if change != WHOLE]
            row[f"{key}_over"] = {c: whole / median(c, pick) for c in others}
        row["variation_of_tokens"] = {
            change: median(change, lambda r: r["variation_of_tokens"])
            for change in CHANGES
        }
        return row

    def text(self, described, records):
        """A line a load."""
        del records
        return "\n".join(map(str, described["by_load"]))

    @staticmethod
    def figure(axes, summary, records):
        """Tokens of a pass, one after the other, of the last load."""
        del summary
        last = [r for r in records if r["load"] == records[-1]["load"]]
        names = {WHOLE: "mixed steps", "aligned schedule": "aligned steps"}
        lines = {
            names[record["change"]]: list(enumerate(record["tokens_of_passes"]))
            for record in last
            if record["change"] in names and not record["repeat"]
        }
        drawing.curves(axes, lines, x="pass over the model", y="tokens of it")


if __name__ == "__main__":
    experiment.run(Ablations)
