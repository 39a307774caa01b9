"""Store of new KV rows for Hopper GPUs, in Pallas Mosaic GPU.

One CTA per place: it reads the row of every head and stores it where it belongs. The
pool is updated in place.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.array_types import KvPages, NewRows, Places
from pallas_kernels.gpu_layouts import interpreter_of, row_layout


# Compiled once for all layers of a model.
@functools.partial(jax.jit, static_argnames=("copies_from", "interpret"))
def write_rows_gpu(
    kv_pages: KvPages,
    rows: NewRows,
    pages: Places,
    offsets: Places,
    *,
    copies_from: int = 0,
    interpret: bool | plgpu.InterpretGPUParams = False,
) -> KvPages:
    """Returns what `api.write_rows` documents, computed on a Hopper GPU."""
    num_pages, num_heads, _, row_size = kv_pages.shape
    num_rows, (num_places, num_lists) = rows.shape[0], pages.shape
    if row_size not in (32, 64) and row_size % 128:
        raise NotImplementedError(
            f"the head size is {row_size // 2}: the GPU kernel serves 16, 32 and "
            "multiples of 64; impl='reference' serves every size"
        )
    layout = row_layout(row_size)

    def body(row_ref, page_ref, offset_ref, pool_ref):
        place = lax.axis_index("place")
        row = jnp.where(place < num_rows, place, place - num_rows + copies_from)

        def load(head):
            window = row_ref.at[row, pl.ds(head, 1)]
            return plgpu.load(window, layout=layout, optimized=False)

        # All loads stand in front: they wait for memory together.
        lists = [min(head, num_lists - 1) for head in range(num_heads)]
        places = [(page_ref[place, i], offset_ref[place, i]) for i in lists]
        loaded = [load(head) for head in range(num_heads)]
        for head, (page, offset) in enumerate(places):

            @pl.when((page >= 0) & (page < num_pages))
            def _store(head=head, page=page, offset=offset):
                pool_ref[page, head, pl.ds(offset, 1), :] = loaded[head]

    pool_ref = jax.new_ref(kv_pages)
    plgpu.kernel(
        body,
        out_type=(),
        grid=(num_places,),
        grid_names=("place",),
        kernel_name="write_rows",
        # No thread reads what it or another one wrote.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=interpreter_of(interpret),
    )(rows, pages, offsets, pool_ref)
    return jax.freeze(pool_ref)
