"""Train an EAGLE-3 head on a model's own text, and measure it in the engine.

    python -m experiments.train_eagle --output_dir RUN
    python -m experiments.train_eagle --contexts texts.json --held_out contexts.json \
        --train_dtype bfloat16 --decode_dtype bfloat16 --output_dir RUN

`experiments.contexts` writes such files; held-out contexts must be of other prompts.

arXiv 2512.01278, section 5, finds EAGLE-3 heads accept less than 2 drafts on long
reasoning. Expected here: a head trained for minutes on 30,000 tokens agrees with the
target's choice in a third of the first drafts and accepts less than PillarAttn. The
loss unrolls the head on its own outputs (the training-time test of arXiv 2503.01840).
Writes results.json (when trained, and after each measurement) and the head (Orbax).
Minutes on a GPU, an hour on two CPU cores.
"""

from __future__ import annotations

import functools
import pathlib
import sys
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags

from experiments import contexts as contexts_lib
from experiments import launch, measure, record, signals
from sparsespec_jax import Engine, EngineConfig, SpeculationConfig, load_model, sizes
from sparsespec_jax.models import transformer as model_lib
from sparsespec_jax.proposers.eagle import (
    Eagle,
    EagleHead,
    feature_layers,
    init_head,
    save_eagle,
)

_STEP_WEIGHT = 0.8  # of each unrolled step against the one before
_SEGMENT = 64  # tokens of a text in a batch
_MEASURED = 97  # new tokens per held-out context


class Text(NamedTuple):
    """What a dense run leaves of a text of X tokens."""

    tokens: np.ndarray  # int32 [X]
    features: np.ndarray  # [X, 3 * hidden]
    hidden: np.ndarray  # [X, hidden], what the output projection takes


@functools.partial(jax.jit, static_argnames="config")
def _dense_run(config, params, tokens):
    caches = (None,) * config.num_layers
    hidden, _, features = model_lib.forward_with_features(
        config, params, tokens, jnp.arange(tokens.size), model_lib.causal_attend,
        caches, feature_layers(config),
    )  # fmt: skip
    return hidden, features


