"""Contexts for measuring acceptance: cuts of the model's own text at temperature 1.

Free runs at low temperature end in verbatim loops with a small model, and loops
flatter or punish a drafting policy for nothing it will meet elsewhere. So acceptance is
measured on short continuations of contexts of known length, and continuations that
loop are left out (`is_looping`).

    python -m experiments.contexts --prompts problems.jsonl --output contexts.json \
        --continuations plain.json

writes contexts as token ids, and what plain decoding makes of them at each temperature,
which spares every later `experiments.study` that work.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib
import random

import numpy as np

from experiments import fingerprint, launch, models, record, signals
from experiments.options import Writes, option
from experiments.prompts import as_chat, load_prompts
from sparsespec_jax import (
    Engine,
    EngineConfig,
    SamplingParams,
    SpeculationConfig,
    sizes,
)

_TASKS = (
    "Explain in detail, with worked examples, {}.",
    "Write a long and careful essay about {}.",
    "Tell a long story, rich in detail, in which someone discovers {}.",
    "Set yourself three hard exercises about {} and solve them step by step.",
)
_TOPICS = (
    "how prime numbers are distributed",
    "the geometry of triangles and circles",
    "the tides and the motion of the moon",
    "how bread rises and why it browns",
    "counting arguments and the pigeonhole principle",
    "the history of measuring time",
    "how a city supplies itself with water",
    "linear equations and their applications",
)

OF_SMOLLM2 = "experiments/results/contexts_smollm2.json"
RANGES = ((500, 1000), (1000, 2000), (2000, 3000))


def prompts(count):
    """`count` chat prompts, all different; at most 32."""
    pairs = list(itertools.product(_TASKS, _TOPICS))
    if count > len(pairs):
        raise ValueError(f"num_prefixes must be at most {len(pairs)}, got {count}")
    random.Random(0).shuffle(pairs)
    return [as_chat(task.format(topic)) for task, topic in pairs[:count]]


def prompt_ids(model, count, is_smoke):
    """Token ids of the `prompts`; a smoke run, whose model cannot read, has others."""
    if is_smoke:
        return smoke_contexts()[:count]
    tokenizer = model.require_tokenizer()
    return [tokenizer.encode_chat(chat) for chat in prompts(count)]


def smoke_contexts():
    """Two short texts of random tokens."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, 97, n).tolist() for n in (60, 53)]


def plain_options(*, length, num_slots, page_size, impl, prefill_chunk=32):
    """(SpeculationConfig, EngineConfig) for texts of `length` tokens, no drafts."""
    return SpeculationConfig(num_draft_tokens=0), EngineConfig(
        num_slots=num_slots,
        page_size=page_size,
        max_length=length,
        prefill_chunk=prefill_chunk,
        impl=impl,
    )


def encode_chats(model, chats, *, length):
    """Token ids of chats that are to become texts of `length` tokens.

    Raises:
      ValueError: the model has no tokenizer or chat format, or a chat is that long.
    """
    encoded = [model.require_tokenizer().encode_chat(chat) for chat in chats]
    for index, ids in enumerate(encoded):
        if len(ids) >= length:
            raise ValueError(
                f"prompt {index} has {len(ids)} tokens, its text is to have {length}: "
                "ask for longer texts"
            )
    return encoded


def free_runs(engine, prompts, *, length, seed):
    """Token ids of a text of `length` tokens for each prompt, it included, at T = 1."""
    for index, ids in enumerate(prompts):
        law = SamplingParams(
            temperature=1.0,
            seed=seed + index,
            max_tokens=length - len(ids),
            ignore_eos=True,
        )
        engine.add_request(ids, law, prompt_index=index)
    return [[*r.prompt_token_ids, *r.token_ids] for r in finish(engine)]


def continue_contexts(engine, contexts, *, temperature, max_tokens, seed):
    """DecodeResults of all contexts, in order, by an engine that may be used again.

    Context i is continued by `max_tokens` tokens with the noise of seed + 1000 + i.
    """
    for index, context in enumerate(contexts):
        law = SamplingParams(
            temperature=temperature,
            seed=seed + 1000 + index,
            max_tokens=max_tokens,
            ignore_eos=True,
        )
        engine.add_request(context, law, prompt_index=index)
    return finish(engine)


