"""Do rows of a bfloat16 product depend on how many rows there are? Which cuts do not?

    python -m experiments.row_bits --output experiments/results/row_bits_h200.json

For every product of some models, and several ways to cut it over its long axis, this
compares the float32 results of rows 0 to 7 bit by bit between numbers of rows, and
times the ways at a few of them. XLA chooses a program for each number by trying
several, so another day may choose otherwise.
"""

from __future__ import annotations

import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax import lax

from experiments import launch, record

# in, out, and cuts that are tried; the vocabulary's are cut nowhere.
_MODELS = {
    "qwen3-8b": {
        "qkv": (4096, 6144, (1, 2, 4)),
        "out": (4096, 4096, (1, 2, 4, 8)),
        "gate_up": (4096, 24576, (1,)),
        "down": (12288, 4096, (1, 4, 8)),
        "vocabulary": (4096, 151936, (1,)),
    },
    "qwen2.5-coder-1.5b": {
        "qkv": (1536, 2048, (1, 2, 4)),
        "out": (1536, 1536, (1, 2, 4)),
        "gate_up": (1536, 17920, (1,)),
        "down": (8960, 1536, (1, 2, 5, 7, 10)),
        "tied vocabulary": (1536, 151936, (1,)),
    },
    "qwen2.5-coder-0.5b": {
        "qkv": (896, 1152, (1, 2, 7)),
        "out": (896, 896, (1, 2, 7)),
        "gate_up": (896, 9728, (1,)),
        "down": (4864, 896, (1, 2, 4)),
        "tied vocabulary": (896, 151936, (1,)),
    },
    "smollm2-135m": {
        "qkv": (576, 960, (1, 3)),
        "out": (576, 576, (1, 3)),
        "gate_up": (576, 3072, (1,)),
        "down": (1536, 576, (1, 2, 4)),
        "tied vocabulary": (576, 49152, (1,)),
    },
}
_SEEN = 8  # rows that are compared, all if there are fewer
_MOST_SCORES = 600  # rows of a vocabulary's product
_FORMS = ("batched", "dot", "separate")
_REPEATS, _SECONDS = 5, 0.04


_NAMES = flags.DEFINE_list("models", list(_MODELS), "Whose products.")
_ROWS = flags.DEFINE_list(
    "rows", "1,8,16,24,64,136,152,256,520,576,2184".split(","), "Numbers of rows."
)
_TIMED = flags.DEFINE_list("timed_rows", ["24", "64", "152"], "Of them, timed ones.")
_FORM = flags.DEFINE_multi_enum("form", _FORMS, _FORMS, "Forms, see `product`.")
_SECONDS = flags.DEFINE_integer("seconds", 100_000, "Begin nothing after so long.")
_COMMIT = flags.DEFINE_string("commit", None, "Commit to record if git cannot say.")
_OUTPUT = flags.DEFINE_string("output", None, "Results file.", required=True)


def median_us(function, *args, is_serial=False):
    """Microseconds of a call of a function, compiled, many in flight; and its result.

    Each call takes the result of the last one: a graph of the same places stays.
    is_serial: nothing runs beside each other, whatever XLA's flags say (GPU).
    """
    options = {"xla_gpu_command_buffer_scheduling_mode": "SERIALIZE"}
    program = jax.jit(
        lambda old, *args: function(*args),
        donate_argnums=0,
        keep_unused=True,
        compiler_options=options if is_serial else None,
    )
    old = jax.eval_shape(function, *args)
    made = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), old)

    def seconds(count):
        nonlocal made
        start = time.perf_counter()
        for _ in range(count):
            made = program(made, *args)
        jax.block_until_ready(made)
        return (time.perf_counter() - start) / count

    seconds(2)
    count = max(4, int(_SECONDS / seconds(2)))
    return 1e6 * float(np.median([seconds(count) for _ in range(_REPEATS)])), made


