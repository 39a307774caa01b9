"""The cascade: drafts of sparse self-speculation in fewer steps, and no other token."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from experiments.models import TINY
from sparsespec_jax import (
    Engine,
    Model,
    SamplingParams,
    SpeculationConfig,
    device_steps,
)
from sparsespec_jax.device import acceptance, cascade
from sparsespec_jax.device.step import make_step
from sparsespec_jax.models import transformer as model_lib
from sparsespec_jax.models.transformer import init_params
from sparsespec_jax.plan.outcome import StepOutcome
from sparsespec_jax.proposers.base import Cascade, NGram, resolve_proposer
from sparsespec_jax.sampling import probabilities
from sparsespec_jax.tuning import calibrate
from tests import engine_helpers
from tests.engine_helpers import (
    ENGINE,
    LAWS,
    SPECULATION,
    long_load,
    make_prompts,
    run,
    tokens_of,
)
from tests.test_draft_token_choices import decode_switching
from tests.test_proposers import Constant, copier
from tests.test_sampling import law

MAX_LENGTH = 256  # as `run` rounds: engines of equal sizes compile once


@pytest.fixture(scope="module")
def prompts(tiny_model):
    """Random ones, and one that repeats itself."""
    vocab = tiny_model.config.vocab_size
    return [*make_prompts(vocab)[:-1], [5, 9, 2, 7] * 7]


@pytest.fixture(scope="module")
def plain(tiny_model, prompts):
    return tokens_of(run(tiny_model, prompts, num_draft_tokens=0))


# Nothing that is guessed can be a token.
IMPOSSIBLE = dict(
    proposer=Cascade(Constant(1 << 20)), num_draft_tokens=5, draft_steps=3,
    num_guesses=3,
)  # fmt: skip

CASES = {
    "defaults": (dict(), dict()),
    "lag 0, recomputed": (dict(), dict(lag=0, num_pages=32, kv_policy="recompute")),
    "lag 2": (dict(draft_steps=3, num_guesses=1), dict(lag=2)),
    "one step": (dict(draft_steps=1, num_guesses=1), dict(num_slots=1)),
    "more rows than drafts": (dict(draft_steps=3, num_guesses=2), dict(lag=2)),
    "eight drafts": (dict(num_draft_tokens=8, num_guesses=7), dict(page_size=8)),
    "pages of one, tight pool": (
        dict(num_draft_tokens=5),
        dict(page_size=1, num_pages=160, lag=2),
    ),
    "no budget": (dict(min_budget=0, budget_ratio=1e-6), dict(page_size=64)),
    "counts by head": (dict(policy="top_p", budget_ratio=0.5), dict()),
    "a policy that remembers": (dict(policy="snapkv"), dict()),
    "nine slots": (dict(), dict(num_slots=9, prefill_lanes=2, prefill_chunk=64)),
    "constant guesses": (dict(proposer=Cascade(Constant(3))), dict()),
    "impossible guesses": (IMPOSSIBLE, dict()),
}


# The others are options of other features too, or lie between these.
QUICK = {
    "defaults", "lag 2", "pages of one, tight pool", "counts by head",
    "impossible guesses",
}  # fmt: skip


@pytest.mark.parametrize(
    "speculation, engine",
    [
        pytest.param(*case, id=name, marks=() if name in QUICK else pytest.mark.slow)
        for name, case in CASES.items()
    ],
)
def test_no_option_of_a_cascade_changes_a_token(
    tiny_model, prompts, plain, speculation, engine
):
    options = dict(proposer="cascade") | speculation
    got = run(tiny_model, prompts, engine=engine, **options)
    assert tokens_of(got) == plain
    total = got.stats.total
    assert total.num_verify_steps > 20
    assert 0 <= total.num_accepted_guesses <= total.num_guesses
    if "num_pages" in engine:  # a pool that is meant to be short of them
        assert got.stats.kv_usage["preemptions"] > 0


def test_batch_order_and_neighbours_change_nothing(tiny_model, prompts, plain):
    order = [4, 0, 6, 2, 5, 1, 3]
    got = run(
        tiny_model, [prompts[i] for i in order], [LAWS[i] for i in order],
        proposer="cascade",
    )  # fmt: skip
    assert tokens_of(got) == [plain[i] for i in order]
    alone = run(tiny_model, [prompts[6]], [LAWS[6]], proposer="cascade")
    assert alone[0].token_ids == plain[6]


def test_samples_of_one_prompt_and_filters(tiny_model, prompts):
    laws = [
        dataclasses.replace(each, n=3, temperature=1.2, top_k=20, top_p=0.9)
        for each in LAWS[-2:]
    ]
    base = run(tiny_model, prompts[-2:], laws, num_draft_tokens=0)
    got = run(tiny_model, prompts[-2:], laws, proposer="cascade")
    assert tokens_of(got) == tokens_of(base)


@pytest.mark.parametrize("lag", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_another_k_between_any_two_steps(tiny_model, prompts, plain, lag):
    speculation = dataclasses.replace(
        SPECULATION, draft_token_choices=(0, 1, 3), proposer="cascade"
    )
    config = dataclasses.replace(ENGINE, lag=lag, max_length=MAX_LENGTH)
    engine = Engine(tiny_model, speculation=speculation, engine=config)
    engine.warm_up()
    compiled = engine_helpers.num_compilations(engine)
    rng = np.random.default_rng(lag)
    switches = (
        int(rng.choice([0, 1, 3])) if rng.random() < 0.2 else None
        for _ in range(1000)
    )  # fmt: skip
    got = decode_switching(engine, prompts, LAWS, switches)
    assert tokens_of(got) == plain
    assert engine_helpers.num_compilations(engine) == compiled
    assert engine._scheduler.kv.num_free == engine.shape.num_pages


# -- the drafts themselves ----------------------------------------------------


LOCKSTEP = dict(
    proposer="cascade", num_draft_tokens=4, draft_steps=4, num_guesses=2
)  # fmt: skip


def in_lockstep(model, prompts, **options):
    """States before every step of sparse self-speculation and of a cascade.

    With as many draft steps as drafts both follow the same plans.
    """
    speculations = [
        dataclasses.replace(SPECULATION, num_draft_tokens=4, **options),
        dataclasses.replace(SPECULATION, **LOCKSTEP, **options),
    ]
    config = dataclasses.replace(ENGINE, max_length=MAX_LENGTH, lag=0)
    engines = [
        Engine(model, speculation=speculation, engine=config)
        for speculation in speculations
    ]
    for engine in engines:
        for prompt, each in zip(prompts, LAWS, strict=True):
            engine.add_request(prompt, each)
    while engines[0].has_work:
        states = [engine.device_steps.state._replace(layers=()) for engine in engines]
        yield jax.device_get(states)
        for engine in engines:
            engine.step()
    assert not engines[1].has_work
    totals = [e.stats(1.0).total for e in engines]
    assert totals[0].accepted_histogram == totals[1].accepted_histogram
    assert totals[0].num_draft_tokens == totals[1].num_draft_tokens


def compare_drafts(steps):
    """Drafts of both engines are the same; the cascade's are there no later."""
    ahead = 0
    for sparse, both in steps:
        busy = ~sparse.done
        assert (busy == ~both.done).all()
        assert (both.num_drafted >= sparse.num_drafted)[busy].all()
        assert both.num_drafted.max() <= 4
        made = np.arange(5)[None] <= np.where(busy, sparse.num_drafted, -1)[:, None]
        assert (sparse.tokens == both.tokens)[made].all()
        if sparse.draft_law.token_ids.size:
            laws = zip(sparse.draft_law, both.draft_law, strict=True)
            for one, other in laws:
                np.testing.assert_allclose(one[made[:, 1:]], other[made[:, 1:]], 1e-4)
        ahead += (both.num_drafted - sparse.num_drafted)[busy].sum()
    return ahead


