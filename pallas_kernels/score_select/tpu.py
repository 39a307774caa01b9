"""Scoring by an index for TPUs: XLA scores, the kernel of `select_tokens` selects.

Channels of a page are not read alone there: a tile has 8 rows of 128 words. XLA reads
the codes of all channels and widens those of 16, so this form does not save what the
index could.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.array_types import KeyCodes, PageTable, PerLane, Queries
from pallas_kernels.score_select.codes import CodeLayout
from pallas_kernels.score_select.reference import index_scores, ranks_of
from pallas_kernels.select_tokens.api import SelectedTokens
from pallas_kernels.select_tokens.tpu import select_tokens_tpu


@functools.partial(
    jax.jit, static_argnames=("layout", "cap", "num_recent", "scale", "interpret")
)
def score_select_tpu(
    q: Queries,
    codes: KeyCodes,
    page_table: PageTable,
    lengths: PerLane,
    budgets: PerLane,
    *,
    layout: CodeLayout,
    cap: int,
    num_recent: int,
    scale: float,
    interpret: bool | pltpu.InterpretParams = False,
) -> SelectedTokens:
    """Returns what `api.score_select` documents.

    Raises: as the TPU kernel of `select_tokens`.
    """
    scores = index_scores(q, codes, page_table, lengths, layout=layout, scale=scale)
    ranks = ranks_of(scores).astype(jnp.float32)
    return select_tokens_tpu(
        ranks,
        lengths,
        budgets,
        cap=cap,
        num_recent=num_recent,
        per_layer=False,
        interpret=interpret,
    )
