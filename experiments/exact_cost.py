"""What exact numerics cost: each load decoded with both, plain and speculating.

    python -m experiments.exact_cost --output experiments/results/exact_cost_h200

Weights are random with published shapes and acceptance is forced, as in the loads of
`experiments.throughput`: what is compared is time. A cost is the share of the rate of
fast numerics that is lost, of the whole run, prompts included; what a mode takes while
all slots decode is beside it.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from experiments import experiment
from experiments.experiment import Experiment
from experiments.load_parts import LoadParts, loads_of, measure, model_of
from experiments.options import option
from pallas_kernels.timing import measure_rates
from sparsespec_jax import SpeculationConfig, sizes
from sparsespec_jax.config import NUMERICS

_MODES = ("plain", "speculative")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExactCostConfig(LoadParts):
    """Which loads, and how often each mode of them runs."""

    modes: tuple[str, ...] = option(_MODES, "Modes.", choices=_MODES)
    numerics: tuple[str, ...] = option(NUMERICS, "Compared.", choices=NUMERICS)


class ExactCost(Experiment):
    """A row a load, mode and numerics; costs are of pairs."""

    claim = "exact numerics cost plain decoding 3 % at most and speculating 5 %"
    Config = ExactCostConfig
    SMOKE = dict(
        model="tiny", dtype="float32", numerics=("fast",), max_requests=2,
        max_tokens=12, prompt_length=40, loads=("qwen3_8b_64x512x4096",),
    )  # fmt: skip

    def __init__(self, config, **how):
        super().__init__(config, **how)
        self.loads = loads_of(config)
        self.model = model_of(config, self.loads)

    def rows(self):
        """Those that are compared lie next to each other."""
        config = self.config
        return [
            {"load": name, "mode": mode, "numerics": numerics, "repeat": repeat}
            for name in config.loads
            for mode in config.modes
            for repeat in range(config.repeats)
            for numerics in config.numerics
        ]

    def measure(self, row):
        """Rates of one run."""
        load = dataclasses.replace(self.loads[row["load"]], numerics=row["numerics"])
        speculation = load.speculation()
        if row["mode"] == "plain":
            speculation = SpeculationConfig(num_draft_tokens=0)
        return measure(load, self.model, speculation)

    def headline(self, found):
        """Rates in all and while all slots are busy."""
        return f"{found['tokens_per_s']:.0f} tokens/s, decode {found['decode']}"

    def describe(self, records):
        """Costs by load."""
        read_rate, _ = measure_rates()
        return {
            "read_tb_per_s": read_rate / 1e12,
            "weight_bytes": sizes.weight_bytes(self.model),
            "rows": [self._costs(name, records) for name in self.config.loads],
        }

    def _costs(self, name, records):
        """{"load", "plain_cost", "speculative_cost"} and those of the decode phase."""
        row = {"load": name}
        if len(self.config.numerics) < 2:
            return row
        for mode in self.config.modes:
            for part, pick in (
                ("", lambda r: r["tokens_per_s"]),
                ("_decode", lambda r: r["decode"]["tokens_per_s"]),
                ("_prefill", lambda r: 1 / r["prefill"]["seconds"]),
            ):
                rates = {
                    numerics: np.median(
                        [
                            pick(record)
                            for record in records
                            if (record["load"], record["mode"], record["numerics"])
                            == (name, mode, numerics)
                        ]
                    )
                    for numerics in self.config.numerics
                }
                row[f"{mode}{part}_cost"] = 1 - rates["exact"] / rates["fast"]
        return row

    def text(self, described, records):
        """A line a load."""
        del records
        return "\n".join(map(str, described["rows"]))


if __name__ == "__main__":
    experiment.run(ExactCost)
