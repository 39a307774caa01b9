"""Selection of tokens for one query by an index of keys in few bits."""

from pallas_kernels.score_select.api import check_served, score_select
from pallas_kernels.score_select.codes import CodeLayout, code_layout, encode

__all__ = ["CodeLayout", "check_served", "code_layout", "encode", "score_select"]
