"""Small engines for the lossless tests and an oracle that shares no code with them."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from sparsespec_jax import EngineConfig, SamplingParams, SpeculationConfig, decode
from sparsespec_jax import model as model_lib
from sparsespec_jax import sampling as sampling_lib
from sparsespec_jax.engine import _slot_params

SPECULATION = SpeculationConfig(num_draft_tokens=3, budget_ratio=0.2, min_budget=3)
ENGINE = EngineConfig(num_slots=3, page_size=4, prefill_chunk=8, lag=1)

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


def tokens_of(results):
    return [result.token_ids for result in results]


def oracle(model, prompt, law):
    """Plain decoding without engine, cache or pages: the whole text at every token."""
    params = _slot_params(law, 0, 0, (), SPECULATION)[None]
    row = sampling_lib.law_of(jnp.asarray(params))
    ids, logprobs = list(prompt), []
    padded = len(prompt) + law.max_tokens
    caches = (None,) * model.config.num_layers
    for _ in range(law.max_tokens):
        tokens = jnp.asarray(ids + [0] * (padded - len(ids)))
        hidden, _ = model_lib.forward(
            model.config,
            model.params,
            tokens,
            jnp.arange(padded),
            model_lib.causal_attend,
            caches,
        )
        last = len(ids) - 1
        scores = model_lib.logits(model.config, model.params, hidden[last : last + 1])
        token = sampling_lib.choose(
            scores, row, jnp.array([len(ids)]), filters=law.filters
        )
        logprobs.append(
            float(sampling_lib.logprobs(scores, row, token, filters=law.filters)[0])
        )
        ids.append(int(token[0]))
        if ids[-1] in (*law.stop_token_ids, *model.config.eos_ids):
            break
    return tuple(ids[len(prompt) :]), logprobs
