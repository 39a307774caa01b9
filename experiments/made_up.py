"""Engines for steps on made-up caches, their traces, and what their times say."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from experiments import signals, time_split
from experiments.models import SHAPES
from pallas_kernels import device_trace
from pallas_kernels.common import default_impl
from sparsespec_jax import Engine, sizes
from sparsespec_jax.device.state import pool_bytes_per_page
from sparsespec_jax.host.cost_model import CostModel
from sparsespec_jax.tuning import calibrate


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


def fill_pages(engine, seed=0):
    """Put made-up values in place of all pages: attention over zeros is no load."""
    steps = engine.device_steps
    steps.settle()
    layers = tuple(
        layer._replace(kv_pages=_noise(layer.kv_pages, jnp.uint32(seed + i)))
        for i, layer in enumerate(steps.state.layers)
    )
    steps.replace_state(layers=layers)


@functools.partial(jax.jit, donate_argnums=0, keep_unused=True)
def _noise(pages, seed):
    """Values like those of normed heads, about 1 large, as cheap as they can be."""
    number = jax.lax.iota(jnp.uint32, pages.shape[-1]) * jnp.uint32(0x9E3779B1)
    for axis, size in enumerate(pages.shape[:-1]):
        place = jax.lax.iota(jnp.uint32, size) * jnp.uint32(0x85EBCA6B + 2 * axis)
        place = place.reshape(-1, *[1] * (pages.ndim - 1 - axis))
        number = (number ^ (place + seed)) * jnp.uint32(0x7FEB352D)
        number = number ^ (number >> 15)
    uniform = (number >> 8).astype(jnp.float32) * 2.0**-24
    return ((uniform - 0.5) * 12**0.5).astype(pages.dtype)


def fits(load, choices, length, most_bytes) -> bool:
    """Whether a pool of so many bytes holds `length` tokens in every slot."""
    model = SHAPES[load.model]
    speculation, config = options(load, choices, length)
    if config.max_length > model.max_length:
        return False
    shape = sizes.make_shape(speculation, config, config.max_length, default_impl())
    per_page = pool_bytes_per_page(model, load.page_size, load.dtype)
    return shape.num_pages * per_page <= most_bytes


def speedup_rows(slots: int, lengths, steps, acceptance) -> list[dict]:
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


def trace_steps(engine, k: int, length: int, num_steps: int) -> dict:
    """The time split of `num_steps` steps of k drafts, and their largest kernels."""
    plans = calibrate.made_up_cycle(engine, k, length)
    with signals.temporary_directory() as directory:
        with device_trace.trace(directory):
            for step in range(num_steps):
                outcome = calibrate.run_plan(engine, plans[step % len(plans)])
            outcome.block_until_ready()
        plan_size = plans[0].buffer.size
        return time_split.split_of_steps(directory, plan_size, num_steps, 20)
