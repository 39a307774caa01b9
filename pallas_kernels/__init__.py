"""Kernels around attention over a paged KV pool.

Each operation is a package with the same modules: `api` (public function),
`reference` (the specification in plain jnp), `tpu` and `gpu` (Pallas kernels), `cases`
(named shapes of tests and measurements) and `bench` (times some of them; all together:
`python -m pallas_kernels.bench`).

    from pallas_kernels.paged_attention import LaneGroup, paged_attention
    from pallas_kernels.select_tokens import select_tokens
    from pallas_kernels.score_select import code_layout, encode, score_select
    from pallas_kernels.code_keys import code_keys
    from pallas_kernels.gather_kv import gather_kv
    from pallas_kernels.write_rows import write_rows
    from pallas_kernels.rotate_heads import rotate_heads
    from pallas_kernels.add_norm import add_norm
    from pallas_kernels.matmul import matmul
    from pallas_kernels.int8_matmul import int8_matmul, pack, quantise
"""

from pallas_kernels.common import IMPLS, default_impl

__all__ = ["IMPLS", "default_impl"]
