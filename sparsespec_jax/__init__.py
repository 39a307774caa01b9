"""Lossless self-speculative decoding with sparse attention (arXiv 2512.01278)."""

from sparsespec_jax.config import EngineConfig, SamplingParams, SpeculationConfig
from sparsespec_jax.decode import decode, score, stream
from sparsespec_jax.engine import Engine
from sparsespec_jax.host.results import DecodeResult, DecodeResults, StreamEvent
from sparsespec_jax.loading.load import Model, load_model, save_checkpoint
from sparsespec_jax.models.config import ModelConfig
from sparsespec_jax.policies.base import Policy

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
    "score",
    "stream",
]
