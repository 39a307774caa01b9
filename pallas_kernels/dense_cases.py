"""Named shapes of the kernels between two attentions, frozen as those of `cases`."""

import dataclasses

from pallas_kernels.cases import LARGE, SMALL

_SMOLLM2 = dict(num_heads=3, group_size=3, head_size=64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RotateCase:
    """One call of `rotate_heads`."""

    name: str
    num_tokens: int
    num_heads: int = 8
    group_size: int = 4
    head_size: int = 128
    is_normed: bool = True
    num_parts: int = 0  # of the projection; 0: it comes as one array of `dtype`
    dtype: str = "bfloat16"
    tags: frozenset[str] = LARGE

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[T, H, G + 2, D] of the projection."""
        return self.num_tokens, self.num_heads, self.group_size + 2, self.head_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormCase:
    """One call of `add_norm` on [T, N]."""

    name: str
    shape: tuple[int, int]
    dtype: str = "bfloat16"
    num_parts: int = 0  # of what is added; 0: it comes as one array like x
    tags: frozenset[str] = LARGE


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChainCase:
    """One call of `dense_chain`."""

    name: str
    num_tokens: int
    mixed: int  # width of attention's result
    hidden: int  # of the stream
    inner: int  # of the gate
    qkv: int | None  # of the next projection to heads; None: there is none
    dtype: str = "bfloat16"
    tags: frozenset[str] = LARGE


ROTATE_CASES = (
    RotateCase(name="single", num_tokens=1, head_size=16, dtype="float32", tags=SMALL),
    # Tokens that no tile divides, without and with a norm.
    RotateCase(
        name="rotate_ragged", num_tokens=11, is_normed=False, tags=SMALL, **_SMOLLM2
    ),
    RotateCase(name="rotate_bf16", num_tokens=9, num_heads=2, tags=SMALL),
    RotateCase(name="rotate_parts", num_tokens=9, num_heads=2, num_parts=3, tags=SMALL),
    RotateCase(
        name="rotate_parts_d64",
        num_tokens=5,
        is_normed=False,
        num_parts=2,
        tags=SMALL,
        **_SMOLLM2,
    ),
    # Steps of an engine: a large model, a small one, a prompt chunk beside the first.
    RotateCase(name="rotate_136", num_tokens=136),
    RotateCase(name="rotate_136_parts", num_tokens=136, num_parts=2),
    RotateCase(name="rotate_49_parts", num_tokens=49, num_parts=8),
    RotateCase(name="rotate_d64", num_tokens=512, is_normed=False, **_SMOLLM2),
    RotateCase(name="rotate_2184", num_tokens=2184),
)

NORM_CASES = (
    # Rows of a CTA, and of a warp; tokens that its warps do not divide; parts.
    NormCase(name="norm_wide", shape=(3, 1280), dtype="float32", tags=SMALL),
    NormCase(name="norm_narrow", shape=(9, 576), tags=SMALL),
    NormCase(name="norm_parts", shape=(3, 256), num_parts=3, tags=SMALL),
    NormCase(name="norm_parts_narrow", shape=(5, 96), num_parts=2, tags=SMALL),
    NormCase(name="norm_136", shape=(136, 4096)),
    NormCase(name="norm_136_parts", shape=(136, 4096), num_parts=2),
    NormCase(name="norm_49_parts", shape=(49, 4096), num_parts=8),
    NormCase(name="norm_512", shape=(512, 576)),
    NormCase(name="norm_2184", shape=(2184, 4096)),
)

_TINY = dict(mixed=48, hidden=32, inner=80, tags=SMALL)

CHAIN_CASES = (
    # All widths differ; also a last layer.
    ChainCase(name="chain_f32", num_tokens=3, qkv=96, dtype="float32", **_TINY),
    ChainCase(name="chain_bf16", num_tokens=9, qkv=96, **_TINY),
    ChainCase(name="chain_last", num_tokens=9, qkv=None, **_TINY),
)
