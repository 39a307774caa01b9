"""Ends of an engine: interrupts, closing, dropping, and what is left of a run."""

import dataclasses
import gc
import io
import random
import signal
import sys
import threading
import time
import weakref

import pytest
from engine_helpers import ENGINE, LAWS, SPECULATION, tokens_of

from sparsespec_jax import Engine, SamplingParams, decode, stream
from sparsespec_jax.host.interrupts import Whole

LAGS = (0, 1, 2)
SIGNALS = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture(scope="module")
def whole_tokens(tiny_model, prompts):
    """Token ids of the load when nothing disturbs it."""
    return tokens_of(run(tiny_model, prompts))


def config_of(lag):
    return dataclasses.replace(ENGINE, lag=lag, max_length=80)


def make_engine(model, lag):
    return Engine(model, speculation=SPECULATION, engine=config_of(lag))


def run(model, prompts, sampling=LAWS, **options):
    """decode() over the same compiled steps as all engines here."""
    return decode(
        model,
        prompts,
        sampling=sampling,
        speculation=SPECULATION,
        engine=config_of(1),
        **options,
    )


def add_all(engine, prompts):
    return [engine.add_request(*p) for p in zip(prompts, LAWS, strict=True)]


class Interrupter:
    """Sends Ctrl-C to this process after random times while `is_listening`.

    Elsewhere Python's handler would interrupt the test itself.
    """

    def __init__(self, rng, longest_s):
        self._rng, self._longest_s, self._over = rng, longest_s, threading.Event()
        self.is_listening = False
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self):
        self._before = signal.signal(signal.SIGINT, self._handle)
        self._thread.start()
        return self

    def _handle(self, number, frame):
        if self.is_listening:
            self._before(number, frame)

    def _run(self):
        main = threading.main_thread().ident
        while not self._over.wait(self._rng.uniform(0, self._longest_s)):
            signal.pthread_kill(main, signal.SIGINT)

    def __exit__(self, *exc_info):
        self.is_listening = False
        self._over.set()
        self._thread.join()
        signal.signal(signal.SIGINT, self._before)


@pytest.mark.parametrize("lag", LAGS)
def test_interrupts_at_random_moments_change_no_token(
    tiny_model, prompts, whole_tokens, lag
):
    """200 of them, several a run; a notebook's user goes on with `step` after each."""
    rng, caught = random.Random(lag), 0
    while caught < 200:
        engine, results = make_engine(tiny_model, lag), {}
        ids = add_all(engine, prompts)
        with Interrupter(rng, 0.05) as interrupter:
            while engine.has_work:
                try:
                    interrupter.is_listening = True
                    results |= {r.request_id: r for r in engine.step()}
                    interrupter.is_listening = False
                except KeyboardInterrupt:
                    interrupter.is_listening = False
                    caught += 1
                    results |= {r.request_id: r for r in engine.last_finished}
        results |= {r.request_id: r for r in engine.last_finished}
        assert [results[i].token_ids for i in ids] == whole_tokens
        assert engine._scheduler.kv.num_free == engine.shape.num_pages
        engine.close()


class _Cut(Exception):
    """Raised at a random line; no signal, so nothing can defer it."""


def cut_at(line_number):
    """A trace function that raises _Cut at the n-th line run inside the package."""
    left = line_number

    def trace(frame, event, arg):
        nonlocal left
        name = frame.f_code.co_filename
        if "sparsespec_jax" not in name or name.endswith("interrupts.py"):
            return None
        left -= event == "line"
        if left == 0:
            raise _Cut
        return trace

    return trace


