"""Copy of selected KV rows from the full pages to the draft pages of a slot."""

from pallas_kernels.gather_kv.api import gather_kv, gather_kv_layers

__all__ = ["gather_kv", "gather_kv_layers"]
