"""Models without a checkpoint: random weights of published shapes, or of tiny ones."""

from __future__ import annotations

from sparsespec_jax import Model
from sparsespec_jax.models.config import PRESETS, ModelConfig
from sparsespec_jax.models.transformer import init_params

# Two layers with grouped heads; compiles in a second.
TINY = ModelConfig(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_length=4096,
    tie_embeddings=True,
)


def random_model(preset: str, dtype) -> Model:
    """Random weights with the shapes of a preset.

    Raises:
        ValueError: no such preset.
    """
    if preset not in PRESETS:
        raise ValueError(f"model must be one of {sorted(PRESETS)}, got {preset!r}")
    params = init_params(PRESETS[preset], seed=0, dtype=dtype)
    return Model(name=preset, config=PRESETS[preset], params=params, tokenizer=None)


def tiny_model() -> Model:
    """A random float32 model without tokenizer or end-of-text token; for tests."""
    params = init_params(TINY, seed=0)
    return Model(name="tiny", config=TINY, params=params, tokenizer=None)
