"""All dense work of a transformer between two attentions."""

from pallas_kernels.dense_chain.api import (
    NUM_COUNTERS,
    ChainWeights,
    dense_chain,
    new_counters,
)

__all__ = ["NUM_COUNTERS", "ChainWeights", "dense_chain", "new_counters"]