@pytest.mark.parametrize(
    "options",
    [dict(), dict(policy="quest"), dict(acceptor="ratio_test", draft_top_m=8)],
    ids=["shared noise", "quest", "ratio test"],
)
def test_drafts_are_those_of_sparse_self_speculation(tiny_model, prompts, options):
    assert compare_drafts(in_lockstep(tiny_model, prompts, **options)) > 10


FAULTS = {
    "a missed guess is kept": lambda guesses, drafts, lanes: jnp.where(
        lanes.is_active, lanes.num_rows, 0
    ),
    "one draft too many": lambda guesses, drafts, lanes: jnp.where(
        lanes.is_active,
        jnp.minimum(
            acceptance.count_prefix(
                guesses == drafts[:, :-1], lanes.num_rows - 1
            ) + 2,
            lanes.num_rows,
        ),
        0,
    ),
}  # fmt: skip


@pytest.fixture
def fresh_steps(monkeypatch):
    """Steps of a cascade are traced anew, with what a test has put in place."""

    def make(config, shape, **options):
        make = make_step.__wrapped__ if shape.num_guesses else make_step
        return make(config, shape, **options)

    monkeypatch.setattr(device_steps, "make_step", functools.cache(make))


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_drafts_of_wrong_rows_are_noticed(
    tiny_model, prompts, fault, monkeypatch, fresh_steps
):
    """Power: the drafts differ, though verification still hides it in the text."""
    monkeypatch.setattr(cascade, "num_kept", fault)
    with pytest.raises(AssertionError):
        compare_drafts(in_lockstep(tiny_model, prompts))


