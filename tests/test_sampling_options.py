"""Biases, penalties, bad words, least lengths: the same text with drafts or without.

The law of each token is compared with one written down here in plain NumPy.
"""

import dataclasses
import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from sparsespec_jax import Engine, SamplingParams, score, stream
from sparsespec_jax import sampling as sampling_lib
from sparsespec_jax.device import editing
from sparsespec_jax.device import step as step_lib
from sparsespec_jax.host.edits import prepare_edits
from sparsespec_jax.host.intake import prepare
from sparsespec_jax.host.metrics import RequestMetrics
from sparsespec_jax.host.results import RequestProgress
from sparsespec_jax.loading.tokenizer import Tokenizer
from sparsespec_jax.models.transformer import causal_attend, forward, logits
from sparsespec_jax.plan.buffer import StepPlan
from sparsespec_jax.plan.edits import (
    NO_EXTRAS,
    RequestEdits,
    StepExtras,
    edit_arrays,
    neutral_arrays,
)
from sparsespec_jax.plan.slot_params import slot_params
from sparsespec_jax.proposers.eagle import Eagle, init_head
from sparsespec_jax.sizes import check_edits
from tests.engine_helpers import (
    ENGINE,
    SPECULATION,
    long_load,
    num_compilations,
    run,
    tokens_of,
)

VOCAB = 97
EOS = 5, 50
LENGTH = 64  # of every prompt and output together, at most
FEW = tuple(range(9))  # tokens among which every one has been said soon
CASES = {
    "logit_bias": dict(logit_bias={3: 6.0, 7: 5.5, 60: 5.5, 61: -100}),
    "allowed_token_ids": dict(allowed_token_ids=range(20, 40)),
    "min_tokens": dict(
        min_tokens=9, stop_token_ids=range(0, VOCAB, 4), ignore_eos=False
    ),
    "presence_penalty": dict(presence_penalty=1.9, allowed_token_ids=FEW),
    "frequency_penalty": dict(frequency_penalty=-0.6),
    "repetition_penalty": dict(repetition_penalty=1.8, allowed_token_ids=FEW),
    "bad_words": dict(
        bad_words=["w3 w4", "w4 w3", "w1 w2 w2", "w6"], allowed_token_ids=FEW
    ),
    "all": dict(
        bad_words=["w3 w3", "w8"], allowed_token_ids=FEW, logit_bias={0: 1.5, 3: 1.0},
        presence_penalty=-0.4, frequency_penalty=0.7, repetition_penalty=0.8,
        min_tokens=12, ignore_eos=False, top_k=6, top_p=0.9, min_p=0.02,
    ),
    "none": dict(),
}  # fmt: skip
PROMPTS = ([1], [4, 8, 2, 7], list(range(30, 47)))
LAWS = [
    SamplingParams(
        **{"ignore_eos": True, "max_tokens": 24, "temperature": heat, "n": n}
        | {"seed": seed, "logprobs": "processed", "top_logprobs": VOCAB}
        | options
    )
    for seed, options in enumerate(CASES.values())
    for heat, n in ((0.0, 1), (0.9, 2))
]
SAMPLES = [(i, sample) for i, law in enumerate(LAWS) for sample in range(law.n)]


def prompt_of(index):
    return PROMPTS[index % len(PROMPTS)]


def all_prompts():
    return [prompt_of(i) for i in range(len(LAWS))]


@pytest.fixture(scope="module")
def model(tiny_model):
    """Ends of text, and a word per token."""
    words = tokenizers.models.WordLevel({f"w{i}": i for i in range(VOCAB)}, "w0")
    backend = tokenizers.Tokenizer(words)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    config = dataclasses.replace(tiny_model.config, eos_ids=EOS)
    return dataclasses.replace(tiny_model, config=config, tokenizer=Tokenizer(backend))


@pytest.fixture(scope="module")
def plain(model):
    return run(model, all_prompts(), LAWS, num_draft_tokens=0)


def assert_same(got, wanted):
    """Every token, end and reason; log-probabilities as near as rows allow."""
    assert tokens_of(got) == tokens_of(wanted)
    for one, other in zip(got, wanted, strict=True):
        assert one.finish_reason == other.finish_reason
        assert one.stop_reason == other.stop_reason
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)
        assert len(one.top_logprobs) == len(other.top_logprobs)
        for row, same in zip(one.top_logprobs, other.top_logprobs, strict=True):
            row, same = dict(row), dict(same)
            assert row.keys() == same.keys()
            np.testing.assert_allclose(
                [row[i] for i in same], list(same.values()), atol=1e-4
            )


