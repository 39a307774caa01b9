"""Make tests/goldens: tiny random checkpoints and the logits transformers gives them.

Not a test. Needs torch, which the project never depends on, so run it in an
environment of its own (about a minute):

    python -m venv /tmp/goldens
    /tmp/goldens/bin/pip install torch==2.13.0 transformers==5.23.0
    /tmp/goldens/bin/pip install gguf==0.19.0 accelerate
    /tmp/goldens/bin/python tests/make_goldens.py [DEFAULT_MODEL.gguf]

Each folder is an ordinary Hugging Face checkpoint (bfloat16) with `expected.npz`:
tokens [T], positions [2, T] (consecutive; far apart) and logits [2, T, V], computed
in float32. With the path that `python -m sparsespec_jax.loading.named_models smollm2`
prints, some logits of the default model are written too.
"""

import shutil
import sys
from pathlib import Path

import numpy as np
import torch
import transformers

GOLDENS = Path(__file__).parent / "goldens"
NUM_TOKENS = 40
# Positions reach 663: past the trained contexts below, and before the last bit of a
# frequency (which libraries round differently) shows in the logits.
FAR_STRIDE = 17

SIZES = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=4096,
    bos_token_id=1,
    eos_token_id=2,
)
LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=10_000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
YARN_ROPE = dict(
    rope_type="yarn",
    rope_theta=10_000.0,
    factor=4.0,
    original_max_position_embeddings=256,
)
LINEAR_ROPE = dict(rope_type="linear", rope_theta=10_000.0, factor=2.5)


def cases():
    """Name and configuration of each golden checkpoint."""
    from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

    return {
        # 6 query heads on 2 KV heads: a group that is no power of two.
        "llama3_rope": LlamaConfig(
            **SIZES | dict(hidden_size=36, num_attention_heads=6),
            rope_parameters=LLAMA3_ROPE,
        ),
        "llama_biases_linear_rope": LlamaConfig(
            **SIZES,
            attention_bias=True,
            mlp_bias=True,
            tie_word_embeddings=True,
            rms_norm_eps=1e-5,
            rope_parameters=LINEAR_ROPE,
        ),
        # This family has no head_dim of its own: 32 = 128 / 4.
        "qwen2": Qwen2Config(
            **SIZES | dict(hidden_size=128, head_dim=32), tie_word_embeddings=True
        ),
        "qwen3": Qwen3Config(**SIZES | dict(head_dim=128), rms_norm_eps=1e-6),
        "qwen3_yarn": Qwen3Config(
            **SIZES, rope_parameters=YARN_ROPE, tie_word_embeddings=True
        ),
        "mistral": MistralConfig(**SIZES, sliding_window=None),
    }


def randomise(model, generator):
    """Weights under which every part of the model matters to the logits."""
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if "norm" in name:
            value = 1 + 0.3 * noise
        elif name.endswith("bias"):
            value = 0.5 * noise
        elif "embed" in name:
            value = 0.5 * noise
        else:
            value = 1.5 * noise / weight.shape[-1] ** 0.5
        # Rounded to what the file will hold.
        weight.data = value.to(torch.bfloat16).float()


def logits_at(model, tokens, positions):
    """Float32 logits of tokens at explicit positions, each seeing those before it."""
    count = tokens.shape[0]
    hidden = torch.full((count, count), torch.finfo(torch.float32).min).triu(1)
    with torch.no_grad():
        out = model(
            input_ids=torch.tensor(tokens)[None].long(),
            position_ids=torch.tensor(positions)[None].long(),
            # Explicit: from positions with gaps a packed batch would be inferred.
            attention_mask=hidden[None, None],
            use_cache=False,
        )
    return out.logits[0].float().numpy()


def write_case(name, config):
    """One checkpoint folder with its expected logits."""
    seed = sum(map(ord, name))
    folder = GOLDENS / name
    shutil.rmtree(folder, ignore_errors=True)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", dtype=torch.float32
    ).eval()
    randomise(model, torch.Generator().manual_seed(seed))
    if config.tie_word_embeddings:
        model.tie_weights()
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, config.vocab_size, NUM_TOKENS).astype(np.int32)
    near = np.arange(NUM_TOKENS, dtype=np.int32)
    positions = np.stack([near, near * FAR_STRIDE])
    logits = np.stack([logits_at(model, tokens, row) for row in positions])
    # One family in several shards with an index.
    shards = "40KB" if name == "mistral" else "1GB"
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size=shards)
    for file in folder.iterdir():
        file.chmod(0o644)
    (folder / "generation_config.json").unlink(missing_ok=True)
    np.savez(folder / "expected.npz", tokens=tokens, positions=positions, logits=logits)
    spread = logits.std()
    print(f"{name}: logits {logits.shape}, spread {spread:.2f}")


def write_default_model(path):
    """Every 97th logit of the default model at a few places of a short text."""
    path = Path(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()
    # "Gravity is a force that pulls objects toward each other. The apple fell"
    tokens = [27370, 1050, 314, 253, 2870, 338, 20391, 4622, 4054, 971, 550, 30]
    tokens += [378, 14742, 4869, 198, 34, 35, 1, 2]
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0].numpy()
    np.savez(
        GOLDENS / "default_model.npz",
        tokens=np.array(tokens, np.int32),
        stride=np.array(97),
        logits=logits[:, ::97],
    )
    print(f"default model: logits {logits.shape}, spread {logits.std():.2f}")


def main():
    """Write everything."""
    torch.set_num_threads(1)
    for name, config in cases().items():
        write_case(name, config)
    if len(sys.argv) > 1:
        write_default_model(sys.argv[1])


if __name__ == "__main__":
    main()
