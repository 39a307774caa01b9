"""KV pages to host memory and back, in chunks of one size.

A spill is a gather out of the pool followed by a copy to host memory, a restore a copy
to the device followed by a scatter into the donated pool. Both hang on the state that
the last step gave and the next step takes, which orders them; nothing waits for the
host and nothing compiles after `warm_up`. Host memory is taken once, on construction.
"""

import functools
import os
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sparsespec_jax.array_types import PlanBuffer
from sparsespec_jax.device.sharding import CHUNK, POOL, made_on, mesh_of, on_shards
from sparsespec_jax.device.state import DecodeState
from sparsespec_jax.plan.buffer import PageMove
from sparsespec_jax.plan.shape import RESTORE_CHUNKS

_HOST_MEMORY = "pinned_host"


class HostPages:
    """Chunks of KV pages in host memory.

    Args:
      state: the DecodeState whose pages will come and go.
      num_chunks: chunks to hold.
      chunk_pages: pages of a chunk.

    Raises:
      RuntimeError: XLA_FLAGS make host memory the device's.
    """

    def __init__(self, state: DecodeState, num_chunks: int, chunk_pages: int):
        pools = _pools(state.layers[0])
        pool = pools[0]
        self._num_pages, self._chunk_pages = pool.shape[0], chunk_pages
        device = next(iter(pool.devices()))
        check_flags(device.platform, os.environ.get("XLA_FLAGS", ""))
        self._mesh = mesh_of(pool)
        if self._mesh is None:
            self._on_device = jax.sharding.SingleDeviceSharding(device)
            self._everywhere = self._on_device
        else:
            self._on_device = NamedSharding(self._mesh, CHUNK)
            self._everywhere = NamedSharding(self._mesh, PartitionSpec())
        self._on_host = self._on_device.with_memory_kind(_HOST_MEMORY)
        shapes = [((len(state.layers), chunk_pages, *x.shape[1:]), x.dtype)
                  for x in pools]  # fmt: skip

        def make():
            # Of each kind of pages: KV, and codes of its keys if there is an index.
            return tuple(jnp.zeros(*shape) for shape in shapes)

        empty = made_on(self._mesh, make, lambda made: (CHUNK,) * len(made))
        # Pinned memory is slow to get and fast to use again.
        self._chunks = [_put(empty, self._on_host) for _ in range(num_chunks + 1)]
        jax.block_until_ready(self._chunks)
        self._chunks[-1] = None  # a copy under way while its chunk is still read
        # What passes through the device takes the places of what passed before: were
        # they free in between, steps would find their own buffers elsewhere and their
        # graphs would have to be updated, for milliseconds.
        self._staged = [
            (self._page_ids(()), tuple(x + 0 for x in empty))
            for _ in range(RESTORE_CHUNKS)
        ]
        self._next = 0  # of the staged
        self._arriving = []  # staged chunks on their way into the pool

    @property
    def arrays(self):
        """Everything held, what is still on its way included."""
        return self._chunks, self._staged

    def warm_up(self, state: DecodeState, buffers: Sequence) -> DecodeState:
        """Compile the copies; returns the state with its pages unchanged.

        `buffers`: one plan buffer of each length for `sent_first`. Copies without pages
        go both ways through every place, so that these have settled when steps run.
        """
        for buffer in buffers:
            _touched(buffer)
        spare = len(self._chunks) - 1
        there_and_back = PageMove(True, spare, ()), PageMove(False, spare, ())
        for _ in range(len(self._staged) + 1):
            state = self.move(state, there_and_back)
        state = self._place_arrived(state)
        self._chunks[spare] = None
        return state

    def move(self, state: DecodeState, moves: Sequence[PageMove]) -> DecodeState:
        """Start the copies of `moves` (PageMove) in order; returns the next state.

        A restored chunk may still be on its way then. It is in its place after the
        next call, and before anything is spilled.
        """
        state = self._place_arrived(state)
        for move in moves:
            if move.to_host or len(self._arriving) == len(self._staged):
                state = self._place_arrived(state)
            place = self._next
            self._next = (place + 1) % len(self._staged)
            self._staged[place] = None  # its memory serves the new one
            pages = self._page_ids(move.pages)
            if move.to_host:
                self._chunks[move.chunk] = None
                gather = _gather if self._mesh is None else _gather_on(self._mesh)
                chunk = gather(_all_pools(state), pages)
                self._chunks[move.chunk] = _put(chunk, self._on_host)
            else:
                chunk = _put(self._chunks[move.chunk], self._on_device)
                self._arriving.append(place)
            self._staged[place] = (pages, chunk)
        return state

    def _place_arrived(self, state):
        for place in self._arriving:
            pages, chunk = self._staged[place]
            scatter = _scatter if self._mesh is None else _scatter_on(self._mesh)
            state = _with_pools(state, scatter(_all_pools(state), chunk, pages))
        self._arriving = []
        return state

    def _page_ids(self, pages):
        """Page ids int32 [chunk_pages], padded with an id that is no page."""
        ids = np.full(self._chunk_pages, self._num_pages, np.int32)
        ids[: len(pages)] = pages
        return jax.device_put(ids, self._everywhere)


