"""Any number of end-of-text and stop token ids ends a text, wherever it stands."""

import dataclasses

import pytest

from experiments.models import TINY
from sparsespec_jax import Model, SamplingParams, stream
from sparsespec_jax.models.transformer import init_params
from sparsespec_jax.plan.slot_params import NUM_STOP_IDS, slot_params
from tests.engine_helpers import ENGINE, SPECULATION, run

_VOCAB = 2048
_EOS = range(3, _VOCAB, 6)[:300]
PROMPT = [5, 9, 1]
LAW = SamplingParams(temperature=1.0, max_tokens=30, ignore_eos=True)


@pytest.fixture(scope="module")
def model():
    config = dataclasses.replace(TINY, vocab_size=_VOCAB, eos_ids=tuple(_EOS))
    params = init_params(config, seed=0)
    return Model(name="tiny", config=config, params=params, tokenizer=None)


@pytest.fixture(scope="module")
def texts(model):
    """Twelve samples that nothing ends early."""
    law = dataclasses.replace(LAW, n=12)
    results = run(model, [PROMPT], law, num_draft_tokens=0)
    assert {result.finish_reason for result in results} == {"length"}
    return [result.token_ids for result in results]


def first_of(text, ids):
    return next((i for i, token in enumerate(text) if token in ids), None)


def check_cut(result, text, end, logprobs=None):
    """The result is the text up to and with the token at `end`."""
    if end is None:
        assert (result.token_ids, result.finish_reason) == (text, "length")
        return
    assert result.token_ids == text[: end + 1]
    assert (result.finish_reason, result.stop_reason) == ("stop", text[end])
    assert len(result.logprobs) == end + 1


@pytest.mark.parametrize("num_draft_tokens", [0, 3])
def test_three_hundred_ends_of_text_all_end_it(model, texts, num_draft_tokens):
    assert len(set(model.config.eos_ids)) == 300
    ends = [first_of(text, model.config.eos_ids) for text in texts]
    assert len(set(ends)) > 4  # at several offsets of a cycle
    law = dataclasses.replace(LAW, n=12, ignore_eos=False)
    results = run(model, [PROMPT], law, num_draft_tokens=num_draft_tokens)
    for result, text, end in zip(results, texts, ends, strict=True):
        check_cut(result, text, end)
    total = results.stats.total
    assert total.num_output_tokens == sum(len(r.token_ids) for r in results)


@pytest.mark.parametrize("lag", [0, 1, 2])
@pytest.mark.parametrize("num_ids", [NUM_STOP_IDS, 9, 40])
@pytest.mark.parametrize("num_draft_tokens", [0, 3])
def test_stops_at_every_offset_of_a_cycle(model, texts, num_draft_tokens, num_ids, lag):
    """The id that stops comes last in the list, behind those that the device has."""
    (text, *_), laws, ends = texts, [], range(3, 15)
    for end in ends:
        unused = [i for i in range(_VOCAB) if i not in text]
        ids = (*unused[: num_ids - 1], text[end])
        assert len(ids) == num_ids
        laws.append(dataclasses.replace(LAW, stop_token_ids=ids))
    results = run(
        model, [PROMPT] * len(laws), laws, engine=dict(lag=lag),
        num_draft_tokens=num_draft_tokens,
    )  # fmt: skip
    for result, law in zip(results, laws, strict=True):
        check_cut(result, text, first_of(text, law.stop_token_ids))


def test_a_stream_ends_where_the_text_does(model, texts):
    law = dataclasses.replace(LAW, ignore_eos=False)
    events = stream(model, [PROMPT], sampling=law, speculation=SPECULATION,
                    engine=ENGINE)  # fmt: skip
    tokens = [token for event in events for token in event.new_token_ids]
    end = first_of(texts[0], model.config.eos_ids)
    assert tuple(tokens) == texts[0][: end + 1]


def test_the_device_takes_what_fits():
    for count in (0, 3, NUM_STOP_IDS, 300):  # an id past int32 is none of a token
        params = slot_params(LAW, 0, 0, frozenset({*range(count), 2**40}), SPECULATION)
        known = list(range(min(count, NUM_STOP_IDS)))
        assert params[-NUM_STOP_IDS:].tolist() == known + [-1] * (8 - len(known))
