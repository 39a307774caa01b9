"""The EAGLE-3 head: drafting against a naive run, training, storage, losslessness."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import train_eagle
from sparsespec_jax import Engine, SamplingParams
from sparsespec_jax.models import transformer as model_lib
from sparsespec_jax.proposers.base import resolve_proposer
from sparsespec_jax.proposers.eagle import (
    Eagle,
    EagleHead,
    attention,
    feature_layers,
    init_head,
    load_eagle,
    save_eagle,
)
from tests.engine_helpers import ENGINE, SPECULATION, make_prompts, run, tokens_of


@pytest.fixture(scope="module")
def head(tiny_config):
    return init_head(tiny_config, seed=3)


ROWS = 64  # of every naive run, padding behind the text included


@functools.partial(jax.jit, static_argnames=("config", "count"))
def naive_chain(config, target, params, tokens, start, length, forced, *, count):
    """Tokens of a chain that starts behind row length - 1, all rows run anew each time.

    Rows are positions start..length - 1 with the target's dense features; `forced`
    [count] are the tokens fed as drafts, the chain's own where they are negative.
    """
    _, _, features = model_lib.forward_with_features(
        config, target, tokens, jnp.arange(ROWS), model_lib.causal_attend,
        (None,) * config.num_layers, feature_layers(config),
    )  # fmt: skip
    head = EagleHead(config)

    def apply(*arguments, method):
        return head.apply({"params": params}, *arguments, method=method)

    row = jnp.arange(ROWS)
    visible = jnp.tril(jnp.ones((ROWS, ROWS), bool)) & (row >= start)[None]
    visible |= jnp.eye(ROWS, dtype=bool)

    def attend(q, k, v):
        return attention(q[None], k[None], v[None], visible[None])[0]

    feature, ids, found = apply(features, method="fuse"), jnp.roll(tokens, -1), []
    for i in range(count):
        last = length - 1 + i
        out = apply(feature, target["embed"]["weight"][ids], row, attend, method="step")
        normed = apply(out[last][None], method="normed")
        best = jnp.argmax(model_lib.logits(config, target, normed)[0])
        found.append(best)
        feature = feature.at[last + 1].set(out[last])
        ids = ids.at[last + 1].set(jnp.where(forced[i] < 0, best, forced[i]))
    return jnp.stack(found)


def chain_of(model, params, tokens, start, length, *, count, forced=None):
    padded = jnp.asarray(list(tokens) + [0] * (ROWS - len(tokens)))
    forced = jnp.full(count, -1) if forced is None else jnp.asarray(forced)
    found = naive_chain(
        model.config, model.params, params, padded, start, length, forced, count=count
    )
    return found.tolist()


@pytest.mark.parametrize("window", [4, 64])
def test_chain_drafts_equal_a_naive_run(tiny_model, head, window):
    """At every verification, from rings that also saw rejected rows and wrapped."""
    eagle = Eagle(tiny_model.config, head, window=window)
    engine = Engine(
        tiny_model,
        speculation=dataclasses.replace(SPECULATION, proposer=eagle),
        engine=dataclasses.replace(ENGINE, num_slots=1, lag=0, max_length=64),
    )
    (prompt,) = make_prompts(97, (11,))
    engine.add_request(prompt, SamplingParams(temperature=1.0, max_tokens=40))
    first, compared = len(prompt) - 4, 0
    while engine.has_work:
        engine.step()
        state = jax.device_get(engine.device_steps.state)
        length = int(state.lengths[0])
        if length < len(prompt) or state.done[0]:
            continue
        tokens = state.history[0, : length + 1].tolist()
        got = state.tokens[0, 1:].tolist()
        start = max(first, length - window)
        assert got == chain_of(tiny_model, head, tokens, start, length, count=3)
        compared += 1
    assert compared > 12


def test_a_head_changes_no_token(tiny_model, head):
    prompts = make_prompts(97)
    eagle = Eagle(tiny_model.config, head)
    plain = run(tiny_model, prompts, num_draft_tokens=0)
    got = run(tiny_model, prompts, proposer=eagle, engine=dict(lag=2))
    assert tokens_of(got) == tokens_of(plain)
    assert got.stats.total.num_verify_steps > 20


def text_of(model, count=3):
    """The model's own greedy text, which is easy to foretell."""
    law = SamplingParams(temperature=0, max_tokens=120)
    prompts = make_prompts(97, (5, 9, 14))[:count]
    results = run(model, prompts, [law] * count, num_draft_tokens=0)
    return [[*p, *t] for p, t in zip(prompts, tokens_of(results), strict=True)]


@pytest.fixture(scope="module")
def sharp_model(tiny_model):
    """Logits thirty times as large: a text with something to foretell."""
    params = dict(tiny_model.params)
    params["final_norm"] = {"scale": 30 * params["final_norm"]["scale"]}
    return dataclasses.replace(tiny_model, params=params)


