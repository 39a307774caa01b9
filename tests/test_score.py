"""Scores of known texts are the log-probabilities that decoding returns."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsespec_jax import (
    Engine,
    EngineConfig,
    SamplingParams,
    SpeculationConfig,
    decode,
    score,
)
from sparsespec_jax.decode import SCORED_ROWS
from sparsespec_jax.host.intake import prepare
from sparsespec_jax.models.transformer import causal_attend, forward, logits
from sparsespec_jax.plan.outcome import StepOutcome
from sparsespec_jax.sampling import Law, logprobs

RNG = np.random.default_rng(0)
# Outputs of one token, of a whole number of verifications, and of many.
LENGTHS = [
    (1, 1),
    (5, SCORED_ROWS - 1),
    (40, SCORED_ROWS),
    (63, 2 * SCORED_ROWS + 3),
    (9, 3 * (SCORED_ROWS - 1)),
]
PROMPTS = [RNG.integers(0, 97, prompt).tolist() for prompt, _ in LENGTHS]
OUTPUTS = [RNG.integers(0, 97, output).tolist() for _, output in LENGTHS]


def independent(model, prompt, output):
    """Log-probabilities by one forward of the whole text."""
    tokens = jnp.asarray([*prompt, *output])
    caches = (None,) * model.config.num_layers
    hidden, _ = forward(
        model.config, model.params, tokens, jnp.arange(len(tokens)), causal_attend,
        caches, impl="reference",
    )  # fmt: skip
    scores = jax.nn.log_softmax(logits(model.config, model.params, hidden))
    rows = np.arange(len(prompt) - 1, len(tokens) - 1)
    return np.asarray(scores)[rows, output]


def test_scores_are_those_of_one_forward(tiny_model):
    found = score(tiny_model, PROMPTS, OUTPUTS, engine=EngineConfig(num_slots=2))
    for prompt, output, values in zip(PROMPTS, OUTPUTS, found, strict=True):
        assert len(values) == len(output)
        wanted = independent(tiny_model, prompt, output)
        np.testing.assert_allclose(values, wanted, atol=1e-5)


@pytest.mark.parametrize("kind", ["raw", "processed"])
def test_scores_are_those_of_decoding(tiny_model, kind):
    laws = [
        SamplingParams(
            temperature=heat, max_tokens=length, seed=seed, logprobs=kind, top_p=0.8
        )
        for seed, (heat, (_, length)) in enumerate(
            zip((0.0, 0.65, 1.0, 1.0, 0.3), LENGTHS, strict=True)
        )
    ]
    results = decode(tiny_model, PROMPTS, sampling=laws)
    outputs = [result.token_ids for result in results]
    found = score(tiny_model, PROMPTS, outputs, sampling=laws)
    for result, values in zip(results, found, strict=True):
        np.testing.assert_allclose(values, result.logprobs, atol=1e-5)


def test_a_token_that_the_law_excludes(tiny_model):
    prompt, output = PROMPTS[1], OUTPUTS[1]
    wanted = independent(tiny_model, prompt, output)
    law = SamplingParams(temperature=1.0, top_k=1, logprobs="processed")
    (found,) = score(tiny_model, [prompt], [output], sampling=law)
    assert set(found) <= {0.0, -np.inf} and -np.inf in found
    (raw,) = score(
        tiny_model,
        [prompt],
        [output],
        sampling=dataclasses.replace(law, logprobs="raw"),
    )
    np.testing.assert_allclose(raw, wanted, atol=1e-5)


def test_of_a_greedy_law_only_the_argmax_has_any(tiny_model):
    """Of the edited logits; beside a law with temperature, and one that is told raw."""
    prompt, output = PROMPTS[1], OUTPUTS[2]
    greedy = SamplingParams(temperature=0, logprobs="processed", repetition_penalty=1.3)
    chosen = decode(
        tiny_model, [prompt], sampling=dataclasses.replace(greedy, max_tokens=20)
    )[0].token_ids
    mixed = [*chosen[:7], (chosen[7] + 1) % 97, *chosen[8:]]
    laws = [greedy, greedy, dataclasses.replace(greedy, temperature=1.0), greedy]
    laws[3] = dataclasses.replace(greedy, logprobs="raw", repetition_penalty=1.0)
    right, wrong, warm, raw = score(
        tiny_model, [prompt] * 4, [chosen, mixed, output, output], sampling=laws
    )
    assert right == (0.0,) * 20
    assert wrong[:7] == right[:7] and wrong[7] == -np.inf
    assert set(wrong) == {0.0, -np.inf}
    assert np.isfinite(warm).all() and not np.allclose(warm, raw)
    wanted = independent(tiny_model, prompt, output)
    np.testing.assert_allclose(raw, wanted, atol=1e-5)


def test_of_equal_logits_a_greedy_law_has_the_first():
    rows = jnp.asarray([[0.0, 3.0, 3.0, 1.0]] * 4)
    ints, ones = jnp.zeros(4, jnp.int32), jnp.ones(4)
    seeds = jnp.zeros((4, 2), jnp.uint32)
    law = Law(seeds, 0 * ones, ints, ones, 0 * ones, jnp.ones(4, bool))
    told = logprobs(rows, law, jnp.arange(4), filters=False, chosen=False)
    assert told.tolist() == [-np.inf, 0.0, -np.inf, -np.inf]


@pytest.mark.parametrize("kv_policy", ["offload", "recompute"])
@pytest.mark.parametrize("drafts", [1, 3])
def test_scored_and_decoded_side_by_side(tiny_model, kv_policy, drafts):
    """In one engine, short of pages: each as it would be alone."""
    config = EngineConfig(
        num_slots=3, page_size=4, max_length=128, num_pages=38, kv_policy=kv_policy
    )
    speculation = SpeculationConfig(num_draft_tokens=drafts, min_budget=8)
    law = SamplingParams(max_tokens=40, temperature=0.7, ignore_eos=True)
    decoded = {0: PROMPTS[1], 3: PROMPTS[3]}
    scored = {1: 3, 2: 4, 4: 2}
    with Engine(tiny_model, speculation=speculation, engine=config) as engine:
        for index in range(5):
            if index in decoded:
                prepared, known = prepare(tiny_model, decoded[index], law), None
            else:
                prompt, known = PROMPTS[scored[index]], OUTPUTS[scored[index]]
                sampling = SamplingParams(max_tokens=len(known))
                prepared = prepare(tiny_model, prompt, sampling)
            engine.submit(prepared, prompt_index=index, scored=known)
        assert engine.max_new_tokens == 80
        results = []
        while engine.has_work:
            results += engine.step()
        assert engine.kv_usage["preemptions"] > 0
    for result in results:
        if (index := result.prompt_index) in decoded:
            alone = decode(tiny_model, [decoded[index]], sampling=law)[0]
            assert result.token_ids == alone.token_ids
            continue
        prompt, output = PROMPTS[scored[index]], OUTPUTS[scored[index]]
        assert list(result.token_ids) == output
        wanted = independent(tiny_model, prompt, output)
        np.testing.assert_allclose(result.logprobs, wanted, atol=1e-5)
    assert len(results) == 5


def test_a_text_as_long_as_the_model_allows(tiny_model):
    config = dataclasses.replace(tiny_model.config, max_length=60)
    model = dataclasses.replace(tiny_model, config=config)
    prompt, output = [5] * 20, [7] * 40
    (found,) = score(model, [prompt], [output])
    np.testing.assert_allclose(found, independent(model, prompt, output), atol=1e-5)
    with pytest.raises(ValueError, match="make 61, max_length is 60"):
        score(model, [prompt], [[*output, 1]])


@pytest.mark.parametrize(
    ("prompts", "outputs", "wanted"),
    [
        ([[1]], [], "0 outputs for 1 prompts"),
        ([], [], "prompts is empty"),
        ("ab", [[1], [2]], "prompts must be a list of prompts.*got str"),
        ([[1]], ["text"], "output 0 is text.*give token ids"),
        ([[1], [2]], [[1], []], "output 1: .*no tokens"),
        ([[1]], [[97]], "output 0: token id 97 is outside"),
        ([[98]], [[1]], "prompt 0: token id 98 is outside"),
    ],
)
def test_what_cannot_be_scored(tiny_model, prompts, outputs, wanted):
    with pytest.raises(ValueError, match=wanted):
        score(tiny_model, prompts, outputs)


@pytest.mark.parametrize(
    ("tokens", "drafts", "n", "wanted"),
    [
        ([1, 2], 3, 1, "2 tokens are to be scored, with max_tokens=3"),
        ([1, 2, 3], 3, 2, "n=2"),
        ([1, 2, 3], 0, 1, "num_draft_tokens must be 1 or more"),
    ],
)
def test_what_an_engine_cannot_score(tiny_model, tokens, drafts, n, wanted):
    speculation = SpeculationConfig(num_draft_tokens=drafts)
    config = EngineConfig(num_slots=2, max_length=64)
    prepared = prepare(tiny_model, [1], SamplingParams(max_tokens=3, n=n))
    with Engine(tiny_model, speculation=speculation, engine=config) as engine:
        with pytest.raises(ValueError, match=wanted):
            engine.submit(prepared, scored=tokens)
        assert not engine.has_work


def test_known_log_probabilities_by_hand():
    """Of Q = 4 rows: the chosen token's comes first, those of known ones last."""
    floats = np.arange(8, dtype=np.float32).reshape(2, 4)
    outcome = StepOutcome(*[None] * 4, logprobs=floats, cascade=None)
    assert outcome.known_logprobs(0, 4).tolist() == [1, 2, 3]
    assert outcome.known_logprobs(1, 2).tolist() == [7]
    assert outcome.known_logprobs(1, 1).tolist() == []
