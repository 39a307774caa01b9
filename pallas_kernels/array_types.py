"""Axis letters of the kernels, and the types of the arrays that they take and give.

One letter, one meaning; `sparsespec_jax/array_types.py` adds those of an engine::

    T  tokens of one call;  N  query heads;  H  KV heads;  G = N / H  (GQA group)
    D  head size;  KV  elements of a row, K then V: 2 * D
    P  pages of the pool;  ps  tokens per page
    W  columns of a page table, Wd of one of drafts;  X  key columns, W * ps
    M  elements of the residual stream of a token;  L  layers

A word names the other axes. `#H` is H or 1, for all heads; `*parts` is nothing, or the
number of parts of a product that are still to be summed.

Types of a call are checked together: a letter has one size in all of them. jaxtyping
spells them, and the tests switch a checker on (`tests/conftest.py`). Without jaxtyping
a type is the array's; nothing is ever checked by a type outside the tests.
"""

import jax
import numpy as np

try:
    from jaxtyping import AbstractDtype, Bool, Float32, Int8, Int32
except ImportError:  # an extra of the tests

    class AbstractDtype:
        """Spells an array of some dtype and shape: any array."""

        def __class_getitem__(cls, array_and_shape: tuple) -> type:
            """Returns the type of the array."""
            return array_and_shape[0]

    Bool = Float32 = Int8 = Int32 = AbstractDtype

Array = jax.Array | np.ndarray  # a call puts numpy's on the device


class KvFloat(AbstractDtype):
    """What queries, keys and values are made of."""

    dtypes = ("bfloat16", "float32")


# Pages, and tables of them; ids outside [0, P) mean "no page".
KvPages = KvFloat[Array, "P H ps KV"]
KvPagesOfD = KvFloat[Array, "P H ps 2*D"]  # beside queries, which have D
PageTable = Int32[Array, "lanes W"]
TargetTable = Int32[Array, "lanes Wd"]

# Numbers of lanes, and of their heads.
PerLane = Int32[Array, "lanes"]
PerHead = Int32[Array, "lanes H"]

# Codes of keys, by groups of a page: an index (`score_select/codes.py`).
KeyCodes = Int32[Array, "P H groups code_words"]
GroupKeys = KvFloat[Array, "... group D"]
GroupFlags = Bool[Array, "... group"]
GroupCodes = Int32[Array, "... code_words"]
RoundedKeys = KvFloat[Array, "... group D"]

# Attention.
Queries = KvFloat[Array, "T N D"]
Mass = Float32[Array, "mass_lanes H X"]
MassBuffer = Float32[Array, "places mass_lanes H X"]

# Selection and gather: lists of at most `cap` positions.
Scores = Float32[Array, "lanes H X"]
Positions = Int32[Array, "lanes H cap"]
Indices = Int32[Array, "lanes #H cap"]
Counts = Int32[Array, "lanes #H"]
IndicesOfLayers = Int32[Array, "L lanes #H cap"]
CountsOfLayers = Int32[Array, "L lanes #H"]

# New rows, and places of which some take a row once more.
NewRows = KvFloat[Array, "rows H KV"]
Places = Int32[Array, "places #H"]

# Heads of a fused projection, a table of angles, factors of a norm; what they become.
Projection = KvFloat[Array, "*parts T H heads D"]  # heads = G + 2
Angles = Float32[Array, "T D//2"]
HeadScale = KvFloat[Array, "D"]
RowsOfHeads = KvFloat[Array, "T H 2*D"]

# The residual stream.
Stream = KvFloat[Array, "T M"]
StreamParts = KvFloat[Array, "*parts T M"]
StreamScale = KvFloat[Array, "M"]

# A product of many rows, and of any number of outputs.
ManyRows = KvFloat[Array, "T inputs"]
Weight = KvFloat[Array, "inputs outputs"]
ProductRows = KvFloat[Array, "T outputs"]

# A product of few rows with a weight in 8 bits: as it is, or in blocks of 64 outputs by
# 128 inputs; and what a value of each output counts.
FewRows = KvFloat[Array, "T inputs"]
Int8Values = Int8[Array, "outputs inputs"]
Int8Blocks = Int8[Array, "row_blocks column_blocks 32 256"]
OutputScale = Float32[Array, "outputs"]
ProductParts = KvFloat[Array, "*parts T outputs"]
