"""What decoding returns: one record per sample, and the events of a stream."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

from sparsespec_jax.host.metrics import DecodeStats, RequestMetrics
from sparsespec_jax.host.text import OutputText

FINISH_REASONS = ("stop", "length", "cancelled", "error")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeResult:
    """One finished sample.

    `token_ids` and `logprobs` have equal length and hold the new tokens only, the
    stop token included.
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
    output_text: OutputText = dataclasses.field(repr=False, compare=False)

    @functools.cached_property
    def text(self) -> str | None:
        """The text of `token_ids`, decoded when first asked for.

        Ends before a stop string or a stop token; None without a tokenizer. The same
        whether the output was streamed or not.
        """
        is_stopped = isinstance(self.stop_reason, int)
        return self.output_text.finish(self.token_ids[: -1 if is_stopped else None])


class DecodeResults(Sequence):
    """Results in submission order (all samples of a prompt together) and totals."""

    def __init__(self, results, stats: DecodeStats):
        self._results = tuple(results)
        self.stats = stats

    def __len__(self):
        return len(self._results)

    def __getitem__(self, index):
        return self._results[index]

    def __repr__(self):
        return f"DecodeResults({len(self)} results)"


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


class StreamEvent(NamedTuple):
    """New output of one request; the last one carries the finish reason.

    The texts of all events of a request make the text of its result. Text that later
    tokens could change or cut comes with them, at the latest with the last event.
    """

    request_id: int
    new_token_ids: tuple[int, ...]
    new_text: str  # what these tokens made certain; "" without a tokenizer
    finish_reason: str | None
