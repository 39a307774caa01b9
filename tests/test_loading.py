"""Which files make up a model, and what is read of them: heads, parts, ends, types."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from sparsespec_jax.loading.hf_config import hf_config
from sparsespec_jax.loading.load import load_model, save_checkpoint
from sparsespec_jax.models.config import PRESETS, ModelConfig, YarnScaling
from tests.model_files import (
    ABSENT,
    GOLDENS,
    TOKENS,
    VOCABULARY,
    edit_json,
    edit_tensors,
    golden_logits_error,
    same_params,
    write_gguf,
)

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def copy_of(tmp_path):
    """Make a golden checkpoint that a test may change."""

    def copy(name):
        return Path(shutil.copytree(GOLDENS / name, tmp_path / name))

    return copy


# --- The head of a model whose configuration ties it


def test_a_head_that_differs_is_used_though_the_configuration_ties_it(
    copy_of, tmp_path
):
    folder = copy_of("qwen3_yarn")
    rng = np.random.default_rng(0)
    table = rng.normal(size=(96, 32)).astype(np.float32)
    edit_tensors(folder, lambda tensors: tensors.update({HEAD: table}))
    model = load_model(folder, dtype=jnp.float32)
    assert not model.config.tie_embeddings
    assert (model.params["lm_head"]["kernel"] == table.T).all()
    edit_json(folder / "config.json", {"tie_word_embeddings": False})
    assert same_params(load_model(folder, dtype=jnp.float32).params, model.params)
    save_checkpoint(model, tmp_path / "saved")
    again = load_model(tmp_path / "saved", dtype=jnp.float32)
    assert again.config == model.config and same_params(again.params, model.params)


def test_a_head_that_is_the_embedding_in_another_type_is_tied(copy_of):
    folder = copy_of("qwen3_yarn")

    def write_out(tensors):
        tensors[HEAD] = tensors[EMBED].astype(np.float32)

    edit_tensors(folder, write_out)
    model = load_model(folder, dtype=jnp.float32)
    assert model.config.tie_embeddings and "lm_head" not in model.params
    assert golden_logits_error(model, "qwen3_yarn") < 1e-4


def test_a_tied_head_of_another_shape_is_refused(copy_of):
    folder = copy_of("qwen3_yarn")
    table = {HEAD: np.zeros((95, 32), np.float32)}
    edit_tensors(folder, lambda tensors: tensors.update(table))
    with pytest.raises(
        ValueError, match="lm_head.weight has shape .95, 32.*vocab_size"
    ):
        load_model(folder)


def test_a_gguf_head_is_used_where_there_is_one(tmp_path):
    tied = write_gguf(tmp_path / "tied.gguf", "qwen3_yarn", arch="qwen3")
    model = load_model(tied, dtype=jnp.float32)
    assert model.config.tie_embeddings and "lm_head" not in model.params
    embedding = np.asarray(model.params["embed"]["weight"])
    for name, table in (("same", embedding), ("other", -embedding)):
        path = tmp_path / f"{name}.gguf"
        extra = {"output.weight": np.ascontiguousarray(table)}
        write_gguf(path, "qwen3_yarn", arch="qwen3", extra=extra)
        found = load_model(path, dtype=jnp.float32)
        assert not found.config.tie_embeddings
        assert (found.params["lm_head"]["kernel"] == table.T).all()


# --- Types of tensors


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_all_floating_types_are_read(copy_of, dtype):
    folder = copy_of("qwen3_yarn")

    def cast(tensors):
        for name, values in tensors.items():
            tensors[name] = values.astype(np.float32).astype(dtype)

    edit_tensors(folder, cast)
    model = load_model(folder, dtype=jnp.float32)
    error = golden_logits_error(model, "qwen3_yarn")
    # bfloat16 numbers of usual size are exact in all of them but for the smallest.
    assert error < (1e-2 if dtype == np.float16 else 1e-4)


def test_an_adapter_beside_a_model_is_refused(copy_of):
    folder = copy_of("qwen3")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="adapter_config.json: adapters are not"):
        load_model(folder)


# --- GGUF in parts, by any path


def parts_of(folder, **options):
    write_gguf(folder / "tiny.gguf", "mistral", tensors_a_part=8, **options)
    found = sorted(folder.glob("tiny-*.gguf"))
    assert len(found) == 3
    return found


def test_any_part_stands_for_all(tmp_path):
    whole = load_model(write_gguf(tmp_path / "whole.gguf", "mistral"))
    folder = tmp_path / "parts"
    folder.mkdir()
    for path in (*parts_of(folder), folder):
        model = load_model(path)
        assert model.config == whole.config
        assert same_params(model.params, whole.params)


def test_a_missing_part_is_named(tmp_path):
    first, second, third = parts_of(tmp_path)
    second.unlink()
    for path in (first, third, tmp_path):
        with pytest.raises(
            ValueError, match="no GGUF file at .*00002-of-00003.*3 parts"
        ):
            load_model(path)


def test_parts_under_other_names_are_refused(tmp_path):
    first, second, third = parts_of(tmp_path)
    alone = shutil.copy(first, tmp_path / "alone.gguf")
    with pytest.raises(ValueError, match=r"alone.gguf: split.no.* \[0, 3\]"):
        load_model(alone)
    shutil.copy(third, second)
    with pytest.raises(ValueError, match=r"00002-of-00003.gguf: split.no.* \[2, 3\]"):
        load_model(first)
    wrong = tmp_path / "tiny-00004-of-00003.gguf"
    shutil.copy(first, wrong)
    with pytest.raises(ValueError, match="cannot be"):
        load_model(wrong)


def test_parts_of_two_models_are_refused(tmp_path):
    first, *_ = parts_of(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    extra = {"blk.0.ffn_gate_inp.weight": np.zeros((2, 2), np.float32)}
    write_gguf(other / "tiny.gguf", "mistral", tensors_a_part=8, extra=extra)
    shutil.copy(sorted(other.glob("*"))[2], tmp_path / "tiny-00003-of-00003.gguf")
    with pytest.raises(ValueError, match="split.tensors.count is 21; it must be 22"):
        load_model(first)


def test_one_part_may_say_that_it_is_one(tmp_path):
    path = tmp_path / "tiny-00001-of-00001.gguf"
    write_gguf(path, "mistral")
    assert load_model(path).config.num_layers == 2


def test_a_suffix_in_capitals_and_a_directory_of_one_file(tmp_path):
    path = write_gguf(tmp_path / "TINY.GGUF", "mistral")
    (tmp_path / "README.md").write_text("A model.")
    from_file, from_folder = load_model(path), load_model(tmp_path)
    assert same_params(from_file.params, from_folder.params)
    assert (from_file.name, from_folder.name) == ("TINY", "TINY")


def test_several_models_in_a_directory_are_a_choice(tmp_path):
    write_gguf(tmp_path / "one.gguf", "mistral")
    parts_of(tmp_path)
    message = "2 GGUF models: one.gguf, tiny-00001-of-00003.gguf; give the path"
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path)


def test_a_configuration_beside_a_gguf_file_wants_safetensors(tmp_path):
    write_gguf(tmp_path / "one.gguf", "mistral")
    shutil.copy(GOLDENS / "mistral" / "config.json", tmp_path)
    with pytest.raises(ValueError, match="neither model.safe.*GGUF file is given by"):
        load_model(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_one_file_of_a_directory_is_no_model(name):
    path = GOLDENS / "qwen3" / name
    with pytest.raises(ValueError, match="one file of a model; give the directory"):
        load_model(path)


@pytest.mark.parametrize("spec", [None, 5, b"smollm2", "~nobody-here/x", "a" * 5000])
def test_a_spec_of_another_kind(spec):
    with pytest.raises(ValueError, match="model"):
        load_model(spec)


@pytest.mark.parametrize("dtype", ["float17", np.int32, object()])
def test_another_dtype(dtype):
    with pytest.raises(ValueError, match="dtype must be float32 or bfloat16"):
        load_model(GOLDENS / "qwen3", dtype=dtype)


# --- Ends of texts


@pytest.mark.parametrize(
    ("names", "kind", "wanted"),
    [
        ({10: "<|endoftext|>"}, 3, (2, 10)),
        (
            {10: "<|eot_id|>", 11: "<|eom_id|>", 12: "<|end_of_text|>"},
            3,
            (2, 10, 11, 12),
        ),
        ({10: "</s>", 11: "<end_of_turn>"}, 3, (2, 10, 11)),
        ({10: "</s>", 11: "<|endoftext|>"}, 1, (2,)),  # ordinary text, e.g. of HTML
        ({10: "<|file_sep|>", 11: "<|im_start|x>", 12: "<think>"}, 3, (2,)),
    ],
)
def test_special_tokens_named_as_ends_stop_a_gguf_model(tmp_path, names, kind, wanted):
    tokens, kinds = list(TOKENS), [3, 3, 3] + [1] * 93
    for index, name in names.items():
        tokens[index], kinds[index] = name, kind
    changed = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds}
    changed["tokenizer.ggml.merges"] = ["a b"]
    metadata = VOCABULARY | changed
    path = write_gguf(tmp_path / "q.gguf", "mistral", metadata=metadata)
    model = load_model(path)
    assert model.config.eos_ids == wanted
    assert model.require_tokenizer().eos_ids == wanted


def test_many_ends_are_all_read(copy_of):
    folder = copy_of("qwen3")
    ids = list(range(20, 40))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    assert load_model(folder).config.eos_ids == (*ids, 2)


# --- Why a model has no tokenizer


def test_the_reason_for_no_tokenizer_is_kept(tmp_path, copy_of):
    no_vocabulary = write_gguf(tmp_path / "none.gguf", "mistral")
    kind = VOCABULARY | {"tokenizer.ggml.model": "llama"}
    pieces = write_gguf(tmp_path / "pieces.gguf", "mistral", metadata=kind)
    words = VOCABULARY | {"tokenizer.ggml.pre": "of-tomorrow"}
    unknown = write_gguf(tmp_path / "unknown.gguf", "mistral", metadata=words)
    folder = copy_of("qwen3")
    save_checkpoint(load_model(folder), tmp_path / "saved")
    for path, reason in (
        (no_vocabulary, "none.gguf has a tokenizer of kind None"),
        (pieces, "pieces.gguf has a tokenizer of kind 'llama'"),
        (unknown, "unknown.gguf: pre-tokenizer 'of-tomorrow' is not known"),
        (folder, "qwen3 has no tokenizer.json"),
        (tmp_path / "saved", "saved has no tokenizer.json"),
    ):
        model = load_model(path)
        assert model.tokenizer is None and reason in model.tokenizer_problem
        with pytest.raises(ValueError, match="has no tokenizer: .*"):
            model.require_tokenizer()
    metadata = VOCABULARY
    path = write_gguf(tmp_path / "with.gguf", "mistral", metadata=metadata)
    assert load_model(path).tokenizer_problem == ""


# --- Orbax


MARKERS = (
    (b"null", "sparsespec_model.json is None"),
    (b"[1]", "sparsespec_model.json is"),
    (b"{", "sparsespec_model.json is not JSON"),
    (b"\xff", "sparsespec_model.json cannot be read"),
    ({"hidden_size": "32"}, "sparsespec_model.json: hidden_size must be an integer"),
    ({"num_layers": 10**8}, "sparsespec_model.json: num_layers is 100000000.*2 layers"),
    ({"num_layers": True}, "num_layers must be an integer"),
    ({"rope_theta": None}, "rope_theta must be a number"),
    ({"eos_ids": 5}, "sparsespec_model.json is not a model configuration"),
    ({"eos_ids": ["2"]}, "eos_ids must be a tuple of token ids"),
    ({"rope_scaling": [1]}, "sparsespec_model.json is not a model configuration"),
    ({"rope_scaling": {"kind": "Magic"}}, "not a model configuration.*Magic"),
    ({"rope_scaling": {"kind": "LinearScaling", "factor": 0}}, "factor must be"),
    ({"vocab_size": ABSENT}, "not a model configuration.*vocab_size"),
)


@pytest.mark.parametrize(("change", "message"), MARKERS)
def test_a_changed_configuration_of_an_orbax_checkpoint(
    tmp_path, tiny_model, change, message
):
    save_checkpoint(tiny_model, tmp_path / "saved")
    marker = tmp_path / "saved" / "sparsespec_model.json"
    if isinstance(change, bytes):
        marker.write_bytes(change)
    else:
        edit_json(marker, change)
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path / "saved")


# --- Configurations as published: sizes of ours, every other key as in the files

COMMON = {
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "pretraining_tp": 1,
    "rope_scaling": None,
    "transformers_version": "4.40.0.dev0",
}
QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "bos_token_id": 151_643,
    "eos_token_id": 151_645,
    "max_window_layers": 28,
    "rope_theta": 1_000_000.0,
    "use_sliding_window": False,
    "transformers_version": "4.43.1",
}
QWEN3 = QWEN2 | {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "head_dim": 128,
    "rope_scaling": None,
    "rope_theta": 1_000_000,
    "sliding_window": None,
    "transformers_version": "4.51.0",
}
MISTRAL = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rope_theta": 1_000_000.0,
    "transformers_version": "4.42.0.dev0",
}
YARN_LONG = {
    "factor": 4.0,
    "original_max_position_embeddings": 32_768,
    "rope_type": "yarn",
    "type": "yarn",
}


def sizes(**changes):
    """Sizes of a model of 7 billion parameters, as keys of config.json."""
    return {
        "vocab_size": 32_000,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-05,
        "tie_word_embeddings": False,
    } | changes


def big(family, **changes):
    """The ModelConfig of sizes()."""
    return ModelConfig(
        **{
            "vocab_size": 32_000,
            "hidden_size": 4096,
            "intermediate_size": 14_336,
            "num_layers": 32,
            "num_heads": 32,
            "num_kv_heads": 8,
            "head_dim": 128,
            "max_length": 32_768,
            "norm_eps": 1e-5,
            "bos_id": 1,
            "eos_ids": (2,),
            "family": family,
        }
        | changes
    )


ENDS = {"bos_token_id": 1, "eos_token_id": 2}
QWEN_ENDS = {"bos_id": 151_643, "eos_ids": (151_645,), "rope_theta": 1e6}
PUBLISHED = {
    "llama 2": (
        LLAMA | sizes(max_position_embeddings=4096) | ENDS | {"_name_or_path": "x"},
        big("llama", max_length=4096),
    ),
    "llama 2, tuned": (
        LLAMA
        | sizes(max_position_embeddings=4096, vocab_size=32_016)
        | ENDS
        | {"max_length": 4096, "pad_token_id": 0, "unsloth_version": "2024.9"}
        | {"_attn_implementation_autoset": True, "use_cache": False},
        big("llama", max_length=4096, vocab_size=32_016),
    ),
    "llama 3.1": (
        LLAMA
        | sizes(vocab_size=128_256, max_position_embeddings=131_072)
        | {
            "bos_token_id": 128_000,
            "eos_token_id": [128_001, 128_008, 128_009],
            "mlp_bias": False,
            "rope_theta": 500_000.0,
            "rope_scaling": {
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
        },
        PRESETS["llama-3.1-8b"],
    ),
    "smollm2": (
        LLAMA
        | sizes(
            vocab_size=49_152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
        )
        | ENDS
        | {
            "is_llama_config": True,
            "pad_token_id": 2,
            "rope_interleaved": False,
            "rope_theta": 100_000,
            "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
        },
        PRESETS["smollm2-135m"],
    ),
    "qwen 2.5": (
        QWEN2 | sizes(sliding_window=131_072, use_mrope=False, vocab_size=152_064),
        big("qwen2", vocab_size=152_064, attention_bias=True, **QWEN_ENDS),
    ),
    "qwen 2, window below its context": (
        QWEN2 | sizes(sliding_window=4096, vocab_size=152_064, max_window_layers=64),
        big("qwen2", vocab_size=152_064, attention_bias=True, **QWEN_ENDS),
    ),
    "qwen 3": (
        QWEN3
        | sizes(
            vocab_size=151_936,
            intermediate_size=12_288,
            num_hidden_layers=36,
            max_position_embeddings=40_960,
            rms_norm_eps=1e-06,
        ),
        dataclasses.replace(PRESETS["qwen3-8b"], eos_ids=(151_645,)),
    ),
    "qwen 3, longer by YaRN": (
        QWEN3
        | sizes(vocab_size=151_936, max_position_embeddings=131_072)
        | {"rope_scaling": YARN_LONG},
        big(
            "qwen3",
            vocab_size=151_936,
            max_length=131_072,
            qk_norm=True,
            rope_scaling=YarnScaling(factor=4.0, original_max_length=32_768),
            **QWEN_ENDS,
        ),
    ),
    "mistral 0.2, 0.3": (
        MISTRAL | sizes(vocab_size=32_768) | {"sliding_window": None},
        big("mistral", vocab_size=32_768, rope_theta=1e6),
    ),
    "mistral, tuned and saved by transformers 5": (
        MISTRAL
        | sizes(head_dim=128)
        | {
            "rope_theta": ABSENT,
            "torch_dtype": ABSENT,
            "dtype": "bfloat16",
            "pad_token_id": 11,
            "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
            "sliding_window": None,
            "transformers_version": "5.10.2",
            "unsloth_version": "2025.12.5",
        },
        big("mistral", rope_theta=1e6),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_are_read(tmp_path, name):
    raw, wanted = PUBLISHED[name]
    raw = {key: value for key, value in (COMMON | raw).items() if value is not ABSENT}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert hf_config(tmp_path) == wanted


def test_the_first_mistral_says_up_to_where_it_can_be_used(tmp_path):
    raw = COMMON | MISTRAL | sizes(sliding_window=4096, rope_theta=10_000.0)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="set max_position_embeddings to 4096"):
        hf_config(tmp_path)
    path.write_text(json.dumps(raw | {"max_position_embeddings": 4096}))
    assert hf_config(tmp_path) == big("mistral", max_length=4096)