def test_stale_rows_of_missed_guesses_are_never_read(
    tiny_model, prompts, monkeypatch, fresh_steps
):
    """Power: a draft cache that counts the rows of missed guesses as its own."""
    record = cascade.record

    def broken(state, lanes, drafts, count):
        missed = lanes.is_active & (count < lanes.num_rows)
        tails = state.draft_tails + missed
        return record(state, lanes, drafts, count)._replace(draft_tails=tails)

    monkeypatch.setattr(cascade, "record", broken)
    with pytest.raises(AssertionError):
        compare_drafts(in_lockstep(tiny_model, prompts))


# -- how many steps -------------------------------------------------------------


def model_of(name, config, params):
    return Model(name=name, config=config, params=params, tokenizer=None)


def test_a_text_that_repeats_itself_takes_half_the_steps(tiny_model):
    """All guesses right: 2 draft steps make 8 drafts, a cycle of 3 steps 9 tokens."""
    config = tiny_model.config
    model = model_of("copier", config, copier(config, tiny_model.params))
    greedy = [dataclasses.replace(LAWS[0], temperature=0, max_tokens=46)] * 3
    options = dict(num_draft_tokens=8, engine=dict(num_slots=3))
    got = run(
        model, [[5], [9], [11]], greedy,
        proposer="cascade", draft_steps=2, num_guesses=3, **options,
    )  # fmt: skip
    total = got.stats.total
    assert total.accepted_histogram == [0] * 8 + [15]  # 45 tokens after the first
    assert total.num_draft_steps == 30 and total.steps_per_cycle == 3
    assert total.num_guesses == total.num_accepted_guesses == 90
    assert total.guess_hit_rate == 1
    assert got.stats.num_steps <= 15 + 6
    sparse = run(model, [[5], [9], [11]], greedy, **options)
    assert tokens_of(sparse) == tokens_of(got)
    assert sparse.stats.num_steps >= 45
    reads, others = total.kv_tokens_read, sparse.stats.total.kv_tokens_read
    assert reads.draft < others.draft / 3 and reads.verify == others.verify


def test_counts_of_wrong_guesses_by_hand(tiny_model, prompts):
    """No guess is right: a draft a step, and every step checks what has room."""
    got = run(tiny_model, prompts[-1:], LAWS[-1:], **IMPOSSIBLE)
    total = got.stats.total
    cycles = total.num_verify_steps
    assert total.num_draft_steps == total.num_draft_tokens == 3 * cycles
    assert total.num_guesses == (3 + 3 + 2) * cycles  # 4, 4 and 3 rows of 5 drafts
    assert total.num_accepted_guesses == 0 and total.guess_hit_rate == 0
    assert total.accepted_histogram[4:] == [0, 0]


