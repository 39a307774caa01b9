"""Events of a stream: ids and text of each belong together, and make the result."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders

from sparsespec_jax import Engine, SamplingParams, decode, stream
from sparsespec_jax.host.commit import commit
from sparsespec_jax.host.metrics import RequestMetrics
from sparsespec_jax.host.outputs import Output, Outputs
from sparsespec_jax.host.request import Request, token_array
from sparsespec_jax.host.scheduler import Scheduler
from sparsespec_jax.host.text import OutputText
from sparsespec_jax.plan.outcome import SEED, StepOutcome
from sparsespec_jax.plan.shape import StepShape
from sparsespec_jax.plan.slot_params import NUM_SLOT_PARAMS
from tests.engine_helpers import ENGINE, LAWS, SPECULATION, make_prompts
from tests.test_text_stream import draw_case, expected, read, small
from tests.text_tokenizers import llama_decoder, spelled

MOST = 9  # tokens of one outcome
SHAPE = StepShape(
    num_slots=1,
    num_draft_tokens=MOST - 1,
    num_pages=32,
    page_size=8,
    table_width=16,
    draft_table_width=1,
    max_budget=1,
    prefill_lanes=1,
    prefill_chunk=8,
    drafts_at_once=True,  # a verification in every step
)


class Replay:
    """One request at a time through Outputs, with outcomes that are told beforehand."""

    def __init__(self):
        self.scheduler = Scheduler(SHAPE)
        self.outputs = Outputs(SHAPE, with_acceptance=False)
        self.numbers = itertools.count()

    def add(self, tokenizer, sampling, stop_ids, progress=None):
        """The Output of a new request, or of one that goes on from `progress`."""
        emitted = progress.token_ids if progress else ()
        request = Request(
            request_id=next(self.numbers),
            tokens=token_array([0, *emitted]),
            num_prompt=1,
            limit=1 + sampling.max_tokens,
            budget_ratio=1.0,
            min_budget=1,
            slot_params=np.zeros(NUM_SLOT_PARAMS, np.int32),
        )
        output = Output(
            request=request,
            sampling=sampling,
            prompt_index=0,
            sample_index=0,
            text=OutputText(tokenizer, sampling.stop),
            stop_ids=frozenset(stop_ids),
            metrics=RequestMetrics(max_draft_tokens=MOST - 1),
            submitted_s=0.0,
        )
        self.scheduler.add(request)
        self.outputs.add(output, progress)
        return output

    def step(self, output, ids, size, events):
        """Commit the next tokens of `ids`, at most `size`; returns results."""
        while True:
            plan, planned, _ = self.scheduler.plan()
            first = len(output.request.tokens) - 1
            is_seed = bool(plan.views["seed_counts"][0] >= 0)
            tokens = ids[first : first + (1 if is_seed else size)]
            stops = [i for i, token in enumerate(tokens) if token in output.stop_ids]
            tokens = tokens[: stops[0] + 1] if stops else tokens
            outcome = StepOutcome(
                num_emitted=np.array([len(tokens) if planned.requests else 0]),
                num_accepted=np.array([SEED if is_seed else len(tokens) - 1]),
                is_done=np.array([bool(stops) or first + len(tokens) == len(ids)]),
                tokens=np.array([tokens + [0] * (MOST - len(tokens))]),
                logprobs=np.zeros((1, MOST), np.float32),
                cascade=None,
            )
            results = []
            records = self.scheduler, self.outputs
            commit(*records, planned, outcome, 0, results, events)
            if planned.requests:
                return results


REPLAY = Replay()


def outcome_of(tokenizer, ids, stops, stop_ids):
    """(token ids, text, finish reason, stop reason) that an output must have."""
    ends = [i for i, token in enumerate(ids) if token in stop_ids]
    body = ids[: ends[0]] if ends else ids
    count, stop, text = expected(tokenizer, body, stops)
    if stop is not None:
        return tuple(body[:count]), text, "stop", stop
    if ends:
        return tuple(ids[: ends[0] + 1]), text, "stop", ids[ends[0]]
    return tuple(ids), text, "length", None


@settings(max_examples=3_000, derandomize=True, deadline=None, database=None)
@given(st.binary(min_size=9, max_size=32), st.binary(min_size=1, max_size=12))
def test_events_make_the_result_however_tokens_come(data, acts):
    """Steps of any size; some with nobody listening; some in an engine to come."""
    tokenizer, ids, sizes, stops = draw_case(data)
    stop_ids = ids[-1:] if acts[0] % 3 == 0 else ()
    wanted = outcome_of(tokenizer, ids, stops, stop_ids)
    _, certain = read(tokenizer, wanted[0], stops, [1] * len(ids))
    law = SamplingParams(stop=stops, max_tokens=len(ids))
    output = REPLAY.add(tokenizer, law, stop_ids)
    for size, act in zip(sizes, itertools.cycle(acts), strict=False):
        before = len(output.request.tokens) - 1
        events = None if act % 4 == 1 else []
        results = REPLAY.step(output, ids, size, events)
        after = len(output.request.tokens) - 1
        if events is not None:
            (event,) = events
            assert event.new_token_ids == wanted[0][before:after]
            whole = wanted[1] if results else certain[after]
            assert event.new_text == whole[len(certain[before]) :]
            assert event.finish_reason == (wanted[2] if results else None)
        if results:
            break
        if act % 4 == 2:
            (progress,) = REPLAY.outputs.progress({})
            REPLAY.scheduler.release(output.request)
            aborted = REPLAY.outputs.finish(output, "cancelled", None)
            assert aborted.text == tokenizer.decode(aborted.token_ids)
            assert aborted.text.startswith(certain[after])
            output = REPLAY.add(tokenizer, law, stop_ids, progress)
    (result,) = results
    assert result.token_ids == wanted[0] and len(result.logprobs) == len(wanted[0])
    assert result.text == wanted[1]
    assert (result.finish_reason, result.stop_reason) == wanted[2:]


# --- A real engine

BYTES = decoders.ByteLevel()
CONFIG = dataclasses.replace(ENGINE, max_length=100)
PLAIN = dataclasses.replace(SPECULATION, num_draft_tokens=0)


@pytest.fixture(scope="module")
def text_models(tiny_model):
    """The tiny model, whose tokens are bytes of characters, or pieces with spaces."""
    size = tiny_model.config.vocab_size - 1
    data = [*range(0x80, 0xA0), 0xC3, 0xE4, 0xF0, *range(32, 93)][:size]
    pieces = [f"{'▁' * (i % 3)}w{i}" for i in range(size - 40)]
    pieces += [f"<0x{byte:02X}>" for byte in range(0xE0, 0xE0 + 20)]
    tokenizers = {
        "bytes": small(*(spelled(bytes([byte])) for byte in data), decoder=BYTES),
        "pieces": small(*pieces, decoder=llama_decoder()),
    }
    return {
        name: dataclasses.replace(tiny_model, tokenizer=tokenizer)
        for name, tokenizer in tokenizers.items()
    }


@pytest.fixture(scope="module")
def prompts(tiny_model):
    return make_prompts(tiny_model.config.vocab_size)[:4]


def collected(events):
    """Ids and text of every request, and the texts of its events."""
    found = {}
    for event in events:
        ids, texts = found.setdefault(event.request_id, ([], []))
        ids.extend(event.new_token_ids)
        texts.append(event.new_text)
    return found


@pytest.mark.parametrize("name", ["bytes", "pieces"])
def test_plain_and_speculative_streams_give_the_text_of_decode(
    text_models, prompts, name
):
    model = text_models[name]
    laws = [dataclasses.replace(law, max_tokens=30) for law in LAWS[: len(prompts)]]
    options = dict(speculation=SPECULATION, engine=CONFIG)
    plain = dict(options, speculation=PLAIN)
    whole = [r.text for r in decode(model, prompts, sampling=laws, **options)]
    assert whole == [
        model.tokenizer.decode(r.token_ids)
        for r in decode(model, prompts, sampling=laws, **plain)
    ]
    for stops in (), ("never",), tuple(text[9:12] for text in whole):
        laws = [dataclasses.replace(law, stop=stops) for law in laws]
        results = decode(model, prompts, sampling=laws, **plain)
        assert stops[1:] or [r.text for r in results] == whole
        for how in options, plain:
            found = collected(stream(model, prompts, sampling=laws, **how))
            for result in results:
                ids, texts = found[result.request_id]
                assert tuple(ids) == result.token_ids
                assert "".join(texts) == result.text


def test_the_first_event_after_a_resumption_is_of_its_own_tokens(text_models, prompts):
    model = text_models["bytes"]
    law = dataclasses.replace(LAWS[1], max_tokens=25, stop=("never",))

    def engine():
        return Engine(model, speculation=SPECULATION, engine=CONFIG)

    first, events = engine(), []
    first.add_request(prompts[1], law)
    while first.num_emitted_tokens < 10:
        events += first.step_with_events()[1]
    (progress,) = first.progress({})
    aborted = first.abort(progress.request_id)
    assert aborted.text == model.tokenizer.decode(progress.token_ids)
    given = "".join(event.new_text for event in events)
    assert given and aborted.text.startswith(given)
    second, results = engine(), []
    second.resume_request(prompts[1], law, progress)
    while second.has_work:
        more, new = second.step_with_events()
        results, events = results + more, events + new
    (result,) = results
    assert "".join(event.new_text for event in events) == result.text
    assert sum((event.new_token_ids for event in events), ()) == result.token_ids


def test_samples_of_one_request_share_its_prompt_index(tiny_model, prompts):
    engine = Engine(tiny_model, speculation=SPECULATION, engine=CONFIG)
    law = SamplingParams(max_tokens=3, n=3)
    one = engine.add_request(prompts[0], dataclasses.replace(law, n=1))
    three = engine.add_request(prompts[1], law)
    named = engine.add_request(prompts[2], law, prompt_index=77)
    found = {}
    while engine.has_work:
        for result in engine.step():
            found[result.request_id] = (result.prompt_index, result.sample_index)
    assert found[one] == (one, 0)
    assert [found[i] for i in three] == [(three[0], sample) for sample in range(3)]
    assert [found[i] for i in named] == [(77, sample) for sample in range(3)]
