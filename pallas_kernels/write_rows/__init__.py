"""Store of new KV rows in the pages of a pool."""

from pallas_kernels.write_rows.api import write_rows

__all__ = ["write_rows"]