# -- the law ---------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def all_logits(config, params, tokens):
    """Logits [LENGTH, V] behind each token of a padded text."""
    caches = (None,) * config.num_layers
    hidden, _ = forward(
        config, params, tokens, jnp.arange(LENGTH), causal_attend, caches,
        impl="reference",
    )  # fmt: skip
    return logits(config, params, hidden)


def bad_words_of(law):
    """Their token ids: a word is a token, with a space in front or not."""
    return [[int(w[1:]) for w in text.split()] for text in law.bad_words]


def numpy_edits(x, law, prompt, output):
    """Logits of one position, float64, behind what was said."""
    x = x.astype(np.float64)
    for token, bias in law.logit_bias:
        x[token] += bias
    for token in range(VOCAB):
        if token in prompt or token in output:
            up = x[token] <= 0
            factor = law.repetition_penalty
            x[token] = x[token] * factor if up else x[token] / factor
        x[token] -= law.frequency_penalty * output.count(token)
        if token in output:
            x[token] -= law.presence_penalty
        if law.allowed_token_ids is not None and token not in law.allowed_token_ids:
            x[token] = -np.inf
        is_end = token in law.stop_token_ids or token in EOS
        if is_end and len(output) < law.min_tokens:
            x[token] = -np.inf
    for *before, last in bad_words_of(law):
        if output[len(output) - len(before) :] == before:
            x[last] = -np.inf
    return x


def numpy_law(x, law):
    """Log-probabilities of edited logits, -inf where the law excludes."""
    if not law.temperature:
        return np.where(np.arange(VOCAB) == x.argmax(), 0.0, -np.inf)
    keep = np.isfinite(x)
    if law.top_k:
        keep &= x >= np.sort(x)[-law.top_k]
    prob = np.where(keep, np.exp((x - x.max()) / law.temperature), 0.0)
    prob /= prob.sum()
    if law.top_p < 1:
        falling = np.sort(prob)[::-1]
        keep &= prob >= falling[np.searchsorted(falling.cumsum(), law.top_p)]
    keep &= prob >= law.min_p * prob.max()
    total = prob[keep].sum()
    with np.errstate(divide="ignore"):
        return np.where(keep, np.log(prob / total), -np.inf)


def laws_of(model, law, prompt, output):
    """(edited logits, log-probabilities) [V] of each position of an output."""
    text = [*prompt, *output]
    padded = jnp.asarray(text + [0] * (LENGTH - len(text)))
    raw = np.asarray(all_logits(model.config, model.params, padded))
    for i in range(len(output)):
        place = len(prompt) + i - 1
        x = numpy_edits(raw[place].copy(), law, prompt, list(output[:i]))
        yield x, numpy_law(x, law)


@jax.jit
def noise_of(params):
    """Noise [LENGTH, V] of the slot params of a request, by position."""
    seed = sampling_lib.law_of(jnp.tile(params, (LENGTH, 1))).seed
    return sampling_lib.gumbel(seed, jnp.arange(LENGTH), jnp.arange(VOCAB))


@pytest.mark.parametrize("name", CASES)
def test_the_law_is_that_of_numpy(model, plain, name):
    """Of every token all that is kept, and which of it the noise chose."""
    number = 2 * list(CASES).index(name)
    for (index, sample), result in zip(SAMPLES, plain, strict=True):
        law, prompt = LAWS[index], prompt_of(index)
        if index - number not in (0, 1):
            continue
        noise = noise_of(slot_params(law, sample, 0, (), SPECULATION))
        noise = np.asarray(noise, np.float64)[len(prompt) :][: len(result.token_ids)]
        for (x, wanted), own_noise, token, logprob, told in zip(
            laws_of(model, law, prompt, result.token_ids), noise,
            result.token_ids, result.logprobs, result.top_logprobs, strict=True,
        ):  # fmt: skip
            ids, values = zip(*told, strict=True)
            assert set(ids) == set(np.flatnonzero(np.isfinite(wanted)))
            np.testing.assert_allclose(values, wanted[list(ids)], atol=1e-5)
            assert dict(told)[token] == pytest.approx(logprob, abs=1e-6)
            scores = x + law.temperature * own_noise
            assert token == np.where(np.isfinite(wanted), scores, -np.inf).argmax()


