"""Stops, aborts, batching, streams, statistics, compilations and bad input."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from sparsespec_jax import Engine, Model, SamplingParams, decode, stream
from sparsespec_jax.loading.tokenizer import Tokenizer
from sparsespec_jax.plan.buffer import StepPlan
from tests import engine_helpers
from tests.engine_helpers import ENGINE, LAWS, SPECULATION, run, tokens_of


@pytest.fixture(scope="module")
def text_model(tiny_model):
    """The tiny model with a tokenizer that writes token i as one character."""
    vocab = {chr(0x4E00 + i): i for i in range(tiny_model.config.vocab_size)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    backend.decoder = tokenizers.decoders.Fuse()
    return dataclasses.replace(tiny_model, tokenizer=Tokenizer(backend))


def small_engine(model, *, lag=1, **options):
    config = dataclasses.replace(ENGINE, lag=lag, max_length=100, **options)
    return Engine(model, speculation=SPECULATION, engine=config)


def drain(engine):
    results = []
    while engine.has_work:
        results += engine.step()
    return {r.request_id: r for r in results}


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_stop_token_at_every_offset_of_a_cycle(tiny_model, prompts, lag):
    base = run(tiny_model, [prompts[3]], [LAWS[0]], num_draft_tokens=0)[0].token_ids
    base = list(base)
    stops = [base[i] for i in range(12)]
    laws = [dataclasses.replace(LAWS[0], stop_token_ids=(stop,)) for stop in stops]
    got = run(tiny_model, [prompts[3]] * 12, laws, engine=dict(lag=lag))
    for stop, result in zip(stops, got, strict=True):
        end = base.index(stop) + 1
        assert list(result.token_ids) == base[:end]
        assert len(result.logprobs) == end
        assert (result.finish_reason, result.stop_reason) == ("stop", stop)


@pytest.mark.parametrize("max_tokens", range(1, 10))
def test_length_limit_at_every_offset_of_a_cycle(tiny_model, prompts, max_tokens):
    law = dataclasses.replace(LAWS[1], max_tokens=max_tokens)
    base = run(tiny_model, [prompts[4]], [LAWS[1]], num_draft_tokens=0)[0].token_ids
    got = run(tiny_model, [prompts[4]], [law], engine=dict(max_length=60))[0]
    assert got.token_ids == base[:max_tokens]
    assert got.finish_reason == "length"


def test_eos_of_the_model_stops_unless_ignored(tiny_model, prompts):
    base = run(tiny_model, [prompts[3]], [LAWS[2]], num_draft_tokens=0)[0].token_ids
    eos = base[7]
    config = dataclasses.replace(tiny_model.config, eos_ids=(eos,))
    model = dataclasses.replace(tiny_model, config=config)
    ignoring = dataclasses.replace(LAWS[2], ignore_eos=True)
    stopped, ignored = run(model, [prompts[3]] * 2, [LAWS[2], ignoring])
    assert stopped.token_ids == base[: base.index(eos) + 1]
    assert stopped.finish_reason == "stop" and stopped.stop_reason == eos
    assert ignored.token_ids == base and ignored.finish_reason == "length"


@pytest.mark.parametrize("lag", [0, 2])
@pytest.mark.parametrize("length", [1, 3])
def test_stop_strings_end_at_the_same_token_as_plain_decoding(
    text_model, prompts, lag, length
):
    base = run(text_model, [prompts[4]], [LAWS[2]], num_draft_tokens=0)[0]
    assert len(base.text) == len(base.token_ids)
    for start in range(0, 9, 2):
        stop = base.text[start : start + length]
        law = dataclasses.replace(LAWS[2], stop=("never", stop))
        got = run(text_model, [prompts[4]], [law], engine=dict(lag=lag))[0]
        end = base.text.index(stop)
        assert got.text == base.text[:end]
        assert got.token_ids == base.token_ids[: end + length]
        assert got.finish_reason == "stop" and got.stop_reason == stop


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_abort_in_flight_leaves_the_others_alone(tiny_model, prompts, lag):
    plain = tokens_of(run(tiny_model, prompts, num_draft_tokens=0))
    engine = small_engine(tiny_model, lag=lag)
    ids = [engine.add_request(p, s) for p, s in zip(prompts, LAWS, strict=True)]
    results = {}
    for step in range(30):
        results |= {r.request_id: r for r in engine.step()}
        if step == 14:  # holds a slot
            aborted = engine.abort(ids[0])
            assert aborted.finish_reason == "cancelled"
            assert plain[0][: len(aborted.token_ids)] == aborted.token_ids
        if step == 3:  # still waits for a slot
            assert engine.abort(ids[6]).token_ids == ()
    results |= drain(engine)
    assert sorted(results) == ids[1:6]
    assert [results[i].token_ids for i in ids[1:6]] == plain[1:6]
    with pytest.raises(KeyError, match="unknown or finished"):
        engine.abort(ids[0])


def test_requests_may_come_at_any_time_and_nothing_recompiles(tiny_model, prompts):
    plain = tokens_of(run(tiny_model, prompts, num_draft_tokens=0))
    engine = small_engine(tiny_model)
    engine.warm_up()
    compiled = engine_helpers.num_compilations(engine)
    assert compiled >= 2
    ids, results = [], {}
    for prompt, law in zip(prompts, LAWS, strict=True):
        ids.append(engine.add_request(prompt, law))
        for _ in range(5):
            results |= {r.request_id: r for r in engine.step()}
    results |= drain(engine)
    assert [results[i].token_ids for i in ids] == plain
    assert engine_helpers.num_compilations(engine) == compiled
    # A second engine of the same options adds none either.
    second = small_engine(tiny_model, lag=2)
    second.add_request(prompts[0], LAWS[0])
    drain(second)
    assert engine_helpers.num_compilations(second) == compiled


def test_all_pages_come_back(tiny_model, prompts):
    engine = small_engine(tiny_model)
    for prompt, law in zip(prompts, LAWS, strict=True):
        engine.add_request(prompt, law)
    drain(engine)
    kv = engine._scheduler.kv
    assert kv.num_free == kv.num_available == engine.shape.num_pages


def test_n_samples_differ_and_come_in_order(tiny_model, prompts):
    law = dataclasses.replace(LAWS[2], n=3)
    results = run(tiny_model, prompts[2:4], [law, LAWS[1]])
    assert [(r.prompt_index, r.sample_index) for r in results] == [
        (0, 0), (0, 1), (0, 2), (1, 0),
    ]  # fmt: skip
    assert len({r.token_ids for r in results[:3]}) == 3
    first = run(tiny_model, prompts[2:3], [LAWS[2]], num_draft_tokens=0)[0]
    assert results[0].token_ids == first.token_ids


def test_stream_gives_every_token_and_text_once(text_model, prompts):
    results = run(text_model, prompts)
    tokens, texts, reasons = {}, {}, {}
    for event in stream(
        text_model,
        prompts,
        sampling=LAWS,
        speculation=SPECULATION,
        engine=ENGINE,
    ):
        tokens.setdefault(event.request_id, []).extend(event.new_token_ids)
        texts[event.request_id] = texts.get(event.request_id, "") + event.new_text
        reasons[event.request_id] = event.finish_reason
    for result in results:
        assert tuple(tokens[result.request_id]) == result.token_ids
        assert texts[result.request_id] == result.text
        assert reasons[result.request_id] == result.finish_reason


def test_progress_and_result_callbacks(tiny_model, prompts, capsys):
    seen, finished = [], []
    results = decode(
        tiny_model,
        prompts,
        sampling=LAWS,
        speculation=SPECULATION,
        engine=ENGINE,
        progress=seen.append,
        on_result=finished.append,
    )
    assert sum(len(e.new_token_ids) for e in seen) == sum(map(len, tokens_of(results)))
    assert {r.request_id for r in finished} == {r.request_id for r in results}
    decode(tiny_model, prompts[:1], sampling=LAWS[3], engine=ENGINE, progress=True)
    assert "tok" in capsys.readouterr().err


def test_statistics_add_up(tiny_model, prompts):
    results = run(tiny_model, prompts)
    for result in results:
        metrics = result.metrics
        emitted = metrics.num_accepted_draft_tokens + metrics.num_verify_steps + 1
        # The last cycle may commit more than the limit lets out.
        extra = emitted - len(result.token_ids)
        assert 0 <= extra <= SPECULATION.num_draft_tokens
        assert metrics.num_draft_tokens == 3 * metrics.num_verify_steps
        assert metrics.num_output_tokens == len(result.token_ids)
    stats = results.stats
    assert stats.total.num_output_tokens == sum(map(len, tokens_of(results)))
    config = tiny_model.config
    per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim * 4
    assert stats.kv_bytes_per_token == per_token
    plain = run(tiny_model, prompts, num_draft_tokens=0).stats
    assert plain.total.kv_read_ratio == pytest.approx(1.0)


def test_the_step_copies_no_pool(tiny_model):
    """Pages are updated in place: temporaries stay below one layer's pool."""
    engine = Engine(
        tiny_model,
        speculation=SPECULATION,
        engine=dataclasses.replace(ENGINE, max_length=4000, num_slots=8, page_size=16),
    )
    step = engine.device_steps.step_function(False, engine.shape)
    pool = engine.device_steps.state.layers[0].kv_pages.nbytes
    for prefill in (False, True):
        buffer = StepPlan.empty(engine.shape, prefill=prefill).buffer
        compiled = step.lower(
            engine.params, engine.device_steps.state, buffer, prefill=prefill
        ).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < pool // 2
    copied = jax.jit(lambda x: (x + 1, x.at[0].set(1.0)))
    lowered = copied.lower(jnp.zeros((1000,)))
    assert lowered.compile().memory_analysis().output_size_in_bytes >= 8000


