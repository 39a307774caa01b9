"""Models in Hugging Face directories: config.json and safetensors, without torch."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from sparsespec_jax.model import Params
from sparsespec_jax.model_config import (
    LinearScaling,
    Llama3Scaling,
    ModelConfig,
    RopeScaling,
    YarnScaling,
)
from sparsespec_jax.weights import (
    assemble,
    layer_shapes,
    outer_shapes,
    require_names,
)

_FAMILIES = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "MistralForCausalLM": "mistral",
}
ARCHITECTURES = tuple(_FAMILIES)

# What a family's config.json may leave out (the defaults of transformers).
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"max_position_embeddings": 32_768},
    "qwen3": {"max_position_embeddings": 32_768, "head_dim": 128},
    "mistral": {
        "max_position_embeddings": 131_072,
        "sliding_window": 4096,
        "num_key_value_heads": 8,
    },
}

_OUTER = {
    "embed": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "lm_head": "lm_head.weight",
}
_LAYER = {
    "input_norm": "input_layernorm.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "out": "self_attn.o_proj.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "q_bias": "self_attn.q_proj.bias",
    "k_bias": "self_attn.k_proj.bias",
    "v_bias": "self_attn.v_proj.bias",
    "out_bias": "self_attn.o_proj.bias",
    "gate_bias": "mlp.gate_proj.bias",
    "up_bias": "mlp.up_proj.bias",
    "down_bias": "mlp.down_proj.bias",
}

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


def load_hf(directory: str | Path, *, dtype) -> tuple[ModelConfig, Params]:
    """Configuration and parameters of a directory, the weights cast to dtype.

    Raises:
        ValueError: a file is missing or damaged, a tensor is missing, unexpected or
            of another shape, or the configuration asks for what is not supported.
    """
    directory = Path(directory)
    config = hf_config(directory)
    homes = _tensor_files(directory)
    expected = {_OUTER[name] for name in outer_shapes(config)}
    for layer in range(config.num_layers):
        expected |= {_layer_name(name, layer) for name in layer_shapes(config)}
    present = {name for name in homes if not name.endswith("rotary_emb.inv_freq")}
    if config.tie_embeddings:
        # Some files write the tied table out twice; transformers ignores the copy.
        present -= {_OUTER["lm_head"]}
    require_names(str(directory), expected=expected, present=present)
    shards = {path: _open(path) for path in sorted(set(homes.values()))}

    def read(name: str, layer: int | None) -> tuple[np.ndarray, str]:
        stored = _OUTER[name] if layer is None else _layer_name(name, layer)
        path = homes[stored]
        origin = f"{path}: tensor {stored}"
        try:
            return shards[path].get_tensor(stored), origin
        except SafetensorError as error:
            raise ValueError(
                f"{origin} cannot be read ({error}); the index and the shards are of "
                "different models: fetch both again"
            ) from error

    return config, assemble(config, read, dtype=dtype)


def _layer_name(name: str, layer: int) -> str:
    return f"model.layers.{layer}.{_LAYER[name]}"


def _tensor_files(directory: Path) -> dict[str, Path]:
    """The file that holds each tensor, by tensor name."""
    if (single := directory / _SINGLE).is_file():
        return dict.fromkeys(_open(single).keys(), single)
    if not (index := directory / _INDEX).is_file():
        raise ValueError(
            f"{directory} holds neither {_SINGLE} nor {_INDEX}; weights in other "
            "formats (.bin, .pth) must be converted to safetensors first"
        )
    homes = _read_json(index).get("weight_map", {})
    missing = sorted(
        name for name in set(homes.values()) if not (directory / name).is_file()
    )
    if missing:
        raise ValueError(
            f"{index} names {len(missing)} shard(s) that are not there: "
            f"{', '.join(missing[:4])}; fetch them into {directory}"
        )
    return {name: directory / shard for name, shard in homes.items()}


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="numpy")
    except SafetensorError as error:
        raise ValueError(
            f"{path} cannot be read as safetensors: {_damage(path, error)}; fetch it "
            "again"
        ) from error


def _damage(path: Path, error: Exception) -> str:
    """Where the header's own account of the file and the file part ways."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        try:
            header = json.loads(file.read(length)) if 8 + length <= size else {}
        except ValueError:
            header = {}
    header.pop("__metadata__", None)
    ends = {name: 8 + length + t["data_offsets"][1] for name, t in header.items()}
    cut = sorted((end, name) for name, end in ends.items() if end > size)
    if not cut:
        return f"{error} (the file has {size} bytes)"
    end, name = cut[0]
    return (
        f"it is truncated: it has {size} bytes of {max(ends.values())}, and tensor "
        f"{name} ends at byte {end}"
    )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"there is no {path.name} in {path.parent}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def hf_config(directory: str | Path) -> ModelConfig:
    """The model configuration of a directory's config.json.

    End-of-text ids of generation_config.json come on top, as they do when
    transformers generates.
    """
    directory = Path(directory)
    path = directory / "config.json"
    raw = _read_json(path)
    family = _family(path, raw)
    raw = {**_DEFAULTS[family], **raw}
    generation = directory / "generation_config.json"
    more = _read_json(generation) if generation.is_file() else {}

    def need(key: str) -> Any:
        if raw.get(key) is None:
            raise ValueError(f"{path} lacks {key!r}, which is required")
        return raw[key]

    num_heads = need("num_attention_heads")
    max_length = raw.get("max_position_embeddings", 2048)
    _refuse_other_laws(path, raw, max_length=max_length)
    # One flag means three biases in Llama and Qwen3, Qwen2 always has those of
    # q, k and v and never that of o, Mistral has none.
    bias = bool(raw.get("attention_bias", False)) and family in ("llama", "qwen3")
    rope = _rope_parameters(raw)
    return ModelConfig(
        vocab_size=need("vocab_size"),
        hidden_size=need("hidden_size"),
        intermediate_size=need("intermediate_size"),
        num_layers=need("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=raw.get("num_key_value_heads") or num_heads,
        head_dim=raw.get("head_dim") or need("hidden_size") // num_heads,
        rope_theta=float(rope.get("rope_theta", 10_000.0)),
        rope_scaling=_rope_scaling(path, rope, max_length=max_length),
        norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        max_length=max_length,
        tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
        qk_norm=family == "qwen3",
        attention_bias=bias or family == "qwen2",
        attention_out_bias=bias,
        mlp_bias=family == "llama" and bool(raw.get("mlp_bias", False)),
        bos_id=raw.get("bos_token_id"),
        eos_ids=_eos_ids(more.get("eos_token_id"), raw.get("eos_token_id")),
        family=family,
    )


def _family(path: Path, raw: dict[str, Any]) -> str:
    names = raw.get("architectures") or []
    for name in names:
        if name in _FAMILIES:
            return _FAMILIES[name]
    raise ValueError(
        f"{path} is of architecture {', '.join(names) or 'unknown'}; supported are "
        f"{', '.join(ARCHITECTURES)}"
    )


def _eos_ids(*sources: int | list[int] | None) -> tuple[int, ...]:
    ids: list[int] = []
    for source in sources:
        ids += [source] if isinstance(source, int) else source or []
    return tuple(dict.fromkeys(ids))


def _refuse_other_laws(path: Path, raw: dict[str, Any], *, max_length: int) -> None:
    window = raw.get("sliding_window")
    # Qwen writes a window into its files that another key turns off.
    is_windowed = raw.get("use_sliding_window", True) and window is not None
    if is_windowed and window < max_length:
        raise ValueError(
            f"{path} asks for sliding-window attention ({window} of {max_length} "
            "tokens), which is not supported: full attention would change its output"
        )
    other = {*(raw.get("layer_types") or ())} - {"full_attention"}
    if other and not (is_windowed and other == {"sliding_attention"}):
        raise ValueError(
            f"{path} asks for layers of type {', '.join(sorted(other))}; only "
            "full_attention is supported"
        )
    if (act := raw.get("hidden_act", "silu")) not in ("silu", "swish"):
        raise ValueError(
            f"{path} asks for hidden_act {act!r}; only 'silu' is supported"
        )
    if raw.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            f"{path} has partial_rotary_factor {raw['partial_rotary_factor']}; only "
            "rotation of whole heads is supported"
        )
    if raw.get("quantization_config"):
        raise ValueError(
            f"{path} describes quantised weights, which are not supported; use the "
            "model in bfloat16, or a GGUF file"
        )


