"""An EAGLE-3 drafting head (arXiv 2503.01840) as a proposer: one layer over features.

The head reads the target's streams behind three of its layers and the token that came
next, and predicts the token after it; its own output stands for the features of the
tokens that it drafts. It shares the target's embedding and output projection.

Two things differ from the published head: it drafts a chain and no tree, and it attends
to the last `window` tokens only, so a slot keeps a ring of features and no KV cache.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from pallas_kernels.rotate_heads import rotate_heads
from sparsespec_jax.array_types import (
    Features,
    PerToken,
    Proposed,
    Stream,
    TextKeys,
    TextQueries,
    TextVisible,
)
from sparsespec_jax.models import transformer as model_lib
from sparsespec_jax.models.config import ModelConfig
from sparsespec_jax.models.layer import RmsNorm
from sparsespec_jax.models.option_fields import put_int
from sparsespec_jax.models.products import Projection
from sparsespec_jax.models.rope import rope_tables
from sparsespec_jax.plan.shape import StepShape
from sparsespec_jax.proposers.base import ProposalView

_MASKED = -1e30
_EXACT = dict(precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def feature_layers(config: ModelConfig) -> tuple[int, int, int]:
    """Layers whose output streams the head reads: low, middle and high."""
    last = config.num_layers - 1
    return tuple(min(max(i, 0), last) for i in (1, last // 2, last - 3))


class EagleHead(nn.Module):
    """The head; tokens on a flat axis T, attention brought by the caller."""

    config: ModelConfig
    dtype: Any = jnp.float32

    def setup(self):
        """Declare the submodules."""
        c, dtype = self.config, self.dtype
        hidden, heads = (c.hidden_size,), (c.num_kv_heads, c.group_size + 2, c.head_dim)
        norm = functools.partial(RmsNorm, c.norm_eps, dtype)
        self.fuse_features = Projection(hidden, dtype)
        self.token_norm, self.feature_norm = norm(), norm()
        self.qkv, self.out = Projection(heads, dtype), Projection(hidden, dtype)
        self.mlp_norm, self.final_norm = norm(), norm()
        self.gate_up = Projection((2, c.intermediate_size), dtype)
        self.down = Projection(hidden, dtype)

    def fuse(self, features: Features) -> Stream:
        """Three streams side by side to the head's input."""
        return self.fuse_features(features)

    def step(
        self, feature: Stream, embedded: Stream, positions: PerToken, attend: Callable
    ) -> Stream:
        """Next features of features and the embedded tokens after them.

        `attend(q [T, N, D], k [T, H, D], v [T, H, D])` returns [T, N, D].
        """
        c = self.config
        both = jnp.concatenate(
            [self.token_norm(embedded), self.feature_norm(feature)], -1
        )
        qkv = self.qkv(both)
        q, rows = rotate_heads(qkv, *rope_tables(positions, c), impl="reference")
        mixed = attend(q, *jnp.split(rows, 2, axis=-1))
        x = feature + self.out(mixed.astype(self.dtype).reshape(feature.shape[0], -1))
        inner = self.gate_up(self.mlp_norm(x))
        return x + self.down(nn.silu(inner[:, 0]) * inner[:, 1])

    def normed(self, feature: Stream) -> Stream:
        """What the target's output projection takes."""
        return self.final_norm(feature)

    def everything(self, features: Features, embedded: Stream) -> Stream:
        """Touch every parameter, for init."""
        positions = jnp.zeros(features.shape[0], jnp.int32)
        x = self.step(self.fuse(features), embedded, positions, lambda q, k, v: q)
        return self.normed(x)


def init_head(config: ModelConfig, seed: int, dtype: Any = jnp.float32):
    """Random parameters of a head for the target `config`."""
    wide, narrow = (
        jnp.zeros((1, 3 * config.hidden_size)),
        jnp.zeros((1, config.hidden_size)),
    )
    head = EagleHead(config, dtype)
    return head.init(jax.random.key(seed), wide, narrow, method="everything")["params"]


def attention(
    query: TextQueries, keys: TextKeys, values: TextKeys, visible: TextVisible
) -> TextQueries:
    """Attention of a text's queries over its visible keys."""
    batch, num, heads, size = query.shape
    grouped = query.reshape(batch, num, keys.shape[2], -1, size)
    logits = jnp.einsum("bqhgd,bkhd->bhgqk", grouped, keys, **_EXACT) * size**-0.5
    logits = jnp.where(visible[:, None, None], logits, _MASKED)
    weights = jax.nn.softmax(logits, -1)
    out = jnp.einsum("bhgqk,bkhd->bqhgd", weights, values, **_EXACT)
    return out.reshape(batch, num, heads, size)


