"""Model files with one thing changed: the meaning of the change, or its name.

Each case mutates one file of a small golden checkpoint. What is expected of it was
compared with transformers 5.23 (config.json) and llama.cpp (GGUF metadata): the model
is the same as before, or differs by a given change of its configuration, or the file
is refused in one line that names what is wrong. Nothing is ignored, and nothing but
ValueError is raised.
"""

import dataclasses
import functools
import hashlib
import json
import random
import shutil
import struct
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsespec_jax.loading.gguf_config import gguf_config
from sparsespec_jax.loading.gguf_file import GgufFile
from sparsespec_jax.loading.gguf_weights import gguf_tokenizer
from sparsespec_jax.loading.hf_config import hf_config
from sparsespec_jax.loading.load import load_model
from sparsespec_jax.loading.tokenizer import tokenizer_from_directory
from sparsespec_jax.models.config import LinearScaling, Llama3Scaling, YarnScaling
from tests.model_files import (
    ABSENT,
    GOLDENS,
    VOCABULARY,
    edit_json,
    golden_logits_error,
    write_gguf,
)

BASES = ("llama3_rope", "llama_biases_linear_rope", "qwen2", "qwen3", "mistral")
SAME: dict[str, Any] = {}


class Case(NamedTuple):
    """A change of config.json: key -> value, and what becomes of the model."""

    name: str
    base: str
    change: dict[str, Any]
    expected: dict[str, Any] | str  # fields of ModelConfig, or what a refusal names


def spread(kind, changes, expected, bases=BASES):
    """One case per change, over bases in a fixed shuffled order."""
    order = random.Random(kind).sample(bases, len(bases))
    for number, change in enumerate(changes):
        base = order[number % len(order)]
        (key, value), *_ = change.items()
        what = expected(key) if callable(expected) else expected
        yield Case(f"{kind}-{number}-{key}", base, change, what)


# --- config.json

HARMLESS = {
    "_name_or_path": "someone/model",
    "_attn_implementation_autoset": True,
    "transformers_version": "4.31.0.dev0",
    "torch_dtype": "float16",
    "dtype": "float32",
    "unsloth_version": "2025.1.1",
    "unsloth_fixed": True,
    "is_llama_config": True,
    "transformers.js_config": {"dtype": "q4"},
    "initializer_range": 0.5,
    "attention_dropout": 0.5,
    "hidden_dropout": 0.1,
    "resid_pdrop": 0.1,
    "pretraining_tp": 2,
    "gradient_checkpointing": True,
    "neftune_noise_alpha": 5,
    "use_cache": False,
    "attn_implementation": "sdpa",
    "pad_token_id": -1,
    "unk_token_id": 0,
    "decoder_start_token_id": 1,
    "id2label": {"0": "a", "1": "b"},
    "label2id": {"a": 0, "b": 1},
    "output_hidden_states": True,
    "return_dict": False,
    "max_length": 20,
    "max_sequence_length": 2048,
    "do_sample": True,
    "temperature": 0.6,
    "top_k": 20,
    "top_p": 0.95,
    "repetition_penalty": 1.05,
    "suppress_tokens": [1],
    "tokenizer_class": "LlamaTokenizer",
    "task_specific_params": {"x": 1},
    "is_causal": True,
    "chunk_size_feed_forward": 0,
    "quantization_config": {},
    "auto_map": {"AutoConfig": "configuration.Config"},
    "rope_interleaved": False,
    "use_mrope": False,
    "final_logit_softcapping": None,
    "num_experts": None,
}
CHANGING = {
    "logit_scale": 0.5,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.1,
    "logits_scaling": 8,
    "rope_interleaved": True,
    "use_mrope": True,
    "is_causal": False,
    "qk_norm": True,
    "use_qk_norm": True,
    "qkv_bias": True,
    "alibi": True,
    "num_experts": 8,
    "num_local_experts": 8,
    "no_rope_layers": [0, 1],
    "dual_chunk_attention_config": {"chunk_size": 262144},
    "quantization_config": {"quant_method": "fp8"},
    "quantization": {"bits": 4, "group_size": 64},
    "auto_map": {"AutoModelForCausalLM": "modeling.Model"},
    "per_layer_config": {"0": {"num_attention_heads": 2}},
    "rotary_pct": 0.25,
    "layer_norm_eps": 1e-5,
    "num_nextn_predict_layers": 1,
    "mlp_only_layers": [0],
    "chunk_size_feed_forward": 4,
    "text_config": {"hidden_size": 32},
    "some_new_feature": "on",
}
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
NO_SIZES = ("576", 32.0, 2.5, True, -1, 0, None, 10**30, [32], {})
NO_NUMBERS = ("1e-5", 0, -1.0, True, [1], 1e999)
NO_FLAGS = ("true", 1, None, [])
NO_IDS = ("2", -1, 96, 2.0, True, [2, "3"], [[2]], {"id": 2}, 2**40)


