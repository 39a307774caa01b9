"""Sizes of an engine: lengths in few steps, and counts that int32 must hold."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from experiments.models import TINY
from sparsespec_jax import Engine, EngineConfig, SpeculationConfig, sizes


def test_lengths_are_rounded_to_few_sizes():
    got = [sizes.rounded_length(n, 40_960) for n in range(2, 40_961)]
    assert all(size >= n for n, size in enumerate(got, start=2))
    assert all(size <= max(256, 1.5 * n) for n, size in enumerate(got, start=2))
    few = [256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384]
    assert sorted(set(got)) == [*few, 24576, 32768, 40960]
    assert sizes.rounded_length(300, 310) == 310
    assert sizes.rounded_length(20, 64) == 64


def test_room_is_rounded_where_memory_is_plenty(tiny_model, monkeypatch):
    def length(longest, free, **speculation):
        monkeypatch.setattr(sizes, "free_memory_bytes", lambda degree=1: free)
        config = sizes.with_length(
            tiny_model, SpeculationConfig(**speculation), EngineConfig(), longest
        )
        assert config == EngineConfig(max_length=config.max_length)
        return config.max_length

    assert length(300, 2**33) == 384
    assert length(4000, 2**33) == 4096
    assert length(300, 2**20) == 300
    # What a policy remembers takes memory as well.
    pool = 8 * (25 + 14) * 16 * 512  # slots, pages of both tables, rows, bytes
    assert length(300, 2 * pool + 9, policy="pillar") == 384
    assert length(300, 2 * pool + 9, policy="h2o") == 300


def test_pages_end_where_their_rows_can_be_numbered(monkeypatch):
    monkeypatch.setattr(sizes, "free_memory_bytes", lambda degree=1: 10**15)
    config = EngineConfig(num_slots=1, page_size=16, num_pages=2**31 - 1)
    shape = sizes.make_shape(SpeculationConfig(), config, 64, "reference")
    policy = sizes.resolve_policy("pillar")
    most = (2**31 - 1) // (16 * TINY.num_kv_heads)
    with pytest.raises(ValueError, match=f"at most {most} pages fit"):
        sizes.check_memory(TINY, shape, jnp.float32, policy, 0)
    sizes.check_memory(
        TINY, dataclasses.replace(shape, num_pages=most), jnp.float32, policy, 0
    )


@pytest.mark.parametrize(
    "config, message",
    [
        (dict(prefill_chunk=2**31 - 1), "tokens in a step, .*prefill_chunk or"),
        (dict(prefill_lanes=2**31 - 1), "tokens in a step, .*lower prefill_lanes"),
        (dict(num_slots=2**31 - 1), "tokens in a step, .*num_slots"),
        (dict(host_chunk_pages=2**31 - 1), "plan of a step, .*lower host_chunk_pages"),
    ],
)
def test_counts_beyond_int32_are_refused_by_name(tiny_model, config, message):
    config = EngineConfig(max_length=64, **config)
    with pytest.raises(ValueError, match=message) as error:
        Engine(tiny_model, speculation=SpeculationConfig(), engine=config)
    assert "at most 2147483647 can be counted" in str(error.value)


def test_positions_beyond_int32_are_refused():
    config = EngineConfig(num_slots=1, num_pages=9)
    shape = sizes.make_shape(SpeculationConfig(), config, 2**31 - 32, "reference")
    sizes.check_counts(shape)
    shape = sizes.make_shape(SpeculationConfig(), config, 2**31 - 9, "reference")
    with pytest.raises(ValueError, match="tokens of a request, .*lower max_length or"):
        sizes.check_counts(shape)


@pytest.mark.parametrize(
    ("change", "options", "wanted"),
    [
        (dict(head_dim=96), {}, "the head size is 96: the GPU kernel serves 64"),
        (dict(num_heads=66, num_kv_heads=1), {}, "66 query heads per KV head"),
        ({}, dict(page_size=20), "page_size is 20: the GPU kernel serves 8"),
        (dict(dtype="float32"), {}, "float32: the GPU kernel computes bfloat16"),
    ],
)
def test_what_no_kernel_serves_is_refused_before_the_first_step(
    gpu_model, change, options, wanted
):
    change = dict(change)
    dtype = change.pop("dtype", "bfloat16")
    params = jax.tree.map(lambda x: x.astype(dtype), gpu_model.params)
    config = dataclasses.replace(gpu_model.config, **change)
    model = dataclasses.replace(gpu_model, config=config, params=params)
    engine = EngineConfig(impl="gpu_interpret", max_length=64, **options)
    with pytest.raises(ValueError, match=f"do not fit 'gpu_interpret': .*{wanted}"):
        sizes.resolve(model, SpeculationConfig(min_budget=4), engine)
    engine = dataclasses.replace(engine, impl="reference")
    assert sizes.resolve(model, SpeculationConfig(min_budget=4), engine).shape
