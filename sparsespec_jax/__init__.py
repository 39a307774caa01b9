"""Lossless self-speculative decoding with sparse attention (arXiv 2512.01278)."""

from sparsespec_jax.checkpoint import Model, load_model, save_checkpoint
from sparsespec_jax.config import EngineConfig, SamplingParams, SpeculationConfig
from sparsespec_jax.decode import decode, stream
from sparsespec_jax.engine import Engine
from sparsespec_jax.model_config import ModelConfig
from sparsespec_jax.policy import Policy
from sparsespec_jax.results import DecodeResult, DecodeResults, StreamEvent

__all__ = [
    "DecodeResult",
    "DecodeResults",
    "Engine",
    "EngineConfig",
    "Model",
    "ModelConfig",
    "Policy",
    "SamplingParams",
    "SpeculationConfig",
    "StreamEvent",
    "decode",
    "load_model",
    "save_checkpoint",
    "stream",
]