def one_key_cases():
    yield from spread("harmless", [{k: v} for k, v in HARMLESS.items()], SAME)
    yield from spread("unknown", [{k: v} for k, v in CHANGING.items()], lambda key: key)
    for key in SIZES:
        changes = [{key: value} for value in NO_SIZES]
        yield from spread(f"size-{key}", changes, lambda key: key)
        if key != "max_position_embeddings":  # the families have defaults
            yield from spread(f"no-{key}", [{key: ABSENT}], key)
    changes = [{"num_key_value_heads": v} for v in NO_SIZES if v is not None] + [
        {"num_key_value_heads": 3, "num_attention_heads": 4, "hidden_size": 32},
        {"head_dim": 63},
        {"head_dim": "64"},
        {"head_dim": 0},
    ]
    yield from spread("heads", changes, lambda key: key)
    numbers = [{"rms_norm_eps": v} for v in (*NO_NUMBERS, None)]
    numbers += [{"rope_theta": v} for v in (*NO_NUMBERS, 0.5)]
    yield from spread("number", numbers, lambda key: key)
    flags = ("tie_word_embeddings", "attention_bias", "mlp_bias")
    changes = [{key: value} for key in flags for value in NO_FLAGS]
    yield from spread("flag", changes, lambda key: key)
    yield from spread("eos", [{"eos_token_id": v} for v in NO_IDS], lambda key: key)
    yield from spread(
        "bos", [{"bos_token_id": v} for v in ("1", 1.0, True, [1])], lambda key: key
    )


def value_cases():
    """Values that mean something else, or the same in other words."""
    for base in BASES:
        yield Case(
            f"eos-list-{base}", base, {"eos_token_id": [7, 2]}, {"eos_ids": (7, 2)}
        )
        yield Case(f"no-eos-{base}", base, {"eos_token_id": None}, {"eos_ids": ()})
    changed = (
        ("mistral", {"rms_norm_eps": 1}, {"norm_eps": 1.0}),
        ("mistral", {"rms_norm_eps": ABSENT}, SAME),
        ("mistral", {"bos_token_id": None}, {"bos_id": None}),
        ("mistral", {"hidden_act": "swish"}, SAME),
        ("mistral", {"hidden_act": ABSENT}, SAME),
        ("mistral", {"hidden_act": "gelu"}, "hidden_act"),
        ("qwen2", {"hidden_act": None}, "hidden_act"),
        ("mistral", {"model_type": ABSENT}, SAME),
        ("mistral", {"model_type": "llama"}, "model_type"),
        ("qwen2", {"model_type": 5}, "model_type"),
        ("llama3_rope", {"model_type": "mllama"}, "model_type"),
        ("llama3_rope", {"architectures": "LlamaForCausalLM"}, "architectures"),
        ("llama3_rope", {"architectures": [5]}, "architectures"),
        ("llama3_rope", {"architectures": []}, "architecture"),
        ("llama3_rope", {"architectures": ABSENT}, "architecture"),
        (
            "llama3_rope",
            {"architectures": ["LlamaForCausalLM", "MistralForCausalLM"]},
            "architecture",
        ),
        ("llama3_rope", {"architectures": ["GPT2LMHeadModel"]}, "architectures"),
        ("mistral", {"num_key_value_heads": None}, {"num_kv_heads": 4}),
        ("llama3_rope", {"num_key_value_heads": ABSENT}, {"num_kv_heads": 6}),
        ("qwen2", {"head_dim": ABSENT}, SAME),
        ("qwen2", {"head_dim": None}, SAME),
        ("llama3_rope", {"head_dim": ABSENT}, {"head_dim": 6}),
        ("mistral", {"max_position_embeddings": 8192}, {"max_length": 8192}),
        (
            "llama3_rope",
            {"max_position_embeddings": ABSENT},
            {"max_length": 2048},
        ),
        ("qwen2", {"max_position_embeddings": ABSENT}, {"max_length": 32_768}),
        ("mistral", {"max_position_embeddings": ABSENT}, {"max_length": 131_072}),
        ("mistral", {"tie_word_embeddings": ABSENT}, SAME),
        ("mistral", {"tie_word_embeddings": True}, {"tie_embeddings": True}),
        ("qwen2", {"attention_bias": False}, SAME),
        ("qwen2", {"attention_bias": True}, SAME),
        ("mistral", {"attention_bias": True}, "attention_bias"),
        ("mistral", {"mlp_bias": True}, "mlp_bias"),
        ("qwen3", {"mlp_bias": True}, "mlp_bias"),
        (
            "qwen3",
            {"attention_bias": True},
            {"attention_bias": True, "attention_out_bias": True},
        ),
        ("llama3_rope", {"mlp_bias": True}, {"mlp_bias": True}),
    )
    for number, (base, change, expected) in enumerate(changed):
        yield Case(f"value-{number}-{next(iter(change))}", base, change, expected)


