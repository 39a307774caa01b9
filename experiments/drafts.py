"""Cheaper drafts: schedules, draft weights, policies and k, timed side by side.

    python -m experiments.drafts --slots 24 --context 12800 --output RUN

Steps of the engine run on made-up caches, every slot at the same context: no text is
decoded, and how many drafts are accepted is assumed (0.941 a draft is 6.16 of 8). Mixed
steps draft for some requests and verify others (the paper's unified schedule); an
aligned one is a cycle of all, which is the naive schedule that the paper compares with,
and the one in which drafts may have weights of 8 bits. Speed-ups are over plain
decoding of the same run.
"""

from __future__ import annotations

import dataclasses
import functools
import gc

from experiments import experiment, made_up, models
from experiments.experiment import Experiment
from experiments.loads import LOADS
from experiments.options import Options, option
from experiments.throughput import device_rates
from sparsespec_jax import Engine, sizes
from sparsespec_jax.config import NUMERICS
from sparsespec_jax.host.cost_model import speed_of_light
from sparsespec_jax.tuning import calibrate

# (schedule, weights of drafts) by name.
WAYS = {
    "mixed": ("mixed", None),
    "aligned": ("aligned", None),
    "aligned, 8 bits": ("aligned", "int8"),
}
_PLAIN = "plain"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DraftsConfig(Options):
    """Which ways to draft, for how many requests of which context."""

    load: str = option(
        "qwen3_8b_64x512x4096", "Whose options are taken.", choices=sorted(LOADS)
    )
    model: str | None = option(None)  # none: the load's
    dtype: str = option("bfloat16", "Type.", choices=models.DTYPES)
    slots: int = option(64, "Requests decoded at the same time.", at_least=1)
    context: int = option(2560, "Tokens in each.", at_least=2)
    ways: tuple[str, ...] = option(tuple(WAYS), "Of them.", choices=tuple(WAYS))
    num_draft_tokens: tuple[int, ...] = option((4, 6, 8), "Each k.", at_least=1)
    policies: tuple[str, ...] = option(("pillar",), "Policies.")
    acceptance: float = option(
        0.941, "Of a draft behind accepted ones, assumed.", at_least=0, at_most=1
    )
    numerics: str = option("fast", "Of the engine.", choices=NUMERICS)


class Drafts(Experiment):
    """A row a way, policy and k; plain decoding is the first."""

    claim = "8-bit drafts in aligned cycles make 1.5 times plain decoding's tokens"
    Config = DraftsConfig
    SMOKE = dict(
        model="tiny", dtype="float32", slots=2, context=40, num_draft_tokens=(2,),
        load="smollm2_256x4096",
    )  # fmt: skip

    def __init__(self, config, **how):
        super().__init__(config, **how)
        load = LOADS[config.load]
        changes = dict(
            model=config.model or load.model, dtype=config.dtype,
            num_slots=config.slots, num_requests=config.slots,
            numerics=config.numerics,
        )  # fmt: skip
        self.load = dataclasses.replace(load, **changes)
        self.model = models.random_model(self.load.model, config.dtype)
        for row in self.rows():
            sizes.resolve(self.model, *self._options(row))

    def rows(self):
        """Plain decoding, then k by k, what is compared next to each other."""
        config = self.config
        return [
            dict(way=_PLAIN, policy=config.policies[0], num_draft_tokens=0),
            *(
                dict(way=way, policy=policy, num_draft_tokens=k)
                for k in config.num_draft_tokens
                for policy in config.policies
                for way in config.ways
            ),
        ]

    def _options(self, row):
        """(SpeculationConfig, EngineConfig) of a row."""
        k, (schedule, weights) = row["num_draft_tokens"], WAYS.get(row["way"], (0, 0))
        load = self.load
        if k:
            how = dict(schedule=schedule, draft_weights=weights, policy=row["policy"])
            load = dataclasses.replace(load, **how)
        return made_up.options(load, [k], self.config.context)

    def measure(self, row):
        """Time of a cycle of all slots, and what it makes if as many are accepted."""
        config, k = self.config, row["num_draft_tokens"]
        speculation, engine_config = self._options(row)
        engine = Engine(self.model, speculation=speculation, engine=engine_config)
        made_up.fill_pages(engine)
        ((_, step_s),) = calibrate.measure(engine, [config.context])[k]
        reads = sizes.of_drafts(self.model, speculation, engine.impl)
        budget = engine.shape.budget_tokens(
            config.context, ratio=speculation.budget_ratio, floor=speculation.min_budget
        )
        kv_bytes = config.slots * config.context * engine.kv_bytes_per_token
        pool_gib = engine.shape.num_pages * engine.shape.page_size
        pool_gib *= engine.kv_bytes_per_token / 2**30
        del engine
        gc.collect()  # the pool must go before the next one comes
        accepted = sum(config.acceptance**i for i in range(1, k + 1))
        cycle_s = (k + 1) * step_s
        bound = functools.partial(
            speed_of_light, num_draft_tokens=k, mean_accepted_draft_tokens=accepted,
            weight_bytes=sizes.weight_bytes(self.model), kv_bytes=kv_bytes,
            budget_ratio=int(budget) / config.context, num_slots=config.slots,
            is_aligned=reads["schedule"] == "aligned",
            draft_weight_bytes=reads["draft_weight_bytes"],
        )  # fmt: skip
        balance = self.rates["balance_tokens"]
        return {
            "ms_per_cycle": 1e3 * cycle_s,
            "accepted": accepted,
            "acceptance": "assumed",
            "tokens_per_s": config.slots * (1 + accepted) / cycle_s,
            "kv_gib": kv_bytes / 2**30,
            "pool_gib": pool_gib,
            "speed_of_light": bound(),
            "speed_of_light_with_arithmetic": bound(balance_tokens=balance),
        }

    @functools.cached_property
    def rates(self):
        """See `device_rates`."""
        return device_rates(self.config.dtype)

    def describe(self, records):
        """Every row with its speed-up over plain decoding, and the best of each way."""
        (plain,) = (r["tokens_per_s"] for r in records if r["way"] == _PLAIN)
        rows = [r | {"speedup": r["tokens_per_s"] / plain} for r in records]
        best = {}
        for row in rows:
            best[row["way"]] = max(best.get(row["way"], 0.0), row["speedup"])
        return {**self.rates, "best_speedup": best, "rows": rows}

    def text(self, described, records):
        """A line a row."""
        del records
        return "\n".join(
            f"{row['way']:16s} {row['policy']:8s} k = {row['num_draft_tokens']:2d} "
            f"{row['ms_per_cycle']:8.2f} ms a cycle, {row['speedup']:.2f} times plain, "
            f"at most {row['speed_of_light_with_arithmetic']:.2f}"
            for row in described["rows"]
        )


if __name__ == "__main__":
    experiment.run(Drafts)
