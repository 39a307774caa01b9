"""Plain against speculative decoding of one load, with the speed of light beside both.

    python -m experiments.throughput --load qwen3_8b_64x512x4096 --output RUN

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
import functools
import gc
import time

import numpy as np

from experiments import context_files, experiment, models, signals, time_split
from experiments.experiment import Experiment
from experiments.loads import LOADS, Load, check_requests
from experiments.models import random_model
from experiments.options import option
from experiments.prompts import load_prompts, prepare_lines
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
from sparsespec_jax.host.cost_model import Chooser, accepted_drafts
from sparsespec_jax.plan.buffer import StepPlan
from sparsespec_jax.tuning.calibrate import load_or_measure


@dataclasses.dataclass(frozen=True, kw_only=True)
class ThroughputConfig(Load):
    """A load, each option changed by its flag, and how it is run."""

    load: str = option(
        "qwen3_8b_64x512x4096", "Load; other flags change it.", choices=sorted(LOADS)
    )
    prompts: str = option("", "A .txt or .jsonl file of prompts.")
    trace_steps: int = option(40, "Steps to trace; 0: none.", at_least=0)
    clock: bool = option(
        False, "Steps read the GPU's clock: idle time between them, untraced."
    )
    trace_dir: str | None = option(None, "Keep the traces here.", is_recorded=False)
    repeats: int = option(1, "Runs of each mode, in turn.", at_least=1)
    also_k: tuple[int, ...] = option((), "Other k to run beside.", of=int, at_least=1)
    auto: bool = option(False, "Run with a k too that is chosen, the largest at most.")

    @classmethod
    def defaults(cls, given):
        """Those of the load."""
        name = given.get("load", "qwen3_8b_64x512x4096")
        return dataclasses.asdict(LOADS[name]) if name in LOADS else {}


def make_model(load: Load) -> Model:
    """The load's model, with random weights of a preset or loaded."""
    if not load.random_weights:
        return load_model(load.model, dtype=load.dtype)
    return random_model(load.model, load.dtype)


def make_prompts(load: ThroughputConfig, model: Model) -> list[list[int]]:
    """Token ids of every request's prompt.

    Raises:
        ValueError: there are not so many contexts, or prompts that cannot be read.
    """
    if load.context_length:
        count = min(load.num_contexts, load.num_requests)
        found = context_files.file_prompts(
            model.require_tokenizer(), lengths=[load.context_length], count=count,
            seed=0,
        )  # fmt: skip
        return [list(found[i % count].ids) for i in range(load.num_requests)]
    if load.prompt_length:
        if model.config.vocab_size < 30:
            raise ValueError("random prompts need a vocabulary of 30 tokens or more")
        rng = np.random.default_rng(0)
        shape = (load.num_requests, load.prompt_length)
        return rng.integers(10, model.config.vocab_size - 10, shape).tolist()
    prompts = load_prompts(load.prompts, chat=True)
    prepared = prepare_lines(model, prompts, [load.sampling(0)] * len(prompts))
    encoded = [list(prompt.token_ids) for prompt in prepared]
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


def make_engine(load: ThroughputConfig, model: Model, prompts, speculation, make=None):
    """(engine of the load's sizes, compiled; its RecordedChooser or None)."""
    config = engine_config(load, model, prompts)
    make = make or (ClockedEngine if load.clock else Engine)
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
    load: ThroughputConfig,
    model: Model,
    prompts,
    speculation,
    trace_dir,
    balance_tokens,
    make=None,
) -> dict:
    """Decode the load once; rates, counts and the time split of one mode.

    load: a ThroughputConfig.
    balance_tokens: of the device, see `cost_model.speed_of_light`.
    make: a kind of Engine; None: the usual one.
    """
    start = time.perf_counter()
    engine, chooser = make_engine(load, model, prompts, speculation, make)
    set_up_s = time.perf_counter() - start
    for index, prompt in enumerate(prompts):
        engine.add_request(prompt, load.sampling(index), prompt_index=index)
    prefill, decode, traced, tail = (Clock(engine) for _ in range(4))
    prefill.run(lambda finished: not engine.is_prefilling)
    half = engine.max_new_tokens // 2
    if load.clock:
        engine.take_times()  # of prompts
    decode.run(lambda finished: finished or engine.max_new_tokens <= half)
    clock = idle_between(engine.take_times()) if load.clock else None
    split = None
    if load.trace_steps:
        split = _trace(engine, traced, trace_dir, load.trace_steps)
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


def _trace(engine, clock, trace_dir, num_steps):
    """Trace steps of the engine, counted by `clock`; the time split."""
    first, last = engine.num_steps, engine.num_steps + num_steps
    with device_trace.trace(trace_dir):
        clock.run(lambda finished: engine.num_steps >= last)
    plan_size = StepPlan.empty(engine.shape, prefill=False).buffer.size
    return time_split.split_of_steps(trace_dir, plan_size, engine.num_steps - first)