def test_draft_reads_are_those_of_sparse_self_speculation_without_hits(
    tiny_model, prompts
):
    """Same drafts, one a step: only the keys of the guesses' own rows come on top."""
    options = dict(num_draft_tokens=4, engine=dict(lag=0))
    sparse = run(tiny_model, prompts[-1:], LAWS[-1:], **options)
    got = run(
        tiny_model, prompts[-1:], LAWS[-1:],
        proposer=Cascade(Constant(1 << 20)), draft_steps=4, num_guesses=2, **options,
    )  # fmt: skip
    total, other = got.stats.total, sparse.stats.total
    assert total.accepted_histogram == other.accepted_histogram
    reads = total.kv_tokens_read.draft - total.num_guesses
    assert reads == other.kv_tokens_read.draft
    assert got[0].metrics.kv_tokens_read.gather == other.kv_tokens_read.gather


# -- the law of the ratio test --------------------------------------------------

VOCAB = 4
NUM_SAMPLES = 4000
PROMPT = [1, 2, 1, 3, 1, 2, 0, 1, 2, 1, 3, 1, 2]
HOT = 1.5


@pytest.fixture(scope="module")
def small_model():
    """Four tokens, and weights so large that attention decides what comes next."""
    config = dataclasses.replace(TINY, vocab_size=VOCAB)
    params = init_params(config, seed=2)
    params["embed"]["weight"] = params["embed"]["weight"] * 12
    return model_of("small", config, params)


def exact_law(model):
    """Probabilities float64 [V, V, V] of the three tokens after PROMPT."""
    texts = jnp.asarray(
        [[*PROMPT, a, b] for a in range(VOCAB) for b in range(VOCAB)], jnp.int32
    )

    @jax.vmap
    def scores(text):
        caches = (None,) * model.config.num_layers
        hidden, _ = model_lib.forward(
            model.config, model.params, text, jnp.arange(text.size),
            model_lib.causal_attend, caches,
        )  # fmt: skip
        return model_lib.logits(model.config, model.params, hidden[-3:])

    flat = scores(texts).reshape(-1, VOCAB)
    probs = probabilities(flat, law(flat.shape[0], temperature=HOT), filters=False)
    first, second, third = np.moveaxis(
        np.asarray(probs, np.float64).reshape(VOCAB, VOCAB, 3, VOCAB), 2, 0
    )
    return first[0, 0][:, None, None] * second[:, 0][:, :, None] * third


def p_value(model, **options):
    """Chi-square of the first three tokens of many samples against `exact_law`."""
    laws = [
        SamplingParams(temperature=HOT, seed=i, max_tokens=3)
        for i in range(NUM_SAMPLES)
    ]
    got = run(
        model, [PROMPT] * NUM_SAMPLES, laws,
        engine=dict(
            num_slots=64, max_length=24, prefill_lanes=16, prefill_chunk=len(PROMPT)
        ),
        min_budget=1, budget_ratio=0.01, draft_top_m=VOCAB, **options,
    )  # fmt: skip
    counts = np.zeros((VOCAB,) * 3)
    for tokens in tokens_of(got):
        counts[tokens] += 1
    expected = exact_law(model)
    expected *= NUM_SAMPLES / expected.sum()
    assert expected.min() > 5  # or the statistic has another law
    return stats.chisquare(counts, expected, axis=None).pvalue, got.stats.total


def test_the_ratio_test_keeps_the_law(small_model):
    found, total = p_value(
        small_model, proposer="cascade", acceptor="ratio_test", draft_steps=2
    )
    assert found > 1e-3
    assert total.num_accepted_guesses > 500
    histogram = total.accepted_histogram
    assert min(histogram[:3]) > 200  # drafts are rejected as well


def test_a_law_of_another_row_would_be_seen(small_model, monkeypatch, fresh_steps):
    """Power: the laws of a lane's rows recorded one row off."""
    draw = acceptance.draft_from_top_m

    def shifted(*arguments, **options):
        tokens, laws = draw(*arguments, **options)
        return tokens, jax.tree.map(lambda a: jnp.roll(a, 1, axis=0), laws)

    monkeypatch.setattr(acceptance, "draft_from_top_m", shifted)
    found, _ = p_value(
        small_model, proposer="cascade", acceptor="ratio_test", draft_steps=2
    )
    assert found < 1e-6


