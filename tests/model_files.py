"""Small model files for tests: goldens copied, changed, and written as GGUF."""

import json
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from sparsespec_jax.loading.hf_config import hf_config
from sparsespec_jax.models.transformer import causal_attend, forward, logits

GOLDENS = Path(__file__).parent / "goldens"
ABSENT = object()  # as a value: the key is taken out


def same_params(left, right):
    equal = jax.tree.map(
        lambda a, b: a.dtype == b.dtype and bool((a == b).all()), left, right
    )
    return all(jax.tree.leaves(equal))


def logits_of_text(model, tokens):
    """Logits [T, V] of one text, without engine or cache."""
    caches = (None,) * model.config.num_layers

    @jax.jit
    def run(params):
        positions = jnp.arange(tokens.size, dtype=jnp.int32)
        hidden, _ = forward(
            model.config, params, tokens, positions, causal_attend, caches
        )
        return logits(model.config, params, hidden)

    return run(model.params)


def golden_logits_error(model, name):
    """Largest error of a model's logits against those of a golden checkpoint."""
    with np.load(GOLDENS / name / "expected.npz") as expected:
        tokens, wanted = expected["tokens"], expected["logits"][0]
    return float(np.abs(logits_of_text(model, tokens) - wanted).max())


def edit_config(folder, **changes):
    edit_json(folder / "config.json", changes)


def edit_json(path, changes):
    raw = json.loads(path.read_text()) | changes
    raw = {key: value for key, value in raw.items() if value is not ABSENT}
    path.write_text(json.dumps(raw).replace("Infinity", "1e999"))


def edit_tensors(folder, change):
    """Apply change to the dict of a folder's tensors (one file)."""
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    change(tensors)
    safetensors.numpy.save_file(tensors, path)


# --- GGUF

GGUF_NAMES = {
    "embed_tokens": "token_embd",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "layers": "blk",
    "model.": "",
    "lm_head": "output",
}
# 96 tokens like the goldens have: three special ones, characters, and one merge.
TOKENS = [
    "<|pad|>",
    "<|im_start|>",
    "<|im_end|>",
    "ab",
    *(chr(code) for code in range(33, 125)),
]
VOCABULARY = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [3, 3, 3] + [1] * 93,
    "tokenizer.ggml.merges": ["a b"],
}


def pair_neighbours(values, num_heads):
    """The row order of llama files: element i of a head beside element i + D/2."""
    split = values.reshape(num_heads, 2, -1, *values.shape[1:])
    return split.swapaxes(1, 2).reshape(values.shape)


def gguf_metadata(name, arch):
    """What a converter writes about a golden checkpoint."""
    config = hf_config(GOLDENS / name)
    return {
        f"{arch}.block_count": config.num_layers,
        f"{arch}.context_length": config.max_length,
        f"{arch}.embedding_length": config.hidden_size,
        f"{arch}.feed_forward_length": config.intermediate_size,
        f"{arch}.attention.head_count": config.num_heads,
        f"{arch}.attention.head_count_kv": config.num_kv_heads,
        f"{arch}.attention.key_length": config.head_dim,
        f"{arch}.rope.freq_base": config.rope_theta,
        f"{arch}.attention.layer_norm_rms_epsilon": config.norm_eps,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def write_gguf(
    path,
    name,
    *,
    arch="llama",
    quantise=None,
    permute=True,
    extra=None,
    metadata=None,
    tensors_a_part=0,
):
    """Convert a golden checkpoint as converters do.

    extra: float32 tensors to add. metadata: keys to set or (ABSENT) leave out.
    tensors_a_part: more than 0 writes PATH-0000n-of-0000m.gguf instead of path.
    """
    config = hf_config(GOLDENS / name)
    tensors = {}
    for file in sorted((GOLDENS / name).glob("*.safetensors")):
        tensors |= safetensors.numpy.load_file(file)
    writer = gguf.GGUFWriter(path, arch, split_max_tensors=tensors_a_part)
    for key, value in (gguf_metadata(name, arch) | (metadata or {})).items():
        if value is not ABSENT:
            _add(writer, key, value)
    heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}
    for original, values in tensors.items():
        stored = original
        for ours, theirs in GGUF_NAMES.items():
            stored = stored.replace(ours, theirs)
        stored = {"norm.weight": "output_norm.weight"}.get(stored, stored)
        values = values.astype(np.float32)
        part = stored.split(".")[-2]
        if permute and arch == "llama" and part in heads:
            values = pair_neighbours(values, heads[part])
        # Rows are quantised in blocks of 32; others stay float32.
        if quantise is not None and values.ndim == 2 and values.shape[1] % 32 == 0:
            data = gguf.quants.quantize(values, quantise)
            writer.add_tensor(stored, data, raw_dtype=quantise)
        else:
            writer.add_tensor(stored, values)
    for stored, values in (extra or {}).items():
        writer.add_tensor(stored, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer, key, value):
    kind = gguf.GGUFValueType.get_type(value)
    if type(value) is int:  # as converters write sizes and ids
        kind = gguf.GGUFValueType.UINT32 if value >= 0 else gguf.GGUFValueType.INT32
    writer.add_key_value(key, value, kind)