def window_cases():
    full = ["full_attention"] * 2
    half = ["full_attention", "sliding_attention"]
    qwen, mistral, llama = ("qwen2", "qwen3"), ("mistral",), ("llama3_rope",)
    cases = (
        (qwen, {"sliding_window": 128, "use_sliding_window": ABSENT}, SAME),
        (qwen, {"sliding_window": 128, "use_sliding_window": True}, SAME),
        (
            qwen,
            {
                "sliding_window": 128,
                "use_sliding_window": True,
                "layer_types": ABSENT,
                "max_window_layers": 1,
            },
            "sliding_window",
        ),
        (
            qwen,
            {
                "sliding_window": ABSENT,
                "use_sliding_window": True,
                "layer_types": ABSENT,
                "max_window_layers": 0,
            },
            SAME,  # 4096 of 4096
        ),
        (
            qwen,
            {"sliding_window": 9, "use_sliding_window": True, "layer_types": half},
            "sliding_window",
        ),
        (qwen, {"layer_types": half}, "layer_types"),
        (qwen, {"layer_types": full + full}, "layer_types"),
        (qwen, {"layer_types": "full_attention"}, "layer_types"),
        (qwen, {"layer_types": ["full_attention", 5]}, "layer_types"),
        (qwen, {"layer_types": ["full_attention", "conv"]}, "layer_types"),
        (qwen, {"layer_types": None}, SAME),
        (qwen, {"use_sliding_window": None}, "use_sliding_window"),
        (qwen, {"use_sliding_window": 1}, "use_sliding_window"),
        (
            qwen,
            {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": "2"},
            "max_window_layers",
        ),
        (mistral, {"sliding_window": 4096}, SAME),
        (mistral, {"sliding_window": 5000}, SAME),
        (mistral, {"sliding_window": 4095}, "sliding_window"),
        (
            mistral,
            {"sliding_window": 128, "use_sliding_window": False},
            "sliding_window",
        ),
        (mistral, {"sliding_window": 128, "layer_types": full}, "sliding_window"),
        (mistral, {"sliding_window": "128"}, "sliding_window"),
        (mistral, {"sliding_window": 0}, "sliding_window"),
        (mistral, {"sliding_window": True}, "sliding_window"),
        (mistral, {"layer_types": full}, SAME),
        (llama, {"sliding_window": 128}, "sliding_window"),
        (llama, {"sliding_window": 128, "use_sliding_window": False}, SAME),
        (llama, {"layer_types": ["chunked_attention"] * 2}, "layer_types"),
    )
    for number, (bases, change, expected) in enumerate(cases):
        for base in bases:
            yield Case(f"window-{number}-{base}", base, change, expected)


LLAMA3 = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 64,
    "rope_type": "llama3",
}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 256,
    "rope_theta": 10_000.0,
}


def yarn(**changes):
    scaling = YarnScaling(factor=4.0, original_max_length=256)
    return {"rope_scaling": dataclasses.replace(scaling, **changes)}


def rope_cases():
    linear = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}
    two = {"rope_scaling": LinearScaling(factor=2.0)}
    plain = {"rope_type": "default", "rope_theta": 10_000.0}
    mscale = {"mscale": 1.0, "mscale_all_dim": 0.5}
    log = 0.1 * float(np.log(4))
    inner = (
        (linear, two),
        ({**linear, "factor": 4}, {"rope_scaling": LinearScaling(factor=4.0)}),
        ({**linear, "type": "linear"}, two),
        ({**linear, "type": "yarn"}, "type"),
        ({**linear, "original_max_position_embeddings": 64}, two),
        ({**linear, "partial_rotary_factor": 1.0}, two),
        ({**linear, "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({**plain, "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({**plain, "factor": 4.0}, "factor"),
        ({**plain, "factor": 1.0}, SAME),
        ({**plain, "rope_theta": 5e5}, {"rope_theta": 5e5}),
        ({**plain, "rope_theta": 500_000}, {"rope_theta": 5e5}),
        ({"rope_type": "default"}, SAME),
        ({"rope_theta": 5e5}, {"rope_theta": 5e5}),
        ({**plain, "mrope_section": [8, 8, 16]}, "mrope_section"),
        ({**plain, "rope_type": "dynamic", "factor": 2.0}, "dynamic"),
        ({**plain, "rope_type": "longrope", "short_factor": [1.0]}, "longrope"),
        ({**plain, "rope_type": 5}, "rope_type"),
        ({**plain, "rope_type": ["yarn"]}, "rope_type"),
        ({**linear, "factor": "2"}, "factor"),
        ({**linear, "factor": 0}, "factor"),
        ({**linear, "factor": -2.0}, "factor"),
        ({**linear, "factor": None}, "factor"),
        ({"rope_type": "linear"}, "factor"),
        ({**linear, "mscale": 1.0}, "mscale"),
        ({"full_attention": linear}, "layer_types"),
        (YARN, yarn()),
        ({**YARN, "original_max_position_embeddings": ABSENT}, None),
        (
            {**YARN, "beta_fast": 16, "beta_slow": 2},
            yarn(beta_fast=16.0, beta_slow=2.0),
        ),
        ({**YARN, "beta_fast": None}, yarn()),
        ({**YARN, "beta_fast": 0.5}, "beta_fast"),
        ({**YARN, "beta_fast": "32"}, "beta_fast"),
        ({**YARN, "truncate": False}, yarn(truncate=False)),
        ({**YARN, "truncate": "no"}, "truncate"),
        ({**YARN, "attention_factor": 1.2}, yarn(attention_factor=1.2)),
        ({**YARN, "attention_factor": 0}, "attention_factor"),
        ({**YARN, "attn_factor": 1.0}, yarn()),
        ({**YARN, "attn_factor": 0.878}, "attn_factor"),
        ({**YARN, "finetuned": True}, yarn()),
        ({**YARN, "mscale": 0.7}, yarn()),
        (
            {**YARN, **mscale},
            yarn(attention_factor=(log + 1) / (0.5 * log + 1)),
        ),
        ({**YARN, **mscale, "attention_factor": 1.2}, yarn(attention_factor=1.2)),
        ({**YARN, "mscale": "1", "mscale_all_dim": 1}, "mscale"),
        ({**YARN, "factor": 2**40, "low_freq_factor": 1}, "low_freq_factor"),
        ({**LLAMA3, "low_freq_factor": 4.0}, "low_freq_factor"),
        ({**LLAMA3, "original_max_position_embeddings": 64.5}, "original_max_position"),
        (
            LLAMA3,
            {
                "rope_scaling": Llama3Scaling(
                    factor=8.0,
                    low_freq_factor=1.0,
                    high_freq_factor=4.0,
                    original_max_length=64,
                )
            },
        ),
        ([linear], "rope_"),
        ("linear", "rope_"),
        (2.0, "rope_"),
        (None, SAME),
        ({}, SAME),
    )
    for number, (value, expected) in enumerate(inner):
        if isinstance(value, dict):
            value = {k: v for k, v in value.items() if v is not ABSENT}
        if expected is None:
            expected = yarn(original_max_length=4096)
        for key in ("rope_parameters", "rope_scaling"):
            change = {"rope_parameters": ABSENT} | {key: value}
            yield Case(f"{key}-{number}", "mistral", change, expected)
    by_type = (
        ({"full_attention": linear}, two),
        ({"full_attention": linear, "sliding_attention": plain}, two),
        ({"full_attention": linear, "sliding_attention": None}, two),
        ({"full_attention": {**linear, "partial_rotary_factor": 0.5}}, "partial"),
        ({"full_attention": linear, "rope_theta": 1e4}, "rope_theta"),
        ({"sliding_attention": linear}, "full_attention"),
        ({"full_attention": None}, "full_attention"),
        ({"full_attention": "linear"}, "full_attention"),
    )
    for number, (value, expected) in enumerate(by_type):
        change = {"rope_parameters": value}
        yield Case(f"rope-by-type-{number}", "qwen3", change, expected)
    pairs = (
        ({"rope_theta": 5e5}, "rope_theta"),
        ({"rope_theta": 10_000}, SAME),
        ({"rope_theta": 5e5, "rope_parameters": ABSENT}, {"rope_theta": 5e5}),
        ({"rope_parameters": ABSENT}, SAME),
        ({"rope_theta": 5e5, "rope_parameters": linear}, "rope_theta"),
        ({"rope_scaling": linear}, "rope_parameters and rope_scaling contradict"),
        ({"rope_scaling": plain}, SAME),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"partial_rotary_factor": 1}, SAME),
        ({"partial_rotary_factor": "1"}, "partial_rotary_factor"),
        (
            {"rope_parameters": YARN, "original_max_position_embeddings": 512},
            yarn(original_max_length=512),
        ),
        ({"original_max_position_embeddings": "512"}, "original_max_position"),
    )
    for number, (change, expected) in enumerate(pairs):
        yield Case(f"rope-pair-{number}", "mistral", change, expected)


