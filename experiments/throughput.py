"""Plain against speculative decoding of one load, with the speed of light beside both.

    python -m experiments.throughput --load qwen3_8b_64x512x4096 --output F.json

Re-measures the paper's end-to-end claim (arXiv 2512.01278, section 6: up to 2.13 times
plain decoding on an H100) against this engine's own plain decoding: same process, same
weights, slots, prompts and type. Decode-phase rates count from the moment every request
has its first token to the moment one finishes, so that all slots are busy. Steps in the
middle of that phase are traced for the time split and counted in no rate. With --clock
the steps of its first half say when they began and ended on the device. With
--forced_acceptance the tokens are not the model's: a tool for random weights only, and
`forced_acceptance` stands in the results.
"""

from __future__ import annotations

import dataclasses
import gc
import sys
import time

import numpy as np
from absl import flags

from experiments import launch, record, signals, time_split
from experiments.loads import LOADS, Load, check_requests
from experiments.models import random_model
from experiments.prompts import load_prompts
from experiments.step_clock import ClockedEngine, idle_between
from pallas_kernels import default_impl, device_trace
from pallas_kernels.timing import measure_flop_rate, measure_rates
from sparsespec_jax import (
    Engine,
    EngineConfig,
    Model,
    SpeculationConfig,
    load_model,
    sizes,
)
from sparsespec_jax.device.state import pool_bytes_per_page
from sparsespec_jax.host.text import encode_prompts
from sparsespec_jax.tuning.calibrate import load_or_measure
from sparsespec_jax.tuning.cost_model import Chooser, accepted_drafts

_LOAD = flags.DEFINE_enum(
    "load", "qwen3_8b_64x512x4096", sorted(LOADS), "Load; other flags change it."
)
_PROMPTS = flags.DEFINE_string("prompts", "", "A .txt or .jsonl file of prompts.")
_TRACE_STEPS = flags.DEFINE_integer(
    "trace_steps", 40, "Steps to trace; 0: none.", lower_bound=0
)
_CLOCK = flags.DEFINE_bool(
    "clock", False, "Steps read the GPU's clock: idle time between them, untraced."
)
_TRACE_DIR = flags.DEFINE_string("trace_dir", None, "Keep the traces here.")
_REPEATS = flags.DEFINE_integer(
    "repeats", 1, "Runs of each mode, in turn.", lower_bound=1
)
_COMMIT = flags.DEFINE_string("commit", None, "Commit to record if git cannot say.")
_OUTPUT = flags.DEFINE_string("output", None, "Results file.", required=True)


def _define_option_flags():
    define = {
        str: flags.DEFINE_string,
        int: flags.DEFINE_integer,
        float: flags.DEFINE_float,
        bool: flags.DEFINE_bool,
    }
    for field in dataclasses.fields(Load):
        define[type(field.default)](field.name, None, field.metadata["help"])


_define_option_flags()


def load_from_flags() -> Load:
    """The named load with the given flags in place of its values."""
    names = [field.name for field in dataclasses.fields(Load)]
    given = {name: flags.FLAGS[name].value for name in names}
    given = {name: value for name, value in given.items() if value is not None}
    return dataclasses.replace(LOADS[_LOAD.value], **given)


def make_model(load: Load) -> Model:
    """The load's model, with random weights of a preset or loaded."""
    if not load.random_weights:
        return load_model(load.model, dtype=load.dtype)
    return random_model(load.model, load.dtype)


def make_prompts(load: Load, model: Model) -> list[list[int]]:
    """Token ids of every request's prompt."""
    if load.prompt_length:
        if model.config.vocab_size < 30:
            raise ValueError("random prompts need a vocabulary of 30 tokens or more")
        rng = np.random.default_rng(0)
        shape = (load.num_requests, load.prompt_length)
        return rng.integers(10, model.config.vocab_size - 10, shape).tolist()
    encoded = encode_prompts(load_prompts(_PROMPTS.value, chat=True), model)
    return [encoded[i % len(encoded)] for i in range(load.num_requests)]


class RecordedChooser(Chooser):
    """A Chooser that keeps what it was asked and what it picked."""

    def __init__(self, cost_model):
        super().__init__(cost_model)
        self.asked = []

    def __call__(self, **load) -> int:
        """The k to go on with."""
        k = super().__call__(**load)
        drafts = max(self.cost_model.steps)
        self.asked.append(
            {
                "num_running": load["num_running"],
                "context_tokens": load["context_tokens"],
                "accepted_drafts": accepted_drafts(load["acceptance"], drafts),
                "host_seconds": load["host_seconds"],
                "num_draft_tokens": k,
            }
        )
        return k

    def to_dict(self) -> dict:
        """The step times that it goes by, and every choice, in order."""
        return {"steps": self.cost_model.steps, "asked": self.asked}


