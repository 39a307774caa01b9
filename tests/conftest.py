"""Strict settings for all tests, and the models that they share."""

import os

# Before jax is imported: the test environment holds TPU and CUDA plugins (they compile
# without hardware) that must not be asked for devices. On an accelerator run
# `pytest -m gpu` with JAX_PLATFORMS=cuda set.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no metadata server to wait for
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # two test runs at once

import jax
import pytest


@pytest.fixture(scope="session")
def tiny_config():
    """Shapes of a two-layer model with grouped heads; compiles in a second."""
    from sparsespec_jax.model_config import ModelConfig

    return ModelConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        max_length=4096,
        tie_embeddings=True,
    )


@pytest.fixture(scope="session")
def tiny_model(tiny_config):
    """A random float32 model without tokenizer or end-of-text token."""
    from sparsespec_jax import Model
    from sparsespec_jax.model import init_params

    return Model(
        name="tiny",
        config=tiny_config,
        params=init_params(tiny_config, seed=0),
        tokenizer=None,
    )


@pytest.fixture(scope="session")
def default_model():
    """SmolLM2-135M-Instruct in float32, fetched once into the user's cache."""
    from sparsespec_jax import load_model

    return load_model("smollm2", dtype="float32")


def pytest_collection_modifyitems(items):
    """Skip tests of hardware that is not here."""
    backend = jax.default_backend()
    for item in items:
        for name in ("gpu", "tpu"):
            if item.get_closest_marker(name) and backend != name:
                item.add_marker(pytest.mark.skip(reason=f"runs on {name} only"))
