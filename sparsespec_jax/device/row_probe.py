"""A look before exact numerics: do rows depend on how many there are in a step?

Products are cut so that a compiler leaves the parts whole (`models/products.py`), which
is no promise of the compiler. So the steps that an engine may run are tried, each with
its numbers of rows, over one layer and the vocabulary: the bits of the first rows must
be those of a step that every engine tries.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from sparsespec_jax import sampling
from sparsespec_jax.device.lanes import token_rows
from sparsespec_jax.models.config import ModelConfig
from sparsespec_jax.models.transformer import Params, forward, logits
from sparsespec_jax.plan.shape import StepShape

_COMPARED = 8  # rows
_EVERYWHERE = (72, 72)  # tokens and scored tokens of the step that every engine tries
# What is compared, in the order in which it is computed.
PARTS = (
    "queries (input norm, projection to heads, rotation)",
    "keys and values (input norm, projection to heads, rotation)",
    "hidden states (output, gate, up and down projections, norms)",
    "logits (vocabulary product)",
    "log-probabilities (sum over the vocabulary)",
)


def numbers_of_rows(shapes: Sequence[StepShape]) -> tuple[tuple[int, int], ...]:
    """(tokens, tokens whose logits are needed) of every step of these shapes."""
    numbers = {_EVERYWHERE}
    for shape in shapes:
        scored = token_rows(shape).verify.stop
        chunks = shape.prefill_lanes * shape.prefill_chunk
        numbers |= {(scored, scored), (scored + chunks, scored)}
    return tuple(sorted(numbers))


def check_rows(
    config: ModelConfig,
    params: Params,
    shapes: Sequence[StepShape],
    *,
    impl: str,
    compiler_options: dict,
) -> None:
    """RuntimeError, naming the first part that differs, unless rows stand alone."""
    names = {"embed", "layer_0", "final_norm", "lm_head"} & set(params)
    one_layer = dataclasses.replace(config, num_layers=1)
    found = {
        number: _rows(
            {name: params[name] for name in names},
            *_inputs(config, number[0]),
            config=one_layer,
            scored=number[1],
            impl=impl,
            options=tuple(compiler_options.items()),
        )
        for number in numbers_of_rows(shapes)
    }
    for number, parts in found.items():
        for name, part, wanted in zip(PARTS, parts, found[_EVERYWHERE], strict=True):
            count = min(len(part), len(wanted))
            if part[:count].tobytes() != wanted[:count].tobytes():
                raise RuntimeError(
                    f"numerics='exact' cannot be kept: {name} of a token have other "
                    f"bits in a step of {number[0]} tokens than in one of "
                    f"{_EVERYWHERE[0]}: use numerics='fast', and report device and "
                    "versions"
                )


def _inputs(config, num_tokens):
    """Tokens and positions int32 [num_tokens]; the first ones are always the same."""
    drawn = np.random.default_rng(0).random((num_tokens, 2))  # a row a token
    limits = config.vocab_size, config.max_length
    return tuple((drawn * limits).astype(np.int32).T)


def _rows(params, tokens, positions, *, config, scored, impl, options):
    """The first rows of every part, as numpy arrays."""
    run = _compiled(config, scored, impl, options)
    return [np.asarray(part) for part in run(params, tokens, positions)]


@functools.cache
def _compiled(config, scored, impl, options):
    def run(params, tokens, positions):
        seen = []

        def attend(layer_index, q, rows, cache):
            seen.extend([q, rows])
            return q, cache

        hidden, _ = forward(
            config, params, tokens, positions, attend, (None,), impl=impl, exact=True
        )
        scores = logits(config, params, hidden[:scored], exact=True)
        law = _plain_law(scored)
        chosen = sampling.logprobs(
            scores, law, tokens[:scored], filters=False, exact=True
        )
        count = min(_COMPARED, scored)
        return [part[:count] for part in (*seen, hidden, scores, chosen)]

    return jax.jit(run, compiler_options=dict(options) or None)


def _plain_law(count):
    ones, zeros = jnp.ones(count), jnp.zeros(count)
    return sampling.Law(
        seed=jnp.zeros((count, 2), jnp.uint32),
        temperature=ones,
        top_k=zeros.astype(jnp.int32),
        top_p=ones,
        min_p=zeros,
        processed_logprobs=zeros.astype(bool),
    )