BAD_PROMPTS = {
    "no prompts": ([], "prompts is empty"),
    "bare text": ("hello", "must be a list"),
    "empty ids": ([[]], "prompt 0: the prompt \\[\\] has no tokens"),
    "id too large": ([[1, 2], [3, 97]], "prompt 1: token id 97 is outside"),
    "negative id": ([[-1]], "token id -1 is outside"),
    "text without tokenizer": (["hi"], "needs a tokenizer"),
    "chat without tokenizer": ([[{"role": "user", "content": "x"}]], "tokenizer"),
    "floats": ([[1.5]], "holds token ids or chat messages"),
    "mixed": ([[1, "a"]], "holds token ids or chat messages"),
    "a number": ([7], "got int"),
    "too long": ([[1] * 4090], "was made for 4096"),
}


@pytest.mark.parametrize("prompts, message", BAD_PROMPTS.values(), ids=BAD_PROMPTS)
def test_bad_prompts_raise_before_any_work(tiny_model, prompts, message):
    with pytest.raises(ValueError, match=message):
        decode(tiny_model, prompts, sampling=SamplingParams(max_tokens=10))


BAD_OPTIONS = {
    "temperature": (dict(law=dict(temperature=-1)), "temperature must be in"),
    "temperature nan": (dict(law=dict(temperature=float("nan"))), "temperature"),
    "top_k": (dict(law=dict(top_k=-1)), "top_k must be an integer >= 0"),
    "top_p": (dict(law=dict(top_p=0.0)), "top_p must be in"),
    "min_p": (dict(law=dict(min_p=1.5)), "min_p must be in"),
    "seed": (dict(law=dict(seed=-3)), "seed must be an integer"),
    "n": (dict(law=dict(n=0)), "n must be an integer"),
    "max_tokens": (dict(law=dict(max_tokens=0)), "max_tokens must be"),
    "stop": (dict(law=dict(stop=("",))), "stop must hold non-empty"),
    "logprobs": (dict(law=dict(logprobs="all")), "logprobs must be one of"),
    "stop without tokenizer": (dict(law=dict(stop=("a",))), "need a tokenizer"),
    "stop past the vocabulary": (
        dict(law=dict(stop_token_ids=[3, 97])),
        "stop token id 97 is outside the vocabulary of 97 tokens",
    ),
    "k": (dict(spec=dict(num_draft_tokens=-1)), "num_draft_tokens must be"),
    "k large": (dict(spec=dict(num_draft_tokens=99)), "num_draft_tokens must be"),
    "ratio": (dict(spec=dict(budget_ratio=0)), "budget_ratio must be in"),
    "floor": (dict(spec=dict(min_budget=-1)), "min_budget must be"),
    "policy": (dict(spec=dict(policy="pilar")), "policy must be one of"),
    "acceptor": (dict(spec=dict(acceptor="greedy")), "acceptor must be one of"),
    "scope": (dict(spec=dict(scope="token")), "scope must be one of"),
    "rows": (dict(spec=dict(mass_rows="some")), "mass_rows must be one of"),
    "slots": (dict(engine=dict(num_slots=0)), "num_slots must be"),
    "page size": (dict(engine=dict(page_size=0)), "page_size must be"),
    "lag": (dict(engine=dict(lag=3)), "lag must be an integer in"),
    "impl": (dict(engine=dict(impl="cuda")), "impl must be one of"),
    "impl elsewhere": (dict(engine=dict(impl="gpu")), "needs a GPU"),
    "small pool": (dict(engine=dict(num_pages=2)), "the pool has 2"),
    "memory": (dict(engine=dict(num_pages=2**31 - 1)), "at most [0-9]+ pages fit"),
    "top m": (
        dict(spec=dict(acceptor="ratio_test", draft_top_m=98)),
        "draft_top_m is 98",
    ),
    "short": (dict(engine=dict(max_length=12)), "max_length is 12"),
    "past the model": (dict(engine=dict(max_length=9999)), "made for"),
    "laws": (dict(laws=[SamplingParams()] * 2), "2 sampling params for 1 prompts"),
    "law type": (dict(laws=[{"temperature": 1}]), "sampling holds SamplingParams"),
}


