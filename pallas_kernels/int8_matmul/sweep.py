"""Tries tilings of the product with a weight in 8 bits on a GPU: errors and times.

    python -m pallas_kernels.int8_matmul.sweep --commit COMMIT \\
        --output experiments/results/int8_matmul_h200.json

For each weight and number of rows, the chosen tiling and all that fill most of the
device make the product, beside XLA's of 8-bit and of 16-bit weights. Programs of
several layers, each with a weight of its own, run behind each other for a while; the
median over repeats is divided by programs and layers. Bytes are those of values,
scales, rows and result, once; their rate is compared with that of a large read. Errors
are against a float32 product of the same numbers, of parts when they are summed.
"""

import argparse
import concurrent.futures
import functools
import itertools
import json
import time
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import timing
from pallas_kernels.int8_matmul.bench import make_inputs
from pallas_kernels.int8_matmul.cases import Int8Case
from pallas_kernels.int8_matmul.gpu import int8_matmul_gpu, pack_gpu
from pallas_kernels.int8_matmul.reference import int8_matmul_reference
from pallas_kernels.int8_matmul.tiling import (
    BLOCK,
    MOST_ROWS,
    PARTS,
    Tiling,
    choose_tiling,
    is_worth_cutting,
)
from pallas_kernels.matmul.cases import LAYERS
from pallas_kernels.matmul.sweep import environment, time_us

PRODUCTS = LAYERS | {
    "qwen3_8b": LAYERS["qwen3_8b"] | {"lm_head": (4096, 151936)},
}
_BYTES = 300e6  # of the weights of a program: several times an L2
_MOST_LAYERS = 24
_LEAST_FILL = 0.8  # of what the chosen tiling fills
_MOST_GROUPS = 4  # of a multiprocessor
_TURNS = (1, 2, 4)
_WHOLE = ("gate_up", "lm_head")  # nothing behind them sums parts


def candidates(product: str, num_rows: int, weight: tuple[int, int]) -> list[Tiling]:
    """Returns the chosen tiling, and all others that are worth a try."""
    parts = 1 if product in _WHOLE else None
    chosen = choose_tiling(num_rows, *weight, parts)
    tried = [chosen]
    for groups, ctas, count, turn in itertools.product(
        range(1, 5), range(1, 4), PARTS if parts is None else (1,), _TURNS
    ):
        tiling = Tiling(groups=groups, parts=count, ctas=ctas, turn=turn)
        if (
            tiling != chosen
            and groups * ctas <= _MOST_GROUPS
            and (ctas == 1 or tiling.resident(num_rows) >= ctas)
            and is_worth_cutting(count, num_rows, weight[0])
            and turn <= weight[0] // BLOCK[1] // count
            and tiling.why_not(num_rows, *weight) is None
            and tiling.fill(weight[1]) >= _LEAST_FILL * chosen.fill(weight[1])
        ):
            tried.append(tiling)
    return tried


def ways(product: str, num_rows: int, weight: tuple[int, int], turns) -> dict[str, Any]:
    """Returns (form of weights, function of rows and a layer, parts) by names."""
    found = {}
    tried = candidates(product, num_rows, weight)
    for tiling in tried[:1] + [t for t in tried[1:] if t.turn in turns]:
        parts = None if product in _WHOLE else tiling.parts
        make = functools.partial(int8_matmul_gpu, parts=parts, tiling=tiling)
        found[str(tiling)] = "packed", make, parts
    found["xla"] = "plain", int8_matmul_reference, None
    found["xla of bfloat16"] = "wide", lambda x, kernel: jnp.dot(x, kernel), None
    return found


def layers_of(case: Int8Case) -> tuple[jax.Array, dict[str, list]]:
    """Returns rows, and the layers of a program in each form of their weights."""
    size = case.weight[0] * case.weight[1]
    count = min(_MOST_LAYERS, max(2, round(_BYTES / size)))
    x, weights = make_inputs(case, count)
    packed = [jax.jit(pack_gpu)(weight) for weight in weights]
    wide = [((w.values * 0.01).astype(jnp.bfloat16).T,) for w in weights[::2]]
    return x, {"plain": weights, "packed": packed, "wide": wide}


