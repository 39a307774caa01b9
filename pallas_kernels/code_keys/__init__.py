"""Codes of the newest keys of some lanes, written into an index."""

from pallas_kernels.code_keys.api import code_keys

__all__ = ["code_keys"]
