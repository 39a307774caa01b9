"""Long outputs, greedy and sampled, token by token against plain decoding.

    python -m experiments.lossless --output experiments/results/lossless

Decodes the same requests with k = 0 and then with k = 8 for every lag and page size,
in float32, and counts differing tokens; the exit status is 1 if there is one. About
4 minutes on an H100, an hour on two CPU cores.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

from experiments import contexts as contexts_lib
from experiments import experiment, models
from experiments.config import Drafting
from experiments.experiment import Experiment
from experiments.options import option
from sparsespec_jax import Engine, EngineConfig, SamplingParams, sizes


@dataclasses.dataclass(frozen=True, kw_only=True)
class LosslessConfig(Drafting):
    """What is decoded, and in which engines."""

    model: str = option("smollm2")
    num_requests: int = option(4, "Requests of each temperature.", at_least=1)
    temperatures: tuple[float, ...] = option((0.0, 0.65), "Temperatures.")
    max_tokens: int = option(2048, "New tokens per request.", at_least=1)
    lags: tuple[int, ...] = option((0, 1, 2), "Lags to try.")
    page_sizes: tuple[int, ...] = option((16, 64), "Page sizes to try.")
    impl: str | None = option(None, "Kernels; default: the platform's.")


def compare(results, plain):
    """What of `results` equals `plain`, token by token."""
    same = [a.token_ids == b.token_ids for a, b in zip(results, plain, strict=True)]
    tokens = sum(len(r.token_ids) for r in results)
    differing = sum(
        sum(x != y for x, y in itertools.zip_longest(a.token_ids, b.token_ids))
        for a, b in zip(results, plain, strict=True)
    )
    return {
        "identical_requests": sum(same),
        "num_tokens": tokens,
        "num_differing_tokens": differing,
        "max_logprob_difference": max(
            abs(x - y)
            for a, b in zip(results, plain, strict=True)
            for x, y in zip(a.logprobs, b.logprobs, strict=False)
        ),
    }


class Lossless(Experiment):
    """Plain decoding once, speculative decoding in every engine."""

    claim = "long outputs equal plain decoding's token by token, at every lag"
    Config = LosslessConfig
    SMOKE = models.smoke(
        "model", "max_tokens", "num_draft_tokens", "budget_ratio", "min_budget",
        num_requests=1, lags=(1,), page_sizes=(4,),
    )  # fmt: skip

    def __init__(self, config, **how):
        super().__init__(config, **how)
        self.model = models.load(config.model, dtype="float32")
        self.requests = self._requests()
        self.parts["prompts"] = [prompt for prompt, _ in self.requests]
        for row in self.rows():
            sizes.resolve(self.model, *self.options_of(**row))

    def _requests(self):
        """(prompt, SamplingParams) of every request, temperature by temperature."""
        config = self.config
        heats = [t for t in config.temperatures for _ in range(config.num_requests)]
        prompts = contexts_lib.prompt_ids(self.model, len(heats), self.is_smoke)
        return [
            (
                prompt,
                SamplingParams(
                    temperature=heat,
                    seed=index,
                    max_tokens=config.max_tokens,
                    ignore_eos=True,
                ),
            )
            for index, (prompt, heat) in enumerate(zip(prompts, heats, strict=True))
        ]

    def options_of(self, *, lag, page_size, is_plain=False):
        """(SpeculationConfig, EngineConfig) of one engine."""
        config = self.config
        return config.speculation(is_plain=is_plain), EngineConfig(
            num_slots=len(self.requests),
            page_size=page_size,
            max_length=max(len(p) + law.max_tokens for p, law in self.requests),
            prefill_chunk=32,
            lag=lag,
            impl=config.impl,
        )

    def _decode(self, **options):
        """Results by request."""
        speculation, config = self.options_of(**options)
        engine = Engine(self.model, speculation=speculation, engine=config)
        for index, (prompt, law) in enumerate(self.requests):
            engine.add_request(prompt, law, prompt_index=index)
        return contexts_lib.finish(engine)

    @functools.cached_property
    def plain(self):
        """Results of plain decoding."""
        page_size = self.config.page_sizes[0]
        return self._decode(is_plain=True, lag=1, page_size=page_size)

    def rows(self):
        """Pairs of lag and page size; the first ones cover every value."""
        pairs = [
            ((i + j) % 2, {"lag": lag, "page_size": page_size})
            for j, lag in enumerate(self.config.lags)
            for i, page_size in enumerate(self.config.page_sizes)
        ]
        return [row for _, row in sorted(pairs, key=lambda pair: pair[0])]

    def measure(self, row):
        """Differing tokens of one engine."""
        plain, results = self.plain, self._decode(**row)
        total = sum((r.metrics for r in results[1:]), start=results[0].metrics)
        accepted = total.mean_accepted_draft_tokens
        return compare(results, plain) | {"mean_accepted_draft_tokens": accepted}

    def describe(self, records):
        """Sums over the engines."""
        largest = max(record["max_logprob_difference"] for record in records)
        return {
            name: sum(record[name] for record in records)
            for name in ("num_tokens", "num_differing_tokens")
        } | {"max_logprob_difference": largest}

    def fault(self, records):
        """A differing token."""
        wrong = any(record["num_differing_tokens"] for record in records)
        return "tokens differ from plain decoding" if wrong else ""


if __name__ == "__main__":
    experiment.run(Lossless)