def measure(case: Int8Case, product: str, options, read_rate: float, pool) -> dict:
    """Returns the row of the report of one weight and number of rows."""
    x, layers = layers_of(case)
    tried = ways(product, case.num_tokens, case.weight, options.turns)

    def compiled(form, make):
        def program(x, layers):
            return [make(x, *layer) for layer in layers]

        return jax.jit(program).lower(x, layers[form]).compile()

    programs = {n: pool.submit(compiled, *way[:2]) for n, way in tried.items()}
    concurrent.futures.wait(programs.values())  # XLA tries products out on the device
    first = layers["plain"][0]
    exact = _exact(x, *first)
    row = dict(rows=case.num_tokens, inputs=case.weight[0], outputs=case.weight[1])
    row |= dict(chosen=next(iter(tried)), ways={})
    for name, (form, _, parts) in tried.items():
        try:
            program = programs[name].result()
            us = time_us(program, x, layers[form]) / len(layers[form])
            made = program(x, layers[form])[0]
        except Exception as error:  # one way of many
            text = f"{type(error).__name__}: {str(error)[:300]}"
            row["ways"][name] = dict(error=text)
            continue
        way = _case_of(case, parts)
        moved = way.num_bytes + (case.weight[0] * case.weight[1]) * (form == "wide")
        fraction = moved / us * 1e6 / read_rate
        row["ways"][name] = dict(us=us, bytes=moved, fraction_of_read=fraction)
        if form != "wide":
            whole = made if parts is None else made.sum(axis=0)
            difference = timing.relative_error(whole, exact)
            row["ways"][name]["difference"] = difference
    return row


@jax.jit
def _exact(x, values, scale):
    wide = values.astype(jnp.float32) * scale[:, None]
    return jnp.dot(x.astype(jnp.float32), wide.T, precision="highest")


def _case_of(case, parts):
    return Int8Case(
        name=case.name, num_tokens=case.num_tokens, weight=case.weight, parts=parts
    )


def check(options: argparse.Namespace) -> None:
    """Raises ValueError if nothing can be timed like this."""
    timing.check_serial()
    if not options.rows or not all(1 <= n <= MOST_ROWS for n in options.rows):
        raise ValueError(f"rows are {options.rows}: name numbers in 1..{MOST_ROWS}")
    known = {product for model in options.models for product in PRODUCTS[model]}
    if not known.issuperset(options.products) or not known:
        raise ValueError(
            f"products are {options.products}: choose from {', '.join(sorted(known))}"
        )


def run(options: argparse.Namespace) -> None:
    """Prints one line for each weight and number of rows, and writes the report."""
    rates = timing.measure_rates()
    report = dict(
        environment=environment(options.commit, "pallas_kernels.int8_matmul.sweep"),
        flags=vars(options),
        method=" ".join(__doc__.split("\n\n")[2].split()),
        rates=rates._asdict(),
        rows=[],
    )
    start = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(options.threads) as pool:
        for model, num_rows in itertools.product(options.models, options.rows):
            for product, weight in PRODUCTS[model].items():
                if options.products and product not in options.products:
                    continue
                case = Int8Case(name=product, num_tokens=num_rows, weight=weight)
                row = measure(case, product, options, rates.read, pool)
                report["rows"].append(dict(model=model, product=product) | row)
                _print(time.monotonic() - start, report["rows"][-1])
                with open(options.output, "w") as file:
                    json.dump(report, file, indent=1)
                    file.write("\n")


def _print(seconds: float, row: dict) -> None:
    """Prints a row of the report, short: the best three ways and the chosen one."""
    timed = {n: way for n, way in row["ways"].items() if "us" in way}
    best = sorted(timed, key=lambda name: timed[name]["us"])[:3]
    shown = dict.fromkeys([*best, row["chosen"], "xla", "xla of bfloat16"])
    text = ", ".join(
        f"{name} {timed[name]['us']:.1f} us {timed[name]['fraction_of_read']:.2f}"
        for name in shown
        if name in timed
    )
    failed = len(row["ways"]) - len(timed)
    print(
        f"{seconds:4.0f} {row['model']} {row['product']} {row['rows']}: {text}; "
        f"{failed} failed",
        flush=True,
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--models", nargs="*", choices=PRODUCTS, default=["qwen3_8b"], help="shapes"
    )
    parser.add_argument("--products", nargs="*", default=[], help="default: all")
    parser.add_argument("--rows", nargs="*", type=int, default=[24, 64, 128])
    turns = list(_TURNS)
    parser.add_argument("--turns", nargs="*", type=int, choices=turns, default=turns)
    parser.add_argument("--threads", type=int, default=12, help="that compile")
    parser.add_argument("--commit", default="unknown", help="recorded in the file")
    parser.add_argument("--output", required=True, help="JSON file to write")
    options = parser.parse_args()
    try:
        check(options)
    except ValueError as error:
        parser.error(str(error))
    run(options)


if __name__ == "__main__":
    main()
