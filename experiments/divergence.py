"""Greedy texts in bfloat16: how often speculation leaves plain decoding, and how close.

    python -m experiments.divergence --output experiments/results/divergence_h100

In float32 both texts are the same (experiments.lossless). In bfloat16 a verification
and a plain step round differently, so that two nearly equal logits can change places:
the report gives the share of requests with identical texts, the token at which the
others part, and the gap between the two best logits there, from one full forward pass
over the text so far, beside the gaps at all other tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import gc

import jax
import jax.numpy as jnp
import numpy as np

from experiments import contexts, experiment, models
from experiments.config import Drafting
from experiments.experiment import Experiment
from experiments.options import option
from experiments.prompts import load_prompts, prepare_lines
from sparsespec_jax import Engine, EngineConfig, SamplingParams, sizes
from sparsespec_jax.models.transformer import causal_attend, forward, logits


@dataclasses.dataclass(frozen=True, kw_only=True)
class DivergenceConfig(Drafting):
    """What is decoded."""

    model: str = option("smollm2")
    dtype: str = option("bfloat16", "Type.", choices=models.DTYPES)
    prompts: str = option("", "A .txt or .jsonl file of prompts.")
    num_prompts: int = option(0, "Only the first so many; 0: all.", at_least=0)
    max_tokens: int = option(2000, "New tokens per prompt.", at_least=1)
    num_slots: int = option(32, "Requests decoded at the same time.", at_least=1)
    page_size: int = option(64, "Tokens per KV page.", at_least=1)
    prefill_chunk: int = option(128, "Prompt tokens prefilled per step.", at_least=1)
    min_budget: int = option(192, "Tokens that a draft reads at least.", at_least=0)


@functools.partial(jax.jit, static_argnums=0)
def best_two(config, params, tokens):
    """Gap of the two largest logits after every one of `tokens` [T], float32 [T]."""
    caches = (None,) * config.num_layers
    positions = jnp.arange(tokens.size)
    hidden, _ = forward(config, params, tokens, positions, causal_attend, caches)
    top = jax.lax.top_k(logits(config, params, hidden), 2)[0]
    return top[:, 0] - top[:, 1]


class Divergence(Experiment):
    """Every prompt decoded both ways."""

    claim = "in bfloat16 texts part from plain decoding at near-ties only"
    Config = DivergenceConfig
    SMOKE = models.smoke(*models.SMOKE, dtype="float32")

    def __init__(self, config, **how):
        super().__init__(config, **how)
        self.model = models.load(config.model, dtype=config.dtype)
        if self.is_smoke:
            self.prompts = contexts.smoke_contexts()
        else:
            prompts = load_prompts(config.prompts, chat=True)
            prompts = prompts[: config.num_prompts or None]
            self.prompts = self._encoded(prompts)
        self.parts["prompts"] = self.prompts
        self.max_length = max(map(len, self.prompts)) + config.max_tokens
        for is_plain in (True, False):
            sizes.resolve(self.model, *self._options(is_plain))

    def _encoded(self, prompts):
        laws = [SamplingParams(max_tokens=self.config.max_tokens)] * len(prompts)
        prepared = prepare_lines(self.model, prompts, laws)
        return [list(prompt.token_ids) for prompt in prepared]

    def _options(self, is_plain):
        config = self.config
        return config.speculation(is_plain=is_plain), EngineConfig(
            num_slots=config.num_slots,
            page_size=config.page_size,
            prefill_chunk=config.prefill_chunk,
            max_length=self.max_length,
        )

    def _decode(self, is_plain):
        """Greedy results of every prompt, in order."""
        speculation, config = self._options(is_plain)
        engine = Engine(self.model, speculation=speculation, engine=config)
        law = SamplingParams(
            temperature=0, max_tokens=self.config.max_tokens, ignore_eos=True
        )
        for index, prompt in enumerate(self.prompts):
            engine.add_request(prompt, law, prompt_index=index)
        done = contexts.finish(engine)
        del engine
        gc.collect()  # the pool must go before the next one comes
        return done

    @functools.cached_property
    def decoded(self):
        """Results of plain and of speculative decoding."""
        return self._decode(True), self._decode(False)

    def rows(self):
        """One for each prompt."""
        return [{"prompt": index} for index in range(len(self.prompts))]

    def measure(self, row):
        """Where the texts part, and the logit gap there."""
        plain, speculative = (done[row["prompt"]] for done in self.decoded)
        ids = [*plain.prompt_token_ids, *plain.token_ids]
        text = np.zeros(self.max_length, np.int32)
        text[: len(ids)] = ids
        model = self.model
        gaps = np.asarray(best_two(model.config, model.params, jnp.asarray(text)))
        gaps = gaps[len(plain.prompt_token_ids) - 1 : len(ids) - 1]  # of the output
        return parting(plain.token_ids, speculative.token_ids, gaps) | {
            "num_accepted": speculative.metrics.num_accepted_draft_tokens,
            "num_verify_steps": speculative.metrics.num_verify_steps,
        }

    def describe(self, records):
        """How many texts are the same, and how close the others were."""
        parted = [record for record in records if not record["identical"]]
        first = [record["first_difference"] for record in parted]
        verifies = sum(record["num_verify_steps"] for record in records)
        accepted = sum(record["num_accepted"] for record in records)
        return {
            "num_requests": len(records),
            "num_tokens_each": self.config.max_tokens,
            "share_identical": 1 - len(parted) / len(records),
            "mean_accepted_draft_tokens": accepted / verifies,
            "median_first_difference": float(np.median(first)) if parted else None,
            "largest_gap_there": max((r["gap_there"] for r in parted), default=None),
            "median_gap_elsewhere": float(
                np.median([record["median_gap"] for record in records])
            ),
        }


def parting(left, right, gaps):
    """Where two texts of one length part; `gaps` of the logits at every token."""
    same = np.array(left) == np.array(right)
    found = {"identical": bool(same.all()), "median_gap": float(np.median(gaps))}
    if same.all():
        nothing = dict.fromkeys(("first_difference", "gap_there", "rank_of_gap"))
        return found | nothing
    place = int(np.argmin(same))
    return found | {
        "first_difference": place,
        "gap_there": float(gaps[place]),
        "rank_of_gap": float((gaps[: place + 1] < gaps[place]).mean()),
    }


if __name__ == "__main__":
    experiment.run(Divergence)
