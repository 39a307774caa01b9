"""Times the kernels on this device against its read and copy rates, and rivals.

    python -m pallas_kernels.bench --output experiments/results/kernels_h100.json

One compiled program runs the same call for the layers of a step: queries, scores,
pools or tables differ from layer to layer, lengths do not. Programs run behind each
other for a while; the time is divided by programs and layers, and the median over
repeats is reported; of `rotate` and `norm` on a GPU, what the profiler says of their
kernels. Programs of earlier cases are dropped before. Inputs exceed the L2 cache.
Errors are against the float32 references, with needles and NaN in every unused row.
"""

import argparse
import json
import time

import jax
import numpy as np

from pallas_kernels import timing
from pallas_kernels.add_norm import bench as norm
from pallas_kernels.code_keys import bench as coding
from pallas_kernels.common import default_impl
from pallas_kernels.gather_kv import bench as gather
from pallas_kernels.int8_matmul import bench as int8_product
from pallas_kernels.matmul import bench as product
from pallas_kernels.paged_attention import bench as attention
from pallas_kernels.paged_attention import bench_pieces as pieces
from pallas_kernels.rotate_heads import bench as rotate
from pallas_kernels.score_select import bench as scoring
from pallas_kernels.select_tokens import bench as selection
from pallas_kernels.write_rows import bench as write

_LAYERS = 32  # of one program, as models have; half as many selections

# Each has the `CASES` that it times, and `bench`, which times one of them.
OPERATIONS = (
    attention, pieces, selection, scoring, gather, write, rotate, norm, product,
    int8_product, coding,
)  # fmt: skip
CASES = {
    case.name: (operation, case) for operation in OPERATIONS for case in operation.CASES
}


def run(
    names: list[str],
    impl: str,
    commit: str,
    output: str | None,
    layers: int = _LAYERS,
) -> None:
    """Prints one line per case, and writes the report so far after each.

    Raises:
      ValueError: XLA_FLAGS let calls of a program run side by side.
    """
    timing.check_serial()
    rates = timing.measure_rates()
    report = dict(
        device=jax.devices()[0].device_kind,
        commit=commit,
        impl=impl,
        versions=dict(jax=jax.__version__, numpy=np.__version__),
        date=time.strftime("%Y-%m-%d"),
        method=__doc__.split("\n\n")[2].replace("\n", " "),
        layers=layers,
        seconds_of_a_repeat=timing.SECONDS,
        read_tb_per_s=rates.read / 1e12,
        copy_tb_per_s=rates.copy / 1e12,
        cases={},
    )
    print(f"read {rates.read / 1e12:.3f} TB/s, copy {rates.copy / 1e12:.3f} TB/s")
    for name in names:
        timing.drop_programs()
        operation, case = CASES[name]
        result = operation.bench(case, impl=impl, rates=rates, num_layers=layers)
        report["cases"][name] = result
        values = (f"{k} {_short(v)}" for k, v in result.items())
        print(f"{name:17s}", ", ".join(values), flush=True)
        _compare(report["cases"])
        if output:
            with open(output, "w") as file:
                json.dump(report, file, indent=1)
                file.write("\n")


def _short(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _compare(cases: dict) -> None:
    """Adds ratios between cases to their results."""
    for name, result in cases.items():
        plain = cases.get(name.rsplit("_", 1)[0])
        if "mass_error" in result and plain:
            result["ratio_to_plain"] = result["us"] / plain["us"]
        free, _, piece = name.rpartition("_p")
        if piece.isdigit() and free in cases:
            result["ratio_to_free"] = result["us"] / cases[free]["us"]
    if {"mixed", "verify_8k", "draft_410"} <= cases.keys():
        parts = cases["verify_8k"]["us"] + cases["draft_410"]["us"]
        cases["mixed"]["ratio_to_sum"] = cases["mixed"]["us"] / parts


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--impl", default=None, help="default: of this platform")
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--output", help="JSON file to write")
    parser.add_argument("--commit", default="unknown", help="recorded in the file")
    parser.add_argument("--layers", type=int, default=_LAYERS, help="of a program")
    options = parser.parse_args()
    impl = options.impl or default_impl()
    run(options.cases, impl, options.commit, options.output, options.layers)


if __name__ == "__main__":
    main()
