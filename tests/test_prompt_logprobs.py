"""Log-probabilities of the prompt's own tokens are those of one forward of it."""

import dataclasses
import functools
import json
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsespec_jax import Engine, SamplingParams, SpeculationConfig
from sparsespec_jax.device import prompt_logprobs as of_device
from sparsespec_jax.host.intake import prepare
from sparsespec_jax.host.prompt_logprobs import PromptLogprobs, note_prompts
from sparsespec_jax.host.scheduler import Scheduler
from sparsespec_jax.models.transformer import causal_attend, forward, logits
from sparsespec_jax.plan.edits import StepExtras, prompt_rows
from sparsespec_jax.plan.outcome import PromptTold, StepOutcome
from tests import fake_device
from tests.engine_helpers import ENGINE, SPECULATION, long_load, run, tokens_of

VOCAB, LENGTH = 97, 64
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, VOCAB, n).tolist() for n in (1, 2, 8, 30, 9, 63, 17)]
LAWS = [
    SamplingParams(
        max_tokens=24, seed=i, temperature=0.4 * (i % 3), n=1 + i % 3,
        logprobs="processed" if i % 2 else "raw", prompt_logprobs=told,
        presence_penalty=0.5 * (i == 3),
    )
    for i, told in enumerate((0, 3, 1, 4, None, 0, 2))
]  # fmt: skip


@functools.partial(jax.jit, static_argnums=0)
def _all_logprobs(config, params, tokens):
    hidden, _ = forward(
        config, params, tokens, jnp.arange(LENGTH), causal_attend,
        (None,) * config.num_layers, impl="reference",
    )  # fmt: skip
    return jax.nn.log_softmax(logits(config, params, hidden))


def assert_told(model, law, prompt, result):
    """Own and likeliest tokens of every place, by a forward of the whole prompt."""
    if law.prompt_logprobs is None:
        assert result.prompt_logprobs == result.prompt_top_logprobs == ()
        return
    padded = jnp.asarray(prompt + [0] * (LENGTH - len(prompt)))
    rows = np.asarray(_all_logprobs(model.config, model.params, padded))
    first, *told = result.prompt_logprobs
    assert first is None and len(told) == len(prompt) - 1
    wanted = rows[np.arange(len(told)), prompt[1:]]
    np.testing.assert_allclose(told, wanted, atol=1e-5)
    if not law.prompt_logprobs:
        assert result.prompt_top_logprobs == ()
        return
    first, *tops = result.prompt_top_logprobs
    assert first == () and len(tops) == len(told)
    for row, top in zip(rows, tops, strict=False):
        ids, values = zip(*top, strict=True)
        best = np.argsort(-row)[: law.prompt_logprobs]
        assert list(ids) == best.tolist()
        np.testing.assert_allclose(values, row[best], atol=1e-5)


TIGHT = dict(num_pages=34, host_chunk_pages=2)
RUNS = {
    "plain": (dict(num_draft_tokens=0), dict()),
    "recomputed": (dict(), dict(**TIGHT, kv_policy="recompute", lag=2)),
    "spilled, two chunks": (dict(), dict(**TIGHT, lag=0, prefill_lanes=2)),
    "aligned": (dict(schedule="aligned"), dict()),
}


@pytest.fixture(scope="module")
def untold(tiny_model):
    """The texts without the option."""
    laws = [dataclasses.replace(law, prompt_logprobs=None) for law in LAWS]
    return tokens_of(run(tiny_model, PROMPTS, laws))


@pytest.mark.parametrize("speculation, engine", RUNS.values(), ids=RUNS)
def test_they_are_those_of_one_forward(tiny_model, untold, speculation, engine):
    """With shared pages, chunks, preemption, and requests that do not ask."""
    found = run(tiny_model, PROMPTS, LAWS, engine=engine, **speculation)
    assert len(found) == sum(law.n for law in LAWS)
    for result in found:
        index = result.prompt_index
        assert_told(tiny_model, LAWS[index], PROMPTS[index], result)
    assert tokens_of(found) == untold
    if "num_pages" in engine:
        assert found.stats.kv_usage["preemptions"] > 0


