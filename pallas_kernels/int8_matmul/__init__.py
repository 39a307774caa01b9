"""Product of few rows with a weight in 8 bits."""

from pallas_kernels.int8_matmul.api import int8_matmul, pack
from pallas_kernels.int8_matmul.tiling import choose_parts
from pallas_kernels.int8_matmul.weights import Int8Weight, PackedWeight, quantise

__all__ = [
    "Int8Weight",
    "PackedWeight",
    "choose_parts",
    "int8_matmul",
    "pack",
    "quantise",
]
