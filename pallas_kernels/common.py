"""Argument checks and the choice of implementation, shared by every kernel."""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

IMPLS = ("reference", "tpu", "gpu", "tpu_interpret", "gpu_interpret")

# Stands for minus infinity in masked logits. Finite, so that a difference of two
# masked logits is 0 and not NaN.
MASK_VALUE = -1e30

POOL_DTYPES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32))


@functools.cache
def default_impl() -> str:
    """Returns "gpu", "tpu" or "reference" (CPU), decided once per process."""
    backend = jax.default_backend()
    names = {"gpu": "gpu", "cuda": "gpu", "tpu": "tpu", "cpu": "reference"}
    if backend not in names:
        raise NotImplementedError(
            f"no implementation for the platform {backend!r}; "
            "pass impl='reference' to run plain jnp there"
        )
    return names[backend]


def is_for_gpu(impl: str | None) -> bool:
    """Returns whether `impl` (None: that of the platform) is made for GPUs."""
    return (default_impl() if impl is None else impl).startswith("gpu")


def load_implementation(package: str, op: str, impl: str | None) -> Callable[..., Any]:
    """Returns the function of `impl` for `op`; only its own module is imported.

    Args:
      package: package of the operation, e.g. "pallas_kernels.gather_kv".
      op: name of the operation, e.g. "gather_kv".
      impl: one of `IMPLS`, or None for `default_impl()`.

    Raises:
      ValueError: unknown `impl`.
      NotImplementedError: the package has no module for that platform.
    """
    impl = default_impl() if impl is None else impl
    if impl not in IMPLS:
        raise ValueError(f"impl is {impl!r}; choose one of {', '.join(IMPLS)}")
    platform, _, mode = impl.partition("_")
    try:
        module = importlib.import_module(f"{package}.{platform}")
    except ModuleNotFoundError as error:
        if error.name != f"{package}.{platform}":
            raise
        raise NotImplementedError(
            f"{op} has no {platform!r} implementation; impl='reference' always works"
        ) from error
    function = getattr(module, f"{op}_{platform}")
    if platform == "reference":
        return function
    return functools.partial(function, interpret=mode == "interpret")


def as_rounded(x: jax.Array) -> jax.Array:
    """Returns `x` in float32 with no more bits than its dtype has.

    Alone, a conversion back to float32 is left out by XLA together with the one before
    it, where both are in one fusion; results would depend on what is fused.
    """
    dtype = jnp.finfo(x.dtype)
    return jax.lax.reduce_precision(x.astype(jnp.float32), dtype.nexp, dtype.nmant)


def sum_of_parts(y: jax.Array, dtype: jnp.dtype, ndim: int = 2) -> jax.Array:
    """Returns the sum of parts [parts, T, M], in their order; [T, M] as it is.

    `ndim` is the number of axes of the sum, if they are not T and M.
    """
    if y.ndim == ndim:
        return y
    return as_rounded(functools.reduce(jnp.add, y).astype(dtype)).astype(dtype)


def rms_norm(wide: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Returns float32 rows `wide` over their root mean square, times scale."""
    power = jnp.mean(wide * wide, axis=-1, keepdims=True)
    return wide * jax.lax.rsqrt(power + eps) * scale.astype(jnp.float32)


def check_shape(name: str, array: jax.Array, expected: tuple, meaning: str) -> None:
    """Raises ValueError unless `array` has the `expected` shape (None = any size)."""
    shape = tuple(array.shape)
    same_rank = len(shape) == len(expected)
    if not same_rank or any(
        e is not None and s != e for s, e in zip(shape, expected, strict=True)
    ):
        wanted = ", ".join("any" if e is None else str(e) for e in expected)
        raise ValueError(f"{name} has shape {shape}, expected ({wanted}): {meaning}")


def check_dtype(name: str, array: jax.Array, *expected: Any) -> None:
    """Raises ValueError unless the dtype of `array` is one of `expected`."""
    dtype = jnp.dtype(array.dtype)
    names = [jnp.dtype(e).name for e in expected]
    if dtype.name not in names:
        raise ValueError(
            f"{name} has dtype {dtype.name}, expected {' or '.join(names)}; "
            f"cast it with {name}.astype(...)"
        )


def check_pool(kv_pages: jax.Array) -> None:
    """Raises ValueError unless `kv_pages` is a pool [P, H, ps, 2*D]."""
    meaning = "[P, H, page_size, 2*D], K then V in one row"
    check_shape("kv_pages", kv_pages, (None, None, None, None), meaning)
    check_dtype("kv_pages", kv_pages, *POOL_DTYPES)
    if kv_pages.shape[3] % 2 or 0 in kv_pages.shape:
        raise ValueError(
            f"kv_pages has shape {tuple(kv_pages.shape)}: the last axis must be even "
            "(K and V of equal size) and no axis may be empty"
        )
