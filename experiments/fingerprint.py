"""What the tokens of a run follow from, beside its flags: hashes to compare on resume.

Covered are every token of every prompt, the tokenizer with its chat template, the
model's configuration, all bytes of all its weights, the kernels, and the settings of
XLA and JAX that change how numbers are rounded. Not covered are the device, versions of
packages and our own code: `record` writes those down for each session.
"""

from __future__ import annotations

import hashlib
import json
import os

import jax
import jax.numpy as jnp
import numpy as np

from sparsespec_jax.models.config import config_to_json

# What else decides how XLA and the libraries below it round.
_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "NVIDIA_TF32_OVERRIDE")
_SETTINGS = (
    "jax_default_matmul_precision",
    "jax_disable_jit",
    "jax_disable_most_optimizations",
    "jax_enable_x64",
    "jax_memory_fitting_level",
    "jax_optimization_level",
    "jax_use_hlo_logistic_lowering",
)
_CHANGE_NOTHING = ("--xla_dump_",)  # flags of XLA that only write files


def of_run(launcher: str, model, *, impl: str, **parts) -> dict:
    """The inputs of a run, JSON types only; see `record.RunDirectory`.

    Args:
        launcher: name of the module in experiments.
        model: what load_model returns.
        impl: the kernels, resolved.
        parts: by name, lists of token ids (each is hashed), text or None.
    """
    hashed = {
        name: value if value is None else _of_part(value)
        for name, value in parts.items()
    }
    return {
        "launcher": launcher,
        **hashed,
        **of_model(model),
        "kernels": impl,
        **_numerics(),
    }


def of_model(model) -> dict:
    """Hashes of a model's tokenizer, chat template, configuration and weights."""
    tokenizer = model.tokenizer
    return {
        "tokenizer": tokenizer and _of_tokenizer(tokenizer),
        "chat_template": tokenizer and _of_json(tokenizer.chat_template),
        "model_config": _hash(config_to_json(model.config).encode()),
        "weights": _of_weights(model.params),
    }


def of_tokens(token_ids) -> str:
    """Hash of a list of token ids."""
    return _hash(np.asarray(token_ids, "<i8").tobytes())


def _of_part(value):
    return (
        _hash(value.encode()) if isinstance(value, str) else list(map(of_tokens, value))
    )


def _of_tokenizer(tokenizer):
    described = json.loads(tokenizer.backend.to_str())
    ids = tokenizer.bos_id, *tokenizer.eos_ids
    return _of_json([described, ids, tokenizer.special_tokens])


def _of_weights(params):
    """Names, shapes, types and checksums of all tensors."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    sums = jax.device_get([_checksum(leaf) for _, leaf in leaves])
    lines = [
        f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape} {found.tolist()}"
        for (path, leaf), found in zip(leaves, sums, strict=True)
    ]
    return _hash("\n".join(lines).encode())


@jax.jit
def _checksum(array):
    """Two sums uint32 [2] over all bits, each with odd weights that follow the place.

    No change of a single value leaves either as it was, whatever the order of sums.
    """
    bits = jax.lax.bitcast_convert_type(array, f"uint{8 * array.itemsize}")
    # In the array's own shape: devices that share it each sum up what they have.
    place, stride = jnp.zeros(array.shape, jnp.uint32), 1
    for axis in reversed(range(array.ndim)):
        along = jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
        place += along * jnp.uint32(stride % 2**32)
        stride *= array.shape[axis]
    mixed = (place ^ (place >> 15)) * jnp.uint32(0x7FEB352D)
    weights = 2 * place + 1, (mixed ^ (mixed >> 13)) | 1
    wide = bits.astype(jnp.uint32)
    return jnp.stack([(wide * each).sum(dtype=jnp.uint32) for each in weights])


def _numerics():
    def value(name):
        words = os.environ.get(name, "").split()
        return " ".join(sorted(w for w in words if not w.startswith(_CHANGE_NOTHING)))

    settings = {name: str(jax.config.values[name]) for name in _SETTINGS}
    return {name: value(name) for name in _VARIABLES} | settings


def _of_json(value):
    return _hash(json.dumps(value, sort_keys=True).encode())


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
