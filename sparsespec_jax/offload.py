"""KV pages to host memory and back, in chunks of one size.

A spill is a gather out of the pool followed by a copy to host memory, a restore a copy
to the device followed by a scatter into the donated pool. Both hang on the state that
the last step gave and the next step takes, which orders them; nothing waits for the
host and nothing compiles after `warm_up`. Host memory is taken once, on construction.
"""

import jax
import jax.numpy as jnp
import numpy as np

_HOST_MEMORY = "pinned_host"


class HostPages:
    """Chunks of KV pages in host memory.

    Args:
      state: the DecodeState whose pages will come and go.
      num_chunks: chunks to hold.
      chunk_pages: pages of a chunk.

    Raises:
      RuntimeError: the chunks came out of the device's memory.
    """

    def __init__(self, state, *, num_chunks, chunk_pages):
        pool = state.layers[0].kv_pages
        self._num_pages, self._chunk_pages = pool.shape[0], chunk_pages
        device = next(iter(pool.devices()))
        self._on_device = jax.sharding.SingleDeviceSharding(device)
        self._on_host = jax.sharding.SingleDeviceSharding(
            device, memory_kind=_HOST_MEMORY
        )
        shape = (len(state.layers), chunk_pages, *pool.shape[1:])
        empty = jnp.zeros(shape, pool.dtype)
        jax.block_until_ready(empty)
        before = _bytes_in_use(device)
        # Pinned memory is slow to get and fast to use again.
        self._chunks = [
            jax.device_put(empty, self._on_host) for _ in range(num_chunks + 1)
        ]
        jax.block_until_ready(self._chunks)
        check_is_on_host(before, _bytes_in_use(device), empty.nbytes)
        self._chunks[-1] = None  # a copy under way while its chunk is still read
        self._arriving = []  # (pages, chunk on its way to the device)

    def warm_up(self, state):
        """Compile both copies; returns the state with its pages unchanged."""
        nowhere = self._page_ids(())
        chunk = jax.device_put(_gather(_pools(state), nowhere), self._on_host)
        chunk = jax.device_put(chunk, self._on_device)
        return _with_pools(state, _scatter(_pools(state), chunk, nowhere))

    def move(self, state, moves):
        """Start the copies of `moves` (PageMove) in order; returns the next state.

        A restored chunk may still be on its way then. It is in its place after the
        next call, and before anything is spilled.
        """
        state = self._place_arrived(state)
        for move in moves:
            pages = self._page_ids(move.pages)
            if move.to_host:
                state = self._place_arrived(state)
                self._chunks[move.chunk] = None  # its memory serves the new one
                chunk = _gather(_pools(state), pages)
                self._chunks[move.chunk] = jax.device_put(chunk, self._on_host)
            else:
                chunk = jax.device_put(self._chunks[move.chunk], self._on_device)
                self._arriving.append((pages, chunk))
        return state

    def _place_arrived(self, state):
        for pages, chunk in self._arriving:
            state = _with_pools(state, _scatter(_pools(state), chunk, pages))
        self._arriving = []
        return state

    def _page_ids(self, pages):
        """Page ids int32 [chunk_pages], padded with an id that is no page."""
        ids = np.full(self._chunk_pages, self._num_pages, np.int32)
        ids[: len(pages)] = pages
        return ids


def check_is_on_host(before, after, chunk_bytes):
    """Raise RuntimeError if the device's memory in use grew by a chunk or more.

    With --xla_gpu_command_buffer_update_mode=SKIP_TEMP, jaxlib 0.11.2 takes arrays of
    host memory from the device without saying so.
    """
    if after - before >= chunk_bytes:
        raise RuntimeError(
            f"page chunks for host memory took {after - before:,} bytes of the device: "
            "leave --xla_gpu_command_buffer_update_mode=SKIP_TEMP out of XLA_FLAGS, or "
            "set EngineConfig.kv_policy to 'recompute' or 'reserve'"
        )


def _bytes_in_use(device):
    """Bytes of the device's memory in use; 0 where nobody counts them."""
    return (device.memory_stats() or {}).get("bytes_in_use", 0)


def _pools(state):
    return tuple(layer.kv_pages for layer in state.layers)


def _with_pools(state, pools):
    layers = (
        layer._replace(kv_pages=pool)
        for layer, pool in zip(state.layers, pools, strict=True)
    )
    return state._replace(layers=tuple(layers))


@jax.jit
def _gather(pools, pages):
    """Pages of every layer, [L, C, H, ps, 2 * D]; what pads the ids is arbitrary."""
    return jnp.stack([pool.at[pages].get(mode="clip") for pool in pools])


def _scatter_pages(pools, chunk, pages):
    return tuple(
        pool.at[pages].set(rows, mode="drop")
        for pool, rows in zip(pools, chunk, strict=True)
    )


_scatter = jax.jit(_scatter_pages, donate_argnums=0)
