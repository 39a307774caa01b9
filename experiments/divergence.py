"""Greedy texts in bfloat16: how often speculation leaves plain decoding, and how close.

    python -m experiments.divergence --output experiments/results/divergence_h100.json

In float32 both texts are the same (experiments.lossless). In bfloat16 a verification
and a plain step round differently, so that two nearly equal logits can change places:
the report gives the share of requests with identical texts, the token at which the
others part, and the gap between the two best logits there, from one full forward pass
over the text so far, beside the gaps at all other tokens.
"""

from __future__ import annotations

import functools
import gc
import sys

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments import contexts, launch, record
from experiments.prompts import load_prompts
from sparsespec_jax import (
    Engine,
    EngineConfig,
    SamplingParams,
    SpeculationConfig,
    load_model,
    sizes,
)
from sparsespec_jax.host.text import encode_prompts
from sparsespec_jax.models.transformer import causal_attend, forward, logits

_MODEL = flags.DEFINE_string("model", "smollm2", "Model to decode with.")
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["float32", "bfloat16"], "Type.")
_PROMPTS = flags.DEFINE_string("prompts", "", "A .txt or .jsonl file of prompts.")
_COUNT = flags.DEFINE_integer(
    "num_prompts", 0, "Only the first so many; 0: all.", lower_bound=0
)
_TOKENS = flags.DEFINE_integer(
    "max_tokens", 2000, "New tokens per prompt.", lower_bound=1
)
_SLOTS = flags.DEFINE_integer(
    "num_slots", 32, "Requests decoded at the same time.", lower_bound=1
)
_PAGE = flags.DEFINE_integer("page_size", 64, "Tokens per KV page.", lower_bound=1)
_COMMIT = flags.DEFINE_string("commit", None, "Commit to record if git cannot say.")
_OUTPUT = flags.DEFINE_string("output", None, "Results file.", required=True)


def decode_all(model, prompts, speculation, config):
    """Greedy token ids (prompt and output) of every prompt, in order."""
    engine = Engine(model, speculation=speculation, engine=config)
    law = SamplingParams(temperature=0, max_tokens=_TOKENS.value, ignore_eos=True)
    for prompt in prompts:
        engine.add_request(prompt, law)
    done = contexts.finish(engine)
    accepted = sum(r.metrics.num_accepted_draft_tokens for r in done)
    verifies = sum(r.metrics.num_verify_steps for r in done)
    return [(r.prompt_token_ids, r.token_ids) for r in done], accepted / verifies


@functools.partial(jax.jit, static_argnums=0)
def best_two(config, params, tokens):
    """Gap of the two largest logits after every one of `tokens` [T], float32 [T]."""
    caches = (None,) * config.num_layers
    positions = jnp.arange(tokens.size)
    hidden, _ = forward(config, params, tokens, positions, causal_attend, caches)
    top = jax.lax.top_k(logits(config, params, hidden), 2)[0]
    return top[:, 0] - top[:, 1]


def compare(model, plain, speculative, max_length) -> list[dict]:
    """One row per request: where the texts part and the logit gap there."""
    rows = []
    for (prompt, left), (_, right) in zip(plain, speculative, strict=True):
        same = np.array(left) == np.array(right)
        place = len(left) if same.all() else int(np.argmin(same))
        text = np.zeros(max_length, np.int32)
        ids = [*prompt, *left]
        text[: len(ids)] = ids
        gaps = np.asarray(best_two(model.config, model.params, jnp.asarray(text)))
        gaps = gaps[len(prompt) - 1 : len(ids) - 1]  # of the output tokens
        rows.append(
            {
                "identical": bool(same.all()),
                "first_difference": None if same.all() else place,
                "gap_there": None if same.all() else float(gaps[place]),
                "rank_of_gap": None
                if same.all()
                else float((gaps[: place + 1] < gaps[place]).mean()),
                "median_gap": float(np.median(gaps)),
            }
        )
    return rows


def main():
    """Decode both ways, compare, write the report."""
    with launch.checking():
        prompts = load_prompts(_PROMPTS.value, chat=True)[: _COUNT.value or None]
        model = load_model(_MODEL.value, dtype=_DTYPE.value)
        encoded = encode_prompts(prompts, model)
        max_length = max(map(len, encoded)) + _TOKENS.value
        config = EngineConfig(
            num_slots=_SLOTS.value, page_size=_PAGE.value, max_length=max_length
        )
        for speculation in (SpeculationConfig(num_draft_tokens=0), SpeculationConfig()):
            sizes.resolve(model, speculation, config)
    header = record.results_header(
        flags.FLAGS.get_key_flags_for_module(sys.modules[__name__]),
        commit=_COMMIT.value,
    )
    plain, _ = decode_all(model, encoded, SpeculationConfig(num_draft_tokens=0), config)
    print(f"decoded {len(plain)} requests with k = 0", flush=True)
    gc.collect()
    speculative, accepted = decode_all(model, encoded, SpeculationConfig(), config)
    print(f"decoded them speculatively, {accepted:.2f} drafts accepted", flush=True)
    gc.collect()
    rows = compare(model, plain, speculative, max_length)
    parted = [row for row in rows if not row["identical"]]
    summary = {
        "num_requests": len(rows),
        "num_tokens_each": _TOKENS.value,
        "share_identical": 1 - len(parted) / len(rows),
        "mean_accepted_draft_tokens": accepted,
        "median_first_difference": float(
            np.median([row["first_difference"] for row in parted])
        )
        if parted
        else None,
        "largest_gap_there": max((row["gap_there"] for row in parted), default=None),
        "median_gap_elsewhere": float(np.median([row["median_gap"] for row in rows])),
    }
    record.write_results(_OUTPUT.value, header | {"summary": summary, "rows": rows})
    for name, value in summary.items():
        print(f"{name:28s} {value}")


if __name__ == "__main__":
    launch.run(main)