def test_who_goes_on_and_who_is_cancelled(tiny_model):
    """A resumed request reads its prompt again; a cancelled one has what was read."""
    law = dataclasses.replace(LAWS[3], n=1)
    prompt, config = PROMPTS[5], dataclasses.replace(ENGINE, max_length=256)
    how = dict(speculation=SPECULATION, engine=config)
    with Engine(tiny_model, **how) as engine:
        request = engine.add_request(prompt, law)
        while not engine.progress({}):
            engine.step()
        (progress,) = engine.progress({})
        late = engine.add_request(prompt, law)
        for _ in range(5):
            engine.step()
        cancelled, whole = engine.abort(late), engine.abort(request)
    assert_told(tiny_model, law, prompt, whole)
    known = len(cancelled.prompt_logprobs)
    assert 1 < known < len(prompt)
    assert cancelled.prompt_logprobs == pytest.approx(whole.prompt_logprobs[:known])
    with Engine(tiny_model, **how) as engine:
        engine.resume_request(prompt, law, progress)
        results = []
        while engine.has_work:
            results += engine.step()
    assert_told(tiny_model, law, prompt, results[0])
    assert results[0].token_ids[: len(progress.token_ids)] == progress.token_ids
    _assert_kept(results[0])


def _assert_kept(result):
    """In JSON, in a row and in a pickle."""
    values = json.loads(json.dumps(result.to_dict()))
    assert values["prompt_logprobs"] == list(result.prompt_logprobs)
    tops = [list(map(list, top)) for top in result.prompt_top_logprobs]
    assert values["prompt_top_logprobs"] == tops
    mean = np.mean(result.prompt_logprobs[1:])
    assert result.to_row()["mean_prompt_logprob"] == pytest.approx(mean)
    assert pickle.loads(pickle.dumps(result)) == result
    none = dataclasses.replace(result, prompt_logprobs=(None,))
    assert none.to_row()["mean_prompt_logprob"] is None


# -- the host alone


class Telling(fake_device.FakeDevice):
    """Tells of each row the position of the token behind it."""

    def run(self, plan, planned):
        planned = planned._replace(
            prompts=prompt_rows(plan, StepExtras(prompt_logprobs=2))
        )
        sizes, views = planned.prompts, plan.views
        place = np.arange(max(sizes.num_queries, sizes.chunk))
        starts = views["seed_starts"][: sizes.num_lanes]
        rows = [(starts[:, None] + place[: sizes.num_queries] + 1).ravel()]
        if sizes.num_chunks:
            starts = views["prefill_starts"]
            rows.append((starts[:, None] + place[: sizes.chunk] + 1).ravel())
            for lane, (request, start, count) in enumerate(planned.chunks):
                behind = views["prefill_tokens"][lane, count]
                assert behind == request.tokens[start + count]
        told = np.concatenate(rows).astype(np.float32)
        told = PromptTold(told, told[:, None].astype(np.int32), told[:, None])
        outcome = StepOutcome(
            *np.zeros((3, sizes.num_lanes), np.int32),
            *np.zeros((2, sizes.num_lanes, sizes.num_queries), np.float32),
            cascade=None, prompts=told,
        )  # fmt: skip
        packed = outcome.pack(np, lambda x: x.view(np.int32)).astype(np.int32)
        told = StepOutcome.from_packed(packed, sizes.num_queries, 0, sizes).prompts
        lanes = range(len(planned.requests))
        note_prompts(planned, told, [views["seed_counts"][i] >= 0 for i in lanes])
        return super().run(plan, planned)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("kv_policy", ["offload", "recompute"])
@pytest.mark.parametrize("is_aligned", [False, True])
def test_every_position_is_told_once(exact, kv_policy, is_aligned):
    """Under preemption, with shared pages and with verifications that feed again."""
    shape = fake_device.make_shape(
        slots=4, k=3, pages=40, lanes=2, is_aligned=is_aligned
    )
    chunks = 20 if kv_policy == "offload" else 0
    scheduler = Scheduler(
        shape, kv_policy=kv_policy, num_host_chunks=chunks,
        chunk_pages=fake_device.CHUNK_PAGES, exact=exact,
    )  # fmt: skip
    device = Telling(shape, np.random.default_rng(1), exact=exact)
    requests = []
    for group, (num_prompt, n) in enumerate(
        [(30, 3), (1, 1), (21, 2), (40, 2), (7, 1)]
    ):
        told = PromptLogprobs(num_prompt, 1)
        for _ in range(n):
            request = fake_device.make_request(
                len(requests), num_prompt, 22, group=group if n > 1 else None
            )
            request.prompt_logprobs = told
            requests.append(request)
    fake_device.simulate(scheduler, device, requests, lag=1)
    assert scheduler.kv.counters.preemptions > 0
    assert scheduler.kv.counters.shared_pages > 0
    for request in requests:
        told = request.prompt_logprobs
        positions = list(range(1, request.num_prompt))
        assert told.logprobs == [None, *positions]
        assert told.top_logprobs == [(), *(((i, float(i)),) for i in positions)]


