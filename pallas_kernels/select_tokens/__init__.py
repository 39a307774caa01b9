"""Exact selection of the tokens that the next draft steps attend to."""

from pallas_kernels.select_tokens.api import SelectedTokens, select_tokens

__all__ = ["SelectedTokens", "select_tokens"]
