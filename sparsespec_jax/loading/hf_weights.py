"""Models in Hugging Face directories: config.json and safetensors, without torch."""

from __future__ import annotations

import dataclasses
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open

from sparsespec_jax.loading.hf_config import hf_config
from sparsespec_jax.loading.weights import (
    assemble,
    layer_shapes,
    outer_shapes,
    require_names,
)
from sparsespec_jax.models.config import ModelConfig
from sparsespec_jax.models.fields import Fields, read_object
from sparsespec_jax.models.transformer import Params

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

_DTYPES = ("F16", "BF16", "F32", "F64")
_COMPARED_ROWS = 4096
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


def load_hf(
    directory: str | Path, *, dtype, mesh: Mesh | None = None
) -> tuple[ModelConfig, Params]:
    """Configuration and parameters of a directory, the weights cast to dtype.

    They are on the default device, or each part on its device of a mesh.

    Tensors are F16, BF16, F32 or F64; F64 is rounded to float32 first. A head that
    differs from the embedding is used though the configuration says that they are
    tied, as transformers does.

    Raises:
        ValueError: a file is missing or damaged, a tensor is missing, unexpected or
            of another shape or type, or the configuration asks for what is not
            supported.
    """
    directory = Path(directory)
    config = hf_config(directory)
    if (adapter := directory / "adapter_config.json").exists():
        raise ValueError(
            f"{adapter}: adapters are not supported; merge it into the model first"
        )
    tensors = _Tensors(directory)
    if config.tie_embeddings and not tensors.same(_OUTER["embed"], _OUTER["lm_head"]):
        config = dataclasses.replace(config, tie_embeddings=False)
    expected = {_OUTER[name] for name in outer_shapes(config)}
    for layer in range(tensors.num_layers(config)):
        expected |= {_layer_name(name, layer) for name in layer_shapes(config)}
    present = set(tensors.homes)
    if config.tie_embeddings:
        present -= {_OUTER["lm_head"]}  # a copy written out
    require_names(str(directory), expected=expected, present=present)

    def read(name: str, layer: int | None) -> tuple[np.ndarray, str]:
        return tensors.read(_OUTER[name] if layer is None else _layer_name(name, layer))

    return config, assemble(config, read, dtype=dtype, mesh=mesh)


def _layer_name(name: str, layer: int) -> str:
    return f"model.layers.{layer}.{_LAYER[name]}"


class _Tensors:
    """The tensors of a directory's safetensors files, read on demand.

    ``homes`` has the file of each tensor but those that hold no weights (stored
    rotary frequencies).
    """

    def __init__(self, directory: Path):
        self._directory = directory
        homes = _tensor_files(directory)
        self._shards = {path: _open(path) for path in sorted({*homes.values()})}
        _require_listed(directory, homes, self._shards)
        self.homes = {name: homes[name] for name in homes if _is_weight(name)}

    def num_layers(self, config: ModelConfig) -> int:
        """The configuration's number of layers, after a look at what is there."""
        found = {name.split(".")[2] for name in self.homes if ".layers." in name}
        if config.num_layers > len(found):
            raise ValueError(
                f"{self._directory / 'config.json'}: num_hidden_layers is "
                f"{config.num_layers}, but the weights have {len(found)} layers"
            )
        return config.num_layers

    def read(self, name: str) -> tuple[np.ndarray, str]:
        """A tensor as it is stored (F64 in float32), and where it came from."""
        origin = f"{self.homes[name]}: tensor {name}"
        shard = self._shards[self.homes[name]]
        stored = shard.get_slice(name).get_dtype()
        if stored not in _DTYPES:
            raise ValueError(
                f"{origin} is of type {stored}; supported are {', '.join(_DTYPES)}. "
                "Quantised weights are not: use the model in bfloat16, or a GGUF file"
            )
        array = shard.get_tensor(name)
        return array.astype(np.float32) if stored == "F64" else array, origin

    def same(self, left: str, right: str) -> bool:
        """Whether right is not there, or holds the values of left."""
        if not {left, right} <= self.homes.keys():
            return True
        (one, _), (other, _) = self.read(left), self.read(right)
        if one.shape != other.shape:
            return False
        rows = range(0, len(one), _COMPARED_ROWS)
        return all(
            np.array_equal(
                one[row : row + _COMPARED_ROWS].astype(np.float32),
                other[row : row + _COMPARED_ROWS].astype(np.float32),
            )
            for row in rows
        )


def _is_weight(name: str) -> bool:
    return not name.endswith("rotary_emb.inv_freq")


def _tensor_files(directory: Path) -> dict[str, Path]:
    """The file that holds each tensor, by tensor name."""
    if (single := directory / _SINGLE).is_file():
        return dict.fromkeys(_open(single).keys(), single)
    if not (index := directory / _INDEX).is_file():
        raise ValueError(
            f"{directory} holds neither {_SINGLE} nor {_INDEX}; weights in other "
            "formats (.bin, .pth) must be converted to safetensors first, and a GGUF "
            "file is given by its own path"
        )
    weight_map = Fields(index, read_object(index)).within("weight_map")
    if weight_map is None:
        raise ValueError(f"{index} lacks weight_map, the files of its tensors")
    homes = weight_map.values
    for name, shard in homes.items():
        is_name = isinstance(shard, str) and Path(shard).name == shard
        if not is_name or not shard.endswith(".safetensors"):
            raise weight_map.refusal(
                name, f"the name of a .safetensors file in {directory}"
            )
    missing = sorted(
        name for name in set(homes.values()) if not (directory / name).is_file()
    )
    if missing:
        raise ValueError(
            f"{index} names {len(missing)} shard(s) that are not there: "
            f"{', '.join(missing[:4])}; fetch them into {directory}"
        )
    return {name: directory / shard for name, shard in homes.items()}


def _require_listed(
    directory: Path, homes: dict[str, Path], shards: dict[Path, Any]
) -> None:
    """Raise unless the shards hold exactly what the index says they do."""
    for path, shard in shards.items():
        held = set(shard.keys())
        listed = {name for name, home in homes.items() if home == path}
        if wrong := sorted(filter(_is_weight, held ^ listed)):
            name = wrong[0]
            fault = "is in it but listed elsewhere or not at all"
            if name in listed:
                fault = "cannot be read: it is not in it, though the index says so"
            raise ValueError(
                f"{path}: tensor {name} {fault}; {directory / _INDEX} and the shards "
                "are of different models: fetch both again"
            )


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} cannot be read as safetensors: {_damage(path, error)}; fetch it "
            "again"
        ) from error


def _damage(path: Path, error: Exception) -> str:
    """Where the header's own account of the file and the file part ways."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            header = json.loads(file.read(length)) if 8 + length <= size else {}
        header.pop("__metadata__", None)
        ends = {8 + length + t["data_offsets"][1]: name for name, t in header.items()}
        cut = min(end for end in ends if end > size)
    except Exception:  # the header is damaged too, in one of many ways
        return f"{error} (the file has {size} bytes)"
    return (
        f"it is truncated: it has {size} bytes of {max(ends)}, and tensor "
        f"{ends[cut]} ends at byte {cut}"
    )