@pytest.mark.parametrize("lag", LAGS)
def test_a_step_cut_short_at_any_line_never_gives_other_tokens(
    tiny_model, prompts, whole_tokens, lag
):
    """It goes on with the same tokens or says in one line that it cannot."""
    rng, outcomes = random.Random(lag), {"went on": 0, "refused": 0}
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    for _ in range(25):
        engine, results = make_engine(tiny_model, lag), {}
        ids = add_all(engine, prompts)
        for _ in range(rng.randrange(20)):
            results |= {r.request_id: r for r in engine.step()}
        sys.settrace(cut_at(rng.randrange(1, 800)))
        try:
            results |= {r.request_id: r for r in engine.step()}
        except _Cut:
            pass
        finally:
            sys.settrace(None)
            # A cut between the last line of a block and its end leaves them deferred.
            for number, handler in handlers.items():
                signal.signal(number, handler)
        results |= {r.request_id: r for r in engine.last_finished}
        try:
            while engine.has_work:
                results |= {r.request_id: r for r in engine.step()}
        except RuntimeError as error:
            assert "was cut short (_Cut) and it cannot go on" in str(error)
            assert "\n" not in str(error)
            for progress in engine.progress({}):
                wanted = whole_tokens[progress.request_id]
                assert progress.token_ids == wanted[: len(progress.token_ids)]
                assert len(progress.logprobs) == len(progress.token_ids)
            outcomes["refused"] += 1
        else:
            assert len(results) == len(ids)
            outcomes["went on"] += 1
        for index, request_id in enumerate(ids):
            if request_id in results:
                assert results[request_id].token_ids == whole_tokens[index]
    assert min(outcomes.values()) > 0


@pytest.mark.parametrize("kind", [KeyboardInterrupt, OSError, SystemExit])
@pytest.mark.parametrize("lag", LAGS)
def test_exceptions_carry_what_had_been_generated(
    tiny_model, prompts, whole_tokens, lag, kind
):
    def interrupt(result):
        if result.request_id == 3:
            raise kind("the disk is full")

    options = dict(sampling=LAWS, speculation=SPECULATION, on_result=interrupt)
    config = config_of(lag)
    with pytest.raises(kind, match="full") as caught:
        decode(tiny_model, prompts, engine=config, **options)
    results, unfinished = caught.value.results, caught.value.unfinished
    assert "had finished: see .results" in caught.value.__notes__[0]
    assert 3 in {r.request_id for r in results} and unfinished
    assert results.stats.wall_time_s > 0
    texts = {r.prompt_index: r.token_ids for r in results}
    with make_engine(tiny_model, lag) as engine:
        for progress in unfinished:
            index = progress.prompt_index
            engine.resume_request(
                prompts[index], LAWS[index], progress, prompt_index=index
            )
        while engine.has_work:
            texts |= {r.prompt_index: r.token_ids for r in engine.step()}
    assert len(texts) > len(results)
    assert all(texts[index] == whole_tokens[index] for index in texts)


@pytest.mark.parametrize("lag", LAGS)
def test_decode_and_stream_hand_over_at_any_moment(
    tiny_model, prompts, whole_tokens, lag
):
    """Real Ctrl-C, at random moments of preparing, decoding and ending."""
    rng, num_carrying = random.Random(lag), 0
    config = config_of(lag)
    options = dict(sampling=LAWS, speculation=SPECULATION, engine=config)
    decode(tiny_model, prompts, **options)  # compiles
    start = time.perf_counter()
    decode(tiny_model, prompts, **options)
    longest, main = time.perf_counter() - start, threading.main_thread().ident
    for turn in range(20):
        finished, when = {}, rng.uniform(0, longest)
        timer = threading.Timer(when, signal.pthread_kill, [main, signal.SIGINT])
        try:
            timer.start()  # which may be late enough to be interrupted itself
            if turn % 2:
                for event in stream(tiny_model, prompts, **options):
                    if event.finish_reason:
                        finished[event.request_id] = None
            else:
                decode(
                    tiny_model,
                    prompts,
                    on_result=lambda r, seen=finished: seen.update({r.request_id: r}),
                    **options,
                )
            timer.join()
            time.sleep(0.001)
        except KeyboardInterrupt as error:
            timer.join()
            if hasattr(error, "results"):  # decoding had begun
                num_carrying += 1
                given = {r.request_id: r.token_ids for r in error.results}
                assert given.keys() >= finished.keys()
                assert all(whole_tokens[i] == ids for i, ids in given.items())
                for progress in error.unfinished:
                    ids = progress.token_ids
                    assert ids == whole_tokens[progress.request_id][: len(ids)]
    assert num_carrying > 0


