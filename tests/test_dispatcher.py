"""Calls in order, in a thread or not, and an engine that dispatches by a thread."""

import dataclasses
import gc
import json
import subprocess
import sys
import threading
import time
import weakref

import pytest

from sparsespec_jax import Engine, SamplingParams
from sparsespec_jax.host.dispatcher import Dispatcher, HostClock
from tests.engine_helpers import ENGINE, LAWS, SPECULATION, make_prompts


def make_engine(model, lag):
    config = dataclasses.replace(ENGINE, lag=lag, max_length=100)
    return Engine(model, speculation=SPECULATION, engine=config)


@pytest.mark.parametrize("threaded", [False, True])
def test_calls_run_in_order(threaded):
    dispatcher, seen, threads = Dispatcher(threaded=threaded), [], set()

    def call(number):
        threads.add(threading.current_thread())
        time.sleep(0.01 * (number == 0))  # the first is the slowest
        seen.append(number)
        return number

    futures = [dispatcher.submit(call, n) for n in range(5)]
    dispatcher.settle()
    assert seen == [0, 1, 2, 3, 4] == [future.result() for future in futures]
    assert len(threads) == 1
    assert (threading.current_thread() in threads) != threaded


def test_a_call_that_fails_raises_with_its_result_and_the_next_one_runs():
    dispatcher = Dispatcher(threaded=True)
    failing = dispatcher.submit(lambda: 1 / 0)
    dispatcher.settle()
    assert dispatcher.submit(int).result() == 0
    with pytest.raises(ZeroDivisionError):
        failing.result()
    with pytest.raises(ZeroDivisionError):
        Dispatcher(threaded=False).submit(lambda: 1 / 0)


def spin(seconds):
    """Needs processor time of the thread that calls."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def test_a_step_costs_what_the_busier_thread_needs():
    dispatcher = Dispatcher(threaded=True)
    clock = HostClock(dispatcher)
    assert clock.per_step(0) == 0.0
    dispatcher.submit(spin, 0.06).result()
    spin(0.02)
    assert 0.03 <= clock.per_step(2) < 0.06  # 60 ms of one, 20 ms of the other
    spin(0.02)
    assert 0.02 <= clock.per_step(3) < 0.06


def test_steps_are_planned_while_one_before_is_being_dispatched(tiny_model):
    """Lag 2 as far as it goes: two steps planned, none of them dispatched yet."""
    engine, may_run = make_engine(tiny_model, lag=2), threading.Event()
    engine.warm_up()
    run = engine.device_steps._run

    def run_later(*args):
        assert may_run.wait(60)
        return run(*args)

    engine.device_steps._run = run_later
    engine.add_request(make_prompts(tiny_model.config.vocab_size)[0], LAWS[0])
    assert engine.step() == engine.step() == []  # neither waits
    assert engine.num_steps == 2
    may_run.set()
    while engine.has_work:
        engine.step()


def test_what_fails_in_the_thread_is_raised_by_the_step_that_reads_it(tiny_model):
    engine = make_engine(tiny_model, lag=2)
    engine.add_request([1, 2, 3], SamplingParams(max_tokens=4))

    def fail(*args):
        raise RuntimeError("out of memory")

    engine.device_steps._run = fail
    with pytest.raises(RuntimeError, match="out of memory"):
        for _ in range(3):
            engine.step()


@pytest.mark.parametrize("lag", [1, 2])
def test_weights_change_between_steps_whoever_dispatches(tiny_model, lag):
    """Every token is counted to the weights that its step was given."""
    engine = make_engine(tiny_model, lag)
    engine.add_request([1, 2, 3], SamplingParams(max_tokens=40, ignore_eos=True))
    results = []
    for _ in range(20):
        results += engine.step()
    engine.update_params(tiny_model.params)
    while engine.has_work:
        results += engine.step()
    versions = dict(results[0].params_versions)
    assert set(versions) == {0, 1} and sum(versions.values()) == 40


class Interrupted:
    """A future that the keyboard interrupts the first time somebody waits for it."""

    def __init__(self, future, when):
        self.future, self.when, self.waits = future, when, 0

    def result(self):
        """The future's result, the second time."""
        self.waits += 1
        if self.when and self.waits == 1:
            raise KeyboardInterrupt
        return self.future.result()


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_an_interrupt_while_waiting_loses_nothing(tiny_model, lag):
    prompts = make_prompts(tiny_model.config.vocab_size)[:3]
    texts, num_interrupts = [], 0
    for every in (0, 5):  # no step, each fifth step
        engine, results = make_engine(tiny_model, lag), {}
        ids = [engine.add_request(*p) for p in zip(prompts, LAWS, strict=False)]
        dispatch = engine._dispatch

        def interrupted(*args, dispatch=dispatch, engine=engine, every=every):
            when = every and engine.num_steps % every == 3
            return Interrupted(dispatch(*args), when)

        engine._dispatch = interrupted
        while engine.has_work:
            try:
                results |= {r.request_id: r for r in engine.step()}
            except KeyboardInterrupt:
                num_interrupts += 1
        texts.append([results[i].token_ids for i in ids])
    assert num_interrupts > 5 and texts[0] == texts[1]


def test_the_loop_hides_the_device_behind_dispatches(tmp_path):
    """Dispatches and device steps of 25 ms, one behind the other at lag 0 alone."""
    output = tmp_path / "cost"
    command = [
        sys.executable, "-m", "experiments.host_cost", "--num_requests=2",
        "--context=100", "--num_steps=10", "--dispatch_ms=25", "--device_ms=25",
        f"--output={output}",
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    row = json.loads((output / "results.jsonl").read_text())
    none, one, two = row["loop_ms_by_lag"]
    assert none >= 50
    assert 25 <= one < 45 and 25 <= two < 45


def test_a_thread_holds_nothing_of_a_call_that_has_ended():
    class Held:
        def __call__(self, other):
            return 5

    for _ in range(200):
        dispatcher, function, argument = Dispatcher(threaded=True), Held(), Held()
        held = weakref.ref(function), weakref.ref(argument)
        future = dispatcher.submit(function, argument)
        del function, argument
        assert future.result() == 5
        assert [ref() for ref in held] == [None, None]


@pytest.mark.parametrize("lag", [1, 2])
def test_an_engine_that_nobody_holds_frees_its_pool(tiny_model, lag):
    """The next engine may need the memory, whichever thread ran the last step."""
    engine = make_engine(tiny_model, lag)
    engine.add_request([1, 2, 3], SamplingParams(max_tokens=4))
    while engine.has_work:
        engine.step()
    pool = weakref.ref(engine.device_steps.state.layers[0].kv_pages)
    del engine
    gc.collect()
    assert pool() is None
