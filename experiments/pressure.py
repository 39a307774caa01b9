"""One over-subscribed load under a KV policy, measured; for experiments.offload."""

from __future__ import annotations

import functools
import gc
import time

import jax
import jax.numpy as jnp
import numpy as np

from experiments import signals, time_split
from pallas_kernels import device_trace
from sparsespec_jax import Engine, SamplingParams

MODES = ("offload", "offload_without_copies", "recompute", "reserve")
_SERIES = 200  # points kept of a run's history
_TRACED = 40  # steps of a trace


def make_load(vocab_size, *, num_requests, prompt_length, new_tokens):
    """(prompts, SamplingParams), outputs of half to 1.5 times `new_tokens`."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(10, vocab_size - 10, (num_requests, prompt_length)).tolist()
    lengths = rng.integers(new_tokens // 2, new_tokens * 3 // 2 + 1, num_requests)
    laws = [
        SamplingParams(temperature=1.0, seed=i, max_tokens=int(n), ignore_eos=True)
        for i, n in enumerate(lengths)
    ]
    return prompts, laws


def pool_pages(load, *, share, page_size, speculation):
    """Pages that are `share` of what all requests need at their ends."""
    ends = np.array([len(p) + s.max_tokens for p, s in zip(*load, strict=True)])
    draft = np.maximum(speculation.min_budget, speculation.budget_ratio * ends)
    draft = np.minimum(draft, ends)
    k = speculation.num_draft_tokens
    rows = ends + k, draft + 2 * k + 1
    return int(share * sum(np.ceil(r / page_size).sum() for r in rows))


def run_mode(model, load, speculation, config, *, copies=True):
    """Decode the load once; rates, page traffic and a history of the pool's use."""
    start = time.perf_counter()
    engine = _loaded_engine(model, load, speculation, config, copies)
    set_up_s = time.perf_counter() - start
    ends, history, moved = [], [], []
    start = time.perf_counter()
    while engine.has_work:
        engine.step()
        usage = engine.kv_usage
        moved.append((usage["spilled_pages"], usage["restored_pages"]))
        ends.append(time.perf_counter() - start)
        history.append(
            (
                usage["utilisation"],
                usage["num_running"],
                usage["num_waiting"] + usage["num_preempted"],
            )
        )
    history = np.array(history)
    pressed = history[:, 2] > 0  # requests wait for pages
    every = max(1, len(history) // _SERIES)
    page_bytes = config.page_size * engine.kv_bytes_per_token
    usage = engine.kv_usage
    tokens = engine.num_emitted_tokens
    return {
        "set_up_s": set_up_s,
        "seconds": ends[-1],
        "tokens": tokens,
        "steps": engine.num_steps,
        "tokens_per_s": tokens / ends[-1],
        "ms_per_step": 1e3 * ends[-1] / engine.num_steps,
        "mean_running": float(history[:, 1].mean()),
        "mean_utilisation": float(history[:, 0].mean()),
        "mean_utilisation_while_pressed": float(history[pressed, 0].mean())
        if pressed.any()
        else None,
        "spilled_gib": usage["spilled_pages"] * page_bytes / 2**30,
        "restored_gib": usage["restored_pages"] * page_bytes / 2**30,
        "recompute_ratio": usage["recomputed_tokens"] / tokens,
        "preemptions": usage["preemptions"],
        "busiest_step": busiest_step(np.array(moved), _TRACED),
        "history": {
            "seconds": [round(t, 3) for t in ends[::every]],
            "utilisation": history[::every, 0].round(4).tolist(),
            "num_running": history[::every, 1].astype(int).tolist(),
        },
    }


def _loaded_engine(model, load, speculation, config, copies):
    """A compiled engine with all requests of the load."""
    engine = Engine(model, speculation=speculation, engine=config)
    engine.warm_up()
    if not copies:
        engine.device_steps.drop_page_copies()
    for prompt, law in zip(*load, strict=True):
        engine.add_request(prompt, law)
    return engine


def busiest_step(moved: np.ndarray, width: int) -> int:
    """First of the `width` steps that move most pages in the direction that moves less.

    moved: pages spilled and restored before each step, [steps, 2].
    """
    width = max(1, min(width, len(moved) - 1))
    if len(moved) <= width:
        return 0
    return int((moved[width:] - moved[:-width]).min(axis=1).argmax())


def trace_copies(model, load, speculation, config, first_step, num_steps=_TRACED):
    """How much longer the device idles in some steps of the load if pages are copied.

    The same steps are traced with and without their page copies. What the copies add
    to the time in which no kernel runs is not hidden; the rest is, of the time that the
    pages take at the rate of a lone copy.

    Raises:
      ValueError: no page moves in these steps.
    """
    steps = functools.partial(
        _traced_steps, model, load, speculation, config, first_step, num_steps
    )
    kernels, spilled, restored = steps(copies=True)
    gc.collect()  # the pool must go before the next one comes
    if not spilled + restored:
        raise ValueError("no page moved in the traced steps: lower pool_share")
    idle_ms = time_split.idle_ms(kernels)
    without_ms = time_split.idle_ms(steps(copies=False)[0])
    gc.collect()
    page_bytes = config.page_size * model.config.kv_bytes_per_token()
    rates = _host_copy_rates(config.host_chunk_pages * page_bytes)
    to_host, to_device = rates.values()
    copy_ms = 1e-6 * page_bytes * (spilled / to_host + restored / to_device)
    return {
        "first_step": first_step,
        "steps": num_steps,
        "spilled_pages": spilled,
        "restored_pages": restored,
        **rates,
        "copy_ms": copy_ms,
        "idle_ms": idle_ms,
        "idle_ms_without_copies": without_ms,
        "hidden_share": 1 - (idle_ms - without_ms) / copy_ms,
        "recorded_copies": time_split.hidden_copy_share(kernels),
    }


def _traced_steps(model, load, speculation, config, first_step, num_steps, *, copies):
    """Kernels of some steps of the load, and the pages spilled and restored in them."""
    engine = _loaded_engine(model, load, speculation, config, copies)

    def run_until(step):
        while engine.has_work and engine.num_steps < step:
            engine.step()
        usage = engine.kv_usage
        return usage["spilled_pages"], usage["restored_pages"]

    before = run_until(first_step)
    with signals.temporary_directory() as directory:
        with device_trace.trace(directory):
            after = run_until(first_step + num_steps)
            engine.pause()
        kernels = device_trace.load_kernels(directory)
    return kernels, *(b - a for a, b in zip(before, after, strict=True))


def _host_copy_rates(num_bytes, repeats=5):
    """GB/s of one copy of that size to pinned host memory and back, the best."""
    device = jax.devices()[0]
    on_device = jax.sharding.SingleDeviceSharding(device)
    on_host = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")

    def seconds(array, place):
        start = time.perf_counter()
        jax.block_until_ready(jax.device_put(array, place))
        return time.perf_counter() - start

    chunk = jnp.zeros(num_bytes, jnp.uint8)
    chunk_on_host = jax.device_put(chunk, on_host)
    jax.block_until_ready([chunk, chunk_on_host])
    to_host = min(seconds(chunk, on_host) for _ in range(repeats))
    to_device = min(seconds(chunk_on_host, on_device) for _ in range(repeats))
    return {
        "to_host_gb_per_s": num_bytes * 1e-9 / to_host,
        "to_device_gb_per_s": num_bytes * 1e-9 / to_device,
    }


def metrics_of(runs):
    """Median rate of each mode and its ratio to that of `offload`."""
    rates = {
        mode: float(np.median([r["tokens_per_s"] for r in found]))
        for mode, found in runs.items()
        if found
    }
    ratios = {f"offload_over_{m}": rates["offload"] / r for m, r in rates.items()}
    return {"tokens_per_s": rates} | ratios
