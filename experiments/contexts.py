r"""Contexts for measuring acceptance: the model's own text, or prompts on long files.

Free runs at low temperature end in verbatim loops with a small model, and loops
flatter or punish a drafting policy for nothing it will meet elsewhere. So acceptance is
measured on short continuations of contexts of known length, and continuations that
loop are left out (`is_looping`).

    python -m experiments.contexts --prompts problems.jsonl --output contexts.json \
        --continuations plain.json

writes contexts as token ids, and what plain decoding makes of them at each temperature,
which spares every later `experiments.study` that work. The model's own text starts from
essays and exercises, from problems that want reasoning (`--source reasoning`), or from
a prompt file. `--source files` makes chat prompts over source files and documents that
every machine has, of the lengths that are asked for:

    python -m experiments.contexts --model qwen2.5-coder-1.5b --dtype bfloat16 \
        --source files --lengths 2048,4096,8192,16384,30720 --num_prefixes 10 \
        --output contexts.json --continuations plain.json

They follow from the seed, the tokenizer and the versions of Python and the packages;
the file says which these were and the SHA-256 of all ids.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import random

import numpy as np

from experiments import context_files, fingerprint, launch, models, record, signals
from experiments.options import Writes, option
from experiments.prompts import PromptLine, essays, load_prompts, reasoning
from sparsespec_jax import (
    Engine,
    EngineConfig,
    SamplingParams,
    SpeculationConfig,
    sizes,
)

OF_SMOLLM2 = "experiments/results/contexts_smollm2.json"
RANGES = ((500, 1000), (1000, 2000), (2000, 3000))


def prompt_ids(model, count, is_smoke):
    """Token ids of the `essays`; a smoke run, whose model cannot read, has others."""
    if is_smoke:
        return smoke_contexts()[:count]
    tokenizer = model.require_tokenizer()
    return [tokenizer.encode_chat(chat) for chat in essays(count)]


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
    """Token ids of chats, PromptLines, that are to become texts of `length` tokens.

    Raises:
      ValueError: the model has no tokenizer or chat format, or a chat is that long.
    """
    encode = model.require_tokenizer().encode_chat
    encoded = [encode(c.prompt, **(c.chat_template_kwargs or {})) for c in chats]
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
    """Token ids of the contexts in a JSON file: a list of them, or what `main` writes.

    Raises:
        ValueError: there is no such file, it holds something else, or other ids than
            those whose SHA-256 it names.
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
    named = None
    if isinstance(contexts, dict):
        named, contexts = contexts.get("sha256"), contexts.get("contexts")
    if not isinstance(contexts, list) or not contexts:
        raise ValueError(f"contexts: {path} is not a list of contexts (token ids)")
    for index, context in enumerate(contexts):
        if not (isinstance(context, list) and context and all(map(_is_id, context))):
            raise ValueError(f"contexts: {path}: context {index} is no list of ids")
    if named is not None and named != hash_of(contexts):
        raise ValueError(
            f"contexts: {path} names the SHA-256 {named}, its contexts have "
            f"{hash_of(contexts)}: they were changed; write the file again"
        )
    return contexts


