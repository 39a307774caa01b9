"""Attention of mixed draft, verify and prefill lanes over a paged KV pool."""

from pallas_kernels.paged_attention.api import (
    PIECE,
    AttentionOutput,
    LaneGroup,
    check_served,
    paged_attention,
)

__all__ = ["PIECE", "AttentionOutput", "LaneGroup", "check_served", "paged_attention"]