def sent_first(
    buffer: PlanBuffer | None, moves: Sequence[PageMove], mesh: Mesh | None = None
) -> PlanBuffer | None:
    """Sends a plan's buffer ahead of the pages of `moves`; returns it on the device,
    or on every device of a mesh.

    The device takes one copy from the host at a time, in any order, and starts each
    when the work queued before it is done. Pages on their way would overtake the plan,
    and the step would wait for both; behind a program that takes the plan they cannot,
    and run beside the step.
    """
    if buffer is None:
        return None
    buffer = sent(buffer, mesh)
    return buffer if all(move.to_host for move in moves) else _touched(buffer)


def sent(buffer: PlanBuffer, mesh: Mesh | None) -> PlanBuffer:
    """A plan's buffer on the default device, or on every device of a mesh."""
    if mesh is None:
        return jax.device_put(buffer)
    return jax.device_put(buffer, NamedSharding(mesh, PartitionSpec()))


def check_flags(platform: str, xla_flags: str) -> None:
    """Raise RuntimeError where arrays of host memory would come out of the device's.

    Measured with jaxlib 0.11.2: such arrays are as fast as the device's, and the
    profiler calls copies to them copies on the device (experiments/LOG.md).
    """
    flag = "--xla_gpu_command_buffer_update_mode=SKIP_TEMP"
    if platform == "gpu" and flag in xla_flags:
        raise RuntimeError(
            f"with {flag} pages for host memory would stay on the device: leave it out "
            "of XLA_FLAGS, or set EngineConfig.kv_policy to 'recompute' or 'reserve'"
        )


def _put(chunk, where):
    return tuple(jax.device_put(pages, where) for pages in chunk)


def _pools(layer):
    """What of a layer lies in pages: KV, and codes of its keys if there is an index."""
    return (layer.kv_pages, *(() if layer.codes is None else (layer.codes,)))


def _all_pools(state):
    """The pools of all layers, by their kind."""
    return tuple(zip(*(_pools(layer) for layer in state.layers), strict=True))


def _with_pools(state, pools):
    names = ("kv_pages", "codes")[: len(pools)]
    layers = (
        layer._replace(**dict(zip(names, of_layer, strict=True)))
        for layer, of_layer in zip(state.layers, zip(*pools, strict=True), strict=True)
    )
    return state._replace(layers=tuple(layers))


@functools.partial(jax.jit, donate_argnums=0)
def _touched(buffer):
    return buffer + 0  # in place; of an argument returned as it came no program is made


@jax.jit
def _gather(pools, pages):
    """Pages of every layer, [L, C, H, ps, 2 * D]; what pads the ids is arbitrary.

    And their codes, if there is an index.
    """

    def gather(of_kind):
        return jnp.stack([pool.at[pages].get(mode="clip") for pool in of_kind])

    return tuple(gather(of_kind) for of_kind in pools)


def _scatter_pages(pools, chunk, pages):
    def scatter(of_kind, rows):
        return tuple(
            pool.at[pages].set(rows[i], mode="drop") for i, pool in enumerate(of_kind)
        )

    return tuple(scatter(*both) for both in zip(pools, chunk, strict=True))


_scatter = jax.jit(_scatter_pages, donate_argnums=0)


@functools.cache
def _gather_on(mesh):
    """`_gather` on every device of a mesh, of its own heads."""
    specs = POOL, PartitionSpec()
    return jax.jit(on_shards(_gather.__wrapped__, mesh, specs, CHUNK))


@functools.cache
def _scatter_on(mesh):
    """`_scatter` on every device of a mesh, of its own heads."""
    specs = POOL, CHUNK, PartitionSpec()
    return jax.jit(on_shards(_scatter_pages, mesh, specs, POOL), donate_argnums=0)
