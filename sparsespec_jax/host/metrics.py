"""What decoding did: counts per request, their totals, and the byte model.

Conventions (the bonus token is the target's own token that ends every cycle):

* ``mean_acceptance_length`` counts the bonus token: 1 + accepted / verify steps;
* ``mean_accepted_draft_tokens`` does not: accepted / verify steps;
* per-position acceptance is unconditional: draft i accepted / verify steps;
* counts are verification's own, before a stop token or length limit cuts the
  output, and leave out seed verifications, which have no drafts to judge, and short
  cycles (after a change of k or of phase), which have fewer than the others;
* a guess is a token that a cascade looks up for a draft step to check; it is accepted
  if the step's own draft equals it and those before it held;
* a KV token is the K and V of one context token over all layers and KV heads.

Totals come as a ratio of sums and as a mean over requests; the first weighs long
requests more. Undefined ratios are NaN. No jax here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from sparsespec_jax.host.cost_model import ratio, speed_of_light

_LEAST_BUDGET = 8  # tokens that are worth a name as a floor


@dataclass(kw_only=True)
class KvTokens:
    """KV tokens moved for one request or many, by what moved them.

    Attention mass and selection are no KV and not counted; nor are the reads of steps
    that were under way when the host learned that a request had ended.
    """

    draft: int = 0  # read by draft steps
    verify: int = 0  # read by verifications; in plain decoding by every step
    prefill: int = 0  # read by prompt chunks and the seed verification
    gather: int = 0  # copied into draft caches: each is one read and one write

    @property
    def decode(self) -> int:
        """Tokens read and written after prefill: the traffic speculation changes."""
        return self.draft + self.verify + 2 * self.gather

    def __add__(self, other: KvTokens) -> KvTokens:
        return _add_fields(self, other)


@dataclass(kw_only=True)
class RequestMetrics:
    """Counts and times of one request; with ``+`` the counts and times of several.

    The engine creates one per request with ``max_draft_tokens=k``, calls
    ``record_verification`` once per verify step and adds to the other fields.
    """

    max_draft_tokens: int = 0  # k, drafts per cycle; 0 is plain decoding
    max_draft_steps: int | None = None  # draft steps per cycle; None: k
    num_requests: int = 1
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_draft_tokens: int = 0  # drafts that a verification judged
    num_short_steps: int = 0  # verify steps of fewer drafts than k, or at k = 0 of none
    accepted_histogram: list[int] = field(default_factory=list)
    # ^ [k + 1]: verify steps that accepted exactly i drafts, short ones left out
    num_draft_steps: int = 0  # that fed tokens for the drafts judged
    num_guesses: int = 0  # checked by those steps
    num_accepted_guesses: int = 0
    kv_tokens_read: KvTokens = field(default_factory=KvTokens)
    plain_kv_tokens: int = 0  # what plain decoding would read for the same output
    time_to_first_token_s: float = 0.0  # from submission
    total_time_s: float = 0.0  # submission to last token

    def __post_init__(self):
        missing = self.max_draft_tokens + 1 - len(self.accepted_histogram)
        self.accepted_histogram = list(self.accepted_histogram) + [0] * missing
        if self.max_draft_steps is None:
            self.max_draft_steps = self.max_draft_tokens

    def record_verification(
        self,
        *,
        num_accepted: int,
        num_drafted: int,
        num_draft_steps: int | None = None,
        num_guesses: int = 0,
    ) -> None:
        """Count one verify step that accepted `num_accepted` of `num_drafted`.

        `num_draft_steps` made the drafts (None: one each) and checked `num_guesses`.

        Raises:
            ValueError: not 0 <= num_accepted <= num_drafted <= max_draft_tokens.
        """
        if not 0 <= num_accepted <= num_drafted <= self.max_draft_tokens:
            raise ValueError(
                f"num_accepted ({num_accepted}) must be within num_drafted "
                f"({num_drafted}), and that within max_draft_tokens "
                f"({self.max_draft_tokens})"
            )
        self.accepted_histogram[num_accepted] += 1
        self.num_draft_tokens += num_drafted
        steps = num_drafted if num_draft_steps is None else num_draft_steps
        self.num_draft_steps += steps
        self.num_guesses += num_guesses
        self.num_accepted_guesses += num_drafted - steps if num_guesses else 0

    def finish(self, *, num_output_tokens: int) -> None:
        """Set the output length and what plain decoding would have read for it."""
        self.num_output_tokens = num_output_tokens
        self.plain_kv_tokens = plain_kv_tokens(
            num_prompt_tokens=self.num_prompt_tokens,
            num_output_tokens=num_output_tokens,
        )

    def __add__(self, other: RequestMetrics) -> RequestMetrics:
        return _add_fields(
            self,
            other,
            max_draft_tokens=max(self.max_draft_tokens, other.max_draft_tokens),
            max_draft_steps=max(self.max_draft_steps, other.max_draft_steps),
            accepted_histogram=_add_padded(
                self.accepted_histogram, other.accepted_histogram
            ),
        )

    @property
    def num_verify_steps(self) -> int:
        """Verify steps; in plain decoding every step after the first token."""
        return sum(self.accepted_histogram)

    @property
    def num_accepted_draft_tokens(self) -> int:
        """Drafts accepted, before a stop or limit cuts the output."""
        return sum(i * n for i, n in enumerate(self.accepted_histogram))

    @property
    def num_decode_tokens(self) -> int:
        """Output tokens after the first one of each request, which prefill gives."""
        return max(0, self.num_output_tokens - self.num_requests)

    @property
    def mean_accepted_draft_tokens(self) -> float:
        """Accepted drafts per verify step, 0..k, without the bonus token."""
        return ratio(self.num_accepted_draft_tokens, self.num_verify_steps)

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens per verify step, 1..k+1, with the bonus token."""
        return 1 + self.mean_accepted_draft_tokens

    @property
    def draft_acceptance_rate(self) -> float:
        """Accepted drafts over judged drafts."""
        return ratio(self.num_accepted_draft_tokens, self.num_draft_tokens)

    @property
    def steps_per_cycle(self) -> float:
        """Steps that fed tokens per verify step, that one included; 1..k+1."""
        return 1 + ratio(self.num_draft_steps, self.num_verify_steps)

    @property
    def guess_hit_rate(self) -> float:
        """Accepted guesses over checked ones; NaN without a cascade."""
        return ratio(self.num_accepted_guesses, self.num_guesses)

    @property
    def accepted_at_position(self) -> list[int]:
        """[k]: verify steps that accepted draft i (and so all before it)."""
        counts = self.accepted_histogram
        return [sum(counts[i:]) for i in range(1, len(counts))]

    @property
    def acceptance_at_position(self) -> list[float]:
        """[k]: ``accepted_at_position`` over verify steps; never increases."""
        steps = self.num_verify_steps
        return [ratio(n, steps) for n in self.accepted_at_position]

    @property
    def kv_read_ratio(self) -> float:
        """KV traffic over that of plain decoding for the same output; below 1 saves."""
        return ratio(self.kv_tokens_read.decode, self.plain_kv_tokens)

    @property
    def kv_tokens_per_output_token(self) -> float:
        """KV tokens moved per output token after the first."""
        return ratio(self.kv_tokens_read.decode, self.num_decode_tokens)

    def to_dict(self) -> dict:
        """Counters and derived values as JSON types; undefined ratios are None."""
        derived = (
            "num_verify_steps",
            "num_accepted_draft_tokens",
            "mean_acceptance_length",
            "mean_accepted_draft_tokens",
            "draft_acceptance_rate",
            "steps_per_cycle",
            "guess_hit_rate",
            "accepted_at_position",
            "acceptance_at_position",
            "kv_tokens_per_output_token",
            "kv_read_ratio",
        )
        values = dataclasses.asdict(self)
        return _json_safe(values | {name: getattr(self, name) for name in derived})

    @classmethod
    def from_dict(cls, values: dict) -> RequestMetrics:
        """The inverse of ``to_dict``; derived values are computed anew."""
        names = {f.name for f in dataclasses.fields(cls)}
        fields = {name: values[name] for name in values if name in names}
        fields["kv_tokens_read"] = KvTokens(**fields["kv_tokens_read"])
        return cls(**fields)


