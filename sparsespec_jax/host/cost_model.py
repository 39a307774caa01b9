"""When not to speculate: the number of drafts that the measured step times favour.

A step of every k is timed once per device at a few context lengths. In between, its
time is taken as linear in the context tokens over all slots: weights, launches and
sampling do not depend on them, the KV cache read does. No step is shorter than what the
host does for it, which the engine measures as it runs. Tokens per second then follow
from the acceptance seen so far, and k = 0 is one of the choices. The speed of light,
the bound by bytes alone, stands beside it. No jax.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

_PRIOR = 0.8  # acceptance of a draft, given the drafts before it, before any is judged


@dataclasses.dataclass(frozen=True)
class CostModel:
    """Measured seconds of a step, by k.

    `steps[k]` holds pairs of context tokens (all slots) and seconds, by tokens. Where
    one step `runs_cycles`, as aligned ones do, they are of 1 / (k + 1) of it.

    Raises:
      ValueError: a k without two different context sizes.
    """

    steps: dict[int, tuple[tuple[float, float], ...]]
    runs_cycles: bool = False

    def __post_init__(self):
        for k, points in self.steps.items():
            tokens = [t for t, _ in points]
            if len(points) < 2 or tokens != sorted(set(tokens)):
                raise ValueError(
                    f"steps[{k}] is {points}: give at least two pairs of (context "
                    "tokens, seconds), by increasing tokens"
                )

    def seconds(self, k: int, context_tokens: float) -> float:
        """Time of one step at `context_tokens` over all slots."""
        tokens, times = np.array(self.steps[k]).T
        if context_tokens > tokens[-1]:
            slope = (times[-1] - times[-2]) / (tokens[-1] - tokens[-2])
            return float(times[-1] + slope * (context_tokens - tokens[-1]))
        return float(np.interp(context_tokens, tokens, times))

    def tokens_per_s(
        self, k, *, num_running, context_tokens, acceptance, host_seconds=0.0
    ) -> float:
        """Expected rate with k drafts.

        `acceptance` holds the share of drafts accepted by position, NaN where unknown;
        `host_seconds` is what the host needs for a step.
        """
        committed = 1.0 + accepted_drafts(acceptance, k)
        cycle = (k + 1) * self.seconds(k, context_tokens)
        cycle = max(cycle, host_seconds * (1 if self.runs_cycles else k + 1))
        return num_running * committed / cycle


def accepted_drafts(acceptance, k: int) -> float:
    """Expected accepted drafts of k, from shares by position, NaN where unknown.

    An unknown position takes the mean conditional acceptance of the known ones.
    """
    known = [share for share in acceptance if not math.isnan(share)]
    if not known:
        conditional = _PRIOR
    elif known[-1] <= 0.0:
        conditional = 0.0
    else:
        conditional = known[-1] ** (1 / len(known))
    total, share = 0.0, 1.0
    for position in range(k):
        share = known[position] if position < len(known) else share * conditional
        total += share
    return total


def speed_of_light(
    *,
    num_draft_tokens: int,
    mean_accepted_draft_tokens: float,
    weight_bytes: float,
    kv_bytes: float,
    budget_ratio: float,
    overhead_ratio: float | None = None,
    num_slots: int = 1,
    balance_tokens: float = math.inf,
    is_aligned: bool = False,
    draft_weight_bytes: float | None = None,
) -> float:
    """Bound on the speed-up over plain decoding when every step is bound by memory.

    A plain step reads the weights W and the caches KV of all slots and commits one
    token per slot. A cycle of k draft steps and one verification reads
    (k + 1) W + (k s + 1 + m) KV and commits a + 1, so the bound is
    (a + 1) (W + KV) / ((k + 1) W + (k s + 1 + m) KV).

    A step of more than `balance_tokens` is bound by arithmetic instead, and its W
    counts as more: a plain step has S tokens, one of a cycle S (2k + 1) / (k + 1).
    Aligned, k of a cycle have S and read the weights of drafts, the last S (k + 1).

    Args:
        num_draft_tokens: k; of a proposer or a cascade the draft steps of a cycle.
        mean_accepted_draft_tokens: a, without the bonus token.
        weight_bytes: W, read once per step whatever the number of slots.
        kv_bytes: KV, what one plain step reads over all slots.
        budget_ratio: s, share of the cache that a draft step reads.
        overhead_ratio: m, share of the cache moved by mass, selection and gather;
            None is a gather's read and write, 2 s (0 without drafts).
        num_slots: S, requests of a step.
        balance_tokens: tokens whose products with all weights take as long as reading
            these.
        is_aligned: whether drafts and verifications have steps of their own.
        draft_weight_bytes: what an aligned draft step reads of weights; None: W.
    """
    k, s = num_draft_tokens, budget_ratio
    m = (2 * s if k else 0.0) if overhead_ratio is None else overhead_ratio

    def weights(tokens):
        return weight_bytes * max(1.0, tokens / balance_tokens)

    if is_aligned:
        share = (draft_weight_bytes or weight_bytes) / weight_bytes
        # The products take as long, whatever the weights are read as.
        draft = weights(num_slots) * max(share, min(1.0, num_slots / balance_tokens))
        all_weights = k * draft + weights(num_slots * (k + 1))
    else:
        all_weights = (k + 1) * weights(num_slots * (2 * k + 1) / (k + 1))
    cycle_bytes = all_weights + (k * s + 1 + m) * kv_bytes
    committed = mean_accepted_draft_tokens + 1
    return ratio(committed * (weights(num_slots) + kv_bytes), cycle_bytes)


def token_forwards_per_token(
    *, num_draft_tokens: int, mean_accepted_draft_tokens: float
) -> float:
    """Token forwards per committed token, (2k + 1) / (a + 1): the compute side.

    Where a step is bound by arithmetic instead of memory, speculation multiplies
    the work by this.
    """
    return (2 * num_draft_tokens + 1) / (mean_accepted_draft_tokens + 1)


def ratio(numerator: float, denominator: float) -> float:
    """The quotient; NaN by 0."""
    return numerator / denominator if denominator else math.nan


class Chooser:
    """Picks k for an Engine (`choose_num_draft_tokens`); leaves one only for a gain.

    A switch idles up to a cycle, so another k must promise `margin` more.
    """

    def __init__(self, cost_model: CostModel, *, margin: float = 0.03):
        self.cost_model = cost_model
        self.margin = margin
        self.current = max(cost_model.steps)
        self._host_seconds = 0.0  # of a step, the least seen: others had more to do

    def __call__(
        self, *, num_running, context_tokens, acceptance, host_seconds=0.0
    ) -> int:
        """The k to go on with.

        Args:
          num_running: requests in slots.
          context_tokens: theirs, prompt and output.
          acceptance: share of recent drafts accepted by position, a tuple of k floats,
            NaN where unknown.
          host_seconds: processor time that the host's busiest thread needed for a step
            since the last call.
        """
        seen = [s for s in (self._host_seconds, host_seconds) if s > 0.0]
        self._host_seconds = min(seen, default=0.0)
        if num_running:
            load = dict(
                num_running=num_running,
                context_tokens=context_tokens,
                acceptance=acceptance,
                host_seconds=self._host_seconds,
            )
            rates = {
                k: self.cost_model.tokens_per_s(k, **load)
                for k in self.cost_model.steps
            }
            best = max(rates, key=rates.get)
            if rates[best] > (1 + self.margin) * rates[self.current]:
                self.current = best
        return self.current
