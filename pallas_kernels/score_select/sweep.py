"""Tries configurations of scoring by an index and selection on a GPU.

    python -m pallas_kernels.score_select.sweep --output FILE --commit C

Each case is timed as the benchmark does it, with every number of warpgroups of a CTA
and of tiles at a time; the first configuration is the one that is used.
"""

import argparse
import functools
import itertools
import json

import jax
import jax.numpy as jnp

from pallas_kernels import timing
from pallas_kernels.cases import by_name
from pallas_kernels.matmul.sweep import environment
from pallas_kernels.score_select.bench import (
    INDEXES,
    make_codes,
    make_table,
    num_bytes_read,
)
from pallas_kernels.score_select.cases import SCORE_CASES
from pallas_kernels.score_select.gpu import ScoreConfig, score_select_gpu

_NAMES = ("score_456_2k", "score_344_15k", "score_1_5b_8k", "score_344_15k_2_bits")


def candidates() -> list[ScoreConfig]:
    """Returns the default and all others."""
    default = ScoreConfig()
    tried = [
        ScoreConfig(num_warpgroups=num, at_once=at_once)
        for num, at_once in itertools.product((1, 2, 4), (1, 2, 3, 4))
    ]
    return [default, *(config for config in tried if config != default)]


def run(options: argparse.Namespace) -> None:
    """Prints one line for each configuration, and writes the report after each."""
    timing.check_serial()
    rates = timing.measure_rates()
    report = dict(
        environment=environment(options.commit, "pallas_kernels.score_select.sweep"),
        rates=rates._asdict(),
        rows=[],
    )
    for name in options.cases:
        case = by_name(SCORE_CASES, name)
        keys = jax.random.split(jax.random.key(0), options.layers + INDEXES)
        indexes = [make_codes(case, key) for key in keys[:INDEXES]]
        q = case.shapes[0]
        layers = [
            (jax.random.normal(key, q.shape, q.dtype), indexes[i % INDEXES])
            for i, key in enumerate(keys[INDEXES:])
        ]
        numbers = (case.lengths, case.budgets)
        shared = make_table(case), *(jnp.asarray(x, jnp.int32) for x in numbers)
        for config in candidates():
            timing.drop_programs()
            select = functools.partial(
                score_select_gpu,
                **case.options,
                scale=case.head_size**-0.5,
                config=config,
            )
            us = timing.time_us(select, layers, shared)
            fraction = num_bytes_read(case) / us * 1e6 / rates.read
            row = dict(case=name, config=str(config), us=us, fraction_of_read=fraction)
            report["rows"].append(row)
            print(f"{name} {config}: {us:.1f} us, {fraction:.2f}", flush=True)
            with open(options.output, "w") as file:
                json.dump(report, file, indent=1)
                file.write("\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    names = [case.name for case in SCORE_CASES if "h100" in case.tags]
    parser.add_argument("--cases", nargs="*", choices=names, default=list(_NAMES))
    parser.add_argument("--layers", type=int, default=16, help="of a program")
    parser.add_argument("--commit", default="unknown", help="recorded in the file")
    parser.add_argument("--output", required=True, help="JSON file to write")
    run(parser.parse_args())


if __name__ == "__main__":
    main()
