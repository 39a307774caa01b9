"""Engines for steps on made-up caches, and traces of such steps."""

from __future__ import annotations

import dataclasses
import tempfile

from experiments import time_split
from pallas_kernels import device_trace
from sparsespec_jax import Engine, calibrate


def options(load, choices: list[int], longest: int):
    """(SpeculationConfig, EngineConfig) of the load's sizes, for every k of `choices`.

    longest: tokens that every slot may be made to hold.
    """
    speculation = dataclasses.replace(
        load.speculation(),
        num_draft_tokens=max(choices),
        draft_token_choices=tuple(choices),
        acceptor="shared_noise",  # what is accepted costs the same
        forced_acceptance=None,
    )
    longest += calibrate.room_for(max(choices))
    return speculation, dataclasses.replace(load.engine(1, None), max_length=longest)


def make_engine(model, load, choices: list[int], longest: int) -> Engine:
    """An engine of these `options`."""
    speculation, config = options(load, choices, longest)
    return Engine(model, speculation=speculation, engine=config)


def trace_steps(engine, k: int, length: int, num_steps: int) -> dict:
    """The time split of `num_steps` steps of k drafts, and their largest kernels."""
    plans = calibrate.made_up_cycle(engine, k, length)
    with tempfile.TemporaryDirectory() as directory:
        with device_trace.trace(directory):
            for step in range(num_steps):
                outcome = engine.run_plan(plans[step % len(plans)])
            outcome.block_until_ready()
        plan_size = plans[0].buffer.size
        return time_split.split_of_steps(directory, plan_size, num_steps, 20)
