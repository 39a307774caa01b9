"""Options of drafting, of decoding and of the generate experiment: frozen records."""

from __future__ import annotations

import json
from dataclasses import dataclass

from experiments.equality import MODES
from experiments.models import DTYPES
from experiments.options import Options, option
from sparsespec_jax.config import (
    AUTO,
    DRAFT_WEIGHTS,
    KV_POLICIES,
    NUMERICS,
    SCHEDULES,
    EngineConfig,
    SamplingParams,
    SpeculationConfig,
)
from sparsespec_jax.policies.select import resolve_policy

_KV_POLICIES = tuple(p for p in KV_POLICIES if p != "oracle")  # it must know lengths


@dataclass(frozen=True, kw_only=True)
class Drafting(Options):
    """How much is drafted, where nothing else of drafting is asked."""

    num_draft_tokens: int = option(8, "Drafts per cycle.", at_least=1)
    budget_ratio: float = option(0.05, "Share of the context that a draft reads.")
    min_budget: int = option(0, "Tokens that a draft reads at least.", at_least=0)

    def speculation(self, *, is_plain=False) -> SpeculationConfig:
        """SpeculationConfig of these, or of plain decoding."""
        if is_plain:
            return SpeculationConfig(num_draft_tokens=0)
        return SpeculationConfig(
            num_draft_tokens=self.num_draft_tokens,
            budget_ratio=self.budget_ratio,
            min_budget=self.min_budget,
        )


@dataclass(frozen=True, kw_only=True)
class Decoding(Options):
    """A model, a law and how to draft; every field is also a command-line flag.

    Raises:
        ValueError: a value is out of range; the message names it.
    """

    model: str = option("smollm2")
    dtype: str = option("float32", "Type of weights and KV.", choices=DTYPES)
    chat: bool = option(True, "Wrap text prompts as the user turn of a chat.")
    chat_template_kwargs: str = option(
        "", 'Of chats: a JSON object such as {"enable_thinking": false}.'
    )

    temperature: float = option(0.65, "0 is greedy.")
    top_k: int = option(0, "Tokens kept by top-k; 0 keeps all.")
    top_p: float = option(1.0, "Probability kept by top-p.")
    min_p: float = option(0.0, "Share of the top probability a token needs.")
    max_tokens: int = option(384, "New tokens per prompt at most.")
    ignore_eos: bool = option(False, "Go on past the model's end of text.")
    seed: int = option(0, "Of all noise.")
    n: int = option(1, "Samples per prompt, each its own noise.", at_least=1)
    stop: tuple[str, ...] = option(
        (), "Text that ends an output; once for each: --stop=A --stop=B.", kind=list
    )

    num_draft_tokens: int = option(8, "Drafts per cycle, k; at least 1.")
    chooses_k: bool = option(
        False, "Let the engine choose k by times of its steps, on a GPU or TPU."
    )
    budget_ratio: float = option(0.05, "Share of the context that a draft reads.")
    # The paper's floor of 192 tokens is for contexts of many thousands; at the few
    # hundred tokens of the built-in prompts it would make most drafts dense.
    min_budget: int = option(64, "Tokens that a draft reads at least.")
    schedule: str = option("mixed", "Of drafts.", choices=SCHEDULES)
    draft_weights: str | None = option(
        None, "Weights that draft, beside the model's.", choices=DRAFT_WEIGHTS
    )
    policy: str = option("pillar", "Selection policy.")
    acceptor: str = option("shared_noise", "shared_noise or ratio_test.")
    mass_rows: str = option("all", "Verify rows whose attention counts: all or edges.")
    scope: str = option("kv_head", "One selection per kv_head or per layer.")

    num_slots: int = option(4, "Requests decoded at the same time.")
    page_size: int = option(16, "Tokens per KV page.")
    prefill_chunk: int = option(64, "Prompt tokens prefilled per step.")
    lag: int = option(1, "Steps between dispatch and reading the outcome, 0 to 2.")
    kv_policy: str = option(
        "offload", "When the KV cache is full.", choices=_KV_POLICIES
    )
    impl: str = option("", "Kernels: reference, tpu or gpu; empty: the platform's.")
    numerics: str = option("fast", "Of the engine.", choices=NUMERICS)
    tensor_parallel: int = option(1, "Devices that share the model.")

    def __post_init__(self):
        """Build the option records once, so that each checks its own fields."""
        super().__post_init__()
        if self.num_draft_tokens < 1:
            raise ValueError(
                f"num_draft_tokens must be at least 1, got {self.num_draft_tokens}: "
                "plain decoding (0) is always run as the comparison"
            )
        self.law(self.seed), self.speculation("speculative"), self.engine()
        self.template_variables()
        resolve_policy(self.policy)

    def template_variables(self) -> dict:
        """Chat-template variables of every chat; ValueError if they are no object."""
        try:
            found = json.loads(self.chat_template_kwargs or "{}")
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise ValueError(
                "chat_template_kwargs must be a JSON object such as "
                f'{{"enable_thinking": false}}, got {self.chat_template_kwargs!r}'
            )
        return found

    def law(self, seed: int) -> SamplingParams:
        """The law of a prompt with this seed."""
        return SamplingParams(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            seed=seed,
            n=self.n,
            stop=self.stop,
            max_tokens=self.max_tokens,
            ignore_eos=self.ignore_eos,
        )

    def speculation(self, mode: str) -> SpeculationConfig:
        """How to draft in `mode`: "plain" or "speculative"."""
        if mode == "plain":
            return SpeculationConfig(num_draft_tokens=0)
        return SpeculationConfig(
            num_draft_tokens=AUTO if self.chooses_k else self.num_draft_tokens,
            budget_ratio=self.budget_ratio,
            min_budget=self.min_budget,
            schedule=self.schedule,
            draft_weights=self.draft_weights,
            policy=self.policy,
            acceptor=self.acceptor,
            mass_rows=self.mass_rows,
            scope=self.scope,
        )

    def engine(self, max_length: int | None = None) -> EngineConfig:
        """Sizes of the engine for requests of up to `max_length` tokens."""
        return EngineConfig(
            num_slots=self.num_slots,
            page_size=self.page_size,
            prefill_chunk=self.prefill_chunk,
            lag=self.lag,
            kv_policy=self.kv_policy,
            max_length=max_length,
            impl=self.impl or None,
            numerics=self.numerics,
            tensor_parallel=self.tensor_parallel,
        )

    @property
    def is_deterministic(self) -> bool:
        """True if both modes must give the same tokens.

        The ratio test keeps the law of the output but not the sampled path.
        """
        return self.acceptor == "shared_noise" or self.temperature == 0


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(Decoding):
    """What to decode and how.

    Raises:
        ValueError: a value is out of range; the message names it.
    """

    prompts: str = option("", "A .txt or .jsonl file; empty: built-in problems.")
    num_prompts: int = option(0, "Only the first so many; 0: all.", at_least=0)
    mode: str = option("both", "Which decoding.", choices=(*MODES, "both"))
    seed: int = option(0, "Prompt i samples with seed + i.")
    journal_seconds: float = option(
        1.0,
        "Time between two syncs of what requests have emitted.",
        at_least=0,
        is_recorded=False,
    )
    quiet: bool = option(False, "One line of each text, no more.", is_recorded=False)

    @property
    def modes(self) -> tuple[str, ...]:
        """The modes to decode in."""
        return MODES if self.mode == "both" else (self.mode,)

    def sampling(self, index: int) -> SamplingParams:
        """The law of prompt `index`, the same in both modes."""
        return self.law(self.seed + index)
