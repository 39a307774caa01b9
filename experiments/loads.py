"""Loads of the throughput experiment: what is decoded, and in which engine."""

from __future__ import annotations

import dataclasses

from experiments.models import DTYPES
from experiments.options import Options, option
from sparsespec_jax import sizes
from sparsespec_jax.config import (
    DRAFT_WEIGHTS,
    NUMERICS,
    SCHEDULES,
    EngineConfig,
    SamplingParams,
    SpeculationConfig,
)
from sparsespec_jax.host.automatic import NUM_DRAFT_TOKENS
from sparsespec_jax.host.intake import check_length, make_request, prepare
from sparsespec_jax.host.scheduler import Scheduler
from sparsespec_jax.policies.select import resolve_policy


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load(Options):
    """One load; every field is also a command-line flag.

    Raises:
        ValueError: a value is out of range; the message names it.
    """

    model: str = option("qwen3-8b")
    random_weights: bool = option(True, "Weights of the preset's shapes, not real.")
    dtype: str = option("bfloat16", "Type of weights and KV.", choices=DTYPES)
    num_requests: int = option(64, "Requests, all submitted at the start.", at_least=1)
    num_slots: int = option(64, "Requests decoded at the same time.")
    prompt_length: int = option(
        512, "Random tokens per prompt; 0: prompts of --prompts, or the built-in ones."
    )
    context_length: int = option(
        0, "Prompts on source files and documents of so many tokens; 0: none.",
        at_least=0,
    )  # fmt: skip
    num_contexts: int = option(
        32, "Of them that differ; requests of one have noise of their own.", at_least=1
    )
    # A request's first token comes with its prompt: one more is decoded.
    new_tokens: int = option(
        4096, "Tokens per request; end-of-text is ignored.", at_least=2
    )
    max_length: int = option(0, "Prompt and output at most; 0: what the load needs.")
    temperature: float = option(0.65, "0 is greedy.")
    num_draft_tokens: int = option(8, "Drafts per cycle; k = 0 runs too.", at_least=1)
    budget_ratio: float = option(0.05, "Share of the context that a draft reads, s.")
    min_budget: int = option(192, "Tokens that a draft reads at least.")
    chooses_k: bool = option(
        False, "Let the cost model choose k of a few up to --num_draft_tokens."
    )
    schedule: str = option("mixed", "Of drafts.", choices=SCHEDULES)
    draft_weights: str | None = option(
        None, "Weights that draft, beside the model's.", choices=DRAFT_WEIGHTS
    )
    policy: str = option("pillar", "Selection policy.")
    mass_rows: str = option("all", "Verify rows whose attention counts: all or edges.")
    scope: str = option("kv_head", "One selection per kv_head or per layer.")
    forced_acceptance: float = option(
        -1.0,
        "Mean accepted drafts to force, for random weights; -1: real.",
    )
    page_size: int = option(64, "Tokens per KV page.")
    kv_gib: float = option(0.0, "Size of the KV pool; 0: what the slots can need.")
    prefill_chunk: int = option(512, "Prompt tokens of one prefill lane and step.")
    prefill_lanes: int = option(4, "Prompts prefilled in the same step.")
    lag: int = option(1, "Steps between dispatch and reading the outcome, 0 to 2.")
    numerics: str = option("fast", "Of the engine.", choices=NUMERICS)

    def __post_init__(self):
        super().__post_init__()
        self.sampling(0), self.speculation(), self.engine(1, None)
        resolve_policy(self.policy)

    def sampling(self, index: int) -> SamplingParams:
        """The law of request `index`, the same in both modes."""
        return SamplingParams(
            temperature=self.temperature,
            seed=index,
            max_tokens=self.new_tokens,
            ignore_eos=True,
        )

    def of_drafts(self, num_draft_tokens: int) -> Load:
        """The load with another k; forced, a draft is accepted as often as before."""
        changes = dict(num_draft_tokens=num_draft_tokens, chooses_k=False)
        share = self.speculation().forced_probability
        if share is not None:
            drafts = range(1, num_draft_tokens + 1)
            changes["forced_acceptance"] = sum(share**i for i in drafts)
        return dataclasses.replace(self, **changes)

    def speculation(self) -> SpeculationConfig:
        """How the speculative mode drafts."""
        forced = None if self.forced_acceptance < 0 else self.forced_acceptance
        smaller = [k for k in NUM_DRAFT_TOKENS if k < self.num_draft_tokens]
        return SpeculationConfig(
            num_draft_tokens=self.num_draft_tokens,
            draft_token_choices=tuple(smaller) if self.chooses_k else (),
            budget_ratio=self.budget_ratio,
            min_budget=self.min_budget,
            schedule=self.schedule,
            draft_weights=self.draft_weights,
            policy=self.policy,
            mass_rows=self.mass_rows,
            scope=self.scope,
            acceptor="shared_noise" if forced is None else "forced",
            forced_acceptance=forced,
        )

    def engine(self, longest_prompt: int, num_pages: int | None) -> EngineConfig:
        """Sizes of the engine, the same in both modes."""
        return EngineConfig(
            num_slots=self.num_slots,
            page_size=self.page_size,
            num_pages=num_pages,
            max_length=self.max_length or longest_prompt + self.new_tokens,
            prefill_chunk=self.prefill_chunk,
            prefill_lanes=self.prefill_lanes,
            lag=self.lag,
            numerics=self.numerics,
        )