def test_the_options_do_what_their_names_say(plain):
    """Power: each case reaches what it is there for."""
    by_case = {name: [] for name in CASES}
    for (index, _), result in zip(SAMPLES, plain, strict=True):
        by_case[list(CASES)[index // 2]].append(result.token_ids)
    none = by_case["none"]
    assert all(texts != none for name, texts in by_case.items() if name != "none")
    assert sum(map(len, (text for texts in by_case.values() for text in texts))) > 500
    assert all(10 <= len(text) < 24 for text in by_case["min_tokens"])
    pairs = {pair for text in by_case["bad_words"] for pair in itertools.pairwise(text)}
    assert not pairs & {(3, 4), (4, 3)} and {3, 4} < {a for a, _ in pairs}
    assert not any(6 in text for text in by_case["bad_words"])
    assert all(set(text) <= set(range(20, 40)) for text in by_case["allowed_token_ids"])


# -- drafts ----------------------------------------------------------------------------

TIGHT = dict(num_pages=30, host_chunk_pages=2)
RUNS = {
    "recomputed": (dict(), dict(**TIGHT, lag=0, kv_policy="recompute")),
    "spilled, lag 2": (dict(), dict(**TIGHT, lag=2)),
    "eight aligned drafts in 8 bits": (
        dict(num_draft_tokens=8, schedule="aligned", draft_weights="int8"),
        dict(num_slots=4),
    ),
    "cascade": (
        dict(proposer="cascade", num_draft_tokens=4, draft_steps=2, num_guesses=3),
        dict(),
    ),
    "prompt lookup": (dict(proposer="ngram"), dict()),
    "eagle": (dict(proposer="eagle"), dict()),
}


@pytest.mark.parametrize("speculation, engine", RUNS.values(), ids=RUNS)
def test_drafts_change_no_token(model, plain, speculation, engine):
    if speculation.get("proposer") == "eagle":
        head = Eagle(model.config, init_head(model.config, seed=3))
        speculation = dict(proposer=head)
    got = run(model, all_prompts(), LAWS, engine=engine, **speculation)
    assert_same(got, plain)
    if "num_pages" in engine:
        assert got.stats.kv_usage["preemptions"] > 0
    if speculation != RUNS["eagle"][0]:
        assert got.stats.total.num_accepted_draft_tokens > 0


def tight_engine(model, **speculation):
    """The engine of the runs short of pages: what these compiled serves here too."""
    return Engine(
        model,
        speculation=dataclasses.replace(SPECULATION, **speculation),
        engine=dataclasses.replace(ENGINE, **TIGHT, max_length=256),  # as `run` has it
    )


def finish(engine):
    results = []
    while engine.has_work:
        results += engine.step()
    return results


def test_what_another_engine_goes_on_with(model, plain):
    """Half-way with another k, then in a new engine: the text as it would have been."""
    first = tight_engine(model, draft_token_choices=(1,))
    for index, law in enumerate(LAWS):
        first.add_request(prompt_of(index), law, prompt_index=index)
    found = []
    for k in (3, 1, 3, 1):
        first.set_num_draft_tokens(k)
        for _ in range(25):
            found += first.step()
    begun = first.progress({})
    assert len(begun) > 1 and found
    assert len(found) + len(begun) < len(plain)  # others wait
    first.close()
    ended = {(result.prompt_index, result.sample_index) for result in found}
    begun = {(p.prompt_index, p.sample_index): p for p in begun}
    with tight_engine(model) as second:
        for index, law in enumerate(LAWS):
            rest = [i for i in range(law.n) if (index, i) not in ended]
            known = {i: begun[index, i] for i in rest if (index, i) in begun}
            for progress in known.values():
                assert len(progress.top_logprobs) == len(progress.token_ids)
                second.resume_request(
                    prompt_of(index), law, progress, prompt_index=index
                )
            if rest and not known:
                second.add_request(prompt_of(index), law, prompt_index=index)
                found = [r for r in found if r.prompt_index != index]
        found += finish(second)
    order = {(r.prompt_index, r.sample_index): r for r in found}
    known = [key for key in SAMPLES if key in order]
    assert len(known) > len(SAMPLES) - 3
    wanted = dict(zip(SAMPLES, plain, strict=True))
    assert_same([order[key] for key in known], [wanted[key] for key in known])


def test_who_comes_later_changes_nobody_s_text(model, plain):
    """Requests without options first and last, in slots that others have had."""
    indices = [16, 17, 4, 10, 13, 15, 16, 17, 6, 8]
    with tight_engine(model) as engine:
        found = []
        for number, index in enumerate(indices):
            law = dataclasses.replace(LAWS[index], n=1)
            engine.add_request(prompt_of(index), law, prompt_index=number)
            if number == 1:
                assert engine.device_steps.state.edits is None
                found += [result for _ in range(8) for result in engine.step()]
        assert engine.device_steps.state.edits is not None
        engine.warm_up(sampling=LAWS)
        compiled = num_compilations(engine)
        found += finish(engine)
        assert num_compilations(engine) == compiled
    found.sort(key=lambda result: result.prompt_index)
    wanted = dict(zip(SAMPLES, plain, strict=True))
    assert_same(found, [wanted[index, 0] for index in indices])


def test_streams_and_stop_strings(model):
    laws = [dataclasses.replace(law, stop=("w7", "w2 w4", "w33")) for law in LAWS]
    wanted = run(model, all_prompts(), laws, num_draft_tokens=0)
    assert len({result.stop_reason for result in wanted}) > 3
    engine = dataclasses.replace(ENGINE, **TIGHT, max_length=256)
    tokens, texts = {}, {}
    for event in stream(
        model, all_prompts(), sampling=laws, speculation=SPECULATION, engine=engine
    ):
        tokens.setdefault(event.request_id, []).extend(event.new_token_ids)
        texts[event.request_id] = texts.get(event.request_id, "") + event.new_text
    assert [tuple(tokens[i]) for i in sorted(tokens)] == tokens_of(wanted)
    assert [texts[i] for i in sorted(texts)] == [result.text for result in wanted]


def test_scores_are_those_of_decoding(model, plain):
    """Outputs that stopped included; the law's own log-probabilities."""
    found = score(
        model,
        [prompt_of(index) for index, _ in SAMPLES],
        tokens_of(plain),
        sampling=[LAWS[index] for index, _ in SAMPLES],
    )
    for values, result in zip(found, plain, strict=True):
        np.testing.assert_allclose(values, result.logprobs, atol=1e-5)


def test_greedy_drafts_under_the_ratio_test(model, plain):
    greedy = [i for i, law in enumerate(LAWS) if not law.temperature]
    got = run(
        model, [prompt_of(i) for i in greedy], [LAWS[i] for i in greedy],
        acceptor="ratio_test", draft_top_m=8,
    )  # fmt: skip
    wanted = dict(zip(SAMPLES, plain, strict=True))
    assert tokens_of(got) == [wanted[i, 0].token_ids for i in greedy]


# -- what it costs ---------------------------------------------------------------------


def test_nothing_is_there_for_who_asks_for_nothing(model, monkeypatch):
    """No array of the state, no column of an outcome, no call of what edits."""
    for name in ("edit", "advance"):
        monkeypatch.setattr(editing, name, None)
    monkeypatch.setattr(sampling_lib, "top_logprobs", None)
    with tight_engine(model) as engine:
        steps, shape = engine.device_steps, engine.shape
        engine.add_request([1], dataclasses.replace(LAWS[-1], top_logprobs=0))
        assert steps.state.edits is None and not steps.extras.edits
        # Of two layers and eleven fields; a slot's record of a plan has 18 numbers.
        assert len(jax.tree.leaves(steps.state)) == 2 * 2 + 11
        plan = StepPlan.empty(shape, prefill=True)
        assert plan.views["slot_params"].shape == (3, 18)
        step = steps.step_function(False, shape)
        _, outcome = jax.eval_shape(
            functools.partial(step.__wrapped__, prefill=True),
            engine.params, steps.state, plan.buffer,
        )  # fmt: skip
        assert outcome.shape == (shape.verify_lanes, 3 + 2 * shape.num_queries)


def test_slots_grow_and_keep_what_they_hold():
    small = StepExtras(penalties=True, num_words=2, word_tokens=2)
    edits = editing.slot_edits(small, 2, 7, None)
    law = SamplingParams(presence_penalty=1.0)
    own = RequestEdits(law, ends=(), banned=(), words=((3, 4),))
    arrays = edit_arrays(small, 7, own, [1, 1, 5, 3], 2, 3)
    edits = editing.load_slot(edits, 1, arrays)
    large = small.joined(StepExtras(bias=True, num_words=4, word_tokens=4))
    grown = editing.slot_edits(large, 2, 7, edits)
    wanted = edit_arrays(large, 7, own, [1, 1, 5, 3], 2, 3)
    wanted["recent"][:2] = -1  # no word of its own is as long
    for name, array in wanted.items():
        np.testing.assert_array_equal(getattr(grown, name)[1], array)
        neutral = neutral_arrays(large, 7)[name]
        np.testing.assert_array_equal(getattr(grown, name)[0], neutral)


# -- what is refused -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (dict(logit_bias=[3]), "logit_bias must be a dict of token ids and numbers"),
        (dict(logit_bias=7), "logit_bias must be a dict of token ids and numbers"),
        (dict(logit_bias={-1: 1}), "each token id of logit_bias must be an integer"),
        (dict(logit_bias={"a": 1}), "each token id of logit_bias must be an integer"),
        (
            dict(logit_bias={1: 101}),
            "each bias of logit_bias must be a number in",
        ),
        (dict(logit_bias={1: float("nan")}), "each bias of logit_bias.*got nan"),
        (dict(logit_bias={1: "2"}), "each bias of logit_bias.*got '2'"),
        (dict(logit_bias={1: 2, "1": 2}), "logit_bias has token id 1 twice"),
        (dict(allowed_token_ids=[]), "allowed_token_ids must hold a token id; None"),
        (dict(allowed_token_ids=[-1]), "each of allowed_token_ids must be an integer"),
        (dict(allowed_token_ids="ab"), "allowed_token_ids must be a list of integers"),
        (dict(min_tokens=-1), "min_tokens must be an integer in"),
        (dict(min_tokens=9, max_tokens=8), "min_tokens must be at most max_tokens=8"),
        (dict(presence_penalty=2.1), r"presence_penalty must be in \[-2.0, 2.0\]"),
        (dict(frequency_penalty="1"), "frequency_penalty must be a number, got '1'"),
        (dict(repetition_penalty=0), r"repetition_penalty must be in \[0.01, 100.0\]"),
        (dict(bad_words=[""]), "bad_words must hold non-empty strings"),
        (dict(bad_words=3), "bad_words must be a list of strings"),
        (dict(top_logprobs=-1), "top_logprobs must be an integer in"),
        (dict(top_logprobs=True), "top_logprobs must be an integer in"),
    ],
)
def test_what_params_refuse(options, wanted):
    with pytest.raises(ValueError, match=wanted) as error:
        SamplingParams(**options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (dict(logit_bias={97: 1}), "prompt 0: token id 97 of logit_bias is outside"),
        (
            dict(allowed_token_ids=[1, 99]),
            "token id 99 of allowed_token_ids is out",
        ),
        (dict(top_logprobs=98), "top_logprobs is 98, the vocabulary has 97 tokens"),
        (dict(bad_words=[" "]), "bad word ' ' has no tokens"),
        (dict(allowed_token_ids=EOS, min_tokens=1), "every token that is allowed"),
        (dict(allowed_token_ids=[1], bad_words=["w1"]), "every token that is allowed"),
        (
            dict(allowed_token_ids=[1, 2], bad_words=["w1 w1", "w3 w2"]),
            "every token that is allowed could be excluded at once",
        ),
        (dict(bad_words=[f"w{i}" for i in range(97)]), "every token that is allowed"),
    ],
)
def test_what_a_model_refuses_before_any_work(model, options, wanted):
    with pytest.raises(ValueError, match=wanted) as error:
        run(model, [[1]], SamplingParams(**options))
    assert "\n" not in str(error.value)


