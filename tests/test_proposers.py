"""Proposers: n-gram lookup by hand, losslessness, and one of the user's own."""

import dataclasses

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from sparsespec_jax import Model
from sparsespec_jax.device import acceptance
from sparsespec_jax.proposers.base import FromTexts, NGram, resolve_proposer
from tests.engine_helpers import LAWS, run, tokens_of
from tests.test_sampling import law


def propose(ngram, tokens, num_drafts, *, padding=5):
    history = jnp.asarray([tokens + [7] * padding], jnp.int32)
    lengths = jnp.array([len(tokens)], jnp.int32)
    return ngram.propose(history, lengths, num_drafts)[0].tolist()


def looked_up(tokens, num_drafts, *, low, high):
    """Prompt lookup as loops over a list."""
    for size in range(min(high, len(tokens) - 1), low - 1, -1):
        for end in range(size, len(tokens)):
            if tokens[end - size : end] == tokens[-size:]:
                period = tokens[end:]
                return [period[i % len(period)] for i in range(num_drafts)]
    return [tokens[-1]] * num_drafts


def test_lookup_by_hand():
    ngram = NGram(min_match=1, max_match=3)
    assert propose(ngram, [1, 2, 3, 4, 9, 2, 3], 3) == [4, 9, 2]
    assert propose(ngram, [1, 2, 3, 4], 2) == [4, 4]  # nothing occurs before
    assert propose(ngram, [5, 1, 5, 2, 5], 1) == [1]  # of equal ones the earliest
    assert propose(ngram, [1, 5, 8, 2, 5, 9, 2, 5], 1) == [9]  # the longest wins
    assert propose(ngram, [3, 4, 3, 4], 5) == [3, 4, 3, 4, 3]  # goes round
    assert propose(NGram(min_match=3, max_match=4), [2, 3, 9, 2, 3], 2) == [3, 3]
    assert propose(ngram, [6], 2) == [6, 6]


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    st.lists(st.integers(0, 3), min_size=1, max_size=20), st.integers(1, 3)
)
def test_lookup_equals_the_loops(tokens, low):
    got = propose(
        NGram(min_match=low, max_match=4), tokens, 4, padding=24 - len(tokens)
    )
    assert got == looked_up(tokens, 4, low=low, high=4)


CASES = {
    "ngram": (dict(), dict()),
    "lag 0, small chunks": (
        dict(num_draft_tokens=1),
        dict(lag=0, prefill_chunk=2, num_slots=5),
    ),
    "lag 2": (dict(num_draft_tokens=8), dict(lag=2, page_size=1)),
}


@pytest.mark.parametrize("speculation, engine", CASES.values(), ids=CASES)
def test_ngram_drafts_change_no_token(tiny_model, prompts, plain, speculation, engine):
    got = run(tiny_model, prompts, proposer="ngram", engine=engine, **speculation)
    assert tokens_of(got) == plain
    assert got.stats.total.num_verify_steps > 20


def copier(config, params):
    """A model that writes its last token again: MLP and attention add nothing."""
    zero = {"out", "down"}

    def change(path, leaf):
        names = {getattr(key, "key", None) for key in path}
        return jnp.zeros_like(leaf) if names & zero else leaf

    return jax.tree_util.tree_map_with_path(change, params)


def test_every_request_is_verified_in_every_step(tiny_model):
    """A text that repeats itself: all drafts accepted, k + 1 tokens per step."""
    model = Model(
        name="copier",
        config=tiny_model.config,
        params=copier(tiny_model.config, tiny_model.params),
        tokenizer=None,
    )
    greedy = dataclasses.replace(LAWS[0], temperature=0, max_tokens=41)
    got = run(model, [[5], [9], [11]], [greedy] * 3, proposer="ngram")
    total = got.stats.total
    assert total.accepted_histogram[:-1] == [0, 0, 0]
    assert total.num_verify_steps == 30  # 40 tokens after the first, 4 at a time
    assert got.stats.num_steps <= 10 + 4  # and the first tokens, and the lag
    assert total.kv_tokens_read.draft == total.kv_tokens_read.gather == 0


