"""What one compiled step takes, and which kernels it runs, without decoding a load.

    python -m experiments.step_time --load qwen3_8b_64x512x4096 --contexts 660,2560 \\
        --output RUN

Times the steps of plain decoding and of the load's k on made-up caches, every slot at
the same context, and traces some at the last context (GPU). For questions about a step,
such as an XLA flag or a kernel, which a whole load answers slowly. About 50 s on an
H100 for qwen3-8b, most of it compilation.
"""

from __future__ import annotations

import dataclasses
import functools

from experiments import drawing, experiment, made_up, time_split
from experiments.experiment import Experiment
from experiments.loads import LOADS
from experiments.models import random_model
from experiments.options import Options, option
from sparsespec_jax.tuning import calibrate


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepTimeConfig(Options):
    """A load, what is changed in it, and where it is timed."""

    load: str = option(
        "qwen3_8b_64x512x4096", "Load whose engine is timed.", choices=sorted(LOADS)
    )
    model: str | None = option(None)
    num_slots: int | None = option(
        None, "Other slots than the load's.", kind=int, at_least=1
    )
    policy: str | None = option(None, "Another selection policy.")
    mass_rows: str | None = option(None, "Rows of the mass: all or edges.")
    scope: str | None = option(None, "One selection per kv_head or per layer.")
    k: tuple[int, ...] | None = option(
        None, "Numbers of drafts; default: 0 and the load's.", kind=tuple, of=int
    )
    contexts: tuple[int, ...] = option((660, 2560), "Tokens in every slot.", at_least=2)
    trace_steps: int = option(18, "Steps to trace; 0: none.", at_least=0)

    def changed_load(self):
        """The load as it is timed."""
        names = ("model", "num_slots", "policy", "mass_rows", "scope")
        given = {n: v for n in names if (v := getattr(self, n)) is not None}
        return dataclasses.replace(LOADS[self.load], **given)


class StepTime(Experiment):
    """Steps of every number of drafts."""

    claim = "attention of a draft step takes a third of a plain step's, or less"
    Config = StepTimeConfig
    SMOKE = dict(
        load="smollm2_256x4096", model="tiny", num_slots=2, k=(0, 2),
        contexts=(8, 16), trace_steps=0,
    )  # fmt: skip

    def __init__(self, config, **how):
        super().__init__(config, **how)
        self.load = config.changed_load()
        choices = config.k or (0, self.load.num_draft_tokens)
        self.choices, self.contexts = sorted(set(choices)), sorted(set(config.contexts))
        if config.trace_steps:
            time_split.check_can_trace("--trace_steps=0")
        self.model = random_model(self.load.model, self.load.dtype)
        self.engine = made_up.make_engine(
            self.model, self.load, self.choices, self.contexts[-1]
        )

    @functools.cached_property
    def steps(self):
        """Seconds by k, at every context."""
        return calibrate.measure(self.engine, self.contexts)

    def rows(self):
        """One for each number of drafts."""
        return [{"num_draft_tokens": k} for k in self.choices]

    def measure(self, row):
        """Milliseconds at every context; the trace of the last one."""
        k, steps = row["num_draft_tokens"], self.config.trace_steps
        times = [1e3 * seconds for _, seconds in self.steps[k]]
        found = {"ms_per_step": dict(zip(self.contexts, times, strict=True))}
        if steps:
            found["time_split"] = made_up.trace_steps(
                self.engine, k, self.contexts[-1], steps
            )
        return found

    def describe(self, records):
        """The load as it was timed."""
        del records
        return {"load": dataclasses.asdict(self.load)}

    def headline(self, found):
        """The times."""
        return f"ms a step by context: {found['ms_per_step']}"

    @staticmethod
    def figure(axes, summary, records):
        """Milliseconds by context, a line for each k."""
        del summary
        lines = {
            f"k = {record['num_draft_tokens']}": [
                (int(n), ms) for n, ms in record["ms_per_step"].items()
            ]
            for record in records
        }
        drawing.curves(axes, lines, x="tokens in every slot", y="milliseconds a step")


if __name__ == "__main__":
    experiment.run(StepTime)
