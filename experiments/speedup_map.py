"""Where speculation pays: speed-up over context length and slots, and the k chosen.

    python -m experiments.speedup_map --output experiments/results/speedup_map_h100.json

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
import sys

from absl import flags

from experiments import launch, made_up, record
from experiments.loads import LOADS
from experiments.models import random_model
from sparsespec_jax import sizes
from sparsespec_jax.models.config import PRESETS
from sparsespec_jax.tuning import calibrate

_LOAD = flags.DEFINE_enum(
    "load", "qwen3_8b_64x512x4096", sorted(LOADS), "Load whose options are timed."
)
_MODEL = flags.DEFINE_enum("model", None, sorted(PRESETS), "Another model's shapes.")
_SLOTS = flags.DEFINE_list("slots", ["8", "32", "128"], "Numbers of slots.")
_LENGTHS = flags.DEFINE_list(
    "lengths", ["256", "1024", "2048", "4096", "10000", "32000"], "Context lengths."
)
_CHOICES = flags.DEFINE_list("choices", ["0", "4", "8"], "Numbers of drafts, k.")
_ACCEPTANCE = flags.DEFINE_float(
    "acceptance", 0.93, "Assumed, given those before.", lower_bound=0, upper_bound=1
)
_KV_GIB = flags.DEFINE_float("kv_gib", 50.0, "Size of the KV pool.", lower_bound=0.01)
_COMMIT = flags.DEFINE_string("commit", None, "Commit to record if git cannot say.")
_OUTPUT = flags.DEFINE_string("output", None, "Results file.", required=True)


def options_from_flags():
    """(load, numbers of drafts, [(load of some slots, lengths that fit)]).

    Raises ValueError if something is off.
    """
    slots, lengths, choices = (
        sorted({int(x) for x in flag.value}) for flag in (_SLOTS, _LENGTHS, _CHOICES)
    )
    if 0 not in choices:
        raise ValueError("choices must hold 0, which the speed-up is against")
    if slots[0] < 1 or lengths[0] < 2:
        raise ValueError("slots must be at least 1 and lengths at least 2")
    load = LOADS[_LOAD.value]
    load = dataclasses.replace(load, model=_MODEL.value or load.model)
    if load.model not in PRESETS:
        raise ValueError(f"the load's model {load.model!r} has no preset: name --model")
    fitting, most = [], _KV_GIB.value * 2**30
    for count in slots:
        of_slots = dataclasses.replace(load, num_slots=count, num_requests=count)
        held = [n for n in lengths if made_up.fits(of_slots, choices, n, most)]
        if len(held) < 2:
            raise ValueError(
                f"{count} slots can hold only {held} of the lengths "
                f"{lengths} in {_KV_GIB.value} GiB: name two that fit, or fewer slots, "
                "or raise kv_gib"
            )
        fitting.append((of_slots, held))
    return load, choices, fitting


def main():
    """Measure every number of slots and write the map."""
    with launch.checking():
        load, choices, fitting = options_from_flags()
        model = random_model(load.model, load.dtype)
        for of_slots, lengths in fitting:
            sizes.resolve(model, *made_up.options(of_slots, choices, lengths[-1]))
    own_flags = flags.FLAGS.get_key_flags_for_module(sys.modules[__name__])
    header = record.results_header(own_flags, commit=_COMMIT.value) | {
        "load": dataclasses.asdict(load),
        "model": dataclasses.asdict(model.config),
    }
    acceptance = tuple(_ACCEPTANCE.value**i for i in range(1, max(choices) + 1))
    rows = []
    for of_slots, lengths in fitting:
        engine = made_up.make_engine(model, of_slots, choices, lengths[-1])
        steps = calibrate.measure(engine, lengths)
        del engine
        gc.collect()  # the pool must go before the next one comes
        rows += made_up.speedup_rows(of_slots.num_slots, lengths, steps, acceptance)
        record.write_results(_OUTPUT.value, header | {"rows": rows})
        for row in rows[-len(lengths) :]:
            speedups = ", ".join(f"k={k} {v:.2f}" for k, v in row["speedup"].items())
            print(
                f"{row['slots']:4d} slots x {row['context_length']:6d}: {speedups}; "
                f"chosen {row['chosen_k']}, best {row['best_k']}",
                flush=True,
            )


if __name__ == "__main__":
    launch.run(main)
