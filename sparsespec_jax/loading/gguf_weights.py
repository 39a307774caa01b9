"""Models in GGUF files: configuration, dequantised weights, tokenizer.

Three things differ from the checkpoints that these files were made from. Q and K
rows of the ``llama`` architecture are stored with rotary pairs side by side (other
architectures keep them half a head apart, as we do). Every tensor has a quantisation
of its own. And the vocabulary comes with a mere name for its pre-tokenizer.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jax.sharding import Mesh

from sparsespec_jax.loading.gguf_config import ROPE_FACTORS
from sparsespec_jax.loading.gguf_file import GgufFile
from sparsespec_jax.loading.tokenizer import Tokenizer, tokenizer_from_vocabulary
from sparsespec_jax.loading.weights import (
    assemble,
    layer_shapes,
    outer_shapes,
    require_names,
)
from sparsespec_jax.models.config import ModelConfig
from sparsespec_jax.models.fields import Fields, shown
from sparsespec_jax.models.transformer import Params

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


def load_gguf(
    file: GgufFile, config: ModelConfig, *, dtype, mesh: Mesh | None = None
) -> Params:
    """Parameters of an open file with its configuration, cast to dtype.

    They are on the default device, or each part on its device of a mesh.

    A file without output.weight has a head tied to its embedding.

    Raises:
        ValueError: a tensor is missing, unexpected, or of another shape.
    """
    # Only this architecture's files pair neighbouring elements in the rotation.
    heads = {"q": config.num_heads, "k": config.num_kv_heads}
    interleaved = heads if file.fields.get("general.architecture") == "llama" else {}

    expected = {_OUTER[name] for name in outer_shapes(config)}
    for layer in range(config.num_layers):
        expected |= {f"blk.{layer}.{_LAYER[name]}" for name in layer_shapes(config)}
    present = set(file.tensors) - {ROPE_FACTORS}
    require_names(str(file.path), expected=expected, present=present)

    def read(name: str, layer: int | None) -> tuple[np.ndarray, str]:
        stored = _OUTER[name] if layer is None else f"blk.{layer}.{_LAYER[name]}"
        values = file.tensor(stored, dtype)
        num_heads = interleaved.get(name.removesuffix("_bias"))
        if num_heads and values.shape[0] % (2 * num_heads) == 0:
            values = _halves_apart(values, num_heads)
        return values, file.origin(stored)

    return assemble(config, read, dtype=dtype, mesh=mesh)


def _halves_apart(values: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows (pair, half) of each head reordered to (half, pair)."""
    split = values.reshape(num_heads, -1, 2, *values.shape[1:])
    return split.swapaxes(1, 2).reshape(values.shape)


_TOKENIZER = "tokenizer.ggml."


def gguf_tokenizer(file: GgufFile, config: ModelConfig) -> tuple[Tokenizer | None, str]:
    """The tokenizer that a file's metadata describe, or None and why there is none.

    There is none if the file has no vocabulary, or one of a kind that is not
    supported: such a model still decodes token ids.

    Raises:
        ValueError: the vocabulary is damaged or not that of the model.
    """
    fields = Fields(
        file.path,
        {
            key.removeprefix(_TOKENIZER): value
            for key, value in file.fields.values.items()
        },
        prefix=_TOKENIZER,
    )
    if (kind := fields.get("model", None)) != "gpt2":
        return None, (
            f"{file.path} has a tokenizer of kind {shown(kind)}; only byte-level BPE "
            "('gpt2') is supported: load the model's own directory instead"
        )
    vocabulary = _vocabulary(fields, config)
    pre_tokenizer = fields.get("pre", "default")
    # Files of Llama 3 may leave out that its texts start with BOS.
    add_bos = fields.flag("add_bos_token", pre_tokenizer == "llama-bpe")
    if add_bos and config.bos_id is None:
        raise fields.refusal("bos_token_id", "an id: add_bos_token is true")
    if fields.flag("add_eos_token", False):
        return None, (
            f"{file.path} asks for an end-of-text token behind every prompt "
            f"({fields.name('add_eos_token')}), which is not supported"
        )
    template = file.fields.get("tokenizer.chat_template", None)
    if not isinstance(template, str | None):
        raise file.fields.refusal("tokenizer.chat_template", "a text")
    try:
        tokenizer = tokenizer_from_vocabulary(
            **vocabulary,
            pre_tokenizer=pre_tokenizer,
            bos_id=config.bos_id,
            add_bos=add_bos,
            eos_ids=config.eos_ids,
            chat_template=template,
        )
    except ValueError as error:  # of a kind that is not supported
        return None, f"{file.path}: {error}"
    return tokenizer, ""


def _vocabulary(fields: Fields, config: ModelConfig) -> dict[str, Any]:
    """Tokens, their types and merges, after a look at whether they fit together."""
    tokens, kinds = fields.get("tokens"), fields.get("token_type")
    size = config.vocab_size
    if not _is_list(tokens, str) or len(tokens) != size:
        raise fields.refusal(
            "tokens", f"a list of {size} texts, one a row of the table"
        )
    if not _is_list(kinds, int) or len(kinds) != size:
        raise fields.refusal("token_type", f"a list of {size} integers, one a token")
    known = set(tokens)
    if len(known) < size:
        seen: set[str] = set()
        twin = next(t for t in tokens if t in seen or seen.add(t))
        raise ValueError(
            f"{fields.path}: {fields.name('tokens')} has {twin!r} more than once"
        )
    merges = fields.get("merges")
    if not _is_list(merges, str):
        raise fields.refusal("merges", "a list of texts")
    for merge in merges:
        # A space inside a token is spelled as another character, so one space splits.
        left, space, right = merge.partition(" ")
        if not space or not {left, right, left + right} <= known:
            raise ValueError(
                f"{fields.path}: {fields.name('merges')} has {merge!r}, which does not "
                "make a token of the vocabulary from two others; fetch the file again"
            )
    if config.bos_id is not None and config.bos_id >= size:
        raise fields.refusal("bos_token_id", f"below {size}")
    return {"tokens": tokens, "token_types": kinds, "merges": merges}


def _is_list(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(type(item) is kind for item in value)