def hash_of(contexts) -> str:
    """SHA-256 of all token ids and of where each context ends."""
    text = json.dumps(contexts, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


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
    source: str = option(
        "essays",
        "What they are made of: own text after essays or reasoning, or files.",
        choices=("essays", "reasoning", "files"),
    )
    prompts: str | None = option(None, "Prompt file, for own text after its prompts.")
    num_prefixes: int = option(
        24, "Prompts (reasoning: 16; files: 10 a length).", at_least=1
    )
    samples_per_prompt: int = option(1, "Own texts of each prompt.", at_least=1)
    ranges: tuple[str, ...] = option(
        ("500-1000", "1000-2000", "2000-3000"), "Lengths of own text."
    )
    lengths: tuple[int, ...] = option(
        (512, 1024, 2048, 4096, 8192, 16384, 30720),
        "Tokens of prompts over files.",
        at_least=256,
    )
    temperatures: tuple[float, ...] = option((0.0, 0.3, 0.65, 1.0), "Of continuations.")
    max_tokens: int = option(96, "New tokens per context; files: 256.", at_least=1)
    num_slots: int | None = option(
        None, "Contexts at a time; default: all, files: 8.", kind=int, at_least=1
    )
    page_size: int = option(16, "Tokens per KV page.", at_least=1)
    prefill_chunk: int = option(128, "Prompt tokens per step; files: 512.", at_least=1)
    seed: int = option(0, "Seed of texts, cuts and continuations.", at_least=0)
    impl: str | None = option(None, "Kernels; default: the platform's.")

    @classmethod
    def defaults(cls, given):
        """Of long prompts there are fewer, and their answers are longer."""
        files = dict(num_prefixes=10, max_tokens=256, num_slots=8, prefill_chunk=512)
        of_source = {"files": files, "reasoning": {"num_prefixes": 16}}
        return of_source.get(given.get("source"), {})


def _chats(values):
    """The prompts of own text."""
    count = values.num_prefixes
    if values.prompts:
        chats = load_prompts(values.prompts, chat=True)
        if len(chats) < count:
            raise ValueError(f"{values.prompts} holds {len(chats)} of {count} prompts")
        return chats[:count]
    own = reasoning if values.source == "reasoning" else essays
    return [PromptLine(chat) for chat in own(count)]


def _file_prompts(values, model, behind):
    """FilePrompts, checked."""
    found = context_files.file_prompts(
        model.require_tokenizer(),
        lengths=values.lengths,
        count=values.num_prefixes,
        seed=values.seed,
    )
    ids = [prompt.ids for prompt in found]
    check_contexts(ids, model, source="--lengths", max_tokens=behind)
    return found


def main(values):
    """Write contexts, then their plain continuations."""
    of_files = values.source == "files"
    behind = values.max_tokens + 1 if values.continuations else 0
    with launch.checking():
        if of_files and values.prompts:
            raise ValueError("--prompts is of own text, --source=files has prompts")
        ranges = parse_ranges(values.ranges)
        for temperature in values.temperatures:
            SamplingParams(temperature=temperature)
        chats = [] if of_files else _chats(values)
        model = models.load(values.model, dtype=values.dtype)
        if of_files:
            made = _file_prompts(values, model, behind)
            contexts = [[*prompt.ids] for prompt in made]
            longest = max(map(len, contexts))
        else:
            longest = max(high for _, high in ranges)
            chats = encode_chats(model, chats, length=longest)
            chats *= values.samples_per_prompt
        options = plain_options(
            length=longest + behind,
            num_slots=values.num_slots or len(chats),
            page_size=values.page_size,
            impl=values.impl,
            prefill_chunk=values.prefill_chunk,
        )
        sizes.resolve(model, *options)
    if behind or not of_files:
        engine = Engine(model, speculation=options[0], engine=options[1])
    made_by = values.recorded()
    del made_by["output"], made_by["continuations"]  # paths change no token
    about = {"options": made_by, "versions": context_files.versions()}
    if of_files:
        about["prompts"] = [prompt.described() for prompt in made]
    else:
        texts = free_runs(engine, chats, length=longest, seed=values.seed)
        contexts = cut(texts, seed=values.seed, ranges=ranges)
    write_contexts(values.output, contexts, **about)
    print(f"{len(contexts)} contexts, SHA-256 {hash_of(contexts)}", flush=True)
    if values.continuations:
        _continue(values, engine, model, contexts, behind)


def _continue(values, engine, model, contexts, max_tokens):
    """Write the plain continuations, and how many of them loop or go past an end."""
    law = dict(max_tokens=max_tokens, seed=values.seed)
    found = {"inputs": continuation_inputs(model, contexts, **law), "texts": {}}
    found |= {"num_looping": {}, "num_past_end": {}}
    for temperature in values.temperatures:
        results = continue_contexts(engine, contexts, temperature=temperature, **law)
        texts = [list(r.token_ids) for r in results]
        looping = sum(map(is_looping, texts))
        ended = sum(not {*model.config.eos_ids}.isdisjoint(text) for text in texts)
        found["texts"][str(temperature)] = texts
        found["num_looping"][str(temperature)] = looping
        found["num_past_end"][str(temperature)] = ended
        print(
            f"continued at temperature {temperature}: of {len(texts)} texts {looping} "
            f"loop, which studies leave out, and {ended} go on past an end of text",
            flush=True,
        )
    _write(values.continuations, found)


def write_contexts(path, contexts, **about):
    """Write contexts for `load_contexts`, whole or not at all; `about` says of what."""
    _write(path, {"sha256": hash_of(contexts), **about, "contexts": contexts})


def _write(path, value):
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with signals.deferred():
        record.write_text(path, json.dumps(value))
        signals.kept(path)


if __name__ == "__main__":
    launch.run(main, ContextsConfig)