@dataclasses.dataclass(frozen=True)
class Constant:
    """Always the same draft."""

    token: int

    def propose(self, history, lengths, num_drafts):
        return jnp.full((history.shape[0], num_drafts), self.token, jnp.int32)


def test_a_proposer_of_ones_own(tiny_model, prompts, plain):
    got = run(tiny_model, prompts, proposer=Constant(3))
    assert tokens_of(got) == plain
    hits = sum(t.count(3) for t in plain)
    assert 0 < got.stats.total.num_accepted_draft_tokens <= hits


def test_histories_hold_the_texts(tiny_model, prompts, plain):
    """A proposer that knows the whole output is believed to the end."""
    width = max(len(p) + len(t) for p, t in zip(prompts, plain, strict=True)) + 9
    texts = [
        [*p, *t] + [-1] * (width - len(p) - len(t))
        for p, t in zip(prompts, plain, strict=True)
    ]

    class Knows:
        def propose(self, history, lengths, num_drafts):
            place = jnp.arange(width)[None, None]
            text = jnp.asarray(texts, jnp.int32)[None]
            seen = jnp.pad(history, ((0, 0), (0, width)))[:, None, :width] == text
            same = (seen | (place >= lengths[:, None, None])).all(-1)
            row = jnp.argmax(same, 1)[:, None]
            next_place = lengths[:, None] + jnp.arange(num_drafts)[None]
            return text[0][row, jnp.minimum(next_place, width - 1)]

    got = run(tiny_model, prompts, proposer=Knows())
    assert tokens_of(got) == plain
    histogram = got.stats.total.accepted_histogram
    # Only the last cycle of a request may run past the text that is known.
    assert sum(histogram[:-1]) <= len(prompts) and histogram[-1] > 30


def test_the_ratio_test_with_one_token_laws(tiny_model, prompts):
    laws = [dataclasses.replace(each, temperature=0) for each in LAWS]
    base = run(tiny_model, prompts, laws, num_draft_tokens=0)
    got = run(
        tiny_model, prompts, laws,
        proposer="ngram", acceptor="ratio_test", draft_top_m=4,
    )  # fmt: skip
    assert tokens_of(got) == tokens_of(base)


def test_a_certain_draft_leaves_the_law_as_it_is():
    """Chi-square of the first token when the draft's law is one token."""
    lanes, vocab = 20000, 5
    logits = jnp.asarray(np.random.default_rng(4).normal(size=(2, vocab)), jnp.float32)
    seeds = jnp.stack([jnp.arange(lanes), jnp.arange(lanes) * 7 + 1], 1)
    base = law(lanes, temperature=1.0)._replace(seed=seeds.astype(jnp.uint32))
    laws = jax.tree.map(lambda a: jnp.repeat(a, 2, axis=0), base)
    got = acceptance.ratio_test(
        jnp.broadcast_to(logits, (lanes, 2, vocab)),
        laws,
        jnp.broadcast_to(jnp.array([1, 2]), (lanes, 2)),
        jnp.full((lanes, 1), 2, jnp.int32),
        jnp.ones(lanes, jnp.int32),
        acceptance.DraftLaw(
            jnp.full((lanes, 1, 1), 2, jnp.int32), jnp.ones((lanes, 1, 1))
        ),
        filters=False,
    )
    expected = np.asarray(jax.nn.softmax(logits[0]), np.float64)
    counts = np.bincount(np.asarray(got.tokens)[:, 0], minlength=vocab)
    expected *= lanes / expected.sum()
    assert stats.chisquare(counts, expected).pvalue > 1e-3
    assert got.num_accepted.mean() == pytest.approx(expected[2] / lanes, abs=0.02)


def test_proposers_are_checked():
    assert resolve_proposer("self") is None
    assert resolve_proposer("ngram") == FromTexts(NGram(min_match=1, max_match=7))
    with pytest.raises(ValueError, match="proposer must be 'self'.*'n-gram'"):
        resolve_proposer("n-gram")
    with pytest.raises(ValueError, match="has no propose function: 3"):
        resolve_proposer(3)
    with pytest.raises(ValueError, match=r"min_match \(3\).*max_match \(2\)"):
        NGram(min_match=3, max_match=2)
