"""Times of a model's products with a few rows, in 16 and in 8 bits, by several ways."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.gpu import hopper_mixed_type_matmul_mgpu as shipped

from experiments.int8_product import Xla, multiply
from pallas_kernels import timing
from pallas_kernels.int8_matmul import Int8Weight
from pallas_kernels.int8_matmul.gpu import pack_gpu
from pallas_kernels.int8_matmul.tiling import Tiling, choose_tiling

_BYTES = 300e6  # of all weights of a program: several times an L2
_REPEATS, _SECONDS = 5, 0.04

# What is tried for each product, the best for 64 rows first; a multiprocessor's CTAs
# share its memory. On an H200 CTAs that read rows together (clusters) were no faster.
_WHOLE = (
    Tiling(groups=3),
    Tiling(groups=4),
    Tiling(groups=1, ctas=3),
    Tiling(groups=2, ctas=2),
)
_LONG = (
    Tiling(groups=1, parts=4, ctas=2),
    Tiling(groups=2, parts=4),
    Tiling(groups=2, parts=4, ctas=2),
    Tiling(groups=1, parts=2, ctas=2),
    Tiling(groups=4, parts=8),
)
_CANDIDATES = {
    "qkv": (
        Tiling(groups=1, parts=2, ctas=2),
        Tiling(groups=3, parts=4),
        Tiling(groups=4, parts=4),
    ),
    "out": _LONG,
    "gate_up": _WHOLE,
    "down": _LONG,
    "lm_head": _WHOLE,
}
_XLA_PARTS = {"qkv": (1, 2, 4), "out": (1, 4), "down": (1, 4, 8)}
KINDS = ("kernel", "xla", "shipped", "bfloat16")


def product_sizes(config) -> dict[str, tuple[int, int]]:
    """(in, out) of each product of a model."""
    heads = (config.group_size + 2) * config.num_kv_heads * config.head_dim
    mixed = config.num_heads * config.head_dim
    return {
        "qkv": (config.hidden_size, heads),
        "out": (mixed, config.hidden_size),
        "gate_up": (config.hidden_size, 2 * config.intermediate_size),
        "down": (config.intermediate_size, config.hidden_size),
        "lm_head": (config.hidden_size, config.vocab_size),
    }


def chosen(num_tokens: int, config, rows=()) -> dict:
    """How each product is made in 8 bits for so many tokens; on a CPU by XLA.

    rows: of `sweep`, the best of which for the nearest number of tokens is taken.

    Raises:
      NotImplementedError: no tiling fits.
    """
    if jax.default_backend() != "gpu":
        return dict.fromkeys(product_sizes(config), Xla())
    made = {}
    for name, sizes in product_sizes(config).items():
        known = [row for row in rows if row["product"] == name and "us" in row]
        known = [row for row in known if row["kind"] == "kernel"]
        known.sort(key=lambda row: (abs(row["rows"] - num_tokens), row["us"]))
        ways = {str(way): way for way in _CANDIDATES[name]}
        fits = [ways[row["way"]] for row in known]
        fits = [way for way in fits if way.why_not(num_tokens, *sizes) is None]
        parts = 1 if name in ("gate_up", "lm_head") else None
        made[name] = fits[0] if fits else choose_tiling(num_tokens, *sizes, parts)
    return made


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


def sweep(config, num_tokens: int, read_rate: float, kinds=KINDS):
    """Yields a row per product and way: microseconds, and the share of the read rate.

    A way that fails is a row with its error. The weights of one program lie in several
    arrays, whose products follow each other.
    """
    for name, (size_in, size_out) in product_sizes(config).items():
        size = size_in * size_out
        x = jax.random.normal(jax.random.key(0), (num_tokens, size_in), jnp.bfloat16)
        ints = _arrays(size_in, size_out, min(24, max(2, int(_BYTES / size))))
        packed = [jax.jit(pack_gpu)(weight) for weight in ints]
        expected = multiply(x, ints[0], Xla(), jnp.float32)
        row = dict(product=name, rows=num_tokens, size_in=size_in, size_out=size_out)
        for kind, way, function in _int8_ways(name, num_tokens, size_in, size_out):
            if kind not in kinds:
                continue
            made = row | {"kind": kind, "way": str(way)}
            right = None if kind == "shipped" else expected  # which knows no scale
            weights = packed if kind == "kernel" else ints
            yield made | _timed(function, weights, x, read_rate, size, right)
        if "bfloat16" not in kinds:
            continue
        wide = [(w.values * 0.01).astype(jnp.bfloat16).T for w in ints[::2]]
        del ints, packed
        for parts in _XLA_PARTS.get(name, (1,)):
            made = row | {"kind": "bfloat16", "way": f"{parts} parts"}
            function = _bf16_product(parts)
            yield made | _timed(function, wide, x, read_rate, 2 * size, None)


def _arrays(size_in, size_out, count):
    keys = jax.random.split(jax.random.key(1), count)

    def values(key):
        return jax.random.randint(key, (size_out, size_in), -127, 128, jnp.int8)

    scale = jnp.full(size_out, 1 / 127 / size_in**0.5, jnp.float32)
    return [Int8Weight(values(key), scale) for key in keys]


def _int8_ways(name, num_tokens, size_in, size_out):
    """(kind, way, function of x and an Int8Weight) of each way that fits."""
    dtype = jnp.bfloat16 if name == "gate_up" else jnp.float32
    ways = [("xla", Xla(parts=n)) for n in _XLA_PARTS.get(name, (1,))]
    ways += [("kernel", tiling) for tiling in _CANDIDATES[name]]
    for kind, way in ways:
        if way.why_not(num_tokens, size_in, size_out) is None:
            yield kind, way, lambda x, w, way=way: multiply(x, w, way, dtype)
    for config in _shipped_configs(num_tokens, size_out):
        yield "shipped", config, lambda x, w, config=config: _shipped(x, w, config)


def _shipped_configs(num_tokens, size_out):
    """Of the mixed-type product that jax ships: two warpgroups side by side."""
    columns = max(32, num_tokens)
    for tile_m, steps in ((64, 6), (128, 4)):
        if size_out % (2 * tile_m) == 0 and num_tokens <= 64:
            yield shipped.TuningConfig(
                tile_m=tile_m,
                tile_n=columns,
                tile_k=128,
                max_concurrent_steps=steps,
                epi_tile_n=columns,
                wg_dimension=shipped.MatmulDimension.M,
            )


def _shipped(x, weight, config):
    """Its product [out, tokens] of tokens padded to its tile and turned; no scale."""
    columns = jnp.pad(x, ((0, config.tile_n - len(x)), (0, 0))).T
    columns = jax.lax.optimization_barrier(columns)  # made once for all weights
    return shipped.mixed_matmul_kernel(
        weight.values, columns, out_dtype=jnp.bfloat16, config=config
    )


def _bf16_product(parts):
    def product(x, kernel):
        cut = x.reshape(len(x), parts, -1), kernel.reshape(parts, -1, kernel.shape[1])
        made = jax.lax.dot_general(
            *cut, (((2,), (1,)), ((1,), (0,))), preferred_element_type=jnp.float32
        )
        return made[0].astype(x.dtype) if parts == 1 else made

    return product


def _timed(function, weights, x, read_rate, num_bytes, expected):
    """Microseconds, share of the read rate and error of one way, or what it raised."""
    try:
        us, results = median_us(
            lambda x, weights: [function(x, w) for w in weights],
            x,
            weights,
            is_serial=jax.default_backend() == "gpu",
        )
    except Exception as error:  # one way of many
        return {"error": f"{type(error).__name__}: {str(error)[:300]}"}
    us /= len(weights)
    made = {"us": us, "of_read_rate": num_bytes / read_rate / us * 1e6}
    if expected is not None:
        first = results[0].astype(jnp.float32)
        whole = first if first.ndim == 2 else first.sum(0)
        if whole.shape == expected.shape:
            made["difference"] = timing.relative_error(whole, expected)
    return made
