"""Train an EAGLE-3 head on a model's own text, and measure it in the engine.

    python -m experiments.train_eagle --output RUN
    python -m experiments.train_eagle --contexts texts.json --held_out contexts.json \
        --train_dtype bfloat16 --decode_dtype bfloat16 --output RUN

`experiments.contexts` writes such files; held-out contexts must be of other prompts.

arXiv 2512.01278, section 5, finds EAGLE-3 heads accept less than 2 drafts on long
reasoning. Expected here: a head trained for minutes on 30,000 tokens agrees with the
target's choice in a third of the first drafts and accepts less than PillarAttn. The
loss unrolls the head on its own outputs (the training-time test of arXiv 2503.01840).
Writes the head (Orbax) and training.json into the run directory.
Minutes on a GPU, an hour on two CPU cores.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import contexts as contexts_lib
from experiments import experiment, measure, models, record, signals
from experiments.experiment import Experiment
from experiments.options import Options, option
from sparsespec_jax import Engine, EngineConfig, SpeculationConfig, sizes
from sparsespec_jax.models import transformer as model_lib
from sparsespec_jax.proposers.eagle import (
    Eagle,
    EagleHead,
    feature_layers,
    init_head,
    load_eagle,
    save_eagle,
)

_PROPOSERS = {"eagle": None, "ngram": "ngram", "pillar": "self"}  # None: the head
_STEP_WEIGHT = 0.8  # of each unrolled step against the one before
_SEGMENT = 64  # tokens of a text in a batch


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
    features, tokens, hidden, positions = map(jnp.asarray, batch)
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
    contexts, *, num_draft_tokens, max_tokens, proposer="self", budget_ratio=0.05,
    **options,
):  # fmt: skip
    """(SpeculationConfig, EngineConfig) of a measurement on contexts."""
    speculation = SpeculationConfig(
        num_draft_tokens=num_draft_tokens,
        proposer=proposer,
        budget_ratio=budget_ratio,
        min_budget=0,
    )
    options = dict(num_slots=min(8, len(contexts))) | options
    longest = max(map(len, contexts)) + max_tokens
    return speculation, EngineConfig(max_length=longest, **options)


def accepted_drafts(
    model, contexts, *, num_draft_tokens, max_tokens, proposer="self", temperature=0.65,
    **engine,
):  # fmt: skip
    """(mean_and_error of accepted drafts, token ids) over contexts.

    The continuations are those of a study of seed 0; the ones that loop do not count.
    """
    speculation, config = decoding_options(
        contexts, num_draft_tokens=num_draft_tokens, max_tokens=max_tokens,
        proposer=proposer, **engine,
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class EagleConfig(Options):
    """What the head is trained on, how, and what is measured."""

    model: str = option("smollm2")
    contexts: str | None = option(
        None,
        f"Token ids, JSON; SmolLM2's: {contexts_lib.OF_SMOLLM2}.",
        is_recorded=False,
    )
    num_held_out: int = option(2, "Texts to measure on and not train on.", at_least=1)
    held_out: str | None = option(None, "To measure on, JSON.", is_recorded=False)
    max_tokens: int = option(96, "Tokens behind the first one.", at_least=1)
    steps: int = option(400, "Optimiser steps.", at_least=1)
    batch_size: int = option(4, "Segments of 64 tokens per step.", at_least=1)
    learning_rate: float = option(1e-3, "Peak of the schedule.")
    window: int = option(32, "Tokens that the head looks back on.", at_least=1)
    num_draft_tokens: int = option(8, "Drafts per cycle when measured.", at_least=1)
    budget_ratio: float = option(0.05, "Share of the context that a draft reads.")
    measure: tuple[str, ...] = option(
        tuple(_PROPOSERS), "What to measure.", choices=tuple(_PROPOSERS)
    )
    impl: str | None = option(None, "Kernels of the measurement.")
    train_dtype: str = option(
        "float32",
        "Type of the target in training; the head trains in float32.",
        choices=models.DTYPES,
    )
    decode_dtype: str = option(
        "float32", "Type of the measurement.", choices=models.DTYPES
    )
    num_slots: int = option(8, "Requests decoded at the same time.", at_least=1)
    page_size: int = option(16, "Tokens per KV page.", at_least=1)
    prefill_chunk: int = option(128, "Prompt tokens prefilled per step.", at_least=1)


class TrainEagle(Experiment):
    """Train and save a head, then measure it beside others."""

    claim = "an EAGLE-3 head has fewer than 2 of 8 drafts accepted on long texts"
    Config = EagleConfig
    SMOKE = models.smoke(
        "model", "num_draft_tokens", "budget_ratio", "num_slots", "page_size",
        "prefill_chunk",
        max_tokens=11, steps=2, batch_size=1, measure=("eagle", "pillar"),
        num_held_out=1,
    )  # fmt: skip

    def __init__(self, config, **how):
        super().__init__(config, **how)
        texts = self._texts()
        if config.held_out:
            self.held_out = contexts_lib.load_contexts(config.held_out)
        else:
            texts, self.held_out = split(texts, config.num_held_out)
        self.texts = texts
        self.model = models.load(config.model, dtype=config.train_dtype)
        self.parts = {"texts": texts, "held_out": self.held_out}
        self._check_texts()

    def _texts(self):
        if self.is_smoke:
            first, second = contexts_lib.smoke_contexts()
            return [first, 2 * second]  # to measure on, and long enough to train on
        return contexts_lib.load_contexts(contexts_lib.path_for(self.config))

    def _check_texts(self):
        """ValueError if a text is too short to train on, or cannot be measured on."""
        config = self.config
        path = None if self.is_smoke else contexts_lib.path_for(config)
        contexts_lib.check_contexts(
            self.texts, self.model, source=f"{path}, to train on", max_tokens=0,
            at_least=_SEGMENT + 2,
        )  # fmt: skip
        contexts_lib.check_contexts(
            self.held_out,
            self.model,
            source=config.held_out or f"{path}, held out",
            max_tokens=config.max_tokens + 1,
        )
        sizes.resolve(self.model, *decoding_options(self.held_out, **self._options()))

    def _options(self):
        """What the flags say of the measurement."""
        config = self.config
        names = (
            "num_draft_tokens", "budget_ratio", "impl", "num_slots", "page_size",
            "prefill_chunk",
        )  # fmt: skip
        options = {name: getattr(config, name) for name in names}
        return options | {"max_tokens": config.max_tokens + 1}

    def rows(self):
        """One for each proposer."""
        return [{"proposer": name} for name in self.config.measure]

    @functools.cached_property
    def head(self):
        """The trained head: an earlier session's, if the run directory has it."""
        path = self.directory.path / "head"
        if path.exists():
            return load_eagle(self.model.config, path)
        eagle, told = self._train()
        with signals.deferred():  # a head is there whole, or not at all
            record.write_json(self.directory.path / "training.json", told)
            save_eagle(eagle, path)
        return eagle

    def _train(self):
        """(head, what is told of its training)."""
        config, started = self.config, time.perf_counter()
        runs = run_texts(self.model, self.texts)
        trained_from = time.perf_counter()
        eagle, losses = train(
            self.model, runs, num_steps=config.steps, batch_size=config.batch_size,
            learning_rate=config.learning_rate, window=config.window,
        )  # fmt: skip
        return eagle, {
            "dense_run_s": trained_from - started,
            "training_s": time.perf_counter() - trained_from,  # with its compilation
            "losses": losses,
        }

    @functools.cached_property
    def decoder(self):
        """The model in the type that is measured."""
        if self.config.decode_dtype == self.config.train_dtype:
            return self.model
        return models.load(self.config.model, dtype=self.config.decode_dtype)

    def measure(self, row):
        """Accepted drafts of one proposer; None if all texts loop."""
        proposer = _PROPOSERS[row["proposer"]] or self.head
        found, _ = accepted_drafts(
            self.decoder, self.held_out, proposer=proposer, **self._options()
        )
        return {"accepted_drafts": found}

    def headline(self, found):
        """Accepted drafts."""
        found = found["accepted_drafts"]
        return "all texts loop" if found is None else f"{found['mean']:.2f} accepted"

    def describe(self, records):
        """The texts, and how training went if there was any."""
        told = self.directory.path / "training.json" if self.directory else None
        return {
            "num_texts": len(self.texts),
            "num_text_tokens": sum(map(len, self.texts)),
            "num_held_out": len(self.held_out),
        } | (record.read_json(told) if told and told.exists() else {})


if __name__ == "__main__":
    experiment.run(TrainEagle)
