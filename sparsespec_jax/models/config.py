"""Shapes of a decoder-only transformer, and those of some published models.

``ModelConfig`` is the only description of a model that the rest of the package
reads; loaders translate checkpoint metadata into it and refuse what it cannot say.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any

from sparsespec_jax.models.fields import LARGEST, parse_object, shown


def _require_size(name: str, value: Any) -> None:
    if type(value) is not int or not 1 <= value <= LARGEST:
        raise ValueError(
            f"{name} must be an integer from 1 to {LARGEST}, got {shown(value)}"
        )


def _require_number(name: str, value: Any) -> None:
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a number above 0, got {shown(value)}")


def _require_flag(name: str, value: Any) -> None:
    if type(value) is not bool:
        raise ValueError(f"{name} must be True or False, got {shown(value)}")


@dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Rotary frequencies divided by ``factor`` (position interpolation)."""

    factor: float  # > 0; ratio of the extended to the trained context

    def __post_init__(self):
        """Check the range."""
        _require_number("factor", self.factor)


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """The piecewise frequency scaling of Llama 3.1.

    Wavelengths longer than ``original_max_length / low_freq_factor`` tokens are
    stretched by ``factor``, those shorter than ``original_max_length /
    high_freq_factor`` stay, and those between are interpolated.
    """

    factor: float  # > 0
    low_freq_factor: float  # > 0, below high_freq_factor
    high_freq_factor: float
    original_max_length: int  # tokens, > 0

    def __post_init__(self):
        """Check the ranges."""
        for name in ("factor", "low_freq_factor", "high_freq_factor"):
            _require_number(name, getattr(self, name))
        _require_size("original_max_length", self.original_max_length)
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor ({self.low_freq_factor}) must be positive and below "
                f"high_freq_factor ({self.high_freq_factor})"
            )


@dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071): interpolation by frequency band, warmer logits.

    ``attention_factor`` multiplies cos and sin; None stands for the paper's
    ``0.1 ln(factor) + 1``.
    """

    factor: float  # > 0
    original_max_length: int  # tokens, > 0
    beta_fast: float = 32.0  # rotations over the trained context: kept above this
    beta_slow: float = 1.0  # rotations over the trained context: divided below this
    attention_factor: float | None = None
    truncate: bool = True  # round the band limits outwards to whole frequencies

    def __post_init__(self):
        """Check the ranges."""
        for name in ("factor", "beta_fast", "beta_slow"):
            _require_number(name, getattr(self, name))
        if self.attention_factor is not None:
            _require_number("attention_factor", self.attention_factor)
        _require_size("original_max_length", self.original_max_length)
        _require_flag("truncate", self.truncate)
        if self.beta_fast < self.beta_slow:
            raise ValueError(
                f"beta_fast ({self.beta_fast}) must be at least beta_slow "
                f"({self.beta_slow})"
            )


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling

FAMILIES = ("llama", "qwen2", "qwen3", "mistral")
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "max_length",
)
_FLAGS = (
    "tie_embeddings",
    "qk_norm",
    "attention_bias",
    "attention_out_bias",
    "mlp_bias",
)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Static shape and law of a decoder-only transformer; hashable.

    Every family served here is the same network: pre-norm RMSNorm, rotary
    grouped-query attention, gated SiLU MLP. The flags below are all that differs.

    Raises:
        ValueError: a value is of a wrong type or out of range, heads do not divide, or
            head_dim is odd.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int  # query heads N
    num_kv_heads: int  # H, divides num_heads
    head_dim: int  # D, even
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-6
    max_length: int  # tokens the positions were made for
    tie_embeddings: bool = False  # the output projection is the embedding table
    qk_norm: bool = False  # RMSNorm of each query and key head before rotation
    attention_bias: bool = False  # biases of the q, k and v projections
    attention_out_bias: bool = False  # bias of the o projection
    mlp_bias: bool = False  # biases of the gate, up and down projections
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()  # any of them ends a text
    family: str = "llama"  # llama | qwen2 | qwen3 | mistral: names in checkpoints

    def __post_init__(self):
        """Check types, and sizes against each other."""
        for name in _SIZES:
            _require_size(name, getattr(self, name))
        for name in _FLAGS:
            _require_flag(name, getattr(self, name))
        for name in ("rope_theta", "norm_eps"):
            _require_number(name, getattr(self, name))
        if not isinstance(self.rope_scaling, RopeScaling | None):
            raise ValueError(
                "rope_scaling must be None, LinearScaling, Llama3Scaling or "
                f"YarnScaling, got {shown(self.rope_scaling)}"
            )
        if self.family not in FAMILIES:
            raise ValueError(
                f"family must be one of {', '.join(FAMILIES)}, got {shown(self.family)}"
            )
        is_tuple = isinstance(self.eos_ids, tuple)
        if not is_tuple or not all(type(i) is int and i >= 0 for i in self.eos_ids):
            raise ValueError(
                f"eos_ids must be a tuple of token ids, got {shown(self.eos_ids)}"
            )
        if self.bos_id is not None and type(self.bos_id) is not int:
            raise ValueError(
                f"bos_id must be a token id or None, got {shown(self.bos_id)}"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads "
                f"({self.num_kv_heads}): every KV head serves the same number of "
                "query heads"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"head_dim must be even for rotary embedding, got {self.head_dim}"
            )

    @property
    def group_size(self) -> int:
        """Query heads that share one KV head (G)."""
        return self.num_heads // self.num_kv_heads

    @property
    def num_params(self) -> int:
        """Number of weights, the tied output projection counted once."""
        heads = self.num_heads + 2 * self.num_kv_heads
        attention = self.hidden_size * self.head_dim * (heads + self.num_heads)
        attention += heads * self.head_dim * self.attention_bias
        attention += self.hidden_size * self.attention_out_bias
        attention += 2 * self.head_dim * self.qk_norm
        mlp = 3 * self.hidden_size * self.intermediate_size
        mlp += (2 * self.intermediate_size + self.hidden_size) * self.mlp_bias
        per_layer = attention + mlp + 2 * self.hidden_size
        tables = (1 if self.tie_embeddings else 2) * self.vocab_size * self.hidden_size
        return self.num_layers * per_layer + tables + self.hidden_size

    def kv_bytes_per_token(self, bytes_per_value: int = 2) -> int:
        """Bytes of KV cache that one token takes over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * bytes_per_value


