"""The drafting policies by name, and the simple ones among them.

To add one, write a function as `policy.Policy` describes and name it in `POLICIES`, or
pass the Policy itself as `SpeculationConfig.policy`.
"""

import pathlib
import runpy
from typing import Any

import jax.numpy as jnp

from sparsespec_jax import sampling
from sparsespec_jax.array_types import Selected, SelectedCounts
from sparsespec_jax.policies.base import (
    Policy,
    SelectionOptions,
    SelectionView,
    top_tokens,
)
from sparsespec_jax.policies.keys import double_sparsity, index_step, lserve, quest
from sparsespec_jax.policies.mass import mass_policy

Selection = tuple[Selected, SelectedCounts]


def window(view: SelectionView, options: SelectionOptions) -> Selection:
    """Attention sinks and the newest tokens (StreamingLLM, as MagicDec drafts)."""
    counts = jnp.minimum(view.budgets, view.lengths)
    sinks = jnp.minimum(options.num_sinks, counts)[:, None]
    place = jnp.arange(options.cap)[None]
    recent = view.lengths[:, None] - counts[:, None] + place
    indices = jnp.where(place < sinks, place, recent).astype(jnp.int32)
    return indices[:, None], counts[:, None]


def recents(view: SelectionView, options: SelectionOptions) -> Selection:
    """The newest tokens only."""
    return window(view, options._replace(num_sinks=0))


def everything(view: SelectionView, options: SelectionOptions) -> Selection:
    """The first tokens; with a budget of all, the dense draft that tests the loop."""
    counts = jnp.minimum(view.budgets, view.lengths)
    place = jnp.arange(options.cap, dtype=jnp.int32)[None, None]
    return jnp.broadcast_to(place, (counts.size, 1, options.cap)), counts[:, None]


def random(view: SelectionView, options: SelectionOptions) -> Selection:
    """Uniformly random positions, the floor of every comparison."""
    keys = jnp.arange(view.num_keys)
    salt = view.lengths * 64 + view.layer_index
    noise = sampling.gumbel(view.seeds, salt, keys, stream=sampling.DRAFT)
    scores = jnp.broadcast_to(
        noise[:, None], (noise.shape[0], view.num_kv_heads, view.num_keys)
    )
    return top_tokens(view, scores, options._replace(num_recent=0, per_layer=False))


_ALL = (
    mass_policy("pillar"),
    mass_policy("vegas", rows="edges", scope="layer"),
    mass_policy("pillar_last", rows="last"),
    mass_policy("pillar_widened", widen=0.7),
    mass_policy("pillar_decay", decay=0.5),
    mass_policy("pillar_window", window=2),
    mass_policy("pillar_mixed", decay=0.5, widen=0.7),
    mass_policy("pillar_churn", max_churn=0.25),
    mass_policy("pillar_anchors", anchor_every=2),
    mass_policy("top_p", top_p=0.85),
    mass_policy("h2o", decay=1.0, recent_share=0.5),
    mass_policy("snapkv", frozen=True, smooth=5, recent_share=0.5),
    quest(),
    double_sparsity(),
    lserve(),
    Policy("window", (), window, fixed_counts=True),
    Policy("recents", (), recents, fixed_counts=True),
    Policy("full", (), everything, fixed_counts=True),
    Policy("random", (), random, fixed_counts=True),
    mass_policy("oracle", per_step=True),
    quest("quest_step", per_step=True),
    double_sparsity("double_sparsity_step", per_step=True),
    index_step(),
    index_step("index_2bit", bits=2, page_size=64),
)
POLICIES = {policy.name: policy for policy in _ALL}


def resolve_policy(policy: Any) -> Policy:
    """The Policy named or given; ValueError for an unknown name."""
    if isinstance(policy, Policy):
        return policy
    if not isinstance(policy, str) or policy not in POLICIES:
        raise ValueError(
            f"policy must be one of {tuple(POLICIES)} or a Policy, got {policy!r}"
        )
    return POLICIES[policy]


def load_policy(location: str) -> Policy:
    """The Policy that a Python file defines, `location` being "path/to/file.py:NAME".

    Raises:
      ValueError: there is no such file or name, or it is no Policy.
    """
    path, _, name = location.rpartition(":")
    if not path or not pathlib.Path(path).is_file():
        raise ValueError(f"a policy file is given as FILE.py:NAME, got {location!r}")
    found = runpy.run_path(path).get(name)
    if not isinstance(found, Policy):
        raise ValueError(f"{path} must define {name} as a Policy, got {found!r}")
    return found
