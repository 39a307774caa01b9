"""Frozen option records: how to sample, how to speculate, how to run the engine.

Every field is checked on construction; a wrong value raises ValueError naming the
field, the value and what would work. No jax here: the scheduler reads these too.
"""

import dataclasses
import math

ACCEPTORS = ("shared_noise", "ratio_test", "forced")
MASS_ROWS = ("all", "edges")
SCOPES = ("kv_head", "layer")
LOGPROBS = ("raw", "processed")
KV_POLICIES = ("offload", "recompute", "reserve", "oracle")
IMPLS = ("reference", "tpu", "gpu", "tpu_interpret", "gpu_interpret")
MAX_STOP_TOKEN_IDS = 8
MAX_INT = 2**31 - 1  # of what travels in int32


def _require(condition, message):
    if not condition:
        raise ValueError(message)


def _require_int(name, value, low, high=None):
    ok = isinstance(value, int) and not isinstance(value, bool)
    ok = ok and value >= low and (high is None or value <= high)
    bound = f">= {low}" if high is None else f"in [{low}, {high}]"
    _require(ok, f"{name} must be an integer {bound}, got {value!r}")


def _require_float(name, value, low, high, *, open_low=False):
    ok = isinstance(value, int | float) and not isinstance(value, bool)
    ok = ok and math.isfinite(value) and value <= high
    ok = ok and (value > low if open_low else value >= low)
    bracket = "(" if open_low else "["
    _require(ok, f"{name} must be in {bracket}{low}, {high}], got {value!r}")


