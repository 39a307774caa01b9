"""What one compiled step takes, and which kernels it runs, without decoding a load.

    python -m experiments.step_time --load qwen3_8b_64x512x4096 --contexts 660,2560 \\
        --output F.json

Times the steps of plain decoding and of the load's k on made-up caches, every slot at
the same context, and traces some at the last context (GPU). For questions about a step,
such as an XLA flag or a kernel, which a whole load answers slowly. About 50 s on an
H100 for qwen3-8b, most of it compilation.
"""

from __future__ import annotations

import dataclasses
import sys

from absl import flags

from experiments import launch, record, time_split
from experiments.loads import LOADS
from experiments.made_up import make_engine, trace_steps
from experiments.models import random_model
from sparsespec_jax.tuning import calibrate

_LOAD = flags.DEFINE_enum(
    "load", "qwen3_8b_64x512x4096", sorted(LOADS), "Load whose engine is timed."
)
_MODEL = flags.DEFINE_string("model", None, "Another preset; weights are random.")
_SLOTS = flags.DEFINE_integer(
    "num_slots", None, "Other slots than the load's.", lower_bound=1
)
_POLICY = flags.DEFINE_string("policy", None, "Another selection policy.")
_ROWS = flags.DEFINE_string("mass_rows", None, "Rows of the mass: all or edges.")
_SCOPE = flags.DEFINE_string("scope", None, "One selection per kv_head or per layer.")
_K = flags.DEFINE_list("k", None, "Numbers of drafts; default: 0 and the load's.")
_CONTEXTS = flags.DEFINE_list("contexts", ["660", "2560"], "Tokens in every slot.")
_TRACE_STEPS = flags.DEFINE_integer(
    "trace_steps", 18, "Steps to trace; 0: none.", lower_bound=0
)
_COMMIT = flags.DEFINE_string("commit", None, "Commit to record if git cannot say.")
_OUTPUT = flags.DEFINE_string("output", None, "Results file.", required=True)


def options_from_flags():
    """(load, numbers of drafts, contexts); ValueError if one is out of range."""
    chosen = (_MODEL, _SLOTS, _POLICY, _ROWS, _SCOPE)
    given = {flag.name: flag.value for flag in chosen if flag.value is not None}
    load = dataclasses.replace(LOADS[_LOAD.value], **given)
    choices = [0, load.num_draft_tokens] if _K.value is None else map(int, _K.value)
    contexts = sorted({int(length) for length in _CONTEXTS.value})
    if not contexts or contexts[0] < 2:
        raise ValueError(f"contexts must be numbers >= 2, got {_CONTEXTS.value}")
    return load, sorted(set(choices)), contexts


def main():
    """Time every k, trace it at the longest context, write the results file."""
    with launch.checking():
        load, choices, contexts = options_from_flags()
        if _TRACE_STEPS.value:
            time_split.check_can_trace("--trace_steps=0")
        model = random_model(load.model, load.dtype)
        engine = make_engine(model, load, choices, contexts[-1])
    own_flags = flags.FLAGS.get_key_flags_for_module(sys.modules[__name__])
    header = record.results_header(own_flags, commit=_COMMIT.value) | {
        "load": dataclasses.asdict(load),
    }
    steps = calibrate.measure(engine, contexts)
    rows = []
    for k, points in steps.items():
        row = {"num_draft_tokens": k}
        seconds = [value for _, value in points]
        row["ms_per_step"] = {
            length: 1e3 * value for length, value in zip(contexts, seconds, strict=True)
        }
        if _TRACE_STEPS.value:
            row["time_split"] = trace_steps(engine, k, contexts[-1], _TRACE_STEPS.value)
        rows.append(row)
        print(k, row["ms_per_step"], flush=True)
        record.write_results(_OUTPUT.value, header | {"rows": rows})


if __name__ == "__main__":
    launch.run(main)