def finish(engine):
    """Run the engine until nothing is left; DecodeResults in order of their prompts."""
    results = []
    while engine.has_work:
        results += engine.step()
    return sorted(results, key=lambda result: result.prompt_index)


def cut(texts, *, seed, ranges=RANGES):
    """One context per text and range: token ids up to a random place in the range."""
    rng = random.Random(seed)
    contexts = []
    for text in texts:
        for low, high in ranges:
            if high <= len(text):
                contexts.append(text[: rng.randrange(low, high)])
    return contexts


def is_looping(tokens, *, gram=8, share=0.4):
    """True if more than `share` of the `gram`-token windows occurred before."""
    windows = [tuple(tokens[i : i + gram]) for i in range(len(tokens) - gram + 1)]
    repeats = len(windows) - len(set(windows))
    return bool(windows) and repeats > share * len(windows)


def path_for(values):
    """The file that --contexts names, or the one that is there for --model.

    Raises:
      ValueError: none is, as the ids of another vocabulary make no text.
    """
    if values.contexts is None and values.model != "smollm2":
        raise ValueError(
            f"contexts: there are none for --model={values.model}: write some with "
            "`python -m experiments.contexts` and name them by --contexts"
        )
    return values.contexts or OF_SMOLLM2


def load_contexts(path) -> list[list[int]]:
    """Token ids of the contexts in a JSON file.

    Raises:
        ValueError: there is no such file, or it holds something else.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise ValueError(
            f"contexts: there is no file {path}; `python -m experiments.contexts` "
            "writes one"
        )
    try:
        contexts = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"contexts: {path} is damaged: {error}") from None
    if not isinstance(contexts, list) or not contexts:
        raise ValueError(f"contexts: {path} is not a list of contexts (token ids)")
    for index, context in enumerate(contexts):
        if not (isinstance(context, list) and context and all(map(_is_id, context))):
            raise ValueError(f"contexts: {path}: context {index} is no list of ids")
    return contexts


def _is_id(item):
    return isinstance(item, int) and not isinstance(item, bool) and item >= 0


def check_contexts(contexts, model, *, source, max_tokens, at_least=1):
    """ValueError, with the context's number, if one does not suit model or purpose.

    Args:
      contexts: lists of token ids.
      model: a Model.
      source: where they come from, for the message.
      max_tokens: what is to come behind each.
      at_least: tokens that each must have.
    """
    limit, vocab_size = model.config.max_length, model.config.vocab_size
    for index, context in enumerate(contexts):
        where, length = f"{source}: context {index}", len(context)
        if length < at_least:
            raise ValueError(f"{where} has {length} tokens, {at_least} are needed")
        if length + max_tokens > limit:
            raise ValueError(
                f"{where} has {length} tokens, which with {max_tokens} behind it is "
                f"more than the {limit} that {model.name} was made for"
            )
        if max(context) >= vocab_size:
            raise ValueError(
                f"{where} has the token id {max(context)}, the vocabulary of "
                f"{model.name} ends at {vocab_size}: it was made for another model"
            )


def load_continuations(path, contexts, model, *, max_tokens, seed):
    """{temperature: token ids of each context} of a file that `main` wrote.

    Contexts may be the first ones of those that were continued.

    Raises:
      ValueError: no such file, or one of another model, contexts, lengths or seeds.
    """
    if not pathlib.Path(path).is_file():
        raise ValueError(f"continuations: there is no file {path}")
    found = record.read_json(path)
    recorded = found.get("inputs")
    if not recorded:
        raise ValueError(
            f"{path} does not say which contexts it continues (an earlier version "
            "wrote it): write it again with `python -m experiments.contexts`"
        )
    recorded = recorded | {"contexts": recorded["contexts"][: len(contexts)]}
    wanted = continuation_inputs(model, contexts, max_tokens=max_tokens, seed=seed)
    if changed := record.differences(recorded, wanted, wanted):
        raise ValueError(f"{path} continues something else: {changed}")
    return {
        float(temperature): texts[: len(contexts)]
        for temperature, texts in found["texts"].items()
    }


def continuation_inputs(model, contexts, *, max_tokens, seed):
    """What continuations follow from, beside kernels and device."""
    hashes = [fingerprint.of_tokens(context) for context in contexts]
    law = {"max_tokens": max_tokens, "seed": seed}
    return {"contexts": hashes, **fingerprint.of_model(model), **law}


def parse_ranges(values):
    """((low, high), ...) of a list of texts "low-high"; ValueError if malformed."""
    ranges = []
    for value in values:
        low, _, high = value.partition("-")
        if not (low.isdecimal() and high.isdecimal() and int(low) < int(high)):
            raise ValueError(f"--ranges takes low-high, got {value!r}")
        ranges.append((int(low), int(high)))
    return tuple(ranges)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContextsConfig(Writes):
    """Contexts to write, and what is to continue them."""

    continuations: str | None = option(None, "Plain texts to write, JSON.")
    model: str = option("smollm2")
    dtype: str = option("float32", "Type.", choices=models.DTYPES)
    prompts: str | None = option(None, "Prompt file; default: essays and exercises.")
    num_prefixes: int = option(24, "Prompts that texts are made from.", at_least=1)
    samples_per_prompt: int = option(1, "Texts of each prompt.", at_least=1)
    ranges: tuple[str, ...] = option(("500-1000", "1000-2000", "2000-3000"), "Lengths.")
    temperatures: tuple[float, ...] = option((0.0, 0.3, 0.65, 1.0), "Of continuations.")
    max_tokens: int = option(96, "New tokens per context.", at_least=1)
    page_size: int = option(16, "Tokens per KV page.", at_least=1)
    prefill_chunk: int = option(128, "Prompt tokens per step.", at_least=1)
    seed: int = option(0, "Seed of texts, cuts and continuations.", at_least=0)
    impl: str | None = option(None, "Kernels; default: the platform's.")


def main(values):
    """Write contexts, then their plain continuations."""
    with launch.checking():
        ranges = parse_ranges(values.ranges)
        for temperature in values.temperatures:
            SamplingParams(temperature=temperature)
        count = values.num_prefixes
        chats = (
            load_prompts(values.prompts, chat=True)
            if values.prompts
            else prompts(count)
        )
        if len(chats) < count:
            raise ValueError(f"{values.prompts} holds {len(chats)} of {count} prompts")
        model = models.load(values.model, dtype=values.dtype)
        longest = max(high for _, high in ranges)
        chats = encode_chats(model, chats[:count], length=longest)
        behind = values.max_tokens + 1 if values.continuations else 0
        options = plain_options(
            length=longest + behind,
            num_slots=count * values.samples_per_prompt,
            page_size=values.page_size,
            impl=values.impl,
            prefill_chunk=values.prefill_chunk,
        )
        sizes.resolve(model, *options)
    engine = Engine(model, speculation=options[0], engine=options[1])
    chats *= values.samples_per_prompt
    texts = free_runs(engine, chats, length=longest, seed=values.seed)
    contexts = cut(texts, seed=values.seed, ranges=ranges)
    write_contexts(values.output, contexts)
    print(f"{len(contexts)} contexts", flush=True)
    if values.continuations:
        law = dict(max_tokens=behind, seed=values.seed)
        inputs = continuation_inputs(model, contexts, **law)
        found = {"inputs": inputs, "texts": {}}
        for temperature in values.temperatures:
            results = continue_contexts(
                engine, contexts, temperature=temperature, **law
            )
            found["texts"][str(temperature)] = [list(r.token_ids) for r in results]
            print(f"continued at temperature {temperature}", flush=True)
        _write(values.continuations, found)


def write_contexts(path, contexts):
    """Write contexts for `load_contexts`, whole or not at all."""
    _write(path, contexts)


def _write(path, value):
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with signals.deferred():
        record.write_text(path, json.dumps(value))
        signals.kept(path)


if __name__ == "__main__":
    launch.run(main, ContextsConfig)
