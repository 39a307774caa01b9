"""What page pressure costs: one over-subscribed load under every KV policy.

    python -m experiments.offload --output experiments/results/offload_h100.json

Re-measures the KV manager's share of the paper's gain (arXiv 2512.01278, section 4.4)
on random weights of a preset's shapes. The pool holds `--pool_share` of what the load
needs, so requests are spilled and restored all the time. `offload_without_copies` is
the yardstick: the same schedule, step for step, with the page copies left out (its text
is wrong and nobody reads it), so the ratio of both rates is what the copies cost.
Acceptance is forced, as weights are random. Expected on an H100: a ratio of at least
0.97. About 4 minutes, half of it compilation.
"""

from __future__ import annotations

import gc
import sys

from absl import flags

from experiments import launch, record, time_split
from experiments.loads import check_requests
from experiments.models import random_model
from experiments.pressure import (
    MODES,
    make_load,
    metrics_of,
    pool_pages,
    run_mode,
    trace_copies,
)
from sparsespec_jax import EngineConfig, SpeculationConfig
from sparsespec_jax.models.config import PRESETS

_MODEL = flags.DEFINE_enum("model", "qwen3-8b", sorted(PRESETS), "Shapes to run.")
_DTYPE = flags.DEFINE_enum(
    "dtype", "bfloat16", ["float32", "bfloat16"], "Type of weights and KV."
)
_REQUESTS = flags.DEFINE_integer(
    "num_requests", 64, "Requests, and slots.", lower_bound=1
)
_PROMPT = flags.DEFINE_integer(
    "prompt_length", 512, "Tokens of a prompt.", lower_bound=1
)
_NEW = flags.DEFINE_integer(
    "new_tokens", 1024, "Mean output; half to 1.5 times it.", lower_bound=1
)
_SHARE = flags.DEFINE_float(
    "pool_share", 0.5, "Pool over what the load needs.", lower_bound=0.01
)
_K = flags.DEFINE_integer("num_draft_tokens", 8, "Drafts per cycle.", lower_bound=1)
_FORCED = flags.DEFINE_float("forced_acceptance", 6.16, "Mean accepted drafts.")
_PAGE = flags.DEFINE_integer("page_size", 64, "Tokens per page.", lower_bound=1)
_CHUNK = flags.DEFINE_integer(
    "chunk_pages", 16, "Pages copied at a time.", lower_bound=1
)
_LAG = flags.DEFINE_integer(
    "lag", 1, "Steps between dispatch and outcome.", lower_bound=0
)
_REPEATS = flags.DEFINE_integer(
    "repeats", 2, "Runs of each of the first two modes.", lower_bound=1
)
_RIVALS = flags.DEFINE_bool("rivals", True, "Run recompute and reserve, too.")
_TRACE = flags.DEFINE_bool("trace", True, "Trace copies (needs a GPU).")
_COMMIT = flags.DEFINE_string("commit", None, "Commit to record if git cannot say.")
_OUTPUT = flags.DEFINE_string("output", None, "Results file.", required=True)


def engine_config(mode: str, num_pages: int) -> EngineConfig:
    """The engine's sizes under one of MODES."""
    return EngineConfig(
        num_slots=_REQUESTS.value,
        page_size=_PAGE.value,
        num_pages=num_pages,
        max_length=_PROMPT.value + _NEW.value * 3 // 2,
        prefill_chunk=512,
        prefill_lanes=4,
        lag=_LAG.value,
        kv_policy=mode if mode in ("recompute", "reserve") else "offload",
        host_chunk_pages=_CHUNK.value,
    )


def main():
    """Run every mode and write the results file after each."""
    load = make_load(
        PRESETS[_MODEL.value].vocab_size,
        num_requests=_REQUESTS.value,
        prompt_length=_PROMPT.value,
        new_tokens=_NEW.value,
    )
    with launch.checking():
        speculation = SpeculationConfig(
            num_draft_tokens=_K.value,
            acceptor="forced",
            forced_acceptance=_FORCED.value,
        )
        pages = pool_pages(
            load, share=_SHARE.value, page_size=_PAGE.value, speculation=speculation
        )
        if _TRACE.value:
            time_split.check_can_trace("--notrace")
        for mode in MODES:
            engine_config(mode, pages)
        model = random_model(_MODEL.value, _DTYPE.value)
        for mode in MODES:
            check_requests(model, *load, speculation, engine_config(mode, pages))
    own_flags = flags.FLAGS.get_key_flags_for_module(sys.modules[__name__])
    header = record.results_header(own_flags, commit=_COMMIT.value)
    runs = {mode: [] for mode in MODES}
    order = [*MODES[:2] * _REPEATS.value, *MODES[2:] * _RIVALS.value]
    for mode in order:
        config = engine_config(mode, pages)
        copies = mode != "offload_without_copies"
        run = run_mode(model, load, speculation, config, copies=copies)
        gc.collect()  # the pool must go before the next one comes
        runs[mode].append(run)
        shown = {k: v for k, v in run.items() if k != "history"}
        print(mode, shown, flush=True)
        results = {"num_pages": pages, "metrics": metrics_of(runs), "runs": runs}
        record.write_results(_OUTPUT.value, header | results)
    print(metrics_of(runs))
    if _TRACE.value:
        first = runs["offload"][0]["busiest_step"]
        if not runs["offload"][0]["spilled_gib"]:
            sys.exit("no page moved, so no copies to trace: lower --pool_share")
        results["copies"] = trace_copies(
            model, load, speculation, engine_config("offload", pages), first
        )
        print(results["copies"])
        record.write_results(_OUTPUT.value, header | results)


if __name__ == "__main__":
    launch.run(main)