@pytest.fixture(scope="module")
def trained(sharp_model):
    runs = train_eagle.run_texts(sharp_model, text_of(sharp_model))
    return train_eagle.train(
        sharp_model, runs, num_steps=400, batch_size=8, length=24, learning_rate=1e-2,
        report=lambda line: None,
    )  # fmt: skip


def test_training_lowers_the_loss_and_raises_acceptance(sharp_model, head, trained):
    eagle, losses = trained
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
    texts = text_of(sharp_model, 2)
    contexts = [text[:40] for text in texts]
    options = dict(num_draft_tokens=3, max_tokens=30, temperature=0)
    accepted = {
        name: train_eagle.accepted_drafts(
            sharp_model, contexts, proposer=proposer, **options
        )
        for name, proposer in {
            "trained": eagle,
            "random": Eagle(sharp_model.config, head),
        }.items()
    }
    assert accepted["trained"][1] == accepted["random"][1]
    assert accepted["trained"][0]["mean"] > accepted["random"][0]["mean"] + 0.3


def test_the_unrolled_loss_is_the_chains(tiny_model, head):
    """Agreement of unrolled step 1 by the naive chain from the same features."""
    (text,) = train_eagle.run_texts(tiny_model, [list(range(1, 41))])
    length = 20
    batch = (
        text.features[None, :length],
        text.tokens[None, 1 : length + 1],
        text.hidden[None, 1 : length + 1],
        np.arange(length, dtype=np.int32)[None],
    )
    _, agreement = train_eagle.unrolled_loss(
        tiny_model.config, tiny_model.params, head, batch, 2
    )
    scores = model_lib.logits(
        tiny_model.config, tiny_model.params, jnp.asarray(text.hidden)
    )
    wanted = np.asarray(jnp.argmax(scores, -1))
    # Position t of step 1 continues step 0 at t - 1, with the text's token as draft.
    same = []
    for t in range(1, length):
        forced = [int(text.tokens[t + 1]), 0]
        chain = chain_of(tiny_model, head, text.tokens, 0, t, count=2, forced=forced)
        same.append(chain[1] == wanted[t + 1])
    assert float(agreement[1]) == pytest.approx(np.mean(same), abs=1e-6)


def test_a_bfloat16_target_trains_as_a_float32_one(tiny_model, head):
    texts = [list(range(1, 41))]

    def loss_and_slope(model):
        runs = train_eagle.run_texts(model, texts)
        batch = next(train_eagle.batches(runs, batch_size=2, length=20, seed=0))

        def loss_of(params):
            return train_eagle.unrolled_loss(
                model.config, model.params, params, batch, 2
            )[0]

        return jax.value_and_grad(loss_of)(head)

    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny_model.params)
    loss, slope = loss_and_slope(tiny_model)
    near, near_slope = loss_and_slope(dataclasses.replace(tiny_model, params=narrow))
    assert float(near) == pytest.approx(float(loss), rel=0.05)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(near_slope))
    flat, near_flat = (
        jnp.concatenate([x.ravel() for x in jax.tree.leaves(t)])
        for t in (slope, near_slope)
    )
    cosine = flat @ near_flat / jnp.linalg.norm(flat) / jnp.linalg.norm(near_flat)
    assert cosine > 0.98


def test_a_head_is_saved_and_loaded(tmp_path, tiny_model, trained):
    eagle, _ = trained
    save_eagle(eagle, tmp_path / "head")
    again = load_eagle(tiny_model.config, tmp_path / "head")
    jax.tree.map(np.testing.assert_array_equal, again.params, eagle.params)
    assert again.window == eagle.window
    with pytest.raises(ValueError, match="exists; name another"):
        save_eagle(eagle, tmp_path / "head")
    with pytest.raises(ValueError, match="holds no EAGLE head"):
        load_eagle(tiny_model.config, tmp_path)
    other = dataclasses.replace(tiny_model.config, hidden_size=64)
    with pytest.raises(ValueError, match="hidden size 32, the target has 64"):
        load_eagle(other, tmp_path / "head")


def test_texts_are_split_without_overlap():
    contexts = [[i] * n for i in range(3) for n in (70, 90)]
    texts, held_out = train_eagle.split(contexts, 1)
    assert held_out == [[0] * 70, [0] * 90] and texts == [[1] * 90, [2] * 90]
    with pytest.raises(ValueError, match="leave none"):
        train_eagle.split(contexts, 3)


def test_wrong_heads_are_refused(tiny_config, head):
    with pytest.raises(ValueError, match="window must be an integer .*, got 0"):
        Eagle(tiny_config, head, window=0)

    class Forgetful:
        def init_memory(self, shape):
            return {}

    with pytest.raises(ValueError, match="init_memory and propose_from"):
        resolve_proposer(Forgetful())
