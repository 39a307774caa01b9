"""What a run shows: equality with plain decoding, the statistics and the table."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from sparsespec_jax.host.cost_model import token_forwards_per_token
from sparsespec_jax.host.metrics import DecodeStats, RequestMetrics

MODES = ("plain", "speculative")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Position-by-position equality of the speculative output with the plain one."""

    num_tokens: int  # output tokens of plain decoding
    num_identical: int  # of them, equal at the same place of the same prompt
    divergences: tuple[
        tuple[Any, int], ...
    ]  # (key of a text, first differing position)

    @property
    def is_identical(self) -> bool:
        """True if every output has the same tokens and the same length."""
        return not self.divergences


def compare(plain: dict[Any, list[int]], speculative: dict[Any, list[int]]):
    """Compare token ids by (prompt, sample); both must hold the same texts.

    Raises:
        ValueError: a prompt is missing on one side.
    """
    if plain.keys() != speculative.keys():
        odd = sorted(plain.keys() ^ speculative.keys())
        raise ValueError(f"prompts {odd} were decoded in one mode only")
    identical, divergences = 0, []
    for index in sorted(plain):
        left, right = plain[index], speculative[index]
        equal = [a == b for a, b in zip(left, right, strict=False)]
        identical += sum(equal)
        if left != right:
            divergences.append((index, (equal + [False]).index(False)))
    return Comparison(
        num_tokens=sum(map(len, plain.values())),
        num_identical=identical,
        divergences=tuple(divergences),
    )


def stats_of(records, *, like: DecodeStats) -> DecodeStats:
    """Totals of one mode's records over all sessions of a run.

    A session's time and steps are those at its last finished request, so work that
    an interruption threw away is counted up to there. What is not measured per
    request (slots, bytes of weights and KV) is taken from `like`.
    """
    ends = {}
    for r in records:
        steps, seconds = ends.get(r["session"], (0, 0.0))
        ends[r["session"]] = max(steps, r["step"]), max(seconds, r["elapsed_s"])
    return dataclasses.replace(
        like,
        requests=tuple(RequestMetrics.from_dict(r["metrics"]) for r in records),
        num_steps=sum(steps for steps, _ in ends.values()),
        wall_time_s=sum(seconds for _, seconds in ends.values()),
    )


def excerpt(item: dict, num_chars: int = 700) -> str:
    """The start of one record's text under a line that describes it."""
    text = _text_of(item)
    rest = len(text) - num_chars
    if rest > 0:
        text = f"{text[:num_chars]} ... ({rest} more characters)"
    return f"--- {_head(item)}, finish reason {item['finish_reason']} ---\n{text}"


def one_line(item: dict, num_chars: int = 60) -> str:
    """One record in a line: which it is, and how its text begins."""
    text = _text_of(item)
    text = text if len(text) <= num_chars else f"{text[:num_chars]} ..."
    return f"{_head(item)}: {text!r}"


def _text_of(item):
    return item["text"] if item["text"] is not None else str(item["token_ids"])


def _head(item):
    place = _named((item["index"], item.get("sample", 0)))
    return f"{place}, {len(item['token_ids'])} tokens"


def _named(key):
    """A text in words: its prompt, and its sample if that is not the first."""
    prompt, sample = key if isinstance(key, tuple) else (key, 0)
    return f"prompt {prompt}" + (f" sample {sample}" if sample else "")


def table(stats: dict[str, DecodeStats]) -> str:
    """The card of a run: one row per quantity, one column per mode."""

    def each(cell):
        return [cell(found) for found in stats.values()]

    rows = [
        ("", [*stats]),
        ("output tokens", each(lambda s: f"{s.total.num_output_tokens}")),
        ("engine steps", each(lambda s: f"{s.num_steps}")),
        ("tokens/s", each(lambda s: f"{s.tokens_per_s:.1f}")),
        ("acceptance length", each(lambda s: f"{s.total.mean_acceptance_length:.2f}")),
        (
            "  mean over requests",
            each(lambda s: f"{s.mean_over_requests('mean_acceptance_length'):.2f}"),
        ),
        ("KV read per token", each(_kv_per_token)),
    ]
    if len(stats) == len(MODES):
        rows += _gains(*(stats[mode] for mode in MODES))
    lines = [
        f"{name:<34} " + " ".join(f"{cell:>12}" for cell in cells)
        for name, cells in rows
    ]
    if "speculative" in stats:
        lines += ["", _acceptance_lines(stats["speculative"].total)]
        if hint := stats["speculative"].hint:
            lines.append(f"note: {hint}")
    return "\n".join(lines)


def _gains(plain, spec):
    """Rows of the table that compare both modes."""
    total = spec.total
    forwards = token_forwards_per_token(
        num_draft_tokens=total.max_draft_tokens,
        mean_accepted_draft_tokens=total.mean_accepted_draft_tokens,
    )
    speedup = spec.tokens_per_s / plain.tokens_per_s
    bound = spec.speed_of_light
    return [
        ("speed-up, measured", ["1.00", f"{speedup:.2f}"]),
        ("speed-up, bound by memory traffic", ["1.00", f"{bound:.2f}"]),
        ("  measured / bound", ["", f"{speedup / bound:.2f}"]),
        ("token forwards per token", ["1.00", f"{forwards:.2f}"]),
    ]


def closing_lines(
    comparison: Comparison, spec: DecodeStats, *, is_deterministic: bool
) -> str:
    """The last lines of a run: equality, acceptance, KV traffic."""
    total = spec.total
    same = f"{comparison.num_identical} of {comparison.num_tokens} tokens identical"
    lines = [f"{same} to plain decoding"]
    if comparison.divergences and is_deterministic:
        where = ", ".join(f"{_named(p)} token {t}" for p, t in comparison.divergences)
        lines.insert(0, f"NOT LOSSLESS: first differences at {where}")
    elif comparison.divergences:
        lines.append("(the ratio test keeps the law of the text, not its sample path)")
    drafts = total.max_draft_tokens
    lines.append(
        f"acceptance length {total.mean_acceptance_length:.2f} of {drafts + 1} "
        f"({total.mean_accepted_draft_tokens:.2f} of {drafts} drafts accepted)"
    )
    lines.append(f"KV bytes per token: {total.kv_read_ratio:.3f} of plain decoding")
    return "\n".join(lines)


def _kv_per_token(stats):
    return f"{stats.kv_bytes_per_output_token / 1e6:.2f} MB"


def _acceptance_lines(total):
    positions = " ".join(f"{p:.2f}" for p in total.acceptance_at_position)
    counts = " ".join(str(n) for n in total.accepted_histogram)
    return (
        f"drafts accepted, by position 1..{total.max_draft_tokens}: {positions}\n"
        f"verifications by drafts accepted, 0..{total.max_draft_tokens}: {counts}"
    )