def test_a_gap_is_an_error_of_ours():
    told = PromptLogprobs(9, 0)
    with pytest.raises(RuntimeError, match="prompt tokens 1 to 3 were not told of"):
        told.note(3, PromptTold(*np.zeros((3, 4, 1))), 0, 2)


# -- what it costs, and what is refused


def test_nothing_is_there_for_who_does_not_ask(tiny_model, monkeypatch):
    monkeypatch.setattr(of_device, "tell", None)
    law = dataclasses.replace(LAWS[0], prompt_logprobs=None)
    config = dataclasses.replace(ENGINE, max_length=256, prefill_chunk=9)  # no other's
    with Engine(tiny_model, speculation=SPECULATION, engine=config) as engine:
        engine.add_request(PROMPTS[5], law)
        assert engine.device_steps.extras == StepExtras()
        while engine.has_work:
            engine.step()
        told = dataclasses.replace(law, prompt_logprobs=0)
        engine.add_request(PROMPTS[5], told)
        with pytest.raises(TypeError, match="not callable"):
            engine.step()


@pytest.mark.parametrize("value", [-1, True, "2", 1.5])
def test_values_that_are_refused(value):
    with pytest.raises(ValueError, match="prompt_logprobs must be an integer in"):
        SamplingParams(prompt_logprobs=value)


def test_what_an_engine_refuses(tiny_model):
    law = SamplingParams(max_tokens=1, prompt_logprobs=0)
    with pytest.raises(
        ValueError, match="prompt_logprobs is 98, the vocabulary has 97"
    ):
        run(tiny_model, [[1]], dataclasses.replace(law, prompt_logprobs=98))
    config = dataclasses.replace(ENGINE, max_length=64)
    speculation = SpeculationConfig(num_draft_tokens=1)
    with Engine(tiny_model, speculation=speculation, engine=config) as engine:
        with pytest.raises(ValueError, match="prompt_logprobs is 0, but scored tokens"):
            engine.submit(prepare(tiny_model, [1], law), scored=[1])
    config = dataclasses.replace(config, prefill_chunk=1)
    with Engine(tiny_model, speculation=speculation, engine=config) as engine:
        with pytest.raises(
            ValueError, match="prefill_chunk of 2 or more, got 1: raise"
        ):
            engine.add_request([1], law)
        assert not engine.has_work


# -- real weights


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_default_model_behind_a_long_prompt(default_model):
    """Texts that share their pages, and one of a few tokens."""
    load = long_load(default_model, 30)
    prompts = [load["prompts"][0][:500], load["prompts"][1][:40]]
    law = dataclasses.replace(load["sampling"][1], n=2, prompt_logprobs=5)
    plain = run(default_model, prompts, law, engine=load["engine"], num_draft_tokens=0)
    found = run(default_model, prompts, law, engine=load["engine"], num_draft_tokens=8)
    assert tokens_of(found) == tokens_of(plain)
    for one, other in zip(found, plain, strict=True):
        prompt = jnp.asarray(prompts[one.prompt_index])
        config, params = default_model.config, default_model.params
        caches = (None,) * config.num_layers
        hidden, _ = forward(
            config, params, prompt, jnp.arange(prompt.size), causal_attend, caches
        )
        rows = np.asarray(jax.nn.log_softmax(logits(config, params, hidden)))
        wanted = rows[np.arange(prompt.size - 1), prompt[1:]]
        for result in (one, other):
            np.testing.assert_allclose(result.prompt_logprobs[1:], wanted, atol=1e-4)
            for row, top in zip(rows, result.prompt_top_logprobs[1:], strict=False):
                ids, values = zip(*top, strict=True)
                np.testing.assert_allclose(values, row[list(ids)], atol=1e-4)
                assert min(values) > np.sort(row)[-6] - 1e-4
    jax.clear_caches()
