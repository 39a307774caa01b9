"""What decoding returns: one record per sample, and the events of a stream."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

from sparsespec_jax.host.cost_model import ratio
from sparsespec_jax.host.metrics import DecodeStats, RequestMetrics
from sparsespec_jax.host.text import OutputText

FINISH_REASONS = ("stop", "length", "cancelled", "error")
_PLAIN_FIELDS = (
    "request_id", "prompt_index", "sample_index", "finish_reason", "stop_reason",
)  # fmt: skip
_LISTS = (
    "prompt_token_ids", "token_ids", "logprobs", "top_logprobs", "prompt_logprobs",
    "prompt_top_logprobs",
)  # fmt: skip
_COLUMNS = (  # of the metrics
    "num_prompt_tokens", "num_output_tokens", "mean_acceptance_length",
    "mean_accepted_draft_tokens", "kv_read_ratio", "time_to_first_token_s",
    "total_time_s",
)  # fmt: skip
_SHOWN = 3  # results in the repr of many


def _shortened(text, most=60):
    return text if len(text) <= most else f"{text[: most - 4]} ..."


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class DecodeResult:
    """One finished sample.

    `token_ids` and `logprobs` have equal length and hold the new tokens only, the
    stop token included. So has `top_logprobs`, unless it was not asked for: of each
    token's place the likeliest tokens as (token id, log-probability), best first.
    """

    request_id: int
    prompt_index: int  # index into the prompts given
    sample_index: int  # 0 .. n - 1
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]  # of the target, natural logarithm
    finish_reason: str  # one of FINISH_REASONS
    stop_reason: int | str | None  # the stop token id or stop string
    metrics: RequestMetrics
    params_versions: tuple[tuple[int, int], ...]  # (version, tokens it gave), in order
    output_text: OutputText | None = dataclasses.field(compare=False)
    # The token itself may not be among them; tokens that the law excludes are not.
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] = ()
    # Of each token of the prompt, () if not asked for; of a cancelled request those
    # that were known. The first token has None, and () of likeliest ones.
    prompt_logprobs: tuple[float | None, ...] = ()
    prompt_top_logprobs: tuple[tuple[tuple[int, float], ...], ...] = ()

    @functools.cached_property
    def text(self) -> str | None:
        """The text of `token_ids`, decoded when first asked for.

        Ends before a stop string or a stop token; None without a tokenizer. The same
        whether the output was streamed or not.
        """
        if self.output_text is None:  # it came without one, out of a pickle
            return None
        is_stopped = isinstance(self.stop_reason, int)
        return self.output_text.finish(self.token_ids[: -1 if is_stopped else None])

    def to_dict(self) -> dict:
        """All of it as JSON types, the text first."""
        values = {"text": self.text}
        values |= {name: getattr(self, name) for name in _PLAIN_FIELDS}
        lists = {name: list(getattr(self, name)) for name in _LISTS}
        versions = [list(item) for item in self.params_versions]
        metrics = self.metrics.to_dict()
        return values | lists | {"params_versions": versions, "metrics": metrics}

    def to_row(self) -> dict:
        """What a table has of it: one value a column, JSON types."""
        values = {"text": self.text}
        values |= {name: getattr(self, name) for name in _PLAIN_FIELDS}
        metrics = self.metrics.to_dict()
        values |= {name: metrics[name] for name in _COLUMNS}
        told = [x for x in self.prompt_logprobs if x is not None]
        return values | {
            "mean_logprob": ratio(sum(self.logprobs), len(self.logprobs)),
            "mean_prompt_logprob": ratio(sum(told), len(told)) if told else None,
        }

    def __repr__(self):
        shown = self.token_ids[:8] if self.text is None else self.text
        return (
            f"DecodeResult({_shortened(repr(shown))}, {len(self.token_ids)} tokens, "
            f"finish_reason={self.finish_reason!r}, prompt_index={self.prompt_index}, "
            f"sample_index={self.sample_index})"
        )

    def __getstate__(self):
        """Everything but the tokenizer: the text is decoded now."""
        return vars(self) | {"text": self.text, "output_text": None}


class DecodeResults(Sequence):
    """Results in submission order (all samples of a prompt together) and totals."""

    def __init__(self, results, stats: DecodeStats):
        self._results = tuple(results)
        self.stats = stats

    def __len__(self):
        return len(self._results)

    def __getitem__(self, index):
        return self._results[index]

    def to_dict(self) -> dict:
        """All results and the totals as JSON types."""
        return {
            "results": [result.to_dict() for result in self],
            "stats": self.stats.to_dict(),
        }

    def to_rows(self) -> list[dict]:
        """A row a sample, as `pandas.DataFrame` takes them."""
        return [result.to_row() for result in self]

    def __repr__(self):
        first = "".join(f"\n  {result!r}" for result in self[:_SHOWN])
        more = f"\n  and {len(self) - _SHOWN} more" if len(self) > _SHOWN else ""
        return f"DecodeResults: {self.stats!r}{first}{more}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RequestProgress:
    """How far an unfinished request is; what an engine needs to go on with it."""

    request_id: int
    prompt_index: int
    sample_index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    params_versions: tuple[tuple[int, int], ...]
    metrics: RequestMetrics
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] = ()


class StreamEvent(NamedTuple):
    """New output of one request; the last one carries the finish reason.

    The texts of all events of a request make the text of its result. Text that later
    tokens could change or cut comes with them, at the latest with the last event.
    """

    request_id: int
    new_token_ids: tuple[int, ...]
    new_text: str  # what these tokens made certain; "" without a tokenizer
    finish_reason: str | None