CASES = [*one_key_cases(), *value_cases(), *window_cases(), *rope_cases()]


def write_config(folder, base, change):
    """The folder with the base's config.json, changed."""
    shutil.copy(GOLDENS / base / "config.json", folder)
    edit_json(folder / "config.json", change)
    return folder


def one_line(error, *names):
    """Whether a refusal is one line of bounded length that has the names in it."""
    text = str(error.value)
    return "\n" not in text and len(text) < 900 and all(name in text for name in names)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_changed_config(tmp_path, case):
    folder = write_config(tmp_path, case.base, case.change)
    if isinstance(case.expected, str):
        with pytest.raises(ValueError) as error:
            hf_config(folder)
        assert one_line(error, case.expected, "config.json")
    else:
        base = hf_config(GOLDENS / case.base)
        assert hf_config(folder) == dataclasses.replace(base, **case.expected)


# --- JSON files that are no JSON objects, and the other JSON files

NO_OBJECTS = (
    b"",
    b"null",
    b"[]",
    b"3",
    b'"x"',
    b"true",
    b'{"a": 1',
    b'{"vocab_size": NaN}',
    b'{"vocab_size": -Infinity}',
    b'{"vocab_size": 96, "vocab_size": 97}',
    b'{"vocab_size": ' + b"9" * 5000 + b"}",
    b"[" * 100_000,
    b'{"a": "\xff"}',
    b"\xef\xbb\xbf{}",
)
JSON_FILES = ("config.json", "generation_config.json", "model.safetensors.index.json")


@pytest.mark.parametrize("content", NO_OBJECTS, ids=lambda content: repr(content[:20]))
@pytest.mark.parametrize("name", JSON_FILES)
def test_a_file_that_is_no_json_object(tmp_path, name, content):
    folder = Path(shutil.copytree(GOLDENS / "mistral", tmp_path / "model"))
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError) as error:
        load_model(folder)
    assert one_line(error, name)


GENERATION = (
    ({}, (2,)),
    ({"eos_token_id": None}, (2,)),
    ({"eos_token_id": 7}, (7, 2)),
    ({"eos_token_id": [7, 2, 7]}, (7, 2)),
    ({"eos_token_id": list(range(20))}, tuple(range(20))),
    ({"temperature": 0.6, "top_p": 0.95, "do_sample": True}, (2,)),
    ({"suppress_tokens": [3], "bos_token_id": "x"}, (2,)),
    *(({"eos_token_id": value}, None) for value in NO_IDS),
)


@pytest.mark.parametrize(("content", "ids"), GENERATION)
def test_a_changed_generation_config(tmp_path, content, ids):
    folder = write_config(tmp_path, "qwen3", {})
    (folder / "generation_config.json").write_text(json.dumps(content))
    if ids is not None:
        assert hf_config(folder).eos_ids == ids
        return
    with pytest.raises(ValueError) as error:
        hf_config(folder)
    assert one_line(error, "generation_config.json: eos_token_id is")


