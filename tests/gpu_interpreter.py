"""GPU kernels run by the interpreter, which records races in shared memory."""

import jax
import jax.numpy as jnp
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

PLAIN = plgpu.InterpretGPUParams()
RACES = plgpu.InterpretGPUParams(detect_races=True)


def compile_interpreted(fn, inputs, optimization_level=0):
    """Returns `fn` compiled for arrays like `inputs`; raises after a race.

    Most kernels run for less time than their optimisation takes.
    """
    options = {"xla_backend_optimization_level": optimization_level}
    lowered = jax.jit(fn).lower(*jax.tree.map(jnp.asarray, tuple(inputs)))
    compiled = lowered.compile(options)

    def run(inputs):
        arrays = jax.tree.map(jnp.asarray, tuple(inputs))
        result = jax.block_until_ready(compiled(*arrays))
        assert not gpu_callbacks.get_races().races_found, "race in shared memory"
        return result

    return run


def run_with_races(fn, inputs, **options):
    """Returns what the kernel `fn` gives; raises after a race."""
    return compile_interpreted(
        lambda *args: fn(*args, **options, interpret=RACES), inputs
    )(inputs)
