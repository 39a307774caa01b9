"""Steps that read the device's clock: the gaps between them, and what they compute."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import step_clock
from pallas_kernels.device_clock import nanoseconds, read_clock
from sparsespec_jax import Engine, EngineConfig, SamplingParams, SpeculationConfig


def test_halves_of_a_clock_make_nanoseconds():
    wanted = np.array([[5, 2**31], [2**32 + 7, 2**40 - 1]])
    halves = np.stack([wanted % 2**32, wanted // 2**32], axis=-1)
    times = halves.astype(np.uint32).view(np.int32)
    np.testing.assert_array_equal(nanoseconds(times), wanted)


def test_gaps_between_three_hand_made_steps():
    us = 1000
    times = np.array([[0, 100], [110, 200], [240, 400]]) * us
    got = step_clock.idle_between(times)
    assert got["num_steps"] == 3
    assert got["window_s"] == pytest.approx(400e-6)
    assert got["step_ms"] == pytest.approx(0.1)
    assert got["idle_between_steps_share"] == pytest.approx(50 / 400)
    assert got["idle_between_steps_us"]["p50"] == pytest.approx(25)
    assert got["idle_between_steps_us"]["p100"] == pytest.approx(40)


def test_a_single_step_has_no_gaps():
    with pytest.raises(ValueError, match="1 steps have nothing between"):
        step_clock.idle_between(np.zeros((1, 2), np.int64))


def test_a_clock_changes_no_token(tiny_model, monkeypatch):
    def no_clock(*after, before=None):
        time = jnp.zeros(2, jnp.int32)
        return time if before is None else (time, before)

    monkeypatch.setattr(step_clock, "read_clock", no_clock)
    tokens = []
    for make in (Engine, step_clock.ClockedEngine):
        engine = make(
            tiny_model,
            speculation=SpeculationConfig(num_draft_tokens=3),
            engine=EngineConfig(num_slots=2, max_length=64),
        )
        engine.warm_up()
        engine.add_request([5, 6, 7], SamplingParams(max_tokens=20))
        results = []
        while engine.has_work:
            results += engine.step()
        tokens.append(results[0].token_ids)
    assert tokens[0] == tokens[1]
    warm_ups = 2  # with and without a prompt
    assert engine.take_times().shape == (engine.num_steps + warm_ups, 2)
    assert engine.take_times().shape == (0, 2)


@pytest.mark.gpu
def test_the_clock_of_the_device_runs_as_that_of_the_host():
    @jax.jit
    def work(x, plan):
        begin, same = read_clock(before=plan)
        x = x * same[0]
        for _ in range(64):
            x = jnp.tanh(x @ x)
        return begin, read_clock(x), x, same

    x, plan = jnp.ones((4096, 4096), jnp.bfloat16), jnp.arange(1, 5, dtype=jnp.int32)
    jax.block_until_ready(work(x, plan))
    start = time.perf_counter_ns()
    begin, end, _, same = jax.block_until_ready(work(x, plan))
    elapsed = time.perf_counter_ns() - start
    np.testing.assert_array_equal(same, plan)
    device = nanoseconds(np.asarray(end)) - nanoseconds(np.asarray(begin))
    assert 0.5 * elapsed < device < elapsed  # some 15 ms
