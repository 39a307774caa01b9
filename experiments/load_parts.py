"""Loads of `experiments.throughput` for experiments that compare ways to run them."""

from __future__ import annotations

import dataclasses
import gc

from experiments import models
from experiments.loads import LOADS
from experiments.options import Options, option
from experiments.throughput import ThroughputConfig, make_prompts, run_mode


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadParts(Options):
    """Some loads of one model, each whole or a stated part of it."""

    loads: tuple[str, ...] = option(
        ("qwen3_8b_24x12288x1024", "qwen3_8b_64x512x4096", "qwen3_8b_128x512x2048"),
        "Loads of experiments.throughput, of one model.",
        choices=sorted(LOADS),
    )
    repeats: int = option(1, "Runs of each, in turn.", at_least=1)
    max_requests: int = option(0, "Requests of a load at most; 0: all.", at_least=0)
    max_tokens: int = option(0, "New tokens of a load at most; 0: all.", at_least=0)
    prompt_length: int = option(0, "Of every prompt; 0: the load's.", at_least=0)
    model: str = option("")  # none: the load's
    dtype: str = option("bfloat16", "Type.", choices=models.DTYPES)


def loads_of(config: LoadParts) -> dict[str, ThroughputConfig]:
    """Each load as far as it runs, by name.

    Raises:
        ValueError: they are not of one model.
    """
    found = {name: _part(config, name) for name in config.loads}
    if len(names := {load.model for load in found.values()}) > 1:
        raise ValueError(f"loads must be of one model, got {sorted(names)}")
    return found


def model_of(config: LoadParts, loads):
    """The Model of `loads_of`, with random weights."""
    return models.random_model(next(iter(loads.values())).model, config.dtype)


def measure(load, model, speculation, *, make=None) -> dict:
    """Rates of one run of a load, and what the load is.

    make: a kind of Engine; None: the usual one.
    """
    prompts = make_prompts(load, model)
    balance = 1.0  # tokens: only the share of a bound needs the right one
    found = run_mode(load, model, prompts, speculation, None, balance, make=make)
    gc.collect()  # the pool must go before the next one comes
    names = "tokens_per_s", "set_up_s", "prefill", "decode", "tail", "kv_gib"
    return {name: found[name] for name in names} | {
        "speed_of_light": found["stats"]["speed_of_light"],
        "num_requests": load.num_requests,
        "prompt_length": load.prompt_length,
        "new_tokens": load.new_tokens,
        "forced_acceptance": load.forced_acceptance,
    }


def _part(config, name):
    load = LOADS[name]
    most = {
        "num_requests": config.max_requests,
        "num_slots": config.max_requests,
        "new_tokens": config.max_tokens,
    }
    changes = {k: min(v, getattr(load, k)) for k, v in most.items() if v}
    if config.prompt_length:
        changes["prompt_length"] = config.prompt_length
    changes["model"] = config.model or load.model
    load = dataclasses.asdict(load) | changes | {"dtype": config.dtype}
    return ThroughputConfig(load=name, trace_steps=0, **load)
