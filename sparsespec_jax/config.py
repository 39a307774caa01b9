"""Frozen option records: how to sample, how to speculate, how to run the engine.

Every field is checked on construction; a wrong value raises ValueError naming the
field, the value and what would work. Numbers of numpy or jax become Python's own, so
that equal records are equal, hash alike and can be written as JSON. No jax here: the
scheduler reads these too.
"""

import dataclasses
from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from sparsespec_jax.models.option_fields import (
    put_biases,
    put_choice,
    put_flag,
    put_float,
    put_int,
    put_ints,
    put_texts,
    require,
)

ACCEPTORS = ("shared_noise", "ratio_test", "forced")
MASS_ROWS = ("all", "edges")
SCOPES = ("kv_head", "layer")
LOGPROBS = ("raw", "processed")
NUMERICS = ("exact", "fast")
AUTO = "auto"  # chosen for model, device and load: host/automatic.py
SCHEDULES = ("mixed", "aligned", AUTO)
DRAFT_WEIGHTS = (None, "int8", AUTO)
KV_POLICIES = ("offload", "recompute", "reserve", "oracle")
IMPLS = ("reference", "tpu", "gpu", "tpu_interpret", "gpu_interpret")
_LEAST_RATIO = 1e-30  # times a length, no device rounds it to 0
_LARGEST_BIAS = 100.0  # OpenAI's and vLLM's
_REPETITION = 0.01, 100.0  # no device rounds a product or quotient to 0 or infinity


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """The target's law for one request; identical in plain and speculative decoding.

    Logits become a law in this order, which is that of vLLM (the docstring of `Sampler`
    in vllm/v1/sample/sampler.py), as are the definitions (vllm/sampling_params.py); the
    logits processors of these names in transformers define them alike:

    1. `logit_bias` is added. All tokens but `allowed_token_ids` are excluded, and the
       last token of a bad word where the output ends in those before it, and before
       the output has `min_tokens` tokens the model's EOS and `stop_token_ids`
       (`ignore_eos` or not; stop strings end a text at any length).
    2. `repetition_penalty` r: a positive logit of a token of prompt or output is
       divided by r, another one multiplied.
    3. `frequency_penalty` times the token's count in the output is subtracted,
    4. `presence_penalty` if it is in the output at all.
    5. Temperature, top-k, top-p (over what top-k left, renormalised), min-p (relative
       to the most likely token; vLLM has it before top-k). Tokens tied with the last
       one kept are kept.

    As in vLLM, a bad word is looked for as it stands and with a space in front if it
    has as many tokens then and another first one; several tokens count if all are of
    the output. `bad_words` need a tokenizer.

    With `prompt_logprobs=k` results tell of the prompt's own tokens: `prompt_logprobs`
    has the log-probability of each, of the model's logits whatever `logprobs` says, and
    `prompt_top_logprobs` the k likeliest tokens in its place. The first token has none.
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
    top_logprobs: int = 0  # likeliest tokens told with each token, as `logprobs` says
    prompt_logprobs: int | None = None  # of the prompt's tokens, raw; k beside each
    min_tokens: int = 0  # new tokens before a stop token may come, <= max_tokens
    presence_penalty: float = 0.0  # [-2, 2]
    frequency_penalty: float = 0.0  # [-2, 2]
    repetition_penalty: float = 1.0  # [0.01, 100]; 1 is none
    # Token id -> [-100, 100]; kept as pairs, so that records can be compared.
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None  # None allows all
    bad_words: tuple[str, ...] = ()  # texts that never come, each of any token count

    def __post_init__(self):
        put_float(self, "temperature", 0.0, 10.0)
        put_int(self, "top_k", 0, None)
        put_float(self, "top_p", 0.0, 1.0, open_low=True)
        put_float(self, "min_p", 0.0, 1.0)
        put_int(self, "seed", 0, 2**64 - 1)
        put_int(self, "n", 1)
        put_int(self, "max_tokens", 1)
        put_texts(self, "stop")
        put_ints(self, "stop_token_ids", 0)
        put_flag(self, "ignore_eos")
        put_choice(self, "logprobs", LOGPROBS)
        put_int(self, "top_logprobs", 0)
        if self.prompt_logprobs is not None:
            put_int(self, "prompt_logprobs", 0)
        put_int(self, "min_tokens", 0)
        require(
            self.min_tokens <= self.max_tokens,
            f"min_tokens must be at most max_tokens={self.max_tokens}, got "
            f"{self.min_tokens}",
        )
        put_float(self, "presence_penalty", -2.0, 2.0)
        put_float(self, "frequency_penalty", -2.0, 2.0)
        put_float(self, "repetition_penalty", *_REPETITION)
        put_biases(self, "logit_bias", _LARGEST_BIAS)
        if self.allowed_token_ids is not None:
            put_ints(self, "allowed_token_ids", 0)
            some = "allowed_token_ids must hold a token id; None allows all, got ()"
            require(self.allowed_token_ids, some)
        put_texts(self, "bad_words")

    @property
    def filters(self):
        """True if top-k, top-p or min-p restricts the law."""
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0

    @property
    def penalties(self):
        """True if the law depends on which tokens came before."""
        added = self.presence_penalty or self.frequency_penalty
        return bool(added) or self.repetition_penalty != 1.0

    @property
    def edits(self):
        """True if logits are changed before temperature: steps 1 to 4 of the law."""
        lists = self.logit_bias, self.bad_words, self.allowed_token_ids
        return bool(any(lists) or self.min_tokens or self.penalties)


@runtime_checkable
class HasGuesser(Protocol):
    """A proposer whose guesses the model checks in its draft steps (a Cascade)."""

    guesser: object


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpeculationConfig:
    """How the model drafts for itself and how drafts are accepted.

    `num_draft_tokens=0` is plain autoregressive decoding in the same engine. "auto" is
    chosen as `host.automatic.settled` says; an Engine's `speculation` has what it is.
    Defaults are the paper's (arXiv 2512.01278, section 5): k = 8, 5 % of the
    context, at least 192 tokens.
    """

    # k, drafts per cycle, 0..31. "auto": of a few, the one that is fastest by the times
    # of steps on this device and by the drafts accepted so far, every few steps anew.
    num_draft_tokens: int | str = 8
    draft_token_choices: tuple[int, ...] = ()  # smaller k that the engine may turn to
    budget_ratio: float = 0.05  # s, share of the context a draft reads, (0, 1]
    min_budget: int = 192  # tokens read at least (b_min)
    proposer: object = "self"  # who drafts: a name of proposers.base, or an object
    policy: object = "pillar"  # a name of policies.select, or a Policy
    # "mixed": each step drafts for some slots and verifies others. "aligned": one step
    # is a cycle of all slots, and prompt chunks have steps of their own. A proposer
    # that drafts at once verifies every slot in every step, whichever it is. "auto":
    # aligned if drafts have weights of their own.
    schedule: str = "mixed"
    # "int8": drafts by weights in 8 bits, one scale for each output, made of the
    # model's and kept beside them. Needs aligned steps: a mixed one reads all anyway.
    # "auto": where their kernel runs and the memory has room.
    draft_weights: str | None = None
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
        if self.chooses_k:
            self._check_auto()
        else:
            put_int(self, "num_draft_tokens", 0, 31)
            put_ints(self, "draft_token_choices", 0, self.num_draft_tokens)
        put_float(self, "budget_ratio", _LEAST_RATIO, 1.0)
        put_int(self, "min_budget", 0)
        put_choice(self, "schedule", SCHEDULES)
        self._check_draft_weights()
        put_choice(self, "acceptor", ACCEPTORS)
        require(
            (self.acceptor == "forced") == (self.forced_acceptance is not None),
            "forced_acceptance goes with acceptor='forced' and with no other, got "
            f"{self.forced_acceptance!r} and {self.acceptor!r}",
        )
        if self.forced_acceptance is not None:
            put_float(self, "forced_acceptance", 0.0, float(self.num_draft_tokens))
        put_choice(self, "mass_rows", MASS_ROWS)
        put_choice(self, "scope", SCOPES)
        put_int(self, "num_recent", 0)
        put_int(self, "num_sinks", 0)
        put_int(self, "draft_top_m", 1)
        self._check_cascade()

    def _check_auto(self):
        """ValueError for options that mean nothing without a number of drafts."""
        needs_k = {
            "draft_token_choices": self.draft_token_choices,
            "acceptor='forced'": self.acceptor == "forced",
            "proposer='cascade'": self.is_cascade,
        }
        for name, is_given in needs_k.items():
            require(
                not is_given,
                f"{name} needs a number of drafts, num_draft_tokens is {AUTO!r}",
            )

    def _check_draft_weights(self):
        if self.draft_weights is None:
            return
        put_choice(self, "draft_weights", DRAFT_WEIGHTS[1:])
        if self.draft_weights == AUTO:
            return
        require(
            self.schedule != "mixed",
            f"draft_weights={self.draft_weights!r} need schedule='aligned': a mixed "
            "step verifies too, and reads the full weights anyway",
        )
        require(
            self.proposer == "self" or self.is_cascade,
            f"draft_weights={self.draft_weights!r} are for drafts of the model itself, "
            f"proposer={self.proposer!r} makes its own: use proposer='self'",
        )

    def _check_cascade(self):
        sizes = {"draft_steps": self.draft_steps, "num_guesses": self.num_guesses}
        sizes = {name: value for name, value in sizes.items() if value is not None}
        require(
            self.is_cascade or not sizes,
            f"{' and '.join(sizes)} need proposer='cascade', got {self.proposer!r}",
        )
        if not self.is_cascade:
            return
        drafts = self.num_draft_tokens
        require(
            drafts >= 2,
            f"proposer='cascade' needs num_draft_tokens >= 2, got {drafts}: a draft "
            "step has nothing to guess",
        )
        most = {"draft_steps": drafts, "num_guesses": drafts - 1}
        for name in sizes:
            put_int(self, name, 1, most[name])

    @property
    def chooses_k(self):
        """True if the number of drafts is left to the engine."""
        return isinstance(self.num_draft_tokens, str) and self.num_draft_tokens == AUTO

    @property
    def all_draft_tokens(self):
        """Every k that an engine may run with, ascending."""
        return tuple(sorted({*self.draft_token_choices, self.num_draft_tokens}))

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
        return self.proposer == "cascade" or isinstance(self.proposer, HasGuesser)

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
    # "exact": the bits of a token's logits and KV row depend on its own text alone, so
    # speculative and plain text are equal in bfloat16 too (docs/exactness.md).
    numerics: str = "fast"
    tensor_parallel: int = 1  # devices that share the model (docs/devices.md)

    def __post_init__(self):
        put_choice(self, "numerics", NUMERICS)
        put_int(self, "tensor_parallel", 1)
        put_int(self, "num_slots", 1)
        put_int(self, "page_size", 1)
        if self.num_pages is not None:
            put_int(self, "num_pages", 1)
        if self.max_length is not None:
            put_int(self, "max_length", 2)
        put_int(self, "prefill_chunk", 1)
        put_int(self, "prefill_lanes", 1)
        put_int(self, "lag", 0, 2)
        put_choice(self, "kv_policy", KV_POLICIES)
        if self.host_pages is not None:
            put_int(self, "host_pages", 0)
        put_int(self, "host_chunk_pages", 1)
        if self.impl is not None:
            put_choice(self, "impl", IMPLS)