def engine_config(load: Load, model: Model, prompts) -> EngineConfig:
    """The engine's sizes, with a pool of the load's size for these prompts."""
    num_pages = None
    if load.kv_gib:
        per_page = pool_bytes_per_page(model.config, load.page_size, load.dtype)
        num_pages = int(load.kv_gib * 2**30) // per_page
        if not num_pages:
            raise ValueError(f"kv_gib is {load.kv_gib}, a page has {per_page} bytes")
    return load.engine(max(map(len, prompts)), num_pages)


def make_engine(load: Load, model: Model, prompts, speculation):
    """(engine of the load's sizes, compiled; its RecordedChooser or None)."""
    config = engine_config(load, model, prompts)
    make = ClockedEngine if _CLOCK.value else Engine
    engine = make(model, speculation=speculation, engine=config)
    engine.warm_up()
    if not speculation.draft_token_choices:
        return engine, None
    chooser = RecordedChooser(load_or_measure(engine))
    engine.choose_with(chooser)
    return engine, chooser


class Clock:
    """Tokens, steps and seconds of parts of a run.

    Host seconds are processor time of this thread, dispatch seconds that of the thread
    that dispatches, if it is another one (lag 2).
    """

    def __init__(self, engine):
        self.engine = engine
        self.tokens = self.steps = 0
        self.seconds = self.host_seconds = self.dispatch_seconds = 0.0

    def run(self, until):
        """Step the engine until `until(finished results of the step)` or no work."""
        engine = self.engine
        left, steps = engine.max_new_tokens, engine.num_steps
        start, host_start = time.perf_counter(), time.thread_time()
        dispatch_start = engine.device_steps.dispatcher.seconds
        while engine.has_work and not until(engine.step()):
            pass
        self.seconds += time.perf_counter() - start
        self.host_seconds += time.thread_time() - host_start
        self.dispatch_seconds += engine.device_steps.dispatcher.seconds - dispatch_start
        self.tokens += left - engine.max_new_tokens
        self.steps += engine.num_steps - steps

    def to_dict(self) -> dict:
        """Rates and counts."""
        return {
            "tokens": self.tokens,
            "steps": self.steps,
            "seconds": self.seconds,
            "tokens_per_s": self.tokens / self.seconds,
            "ms_per_step": 1e3 * self.seconds / self.steps,
            "host_ms_per_step": 1e3 * self.host_seconds / self.steps,
            "dispatch_ms_per_step": 1e3 * self.dispatch_seconds / self.steps,
        }


def run_mode(
    load: Load, model: Model, prompts, speculation, trace_dir, balance_tokens
) -> dict:
    """Decode the load once; rates, counts and the time split of one mode.

    balance_tokens: of the device, see `metrics.speed_of_light`.
    """
    start = time.perf_counter()
    engine, chooser = make_engine(load, model, prompts, speculation)
    set_up_s = time.perf_counter() - start
    for index, prompt in enumerate(prompts):
        engine.add_request(prompt, load.sampling(index), prompt_index=index)
    prefill, decode, traced, tail = (Clock(engine) for _ in range(4))
    prefill.run(lambda finished: not engine.is_prefilling)
    half = engine.max_new_tokens // 2
    if _CLOCK.value:
        engine.take_times()  # of prompts
    decode.run(lambda finished: finished or engine.max_new_tokens <= half)
    clock = idle_between(engine.take_times()) if _CLOCK.value else None
    split = _trace(engine, traced, trace_dir) if _TRACE_STEPS.value else None
    decode.run(lambda finished: finished)
    tail.run(lambda finished: False)
    parts = (prefill, decode, tail)
    tokens, seconds = sum(p.tokens for p in parts), sum(p.seconds for p in parts)
    stats = engine.stats(seconds)
    return {
        "tokens_per_s": tokens / seconds,
        "set_up_s": set_up_s,
        "prefill": prefill.to_dict(),
        "decode": decode.to_dict(),
        "tail": {"seconds": tail.seconds, "tokens": tail.tokens},
        "time_split": split,
        "device_clock": clock,
        "kv_gib": engine.shape.num_pages
        * pool_bytes_per_page(model.config, load.page_size, load.dtype)
        / 2**30,
        "stats": stats.to_dict(),
        "chooser": chooser and chooser.to_dict(),
        "speed_of_light_with_arithmetic": stats.speed_of_light_at(balance_tokens),
    }


