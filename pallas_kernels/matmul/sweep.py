"""Tries configurations of the product on a GPU: bits, errors and times, beside XLA's.

    python -m pallas_kernels.matmul.sweep --output experiments/results/matmul_h200.json

For each weight and number of rows, the chosen configuration makes the product, and with
`--tries` others do, which must give the same bits. Its first rows are compared between
all numbers of rows, and all rows with the same rows elsewhere in the call. Programs of
several layers, each with a weight of its own, run behind each other for a while, XLA's
bfloat16 product among them; the median over repeats is divided by programs and layers.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.matmul.cases import LAYERS
from pallas_kernels.matmul.gpu import matmul_gpu
from pallas_kernels.matmul.gpu_schedule import MatmulConfig, choose_config

_CONFIGS = {
    "256": MatmulConfig(),
    "192": MatmulConfig(tile_columns=192),
    "128": MatmulConfig(tile_columns=128, num_stages=6),
    "256 alone": MatmulConfig(cluster=1),
    "256 by columns": MatmulConfig(by_rows=False),
    "tall": MatmulConfig(tile_rows=256, tile_columns=128),
    "256 of 3 stages": MatmulConfig(num_stages=3),
    "256 deep": MatmulConfig(depth=128, num_stages=2),
    "256 in bands of 8": MatmulConfig(band=8),
    "256 in bands of 32": MatmulConfig(band=32),
    "192 alone": MatmulConfig(tile_columns=192, cluster=1),
    "tall alone": MatmulConfig(tile_rows=256, tile_columns=128, cluster=1),
}
_FEW = tuple(_CONFIGS)[:3]
_SEEN = 64  # first rows, compared between numbers of rows
_MOVED = 2072  # rows that are compared with themselves elsewhere
_LAYERS = {"qwen3_8b": 4, "qwen2_5_1_5b": 12, "smollm2_135m": 12}
_TRIED = {  # beside the chosen configuration, by numbers of rows
    "qwen3_8b": {2048: _FEW, 2072: tuple(_CONFIGS), 2176: _FEW, 4096: _FEW, 8192: _FEW},
    "qwen2_5_1_5b": {2048: _FEW, 2072: _FEW, 8192: _FEW},
    "smollm2_135m": {},
}
_TIMED = 2048  # rows, from which on XLA's product is timed too; not of a small model
_SECONDS, _REPEATS = 0.015, 3
_LIBRARY = {"xla_gpu_enable_triton_gemm": False}  # whose search would take minutes
_UNTUNED = {"xla_gpu_autotune_level": 0}


@dataclasses.dataclass(frozen=True)
class Weight:
    """One weight, and the arrays that its products are made of."""

    model: str
    product: str
    x: jax.Array  # [most rows, in]
    layers: list[jax.Array]  # [in, out] each
    exact: jax.Array  # float32 [most rows, out], of the first layer
    wide: jax.Array  # XLA's product, rounded

    @property
    def shape(self) -> tuple[int, int]:
        """Inputs and outputs."""
        return self.layers[0].shape


def _exact(x, w):
    """Returns the product, all of it in float32."""
    x, w = (a.astype(jnp.float32) for a in (x, w))
    return jnp.dot(x, w, precision="highest")


def _wide(x, w):
    """Returns the sums of bfloat16 products, float32."""
    return jnp.dot(x, w, preferred_element_type=jnp.float32)


def make_weight(model: str, product: str, most_rows: int) -> Weight:
    """Returns random numbers in the sizes of a product."""
    shape = LAYERS[model][product]
    *keys, key = jax.random.split(jax.random.key(0), _LAYERS[model] + 1)
    draw = jax.jit(jax.random.normal, static_argnums=(1, 2))
    x = draw(key, (most_rows, shape[0]), jnp.bfloat16)
    layers = [draw(k, shape, jnp.bfloat16) * shape[0] ** -0.5 for k in keys]
    exact, wide = (
        jax.jit(fn, compiler_options=_UNTUNED)(x, layers[0]) for fn in (_exact, _wide)
    )
    return Weight(model, product, x, layers, exact, wide.astype(jnp.bfloat16))


def _chosen(weight: Weight, num_rows: int) -> str:
    """Returns the name of the chosen configuration."""
    config = choose_config(num_rows, weight.shape[1], weight.shape[0])
    return next(name for name, other in _CONFIGS.items() if other == config)


def programs_of(weight: Weight, num_rows: int, tries: Sequence[str], pool) -> dict:
    """Returns compiled programs, to come, by configuration; XLA's where it is timed."""
    others = [n for n in _TRIED[weight.model].get(num_rows, ()) if n in tries]
    fns = {
        name: functools.partial(matmul_gpu, config=_CONFIGS[name])
        for name in dict.fromkeys((_chosen(weight, num_rows), *others))
    }
    is_timed = _TRIED[weight.model] and num_rows >= _TIMED
    fns |= {"xla": jnp.dot} if is_timed else {}
    x = jax.ShapeDtypeStruct((num_rows, weight.x.shape[1]), jnp.bfloat16)

    def compiled(fn, name):
        options = _LIBRARY if name == "xla" else None

        def program(x, layers):
            return [fn(x, w) for w in layers]

        return jax.jit(program).lower(x, weight.layers).compile(options)

    return {name: pool.submit(compiled, fn, name) for name, fn in fns.items()}


def time_us(program, *args) -> float:
    """Returns the median time of a program, of several that run behind each other."""

    def seconds(count):
        start = time.perf_counter()
        for _ in range(count):
            result = program(*args)
        jax.block_until_ready(result)
        return (time.perf_counter() - start) / count

    seconds(1)
    count = max(2, int(_SECONDS / seconds(2)))
    return float(np.median([seconds(count) for _ in range(_REPEATS)])) * 1e6


