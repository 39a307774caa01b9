"""What "auto" stands for, and that an engine which chooses k emits the same text."""

import dataclasses

import pytest

from sparsespec_jax import Engine, SpeculationConfig, decode, sizes
from sparsespec_jax.config import AUTO
from sparsespec_jax.host import automatic
from sparsespec_jax.host.cost_model import CostModel
from sparsespec_jax.tuning.calibrate import start_choosing
from tests.engine_helpers import ENGINE, LAWS, SPECULATION, make_prompts, run, tokens_of

GPU = dict(impl="gpu", dtype="bfloat16", fits=lambda speculation: True)


def settled(spec=None, **where):
    """(schedule, draft_weights, k, choices) that all "auto" but `spec` stands for."""
    asked = dict(num_draft_tokens=AUTO, schedule=AUTO, draft_weights=AUTO)
    asked = SpeculationConfig(**asked | (spec or {}))
    found = automatic.settled(asked, **GPU | where)
    drafts = found.num_draft_tokens, found.draft_token_choices
    return found.schedule, found.draft_weights, *drafts


def test_on_a_gpu_drafts_have_8_bits_and_k_is_one_of_a_few():
    assert settled() == ("aligned", "int8", 12, (0, 2, 4, 8))


@pytest.mark.parametrize(
    "where",
    [
        dict(impl="gpu_interpret"),
        dict(impl="reference"),
        dict(impl="tpu"),
        dict(dtype="float32"),
        dict(fits=lambda speculation: False),
        dict(spec=dict(proposer="ngram")),
        dict(spec=dict(schedule="mixed")),
    ],
)
def test_elsewhere_drafts_have_the_models_weights(where):
    schedule, weights, k, _ = settled(**where)
    assert (schedule, weights) == ("mixed", None)
    assert k == (12 if where.get("impl", "gpu") in ("gpu", "tpu") else 8)


def test_what_is_given_stays():
    assert settled(dict(num_draft_tokens=3))[2:] == (3, ())
    assert settled(dict(draft_weights=None))[:2] == ("mixed", None)
    assert settled(dict(draft_weights="int8"), dtype="float32")[:2] == (
        "aligned", "int8",
    )  # fmt: skip
    aligned = dict(schedule="aligned")
    assert settled(aligned, dtype="float32")[:2] == ("aligned", None)
    given = SpeculationConfig(schedule="aligned")
    assert automatic.settled(given, **GPU) is given


def test_whether_it_fits_is_asked_of_what_would_be_made():
    asked = []
    settled(fits=lambda speculation: asked.append(speculation) or True)
    (speculation,) = asked
    assert speculation.draft_weights == "int8" and speculation.schedule == "aligned"
    assert speculation.num_draft_tokens == 12


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (dict(draft_token_choices=(0,)), "draft_token_choices"),
        (dict(acceptor="forced", forced_acceptance=2.0), "acceptor='forced'"),
        (dict(proposer="cascade"), "proposer='cascade'"),
    ],
)
def test_what_needs_a_number_of_drafts_is_refused(given, name):
    with pytest.raises(ValueError, match=f"{name} needs a number of drafts"):
        SpeculationConfig(num_draft_tokens=AUTO, **given)


@pytest.mark.parametrize("given", ["automatic", "", None, 8.5])
def test_other_texts_are_no_number_of_drafts(given):
    with pytest.raises(ValueError, match="num_draft_tokens must be an integer"):
        SpeculationConfig(num_draft_tokens=given)


def test_a_cpu_has_the_default(tiny_model):
    everything = dict(num_draft_tokens=AUTO, schedule=AUTO, draft_weights=AUTO)
    speculation = SpeculationConfig(**everything)
    engine = Engine(tiny_model, speculation=speculation, engine=ENGINE)
    assert engine.speculation == SpeculationConfig()
    assert engine.draft_token_choices == (8,)
    assert sizes.resolve(tiny_model, speculation, ENGINE).speculation.cycle == 9


@pytest.mark.parametrize("schedule", ["mixed", "aligned"])
def test_an_engine_that_chooses_by_itself_emits_plain_text(
    tiny_model, monkeypatch, tmp_path, schedule
):
    """As on a GPU: steps are timed before the first, and none compiles later."""
    monkeypatch.setattr(automatic, "_TIMED", ("reference",))
    monkeypatch.setattr(automatic, "NUM_DRAFT_TOKENS", (0, 1, 3))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    prompts = make_prompts(tiny_model.config.vocab_size)
    plain = tokens_of(run(tiny_model, prompts, num_draft_tokens=0))
    asked = dict(num_draft_tokens=AUTO, draft_token_choices=(), schedule=schedule)
    speculation = dataclasses.replace(SPECULATION, **asked)
    got = decode(
        tiny_model, prompts, sampling=LAWS, speculation=speculation,
        engine=dataclasses.replace(ENGINE, max_length=160),
    )  # fmt: skip
    assert tokens_of(got) == plain
    steps = got.stats.to_dict()["steps_by_num_draft_tokens"]
    assert set(steps) <= {"0", "1", "3"} and sum(steps.values()) == got.stats.num_steps
    assert list(tmp_path.rglob("step_costs/*.json"))


def test_texts_too_short_to_be_timed_have_the_default_k(tiny_model, monkeypatch):
    monkeypatch.setattr(automatic, "_TIMED", ("reference",))
    everything = SpeculationConfig(num_draft_tokens=AUTO)
    config = dataclasses.replace(ENGINE, max_length=40)
    with Engine(tiny_model, speculation=everything, engine=config) as engine:
        assert engine.draft_token_choices == automatic.NUM_DRAFT_TOKENS
        start_choosing(engine)
        assert engine.num_draft_tokens == automatic.UNTIMED == 8


def test_requests_may_wait_while_steps_are_timed(tiny_model, monkeypatch, tmp_path):
    monkeypatch.setattr(automatic, "_TIMED", ("reference",))
    monkeypatch.setattr(automatic, "NUM_DRAFT_TOKENS", (0, 1, 3))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    prompts = make_prompts(tiny_model.config.vocab_size)
    plain = tokens_of(run(tiny_model, prompts, num_draft_tokens=0))
    speculation = dataclasses.replace(SPECULATION, num_draft_tokens=AUTO)
    config = dataclasses.replace(ENGINE, max_length=160)
    engine = Engine(tiny_model, speculation=speculation, engine=config)
    ids = [engine.add_request(p, law) for p, law in zip(prompts, LAWS, strict=True)]
    results = {}
    while engine.has_work:
        results |= {r.request_id: r for r in engine.step()}
    assert [results[i].token_ids for i in ids] == plain


def test_the_host_works_once_for_a_cycle():
    steps = {0: ((0, 1.0), (1000, 1.0)), 4: ((0, 1.0), (1000, 1.0))}
    load = dict(num_running=1, context_tokens=0, acceptance=(1.0,) * 4)
    mixed, aligned = CostModel(steps), CostModel(steps, runs_cycles=True)
    assert mixed.tokens_per_s(4, host_seconds=2.0, **load) == pytest.approx(0.5)
    assert aligned.tokens_per_s(4, host_seconds=2.0, **load) == pytest.approx(1.0)
    assert aligned.tokens_per_s(4, host_seconds=10.0, **load) == pytest.approx(0.5)