def run_texts(model, texts):
    """A Text of each list of token ids; padding keeps it to few compilations."""
    found = []
    for text in texts:
        padded = np.zeros(-(-len(text) // 512) * 512, np.int32)
        padded[: len(text)] = text
        hidden, features = _dense_run(model.config, model.params, jnp.asarray(padded))
        arrays = (padded, np.asarray(features), np.asarray(hidden))
        found.append(Text(*(a[: len(text)] for a in arrays)))
    return found


def batches(texts, *, batch_size, length, seed):
    """Endless batches (features, next tokens, targets' hidden, positions)."""
    rng = np.random.default_rng(seed)
    while True:
        rows = []
        for _ in range(batch_size):
            text = texts[rng.integers(len(texts))]
            start = rng.integers(len(text.tokens) - length - 1)
            now, after = (
                slice(start, start + length),
                slice(start + 1, start + length + 1),
            )
            rows.append(
                (
                    text.features[now],
                    text.tokens[after],
                    text.hidden[after],
                    np.arange(start, start + length, dtype=np.int32),
                )
            )
        yield tuple(np.stack(part) for part in zip(*rows, strict=True))


def _attend_unrolled(step, keys, values, q, k, v, shape):
    """Attention of unrolled step `step`: a chain sees dense keys, then its own.

    Query t of step j sees the keys of step 0 up to t - j, and of each later step i its
    key at t - j + i. `keys`, `values` collect [B, T, H, D] per step.
    """
    q, k, v = (x.reshape(*shape, *x.shape[1:]) for x in (q, k, v))
    keys.append(k)
    values.append(v)
    batch, length, heads, size = q.shape
    grouped = q.reshape(batch, length, k.shape[2], -1, size)
    row = jnp.arange(length)
    dense = jnp.einsum("bqhgd,bkhd->bhgqk", grouped, keys[0])
    dense = jnp.where(row[None] <= row[:, None] - step, dense, -1e30)
    own = [(jnp.roll(keys[i], step - i, 1), jnp.roll(values[i], step - i, 1))
           for i in range(1, step + 1)]  # fmt: skip
    chain = [
        jnp.einsum("bqhgd,bqhd->bhgq", grouped, each)[..., None] for each, _ in own
    ]
    logits = jnp.concatenate([dense, *chain], -1) * size**-0.5
    weights = jax.nn.softmax(logits, -1)
    out = jnp.einsum("bhgqk,bkhd->bqhgd", weights[..., :length], values[0])
    for i, (_, each) in enumerate(own):
        out += jnp.einsum("bhgq,bqhd->bqhgd", weights[..., length + i], each)
    return out.reshape(batch * length, heads, size)


def unrolled_loss(config, target, params, batch, num_unrolled):
    """(loss, top-1 agreement by unrolled step) of one batch."""
    features, tokens, hidden, positions = batch
    features = features.astype(jnp.float32)  # the target's type may be narrower
    shape = tokens.shape
    head = EagleHead(config)

    def apply(*arguments, method):
        return head.apply({"params": params}, *arguments, method=method)

    embedded = target["embed"]["weight"][tokens.ravel()].astype(jnp.float32)
    wanted = model_lib.logits(config, target, hidden.reshape(-1, hidden.shape[-1]))
    law = jax.nn.log_softmax(wanted, -1)
    feature = apply(features.reshape(-1, features.shape[-1]), method="fuse")
    keys, values, loss, agreement = [], [], 0.0, []
    for step in range(num_unrolled):
        attend = functools.partial(_attend_unrolled, step, keys, values, shape=shape)
        feature = apply(feature, embedded, positions.ravel(), attend, method="step")
        scores = model_lib.logits(config, target, apply(feature, method="normed"))
        valid = (jnp.arange(shape[1]) >= step) & jnp.ones(shape, bool)
        share = valid.ravel() / valid.sum()
        divergence = jnp.exp(law) * (law - jax.nn.log_softmax(scores, -1))
        loss += _STEP_WEIGHT**step * (divergence.sum(-1) * share).sum()
        same = jnp.argmax(scores, -1) == jnp.argmax(wanted, -1)
        agreement.append((same * share).sum())
        # The next step's feature at t is this step's output at t - 1.
        feature = jnp.roll(feature.reshape(*shape, -1), 1, 1).reshape(feature.shape)
    return loss, jnp.stack(agreement)


def train(
    model, texts, *, num_steps, batch_size=4, length=_SEGMENT, num_unrolled=3,
    learning_rate=1e-3, window=32, seed=0, report=print,
):  # fmt: skip
    """(Eagle, losses): a head trained on `texts` (run_texts) of the model."""
    params = init_head(model.config, seed)
    warm = max(1, num_steps // 20)
    schedule = optax.warmup_cosine_decay_schedule(0, learning_rate, warm, num_steps)
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))
    state = optimiser.init(params)

    @jax.jit
    def update(params, state, target, batch):
        def loss_of(params):
            return unrolled_loss(model.config, target, params, batch, num_unrolled)

        (loss, agreement), slope = jax.value_and_grad(loss_of, has_aux=True)(params)
        change, state = optimiser.update(slope, state, params)
        return optax.apply_updates(params, change), state, loss, agreement

    source = batches(texts, batch_size=batch_size, length=length, seed=seed)
    losses = []
    for step in range(num_steps):
        params, state, loss, agreement = update(
            params, state, model.params, next(source)
        )
        losses.append(float(loss))
        if step % max(1, num_steps // 20) == 0 or step == num_steps - 1:
            rates = " ".join(f"{a:.2f}" for a in np.asarray(agreement))
            report(f"step {step}: loss {losses[-1]:.3f}, agreement {rates}")
    return Eagle(model.config, params, window=window), losses


def decoding_options(
    contexts, *, num_draft_tokens, max_tokens=_MEASURED, proposer="self", **options
):
    """(SpeculationConfig, EngineConfig) of a measurement on contexts."""
    speculation = SpeculationConfig(
        num_draft_tokens=num_draft_tokens, proposer=proposer, min_budget=0
    )
    options = dict(num_slots=min(8, len(contexts))) | options
    longest = max(map(len, contexts)) + max_tokens
    return speculation, EngineConfig(max_length=longest, **options)


def accepted_drafts(
    model, contexts, *, num_draft_tokens, max_tokens, proposer="self", temperature=0.65,
    engine=None,
):  # fmt: skip
    """(mean_and_error of accepted drafts, token ids) over contexts.

    The continuations are those of a study of seed 0; the ones that loop do not count.
    """
    speculation, config = decoding_options(
        contexts, num_draft_tokens=num_draft_tokens, max_tokens=max_tokens,
        proposer=proposer, **(engine or {}),
    )  # fmt: skip
    decoder = Engine(model, speculation=speculation, engine=config)
    results = contexts_lib.continue_contexts(
        decoder, contexts, temperature=temperature, max_tokens=max_tokens, seed=0
    )
    texts = [r.token_ids for r in results]
    accepted = [
        r.metrics.mean_accepted_draft_tokens
        for r, text in zip(results, texts, strict=True)
        if not contexts_lib.is_looping(text)
    ]
    return measure.mean_and_error(accepted), texts


def split(contexts, num_held_out):
    """(training texts, held-out contexts) without a text in common.

    Contexts are cut from texts: those that share a beginning stay together.
    """
    groups = {}
    for context in contexts:
        groups.setdefault(tuple(context[:64]), []).append(context)
    groups = list(groups.values())
    if len(groups) <= num_held_out:
        raise ValueError(
            f"{len(groups)} texts leave none after {num_held_out} held out"
        )
    longest = [max(group, key=len) for group in groups]
    return longest[num_held_out:], sum(groups[:num_held_out], [])


def check_texts(values, model, texts, held_out):
    """ValueError if a text is too short to train on, or cannot be measured on."""
    path = contexts_lib.path_for(values)
    source = f"{path}, to train on"
    contexts_lib.check_contexts(
        texts, model, source=source, max_tokens=0, at_least=_SEGMENT + 2
    )
    source = values.held_out or f"{path}, held out"
    contexts_lib.check_contexts(held_out, model, source=source, max_tokens=_MEASURED)
    speculation, config = decoding_options(
        held_out, num_draft_tokens=values.num_draft_tokens, **engine_flags(values)
    )
    sizes.resolve(model, speculation, config)


def engine_flags(values):
    """What the flags say of the engine that measures."""
    names = ("impl", "num_slots", "page_size")
    return {name: getattr(values, name) for name in names}


def _define_flags():
    flags.DEFINE_string("output_dir", None, "Where to write.", required=True)
    flags.DEFINE_string("model", "smollm2", "Target model.")
    flags.DEFINE_string(
        "contexts", None, f"Token ids, JSON; SmolLM2's: {contexts_lib.OF_SMOLLM2}."
    )
    flags.DEFINE_integer(
        "num_held_out", 2, "Texts to measure on and not train on.", lower_bound=1
    )
    flags.DEFINE_string("held_out", None, "Contexts to measure on, JSON.")
    flags.DEFINE_integer("steps", 400, "Optimiser steps.", lower_bound=1)
    flags.DEFINE_integer(
        "batch_size", 4, "Segments of 64 tokens per step.", lower_bound=1
    )
    flags.DEFINE_float("learning_rate", 1e-3, "Peak of the schedule.")
    flags.DEFINE_integer(
        "window", 32, "Tokens that the head looks back on.", lower_bound=1
    )
    flags.DEFINE_integer(
        "num_draft_tokens", 8, "Drafts per cycle when measured.", lower_bound=1
    )
    flags.DEFINE_list("measure", ["eagle", "ngram", "pillar"], "What to measure.")
    flags.register_validator(
        "measure",
        {"eagle", "ngram", "pillar"}.issuperset,
        "measure takes eagle, ngram and pillar",
    )
    flags.DEFINE_string("impl", None, "Kernels of the measurement.")
    flags.DEFINE_enum(
        "train_dtype", "float32", ["float32", "bfloat16"],
        "Type of the target in training; the head trains in float32.",
    )  # fmt: skip
    flags.DEFINE_enum(
        "decode_dtype", "float32", ["float32", "bfloat16"], "Type of the measurement."
    )
    flags.DEFINE_integer(
        "num_slots", 8, "Requests decoded at the same time.", lower_bound=1
    )
    flags.DEFINE_integer("page_size", 16, "Tokens per KV page.", lower_bound=1)
    flags.DEFINE_string("commit", None, "Commit to record if git cannot say.")


def main():
    """Train, save, measure."""
    values = flags.FLAGS
    output = pathlib.Path(values.output_dir)
    with launch.checking():
        if (output / "head").exists():
            raise ValueError(
                f"{output} already holds a head: name another --output_dir"
            )
        texts = contexts_lib.load_contexts(contexts_lib.path_for(values))
        if values.held_out:
            held_out = contexts_lib.load_contexts(values.held_out)
        else:
            texts, held_out = split(texts, values.num_held_out)
        model = load_model(values.model, dtype=values.train_dtype)
        check_texts(values, model, texts, held_out)
    started = time.perf_counter()
    runs = run_texts(model, texts)
    trained_from = time.perf_counter()
    eagle, losses = train(
        model,
        runs,
        num_steps=values.steps,
        batch_size=values.batch_size,
        learning_rate=values.learning_rate,
        window=values.window,
    )
    ended = time.perf_counter()
    own_flags = values.get_key_flags_for_module(sys.modules[__name__])
    results = {
        **record.results_header(own_flags, commit=values.commit),
        "num_texts": len(texts),
        "num_text_tokens": sum(map(len, texts)),
        "num_held_out": len(held_out),
        "dense_run_s": trained_from - started,
        "training_s": ended - trained_from,  # with its compilation
        "losses": losses,
        "accepted_drafts": {},
    }
    output.mkdir(parents=True, exist_ok=True)
    with signals.deferred():  # a head is there whole, or not at all
        record.write_results(output / "results.json", results)
        save_eagle(eagle, output / "head")
        signals.kept(output / "head")
    if values.decode_dtype != values.train_dtype:
        model = load_model(values.model, dtype=values.decode_dtype)
    proposers = {"eagle": eagle, "ngram": "ngram", "pillar": "self"}
    for name in values.measure:
        found, _ = accepted_drafts(
            model, held_out, num_draft_tokens=values.num_draft_tokens,
            max_tokens=_MEASURED, proposer=proposers[name],
            engine=engine_flags(values),
        )  # fmt: skip
        results["accepted_drafts"][name] = found
        record.write_results(output / "results.json", results)
        mean = "all texts loop" if found is None else f"{found['mean']:.2f}"
        print(f"{name}: {mean} of {values.num_draft_tokens}", flush=True)


if __name__ == "__main__":
    _define_flags()
    launch.run(main)
