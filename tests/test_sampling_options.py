"""Biases, penalties, bad words, least lengths: the same text with drafts or without.

The law of each token is compared with one written down here in plain NumPy.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from sparsespec_jax import SamplingParams
from sparsespec_jax import sampling as sampling_lib
from sparsespec_jax.loading.tokenizer import Tokenizer
from sparsespec_jax.models.transformer import causal_attend, forward, logits
from sparsespec_jax.plan.slot_params import slot_params
from sparsespec_jax.proposers.eagle import Eagle, init_head
from tests.engine_helpers import SPECULATION, run, tokens_of

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
    "one draft, lag 0": (dict(num_draft_tokens=1), dict(lag=0)),
    "recomputed": (dict(), dict(**TIGHT, kv_policy="recompute")),
    "spilled, lag 2": (dict(), dict(**TIGHT, lag=2)),
    "eight drafts": (dict(num_draft_tokens=8), dict(num_slots=4)),
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
