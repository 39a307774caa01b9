"""Aligned cycles against mixed steps: what all slots in phase would take, on one GPU.

    python -m experiments.aligned_probe --model qwen3-8b --loads 64x2560,24x28700 \\
        --output F.json

In a mixed step some slots draft and some verify, so a cycle reads all weights k + 1
times. In an aligned cycle every slot drafts k times, then every slot verifies, and
drafts may read 8-bit weights. For each load (slots x tokens in each) this times, on the
same made-up caches: plain and mixed steps; a step in which all slots draft, by the
model's weights and by 8-bit ones; one in which all verify; whole aligned cycles, step
by step and as one program; and the dense part of a draft step alone. Speed-ups assume
6.16 of 8 drafts accepted. `--product_rows 24,64` times single products as well, by XLA
and by kernels. Weights are random.
"""

from __future__ import annotations

import dataclasses
import gc
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from experiments import aligned_steps, launch, made_up, product_times, record
from experiments import time_split as splits
from experiments.loads import LOADS
from experiments.models import random_model
from pallas_kernels import device_trace, timing
from pallas_kernels.common import default_impl
from sparsespec_jax import Model, sizes
from sparsespec_jax.models import transformer as model
from sparsespec_jax.models.config import PRESETS
from sparsespec_jax.plan.shape import budget_tokens
from sparsespec_jax.tuning import calibrate

_MODEL = flags.DEFINE_enum("model", "qwen3-8b", sorted(PRESETS), "Shapes.")
_LAYERS = flags.DEFINE_integer("num_layers", None, "Fewer layers.", lower_bound=1)
_LOADS = flags.DEFINE_list("loads", ["64x2560", "24x28700"], "Slots x context.")
_K = flags.DEFINE_list("k", ["4", "8"], "Numbers of drafts.")
_PRODUCT_ROWS = flags.DEFINE_list("product_rows", [], "Rows of single products.")
_KINDS = flags.DEFINE_multi_enum(
    "kind", product_times.KINDS, product_times.KINDS, "Ways of single products."
)
_COMMIT = flags.DEFINE_string("commit", None, "Commit to record if git cannot say.")
_OUTPUT = flags.DEFINE_string("output", None, "Results file.", required=True)

_ACCEPTANCE = 0.941  # of a draft given those before it: 6.16 of 8
_ROUNDS = 3
_CYCLES = 3  # of a round


def options_from_flags():
    """(loads as (slots, context), numbers of drafts, rows of single products)."""
    try:
        loads = [tuple(map(int, load.split("x"))) for load in _LOADS.value]
        choices = sorted({int(k) for k in _K.value})
        rows = [int(n) for n in _PRODUCT_ROWS.value]
    except ValueError:
        raise ValueError("loads, k and product_rows hold whole numbers") from None
    longest = PRESETS[_MODEL.value].max_length
    for load in loads:
        if len(load) != 2 or load[0] < 1 or not 2 <= load[1] < longest:
            raise ValueError(
                f"loads are slots x context, such as 64x2560, below {longest} tokens; "
                f"got {_LOADS.value}"
            )
    if any(not 1 <= k <= 31 for k in choices) or any(n % 8 or n < 8 for n in rows):
        raise ValueError("k lies in 1..31, product_rows are multiples of 8")
    return loads, choices, rows


def accepted_tokens(num_drafts: int) -> float:
    """Tokens that a cycle commits on average."""
    return sum(_ACCEPTANCE**i for i in range(num_drafts + 1))