def test_a_closed_engine_says_so_and_frees_its_pool(tiny_model, prompts):
    with make_engine(tiny_model, 1) as engine:
        engine.add_request(prompts[0], LAWS[0])
        for _ in range(10):
            engine.step()
        (progress,) = engine.progress({})
        pool = weakref.ref(engine.device_steps.state.layers[0].kv_pages)
    gc.collect()
    assert pool() is None
    assert engine.is_closed and not engine.has_work
    for use in (
        engine.step,
        engine.step_with_events,
        engine.pause,
        engine.warm_up,
        lambda: engine.add_request([1]),
        lambda: engine.resume_request(prompts[0], LAWS[0], progress),
        lambda: engine.update_params(tiny_model.params),
    ):
        with pytest.raises(RuntimeError, match="closed: make a new one"):
            use()
    engine.close()
    assert engine.progress({})[0].token_ids[: len(progress.token_ids)] == (
        progress.token_ids
    )


@pytest.mark.parametrize("lag", LAGS)
def test_every_way_out_closes_the_engine(tiny_model, prompts, lag, monkeypatch):
    engines = []
    start = Engine.__init__

    def note(self, *args, **options):
        start(self, *args, **options)
        engines.append((weakref.ref(self), self.device_steps))

    monkeypatch.setattr(Engine, "__init__", note)
    config = config_of(lag)
    options = dict(sampling=LAWS, speculation=SPECULATION, engine=config)

    def fail(result):
        raise OSError("the disk is full")

    def decode_and_fail():
        with pytest.raises(OSError, match="disk"):
            decode(tiny_model, prompts, on_result=fail, **options)

    def break_out():
        for _ in stream(tiny_model, prompts, **options):
            break

    def close():
        events = stream(tiny_model, prompts, **options)
        next(events)
        events.close()

    def never_begin():
        stream(tiny_model, prompts, **options)

    def drop():
        engine = Engine(tiny_model, speculation=SPECULATION, engine=config)
        engine.add_request(prompts[0], LAWS[0])
        for _ in range(5):
            engine.step()

    def finish():
        decode(tiny_model, prompts, **options)

    ways = (decode_and_fail, break_out, close, never_begin, drop, finish)
    for way in ways:
        way()
        gc.collect()
    assert len(engines) == len(ways)
    for engine, steps in engines:
        assert engine() is None and steps.state is None


def test_a_signal_waits_for_the_end_of_a_block_and_of_those_around_it():
    seen, block = [], Whole()

    def handler(number, frame):
        seen.append(signal.Signals(number).name)
        raise OSError("terminated")

    before = signal.signal(signal.SIGTERM, handler)
    try:
        with pytest.raises(OSError, match="terminated") as caught:
            with block:
                with block:
                    signal.raise_signal(signal.SIGTERM)
                    signal.raise_signal(signal.SIGINT)
                seen.append("whole")
        assert seen == ["whole", "SIGTERM"] and block.broken is None
        assert isinstance(caught.value.__context__, KeyboardInterrupt)
        assert signal.getsignal(signal.SIGTERM) is handler
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before)
    with pytest.raises(ZeroDivisionError), block:
        _ = 1 / 0
    assert block.broken == "ZeroDivisionError: division by zero"


def test_signals_that_python_does_not_handle_stay_as_they_are():
    block = Whole()
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with block:
            signal.raise_signal(signal.SIGINT)  # ignored, as asked
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    inside = []
    thread = threading.Thread(target=lambda: inside.append(block.__enter__()))
    thread.start()
    thread.join()  # no signal can be handled there; nothing raises
    assert inside == [block]


def test_the_progress_bar_ends_at_its_end(tiny_model, prompts, whole_tokens, capsys):
    """Requests that stop early leave less to do; the bar must not wait for it."""
    laws = [
        dataclasses.replace(law, stop_token_ids=ids[5:6])
        for law, ids in zip(LAWS, whole_tokens, strict=True)
    ]
    results = run(tiny_model, prompts, laws, progress=True)
    count = sum(map(len, tokens_of(results)))
    assert count < sum(map(len, whole_tokens))
    assert f"100%|██████████| {count}/{count}" in capsys.readouterr().err


