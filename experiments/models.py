"""Models without a checkpoint: random weights of published shapes, or of tiny ones."""

from __future__ import annotations

import jax

from sparsespec_jax import Model, load_model
from sparsespec_jax.models.config import PRESETS, ModelConfig
from sparsespec_jax.models.sharding import check_cut, loading_shardings, model_mesh
from sparsespec_jax.models.transformer import init_params

# Two layers with grouped heads; compiles in a second.
TINY = ModelConfig(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4,
    num_kv_heads=2, head_dim=16, max_length=4096, tie_embeddings=True,
)  # fmt: skip

DTYPES = ("float32", "bfloat16")
SHAPES = PRESETS | {"tiny": TINY}  # of models with random weights


def shapes(preset: str) -> ModelConfig:
    """Those of a preset, or tiny ones; ValueError if there are none of that name."""
    if preset not in SHAPES:
        raise ValueError(f"model must be one of {sorted(SHAPES)}, got {preset!r}")
    return SHAPES[preset]


def random_model(preset: str, dtype, tensor_parallel: int = 1) -> Model:
    """Random weights with these shapes, shared by so many devices."""
    config, place = shapes(preset), {}
    if tensor_parallel > 1:
        check_cut(config, tensor_parallel)
        mesh = model_mesh(tensor_parallel)

        def on_mesh(params):
            where = loading_shardings(config, params, mesh)
            return jax.device_put(params, where, donate=True)

        place = dict(place=on_mesh)
    params = init_params(config, seed=0, dtype=dtype, **place)
    return Model(name=preset, config=config, params=params, tokenizer=None)


# Options of smoke runs: alike, so that those of one process share compiled steps.
SMOKE = dict(
    model="tiny", max_tokens=12, num_draft_tokens=2, budget_ratio=0.2, min_budget=0,
    num_slots=2, page_size=4, prefill_chunk=32,
)  # fmt: skip


def smoke(*names, **others):
    """Those of SMOKE that an experiment has, and others of its own."""
    return {name: SMOKE[name] for name in names} | others


def tiny_model() -> Model:
    """A random float32 model without tokenizer or end-of-text token; for tests."""
    return random_model("tiny", "float32")


def load(name: str, *, dtype, tensor_parallel: int = 1) -> Model:
    """The tiny random model for "tiny", else what `load_model` finds."""
    if name == "tiny":
        return random_model(name, dtype, tensor_parallel)
    return load_model(name, dtype=dtype, tensor_parallel=tensor_parallel)