def product(x, kernel, *, parts, form, is_tied=False):
    """Parts float32 [P, T, out] of x [T, in] times kernel [in, out].

    A tied kernel is [out, in]. `form`: "dot" is one product without a batch axis,
    "batched" one with the parts as its batch axis, "separate" a product for each part.
    """
    axis = int(is_tied)
    if form == "batched":
        if is_tied:
            kernel = kernel.reshape(len(kernel), parts, -1)
            axes = ((2,), (2,)), ((1,), (1,))
        else:
            kernel = kernel.reshape(parts, -1, kernel.shape[1])
            axes = ((2,), (1,)), ((1,), (0,))
        x = x.reshape(len(x), parts, -1)
        return lax.dot_general(x, kernel, axes, preferred_element_type=jnp.float32)
    axes = ((1,), (axis,)), ((), ())
    cuts = zip(
        jnp.split(x, parts, axis=1), jnp.split(kernel, parts, axis=axis), strict=True
    )
    made = [lax.dot_general(*c, axes, preferred_element_type=jnp.float32) for c in cuts]
    return jnp.stack(made)


def cases(names, forms):
    """(model, product, in, out, parts, form, is_tied) in the order of measurement."""
    for name in names:
        for which, (size_in, size_out, all_parts) in _MODELS[name].items():
            is_tied = which.startswith("tied")
            for parts in all_parts:
                other = "dot" if parts == 1 else "separate"
                for form in ("batched", other):
                    if form in forms:
                        yield name, which, size_in, size_out, parts, form, is_tied


def bits_of(run, x, kernels, all_rows):
    """How many float32 values of the first 8 rows differ, by number of rows.

    From those of the smallest number that has 8; with the largest difference.
    """
    made = {}
    for rows in all_rows:
        made[rows] = np.asarray(run(x[:rows], kernels[0])[:, :_SEEN])
    base = next(made[rows] for rows in all_rows if rows >= _SEEN)
    differ, largest = {}, 0.0
    for rows, values in made.items():
        same = base[:, : values.shape[1]]
        differ[rows] = int((values.view(np.int32) != same.view(np.int32)).sum())
        largest = max(largest, float(np.abs(values - same).max()))
    return {"differ": differ, "largest_difference": largest}


def measure(case, all_rows, timed_rows):
    """One row of the results."""
    name, which, size_in, size_out, parts, form, is_tied = case
    if "vocabulary" in which:
        all_rows = [rows for rows in all_rows if rows <= _MOST_SCORES]
    shape = (size_out, size_in) if is_tied else (size_in, size_out)
    count = max(2, int(150e6 / (2 * size_in * size_out)))  # several times an L2
    keys = jax.random.split(jax.random.key(1), min(count, 24))
    kernels = [_normal(key, shape, size_in**-0.5) for key in keys]
    x = _normal(jax.random.key(2), (max(all_rows), size_in), 1.0)

    def run(x, kernel):
        return product(x, kernel, parts=parts, form=form, is_tied=is_tied)

    row = {"model": name, "product": which, "size_in": size_in, "size_out": size_out}
    row |= {"parts": parts, "form": form}
    row |= bits_of(jax.jit(run), x, kernels, all_rows)
    row["us"] = {}
    for rows in timed_rows:
        us, _ = median_us(lambda x, ks: [run(x, k) for k in ks], x[:rows], kernels)
        row["us"][rows] = us / len(kernels)
    return row


def _normal(key, shape, scale):
    return (jax.random.normal(key, shape, jnp.float32) * scale).astype(jnp.bfloat16)


def main():
    """Measure all cases that fit into the time and write the file after each."""
    unknown = set(_NAMES.value) - set(_MODELS)
    if unknown:
        raise app.UsageError(f"models takes some of {list(_MODELS)}, got {unknown}")
    try:
        all_rows = sorted({int(n) for n in _ROWS.value})
        timed_rows = sorted({int(n) for n in _TIMED.value})
    except ValueError:
        raise app.UsageError("rows and timed_rows hold whole numbers") from None
    if not all_rows or all_rows[0] < 1 or all_rows[-1] < max([_SEEN, *timed_rows]):
        raise app.UsageError(f"rows must reach {_SEEN} and the largest of timed_rows")
    own_flags = flags.FLAGS.get_key_flags_for_module(sys.modules[__name__])
    results = record.results_header(own_flags, commit=_COMMIT.value) | {"rows": []}
    start = time.monotonic()
    for case in cases(_NAMES.value, _FORM.value):
        if time.monotonic() - start > _SECONDS.value:
            results["not_measured"] = results.get("not_measured", []) + [case]
            continue
        results["rows"].append(measure(case, all_rows, timed_rows))
        print(results["rows"][-1], flush=True)
        record.write_results(_OUTPUT.value, results)
    record.write_results(_OUTPUT.value, results)


if __name__ == "__main__":
    launch.run(main)
