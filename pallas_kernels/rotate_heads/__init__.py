"""Norm and rotation of the heads of a fused projection."""

from pallas_kernels.rotate_heads.api import rotate_heads

__all__ = ["rotate_heads"]
