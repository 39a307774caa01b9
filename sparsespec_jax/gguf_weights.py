"""Models in GGUF files: configuration, dequantised weights, tokenizer.

Three things differ from the checkpoints that these files were made from. Q and K
rows of the ``llama`` architecture are stored with rotary pairs side by side (other
architectures keep them half a head apart, as we do). Every tensor has a quantisation
of its own. And the vocabulary comes with a mere name for its pre-tokenizer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

from sparsespec_jax.model import Params
from sparsespec_jax.model_config import (
    LinearScaling,
    Llama3Scaling,
    ModelConfig,
    RopeScaling,
    YarnScaling,
)
from sparsespec_jax.rope import inverse_frequencies
from sparsespec_jax.tokenizer import Tokenizer, tokenizer_from_vocabulary
from sparsespec_jax.weights import (
    assemble,
    layer_shapes,
    outer_shapes,
    require_names,
)

ARCHITECTURES = ("llama", "qwen2", "qwen3")

_OUTER = {
    "embed": "token_embd.weight",
    "final_norm": "output_norm.weight",
    "lm_head": "output.weight",
}
_LAYER = {
    "input_norm": "attn_norm.weight",
    "mlp_norm": "ffn_norm.weight",
    "q": "attn_q.weight",
    "k": "attn_k.weight",
    "v": "attn_v.weight",
    "out": "attn_output.weight",
    "gate": "ffn_gate.weight",
    "up": "ffn_up.weight",
    "down": "ffn_down.weight",
    "q_norm": "attn_q_norm.weight",
    "k_norm": "attn_k_norm.weight",
    "q_bias": "attn_q.bias",
    "k_bias": "attn_k.bias",
    "v_bias": "attn_v.bias",
    "out_bias": "attn_output.bias",
    "gate_bias": "ffn_gate.bias",
    "up_bias": "ffn_up.bias",
    "down_bias": "ffn_down.bias",
}
_ROPE_FACTORS = "rope_freqs.weight"
_REQUIRED = object()


class GgufFile:
    """An open GGUF file: metadata by key and tensors by name, read on demand.

    Raises:
        ValueError: the file is not GGUF, or shorter than its own index says.
    """

    def __init__(self, path: str | Path):
        """Map the file and parse its index."""
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"there is no GGUF file at {self.path}")
        try:
            self._reader = gguf.GGUFReader(self.path)
        except (ValueError, IndexError, KeyError) as error:
            raise ValueError(
                f"{self.path} cannot be read as GGUF: it is truncated or damaged "
                f"({self.path.stat().st_size} bytes; {error}); fetch it again"
            ) from error
        self.tensors = {tensor.name: tensor for tensor in self._reader.tensors}

    def get(self, key: str, default: Any = _REQUIRED) -> Any:
        """Metadata value of key, a plain Python value or list."""
        field = self._reader.get_field(key)
        if field is not None:
            return field.contents()
        if default is _REQUIRED:
            raise ValueError(f"{self.path} has no metadata {key!r}, which is required")
        return default

    def tensor(self, name: str) -> np.ndarray:
        """The tensor in float32, dequantised, in [out, in] order."""
        tensor = self.tensors[name]
        try:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise ValueError(
                f"{self.path}: tensor {name} is of type {tensor.tensor_type.name}, "
                "which the gguf package cannot dequantise; use a file quantised "
                "otherwise (Q4_1, Q8_0, Q4_K, BF16, ...)"
            ) from error
        return np.asarray(values, np.float32)


def load_gguf(file: GgufFile, *, dtype) -> tuple[ModelConfig, Params]:
    """Configuration and parameters of an open file, the weights cast to dtype.

    Raises:
        ValueError: the architecture is unknown, a tensor is missing, unexpected or
            of another shape, or the metadata ask for what the model cannot do.
    """
    config = gguf_config(file)
    # Only this architecture's files pair neighbouring elements in the rotation.
    heads = {"q": config.num_heads, "k": config.num_kv_heads}
    interleaved = heads if file.get("general.architecture") == "llama" else {}

    expected = {_OUTER[name] for name in outer_shapes(config)}
    for layer in range(config.num_layers):
        expected |= {f"blk.{layer}.{_LAYER[name]}" for name in layer_shapes(config)}
    present = set(file.tensors) - {_ROPE_FACTORS}
    require_names(str(file.path), expected=expected, present=present)

    def read(name: str, layer: int | None) -> tuple[np.ndarray, str]:
        stored = _OUTER[name] if layer is None else f"blk.{layer}.{_LAYER[name]}"
        values = file.tensor(stored)
        num_heads = interleaved.get(name.removesuffix("_bias"))
        if num_heads and values.shape[0] % (2 * num_heads) == 0:
            values = _halves_apart(values, num_heads)
        return values, f"{file.path}: tensor {stored}"

    return config, assemble(config, read, dtype=dtype)


def _halves_apart(values: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows (pair, half) of each head reordered to (half, pair)."""
    split = values.reshape(num_heads, -1, 2, *values.shape[1:])
    return split.swapaxes(1, 2).reshape(values.shape)