def _differing(one, other):
    """Returns how many numbers differ in a bit."""
    bits = (jax.lax.bitcast_convert_type(a, jnp.uint16) for a in (one, other))
    return jnp.sum(jnp.not_equal(*bits))


@jax.jit
def _compare(made: dict, chosen, exact, wide, first):
    """Returns the figures of one row of the report that are about numbers."""
    exact, wide = exact[: len(chosen)], wide[: len(chosen)]
    got = chosen.astype(jnp.float32)
    # Of the last place: 8 bits of a number, with the implied one.
    unit = jnp.exp2(jnp.floor(jnp.log2(jnp.abs(exact))) - 7)
    return dict(
        error=jnp.linalg.norm(got - exact) / jnp.linalg.norm(exact),
        largest_error=jnp.max(jnp.abs(got - exact)),
        largest_number=jnp.max(jnp.abs(exact)),
        beyond_one_unit=jnp.sum(jnp.abs(got - exact) > jnp.maximum(unit, 2.0**-9)),
        differing_from_rounded_float32_of_xla=_differing(chosen, wide),
        first_rows_differing=_differing(chosen[:_SEEN], first),
        differing={name: _differing(chosen, other) for name, other in made.items()},
    )


def measure(weight: Weight, num_rows: int, programs: dict, first) -> tuple[dict, Any]:
    """Returns the row of the report for some rows, and the first of them."""
    x, name = weight.x[:num_rows], _chosen(weight, num_rows)
    programs = {name: future.result() for name, future in programs.items()}
    made = {n: p(x, weight.layers)[0] for n, p in programs.items() if n != "xla"}
    chosen = made.pop(name)
    first = chosen[:_SEEN] if first is None else first
    numbers = _compare(made, chosen, weight.exact, weight.wide, first)
    if num_rows == _MOVED:
        moved = programs[name](jnp.roll(x, 1000, axis=0), weight.layers)[0]
        moved = jnp.roll(moved, -1000, axis=0)
        numbers["moved_rows_differing"] = _differing(chosen, moved)
    del made
    inputs, outputs = weight.shape
    row = dict(model=weight.model, product=weight.product, rows=num_rows)
    row |= dict(inputs=inputs, outputs=outputs, chosen=name, numbers=chosen.size)
    row |= jax.tree.map(lambda x: x.item(), numbers)
    operations = 2 * num_rows * inputs * outputs * len(weight.layers)
    row["tflop_per_s"] = {
        name: round(operations / time_us(program, x, weight.layers) / 1e6, 1)
        for name, program in programs.items()
    }
    return row, first


def environment(commit: str, module: str) -> dict:
    """Returns where and with what a module runs."""
    command = [f"python -m {module}", *map(shlex.quote, sys.argv[1:])]
    return dict(
        time_utc=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        command=" ".join(command),
        python=platform.python_version(),
        platform=platform.platform(),
        num_cores=os.cpu_count(),
        backend=jax.default_backend(),
        devices=[device.device_kind for device in jax.devices()],
        packages=dict(jax=jax.__version__, numpy=np.__version__),
        commit=commit,
        dirty=None,
    )


def run(options: argparse.Namespace) -> None:
    """Prints one line for each weight and number of rows, and writes the report."""
    start, most = time.monotonic(), max(options.rows)
    report = dict(
        environment=environment(options.commit, "pallas_kernels.matmul.sweep"),
        flags=vars(options),
        method=" ".join(__doc__.split("\n\n")[2].split()),
        configs={name: str(config) for name, config in _CONFIGS.items()},
        rows=[],
    )
    names = [(m, p) for m in options.models for p in LAYERS[m]]
    jobs = []
    with concurrent.futures.ThreadPoolExecutor(options.threads) as pool:
        for name in names:
            weight = make_weight(*name, most)
            tries = {n: options.tries for n in options.tried_rows or options.rows}
            of_rows = [
                programs_of(weight, n, tries.get(n, ()), pool) for n in options.rows
            ]
            jobs.append((weight, of_rows))
    print(f"{time.monotonic() - start:4.0f} all programs are there", flush=True)
    for weight, of_rows in jobs:
        first = None
        for num_rows, programs in zip(options.rows, of_rows, strict=True):
            row, first = measure(weight, num_rows, programs, first)
            report["rows"].append(row)
            _print(time.monotonic() - start, row)
        with open(options.output, "w") as file:
            json.dump(report, file, indent=1)
            file.write("\n")


def _print(seconds: float, row: dict) -> None:
    """Prints a row of the report, short."""
    bits = [v for k, v in row.items() if k.endswith("rows_differing")]
    rates = " ".join(f"{k} {v:.0f}," for k, v in row["tflop_per_s"].items())
    print(
        f"{seconds:4.0f} {row['model'][:8]} {row['product']} {row['rows']}: {rates}",
        f"bits {max([*bits, *row['differing'].values()])}, of XLA",
        f"{row['differing_from_rounded_float32_of_xla'] / row['numbers']:.2e}",
        f"error {row['error']:.2e} beyond {row['beyond_one_unit']}",
        flush=True,
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", nargs="*", choices=LAYERS, default=list(LAYERS))
    rows = [128, 600, 2048, 2072, 2176, 4096, 8192]
    parser.add_argument("--rows", nargs="*", type=int, default=rows)
    parser.add_argument("--tries", nargs="*", choices=_CONFIGS, default=[])
    parser.add_argument("--tried_rows", nargs="*", type=int, help="default: all")
    parser.add_argument("--threads", type=int, default=12, help="that compile")
    parser.add_argument("--commit", default="unknown", help="recorded in the file")
    parser.add_argument("--output", required=True, help="JSON file to write")
    run(parser.parse_args())


if __name__ == "__main__":
    main()
