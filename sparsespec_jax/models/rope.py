"""Rotary position embedding in float32, with the published context extensions."""

import math

import jax.numpy as jnp
import numpy as np

from sparsespec_jax.array_types import Frequencies, PerToken, RopeTable
from sparsespec_jax.models.config import (
    LinearScaling,
    Llama3Scaling,
    ModelConfig,
    YarnScaling,
)


def inverse_frequencies(config: ModelConfig) -> Frequencies:
    """Radians per token of each rotated pair, fastest first."""
    # Rounded where the training code rounds: at position 10,000 an angle carries
    # 10,000 times the error of its frequency.
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / config.head_dim
    base = (1 / np.float32(config.rope_theta) ** exponents).astype(np.float32)
    match config.rope_scaling:
        case None:
            scaled = base
        case LinearScaling(factor=factor):
            scaled = base / factor
        case Llama3Scaling() as scaling:
            scaled = _llama3(base, scaling)
        case YarnScaling() as scaling:
            scaled = _yarn(base, scaling, config)
    return scaled.astype(np.float32)


def amplitude(config: ModelConfig) -> float:
    """Factor on cos and sin: 1 but for YaRN, whose scale of q and k it is."""
    scaling = config.rope_scaling
    if not isinstance(scaling, YarnScaling):
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    return 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0


def _llama3(base: np.ndarray, scaling: Llama3Scaling) -> np.ndarray:
    turns = scaling.original_max_length * base / (2 * math.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    keep = np.clip((turns - scaling.low_freq_factor) / span, 0.0, 1.0)
    return base * (keep + (1.0 - keep) / scaling.factor)


def _yarn(base: np.ndarray, scaling: YarnScaling, config: ModelConfig) -> np.ndarray:
    def pair_at(rotations: float) -> float:
        # The (fractional) pair that turns this often over the trained context.
        wavelength = scaling.original_max_length / (rotations * 2 * math.pi)
        return (
            config.head_dim * math.log(wavelength) / (2 * math.log(config.rope_theta))
        )

    low, high = pair_at(scaling.beta_fast), pair_at(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.head_dim - 1)
    ramp = (np.arange(base.size) - low) / (high - low or 1e-3)
    interpolated = np.clip(ramp, 0.0, 1.0)
    return base * (1.0 - interpolated + interpolated / scaling.factor)


def rope_tables(
    positions: PerToken, config: ModelConfig
) -> tuple[RopeTable, RopeTable]:
    """Cos and sin of positions.

    Element i of a head is paired with element i + D/2, the convention of Hugging Face
    checkpoints (GGUF files pair neighbours; their loader reorders the weights).
    """
    frequencies = jnp.asarray(inverse_frequencies(config))
    # An elementwise product: a matmul may round its operands to fewer bits.
    angles = positions.astype(jnp.float32)[:, None] * frequencies[None, :]
    scale = amplitude(config)
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale
