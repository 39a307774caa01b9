"""Loading and saving models: round trips, and every way in which files are damaged."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsespec_jax.loading.hf_config import hf_config
from sparsespec_jax.loading.load import Model, load_model, save_checkpoint
from sparsespec_jax.loading.tokenizer import tokenizer_from_vocabulary
from sparsespec_jax.models.config import Llama3Scaling, YarnScaling
from sparsespec_jax.models.transformer import init_params
from tests.model_files import (
    GOLDENS,
    edit_config,
    edit_tensors,
    golden_logits_error,
    same_params,
    write_gguf,
)

SINGLE = "qwen3_yarn"  # one safetensors file
SHARDED = "mistral"  # four shards and an index


@pytest.fixture
def copy_of(tmp_path):
    """Make a golden checkpoint that a test may damage."""

    def copy(name):
        return Path(shutil.copytree(GOLDENS / name, tmp_path / name))

    return copy


# --- Hugging Face directories


def test_a_directory_is_named_after_itself_and_needs_no_tokenizer():
    model = load_model(GOLDENS / SINGLE, dtype=jnp.float32)
    assert (model.name, model.tokenizer) == (SINGLE, None)
    with pytest.raises(ValueError, match="has no tokenizer.*tokenizer.json.*token ids"):
        model.require_tokenizer()


def test_a_missing_shard_is_named(copy_of):
    folder = copy_of(SHARDED)
    (folder / "model-00003-of-00004.safetensors").unlink()
    with pytest.raises(ValueError, match="1 shard.*model-00003-of-00004.safetensors"):
        load_model(folder)


def test_shards_of_another_model_are_refused(copy_of):
    folder = copy_of(SHARDED)
    index = folder / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    raw["weight_map"]["model.norm.weight"] = "model-00001-of-00004.safetensors"
    index.write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="00001.*model.norm.weight cannot be read"):
        load_model(folder)


def test_a_truncated_file_is_named_with_the_first_tensor_cut(copy_of):
    folder = copy_of(SINGLE)
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    message = f"truncated: it has {len(whole) - 10} bytes of {len(whole)}.*tensor model"
    with pytest.raises(ValueError, match=message):
        load_model(folder)
    path.write_bytes(whole[:5])
    with pytest.raises(ValueError, match="cannot be read.*5 bytes.*fetch it again"):
        load_model(folder)


def test_a_tensor_of_another_shape_is_named_with_both_shapes(copy_of):
    folder = copy_of(SINGLE)
    name = "model.layers.1.self_attn.k_proj.weight"

    def halve(tensors):
        tensors[name] = tensors[name][:64].copy()

    edit_tensors(folder, halve)
    with pytest.raises(ValueError, match=f"{name}.*\\(64, 32\\).*\\(128, 32\\)"):
        load_model(folder)


def test_missing_and_unexpected_tensors_are_named(copy_of):
    folder = copy_of(SINGLE)
    name = "model.layers.0.self_attn.q_norm.weight"
    edit_tensors(folder, lambda tensors: tensors.pop(name))
    with pytest.raises(ValueError, match=f"lacks 1 tensor.*{name}"):
        load_model(folder)
    folder = copy_of("qwen3")
    extra = {"model.layers.2.mlp.up_proj.weight": np.zeros((2, 2), np.float32)}
    edit_tensors(folder, lambda tensors: tensors.update(extra))
    with pytest.raises(ValueError, match="holds 1 tensor.*layers.2.mlp.up_proj"):
        load_model(folder)


def test_a_written_out_copy_of_a_tied_table_is_no_error(copy_of):
    folder = copy_of(SINGLE)

    def write_out(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    edit_tensors(folder, write_out)
    model = load_model(folder, dtype=jnp.float32)
    assert golden_logits_error(model, SINGLE) < 1e-4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel.*Qwen3ForCausalLM"),
        ({"architectures": None}, "architecture unknown; supported"),
        ({"sliding_window": 128}, "sliding-window.*sliding_window = 128.*4096 tokens"),
        ({"layer_types": ["chunked_attention"]}, "layer_types is .'chunked_attention'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"quantization_config": {"bits": 4}}, "quantization_config.*bits.*GGUF file"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "longrope.*supported"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "lacks rope_parameters.factor"),
        ({"hidden_size": None}, "hidden_size is None; it must be an integer"),
    ],
)
def test_what_the_model_cannot_do_is_refused(copy_of, change, message):
    folder = copy_of(SHARDED)
    edit_config(folder, **change)
    with pytest.raises(ValueError, match=message):
        load_model(folder)


def test_a_left_out_window_means_the_familys_default(copy_of):
    """Mistral files without the key mean 4096 tokens, not none."""
    folder = copy_of(SHARDED)
    raw = json.loads((folder / "config.json").read_text())
    del raw["sliding_window"]
    (folder / "config.json").write_text(json.dumps(raw))
    assert load_model(folder).config.max_length == 4096  # a window of all changes none
    edit_config(folder, max_position_embeddings=8192)
    with pytest.raises(ValueError, match="sliding_window = 4096.*8192 tokens"):
        load_model(folder)


def test_a_window_that_no_layer_uses_is_none(copy_of):
    """Qwen files name a window, and other keys say in which layers it counts."""
    folder = copy_of("qwen2")
    base = hf_config(folder)
    path = folder / "config.json"
    raw = json.loads(path.read_text()) | {"sliding_window": 128}
    for key in ("use_sliding_window", "layer_types", "max_window_layers"):
        del raw[key]
    for accepted in (
        {},
        {"use_sliding_window": False, "max_window_layers": 0},
        {"use_sliding_window": True, "max_window_layers": 2},
        {"use_sliding_window": True},  # the family's 28 layers come first
        {"use_sliding_window": True, "layer_types": ["full_attention"] * 2},
        {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": 4096},
    ):
        path.write_text(json.dumps(raw | accepted))
        assert hf_config(folder) == base, accepted
    sliding = ["full_attention", "sliding_attention"]
    for refused, message in (
        ({"use_sliding_window": True, "max_window_layers": 1}, "sliding_window = 128"),
        ({"use_sliding_window": True, "layer_types": sliding}, "sliding_window = 128"),
        ({"layer_types": sliding}, "layer_types is .*'sliding_attention'"),
        ({"layer_types": ["full_attention"]}, "layer_types.*of 2 layers"),
    ):
        path.write_text(json.dumps(raw | refused))
        with pytest.raises(ValueError, match=message):
            hf_config(folder)


def test_both_spellings_of_rope_and_all_end_ids_are_read(copy_of):
    folder = copy_of(SINGLE)
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    del raw["rope_parameters"]
    scaling = {
        "type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 256,
    }
    raw |= {"rope_theta": 10_000.0, "rope_scaling": scaling}
    path.write_text(json.dumps(raw))
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 2]}')
    model = load_model(folder, dtype=jnp.float32)
    assert model.config.rope_scaling == YarnScaling(factor=4.0, original_max_length=256)
    assert model.config.eos_ids == (7, 2)
    assert golden_logits_error(model, SINGLE) < 1e-4


# --- GGUF files


def test_a_llama_gguf_gives_the_logits_of_its_source(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", SHARDED)
    model = load_model(path, dtype=jnp.float32)
    source = load_model(GOLDENS / SHARDED, dtype=jnp.float32)
    assert dataclasses.replace(model.config, family="mistral") == source.config
    assert same_params(model.params, source.params)
    assert golden_logits_error(model, SHARDED) < 1e-4
    assert model.name == "tiny"
    with pytest.raises(ValueError, match="tokenizer of kind None"):
        model.require_tokenizer()


def test_a_forgotten_permutation_shows(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", SHARDED, permute=False)
    model = load_model(path, dtype=jnp.float32)
    assert golden_logits_error(model, SHARDED) > 1e-2


@pytest.mark.parametrize(
    ("kind", "steps"),
    [(gguf.GGMLQuantizationType.Q8_0, 127), (gguf.GGMLQuantizationType.Q4_1, 15)],
)
def test_other_architectures_and_quantised_tensors(tmp_path, kind, steps):
    path = write_gguf(tmp_path / "q.gguf", "qwen2", arch="qwen2", quantise=kind)
    model = load_model(path, dtype=jnp.float32)
    source = load_model(GOLDENS / "qwen2", dtype=jnp.float32)
    assert model.config == source.config
    ours, exact = (m.params["layer_1"] for m in (model, source))
    for part in ("qkv", "out", "gate_up"):
        kernel = exact[part]["kernel"]
        spread = float(kernel.max() - kernel.min())
        error = float(jnp.abs(ours[part]["kernel"] - kernel).max())
        assert 0 < error < spread / steps, part
    assert (ours["down"]["kernel"] == exact["down"]["kernel"]).all()
    assert (ours["qkv"]["bias"] == exact["qkv"]["bias"]).all()


def llama3_divisors(config, scaling):
    """What the converter stores, spelled out from the published rule."""
    found = []
    for pair in range(config.head_dim // 2):
        wavelength = 2 * np.pi * config.rope_theta ** (2 * pair / config.head_dim)
        low = scaling.original_max_length / scaling.low_freq_factor
        high = scaling.original_max_length / scaling.high_freq_factor
        if wavelength < high:
            found.append(1.0)
        elif wavelength > low:
            found.append(scaling.factor)
        else:
            smooth = scaling.original_max_length / wavelength - scaling.low_freq_factor
            smooth /= scaling.high_freq_factor - scaling.low_freq_factor
            found.append(1 / ((1 - smooth) / scaling.factor + smooth))
    return np.array(found, np.float32)


def test_stored_rope_factors_are_recognised_or_refused(tmp_path):
    config = load_model(GOLDENS / SHARDED).config
    scaling = Llama3Scaling(
        factor=32.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_length=8192,
    )
    table = llama3_divisors(config, scaling)
    extra = {"rope_freqs.weight": table}
    path = write_gguf(tmp_path / "llama3.gguf", SHARDED, extra=extra)
    assert load_model(path).config.rope_scaling == scaling
    extra = {"rope_freqs.weight": np.where(table > 5, 32, 1).astype(np.float32)}
    path = write_gguf(tmp_path / "other.gguf", SHARDED, extra=extra)
    with pytest.raises(ValueError, match="rope_freqs.weight.*not the table of Llama"):
        load_model(path)


def test_damaged_gguf_files_are_refused(tmp_path):
    whole = write_gguf(tmp_path / "whole.gguf", SHARDED).read_bytes()
    path = tmp_path / "damaged.gguf"
    for size in (len(whole) - 100, len(whole) // 2, 40, 3, 0):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=f"damaged.gguf.*{size} bytes"):
            load_model(path)
    path.write_bytes(b"ELF!" + whole[4:])
    with pytest.raises(ValueError, match="cannot be read as GGUF"):
        load_model(path)
    with pytest.raises(ValueError, match="no GGUF file"):
        load_model(tmp_path / "nowhere.gguf")


def test_gguf_files_of_other_models_are_refused(tmp_path):
    path = write_gguf(tmp_path / "gemma.gguf", SHARDED, arch="gemma3")
    with pytest.raises(ValueError, match="'gemma3'; supported are llama, qwen2, qwen3"):
        load_model(path)
    path = write_gguf(
        tmp_path / "more.gguf",
        SHARDED,
        extra={"blk.0.ffn_gate_inp.weight": np.zeros((2, 2), np.float32)},
    )
    with pytest.raises(ValueError, match="holds 1 tensor.*ffn_gate_inp"):
        load_model(path)


# --- Orbax


def tiny_tokenizer():
    return tokenizer_from_vocabulary(
        ["a", "b", "ab", "<end>"],
        ["a b"],
        token_types=[1, 1, 1, 3],
        pre_tokenizer="gpt-2",
        eos_ids=(3,),
        chat_template="{{ messages[0].content }}<end>",
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_orbax_round_trip(tmp_path, tiny_config, dtype):
    config = dataclasses.replace(
        tiny_config,
        rope_scaling=YarnScaling(factor=2.0, original_max_length=64),
        eos_ids=(3,),
    )
    params = init_params(config, seed=1, dtype=dtype)
    model = Model(config=config, params=params, tokenizer=tiny_tokenizer(), name="tiny")
    save_checkpoint(model, tmp_path / "saved")
    again = load_model(tmp_path / "saved", dtype=dtype)
    assert again.config == config
    assert again.name == "saved"
    assert same_params(again.params, params)
    tokenizer = again.require_tokenizer()
    assert tokenizer.encode("abba<end>") == [2, 1, 0, 3]
    assert tokenizer.eos_ids == (3,)
    assert tokenizer.chat_text([{"role": "user", "content": "a"}]) == "a<end>"
    with pytest.raises(ValueError, match="is not empty"):
        save_checkpoint(model, tmp_path / "saved")


def test_orbax_checkpoints_are_cast_and_checked(tmp_path, tiny_config, tiny_model):
    save_checkpoint(tiny_model, tmp_path / "saved")
    cast = load_model(tmp_path / "saved", dtype=jnp.bfloat16)
    wanted = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tiny_model.params)
    assert same_params(cast.params, wanted)
    assert cast.tokenizer is None

    marker = tmp_path / "saved" / "sparsespec_model.json"
    raw = json.loads(marker.read_text())
    marker.write_text(json.dumps({**raw, "intermediate_size": 56}))
    with pytest.raises(ValueError, match="down/kernel.*\\(48, 32\\).*\\(56, 32\\)"):
        load_model(tmp_path / "saved")
    marker.write_text(json.dumps({**raw, "qk_norm": True}))
    with pytest.raises(ValueError, match="k_norm/scale.*missing.*\\(16,\\)"):
        load_model(tmp_path / "saved")
    marker.write_text(json.dumps({**raw, "moe": True}))
    with pytest.raises(ValueError, match="unexpected keyword argument 'moe'"):
        load_model(tmp_path / "saved")
    marker.write_text(json.dumps(raw))
    shutil.rmtree(tmp_path / "saved" / "params")
    with pytest.raises(ValueError, match="params is missing or no Orbax checkpoint"):
        load_model(tmp_path / "saved")


def test_damaged_orbax_data_is_refused(tmp_path, tiny_model):
    save_checkpoint(tiny_model, tmp_path / "saved")
    files = (p for p in (tmp_path / "saved" / "params").rglob("*") if p.is_file())
    largest = max(files, key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:1000])
    # In a process of its own: Orbax drops the reads that were under way, and they
    # complain when they are collected, which may be in any later test.
    program = "import sys, sparsespec_jax as s; s.load_model(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "saved")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert re.search("ValueError: .*params cannot be restored.*damaged", done.stderr)


# --- What a spec may be


def test_a_spec_that_names_nothing(tmp_path):
    for spec in ("smollm3", "/no/such/place", str(tmp_path / "x")):
        with pytest.raises(ValueError, match="there is no model at"):
            load_model(spec)
    with pytest.raises(ValueError, match="no config.json"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match="float32 or bfloat16, got float16"):
        load_model(GOLDENS / SINGLE, dtype=jnp.float16)


def test_hub_ids_fetch_what_is_needed(monkeypatch):
    asked = {}

    def download(repo_id, **options):
        asked.update(options, repo_id=repo_id)
        return str(GOLDENS / SINGLE)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    model = load_model("someone/some-model", dtype=jnp.float32, cache_dir="kept")
    assert model.name == "someone/some-model"
    assert (asked["repo_id"], asked["cache_dir"]) == ("someone/some-model", "kept")
    patterns = asked["allow_patterns"]
    files = ["model-00001-of-00002.safetensors", "tokenizer.json", "config.json"]
    kept = huggingface_hub.utils.filter_repo_objects(
        [*files, "pytorch_model.bin", "original/consolidated.00.pth", "README.md"],
        allow_patterns=patterns,
    )
    assert list(kept) == files


def test_an_unreachable_hub_is_explained(monkeypatch):
    def download(repo_id, **options):
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(RuntimeError, match="someone/some-model.*no route.*local dir"):
        load_model("someone/some-model")