class Probe:
    """The engine of one load, and what its steps take."""

    def __init__(self, made, quantised, products, slots, context, choices):
        load = dataclasses.replace(
            LOADS["qwen3_8b_64x512x4096"], num_slots=slots, num_requests=slots
        )
        room = (_ROUNDS + 1) * _CYCLES * (max(choices) + 1)  # if all are accepted
        speculation, config = made_up.options(load, [0, *choices], context + room)
        self.engine = aligned_steps.AlignedEngine(
            made,
            speculation=speculation,
            engine=config,
            quantised=quantised,
            products=products,
        )
        made_up.fill_pages(self.engine)
        self.choices, self.context = choices, context
        shape = self.engine.shape
        self.draft = self._plan(aligned_steps.draft_shape(shape))
        self.verify = {
            k: self._plan(aligned_steps.verify_shape(shape, k)) for k in choices
        }
        self.cycle = {
            k: self._plan(aligned_steps.CycleShape(self.draft.shape, plan.shape))
            for k, plan in self.verify.items()
        }

    def _plan(self, shape):
        return aligned_steps.plan_of(self.engine, shape)

    def start(self, weights="bfloat16"):
        """Put every slot at the context, its draft cache filled."""
        self.engine.draft_with(weights)
        calibrate.made_up_cycle(self.engine, max(self.choices), self.context)
        self.run(self.verify[max(self.choices)]).block_until_ready()

    def run(self, plan, num_drafted=None):
        """Dispatch a step, with so many drafts made in this cycle if given."""
        if num_drafted is not None:
            self.engine.set_num_drafted(num_drafted)
        return calibrate.run_plan(self.engine, plan)

    def ms(self, steps, weights="bfloat16") -> dict:
        """Median, least and most milliseconds of `steps`, (plan, num_drafted) pairs.

        With `host`: processor time of the thread that dispatches them.
        """
        self.start(weights)
        times, host = [], []
        for _ in range(_ROUNDS + 1):
            began, busy = time.perf_counter(), time.thread_time()
            for _ in range(_CYCLES):
                for plan, num_drafted in steps:
                    outcome = self.run(plan, num_drafted)
            host.append((time.thread_time() - busy) / _CYCLES * 1e3)
            outcome.block_until_ready()
            times.append((time.perf_counter() - began) / _CYCLES * 1e3)
        times, host = times[1:], host[1:]  # the first compiles
        return {
            "ms": float(np.median(times)),
            "least": min(times),
            "most": max(times),
            "host": float(np.median(host)),
        }

    def trace(self, name, steps, weights="bfloat16", repeats=3) -> dict:
        """Where the device's time of such steps goes; the first repeat is left out."""
        self.start(weights)
        with tempfile.TemporaryDirectory() as directory:
            with device_trace.trace(directory):
                for plan, num_drafted in steps * repeats:
                    outcome = self.run(plan, num_drafted)
                outcome.block_until_ready()
            kernels = device_trace.load_kernels(directory)
        kernels, repeats = splits.after_first_step(kernels, repeats)
        scopes = splits.scopes_of(f"jit_{name}", steps[0][0].buffer.size)
        split = splits.split(kernels, scopes, repeats)
        return split | {"largest": splits.largest(kernels, repeats, 12)}


def measure(probe: Probe, write) -> dict:
    """Times of plain, mixed and aligned steps; `write(row)` after each."""
    row, slots = {"mixed_ms": {}}, probe.engine.shape.num_slots
    for k, points in calibrate.measure(probe.engine, [probe.context]).items():
        row["mixed_ms"][k] = 1e3 * points[0][1]
    write(row)
    drafts = [(probe.draft, 4), (probe.draft, 4)]
    row["verify"] = {k: probe.ms([(p, k)]) for k, p in probe.verify.items()}
    row["verify_rows"] = {k: slots * (k + 1) for k in probe.choices}
    for weights in aligned_steps.DRAFT_WEIGHTS:
        made = {"draft_step_ms": probe.ms(drafts, weights)["ms"] / len(drafts)}
        made["cycle_by_steps"] = {
            k: probe.ms([(probe.draft, None)] * k + [(plan, None)], weights)
            for k, plan in probe.verify.items()
        }
        row[weights] = made
        write(row)
        made["cycle"] = {}
        for k in reversed(probe.choices):
            made["cycle"][k] = probe.ms([(probe.cycle[k], None)], weights)
            write(row)
    return row


def traces(probe: Probe) -> dict:
    """Kernels, gaps and shares of every kind of step at the largest k."""
    k, made = max(probe.choices), {}
    made["mixed"] = made_up.trace_steps(probe.engine, k, probe.context, 2 * (k + 1))
    made["verify_step"] = probe.trace("verify_step", [(probe.verify[k], k)], repeats=4)
    for weights in aligned_steps.DRAFT_WEIGHTS:
        suffix = "_int8" if weights == "int8" else ""
        for name, steps, repeats in (
            ("draft_step", [(probe.draft, 4)], 9),
            ("cycle", [(probe.cycle[k], None)], 3),
        ):
            name += suffix
            made[name] = probe.trace(name, steps, weights, repeats)
    return made


