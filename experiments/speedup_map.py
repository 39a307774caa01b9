"""Where speculation pays: speed-up over context length and slots, and the k chosen.

    python -m experiments.speedup_map --output experiments/results/speedup_map_h100.json

Times the compiled step of every k on made-up caches (random weights of a preset), for
each number of slots and context length, and turns them into tokens per second with an
assumed acceptance: --acceptance is the chance of a draft given those before it, 0.93
makes 6.1 of 8. The cost model sees two of the lengths only; its choice stands beside
the best fixed k at every length. Lengths that the pool cannot hold in every slot are
left out. About 3 minutes on an H100 for qwen3-8b.
"""

from __future__ import annotations

import dataclasses
import gc
import sys

from absl import app, flags

from experiments import launch, record
from experiments.models import random_model
from sparsespec_jax import Engine, EngineConfig, SpeculationConfig, calibrate
from sparsespec_jax.cost_model import CostModel
from sparsespec_jax.model_config import PRESETS
from sparsespec_jax.state import pool_bytes_per_page

_MODEL = flags.DEFINE_enum("model", "qwen3-8b", sorted(PRESETS), "Shapes to time.")
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["float32", "bfloat16"], "Type.")
_SLOTS = flags.DEFINE_list("slots", ["8", "32", "128"], "Numbers of slots.")
_LENGTHS = flags.DEFINE_list(
    "lengths", ["256", "1024", "2048", "4096", "10000", "32000"], "Context lengths."
)
_CHOICES = flags.DEFINE_list("choices", ["0", "2", "4", "8"], "Numbers of drafts, k.")
_ACCEPTANCE = flags.DEFINE_float(
    "acceptance", 0.93, "Assumed, given those before.", lower_bound=0, upper_bound=1
)
_KV_GIB = flags.DEFINE_float("kv_gib", 50.0, "Size of the KV pool.", lower_bound=0.01)
_PAGE = flags.DEFINE_integer("page_size", 64, "Tokens per KV page.", lower_bound=1)
_COMMIT = flags.DEFINE_string("commit", None, "Commit to record if git cannot say.")
_OUTPUT = flags.DEFINE_string("output", None, "Results file.", required=True)


def make_engine(model, slots: int, choices: list[int], wanted: int) -> Engine:
    """An engine of `slots` whose pool may hold contexts of `wanted` tokens."""
    per_page = pool_bytes_per_page(model.config, _PAGE.value, _DTYPE.value)
    config = EngineConfig(
        num_slots=slots,
        page_size=_PAGE.value,
        num_pages=int(_KV_GIB.value * 2**30) // per_page,
        max_length=min(model.config.max_length, wanted),
        kv_policy="reserve",  # no host pages: made-up caches never outgrow the pool
    )
    speculation = SpeculationConfig(
        num_draft_tokens=max(choices), draft_token_choices=tuple(choices)
    )
    return Engine(model, speculation=speculation, engine=config)


def rows_of(slots: int, lengths, steps, acceptance) -> list[dict]:
    """One row per context length from the measured `steps` (see CostModel)."""
    coarse = CostModel({k: (points[0], points[-1]) for k, points in steps.items()})
    measured = CostModel(steps)
    rows = []
    for length in lengths:
        load = dict(
            num_running=slots, context_tokens=slots * length, acceptance=acceptance
        )
        rates = {k: measured.tokens_per_s(k, **load) for k in steps}
        guesses = {k: coarse.tokens_per_s(k, **load) for k in steps}
        chosen, best = max(guesses, key=guesses.get), max(rates, key=rates.get)
        rows.append(
            {
                "slots": slots,
                "context_length": length,
                "seconds_per_step": {
                    k: measured.seconds(k, slots * length) for k in steps
                },
                "speedup": {k: rate / rates[0] for k, rate in rates.items()},
                "best_k": best,
                "chosen_k": chosen,
                "chosen_speedup": rates[chosen] / rates[0],
                "chosen_of_best": rates[chosen] / rates[best],
            }
        )
    return rows


def main():
    """Measure every number of slots and write the map."""
    try:
        slots, lengths, choices = (
            sorted({int(x) for x in flag.value})
            for flag in (_SLOTS, _LENGTHS, _CHOICES)
        )
        if 0 not in choices:
            raise ValueError("choices must hold 0, which the speed-up is against")
        if len(lengths) < 2:
            raise ValueError("give at least two lengths")
    except ValueError as error:
        raise app.UsageError(str(error)) from None
    model = random_model(_MODEL.value, _DTYPE.value)
    own_flags = flags.FLAGS.get_key_flags_for_module(sys.modules[__name__])
    header = record.results_header(own_flags, commit=_COMMIT.value)
    header["model"] = dataclasses.asdict(model.config)
    acceptance = tuple(_ACCEPTANCE.value**i for i in range(1, max(choices) + 1))
    rows = []
    for count in slots:
        engine = make_engine(model, count, choices, lengths[-1] + 2048)
        longest = calibrate.longest_context(engine)
        fitting = [n for n in lengths if n <= longest]
        if len(fitting) < 2:
            raise ValueError(
                f"{count} slots hold contexts of at most {longest} tokens: name two "
                "lengths within that, or fewer slots, or raise kv_gib"
            )
        steps = calibrate.measure(engine, fitting)
        del engine
        gc.collect()  # the pool must go before the next one comes
        rows += rows_of(count, fitting, steps, acceptance)
        record.write_results(_OUTPUT.value, header | {"rows": rows})
        for row in rows[-len(fitting) :]:
            speedups = ", ".join(f"k={k} {v:.2f}" for k, v in row["speedup"].items())
            print(
                f"{row['slots']:4d} slots x {row['context_length']:6d}: {speedups}; "
                f"chosen {row['chosen_k']}, best {row['best_k']}",
                flush=True,
            )


if __name__ == "__main__":
    launch.run(main)