def gguf_config(file: GgufFile) -> ModelConfig:
    """The model configuration that a file's metadata and tensors describe."""
    arch = file.get("general.architecture")
    if arch not in ARCHITECTURES:
        raise ValueError(
            f"{file.path} is of architecture {arch!r}; supported are "
            f"{', '.join(ARCHITECTURES)}"
        )

    def get(key: str, default: Any = _REQUIRED) -> Any:
        return file.get(f"{arch}.{key}", default)

    hidden, num_heads = get("embedding_length"), get("attention.head_count")
    head_dim = get("attention.key_length", hidden // num_heads)
    max_length = get("context_length")
    _refuse_other_laws(file, get, head_dim=head_dim, max_length=max_length)
    if "token_embd.weight" not in file.tensors:
        raise ValueError(f"{file.path} lacks the tensor token_embd.weight")
    theta = float(get("rope.freq_base", 10_000.0))
    return ModelConfig(
        vocab_size=int(file.tensors["token_embd.weight"].shape[1]),
        hidden_size=hidden,
        intermediate_size=get("feed_forward_length"),
        num_layers=get("block_count"),
        num_heads=num_heads,
        num_kv_heads=get("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        rope_theta=theta,
        rope_scaling=_rope_scaling(file, get, theta=theta, head_dim=head_dim),
        # Stored in float32: 1e-5 comes back as 9.999999747e-06.
        norm_eps=float(f"{get('attention.layer_norm_rms_epsilon'):.6g}"),
        max_length=max_length,
        tie_embeddings="output.weight" not in file.tensors,
        qk_norm="blk.0.attn_q_norm.weight" in file.tensors,
        attention_bias="blk.0.attn_q.bias" in file.tensors,
        attention_out_bias="blk.0.attn_output.bias" in file.tensors,
        mlp_bias="blk.0.ffn_gate.bias" in file.tensors,
        bos_id=file.get("tokenizer.ggml.bos_token_id", None),
        eos_ids=_eos_ids(file),
        family=arch,
    )


def _eos_ids(file: GgufFile) -> tuple[int, ...]:
    keys = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
    ids = [file.get(key, None) for key in keys]
    return tuple(dict.fromkeys(i for i in ids if i is not None))


def _refuse_other_laws(file: GgufFile, get, *, head_dim: int, max_length: int) -> None:
    window = get("attention.sliding_window", None)
    if window and window < max_length:
        raise ValueError(
            f"{file.path} asks for sliding-window attention ({window} of {max_length} "
            "tokens), which is not supported: full attention would change its output"
        )
    rotated = get("rope.dimension_count", head_dim)
    if rotated != head_dim:
        raise ValueError(
            f"{file.path} rotates {rotated} of {head_dim} elements of a head; only "
            "rotation of whole heads is supported"
        )
    if get("attention.value_length", head_dim) != head_dim:
        raise ValueError(
            f"{file.path} has values of {get('attention.value_length')} elements and "
            f"keys of {head_dim}; they must be equal"
        )
    if get("expert_count", 0):
        raise ValueError(f"{file.path} is a mixture of experts, which is not supported")


def _rope_scaling(
    file: GgufFile, get, *, theta: float, head_dim: int
) -> RopeScaling | None:
    if _ROPE_FACTORS in file.tensors:
        return _llama3_from_factors(file, theta=theta, head_dim=head_dim)
    kind = get("rope.scaling.type", "none")
    if kind == "none":
        return None
    factor = float(get("rope.scaling.factor"))
    if kind == "linear":
        return LinearScaling(factor=factor)
    if kind == "yarn":
        original = get("rope.scaling.original_context_length")
        return YarnScaling(factor=factor, original_max_length=original)
    raise ValueError(
        f"{file.path} scales its rotary embedding by {kind!r}; supported are 'none', "
        "'linear', 'yarn', and the stored factors of Llama 3"
    )


def _llama3_from_factors(
    file: GgufFile, *, theta: float, head_dim: int
) -> Llama3Scaling:
    """The Llama 3 rule whose frequency divisors the file stores as a table."""
    table = file.tensor(_ROPE_FACTORS).reshape(-1)
    probe = ModelConfig(
        vocab_size=1,
        hidden_size=1,
        intermediate_size=1,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=head_dim,
        rope_theta=theta,
        max_length=1,
    )
    scaling = Llama3Scaling(
        factor=float(np.round(table.max(), 3)),
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_length=8192,
    )
    scaled = ModelConfig(**{**vars(probe), "rope_scaling": scaling})
    divisors = inverse_frequencies(probe) / inverse_frequencies(scaled)
    if table.shape != divisors.shape or not np.allclose(table, divisors, rtol=1e-3):
        raise ValueError(
            f"{file.path}: {_ROPE_FACTORS} {table[:4]}... is not the table of Llama "
            f"3.1 to 3.3 ({divisors[:4]}...); load the original checkpoint instead"
        )
    return scaling


def gguf_tokenizer(file: GgufFile) -> Tokenizer:
    """The tokenizer that a file's metadata describe, built with ``tokenizers``.

    Raises:
        ValueError: the file has no vocabulary, or one of an unsupported kind.
    """
    prefix = "tokenizer.ggml."
    if (kind := file.get(prefix + "model", None)) != "gpt2":
        raise ValueError(
            f"{file.path} has a tokenizer of kind {kind!r}; only byte-level BPE "
            "('gpt2') is supported: load the model's own directory instead, or pass "
            "token ids"
        )
    bos_id = file.get(prefix + "bos_token_id", None)
    pre_tokenizer = file.get(prefix + "pre", "default")
    # Files of Llama 3 may leave out that its texts start with BOS.
    add_bos = file.get(prefix + "add_bos_token", pre_tokenizer == "llama-bpe")
    return tokenizer_from_vocabulary(
        file.get(prefix + "tokens"),
        file.get(prefix + "merges"),
        token_types=file.get(prefix + "token_type"),
        pre_tokenizer=pre_tokenizer,
        bos_id=bos_id,
        add_bos=add_bos,
        eos_ids=_eos_ids(file),
        chat_template=file.get("tokenizer.chat_template", None),
    )
