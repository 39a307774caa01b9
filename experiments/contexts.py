"""Contexts for measuring acceptance: cuts of the model's own text at temperature 1.

Free runs at low temperature end in verbatim loops with a small model, and loops
flatter or punish a drafting policy for nothing it will meet elsewhere. So acceptance is
measured on short continuations of contexts of known length, and continuations that
loop are left out (`is_looping`).
"""

from __future__ import annotations

import itertools
import random

from experiments.prompts import as_chat
from sparsespec_jax import Engine, EngineConfig, SamplingParams, SpeculationConfig

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


def free_runs(model, *, count, length, num_slots, page_size, impl, seed):
    """Token ids of `count` texts of `length` tokens, prompts included, at T = 1."""
    encoded = [model.tokenizer.encode_chat(prompt) for prompt in prompts(count)]
    engine = Engine(
        model,
        speculation=SpeculationConfig(num_draft_tokens=0),
        engine=EngineConfig(
            num_slots=num_slots,
            page_size=page_size,
            max_length=length,
            prefill_chunk=32,
            impl=impl,
        ),
    )
    for index, ids in enumerate(encoded):
        law = SamplingParams(
            temperature=1.0,
            seed=seed + index,
            max_tokens=length - len(ids),
            ignore_eos=True,
        )
        engine.add_request(ids, law, prompt_index=index)
    return [[*r.prompt_token_ids, *r.token_ids] for r in finish(engine)]


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