def test_what_needs_a_tokenizer_or_decoding(model, tiny_model):
    with pytest.raises(ValueError, match="bad_words need a tokenizer.*logit_bias"):
        run(tiny_model, [[1]], SamplingParams(bad_words=["w1"]))
    law = SamplingParams(max_tokens=1, top_logprobs=1)
    prepared = prepare(model, [1], law)
    with tight_engine(model) as engine:
        law = dataclasses.replace(law, max_tokens=3)
        told = dict(logprobs=(-1.0,), params_versions=((0, 1),))
        progress = RequestProgress(
            request_id=0, prompt_index=0, sample_index=0, token_ids=(1,),
            metrics=RequestMetrics(max_draft_tokens=3), **told,
        )  # fmt: skip
        with pytest.raises(ValueError, match="1 tokens are emitted, 0 of them with"):
            engine.resume_request([1], law, progress)
        with pytest.raises(ValueError, match="top_logprobs is 1, but scored tokens"):
            engine.submit(prepared, scored=[1])
        sizes = dict(num_slots=2**40)
        shape = dataclasses.replace(engine.shape, **sizes)
        wanted = StepExtras(penalties=True)
        with pytest.raises(ValueError, match="bad words need .* bytes for"):
            check_edits(model, shape, NO_EXTRAS, wanted)


