"""Results as people keep them: dicts, JSON, rows of a table, pickles, one line."""

import dataclasses
import json
import pickle

import pytest
import tokenizers

from sparsespec_jax import (
    Engine,
    EngineConfig,
    SamplingParams,
    SpeculationConfig,
    decode,
)
from sparsespec_jax.host.metrics import RequestMetrics
from sparsespec_jax.host.results import DecodeResult
from sparsespec_jax.host.text import OutputText
from sparsespec_jax.loading.tokenizer import Tokenizer

LAW = SamplingParams(max_tokens=8, n=2, temperature=0.7)


@pytest.fixture(scope="module")
def model(tiny_model):
    words = tokenizers.models.WordLevel({f"w{i}": i for i in range(97)}, unk_token="w0")
    backend = tokenizers.Tokenizer(words)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return dataclasses.replace(tiny_model, tokenizer=Tokenizer(backend))


@pytest.fixture(scope="module")
def results(model):
    return decode(model, ["w1 w2", "w7 " * 30], sampling=LAW)


def test_json_of_everything_has_what_attributes_say(results):
    found = json.loads(json.dumps(results.to_dict(), allow_nan=False))
    assert len(found["results"]) == 4
    for written, result in zip(found["results"], results, strict=True):
        assert written["text"] == result.text
        assert tuple(written["token_ids"]) == result.token_ids
        assert tuple(written["logprobs"]) == result.logprobs
        assert tuple(written["prompt_token_ids"]) == result.prompt_token_ids
        assert RequestMetrics.from_dict(written["metrics"]) == result.metrics
        others = set(written) - {"text", "metrics"}
        assert others == {
            field.name
            for field in dataclasses.fields(DecodeResult)
            if field.name not in ("output_text", "metrics")
        }
    assert found["stats"]["total"]["num_output_tokens"] == 32
    assert found["stats"]["numerics"] == "fast"


def test_rows_are_flat_and_have_one_kind_of_column(results):
    rows = results.to_rows()
    assert [(r["prompt_index"], r["sample_index"]) for r in rows] == [
        (0, 0), (0, 1), (1, 0), (1, 1),
    ]  # fmt: skip
    assert len({tuple(row) for row in rows}) == 1
    assert not [v for row in rows for v in row.values() if isinstance(v, dict | list)]
    assert rows[2]["num_prompt_tokens"] == 30
    wanted = sum(results[0].logprobs) / 8
    assert rows[0]["mean_logprob"] == pytest.approx(wanted)


def test_a_pickle_is_small_and_keeps_the_text(results):
    for result in results:
        kept = pickle.dumps(result)
        assert len(kept) < 4096
        assert (read := pickle.loads(kept)) == result
        assert read.text == result.text
        assert read.to_dict() == result.to_dict()
    assert pickle.loads(pickle.dumps(results)).to_rows() == results.to_rows()


def test_a_pickle_without_a_tokenizer(tiny_model):
    (result,) = decode(tiny_model, [[1, 2]], sampling=SamplingParams(max_tokens=3))
    assert pickle.loads(pickle.dumps(result)).text is None
    assert json.dumps(result.to_dict())
    assert repr(result).startswith(f"DecodeResult({result.token_ids}, 3 tokens")


def test_representations_are_short_and_begin_with_the_text(model, results):
    assert len(repr(model)) < 200
    assert repr(model).startswith("Model('tiny', 2 layers, 0.0 M parameters, float32")
    assert repr(results[0]).startswith(f"DecodeResult({results[0].text!r}, 8 tokens")
    lines = repr(results).splitlines()
    assert len(lines) == 6 and lines[-1].strip() == "and 1 more"
    assert "32 tokens in" in lines[0] and "drafts accepted" in lines[0]
    assert lines[1] == results.stats.hint
    many = dataclasses.replace(
        results[0], output_text=OutputText(None, ()), token_ids=tuple(range(10**4))
    )
    assert len(repr(many)) < 200
    assert len(repr(results.stats)) < 200


def test_a_floor_that_covers_the_context_is_told_with_the_way_out(model, results):
    assert results.stats.total.kv_read_ratio > 1
    found = results.stats.hint
    assert found == (
        "drafts read the whole context: min_budget 192 >= 38 tokens; "
        "use longer outputs or min_budget=8"
    )
    assert results.stats.to_dict()["hint"] == found
    assert found in repr(results.stats)
    # The floor that is named is one: no more is told then.
    stats = dataclasses.replace(results.stats, min_budget=8)
    assert stats.hint == "" and "\n" not in repr(stats)
    # Of some texts only, and of half of them.
    stats = dataclasses.replace(stats, min_budget=20)
    assert [r.num_prompt_tokens for r in stats.requests] == [2, 2, 30, 30]
    assert stats.hint == ""
    stats = dataclasses.replace(stats, requests=stats.requests[:3])
    assert stats.hint == (
        "drafts read the whole context of 2 of 3 texts: min_budget 20 >= 10 tokens; "
        "use longer outputs"
    )


@pytest.mark.parametrize(
    "speculation",
    [
        SpeculationConfig(num_draft_tokens=0),
        SpeculationConfig(proposer="ngram"),
        SpeculationConfig(policy="full"),
    ],
    ids=["plain", "at once", "all by intention"],
)
def test_drafts_without_a_selection_have_no_floor(tiny_model, speculation):
    config = EngineConfig(max_length=64, num_slots=1, page_size=4)
    with Engine(tiny_model, speculation=speculation, engine=config) as engine:
        assert engine.stats(0.0).min_budget == 0
    with Engine(tiny_model, engine=config) as engine:
        assert engine.stats(0.0).min_budget == 192
