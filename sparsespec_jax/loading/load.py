"""Models from anywhere: named ones, directories, GGUF files, hub ids, Orbax."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from sparsespec_jax.config import EngineConfig
from sparsespec_jax.loading.pinned_models import PINNED
from sparsespec_jax.loading.tokenizer import Tokenizer, tokenizer_from_directory
from sparsespec_jax.models.config import ModelConfig, config_from_json, config_to_json
from sparsespec_jax.models.sharding import (
    check_cut,
    loading_shardings,
    model_mesh,
)
from sparsespec_jax.models.transformer import Params, param_shapes, params_dtype

DEFAULT_SPEC = "smollm2"

# A directory with this file was written by save_checkpoint.
_MARKER = "sparsespec_model.json"
_PARAMS = "params"
_HUB_FILES = (
    "config.json",
    "adapter_config.json",  # so that an adapter is refused, not left out
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


@dataclass(frozen=True, kw_only=True)
class Model:
    """A loaded model, params in the dtype asked for.

    They live on the default device, or each part on its own (see `load_model`).
    """

    config: ModelConfig
    params: Params
    tokenizer: Tokenizer | None  # None: token ids only, tokenizer_problem says why
    name: str
    tokenizer_problem: str = "none was given"

    def __repr__(self):
        leaves = jax.tree.leaves(self.params)
        count = sum(leaf.size for leaf in leaves)
        kind = params_dtype(self.params)
        tokenizer = "no tokenizer" if self.tokenizer is None else "tokenizer"
        return (
            f"Model({self.name!r}, {self.config.num_layers} layers, "
            f"{count / 1e6:.1f} M parameters, {kind}, {tokenizer})"
        )

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
    tensor_parallel: int = 1,
) -> Model:
    """The model that spec names.

    spec: "smollm2" (the default model), "qwen2.5-coder-0.5b" or "qwen2.5-coder-1.5b",
        fetched once; a Hugging Face directory; a directory written by
        ``save_checkpoint``; a .gguf file, any part of one in several parts, or a
        directory that holds one; or a hub id such as "Qwen/Qwen3-8B".
    dtype: of the parameters and of the computation; quantised weights are
        dequantised in float32 and then cast.
    cache_dir: where fetched files are kept; None: see ``user_cache_dir`` for the
        named models, huggingface_hub's own cache for hub ids.
    tensor_parallel: devices that share the weights; each is sent its part and no
        device has all. An engine of this model has the same in its EngineConfig.

    Raises:
        ValueError: spec names nothing, or what it names is damaged, incomplete or
            of an unsupported architecture; or so many devices cannot share it.
        RuntimeError: something must be fetched and cannot be.
    """
    degree = EngineConfig(tensor_parallel=tensor_parallel).tensor_parallel
    to = dict(dtype=_checked_dtype(dtype), mesh=model_mesh(degree))
    if not isinstance(spec, str | os.PathLike):
        raise ValueError(f"a model is given as a name or a path, got {spec!r}")
    if (name := str(spec)) in PINNED:
        from sparsespec_jax.loading.named_models import named_gguf

        return _from_gguf(named_gguf(name, cache_dir), name=name, **to)
    path = Path(os.path.expanduser(spec))
    if os.path.isdir(path):
        return _from_directory(path, name=path.resolve().name, **to)
    if path.suffix.lower() == ".gguf":
        return _from_gguf(path, name=path.stem, **to)
    if os.path.isfile(path):
        raise ValueError(
            f"{path} is one file of a model; give the directory that holds it, with "
            f"config.json and all safetensors ({path.parent}), or a .gguf file"
        )
    if _is_hub_id(name):
        return _from_directory(_fetch(name, cache_dir), name=name, **to)
    raise ValueError(
        f"there is no model at {name!r}; give a name ({', '.join(PINNED)}), a "
        "directory with config.json and safetensors, a directory written by "
        "save_checkpoint, a .gguf file, or a hub id like 'Qwen/Qwen3-8B'"
    )


def _checked_dtype(dtype) -> jnp.dtype:
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found not in (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)):
        name = dtype if found is None else found.name
        raise ValueError(f"dtype must be float32 or bfloat16, got {name}")
    return found


def _is_hub_id(spec: str) -> bool:
    parts = spec.split("/")
    return len(parts) == 2 and all(parts) and not spec.startswith((".", "~"))


def _from_gguf(path: Path, *, dtype, name: str, mesh: Mesh | None) -> Model:
    from sparsespec_jax.loading.gguf_config import gguf_config
    from sparsespec_jax.loading.gguf_file import GgufFile
    from sparsespec_jax.loading.gguf_weights import gguf_tokenizer, load_gguf

    file = GgufFile(path)
    config = gguf_config(file)
    check_cut(config, 1 if mesh is None else mesh.size)
    # Before the weights, which take long: a damaged vocabulary is told at once.
    tokenizer, problem = gguf_tokenizer(file, config)
    return Model(
        config=config,
        params=load_gguf(file, config, dtype=dtype, mesh=mesh),
        tokenizer=tokenizer,
        name=name,
        tokenizer_problem=problem,
    )


def _from_directory(directory: Path, *, dtype, name: str, mesh: Mesh | None) -> Model:
    from sparsespec_jax.loading.hf_config import hf_config
    from sparsespec_jax.loading.hf_weights import load_hf

    if (directory / _MARKER).is_file():
        config, load = _marked_config(directory), _restore
    elif (path := _only_gguf(directory)) is not None:
        return _from_gguf(path, dtype=dtype, name=path.stem, mesh=mesh)
    else:
        config, load = hf_config(directory), load_hf
    check_cut(config, 1 if mesh is None else mesh.size)
    tokenizer, problem = None, f"{directory} has no tokenizer.json"
    if (directory / "tokenizer.json").exists():
        # Files that are there but damaged raise: only their absence is a choice.
        tokenizer = tokenizer_from_directory(directory, eos_ids=config.eos_ids)
        problem = ""
    config, params = load(directory, dtype=dtype, mesh=mesh)
    return Model(
        config=config,
        params=params,
        tokenizer=tokenizer,
        name=name,
        tokenizer_problem=problem,
    )


def _only_gguf(directory: Path) -> Path | None:
    """The GGUF model of a directory that holds one instead of a config.json."""
    if (directory / "config.json").exists():
        return None
    from sparsespec_jax.loading.gguf_file import models_in

    models = models_in(directory)
    if len(models) > 1:
        raise ValueError(
            f"{directory} holds {len(models)} GGUF models: "
            f"{', '.join(path.name for path in models)}; give the path of one of them"
        )
    return models[0] if models else None


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


def _marked_config(directory: Path) -> ModelConfig:
    marker = directory / _MARKER
    try:
        text = marker.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ValueError(f"{marker} cannot be read: {error}") from error
    return config_from_json(text, origin=str(marker))


def _restore(
    directory: Path, *, dtype, mesh: Mesh | None
) -> tuple[ModelConfig, Params]:
    import orbax.checkpoint as ocp

    config = _marked_config(directory)
    path = (directory / _PARAMS).absolute()
    with ocp.StandardCheckpointer() as checkpointer:
        try:
            found = checkpointer.metadata(path).item_metadata if path.is_dir() else None
            stored = None if found is None else _shapes(found.tree)
        except Exception as error:  # damaged metadata, in one of many ways
            raise ValueError(f"{path} is no Orbax checkpoint: {error}") from error
        if stored is None:
            raise ValueError(f"{path} is missing or no Orbax checkpoint; save it again")
        layers = {
            name.partition("/")[0] for name in stored if name.startswith("layer_")
        }
        if config.num_layers > len(layers):
            raise ValueError(
                f"{directory / _MARKER}: num_layers is {config.num_layers}, but {path} "
                f"has {len(layers)} layers"
            )
        shapes = param_shapes(config, dtype)
        wanted = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=place),
            shapes,
            loading_shardings(config, shapes, mesh),
        )
        _require_same_shapes(path, ours=_shapes(wanted), theirs=stored)
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


def _shapes(tree) -> dict[str, tuple[int, ...]]:
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        "/".join(str(key.key) for key in keys): tuple(leaf.shape) for keys, leaf in flat
    }


def _require_same_shapes(path: Path, *, ours, theirs) -> None:
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise ValueError(
                f"{path}: tensor {name} has shape {theirs.get(name, 'none: missing')}, "
                f"but the configuration asks for {ours.get(name, 'no such tensor')}; "
                "the checkpoint is of another model or version"
            )
