"""Models from anywhere: the default model, directories, GGUF files, hub ids, Orbax."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp

from sparsespec_jax.model import Params, param_shapes
from sparsespec_jax.model_config import ModelConfig, config_from_json, config_to_json
from sparsespec_jax.tokenizer import Tokenizer, tokenizer_from_directory

DEFAULT_SPEC = "smollm2"

# A directory with this file was written by save_checkpoint.
_MARKER = "sparsespec_model.json"
_PARAMS = "params"
_HUB_FILES = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


@dataclass(frozen=True, kw_only=True)
class Model:
    """A loaded model; params live on the default device in the dtype asked for."""

    config: ModelConfig
    params: Params
    tokenizer: Tokenizer | None  # None: token ids only, tokenizer_problem says why
    name: str
    tokenizer_problem: str = "none was given"

    def require_tokenizer(self) -> Tokenizer:
        """The tokenizer.

        Raises:
            ValueError: the model came without one; the message says why.
        """
        if self.tokenizer is None:
            raise ValueError(
                f"model {self.name!r} has no tokenizer: {self.tokenizer_problem}. Pass "
                "token ids instead of text, or load the model with its tokenizer"
            )
        return self.tokenizer


def load_model(
    spec: str | Path = DEFAULT_SPEC,
    *,
    dtype=jnp.bfloat16,
    cache_dir: str | Path | None = None,
) -> Model:
    """The model that spec names.

    spec: "smollm2" (the default model, fetched once); a Hugging Face directory; a
        directory written by ``save_checkpoint``; a .gguf file; or a hub id such as
        "Qwen/Qwen3-8B".
    dtype: of the parameters and of the computation; quantised weights are
        dequantised in float32 and then cast.
    cache_dir: where fetched files are kept; None: see ``user_cache_dir`` for the
        default model, huggingface_hub's own cache for hub ids.

    Raises:
        ValueError: spec names nothing, or what it names is damaged, incomplete or
            of an unsupported architecture.
        RuntimeError: something must be fetched and cannot be.
    """
    dtype = jnp.dtype(dtype)
    if dtype not in (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)):
        raise ValueError(f"dtype must be float32 or bfloat16, got {dtype.name}")
    path = Path(spec).expanduser()
    if str(spec) == DEFAULT_SPEC:
        from sparsespec_jax.default_model import default_gguf

        return _from_gguf(default_gguf(cache_dir), dtype=dtype, name=DEFAULT_SPEC)
    if path.suffix == ".gguf":
        return _from_gguf(path, dtype=dtype, name=path.stem)
    if path.is_dir():
        return _from_directory(path, dtype=dtype, name=path.resolve().name)
    if _is_hub_id(str(spec)):
        return _from_directory(
            _fetch(str(spec), cache_dir), dtype=dtype, name=str(spec)
        )
    raise ValueError(
        f"there is no model at {str(spec)!r}; give {DEFAULT_SPEC!r}, a directory with "
        "config.json and safetensors, a directory written by save_checkpoint, a .gguf "
        "file, or a hub id like 'Qwen/Qwen3-8B'"
    )


def _is_hub_id(spec: str) -> bool:
    parts = spec.split("/")
    return len(parts) == 2 and all(parts) and not spec.startswith((".", "~"))


def _from_gguf(path: Path, *, dtype, name: str) -> Model:
    from sparsespec_jax.gguf_weights import GgufFile, gguf_tokenizer, load_gguf

    file = GgufFile(path)
    config, params = load_gguf(file, dtype=dtype)
    tokenizer, problem = None, ""
    try:
        tokenizer = gguf_tokenizer(file)
    except ValueError as error:
        problem = str(error)
    return Model(
        config=config,
        params=params,
        tokenizer=tokenizer,
        name=name,
        tokenizer_problem=problem,
    )


def _from_directory(directory: Path, *, dtype, name: str) -> Model:
    from sparsespec_jax.hf_weights import load_hf

    if (directory / _MARKER).is_file():
        config, params = _restore(directory, dtype=dtype)
    else:
        config, params = load_hf(directory, dtype=dtype)
    tokenizer, problem = None, f"{directory} has no tokenizer.json"
    if (directory / "tokenizer.json").exists():
        # Files that are there but damaged raise: only their absence is a choice.
        tokenizer = tokenizer_from_directory(directory, eos_ids=config.eos_ids)
    return Model(
        config=config,
        params=params,
        tokenizer=tokenizer,
        name=name,
        tokenizer_problem=problem,
    )


def _fetch(repo_id: str, cache_dir: str | Path | None) -> Path:
    if importlib.util.find_spec("huggingface_hub") is None:
        raise RuntimeError(
            f"{repo_id!r} must be fetched from the hub, which needs the package "
            "huggingface_hub: `pip install huggingface_hub`"
        )
    import huggingface_hub

    try:
        found = huggingface_hub.snapshot_download(
            repo_id, allow_patterns=list(_HUB_FILES), cache_dir=cache_dir
        )
    except Exception as error:  # network, permission and cache errors of many kinds
        raise RuntimeError(
            f"{repo_id!r} is no directory here and could not be fetched from the hub "
            f"({type(error).__name__}: {error}). Check the id and the network (gated "
            "models need `hf auth login`), or give a local directory"
        ) from error
    return Path(found)


def save_checkpoint(model: Model, directory: str | Path) -> None:
    """Write a model as an Orbax checkpoint that ``load_model`` reads.

    The directory gets the parameters in their present dtype (Orbax, under
    ``params``), the configuration, and the tokenizer if there is one.

    Raises:
        ValueError: directory holds something already.
    """
    import orbax.checkpoint as ocp  # a second to import, needed by few runs

    directory = Path(directory).absolute()
    if directory.exists() and any(directory.iterdir()):
        raise ValueError(f"{directory} is not empty; give a new or empty directory")
    directory.mkdir(parents=True, exist_ok=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory / _PARAMS, model.params)
    if model.tokenizer is not None:
        model.tokenizer.save(directory)
    # Last: a directory with the marker is complete.
    (directory / _MARKER).write_text(config_to_json(model.config), encoding="utf-8")


def _restore(directory: Path, *, dtype) -> tuple[ModelConfig, Params]:
    import orbax.checkpoint as ocp

    marker = directory / _MARKER
    try:
        config = config_from_json(marker.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{marker} is not JSON: {error}") from error
    path = (directory / _PARAMS).absolute()
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=device),
        param_shapes(config, dtype),
    )
    with ocp.StandardCheckpointer() as checkpointer:
        stored = checkpointer.metadata(path).item_metadata if path.is_dir() else None
        if stored is None:
            raise ValueError(f"{path} is missing or no Orbax checkpoint; save it again")
        _require_same_tree(path, wanted=wanted, stored=stored.tree)
        try:
            return config, checkpointer.restore(path, wanted)
        except jax.errors.JaxRuntimeError:
            raise  # of the device, e.g. out of memory
        except Exception as error:  # damaged data surfaces as bare Exception
            reason = str(error).partition(". See full")[0].partition("\n")[0]
            raise ValueError(
                f"{path} cannot be restored ({reason}); it is incomplete or damaged: "
                "save it again"
            ) from error


def _require_same_tree(path: Path, *, wanted, stored) -> None:
    def shapes(tree) -> dict[str, tuple[int, ...]]:
        flat, _ = jax.tree_util.tree_flatten_with_path(tree)
        return {
            "/".join(str(key.key) for key in keys): tuple(leaf.shape)
            for keys, leaf in flat
        }

    ours, theirs = shapes(wanted), shapes(stored)
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise ValueError(
                f"{path}: tensor {name} has shape {theirs.get(name, 'none: missing')}, "
                f"but the configuration asks for {ours.get(name, 'no such tensor')}; "
                "the checkpoint is of another model or version"
            )