@dataclass(frozen=True, kw_only=True, repr=False)
class DecodeStats:
    """Totals of a run of the engine over its finished requests."""

    requests: tuple[RequestMetrics, ...]
    num_slots: int  # requests decoded at the same time
    num_steps: int  # compiled steps dispatched
    wall_time_s: float  # compilation excluded
    kv_bytes_per_token: int  # K and V of one token over all layers and KV heads
    weight_bytes: int  # weights that one step reads
    kv_usage: dict | None = None  # of the KV cache, as Engine.kv_usage at the end
    forced_acceptance: float | None = None  # mean asked for; then the text is lossy
    numerics: str = "fast"  # of the engine
    schedule: str = "mixed"  # of SpeculationConfig
    draft_weights: str | None = None  # likewise
    draft_weight_bytes: int | None = None  # that a step with such weights reads
    # Steps by the k that they were planned with.
    steps_by_num_draft_tokens: dict[int, int] = field(default_factory=dict)
    min_budget: int = 0  # tokens that a draft reads at least; 0 without a selection

    @property
    def total(self) -> RequestMetrics:
        """Sums over requests: its ratios are ratios of sums."""
        return sum_metrics(self.requests)

    def mean_over_requests(self, name: str) -> float:
        """Mean of a ratio of RequestMetrics over the requests where it is defined."""
        values = [getattr(request, name) for request in self.requests]
        values = [value for value in values if not math.isnan(value)]
        return ratio(sum(values), len(values))

    @property
    def tokens_per_s(self) -> float:
        """Output tokens per second of wall time."""
        return ratio(self.total.num_output_tokens, self.wall_time_s)

    @property
    def kv_bytes_per_output_token(self) -> float:
        """KV bytes moved per output token after the first of each request."""
        return self.total.kv_tokens_per_output_token * self.kv_bytes_per_token

    @property
    def speed_of_light(self) -> float:
        """Bound on the speed-up over plain decoding, with this run's own reads.

        All slots are taken as busy, which is the load the bound is meant for.
        """
        return self.speed_of_light_at(math.inf)

    def speed_of_light_at(self, balance_tokens: float) -> float:
        """`speed_of_light` where steps of more tokens are bound by arithmetic."""
        total = self.total
        drafts = total.max_draft_steps
        verify = total.kv_tokens_read.verify
        plain_step = ratio(total.plain_kv_tokens, total.num_decode_tokens)
        return speed_of_light(
            num_draft_tokens=drafts,
            mean_accepted_draft_tokens=total.mean_accepted_draft_tokens,
            weight_bytes=self.weight_bytes,
            kv_bytes=self.num_slots * plain_step * self.kv_bytes_per_token,
            budget_ratio=ratio(total.kv_tokens_read.draft, drafts * verify)
            if drafts
            else 0.0,
            overhead_ratio=ratio(2 * total.kv_tokens_read.gather, verify),
            num_slots=self.num_slots,
            balance_tokens=balance_tokens,
            is_aligned=self.schedule == "aligned",
            draft_weight_bytes=self.draft_weight_bytes,
        )

    @property
    def hint(self) -> str:
        """Why drafts save nothing where all they can read is read, and the way out.

        "" unless the floor of the budget covers most of the texts.
        """
        lengths = [r.num_prompt_tokens + r.num_output_tokens for r in self.requests]
        covered = [n for n in lengths if n <= self.min_budget]
        if not self.total.num_draft_tokens or 2 * len(covered) <= len(lengths):
            return ""
        of = f" of {len(covered)} of {len(lengths)} texts"
        less = 2 ** max(0, (max(covered) // 4).bit_length() - 1)
        return (
            f"drafts read the whole context{of * (len(covered) < len(lengths))}: "
            f"min_budget {self.min_budget} >= {max(covered)} tokens; use longer outputs"
            + (f" or min_budget={less}" if less >= _LEAST_BUDGET else "")
        )

    def __repr__(self):
        total = self.total
        drafts = ""
        if total.max_draft_tokens:
            drafts = (
                f", {total.mean_accepted_draft_tokens:.2f} of "
                f"{total.max_draft_tokens} drafts accepted"
            )
        return (
            f"{total.num_requests} requests, {total.num_output_tokens} tokens in "
            f"{self.wall_time_s:.2f} s ({self.tokens_per_s:.1f} tokens/s){drafts}"
            + (self.hint and f"\n{self.hint}")
        )

    def to_dict(self) -> dict:
        """Totals, means over requests and the byte model as JSON types."""
        means = (
            "mean_acceptance_length",
            "mean_accepted_draft_tokens",
            "draft_acceptance_rate",
            "kv_read_ratio",
        )
        scalars = (
            "numerics",
            "schedule",
            "draft_weights",
            "num_slots",
            "num_steps",
            "wall_time_s",
            "kv_bytes_per_token",
            "weight_bytes",
            "tokens_per_s",
            "kv_bytes_per_output_token",
            "speed_of_light",
            "forced_acceptance",
            "min_budget",
            "hint",
            "kv_usage",
        )
        values = {name: getattr(self, name) for name in scalars}
        steps = self.steps_by_num_draft_tokens  # JSON's keys are texts
        values["steps_by_num_draft_tokens"] = {str(k): n for k, n in steps.items()}
        values["total"] = self.total.to_dict()
        values["mean_over_requests"] = {m: self.mean_over_requests(m) for m in means}
        return _json_safe(values)


def sum_metrics(requests: Iterable[RequestMetrics]) -> RequestMetrics:
    """The sum of the requests' counts and times; of none, all zeros."""
    return sum(requests, start=RequestMetrics(num_requests=0))


def plain_kv_tokens(*, num_prompt_tokens: int, num_output_tokens: int) -> int:
    """KV tokens that plain decoding reads for the output after its first token.

    The first token comes with prefill; the step that emits output token i >= 1
    reads the prompt and the i tokens before it.
    """
    steps = max(0, num_output_tokens - 1)
    return steps * num_prompt_tokens + steps * (steps + 1) // 2


def _add_fields(left, right, **replaced):
    """A new record whose fields are sums, but for those in `replaced`."""
    names = [f.name for f in dataclasses.fields(left) if f.name not in replaced]
    sums = {name: getattr(left, name) + getattr(right, name) for name in names}
    return type(left)(**sums, **replaced)


def _add_padded(left: list[int], right: list[int]) -> list[int]:
    size = max(len(left), len(right))
    left, right = (x + [0] * (size - len(x)) for x in (left, right))
    return [a + b for a, b in zip(left, right, strict=True)]


def _json_safe(value):
    """`value` with NaN turned into None: strict JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _json_safe(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_safe(item) for item in value]
    if isinstance(value, float) and math.isnan(value):
        return None
    return value