def test_params_with_options_are_records_like_others():
    given = dict(logit_bias={7: 2, "3": -1.5}, allowed_token_ids={7, 3}, bad_words="ab")
    law = SamplingParams(**given)
    assert law.logit_bias == ((3, -1.5), (7, 2.0)) and law.allowed_token_ids == (3, 7)
    assert SamplingParams(**json.loads(json.dumps(dataclasses.asdict(law)))) == law
    assert hash(law) == hash(dataclasses.replace(law)) and law.edits
    assert SamplingParams(logit_bias=None, bad_words=None) == SamplingParams()
    assert not SamplingParams(top_logprobs=3).edits and not SamplingParams().edits


def test_bad_words_are_looked_for_behind_a_space_too(model):
    """If that has another first token and as many, as in vLLM."""
    ids = {"a": [1], " a": [2], "b c": [3, 4], " b c": [5, 6, 4], "d": [7], " d": [7]}

    class Fake:
        def encode(self, text, *, add_special_tokens):
            assert not add_special_tokens
            return ids[text]

    law = SamplingParams(bad_words=["a", "b c", " d", "d"])
    edits = prepare_edits(dataclasses.replace(model, tokenizer=Fake()), law)
    assert edits.banned == (1, 2, 7) and edits.words == ((3, 4),)