def _rope_parameters(raw: dict[str, Any]) -> dict[str, Any]:
    """One dict from both spellings: rope_parameters, or rope_scaling and rope_theta."""
    outer = {k: raw[k] for k in ("rope_theta",) if raw.get(k) is not None}
    return outer | (raw.get("rope_scaling") or {}) | (raw.get("rope_parameters") or {})


def _rope_scaling(
    path: Path, rope: dict[str, Any], *, max_length: int
) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None

    def number(key: str, default: float | None = None) -> float:
        value = rope.get(key) or default
        if value is None:
            raise ValueError(f"{path}: {kind} rotary scaling lacks {key!r}: {rope}")
        return float(value)

    original = int(number("original_max_position_embeddings", max_length))
    if kind == "linear":
        return LinearScaling(factor=number("factor"))
    if kind == "llama3":
        return Llama3Scaling(
            factor=number("factor"),
            low_freq_factor=number("low_freq_factor"),
            high_freq_factor=number("high_freq_factor"),
            original_max_length=original,
        )
    if kind == "yarn" and not {"mscale", "mscale_all_dim"} & rope.keys():
        return YarnScaling(
            factor=number("factor"),
            original_max_length=original,
            beta_fast=number("beta_fast", 32),
            beta_slow=number("beta_slow", 1),
            attention_factor=rope.get("attention_factor"),
            truncate=bool(rope.get("truncate", True)),
        )
    raise ValueError(
        f"{path} scales its rotary embedding by {rope}; supported are the types "
        "default, linear, llama3, and yarn without mscale"
    )
