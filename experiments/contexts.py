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

import itertools
import json
import pathlib
import random

from absl import app, flags

from experiments import launch
from experiments.prompts import as_chat, load_prompts
from sparsespec_jax import (
    Engine,
    EngineConfig,
    SamplingParams,
    SpeculationConfig,
    load_model,
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

RANGES = ((500, 1000), (1000, 2000), (2000, 3000))


def prompts(count):
    """`count` chat prompts, all different; at most 32."""
    pairs = list(itertools.product(_TASKS, _TOPICS))
    if count > len(pairs):
        raise ValueError(f"num_prefixes must be at most {len(pairs)}, got {count}")
    random.Random(0).shuffle(pairs)
    return [as_chat(task.format(topic)) for task, topic in pairs[:count]]


def plain_engine(model, *, length, num_slots, page_size, impl, prefill_chunk=32):
    """An Engine without drafts for texts of at most `length` tokens."""
    return Engine(
        model,
        speculation=SpeculationConfig(num_draft_tokens=0),
        engine=EngineConfig(
            num_slots=num_slots,
            page_size=page_size,
            max_length=length,
            prefill_chunk=prefill_chunk,
            impl=impl,
        ),
    )


def free_runs(engine, chats, *, length, seed):
    """Token ids of a text of `length` tokens for each chat, it included, at T = 1."""
    for index, chat in enumerate(chats):
        ids = engine.model.tokenizer.encode_chat(chat)
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


def load_contexts(path) -> list[list[int]]:
    """Token ids of the contexts in a JSON file.

    Raises:
        ValueError: there is no such file.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise ValueError(
            f"contexts: there is no file {path}; `python -m experiments.contexts` "
            "writes one"
        )
    return json.loads(path.read_text())


def load_continuations(path, contexts, *, max_tokens, seed):
    """{temperature: token ids of each context} of a file that `main` wrote.

    Contexts may be the first ones of those that were continued.

    Raises:
      ValueError: no such file, or one made of other contexts, lengths or seeds.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise ValueError(f"continuations: there is no file {path}")
    found = json.loads(path.read_text())
    made_of = {
        "context_lengths": [len(context) for context in contexts],
        "max_tokens": max_tokens,
        "seed": seed,
    }
    found["context_lengths"] = found["context_lengths"][: len(contexts)]
    for name, wanted in made_of.items():
        if found[name] != wanted:
            raise ValueError(f"{path} was made with {name} {found[name]}, not {wanted}")
    return {
        float(temperature): texts[: len(contexts)]
        for temperature, texts in found["texts"].items()
    }


def parse_ranges(values):
    """((low, high), ...) of a list of texts "low-high"; ValueError if malformed."""
    ranges = []
    for value in values:
        low, _, high = value.partition("-")
        if not (low.isdecimal() and high.isdecimal() and int(low) < int(high)):
            raise ValueError(f"--ranges takes low-high, got {value!r}")
        ranges.append((int(low), int(high)))
    return tuple(ranges)


def _define_flags():
    flags.DEFINE_string("output", None, "Contexts to write, JSON.", required=True)
    flags.DEFINE_string("continuations", None, "Plain texts to write, JSON.")
    flags.DEFINE_string("model", "smollm2", "Model.")
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Type.")
    flags.DEFINE_string("prompts", None, "Prompt file; default: essays and exercises.")
    flags.DEFINE_integer(
        "num_prefixes", 24, "Prompts that texts are made from.", lower_bound=1
    )
    flags.DEFINE_integer(
        "samples_per_prompt", 1, "Texts of each prompt.", lower_bound=1
    )
    flags.DEFINE_list("ranges", ["500-1000", "1000-2000", "2000-3000"], "Lengths.")
    flags.DEFINE_list("temperatures", ["0", "0.3", "0.65", "1"], "Of continuations.")
    flags.DEFINE_integer("max_tokens", 96, "New tokens per context.", lower_bound=1)
    flags.DEFINE_integer("page_size", 16, "Tokens per KV page.", lower_bound=1)
    flags.DEFINE_integer("prefill_chunk", 128, "Prompt tokens per step.", lower_bound=1)
    flags.DEFINE_integer(
        "seed", 0, "Seed of texts, cuts and continuations.", lower_bound=0
    )
    flags.DEFINE_string("impl", None, "Kernels; default: the platform's.")


def main():
    """Write contexts, then their plain continuations."""
    values = flags.FLAGS
    try:
        ranges = parse_ranges(values.ranges)
        count = values.num_prefixes
        chats = (
            load_prompts(values.prompts, chat=True)
            if values.prompts
            else prompts(count)
        )
        if len(chats) < count:
            raise ValueError(f"{values.prompts} holds {len(chats)} of {count} prompts")
    except ValueError as error:
        raise app.UsageError(str(error)) from None
    model = load_model(values.model, dtype=values.dtype)
    longest = max(high for _, high in ranges)
    engine = plain_engine(
        model,
        length=min(longest + values.max_tokens + 1, model.config.max_length),
        num_slots=count * values.samples_per_prompt,
        page_size=values.page_size,
        impl=values.impl,
        prefill_chunk=values.prefill_chunk,
    )
    chats = chats[:count] * values.samples_per_prompt
    texts = free_runs(engine, chats, length=longest, seed=values.seed)
    contexts = cut(texts, seed=values.seed, ranges=ranges)
    _write(values.output, contexts)
    print(f"{len(contexts)} contexts", flush=True)
    if values.continuations:
        law = dict(max_tokens=values.max_tokens + 1, seed=values.seed)
        lengths = [len(context) for context in contexts]
        found = {"context_lengths": lengths, **law, "texts": {}}
        for name in values.temperatures:
            results = continue_contexts(
                engine, contexts, temperature=float(name), **law
            )
            found["texts"][name] = [list(r.token_ids) for r in results]
            print(f"continued at temperature {name}", flush=True)
        _write(values.continuations, found)


def _write(path, value):
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value) + "\n")


if __name__ == "__main__":
    _define_flags()
    launch.run(main)