def _require_choice(name, value, choices):
    _require(value in choices, f"{name} must be one of {choices}, got {value!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """The target's law for one request; identical in plain and speculative decoding.

    The law is built in this order: temperature, top-k, top-p (over what top-k left,
    renormalised), min-p (relative to the most likely token). Tokens tied with the
    last one kept are kept.
    """

    temperature: float = 1.0  # 0 is greedy, as is all below 1.2e-38; at most 10
    top_k: int = 0  # tokens kept; 0 keeps all
    top_p: float = 1.0  # probability kept, (0, 1]
    min_p: float = 0.0  # share of the top probability a token needs, [0, 1]
    seed: int = 0  # the noise is a function of (seed, sample, position, token)
    n: int = 1  # samples per prompt, each its own noise
    max_tokens: int = 256  # new tokens, >= 1
    stop: tuple[str, ...] = ()  # text that ends the output; cut from the text
    stop_token_ids: tuple[int, ...] = ()  # besides the model's EOS; kept in token_ids
    ignore_eos: bool = False  # go on past the model's EOS
    logprobs: str = "raw"  # of the model's logits ("raw") or of the law ("processed")

    def __post_init__(self):
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        _require_float("temperature", self.temperature, 0.0, 10.0)
        _require_int("top_k", self.top_k, 0)
        _require_float("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _require_float("min_p", self.min_p, 0.0, 1.0)
        _require_int("seed", self.seed, 0, 2**64 - 1)
        _require_int("n", self.n, 1)
        _require_int("max_tokens", self.max_tokens, 1)
        for text in self.stop:
            _require(
                isinstance(text, str) and text,
                f"stop must hold non-empty strings, got {text!r}",
            )
        for token in self.stop_token_ids:
            _require_int("stop_token_ids", token, 0)
        _require_choice("logprobs", self.logprobs, LOGPROBS)

    @property
    def filters(self):
        """True if top-k, top-p or min-p restricts the law."""
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpeculationConfig:
    """How the model drafts for itself and how drafts are accepted.

    `num_draft_tokens=0` is plain autoregressive decoding in the same engine.
    Defaults are the paper's (arXiv 2512.01278, section 5): k = 8, 5 % of the
    context, at least 192 tokens.
    """

    num_draft_tokens: int = 8  # k, drafts per cycle, 0..31
    draft_token_choices: tuple[int, ...] = ()  # smaller k that the engine may turn to
    budget_ratio: float = 0.05  # s, share of the context a draft reads, (0, 1]
    min_budget: int = 192  # tokens read at least (b_min)
    proposer: object = "self"  # who drafts: name in proposers.PROPOSERS, or an object
    policy: object = "pillar"  # name in selection.POLICIES, or a Policy
    acceptor: str = "shared_noise"  # or "ratio_test" (Leviathan et al., 2023), "forced"
    forced_acceptance: float | None = None  # with "forced": mean accepted drafts; lossy
    mass_rows: str = "all"  # verify rows whose attention counts: "all" or "edges"
    scope: str = "kv_head"  # one selection per KV head, or one per layer
    num_recent: int = 0  # newest committed tokens always selected
    num_sinks: int = 4  # first tokens always kept (window policy only)
    draft_top_m: int = 32  # ratio test: tokens of the draft's own law
    draft_steps: int | None = None  # cascade: steps that make k drafts; None: half of k
    num_guesses: int | None = None  # cascade: tokens looked up per step; None: 3

    def __post_init__(self):
        _require_int("num_draft_tokens", self.num_draft_tokens, 0, 31)
        choices = tuple(self.draft_token_choices)
        object.__setattr__(self, "draft_token_choices", choices)
        for choice in choices:
            _require_int("draft_token_choices", choice, 0, self.num_draft_tokens)
        _require_float("budget_ratio", self.budget_ratio, 0.0, 1.0, open_low=True)
        _require_int("min_budget", self.min_budget, 0)
        _require_choice("acceptor", self.acceptor, ACCEPTORS)
        _require(
            (self.acceptor == "forced") == (self.forced_acceptance is not None),
            "forced_acceptance goes with acceptor='forced' and with no other, got "
            f"{self.forced_acceptance!r} and {self.acceptor!r}",
        )
        if self.forced_acceptance is not None:
            drafts = self.num_draft_tokens
            _require_float("forced_acceptance", self.forced_acceptance, 0.0, drafts)
        _require_choice("mass_rows", self.mass_rows, MASS_ROWS)
        _require_choice("scope", self.scope, SCOPES)
        _require_int("num_recent", self.num_recent, 0)
        _require_int("num_sinks", self.num_sinks, 0)
        _require_int("draft_top_m", self.draft_top_m, 1)
        self._check_cascade()

    def _check_cascade(self):
        sizes = {"draft_steps": self.draft_steps, "num_guesses": self.num_guesses}
        sizes = {name: value for name, value in sizes.items() if value is not None}
        _require(
            self.is_cascade or not sizes,
            f"{' and '.join(sizes)} need proposer='cascade', got {self.proposer!r}",
        )
        if not self.is_cascade:
            return
        drafts = self.num_draft_tokens
        _require(
            drafts >= 2,
            f"proposer='cascade' needs num_draft_tokens >= 2, got {drafts}: a draft "
            "step has nothing to guess",
        )
        most = {"draft_steps": drafts, "num_guesses": drafts - 1}
        for name, value in sizes.items():
            _require_int(name, value, 1, most[name])

    @property
    def is_lossless(self):
        """False if the output need not follow the target's law."""
        return self.acceptor != "forced"

    @property
    def forced_probability(self):
        """Acceptance p of each draft with p + p^2 + .. + p^k = forced_acceptance."""
        if self.forced_acceptance is None:
            return None
        low, high = 0.0, 1.0
        for _ in range(50):
            p = (low + high) / 2
            mean = sum(p**i for i in range(1, self.num_draft_tokens + 1))
            low, high = (p, high) if mean < self.forced_acceptance else (low, p)
        return high

    @property
    def cycle(self):
        """Steps of a cycle: those that draft and one verification."""
        if self.is_cascade:
            return self.cascade_sizes[0] + 1
        return self.num_draft_tokens + 1 if self.proposer == "self" else 1

    @property
    def is_cascade(self):
        """True if draft steps check looked-up tokens (proposers.Cascade)."""
        return self.proposer == "cascade" or hasattr(self.proposer, "guesser")

    @property
    def cascade_sizes(self):
        """(draft steps of a cycle, guesses per step); (None, 0) if no cascade."""
        if not self.is_cascade:
            return None, 0
        drafts = self.num_draft_tokens
        return (
            self.draft_steps or -(-drafts // 2),
            self.num_guesses or min(3, drafts - 1),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Sizes of the engine. None of them changes an emitted token."""

    num_slots: int = 8  # requests decoded at the same time
    page_size: int = 16  # tokens per KV page; 64 on GPU
    num_pages: int | None = None  # pages per layer; None: what the slots can need
    max_length: int | None = None  # prompt + output tokens; None: model or prompts
    prefill_chunk: int = 128  # prompt tokens of one prefill lane and step
    prefill_lanes: int = 1  # prompts prefilled in the same step
    # Steps between dispatch and reading the outcome, 0..2. With 2 a thread of its own
    # dispatches beside planning: for models whose steps are as short as their launch.
    lag: int = 1
    # Where pages run short: spill to host memory, recompute, or never let it happen by
    # reserving the limit or (oracle) the length that add_request is told.
    kv_policy: str = "offload"
    host_pages: int | None = None  # taken in host memory; None: what slots can need
    host_chunk_pages: int = 16  # pages copied at a time
    impl: str | None = None  # kernels; None: the platform's own

    def __post_init__(self):
        _require_int("num_slots", self.num_slots, 1)
        _require_int("page_size", self.page_size, 1)
        if self.num_pages is not None:
            _require_int("num_pages", self.num_pages, 1)
        if self.max_length is not None:
            _require_int("max_length", self.max_length, 2)
        _require_int("prefill_chunk", self.prefill_chunk, 1)
        _require_int("prefill_lanes", self.prefill_lanes, 1)
        _require_int("lag", self.lag, 0, 2)
        _require_choice("kv_policy", self.kv_policy, KV_POLICIES)
        if self.host_pages is not None:
            _require_int("host_pages", self.host_pages, 0)
        _require_int("host_chunk_pages", self.host_chunk_pages, 1)
        if self.impl is not None:
            _require_choice("impl", self.impl, IMPLS)
