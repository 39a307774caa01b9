"""What the keys of a Hugging Face directory's config.json mean, and which are refused.

The rule: a key is read, or known to leave the model's numbers alone, or refused by
name unless its value is null or false (a feature that is off). What a key means is
what transformers 5 makes of it in these families.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparsespec_jax.loading.hf_rope import read_rope
from sparsespec_jax.models.config import ModelConfig
from sparsespec_jax.models.fields import Fields, read_heads, read_object, shown

_FAMILIES = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "MistralForCausalLM": "mistral",
}
ARCHITECTURES = tuple(_FAMILIES)

# What a family's config.json may leave out (the defaults of transformers).
_QWEN = {
    "max_position_embeddings": 32_768,
    "num_key_value_heads": 32,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "qwen2": _QWEN,
    "qwen3": _QWEN | {"head_dim": 128},
    "mistral": {
        "max_position_embeddings": 131_072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
}

_READ = frozenset(
    """architectures model_type vocab_size hidden_size intermediate_size
    num_hidden_layers num_attention_heads num_key_value_heads head_dim hidden_act
    max_position_embeddings original_max_position_embeddings rms_norm_eps rope_theta
    rope_scaling rope_parameters partial_rotary_factor sliding_window
    use_sliding_window max_window_layers layer_types tie_word_embeddings
    attention_bias mlp_bias bos_token_id eos_token_id""".split()
)
# Names and versions, training, the other special tokens, what forward passes return,
# and sampling defaults, which neither transformers 5 nor this package reads here.
_HARMLESS = frozenset(
    """transformers_version torch_dtype dtype name_or_path tokenizer_class
    transformers.js_config unsloth_version unsloth_fixed is_llama_config
    is_qwen2_config task_specific_params finetuning_task
    initializer_range attention_dropout hidden_dropout embd_pdrop attn_pdrop
    resid_pdrop classifier_dropout hidden_dropout_prob attention_probs_dropout_prob
    gradient_checkpointing neftune_noise_alpha pretraining_tp use_cache
    cache_implementation attn_implementation use_flash_attn use_flash_attention_2
    use_sdpa torchscript use_bfloat16 seq_length max_sequence_length model_max_length
    pad_token_id unk_token_id sep_token_id cls_token_id mask_token_id
    decoder_start_token_id id2label label2id num_labels problem_type
    output_attentions output_hidden_states return_dict use_return_dict output_scores
    return_dict_in_generate num_logits_to_keep logits_to_keep is_decoder
    max_length min_length max_new_tokens do_sample early_stopping num_beams
    num_beam_groups diversity_penalty temperature top_k top_p min_p typical_p
    repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences
    forced_bos_token_id forced_eos_token_id remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens""".split()
)
# Values that ask for nothing beyond what the model does anyway. For is_causal false
# would be something, so the rule for unknown keys does not fit.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "is_causal": (True, None),
    "chunk_size_feed_forward": (0, None),
    "pruned_heads": ({}, [], None),
    "quantization_config": ({}, None),
}


def hf_config(directory: str | Path) -> ModelConfig:
    """The model configuration of a directory's config.json.

    Every key of it is understood as the module says. Of generation_config.json
    the end-of-text ids are read, which come on top as they do when transformers
    generates; its sampling defaults are not applied: a decode says its own law.

    Raises:
        ValueError: a file is missing or no JSON object, or a key is missing, of a wrong
            type, out of range, or not understood; the message names file and key.
    """
    path = Path(directory) / "config.json"
    raw = read_object(path)
    family = _family(Fields(path, raw))
    fields = Fields(path, _DEFAULTS[family] | raw)
    _refuse_unknown(fields)
    num_layers = fields.size("num_hidden_layers")
    max_length = fields.size("max_position_embeddings")
    _require_full_attention(fields, family, num_layers, max_length)
    rope_theta, rope_scaling = read_rope(fields, max_length=max_length)
    vocab_size = fields.size("vocab_size")
    return ModelConfig(
        vocab_size=vocab_size,
        intermediate_size=fields.size("intermediate_size"),
        num_layers=num_layers,
        **read_heads(
            fields,
            hidden="hidden_size",
            heads="num_attention_heads",
            kv_heads="num_key_value_heads",
            head_dim="head_dim",
        ),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        max_length=max_length,
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        qk_norm=family == "qwen3",
        **_biases(fields, family),
        bos_id=fields.size("bos_token_id", None, least=0),
        eos_ids=_eos_ids(fields, vocab_size),
        family=family,
    )


def _family(fields: Fields) -> str:
    """The one family that all named architectures are of."""
    names = fields.get("architectures", None) or []
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise fields.refusal("architectures", "a list of names")
    families = {_FAMILIES.get(name) for name in names}
    if len(families) != 1 or None in families:
        raise ValueError(
            f"{fields.path}: architectures names the architecture "
            f"{', '.join(names) or 'unknown'}; supported are {', '.join(ARCHITECTURES)}"
        )
    family = families.pop()
    if fields.get("model_type", None) not in (None, family):
        raise fields.refusal("model_type", f"{family!r}, as architectures says")
    return family


def _refuse_unknown(fields: Fields) -> None:
    """Refuse every key that could change the numbers and is not understood."""
    unknown = []
    for key, value in fields.values.items():
        if key in _NEUTRAL:
            known = any(type(value) is type(v) and value == v for v in _NEUTRAL[key])
        elif key == "auto_map":
            # Its model classes are code of the directory's own, which is not run.
            known = isinstance(value, dict) and not any(
                name.startswith("AutoModel") for name in value
            )
        else:
            known = key in _READ | _HARMLESS or key.startswith("_")
            known = known or value is None or value is False
        if not known:
            unknown.append(f"{key} = {shown(value)}")
    if unknown:
        raise ValueError(
            f"{fields.path} has {', '.join(unknown[:4])}, which this loader does not "
            "know or support and which may change the model's numbers; use a model "
            "without it, or remove the key if you know that it does not (quantised "
            "weights: use the model in bfloat16, or a GGUF file)"
        )
    if fields.get("hidden_act", "silu") not in ("silu", "swish"):
        raise fields.refusal("hidden_act", "'silu', the only one supported")


def _biases(fields: Fields, family: str) -> dict[str, bool]:
    """Which projections have a bias.

    One flag means q, k, v and o in Llama and Qwen3. Qwen2 always has those of q, k and
    v and never that of o, whatever the flag says; Mistral has none.
    """
    attention = fields.flag("attention_bias", False)
    mlp = fields.flag("mlp_bias", False)
    if attention and family == "mistral":
        raise fields.refusal("attention_bias", f"false in the {family} family")
    if mlp and family != "llama":
        raise fields.refusal("mlp_bias", f"false in the {family} family")
    return {
        "attention_bias": attention or family == "qwen2",
        "attention_out_bias": attention and family != "qwen2",
        "mlp_bias": mlp,
    }


def _require_full_attention(
    fields: Fields, family: str, num_layers: int, max_length: int
) -> None:
    """Refuse layers that would not see all of max_length tokens."""
    is_qwen = family in ("qwen2", "qwen3")
    window = fields.size("sliding_window", None)
    # Qwen writes a window into its files that another key turns off. Mistral models
    # do not read that key.
    if family != "mistral" and not fields.flag("use_sliding_window", not is_qwen):
        window = None
    types = fields.get("layer_types", None)
    if types is not None:
        is_list = isinstance(types, list) and all(isinstance(t, str) for t in types)
        other = {*types} - {"full_attention"} if is_list else {"?"}
        allowed = {"sliding_attention"} if window is not None else set()
        if other - allowed:
            raise fields.refusal("layer_types", "a list of 'full_attention' only")
        if len(types) != num_layers:
            raise fields.refusal("layer_types", f"of {num_layers} layers")
    if is_qwen and window is not None:
        first = fields.size("max_window_layers", least=0)
        windowed = first < num_layers if types is None else len({*types}) > 1
        window = window if windowed else None
    if window is not None and window < max_length:
        raise ValueError(
            f"{fields.path} asks for sliding-window attention (sliding_window = "
            f"{window}) over up to {max_length} tokens, which is not supported: full "
            "attention would change its output. Up to the window it changes nothing: "
            f"to use only that, set max_position_embeddings to {window}"
        )


def _eos_ids(fields: Fields, vocab_size: int) -> tuple[int, ...]:
    """End-of-text ids of generation_config.json, if there is one, and of fields."""
    path = fields.path.parent / "generation_config.json"
    first = Fields(path, read_object(path) if path.exists() else {})
    both = [f.token_ids("eos_token_id", vocab_size=vocab_size) for f in (first, fields)]
    return tuple(dict.fromkeys(both[0] + both[1]))