def test_rows_edited_without_the_drafts_before_them_are_noticed(
    model, plain, monkeypatch
):
    """Power: the law of a cycle's first row in all of its rows."""

    def of_the_first_row(right):
        def wrong(own, x, *rest):
            included = [a for a in rest if getattr(a, "ndim", 0) == 2][-1]
            rest = [jnp.zeros_like(a) if a is included else a for a in rest]
            return right(own, x, *rest)

        return wrong

    for name in ("_counts", "_without_bad_words"):
        right = getattr(editing, name)
        monkeypatch.setattr(editing, name, of_the_first_row(right))
    wanted = dict(zip(SAMPLES, plain, strict=True))
    numbers = [list(CASES).index(x) for x in ("presence_penalty", "bad_words")]
    indices = [2 * number + i for number in numbers for i in (0, 1)]
    step_lib.make_step.cache_clear()
    got = run(model, [prompt_of(i) for i in indices], [LAWS[i] for i in indices])
    step_lib.make_step.cache_clear()
    keys = [key for key in SAMPLES if key[0] in indices]
    same = [
        result.token_ids == wanted[key].token_ids
        for key, result in zip(keys, got, strict=True)
    ]
    assert not all(same[:3]) and not all(same[3:])


# -- real weights ----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_default_model_with_all_options(default_model):
    """Greedy and sampled behind a long context: drafts change nothing."""
    load = long_load(default_model, 60)
    load["prompts"] = [prompt[:300] for prompt in load["prompts"]]
    options = dict(
        presence_penalty=0.5, frequency_penalty=0.3, repetition_penalty=1.2,
        min_tokens=50, bad_words=[" the number", "ways"], logit_bias={260: 2.0},
        ignore_eos=False, top_logprobs=4, logprobs="processed",
    )  # fmt: skip
    load["sampling"] = [dataclasses.replace(x, **options) for x in load["sampling"]]
    wanted = run(default_model, **load, num_draft_tokens=0)
    got = run(default_model, **load, num_draft_tokens=8, min_budget=32)
    assert_same(got, wanted)
    assert got.stats.total.num_accepted_draft_tokens > 0
    assert not any(" the number" in result.text for result in wanted)
    jax.clear_caches()