def device_rates(dtype) -> dict:
    """What the device reaches, and how many tokens take as long as reading weights."""
    read_rate, copy_rate = measure_rates()
    flop_rate = measure_flop_rate(dtype)
    size = np.dtype(dtype).itemsize
    return {
        "read_tb_per_s": read_rate / 1e12,
        "copy_tb_per_s": copy_rate / 1e12,
        "tflop_per_s": flop_rate / 1e12,
        "balance_tokens": flop_rate / read_rate * size / 2,
    }


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


class Throughput(Experiment):
    """Both modes in turn."""

    claim = "speculative decoding makes up to 2.13 times the tokens of plain decoding"
    Config = ThroughputConfig
    SMOKE = models.smoke(
        "model", "num_draft_tokens", "budget_ratio", "min_budget", "num_slots",
        "page_size", "prefill_chunk",
        load="smollm2_256x4096", random_weights=True, dtype="float32", num_requests=2,
        prompt_length=60, new_tokens=12, prefill_lanes=1, trace_steps=0, also_k=(1,),
        auto=True,
    )  # fmt: skip

    def __init__(self, config, **how):
        super().__init__(config, **how)
        if config.clock and default_impl() != "gpu":
            raise ValueError("--clock reads the clock of a GPU, this process has none")
        if config.trace_steps:
            time_split.check_can_trace("--trace_steps=0")
        self.model = make_model(config)
        self.prompts = make_prompts(config, self.model)
        self.parts["prompts"] = self.prompts
        engine = engine_config(config, self.model, self.prompts)
        laws = [config.sampling(index) for index in range(len(self.prompts))]
        self.speculations = {
            "plain": SpeculationConfig(num_draft_tokens=0),
            "speculative": config.speculation(),
        }
        for k in config.also_k:
            self.speculations[f"k = {k}"] = config.of_drafts(k).speculation()
        if config.auto:
            largest = config.of_drafts(max(config.num_draft_tokens, *config.also_k))
            largest = dataclasses.replace(largest, chooses_k=True)
            self.speculations["auto"] = largest.speculation()
        for speculation in self.speculations.values():
            check_requests(self.model, self.prompts, laws, speculation, engine)

    def rows(self):
        """Modes in turn."""
        return [
            {"mode": mode, "repeat": repeat}
            for repeat in range(self.config.repeats)
            for mode in self.speculations
        ]

    @functools.cached_property
    def rates(self):
        """See `device_rates`; recorded with every run, as sessions may differ."""
        return device_rates(self.config.dtype)

    def measure(self, row):
        """One run."""
        config = self.config
        with signals.temporary_directory() as temporary:
            found = run_mode(
                config,
                self.model,
                self.prompts,
                self.speculations[row["mode"]],
                config.trace_dir or temporary,
                self.rates["balance_tokens"],
            )
        gc.collect()  # the pool must go before the next one comes
        return found | self.rates

    def headline(self, found):
        """Rates in all and while all slots are busy."""
        return f"{found['tokens_per_s']:.0f} tokens/s, decode {found['decode']}"

    def describe(self, records):
        """The figures that tables quote."""
        by_mode = {
            mode: [record for record in records if record["mode"] == mode]
            for mode in self.speculations
        }
        return {
            "longest_prompt": max(map(len, self.prompts)),
            "weight_bytes": sizes.weight_bytes(self.model),
            "modes": {mode: self._mode(runs) for mode, runs in by_mode.items()},
        } | metrics_of(by_mode["plain"], by_mode["speculative"], self.config)

    def _mode(self, runs):
        """Rates of a mode, medians over the repeats, and the steps of each k."""

        def median(pick):
            return float(np.median([pick(run) for run in runs]))

        stats, num_tokens = runs[0]["stats"], sum(map(len, self.prompts))
        return {
            "tokens_per_s": median(lambda run: run["tokens_per_s"]),
            "decode_tokens_per_s": median(lambda run: run["decode"]["tokens_per_s"]),
            # Until the last prompt is read; early ones decode meanwhile.
            "prefill_tokens_per_s": median(
                lambda run: num_tokens / run["prefill"]["seconds"]
            ),
            "k_chosen": stats["steps_by_num_draft_tokens"],
            "mean_accepted_draft_tokens": stats["total"]["mean_accepted_draft_tokens"],
            "speed_of_light_with_arithmetic": median(
                lambda run: run["speed_of_light_with_arithmetic"]
            ),
        }


if __name__ == "__main__":
    experiment.run(Throughput)
