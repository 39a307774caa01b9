"""Selection of tokens for one query by an index of keys in few bits."""

from pallas_kernels.score_select.api import score_select
from pallas_kernels.score_select.codes import CodeLayout, code_layout, encode

__all__ = ["CodeLayout", "code_layout", "encode", "score_select"]
