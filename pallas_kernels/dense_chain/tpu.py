"""Dense chain for TPUs: XLA, whose launches cost nothing there."""

import jax

from pallas_kernels.dense_chain.api import ChainWeights
from pallas_kernels.dense_chain.reference import dense_chain_reference


def dense_chain_tpu(
    mixed: jax.Array,
    stream: jax.Array,
    weights: ChainWeights,
    counters: jax.Array,
    *,
    eps: float,
    interpret: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns what `api.dense_chain` documents; nothing in it needs interpretation."""
    del interpret
    return dense_chain_reference(mixed, stream, weights, counters, eps=eps)