def _qwen3(**sizes) -> ModelConfig:
    return ModelConfig(
        vocab_size=151_936,
        num_kv_heads=8,
        head_dim=128,
        rope_theta=1e6,
        norm_eps=1e-6,
        max_length=40_960,
        qk_norm=True,
        bos_id=151_643,
        eos_ids=(151_645, 151_643),
        family="qwen3",
        **sizes,
    )


def _llama31(**sizes: Any) -> ModelConfig:
    scaling = Llama3Scaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_length=8192
    )
    return ModelConfig(
        vocab_size=128_256,
        num_kv_heads=8,
        head_dim=128,
        rope_theta=500_000.0,
        rope_scaling=scaling,
        norm_eps=1e-5,
        max_length=131_072,
        bos_id=128_000,
        eos_ids=(128_001, 128_008, 128_009),
        family="llama",
        **sizes,
    )


PRESETS: dict[str, ModelConfig] = {
    "qwen3-1.7b": _qwen3(
        hidden_size=2048,
        intermediate_size=6144,
        num_layers=28,
        num_heads=16,
        tie_embeddings=True,
    ),
    "qwen3-8b": _qwen3(
        hidden_size=4096, intermediate_size=12_288, num_layers=36, num_heads=32
    ),
    "qwen3-14b": _qwen3(
        hidden_size=5120, intermediate_size=17_408, num_layers=40, num_heads=40
    ),
    "qwen3-32b": _qwen3(
        hidden_size=5120, intermediate_size=25_600, num_layers=64, num_heads=64
    ),
    "llama-3.1-8b": _llama31(
        hidden_size=4096, intermediate_size=14_336, num_layers=32, num_heads=32
    ),
    "llama-3.1-70b": _llama31(
        hidden_size=8192, intermediate_size=28_672, num_layers=80, num_heads=64
    ),
    "smollm2-135m": ModelConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        rope_theta=100_000.0,
        norm_eps=1e-5,
        max_length=8192,
        tie_embeddings=True,
        bos_id=1,
        eos_ids=(2,),
        family="llama",
    ),
}

_SCALINGS = {
    kind.__name__: kind for kind in (LinearScaling, Llama3Scaling, YarnScaling)
}


def config_to_json(config: ModelConfig) -> str:
    """The configuration as JSON text, read back by ``config_from_json``."""
    fields = dataclasses.asdict(config)
    if config.rope_scaling is not None:
        fields["rope_scaling"]["kind"] = type(config.rope_scaling).__name__
    return json.dumps(fields, indent=2)


def config_from_json(text: str, *, origin: str = "the configuration") -> ModelConfig:
    """The configuration that ``config_to_json`` wrote; errors call it origin.

    Raises:
        ValueError: a field is unknown or missing, or its value is refused.
    """
    fields = parse_object(origin, text)
    try:
        if (scaling := fields.get("rope_scaling")) is not None:
            kind = _SCALINGS[scaling.pop("kind")]
            fields["rope_scaling"] = kind(**scaling)
        return ModelConfig(**{**fields, "eos_ids": tuple(fields["eos_ids"])})
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{origin} is not a model configuration of this version: {error}; the "
            "checkpoint was written by another version or edited by hand"
        ) from error
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from error