def speedups(row: dict, load: dict, rates: dict) -> dict:
    """Over plain decoding at the assumed acceptance, and what bytes alone allow."""
    plain, made = row["mixed_ms"][0], {}
    weights, cache, share = (
        load["weight_bytes"],
        load["kv_bytes"],
        load["share_drafted"],
    )
    for k in row["verify"]:
        tokens = accepted_tokens(k)
        moved = (k * share + 1 + 2 * share) * cache  # a gather reads and writes
        full, half = (k + 1) * weights, (k / 2 + 1) * weights
        cycles = {
            "mixed": ((k + 1) * row["mixed_ms"][k], full),
            "aligned": (row["bfloat16"]["cycle"][k]["ms"], full),
            "aligned by steps": (row["bfloat16"]["cycle_by_steps"][k]["ms"], full),
            "aligned int8": (row["int8"]["cycle"][k]["ms"], half),
            "aligned int8 by steps": (row["int8"]["cycle_by_steps"][k]["ms"], half),
        }
        made[k] = {
            name: {
                "cycle_ms": ms,
                "speedup": tokens * plain / ms,
                "byte_bound": tokens * (weights + cache) / (read + moved),
                "bytes_ms": (read + moved) / rates["read"] * 1e3,
            }
            for name, (ms, read) in cycles.items()
        }
    return made


def sizes_of(probe: Probe, slots: int) -> dict:
    """Bytes that the steps of a load must read."""
    engine, context = probe.engine, probe.context
    spec = engine.speculation
    budget = budget_tokens(
        context, ratio=spec.budget_ratio, floor=spec.min_budget, cap=context
    )
    return {
        "slots": slots,
        "context": context,
        "weight_bytes": sizes.weight_bytes(engine.model),
        "kv_bytes": slots * context * engine.kv_bytes_per_token,
        "share_drafted": float(budget) / context,
    }


def dense_ms(made: Model, quantised, products, num_tokens: int) -> dict:
    """Milliseconds of all products, norms and rotations of a step, without attention.

    By the model's weights and by 8-bit ones; the vocabulary's product included.
    """
    config, tokens = made.config, jnp.arange(num_tokens, dtype=jnp.int32)
    caches = (None,) * config.num_layers

    def keep_queries(index, q, rows, cache):
        return q, cache

    def full(params, quantised, tokens):
        args = tokens, tokens, keep_queries, caches
        return model.logits(config, params, model.forward(config, params, *args)[0])

    def int8(params, quantised, tokens):
        args = tokens, tokens, keep_queries, caches
        return aligned_steps.int8_forward(
            config, params, quantised, *args, impl=default_impl(), products=products
        )[0]

    times = {"rows": num_tokens}
    scores = {}
    for name, function in (("bfloat16", full), ("int8", int8)):
        us, scores[name] = product_times.median_us(
            function, made.params, quantised, tokens
        )
        times[name] = us * 1e-3
    times["difference"] = timing.relative_error(scores["int8"], scores["bfloat16"])
    return times


def main():
    """Measure every load and write the results file as rows come."""
    try:
        loads, choices, product_rows = options_from_flags()
    except ValueError as error:
        raise app.UsageError(str(error)) from None
    own_flags = flags.FLAGS.get_key_flags_for_module(sys.modules[__name__])
    results = record.results_header(own_flags, commit=_COMMIT.value)
    read, copy = timing.measure_rates()
    results["rates"] = {"read": read, "copy": copy}
    results["rates"]["flops"] = timing.measure_flop_rate(jnp.bfloat16)
    results |= {"acceptance": _ACCEPTANCE, "products": [], "dense": [], "loads": []}

    def write():
        record.write_results(_OUTPUT.value, results)

    for num_tokens in product_rows:
        for row in product_times.sweep(
            PRESETS[_MODEL.value], num_tokens, read, _KINDS.value
        ):
            results["products"].append(row)
            print(row, flush=True)
            write()
    if not loads:
        return
    made = random_model(_MODEL.value, "bfloat16")
    if _LAYERS.value:
        config = dataclasses.replace(made.config, num_layers=_LAYERS.value)
        made = dataclasses.replace(made, config=config)
    is_packed = jax.default_backend() == "gpu"
    quantised = aligned_steps.quantise(made.config, made.params, is_packed=is_packed)
    for slots, context in loads:
        products = product_times.chosen(slots, made.config, results["products"])
        results["dense"].append(dense_ms(made, quantised, products, slots))
        results["dense"][-1]["ways"] = {n: str(way) for n, way in products.items()}
        print(results["dense"][-1], flush=True)
        write()
        probe = Probe(made, quantised, products, slots, context, choices)
        load = sizes_of(probe, slots)
        results["loads"].append(load)

        def keep(row, load=load):
            load |= row
            print({k: v for k, v in row.items()}, flush=True)
            write()

        row = measure(probe, keep)
        load["speedups"] = speedups(row, load, results["rates"])
        print(load["speedups"], flush=True)
        write()
        if jax.default_backend() == "gpu":
            load["traces"] = traces(probe)
            write()
        probe.engine.close()
        del probe
        gc.collect()  # the pool must go before the next one comes


if __name__ == "__main__":
    launch.run(main)
