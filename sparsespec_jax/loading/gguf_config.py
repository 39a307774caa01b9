"""What a GGUF file's metadata mean, and which are refused.

The rule: a key under the architecture's prefix is read, or known to leave the model's
numbers alone, or refused by name unless its value is 0 or false (a feature that is
off). What a key means is what llama.cpp makes of it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from sparsespec_jax.loading.gguf_file import GgufFile
from sparsespec_jax.models.config import (
    LinearScaling,
    Llama3Scaling,
    ModelConfig,
    RopeScaling,
    YarnScaling,
)
from sparsespec_jax.models.fields import Fields, read_heads, shown
from sparsespec_jax.models.rope import inverse_frequencies

ARCHITECTURES = ("llama", "qwen2", "qwen3")
ROPE_FACTORS = "rope_freqs.weight"

_READ = frozenset(
    """vocab_size context_length embedding_length feed_forward_length block_count
    attention.head_count attention.head_count_kv attention.key_length
    attention.value_length attention.layer_norm_rms_epsilon attention.sliding_window
    rope.dimension_count rope.freq_base rope.scale_linear rope.scaling.type
    rope.scaling.factor rope.scaling.original_context_length
    rope.scaling.yarn_beta_fast rope.scaling.yarn_beta_slow""".split()
)
# How the file came to be, and what embeddings of whole texts are made of.
_HARMLESS = frozenset(("tensor_data_layout", "rope.scaling.finetuned", "pooling_type"))
# Values that ask for nothing beyond what the model does anyway. For attention.causal
# false would be something, so the rule for unknown keys does not fit.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "rope.scaling.attn_factor": (1,),
    "rope.scaling.yarn_ext_factor": (1, -1),
    "logit_scale": (0, 1),
    "embedding_scale": (0, 1),
    "residual_scale": (0, 1),
}
# Special tokens that end a text or a turn, under the names that models give them.
# llama.cpp stops at them too, whether or not the metadata name them; beside them it
# stops at separators of files and repositories, which are text of code models.
_END_TOKENS = frozenset(
    """<|endoftext|> <|end_of_text|> <|eot_id|> <|eom_id|> <|im_end|> <|end|>
    <|return|> <|call|> <end_of_turn> <end_of_utterance> <EOT> _<EOT> [EOT] [EOS]
    <eos> </s>""".split()
)
_CONTROL = 3  # the token type of special tokens


def gguf_config(file: GgufFile) -> ModelConfig:
    """The model configuration that a file's metadata and tensors describe.

    Raises:
        ValueError: metadata are missing, of a wrong type, out of range or not
            understood; the message names file and key.
    """
    arch = file.fields.get("general.architecture")
    if arch not in ARCHITECTURES:
        raise ValueError(
            f"{file.path} is of architecture {shown(arch)}; supported are "
            f"{', '.join(ARCHITECTURES)}"
        )
    start = f"{arch}."
    values = {
        key.removeprefix(start): value
        for key, value in file.fields.values.items()
        if key.startswith(start)
    }
    fields = Fields(file.path, values, prefix=start)
    _refuse_unknown(fields)
    for key in file.fields.values:
        if key.partition(".")[2] in _READ and not key.startswith(start):
            raise file.fields.refusal(key, f"under the prefix {start!r} or absent")
    heads = read_heads(
        fields,
        hidden="embedding_length",
        heads="attention.head_count",
        kv_heads="attention.head_count_kv",
        head_dim="attention.key_length",
    )
    max_length = fields.size("context_length")
    _refuse_other_laws(fields, head_dim=heads["head_dim"], max_length=max_length)
    theta = fields.number("rope.freq_base", 10_000.0)
    if theta <= 1:
        raise fields.refusal("rope.freq_base", "above 1")
    vocab_size = _vocab_size(file, fields)
    return ModelConfig(
        vocab_size=vocab_size,
        intermediate_size=fields.size("feed_forward_length"),
        num_layers=_num_layers(file, fields),
        **heads,
        rope_theta=theta,
        rope_scaling=_rope_scaling(
            file, fields, theta=theta, head_dim=heads["head_dim"], max_length=max_length
        ),
        # Stored in float32: 1e-5 comes back as 9.999999747e-06.
        norm_eps=float(f"{fields.number('attention.layer_norm_rms_epsilon'):.6g}"),
        max_length=max_length,
        tie_embeddings="output.weight" not in file.tensors,
        qk_norm="blk.0.attn_q_norm.weight" in file.tensors,
        attention_bias="blk.0.attn_q.bias" in file.tensors,
        attention_out_bias="blk.0.attn_output.bias" in file.tensors,
        mlp_bias="blk.0.ffn_gate.bias" in file.tensors,
        bos_id=file.fields.size("tokenizer.ggml.bos_token_id", None, least=0),
        eos_ids=_eos_ids(file.fields, vocab_size),
        family=arch,
    )


def _refuse_unknown(fields: Fields) -> None:
    unknown = [
        f"{fields.name(key)} = {shown(value)}"
        for key, value in fields.values.items()
        if key not in _READ | _HARMLESS and value not in _NEUTRAL.get(key, (0, False))
    ]
    if unknown:
        raise ValueError(
            f"{fields.path} has {', '.join(unknown[:4])}, which this loader does not "
            "know or support and which may change the model's numbers; load the "
            "model's own directory, or another file"
        )


def _refuse_other_laws(fields: Fields, *, head_dim: int, max_length: int) -> None:
    window = fields.size("attention.sliding_window", 0, least=0)
    if 0 < window < max_length:
        raise ValueError(
            f"{fields.path} asks for sliding-window attention "
            f"({fields.name('attention.sliding_window')} = {window} of {max_length} "
            "tokens), which is not supported: full attention would change its output"
        )
    if fields.size("rope.dimension_count", head_dim) != head_dim:
        raise fields.refusal(
            "rope.dimension_count", f"{head_dim}: only whole heads can be rotated"
        )
    if fields.size("attention.value_length", head_dim) != head_dim:
        raise fields.refusal(
            "attention.value_length", f"{head_dim}, the length of the keys"
        )


def _vocab_size(file: GgufFile, fields: Fields) -> int:
    """Rows of the embedding, which every account of the vocabulary must agree with."""
    if (table := file.tensors.get("token_embd.weight")) is None:
        raise ValueError(f"{file.path} lacks the tensor token_embd.weight")
    rows = table.shape[0]
    if fields.size("vocab_size", rows) != rows:
        raise fields.refusal("vocab_size", f"{rows}, the rows of token_embd.weight")
    return rows


def _num_layers(file: GgufFile, fields: Fields) -> int:
    found = {name.split(".")[1] for name in file.tensors if name.startswith("blk.")}
    if fields.size("block_count") > len(found):
        raise fields.refusal("block_count", f"{len(found)}, the layers in the file")
    return fields.size("block_count")


def _eos_ids(fields: Fields, vocab_size: int) -> tuple[int, ...]:
    """Ids that the metadata name as ends, then special tokens with a name of an end."""
    prefix = "tokenizer.ggml."
    ids: tuple[int, ...] = ()
    for name in ("eos", "eot", "eom"):
        ids += fields.token_ids(f"{prefix}{name}_token_id", vocab_size=vocab_size)
    tokens = fields.get(f"{prefix}tokens", [])
    kinds = fields.get(f"{prefix}token_type", [])
    if isinstance(tokens, list) and isinstance(kinds, list):
        for index, (token, kind) in enumerate(zip(tokens, kinds, strict=False)):
            if kind == _CONTROL and token in _END_TOKENS and index < vocab_size:
                ids += (index,)
    return tuple(dict.fromkeys(ids))


def _rope_scaling(
    file: GgufFile, fields: Fields, *, theta: float, head_dim: int, max_length: int
) -> RopeScaling | None:
    """The scaling; a factor without a type is linear, also under its older name."""
    kind = fields.get("rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn"):
        raise fields.refusal("rope.scaling.type", "'none', 'linear' or 'yarn'")
    factor = fields.number("rope.scale_linear", 1.0)
    factor = fields.number("rope.scaling.factor", factor)
    if ROPE_FACTORS in file.tensors:
        if kind == "yarn" or factor != 1:
            raise ValueError(
                f"{file.path} scales its rotary embedding by {ROPE_FACTORS} and by "
                f"{fields.name('rope.scaling')}, which is not supported together"
            )
        return _llama3_from_factors(file, theta=theta, head_dim=head_dim)
    if kind == "none" or factor == 1:
        return None
    if kind == "linear":
        return LinearScaling(factor=factor)
    fast = fields.number("rope.scaling.yarn_beta_fast", 32.0)
    slow = fields.number("rope.scaling.yarn_beta_slow", 1.0)
    if fast < slow:
        raise fields.refusal("rope.scaling.yarn_beta_fast", f"at least {slow}")
    return YarnScaling(
        factor=factor,
        original_max_length=fields.size(
            "rope.scaling.original_context_length", max_length
        ),
        beta_fast=fast,
        beta_slow=slow,
    )


def _llama3_from_factors(
    file: GgufFile, *, theta: float, head_dim: int
) -> Llama3Scaling:
    """The Llama 3 rule whose frequency divisors the file stores as a table."""
    table = file.tensor(ROPE_FACTORS).reshape(-1)
    sizes = "vocab_size hidden_size intermediate_size num_layers num_heads num_kv_heads"
    ones = dict.fromkeys([*sizes.split(), "max_length"], 1)
    probe = ModelConfig(**ones, head_dim=head_dim, rope_theta=theta)
    factor = float(np.round(table.max(initial=0), 3))
    scaling = Llama3Scaling(
        factor=factor if np.isfinite(factor) and factor >= 1 else 1.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_length=8192,
    )
    scaled = dataclasses.replace(probe, rope_scaling=scaling)
    divisors = inverse_frequencies(probe) / inverse_frequencies(scaled)
    if table.shape != divisors.shape or not np.allclose(table, divisors, rtol=1e-3):
        raise ValueError(
            f"{file.path}: {ROPE_FACTORS} {table[:4]}... is not the table of Llama "
            f"3.1 to 3.3 ({divisors[:4]}...); load the original checkpoint instead"
        )
    return scaling