# --- safetensors

UP = "model.layers.1.mlp.up_proj.weight"  # BF16 [48, 32] in the base
NORM = "model.norm.weight"


def retyped(kind, shape):
    return lambda header: header[UP].update(dtype=kind, shape=shape)


def renamed(old, new):
    return lambda header: header.update({new: header.pop(old)})


def swapped(header):
    """Two tensors of one shape trade places: other numbers, which no check can see."""
    gate = UP.replace("up_proj", "gate_proj")
    header[UP], header[gate] = header[gate], header[UP]


HEADERS = {
    "as-it-was": (lambda header: None, True),
    "metadata": (lambda header: header.update(__metadata__={"format": "pt"}), True),
    "int8": (retyped("I8", [48, 64]), UP),
    "uint8": (retyped("U8", [48, 64]), UP),
    "bool": (retyped("BOOL", [48, 64]), UP),
    "fp8-e4m3": (retyped("F8_E4M3", [48, 64]), UP),
    "fp8-e5m2": (retyped("F8_E5M2", [48, 64]), UP),
    "int16": (retyped("I16", [48, 32]), UP),
    "uint16": (retyped("U16", [48, 32]), UP),
    "int32": (retyped("I32", [48, 16]), UP),
    "int64": (retyped("I64", [48, 8]), UP),
    "float32": (retyped("F32", [48, 16]), UP),  # half as many numbers
    "float64": (retyped("F64", [48, 8]), UP),
    "no-type": (retyped("F99", [48, 32]), "model.safetensors"),
    "transposed": (retyped("BF16", [32, 48]), UP),
    "flat": (retyped("BF16", [48 * 32]), UP),
    "three-axes": (retyped("BF16", [1, 48, 32]), UP),
    "negative": (retyped("BF16", [-48, -32]), "model.safetensors"),
    "too-large": (retyped("BF16", [2**40, 32]), "model.safetensors"),
    "text-shape": (retyped("BF16", "48, 32"), "model.safetensors"),
    "renamed": (renamed(UP, UP + "_packed"), UP),
    "layer-9": (renamed(UP, UP.replace(".1.", ".9.")), UP),
    "no-layer": (renamed(UP, "model.layers.weight"), UP),
    "nameless": (renamed(UP, ""), UP),
    "scale": (renamed(NORM, UP + "_scale"), NORM),
    "frequencies": (renamed(NORM, "model.rotary_emb.inv_freq"), NORM),
    "no-offsets": (lambda header: header[UP].pop("data_offsets"), "model.safetensors"),
    "shifted": (
        lambda header: header[UP].update(data_offsets=[8, 8 + 2 * 48 * 32]),
        "model.safetensors",
    ),
    "beyond": (
        lambda header: header[UP].update(data_offsets=[2**40, 2**40 + 3072]),
        "model.safetensors",
    ),
    "gone": (lambda header: header.pop(UP), "model.safetensors"),
    "empty": (lambda header: header.clear(), "model.safetensors"),
    "no-tensor": (lambda header: header.update({UP: None}), "model.safetensors"),
}