@pytest.mark.parametrize("options, message", BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_bad_options_raise_before_any_work(tiny_model, options, message):
    with pytest.raises(ValueError, match=message):
        laws = options.get("laws") or SamplingParams(**options.get("law", {}))
        decode(
            tiny_model,
            [[1, 2, 3]],
            sampling=laws,
            speculation=dataclasses.replace(SPECULATION, **options.get("spec", {})),
            engine=dataclasses.replace(ENGINE, **options.get("engine", {})),
        )


def test_a_bad_request_does_not_disturb_a_running_engine(tiny_model, prompts):
    plain = tokens_of(run(tiny_model, prompts[:2], LAWS[:2], num_draft_tokens=0))
    engine = small_engine(tiny_model)
    ids = [engine.add_request(prompts[i], LAWS[i]) for i in range(2)]
    engine.step()
    with pytest.raises(ValueError, match="max_length is 100"):
        engine.add_request([1] * 90, SamplingParams(max_tokens=50))
    results = drain(engine)
    assert [results[i].token_ids for i in ids] == plain


def test_set_budget_compiles_nothing_and_refuses_what_does_not_fit(tiny_model):
    engine = small_engine(tiny_model)
    with pytest.raises(ValueError, match="the engine was built for 20"):
        engine.set_budget(budget_ratio=0.5, min_budget=3)
    engine.set_budget(budget_ratio=0.1, min_budget=0)
    assert engine.speculation.budget_ratio == 0.1


def test_models_without_tokenizer_give_no_text(tiny_model):
    assert isinstance(tiny_model, Model)
    assert run(tiny_model, [[1, 2]], LAWS[3])[0].text is None
    assert np.isfinite(run(tiny_model, [[1, 2]], LAWS[3])[0].logprobs).all()


def test_the_load_that_is_left_is_counted(tiny_model, prompts):
    engine = small_engine(tiny_model)
    ids = [engine.add_request(p, s) for p, s in zip(prompts, LAWS, strict=True)]
    total = sum(law.max_tokens for law in LAWS)
    assert engine.max_new_tokens == total and engine.is_prefilling
    for _ in range(20):
        engine.step()
    engine.abort(ids[-1])
    left = engine.max_new_tokens
    assert 0 < left < total and engine.num_emitted_tokens > 0
    drain(engine)
    assert engine.max_new_tokens == 0 and not engine.is_prefilling