def _trace(engine, clock, trace_dir):
    """Trace steps of the engine, counted by `clock`; the time split."""
    last = engine.num_steps + _TRACE_STEPS.value
    first = engine.num_steps
    with device_trace.trace(trace_dir):
        clock.run(lambda finished: engine.num_steps >= last)
    plan_size = engine.shape.new_plan(prefill=False).buffer.size
    return time_split.split_of_steps(trace_dir, plan_size, engine.num_steps - first)


def metrics_of(plain: list[dict], spec: list[dict], load: Load) -> dict:
    """The figures that tables quote, medians over the repeats."""

    def median(runs, *path):
        values = []
        for run in runs:
            for name in path:
                run = run[name]
            values.append(run)
        return float(np.median(values))

    ar, sp = (median(runs, "decode", "tokens_per_s") for runs in (plain, spec))
    bound = median(spec, "stats", "speed_of_light")
    total = spec[0]["stats"]["total"]
    return {
        "ar_tokens_per_s": median(plain, "tokens_per_s"),
        "spec_tokens_per_s": median(spec, "tokens_per_s"),
        "ar_decode_tokens_per_s": ar,
        "spec_decode_tokens_per_s": sp,
        "speedup": sp / ar,
        "speed_of_light": bound,
        "fraction_of_speed_of_light": sp / ar / bound,
        "speed_of_light_with_arithmetic": median(
            spec, "speed_of_light_with_arithmetic"
        ),
        "mean_accepted_draft_tokens": total["mean_accepted_draft_tokens"],
        "forced_acceptance": None
        if load.forced_acceptance < 0
        else load.forced_acceptance,
        "kv_share": _kv_share(plain[0]["stats"], load.num_slots),
        "ar_time_split": plain[0]["time_split"],
        "spec_time_split": spec[0]["time_split"],
    }


def _kv_share(stats: dict, num_slots: int) -> float:
    """Share of KV in the bytes that a plain step reads, the slots all busy."""
    total = stats["total"]
    steps = total["num_output_tokens"] - total["num_requests"]
    per_slot = total["plain_kv_tokens"] / steps * stats["kv_bytes_per_token"]
    return num_slots * per_slot / (num_slots * per_slot + stats["weight_bytes"])


def main():
    """Run both modes in turn and write the results file."""
    with launch.checking():
        load = load_from_flags()
        if _CLOCK.value and default_impl() != "gpu":
            raise ValueError("--clock reads the clock of a GPU, this process has none")
        if _TRACE_STEPS.value:
            time_split.check_can_trace("--trace_steps=0")
        model = make_model(load)
        prompts = make_prompts(load, model)
        config = engine_config(load, model, prompts)
        laws = [load.sampling(index) for index in range(len(prompts))]
        for speculation in (SpeculationConfig(num_draft_tokens=0), load.speculation()):
            check_requests(model, prompts, laws, speculation, config)
    read_rate, copy_rate = measure_rates()
    flop_rate = measure_flop_rate(load.dtype)
    balance_tokens = flop_rate / read_rate * np.dtype(load.dtype).itemsize / 2
    own_flags = flags.FLAGS.get_key_flags_for_module(sys.modules[__name__])
    results = record.results_header(own_flags, commit=_COMMIT.value) | {
        "load": dataclasses.asdict(load),
        "longest_prompt": max(map(len, prompts)),
        "weight_bytes": sizes.weight_bytes(model),
        "read_tb_per_s": read_rate / 1e12,
        "copy_tb_per_s": copy_rate / 1e12,
        "tflop_per_s": flop_rate / 1e12,
        "balance_tokens": balance_tokens,
    }
    modes = {
        "plain": SpeculationConfig(num_draft_tokens=0),
        "speculative": load.speculation(),
    }
    runs = {name: [] for name in modes}
    for repeat in range(_REPEATS.value):
        for name, speculation in modes.items():
            with signals.temporary_directory() as temporary:
                directory = _TRACE_DIR.value or temporary
                run = run_mode(
                    load, model, prompts, speculation, directory, balance_tokens
                )
            gc.collect()  # the pool must go before the next one comes
            runs[name].append(run)
            line = f"{name} {repeat}: {run['tokens_per_s']:.0f} tokens/s in all"
            print(f"{line}, decode {run['decode']}", flush=True)
            record.write_results(_OUTPUT.value, results | {"runs": runs})
    metrics = metrics_of(runs["plain"], runs["speculative"], load)
    record.write_results(_OUTPUT.value, results | {"metrics": metrics, "runs": runs})
    shown = {k: v for k, v in metrics.items() if not isinstance(v, dict)}
    for name, value in shown.items():
        print(f"{name:28s} {value}")


if __name__ == "__main__":
    launch.run(main)