def test_a_notebooks_bar_ends_at_its_end(
    tiny_model, prompts, whole_tokens, monkeypatch
):
    widget, bars = type("Widget", (), {"max": None}), []
    import tqdm.auto

    class Bar(tqdm.auto.tqdm):
        def __init__(self, **options):
            super().__init__(file=io.StringIO(), **options)
            self.container = type("Box", (), {"children": (None, widget, None)})
            bars.append(self)

    monkeypatch.setattr(tqdm.auto, "tqdm", Bar)
    run(tiny_model, prompts, progress=True)
    count = sum(map(len, whole_tokens))
    assert widget.max == bars[0].n == bars[0].total == count


def test_the_bar_says_for_how_long_it_compiles(tiny_model, prompts, monkeypatch):
    said, warm_up = [], Engine.warm_up
    import tqdm.auto

    class Bar(tqdm.auto.tqdm):
        def __init__(self, **options):
            file = io.StringIO()
            file.isatty = lambda: is_terminal
            super().__init__(file=file, **options)

        def set_description_str(self, text=None, refresh=True):
            said.append(text)
            super().set_description_str(text, refresh)

        def update(self, n=1):
            said.append(n)
            super().update(n)

    def slow_warm_up(engine):
        time.sleep(1.2)
        said.append("compiled")
        warm_up(engine)

    monkeypatch.setattr(tqdm.auto, "tqdm", Bar)
    monkeypatch.setattr(Engine, "warm_up", slow_warm_up)
    before, is_terminal = threading.active_count(), False
    run(tiny_model, prompts[:1], LAWS[:1], progress=True)
    assert said[:3] == ["compiling 0 s", "compiled", ""]  # a log is not filled
    said.clear()
    is_terminal = True
    results = run(tiny_model, prompts[:1], LAWS[:1], progress=True)
    assert said[0] == "compiling 0 s" and "compiling 1 s" in said
    told = [s for s in said if isinstance(s, str) and s.startswith("compiling")]
    # Before the first token, and not after the end of the compilation.
    assert [s for s in said if s not in told][:2] == ["compiled", ""]
    assert sum(n for n in said if isinstance(n, int)) == 40
    assert threading.active_count() <= before + 1  # tqdm's own monitor
    # Nor is it time of a request.
    assert results[0].metrics.total_time_s <= results.stats.wall_time_s + 0.1

    def fails(engine):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(Engine, "warm_up", fails)
    with pytest.raises(RuntimeError, match="no compiler"):
        run(tiny_model, prompts[:1], LAWS[:1], progress=True)
    assert not [t for t in threading.enumerate() if t.name == "compiling"]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda p: {"a": 1}, "a is a int, not among those in use"),
        (lambda p: {**p, "embed": None}, "embed.weight is missing, not float32"),
        (lambda p: {**p, "final_norm": {"scale": [1.0]}}, "is missing, not float32"),
        (lambda p: 5, "is a int, not among"),
        (
            lambda p: {**p, "final_norm": {"scale": p["final_norm"]["scale"][:3]}},
            r"final_norm.scale is float32\[3\], not float32",
        ),
    ],
)
def test_other_weights_are_refused_by_name(tiny_model, change, message):
    with make_engine(tiny_model, 1) as engine:
        with pytest.raises(ValueError, match=message):
            engine.update_params(change(tiny_model.params))
        assert engine.params_version == 0


@pytest.mark.parametrize("what", ["model", "speculation", "engine", "sampling"])
def test_arguments_of_another_kind_are_refused_in_one_line(tiny_model, what):
    arguments = {"model": tiny_model, "prompts": [[1, 2]], what: "smollm2"}
    for value in ("smollm2", 8, SamplingParams):
        arguments[what] = value
        for use in (decode, stream):
            with pytest.raises(ValueError, match=what):
                use(**arguments)
    for prompts in (None, 5, "text", b"text", {"role": "user"}):
        with pytest.raises(ValueError, match="prompts must be a list"):
            decode(tiny_model, prompts)
