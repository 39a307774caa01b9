"""A look before exact numerics: do rows depend on how many there are in a step?

Products are cut so that a compiler leaves the parts whole (`models/products.py`), which
is no promise of the compiler. So the steps that an engine may run are tried, each with
its numbers of rows, over one layer and the vocabulary: the bits of the first rows, and
of the first ones of prompt chunks, must be those of a step that every engine tries.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from sparsespec_jax import sampling
from sparsespec_jax.device.lanes import token_rows
from sparsespec_jax.device.sharding import on_shards
from sparsespec_jax.models.collectives import MODEL_AXIS
from sparsespec_jax.models.config import ModelConfig
from sparsespec_jax.models.sharding import param_specs, place_params, shard_of
from sparsespec_jax.models.transformer import Params, forward, logits
from sparsespec_jax.plan.shape import StepShape

_COMPARED = 8  # rows
_EVERYWHERE = (72, 128)  # scored and prompt tokens of the step that every engine tries
# What is compared, in the order in which it is computed.
PARTS = (
    "queries (input norm, projection to heads, rotation)",
    "keys and values (input norm, projection to heads, rotation)",
    "hidden states (output, gate, up and down projections, norms)",
    "logits (vocabulary product)",
    "log-probabilities (sum over the vocabulary)",
)
PROMPT_PARTS = tuple(f"{name} of prompt chunks" for name in PARTS[:3])


def numbers_of_rows(shapes: Sequence[StepShape]) -> tuple[tuple[int, int], ...]:
    """(tokens whose logits are needed, tokens of chunks) of every step of shapes."""
    numbers = {_EVERYWHERE}
    for shape in shapes:
        for part, chunks in shape.parts():
            if part.part != "draft":  # drafts may be anything
                scored = token_rows(part).verify.stop
                numbers.add((scored, chunks * shape.prefill_chunk))
    return tuple(sorted(numbers))


def check_rows(
    config: ModelConfig,
    params: Params,
    shapes: Sequence[StepShape],
    *,
    impl: str,
    compiler_options: dict,
    mesh: Mesh | None = None,
) -> None:
    """RuntimeError, naming the first part that differs, unless rows stand alone.

    With a mesh the parts are those of all its devices, which share the model.
    """
    names = {"embed", "layer_0", "final_norm", "lm_head"} & set(params)
    tried = {name: params[name] for name in names}
    if mesh is not None:
        tried = place_params(config, tried, mesh)
    one_layer = dataclasses.replace(config, num_layers=1)
    found = {
        number: _rows(
            tried,
            *_inputs(config, *number),
            config=one_layer,
            mesh=mesh,
            num_prompt=number[1],
            impl=impl,
            options=tuple(compiler_options.items()),
        )
        for number in numbers_of_rows(shapes)
    }
    for number, parts in found.items():
        for name, part in parts.items():
            wanted = found[_EVERYWHERE][name][: len(part)]
            if part[: len(wanted)].tobytes() != wanted.tobytes():
                raise RuntimeError(
                    f"numerics='exact' cannot be kept: {name} of a token have other "
                    f"bits in a step of {number[0]} tokens and {number[1]} of prompts "
                    f"than in one of {_EVERYWHERE[0]} and {_EVERYWHERE[1]}: use "
                    "numerics='fast', and report device and versions"
                )


def _inputs(config, *counts):
    """Tokens and positions int32 [sum of counts]; the first of each are the same."""
    limits = config.vocab_size, config.max_length
    drawn = [  # a row a token
        np.random.default_rng(kind).random((count, 2)) * limits
        for kind, count in enumerate(counts)
    ]
    return tuple(np.concatenate(drawn).astype(np.int32).T)


def _rows(params, tokens, positions, *, config, num_prompt, impl, options, mesh=None):
    """The first rows of every part, numpy arrays by its name."""
    run = _compiled(config, num_prompt, impl, options, mesh)
    found = run(params, tokens, positions)
    # In the order in which they are computed, which a compiled function does not keep.
    names = (name for name in PARTS + PROMPT_PARTS if name in found)
    return {name: np.asarray(found[name]) for name in names}


@functools.cache
def _compiled(config, num_prompt, impl, options, mesh=None):
    axis = None
    if mesh is not None:
        axis, config = MODEL_AXIS, shard_of(config, mesh.size)

    def run(params, tokens, positions):
        scored = len(tokens) - num_prompt
        seen = []

        def attend(layer_index, q, rows, cache):
            seen.extend([q, rows])
            return q, cache

        hidden, _ = forward(
            config, params, tokens, positions, attend, (None,), impl=impl, exact=True,
            num_prompt=num_prompt, axis=axis,
        )  # fmt: skip
        scores = logits(config, params, hidden[:scored], exact=True)
        law = _plain_law(scored)
        chosen = sampling.logprobs(
            scores, law, tokens[:scored], filters=False, exact=True, axis=axis
        )
        parts = (*seen, hidden, scores, chosen)
        first = [part[: min(_COMPARED, scored)] for part in parts]
        found = dict(zip(PARTS, first, strict=True))
        if num_prompt:
            rows = slice(scored, scored + min(_COMPARED, num_prompt))
            first = [part[rows] for part in parts[: len(PROMPT_PARTS)]]
            found |= zip(PROMPT_PARTS, first, strict=True)
        return found

    def run_on_shards(params, tokens, positions):
        if mesh is None:
            return run(params, tokens, positions)
        whole = PartitionSpec()
        heads = vocabulary = PartitionSpec(None, axis)
        kinds = heads, heads, whole, vocabulary, whole
        made = dict(zip(PARTS, kinds, strict=True))
        if num_prompt:
            made |= zip(PROMPT_PARTS, kinds[: len(PROMPT_PARTS)], strict=True)
        specs = param_specs(params), whole, whole
        return on_shards(run, mesh, specs, made)(params, tokens, positions)

    return jax.jit(run_on_shards, compiler_options=dict(options) or None)


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
