"""Compiles a function for a TPU or an H100 on a machine that has neither.

    compiled = compile_for("v5e", fn, jax.ShapeDtypeStruct((8, 128), jnp.float32))
    assert compiled.temp_bytes == 0

What the compiler sees is gated: unsupported operations, VMEM, SMEM, shared memory
and hidden copies. What only a device shows is not: speed, and reads out of bounds.
Needs libtpu for TPU targets and the CUDA 13 plugin for "h100", and JAX_PLATFORMS=cpu
in the environment before jax is imported.
"""

import functools
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import (
    AbstractDevice,
    AbstractMesh,
    NamedSharding,
    SingleDeviceSharding,
    use_abstract_mesh,
)

# The smallest topology of each generation; kernels compile for its first device.
_TPU_TOPOLOGIES = {
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "tpu7x": "tpu7x:2x2x1",
}
TPU_TARGETS = tuple(_TPU_TOPOLOGIES)
TARGETS = (*TPU_TARGETS, "h100")
# Topologies for programs of several devices, the smallest first: (devices, topology).
_TPU_GROUPS = {
    "v5e": ((4, "v5e:2x2"), (8, "v5e:2x4")),
    "v5p": ((4, "v5p:2x2x1"), (8, "v5p:2x2x2")),
    "v6e": ((4, "v6e:2x2"), (8, "v6e:2x4")),
    "tpu7x": ((8, "tpu7x:2x2x1"),),
}

# Keeps libtpu from asking a metadata server and lets several processes load it.
_LIBTPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}
_H100_CONFIG = pathlib.Path(__file__).parent / "targets" / "h100.txtpb"
_H100_CORES = 132


class CompiledFor(NamedTuple):
    """A function compiled for a device that need not be present."""

    lowered: jax.stages.Lowered
    compiled: jax.stages.Compiled
    lower_s: float
    compile_s: float

    @property
    def temp_bytes(self) -> int:
        """Device memory beside arguments and results, e.g. a hidden pool copy."""
        return self.compiled.memory_analysis().temp_size_in_bytes

    @property
    def alias_bytes(self) -> int:
        """Bytes of arguments whose memory a result reuses."""
        return self.compiled.memory_analysis().alias_size_in_bytes


@functools.cache
def target_device(target: str) -> Any:
    """Returns a device description of `target`, one of `TARGETS`."""
    if target not in TARGETS:
        raise ValueError(f"target is {target!r}; choose one of {', '.join(TARGETS)}")
    name = "1x1x1" if target == "h100" else _TPU_TOPOLOGIES[target]
    return _topology(target, name).devices[0]


def target_devices(target: str, count: int) -> list:
    """Returns descriptions of `count` devices of `target`, all of one host or slice.

    Raises:
      ValueError: unknown target, or no topology that is known has so many.
    """
    if target == "h100":
        return list(_topology(target, f"1x1x{count}").devices)
    groups = dict(_TPU_GROUPS.get(target, ()))
    sizes = [size for size in groups if size >= count]
    if not sizes:
        raise ValueError(f"there is no known topology of {count} devices of {target!r}")
    return list(_topology(target, groups[min(sizes)]).devices)[:count]


def _topology(target, name):
    if os.environ.get("JAX_PLATFORMS") != "cpu":
        raise RuntimeError(
            "set JAX_PLATFORMS=cpu before importing jax: the compile-only clients "
            "need a process that holds no device"
        )
    if target == "h100":
        return topologies.get_topology_desc(
            platform="cuda", target_config=_H100_CONFIG.read_text(), topology=name
        )
    for variable, value in _LIBTPU_ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    return topologies.get_topology_desc(platform="tpu", topology_name=name)


def target_mesh(target: str) -> AbstractMesh:
    """Returns the empty mesh that tells a kernel being traced its device."""
    device = target_device(target)
    is_gpu = target == "h100"
    return AbstractMesh(
        (),
        (),
        abstract_device=AbstractDevice(
            device_kind=device.device_kind,
            num_cores=_H100_CORES if is_gpu else device.num_cores,
            platform="gpu" if is_gpu else "tpu",
        ),
    )


def compile_for(
    target: str,
    fn: Callable[..., Any],
    *args: Any,
    compiler_options: dict[str, Any] | None = None,
    **jit_options: Any,
) -> CompiledFor:
    """Returns `fn` compiled for one device of `target`, or for those of its arguments.

    Args:
      target: one of `TARGETS`.
      fn: function of arrays.
      *args: pytrees of arrays or `jax.ShapeDtypeStruct`. One that has a sharding over
        `target_devices` keeps it.
      compiler_options: XLA options of this compilation.
      **jit_options: arguments of `jax.jit`, e.g. donate_argnums.

    Raises:
      ValueError: unknown target.
      RuntimeError: jax was not told to stay on the CPU.
      Exception: whatever the compiler rejects `fn` with.
    """
    alone = SingleDeviceSharding(target_device(target))

    def place(array):
        kept = getattr(array, "sharding", None)
        sharding = kept if isinstance(kept, NamedSharding) else alone
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

    args = jax.tree.map(place, args)
    start = time.perf_counter()
    with use_abstract_mesh(target_mesh(target)):
        traced = jax.jit(fn, **jit_options).trace(*args)
        platform = "cuda" if target == "h100" else "tpu"
        lowered = traced.lower(lowering_platforms=(platform,))
    lower_s = time.perf_counter() - start
    start = time.perf_counter()
    compiled = lowered.compile(compiler_options=compiler_options)
    return CompiledFor(lowered, compiled, lower_s, time.perf_counter() - start)
