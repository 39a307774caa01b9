"""Rotary embedding as config.json describes it, in both spellings."""

from __future__ import annotations

import math
from typing import Any

from sparsespec_jax.models.config import (
    LinearScaling,
    Llama3Scaling,
    RopeScaling,
    YarnScaling,
)
from sparsespec_jax.models.fields import Fields, shown

Rope = tuple[float, RopeScaling | None]
_BASE = 10_000.0

# Keys that each type reads, beside those that every type may have.
_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
    "yarn": {
        "factor",
        "beta_fast",
        "beta_slow",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
        "truncate",
    },
}
# The last two are notes about how the model came to be.
_COMMON = {"type", "rope_type", "rope_theta", "partial_rotary_factor"} | {
    "original_max_position_embeddings",
    "finetuned",
}
# Keys of other implementations, and the value at which they do nothing.
_NEUTRAL = {"factor": 1, "attn_factor": 1, "extrapolation_factor": 1}


def read_rope(fields: Fields, *, max_length: int) -> Rope:
    """The base and the scaling that the keys of a config.json ask for.

    The parameters stand in ``rope_parameters`` or ``rope_scaling``, with the base
    inside or beside them. Parameters by layer type count as those of full_attention,
    the only type that is served (``layer_types`` must name it). ``mscale`` and
    ``mscale_all_dim`` of YaRN together stand for an attention factor; alone they mean
    nothing.

    Raises:
        ValueError: a key is not understood, of a wrong type or out of range, or two
            keys contradict each other.
    """
    outer = _base(fields)
    found: dict[str, Rope] = {}
    for key in ("rope_parameters", "rope_scaling"):
        inner = fields.within(key)
        if inner is not None:
            inner = _of_full_attention(inner, fields)
            _require_whole_heads(inner)
            found[key] = _read(inner, fields, outer=outer, max_length=max_length)
    _require_whole_heads(fields)
    if len({*found.values()}) > 1:
        raise ValueError(
            f"{fields.path}: rope_parameters and rope_scaling contradict each other "
            f"({found['rope_parameters']} and {found['rope_scaling']}); remove one"
        )
    return next(iter(found.values()), (outer or _BASE, None))


def _of_full_attention(rope: Fields, config: Fields) -> Fields:
    """The parameters themselves, or those under full_attention if they go by type."""
    by_type = [key for key in rope.values if key.endswith("_attention")]
    if not by_type:
        return rope
    if config.get("layer_types", None) is None:
        # transformers would take them for unknown keys then, and scale nothing.
        raise rope.refusal(by_type[0], "absent, as config.json has no layer_types")
    for key in rope.values.keys() - by_type:
        raise rope.refusal(key, "inside the parameters of a layer type")
    inner = rope.within("full_attention")
    if inner is None:
        raise rope.refusal("full_attention", "an object: all layers are of this type")
    return inner


def _require_whole_heads(fields: Fields) -> None:
    if fields.number("partial_rotary_factor", None) not in (None, 1):
        raise fields.refusal(
            "partial_rotary_factor", "1: only rotation of whole heads is supported"
        )


def _read(
    rope: Fields, config: Fields, *, outer: float | None, max_length: int
) -> Rope:
    kind = _kind(rope)
    for key, value in rope.values.items():
        known = key in _COMMON | _KEYS[kind] or value is None or value is False
        if not known and value != _NEUTRAL.get(key, key):
            raise ValueError(
                f"{rope.path}: {rope.name(key)} = {shown(value)} is not understood "
                f"beside the type {kind!r}, which reads "
                f"{', '.join(sorted(_KEYS[kind])) or 'no other key'}; remove it if it "
                "does not change the model's numbers"
            )
    theta = _base(rope)
    if None not in (theta, outer) and theta != outer:
        raise rope.refusal("rope_theta", f"{outer}, as rope_theta outside says")
    original = _original_length(rope, config, max_length)
    return theta or outer or _BASE, _scaling(kind, rope, original)


def _base(fields: Fields) -> float | None:
    theta = fields.number("rope_theta", None)
    if theta is not None and theta <= 1:
        raise fields.refusal("rope_theta", "above 1")
    return theta


def _kind(rope: Fields) -> str:
    spelled = [key for key in ("rope_type", "type") if rope.get(key, None) is not None]
    kinds = [rope.get(key) for key in spelled]
    if len(kinds) == 2 and kinds[0] != kinds[1]:
        raise rope.refusal("type", f"{shown(kinds[0])}, as rope_type says")
    kind = kinds[0] if kinds else "default"
    if not isinstance(kind, str) or kind not in _KEYS:
        raise rope.refusal(
            spelled[0], f"one of {', '.join(_KEYS)}: no other type is supported"
        )
    return kind


def _original_length(rope: Fields, config: Fields, max_length: int) -> int:
    """Tokens of the trained context; the key outside comes before the one inside."""
    key = "original_max_position_embeddings"
    outside, inside = config.size(key, None), rope.size(key, None)
    return outside or inside or max_length


def _scaling(kind: str, rope: Fields, original: int) -> RopeScaling | None:
    if kind == "default":
        return None
    factor = rope.number("factor")
    if kind == "linear":
        return LinearScaling(factor=factor)
    if kind == "llama3":
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        if low >= high:
            raise rope.refusal("low_freq_factor", f"below high_freq_factor ({high})")
        return Llama3Scaling(
            factor=factor,
            low_freq_factor=low,
            high_freq_factor=high,
            original_max_length=original,
        )
    fast, slow = rope.number("beta_fast", None), rope.number("beta_slow", None)
    fast, slow = fast or 32.0, slow or 1.0
    if fast < slow:
        raise rope.refusal("beta_fast", f"at least beta_slow ({slow})")
    return YarnScaling(
        factor=factor,
        original_max_length=original,
        beta_fast=fast,
        beta_slow=slow,
        attention_factor=_attention_factor(rope, factor),
        truncate=rope.flag("truncate", True),
    )


def _attention_factor(rope: Fields, factor: float) -> float | None:
    given = rope.number("attention_factor", None)
    scales: list[Any] = [rope.number(k, None) for k in ("mscale", "mscale_all_dim")]
    if given is not None or None in scales:
        return given
    over, under = (0.1 * scale * math.log(max(factor, 1)) + 1 for scale in scales)
    return over / under