@dataclasses.dataclass(frozen=True, eq=False)
class Eagle:
    """The proposer: a trained head for one target model.

    Args:
      config: the target's ModelConfig.
      params: of the head (`init_head`, `load_eagle`).
      window: tokens that the head looks back on.

    Raises:
      ValueError: window < 1.
    """

    config: ModelConfig
    params: Any
    window: int = 32

    def __post_init__(self):
        put_int(self, "window", 1)

    @property
    def feature_layers(self):
        """Streams of the target that a step must hand over."""
        return feature_layers(self.config)

    def init_memory(self, shape: StepShape) -> dict[str, Any]:
        """Weights, and a ring of features per slot with the position of each.

        Rows of rejected drafts lie in the ring too, so it is longer than the window.
        """
        ring = (shape.num_slots, self.window + shape.num_queries)
        dtype = jax.tree.leaves(self.params)[0].dtype
        size = 3 * self.config.hidden_size
        return {
            "params": jax.tree.map(jnp.copy, self.params),
            "features": jnp.zeros((*ring, size), dtype),
            "positions": jnp.full(ring, -1, jnp.int32),
        }

    def propose_from(
        self, view: ProposalView, memory: dict[str, Any], num_drafts: int
    ) -> tuple[Proposed, dict[str, Any]]:
        """(greedy drafts, memory) after a verification."""
        memory = self._remember(view, memory)
        lanes = view.slots.size
        back = jnp.arange(self.window)[None] - self.window
        positions = view.lengths[:, None] + back  # of the last committed tokens
        place = positions % memory["positions"].shape[1]
        features = memory["features"].at[view.slots[:, None], place].get(mode="clip")
        stored = memory["positions"].at[view.slots[:, None], place].get(mode="clip")
        known = (stored == positions) & (positions >= 0)
        positions = jnp.maximum(positions, 0)
        tokens = jnp.take_along_axis(view.history, positions + 1, axis=1)
        chain = _Chain(self, memory["params"], view, known, lanes)
        feature = chain.fuse(jnp.where(known[..., None], features, 0))
        feature = chain.step(feature, tokens, positions)[:, -1:]
        drafts = [chain.best(feature)]
        for i in range(1, num_drafts):
            place = view.lengths[:, None] + i - 1
            feature = chain.step(feature, drafts[-1], place)
            drafts.append(chain.best(feature))
        return jnp.concatenate(drafts, axis=1), memory

    def _remember(self, view, memory):
        """Store the features of the rows just verified; a seed forgets the rest."""
        row, ring = (
            jnp.arange(view.features.shape[1])[None],
            memory["positions"].shape[1],
        )
        positions = view.starts[:, None] + row
        place = jnp.where(row < view.num_rows[:, None], positions % ring, ring)
        slots = view.slots[:, None]
        old = memory["positions"].at[view.slots].get(mode="clip")
        old = jnp.where(view.is_seed[:, None], -1, old)
        known = memory["positions"].at[view.slots].set(old, mode="drop")
        dtype = memory["features"].dtype
        return memory | {
            "positions": known.at[slots, place].set(positions, mode="drop"),
            "features": memory["features"]
            .at[slots, place]
            .set(view.features.astype(dtype), mode="drop"),
        }


class _Chain:
    """Runs the head over a window, then token by token behind it; E lanes."""

    def __init__(self, eagle, params, view, known, lanes):
        self._head = EagleHead(eagle.config, model_lib.params_dtype(view.params))
        self._config, self._target = eagle.config, view.params
        self._params, self._lanes, self._known = params, lanes, known
        self._keys = self._values = None

    def _apply(self, *arguments, method):
        return self._head.apply({"params": self._params}, *arguments, method=method)

    def fuse(self, features):
        flat = features.reshape(-1, features.shape[-1])
        return self._apply(flat, method="fuse").reshape(*features.shape[:2], -1)

    def step(self, feature, tokens, positions):
        """Next features [E, n, hidden] of n tokens behind those seen so far."""
        num = tokens.shape[1]

        def attend(q, k, v):
            split = (self._lanes, num)
            q, k, v = (x.reshape(*split, *x.shape[1:]) for x in (q, k, v))
            if self._keys is None:
                self._keys, self._values = k, v
                order = jnp.tril(jnp.ones((num, num), bool))
                visible = order[None] & self._known[:, None]
                visible |= jnp.eye(num, dtype=bool)[None]  # no row without a key
            else:
                self._keys = jnp.concatenate([self._keys, k], 1)
                self._values = jnp.concatenate([self._values, v], 1)
                ones = jnp.ones((self._lanes, self._keys.shape[1]), bool)
                visible = ones.at[:, : self._known.shape[1]].set(self._known)[:, None]
            out = attention(q, self._keys, self._values, visible)
            return out.reshape(-1, *out.shape[2:])

        embedded = self._target["embed"]["weight"][tokens.ravel()]
        flat = feature.reshape(-1, feature.shape[-1])
        out = self._apply(flat, embedded, positions.ravel(), attend, method="step")
        return out.reshape(self._lanes, num, -1)

    def best(self, feature):
        """The likeliest tokens int32 [E, 1] after features [E, 1, hidden]."""
        normed = self._apply(feature[:, 0], method="normed")
        scores = model_lib.logits(self._config, self._target, normed)
        return jnp.argmax(scores, -1)[:, None].astype(jnp.int32)


def save_eagle(eagle: Eagle, directory: str | pathlib.Path) -> None:
    """Write a head as an Orbax checkpoint and a JSON file.

    Raises:
      ValueError: the directory exists.
    """
    import orbax.checkpoint as ocp

    path = pathlib.Path(directory).absolute()
    if path.exists():
        raise ValueError(f"{path} exists; name another directory")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "params", eagle.params)
    text = json.dumps({"window": eagle.window, "hidden": eagle.config.hidden_size})
    (path / "eagle.json").write_text(text + "\n")


def load_eagle(config: ModelConfig, directory: str | pathlib.Path) -> Eagle:
    """The head that `save_eagle` wrote, for the target `config`.

    Raises:
      ValueError: no head is there, or it was made for another hidden size.
    """
    import orbax.checkpoint as ocp

    path = pathlib.Path(directory).absolute()
    if not (path / "eagle.json").is_file():
        raise ValueError(f"{path} holds no EAGLE head (eagle.json is missing)")
    stored = json.loads((path / "eagle.json").read_text())
    if stored["hidden"] != config.hidden_size:
        raise ValueError(
            f"{path} was made for hidden size {stored['hidden']}, the target has "
            f"{config.hidden_size}"
        )
    wanted = jax.eval_shape(lambda: init_head(config, 0))
    with ocp.StandardCheckpointer() as checkpointer:
        params = checkpointer.restore(path / "params", wanted)
    return Eagle(config, params, window=stored["window"])