def test_greedy_ratio_test_is_plain_greedy(tiny_model, prompts):
    laws = [dataclasses.replace(each, temperature=0) for each in LAWS]
    base = run(tiny_model, prompts, laws, num_draft_tokens=0)
    got = run(
        tiny_model, prompts, laws,
        acceptor="ratio_test", draft_top_m=8, **LOCKSTEP,
    )  # fmt: skip
    assert tokens_of(got) == tokens_of(base)


def test_forced_acceptance_counts_the_drafts_there_are(tiny_model, prompts):
    got = run(
        tiny_model, prompts,
        proposer="cascade", acceptor="forced", forced_acceptance=3.0,
    )  # fmt: skip
    total = got.stats.total
    assert total.num_accepted_draft_tokens == total.num_draft_tokens > 100


# -- options --------------------------------------------------------------------


def test_sizes_of_a_cascade():
    assert SpeculationConfig().cascade_sizes == (None, 0)
    assert SpeculationConfig(proposer="cascade").cascade_sizes == (4, 3)
    assert SpeculationConfig(proposer="cascade").cycle == 5
    assert SpeculationConfig().cycle == 9
    assert SpeculationConfig(proposer="ngram").cycle == 1
    small = SpeculationConfig(proposer="cascade", num_draft_tokens=2)
    assert small.cascade_sizes == (1, 1)
    own = Cascade(NGram(max_match=3))
    assert SpeculationConfig(proposer=own, draft_steps=8).cascade_sizes == (8, 3)
    assert resolve_proposer("cascade") == Cascade(NGram())
    assert resolve_proposer(own) is own


def test_options_that_do_not_fit_are_refused(tiny_model):
    for message, options in {
        "draft_steps need proposer='cascade', got 'self'": dict(draft_steps=2),
        "num_guesses need proposer=.*'ngram'": dict(num_guesses=2, proposer="ngram"),
        r"draft_steps must be .* in \[1, 8\]": dict(proposer="cascade", draft_steps=9),
        r"num_guesses must be .* \[1, 7\]": dict(proposer="cascade", num_guesses=8),
        "num_draft_tokens >= 2, got 1": dict(proposer="cascade", num_draft_tokens=1),
    }.items():
        with pytest.raises(ValueError, match=message):
            SpeculationConfig(**options)
    with pytest.raises(ValueError, match="has no propose function"):
        resolve_proposer(Cascade(3))

    def engine(**options):
        return Engine(
            tiny_model,
            speculation=dataclasses.replace(
                SPECULATION, proposer="cascade", **options
            ),
            engine=ENGINE,
        )  # fmt: skip

    with pytest.raises(ValueError, match="'oracle' selects for one query"):
        engine(policy="oracle")
    with pytest.raises(ValueError, match="choose k by hand"):
        calibrate.measure(engine())


def test_outcomes_carry_the_counts_of_a_cascade():
    row = [2, 1, 0, 4, 3, 6, 17, 8, 9, 0, 0, 0, 0]
    found = StepOutcome.from_packed(np.array([row], np.int32), 3)
    assert found.cascade.tolist() == [[4, 3, 6, 17]]
    assert found.tokens.tolist() == [[8, 9, 0]]
    assert found.num_emitted.tolist() == [2] and found.logprobs.shape == (1, 3)
    row = [2, 1, 0, 8, 9, 0, 0, 0, 0]
    assert StepOutcome.from_packed(np.array([row], np.int32), 3).cascade is None


@pytest.mark.slow
def test_default_model_long_outputs(default_model):
    """Greedy and sampled, 100 tokens past a 1,000-token context, real weights."""
    load = long_load(default_model, 100)
    sparse = dict(num_draft_tokens=8, budget_ratio=0.05, min_budget=0)
    base = run(default_model, **load, num_draft_tokens=0)
    for steps in (4, 8):
        cascade = dict(proposer="cascade", draft_steps=steps)
        got = run(default_model, **load, **sparse, **cascade)
        assert tokens_of(got) == tokens_of(base)
    same = run(default_model, **load, **sparse)
    total, other = got.stats.total, same.stats.total
    assert total.accepted_histogram == other.accepted_histogram
    assert total.num_accepted_guesses > 100  # rows behind accepted guesses were used
    jax.clear_caches()