def check_requests(model, prompts, laws, speculation, config):
    """ValueError if an engine of these options cannot serve one of the requests.

    Args:
        model: a Model.
        prompts: lists of token ids.
        laws: SamplingParams of each.
        speculation: SpeculationConfig.
        config: EngineConfig.
    """
    found = sizes.resolve(model, speculation, config)
    scheduler = Scheduler(
        found.shape,
        kv_policy=config.kv_policy,
        num_host_chunks=found.num_host_chunks,
        chunk_pages=config.host_chunk_pages,
    )
    for number, (prompt, law) in enumerate(zip(prompts, laws, strict=True)):
        prepared = prepare(model, prompt, law)
        check_length(prepared, model, found.max_length)
        scheduler.check(make_request(prepared, speculation, number))


_SMOLLM2 = Load(
    model="smollm2", random_weights=False, num_requests=256, num_slots=256,
    prompt_length=0, prefill_chunk=128, prefill_lanes=16,
)  # fmt: skip
# As the paper measured it on its H100: k = 8, s = 0.05 and 6.16 drafts accepted.
_QWEN3 = Load(forced_acceptance=6.16, min_budget=16, mass_rows="edges")
# Real weights, whose acceptance is their own.
_CODER = Load(model="qwen2.5-coder-1.5b", random_weights=False, mass_rows="edges")


def _long(load, num_requests, prompt_length, new_tokens, **changes):
    """A load whose requests all run at the same time."""
    sizes = dict(num_requests=num_requests, num_slots=num_requests)
    sizes |= dict(prompt_length=prompt_length, new_tokens=new_tokens)
    return dataclasses.replace(load, **sizes, **changes)


LOADS = {
    "smollm2_256x4096": _SMOLLM2,
    "smollm2_256x8000": dataclasses.replace(
        _SMOLLM2, new_tokens=7_600, max_length=8_184, temperature=1.0
    ),
    "qwen3_8b_64x512x4096": _QWEN3,
    "qwen3_8b_128x512x2048": dataclasses.replace(
        _QWEN3, num_requests=128, num_slots=128, new_tokens=2048, page_size=32
    ),
    "qwen3_8b_24x12288x1024": _long(_QWEN3, 24, 12_288, 1024),
    "qwen3_8b_80x8192x512": _long(_QWEN3, 80, 8192, 512),
    "qwen3_8b_48x12288x4096": _long(_QWEN3, 48, 12_288, 4096),
    "qwen3_8b_24x24576x8192": _long(_QWEN3, 24, 24_576, 8192),
    "qwen3_14b_32x12288x4096": _long(_QWEN3, 32, 12_288, 4096, model="qwen3-14b"),
    "coder15_128x8k": _long(_CODER, 128, 0, 768, context_length=8192),
    "coder15_64x16k": _long(_CODER, 64, 0, 768, context_length=16_384, num_contexts=16),
    "coder15_long": _long(_CODER, 128, 0, 8000, temperature=1.0),
}
