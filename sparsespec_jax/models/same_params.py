"""Weights that take the place of others."""

import jax
import numpy as np


def check_same_params(old, new) -> None:
    """Raise ValueError, naming an array, unless `new` could take the place of `old`."""
    wanted, given = _described(old), _described(new)
    for name in sorted(wanted.keys() | given.keys()):
        if wanted.get(name) != given.get(name):
            raise ValueError(
                "params must have the names, shapes and types of those in use: "
                f"{name} is {given.get(name, 'missing')}, not "
                f"{wanted.get(name, 'among those in use')}; load them for the same "
                "model and dtype"
            )


def _described(params) -> dict[str, str]:
    """What each leaf of a tree is, by its path."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): (
            f"{leaf.dtype}{list(leaf.shape)}"
            if isinstance(leaf, jax.Array | np.ndarray)
            else f"a {type(leaf).__name__}"
        )
        for path, leaf in leaves
    }