def rewrite_header(path, change):
    whole = path.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    header = json.loads(whole[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + whole[8 + length :])


@functools.cache
def base_model(name):
    return load_model(GOLDENS / name, dtype=jnp.float32)


def digest(params):
    """One hash of all numbers of a parameter tree."""
    found = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        found.update(f"{path}{leaf.dtype}{leaf.shape}".encode())
        found.update(np.asarray(leaf, np.float32).tobytes())
    return found.hexdigest()


def is_base(model, name):
    base = base_model(name)
    return model.config == base.config and digest(model.params) == digest(base.params)


def check_loads(folder, expected, name):
    """The folder loads as the golden `name` (True), or is refused in one line."""
    if expected is True:
        assert is_base(load_model(folder, dtype=jnp.float32), name)
        return
    with pytest.raises(ValueError) as error:
        load_model(folder)
    assert one_line(error, expected)


@pytest.mark.parametrize("name", HEADERS)
def test_a_changed_safetensors_header(tmp_path, name):
    change, expected = HEADERS[name]
    folder = Path(shutil.copytree(GOLDENS / "qwen3", tmp_path / "model"))
    rewrite_header(folder / "model.safetensors", change)
    check_loads(folder, expected, "qwen3")


HEADS = (
    b"",
    b"\0" * 7,
    b"\xff" * 8,
    struct.pack("<Q", 2**40),
    struct.pack("<Q", 2) + b"[]",
    struct.pack("<Q", 4) + b"null",
    struct.pack("<Q", 2) + b"{}",
    struct.pack("<Q", 6) + b'{"a":1',
    struct.pack("<Q", 2) + b"\xff\xff",
    struct.pack("<Q", 9) + b'{"a": []}',
)


@pytest.mark.parametrize("head", HEADS)
def test_a_file_that_is_no_safetensors(tmp_path, head):
    folder = Path(shutil.copytree(GOLDENS / "qwen3", tmp_path / "model"))
    (folder / "model.safetensors").write_bytes(head)
    with pytest.raises(ValueError) as error:
        load_model(folder)
    assert one_line(error, str(folder))


FIRST, LAST = (f"model-0000{n}-of-00004.safetensors" for n in (1, 4))
INDICES = (
    ({"metadata": ABSENT}, True),
    ({"metadata": {"total_size": 0}}, True),
    ({"weight_map": ABSENT}, "weight_map"),
    ({"weight_map": None}, "weight_map"),
    ({"weight_map": {}}, "weight_map"),
    ({"weight_map": [FIRST]}, "weight_map"),
    ({NORM: 4}, NORM),
    ({NORM: None}, NORM),
    ({NORM: [LAST]}, NORM),
    ({NORM: f"../model/{LAST}"}, NORM),
    ({NORM: f"./{LAST}"}, NORM),
    ({NORM: f"/{LAST}"}, NORM),
    ({NORM: ".."}, NORM),
    ({NORM: ""}, NORM),
    ({NORM: "model-00005-of-00004.safetensors"}, "model-00005"),
    ({NORM: "config.json"}, NORM),
    ({NORM: FIRST}, NORM),
    ({NORM: ABSENT}, NORM),  # in a shard, and listed nowhere
    ({"extra.weight": LAST}, "extra.weight"),
    ({"model.rotary_emb.inv_freq": LAST}, True),
)


@pytest.mark.parametrize(("change", "expected"), INDICES)
def test_a_changed_index(tmp_path, change, expected):
    folder = Path(shutil.copytree(GOLDENS / "mistral", tmp_path / "model"))
    path = folder / "model.safetensors.index.json"
    if not change.keys() & {"metadata", "weight_map"}:
        weight_map = json.loads(path.read_text())["weight_map"] | change
        kept = {k: v for k, v in weight_map.items() if v is not ABSENT}
        change = {"weight_map": kept}
    edit_json(path, change)
    check_loads(folder, expected, "mistral")


# --- GGUF

GGUF_SAME = {
    "general.name": "anything",
    "general.type": "model",
    "llama.vocab_size": 96,
    "llama.tensor_data_layout": "Meta AI original pth",
    "llama.pooling_type": 3,
    "llama.expert_count": 0,
    "llama.expert_used_count": 0,
    "llama.use_parallel_residual": False,
    "llama.attention.causal": True,
    "llama.attention.sliding_window": 4096,
    "llama.attention.value_length": 64,
    "llama.rope.dimension_count": 64,
    "llama.rope.scaling.finetuned": True,
    "llama.rope.scaling.type": "none",
    "llama.rope.scaling.factor": 1.0,
    "llama.rope.scaling.attn_factor": 1.0,
    "llama.rope.scaling.original_context_length": 64,
    "llama.logit_scale": 1.0,
    "tokenizer.ggml.padding_token_id": 200,
}
GGUF_CHANGING = {
    "llama.attention.clamp_kqv": 8.0,
    "llama.attention.max_alibi_bias": 8.0,
    "llama.attention.causal": False,
    "llama.attention.scale": 0.2,
    "llama.attention.sliding_window": 128,
    "llama.attention.value_length": 32,
    "llama.attention.head_count_kv": 3,
    "llama.attention.key_length": 63,
    "llama.expert_count": 8,
    "llama.expert_used_count": 2,
    "llama.logit_scale": 0.5,
    "llama.residual_scale": 0.22,
    "llama.embedding_scale": 12.0,
    "llama.final_logit_softcapping": 30.0,
    "llama.attn_logit_softcapping": 50.0,
    "llama.use_parallel_residual": True,
    "llama.some_new_feature": "on",
    "qwen2.rope.freq_base": 1e6,  # of another architecture
    "llama.rope.dimension_count": 32,
    "llama.rope.dimension_sections": [16, 24, 24, 0],
    "llama.rope.freq_base_swa": 1e4,
    "llama.rope.scaling.type": "longrope",
    "llama.rope.scaling.attn_factor": 1.2,
    "llama.rope.scaling.alpha": 1000.0,
    "llama.rope.scaling.yarn_attn_factor": 1.2,
    "llama.rope.scaling.yarn_ext_factor": 0.5,
    "llama.rope.scaling.yarn_log_multiplier": 0.1,
    "llama.rope.scaling.factor": -2.0,
    "llama.rope.freq_base": 0.0,
    "llama.vocab_size": 95,
    "llama.block_count": 10**6,
    "general.architecture": "gemma3",
}
SCALING = "llama.rope.scaling."
FOUR = {"rope_scaling": LinearScaling(factor=4.0)}
GGUF_VALUES = (
    ({"llama.rope.scale_linear": 4.0}, FOUR),
    ({SCALING + "factor": 4.0}, FOUR),
    ({SCALING + "factor": 4.0, SCALING + "type": "linear"}, FOUR),
    ({SCALING + "factor": 4.0, "llama.rope.scale_linear": 2.0}, FOUR),
    ({SCALING + "factor": 4.0, SCALING + "type": "none"}, SAME),
    ({SCALING + "type": "linear"}, SAME),
    (
        {
            SCALING + "type": "yarn",
            SCALING + "factor": 4.0,
            SCALING + "original_context_length": 256,
        },
        yarn(),
    ),
    (
        {SCALING + "type": "yarn", SCALING + "factor": 4.0},
        yarn(original_max_length=4096),
    ),
    (
        {
            SCALING + "type": "yarn",
            SCALING + "factor": 4.0,
            SCALING + "yarn_beta_fast": 16.0,
            SCALING + "yarn_beta_slow": 2.0,
            SCALING + "yarn_ext_factor": 1.0,
        },
        yarn(original_max_length=4096, beta_fast=16.0, beta_slow=2.0),
    ),
    ({SCALING + "type": "yarn"}, SAME),  # by 1
    ({"llama.rope.freq_base": 5e5}, {"rope_theta": 5e5}),
    ({"llama.rope.freq_base": ABSENT}, SAME),
    ({"llama.context_length": 64}, {"max_length": 64}),
    ({"llama.attention.layer_norm_rms_epsilon": 1e-5}, {"norm_eps": 1e-5}),
    ({"tokenizer.ggml.eos_token_id": ABSENT}, {"eos_ids": ()}),
    ({"tokenizer.ggml.eom_token_id": 7}, {"eos_ids": (2, 7)}),
    ({"tokenizer.ggml.eot_token_id": 9}, {"eos_ids": (2, 9)}),
    ({"tokenizer.ggml.eot_token_id": 2}, SAME),
    ({"tokenizer.ggml.bos_token_id": ABSENT}, {"bos_id": None}),
)
GGUF_SIZES = (
    "llama.block_count",
    "llama.context_length",
    "llama.embedding_length",
    "llama.feed_forward_length",
    "llama.attention.head_count",
    "llama.attention.head_count_kv",
    "llama.attention.key_length",
)
GGUF_REQUIRED = (*GGUF_SIZES[:5], "llama.attention.layer_norm_rms_epsilon")


def gguf_cases():
    for key, value in GGUF_SAME.items():
        yield {key: value}, SAME
    for key, value in GGUF_CHANGING.items():
        yield {key: value}, key if "general" not in key else "architecture"
    yield from GGUF_VALUES
    for key in GGUF_SIZES:
        for value in ("32", 2.5, True, -1, 0, [32, 32]):
            yield {key: value}, key
    for key in GGUF_REQUIRED:
        yield {key: ABSENT}, key
    for value in ("1e-5", 0.0, float("nan"), float("inf"), [1e-5]):
        yield {"llama.rope.freq_base": value}, "rope.freq_base"
        key = "llama.attention.layer_norm_rms_epsilon"
        yield {key: value}, key
    for value in ("2", 96, 2.0, -1, True):
        yield {"tokenizer.ggml.eos_token_id": value}, "eos_token_id"


@pytest.mark.parametrize(("metadata", "expected"), [*gguf_cases()])
def test_changed_gguf_metadata(tmp_path, metadata, expected):
    path = write_gguf(tmp_path / "tiny.gguf", "mistral", metadata=metadata)
    if isinstance(expected, str):
        with pytest.raises(ValueError) as error:
            load_model(path)
        assert one_line(error, expected, "tiny.gguf")
    else:
        base = dataclasses.replace(hf_config(GOLDENS / "mistral"), family="llama")
        assert gguf_config(GgufFile(path)) == dataclasses.replace(base, **expected)


PREFIX = "tokenizer.ggml."
GGUF_VOCABULARIES = (
    ({}, True),
    ({PREFIX + "add_space_prefix": True}, True),
    ({PREFIX + "scores": [0.0] * 96}, True),
    ({PREFIX + "model": "llama"}, "kind 'llama'"),
    ({PREFIX + "model": ABSENT}, "kind None"),
    ({PREFIX + "pre": "another"}, "'another' is not known"),
    ({PREFIX + "add_eos_token": True}, "add_eos_token"),
    ({PREFIX + "tokens": ["a"] * 96}, ValueError("tokens has 'a' more than once")),
    ({PREFIX + "tokens": ["a", "b"]}, ValueError("tokens is")),
    ({PREFIX + "tokens": list(range(96))}, ValueError("tokens is")),
    ({PREFIX + "tokens": ABSENT}, ValueError("lacks tokenizer.ggml.tokens")),
    ({PREFIX + "tokens": "abc"}, ValueError("tokens is")),
    ({PREFIX + "token_type": [1] * 95}, ValueError("token_type is")),
    ({PREFIX + "token_type": [1] * 97}, ValueError("token_type is")),
    ({PREFIX + "token_type": ["x"] * 96}, ValueError("token_type is")),
    ({PREFIX + "token_type": ABSENT}, ValueError("token_type")),
    ({PREFIX + "merges": ["a c"]}, ValueError("merges has 'a c'")),
    ({PREFIX + "merges": ["ab"]}, ValueError("merges has 'ab'")),
    ({PREFIX + "merges": ["a Z\u00e9"]}, ValueError("merges has")),
    ({PREFIX + "merges": [1, 2]}, ValueError("merges is")),
    ({PREFIX + "merges": ABSENT}, ValueError("merges")),
    ({PREFIX + "bos_token_id": 96, PREFIX + "add_bos_token": True}, ValueError("bos_")),
    (
        {PREFIX + "bos_token_id": ABSENT, PREFIX + "add_bos_token": True},
        ValueError("bos_token_id"),
    ),
    ({PREFIX + "add_bos_token": "yes"}, ValueError("add_bos_token is 'yes'")),
    ({"tokenizer.chat_template": 5}, ValueError("tokenizer.chat_template is 5")),
)


@pytest.mark.parametrize(("metadata", "expected"), GGUF_VOCABULARIES)
def test_a_changed_gguf_vocabulary(tmp_path, metadata, expected):
    """It gives the same ids, or no tokenizer and the reason, or is refused."""
    path = write_gguf(tmp_path / "x.gguf", "mistral", metadata=VOCABULARY | metadata)
    if isinstance(expected, ValueError):
        with pytest.raises(ValueError) as error:
            load_model(path)
        assert one_line(error, str(expected), "x.gguf")
        return
    file = GgufFile(path)
    tokenizer, problem = gguf_tokenizer(file, gguf_config(file))
    if expected is True:
        assert tokenizer.encode("abc<|im_end|>") == [3, 70, 2]
        assert (tokenizer.eos_ids, problem) == ((2,), "")
    else:
        assert tokenizer is None and expected in problem and "\n" not in problem


@pytest.mark.parametrize("seed", range(40))
def test_damaged_bytes_of_a_gguf_header_are_refused_or_change_nothing(tmp_path, seed):
    """Whatever is read from them raises ValueError, or the file loads."""
    path = write_gguf(tmp_path / "x.gguf", "mistral", metadata=VOCABULARY)
    content = bytearray(path.read_bytes())
    rng = random.Random(seed)
    place = rng.randrange(4, 600)  # counts, types and lengths of the first keys
    content[place] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    try:
        file = GgufFile(path)
        gguf_tokenizer(file, gguf_config(file))
    except ValueError as error:
        assert "x.gguf" in str(error)


# --- Tokenizer files


def write_tokenizer(folder):
    file = GgufFile(write_gguf(folder / "x.gguf", "mistral", metadata=VOCABULARY))
    tokenizer, _ = gguf_tokenizer(file, gguf_config(file))
    tokenizer.save(folder)
    (folder / "x.gguf").unlink()
    return folder


def inside(*keys, value):
    """A change of the JSON object: the value under a path of keys."""

    def change(raw):
        for key in keys[:-1]:
            raw = raw[key]
        raw[keys[-1]] = value

    return change


# Changes of tokenizer.json, then of tokenizer_config.json.
TOKENIZERS = (
    inside("truncation", value={"max_length": 1, "strategy": "LongestFirst"}),
    inside("padding", value=None),
    inside("version", value="2.0"),
    inside("added_tokens", value=None),
    inside("added_tokens", value=[{"id": 1}]),
    inside("normalizer", value={"type": "Unheard"}),
    inside("pre_tokenizer", value={"type": "Unheard"}),
    inside("decoder", value=7),
    inside("post_processor", value=[]),
    inside("model", value=None),
    inside("model", value={"type": "BPE"}),
    inside("model", "type", value="Unheard"),
    inside("model", "vocab", value=None),
    inside("model", "vocab", value={"a": "b"}),
    inside("model", "vocab", value={"a": -1}),
    inside("model", "merges", value=[["a", "Z"]]),
    inside("model", "merges", value=["a"]),
    inside("model", "merges", value=None),
)
TOKENIZER_CONFIGS = (
    inside("bos_token", value=None),
    inside("bos_token", value="<|pad|>"),
    inside("bos_token", value="unheard-of"),
    inside("bos_token", value=5),
    inside("bos_token", value={"content": None}),
    inside("eos_token", value=["a"]),
    inside("eos_token", value={"x": 1}),
    inside("chat_template", value="{{ messages"),
    inside("chat_template", value=5),
    inside("chat_template", value=[{"name": "default"}]),
    inside("chat_template", value=[5]),
    inside("added_tokens_decoder", value={"1": "a"}),
    inside("added_tokens_decoder", value=[1]),
    inside("model_max_length", value=10**30),
    inside("tokenizer_class", value="LlamaTokenizer"),
)
TOKENIZER_FILES = [
    *(("tokenizer.json", change) for change in (*TOKENIZERS, *NO_OBJECTS[:7])),
    *(("tokenizer_config.json", c) for c in (*TOKENIZER_CONFIGS, *NO_OBJECTS[:7])),
]


@pytest.mark.parametrize("number", range(len(TOKENIZER_FILES)))
def test_a_changed_tokenizer_file_gives_the_same_ids_or_a_value_error(tmp_path, number):
    name, change = TOKENIZER_FILES[number]
    folder = write_tokenizer(tmp_path)
    path = folder / name
    if isinstance(change, bytes):
        path.write_bytes(change)
    else:
        raw = json.loads(path.read_text())
        change(raw)
        path.write_text(json.dumps(raw))
    try:
        tokenizer = tokenizer_from_directory(folder)
        ids = tokenizer.encode("abcab")
    except ValueError as error:
        assert str(folder) in str(error)
    else:
        assert ids == [3, 70, 3]


# --- A handful in full: the same numbers come out


@pytest.mark.parametrize(
    ("base", "change"),
    [
        ("qwen2", {"sliding_window": 128, "use_sliding_window": True}),
        ("llama_biases_linear_rope", {"torch_dtype": "float16", "pretraining_tp": 2}),
        (
            "qwen3_yarn",
            {"rope_parameters": {"full_attention": {**YARN, "attn_factor": 1.0}}},
        ),
        ("mistral", {"sliding_window": 4096, "rope_scaling": {"type": "default"}}),
    ],
)
def test_accepted_changes_give_the_logits_of_the_base(tmp_path, base, change):
    folder = Path(shutil.copytree(GOLDENS / base, tmp_path / "model"))
    edit_json(folder / "config.json", change)
    assert golden_logits_error(load_model(folder, dtype=jnp.float32), base) < 1e-4
