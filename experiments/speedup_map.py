"""Where speculation pays: speed-up over context length and slots, and the k chosen.

    python -m experiments.speedup_map --output experiments/results/speedup_map_h100

Times the compiled step of every k on made-up caches (random weights, options of a
load), for each number of slots and context length, and turns them into tokens per
second with an assumed acceptance: --acceptance is the chance of a draft given those
before it, 0.93 makes 6.1 of 8. The cost model sees two of the lengths only; its choice
stands beside the best fixed k at every length. Lengths that a pool of --kv_gib cannot
hold in every slot are left out. About 4 minutes on an H100 for qwen3-8b.
"""

from __future__ import annotations

import dataclasses
import gc

from experiments import drawing, experiment, made_up
from experiments.experiment import Experiment
from experiments.loads import LOADS
from experiments.models import SHAPES, random_model
from experiments.options import Options, option
from sparsespec_jax import sizes
from sparsespec_jax.tuning import calibrate


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpeedupMapConfig(Options):
    """Which steps are timed."""

    load: str = option(
        "qwen3_8b_64x512x4096", "Load whose options are timed.", choices=sorted(LOADS)
    )
    model: str | None = option(None)
    slots: tuple[int, ...] = option((8, 32, 128), "Numbers of slots.", at_least=1)
    lengths: tuple[int, ...] = option(
        (256, 1024, 2048, 4096, 10_000, 32_000), "Context lengths.", at_least=2
    )
    choices: tuple[int, ...] = option((0, 4, 8), "Numbers of drafts, k.", at_least=0)
    acceptance: float = option(
        0.93, "Assumed, given those before.", at_least=0, at_most=1
    )
    kv_gib: float = option(50.0, "Size of the KV pool.", at_least=0.01)


class SpeedupMap(Experiment):
    """Every number of slots at the context lengths that its pool can hold."""

    claim = "with the k that the cost model chooses, speculation is nowhere slower"
    Config = SpeedupMapConfig
    SMOKE = dict(
        load="smollm2_256x4096", model="tiny", slots=(2,), lengths=(8, 16),
        choices=(0, 2),
    )  # fmt: skip

    def __init__(self, config, **how):
        super().__init__(config, **how)
        self.choices = sorted(set(config.choices))
        if 0 not in self.choices:
            raise ValueError("choices must hold 0, which the speed-up is against")
        load = LOADS[config.load]
        load = dataclasses.replace(load, model=config.model or load.model)
        if load.model not in SHAPES:
            raise ValueError(
                f"the load's model {load.model!r} has no preset: name --model"
            )
        self.fitting = [self._fitting(load, n) for n in sorted(set(config.slots))]
        self.model = random_model(load.model, load.dtype)
        for of_slots, lengths in self.fitting:
            options = made_up.options(of_slots, self.choices, lengths[-1])
            sizes.resolve(self.model, *options)

    def _fitting(self, load, slots):
        """(the load with so many slots, lengths that its pool can hold)."""
        load = dataclasses.replace(load, num_slots=slots, num_requests=slots)
        lengths, most = sorted(set(self.config.lengths)), self.config.kv_gib * 2**30
        held = [n for n in lengths if made_up.fits(load, self.choices, n, most)]
        if len(held) < 2:
            raise ValueError(
                f"{slots} slots can hold only {held} of the lengths "
                f"{lengths} in {self.config.kv_gib} GiB: name two that fit, or fewer "
                "slots, or raise kv_gib"
            )
        return load, held

    def rows(self):
        """The points, those of one engine together."""
        return [
            {"slots": load.num_slots, "context_length": length}
            for load, lengths in self.fitting
            for length in lengths
        ]

    def measure_all(self, rows):
        """The points of an engine together: its cost model sees two of them."""
        drafts = range(1, max(self.choices) + 1)
        acceptance = tuple(self.config.acceptance**i for i in drafts)
        for load, lengths in self.fitting:
            slots = load.num_slots
            if not any(row["slots"] == slots for row in rows):
                continue
            engine = made_up.make_engine(self.model, load, self.choices, lengths[-1])
            steps = calibrate.measure(engine, lengths)
            del engine
            gc.collect()  # the pool must go before the next one comes
            for found in made_up.speedup_rows(slots, lengths, steps, acceptance):
                row = {name: found[name] for name in ("slots", "context_length")}
                if row in rows:
                    yield row, found

    def headline(self, found):
        """Speed-up of every k, and the choice."""
        speedups = ", ".join(f"k={k} {v:.2f}" for k, v in found["speedup"].items())
        return f"{speedups}; chosen {found['chosen_k']}, best {found['best_k']}"

    def describe(self, records):
        """The worst and the best point."""
        gains = [record["chosen_speedup"] for record in records]
        worst = min(record["chosen_of_best"] for record in records)
        return {
            "least_speedup": min(gains),
            "largest_speedup": max(gains),
            "least_of_best_k": worst,
            "model": dataclasses.asdict(self.model.config),
        }

    @staticmethod
    def figure(axes, summary, records):
        """Speed-up of the chosen k by context length, a line for each slots."""
        del summary
        lines = {}
        for record in records:
            point = record["context_length"], record["chosen_speedup"]
            lines.setdefault(f"{record['slots']} requests", []).append(point)
        drawing.curves(
            axes, lines, x="context length, tokens", y="times plain decoding"
        )
        axes.set_xscale("log")
        lengths = sorted({record["context_length"] for record in records})
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axes.minorticks_off()


if __name__ == "__main__":
    experiment.run(SpeedupMap)
