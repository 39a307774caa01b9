"""Small engines for the lossless tests and an oracle that shares no code with them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from sparsespec_jax import EngineConfig, SamplingParams, SpeculationConfig, decode
from sparsespec_jax import sampling as sampling_lib
from sparsespec_jax.models import transformer as model_lib
from sparsespec_jax.plan.slot_params import slot_params as make_slot_params

SPECULATION = SpeculationConfig(num_draft_tokens=3, budget_ratio=0.2, min_budget=3)
ENGINE = EngineConfig(num_slots=3, page_size=4, prefill_chunk=8, lag=1)

ORACLE_LENGTH = 80  # of every prompt and output together, at most
PROMPT_LENGTHS = (1, 2, 4, 5, 9, 17, 30)
LAWS = tuple(
    SamplingParams(temperature=t, seed=i, max_tokens=n)
    for i, (t, n) in enumerate(
        [(0, 40), (0.65, 40), (1, 33), (0.65, 1), (0.3, 2), (1, 25), (0.8, 40)]
    )
)


def make_prompts(vocab_size, lengths=PROMPT_LENGTHS):
    rng = np.random.default_rng(0)
    return [rng.integers(0, vocab_size, n).tolist() for n in lengths]


def run(model, prompts, sampling=LAWS, *, engine=None, **speculation):
    """decode() with small defaults; keyword options change SpeculationConfig."""
    return decode(
        model,
        prompts,
        sampling=sampling,
        speculation=dataclasses.replace(SPECULATION, **speculation),
        engine=dataclasses.replace(ENGINE, **(engine or {})),
    )


def first_layers(model, num_layers):
    """The model without its later layers: compiles as fast as it is short."""
    dropped = {f"layer_{i}" for i in range(num_layers, model.config.num_layers)}
    assert dropped < model.params.keys()
    params = {name: x for name, x in model.params.items() if name not in dropped}
    config = dataclasses.replace(model.config, num_layers=num_layers)
    return dataclasses.replace(model, config=config, params=params)


def long_load(model, num_tokens):
    """Options of `run`: greedy and sampled, past a 1,000-token context."""
    text = "The number of ways to tile a board, counted in several ways. " * 80
    laws = [
        SamplingParams(temperature=t, seed=i, max_tokens=num_tokens, ignore_eos=True)
        for i, t in enumerate([0, 0.65, 1.0])
    ]
    prompts = [model.tokenizer.encode(text)[:1000]] * 3
    engine = dict(page_size=16, prefill_chunk=128)
    return dict(prompts=prompts, sampling=laws, engine=engine)


def tokens_of(results):
    return [result.token_ids for result in results]


def oracle(model, prompt, law):
    """Plain decoding without engine, cache or pages: the whole text at every token."""
    params = jnp.asarray(make_slot_params(law, 0, 0, (), SPECULATION)[None])
    ids, logprobs = list(prompt), []
    for _ in range(law.max_tokens):
        tokens = jnp.asarray(ids + [0] * (ORACLE_LENGTH - len(ids)))
        token, logprob = next_token(
            model.config, model.params, tokens, len(ids), params, law.filters
        )
        ids.append(int(token))
        logprobs.append(float(logprob))
        if ids[-1] in (*law.stop_token_ids, *model.config.eos_ids):
            break
    return tuple(ids[len(prompt) :]), logprobs


@functools.partial(jax.jit, static_argnums=(0, 5))
def next_token(config, params, tokens, length, slot_params, filters):
    """Token and log-probability after the first `length` of `tokens`."""
    positions = jnp.arange(tokens.size)
    caches = (None,) * config.num_layers
    hidden, _ = model_lib.forward(
        config, params, tokens, positions, model_lib.causal_attend, caches
    )
    last = jax.lax.dynamic_slice_in_dim(hidden, length - 1, 1)
    scores = model_lib.logits(config, params, last)
    law = sampling_lib.law_of(slot_params)
    place = jnp.full(1, length)
    token = sampling_lib.choose(scores, law, place, filters=filters)
    logprob = sampling_lib.logprobs(scores, law, token, filters=filters)
    return token[0], logprob[0]


def num_compilations(engine):
    """Variants of the step compiled for options like an engine's, in this process."""
    shapes = [engine.shape.with_draft_tokens(k) for k in engine.draft_token_choices]
    return engine.device_steps.num_compilations(shapes)
