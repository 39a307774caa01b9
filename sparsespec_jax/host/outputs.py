"""The growing outputs: outcomes of steps in, finished results out. No jax.

An outcome is taken in three turns: `judge` decides which of its tokens stand, the
scheduler writes them to the requests, `hand_out` makes results and events of them.
Nothing here writes to a Request or commands the scheduler.
"""

import array
import copy
import dataclasses
import itertools
import time
from typing import NamedTuple

import numpy as np

from sparsespec_jax.config import SamplingParams
from sparsespec_jax.host.metrics import RequestMetrics
from sparsespec_jax.host.prompt_logprobs import note_prompts, of_prompt
from sparsespec_jax.host.request import Request
from sparsespec_jax.host.results import DecodeResult, RequestProgress, StreamEvent
from sparsespec_jax.host.text import OutputText
from sparsespec_jax.plan.outcome import SEED, CascadeCounts
from sparsespec_jax.plan.slot_params import NUM_STOP_IDS


@dataclasses.dataclass(eq=False, slots=True)
class Output:
    """The growing output of one request."""

    request: Request
    sampling: SamplingParams
    prompt_index: int
    sample_index: int
    text: OutputText
    stop_ids: frozenset
    metrics: RequestMetrics
    submitted_s: float
    logprobs: array.array = dataclasses.field(default_factory=lambda: array.array("f"))
    top_logprobs: list = dataclasses.field(default_factory=list)  # tuples, if asked for
    params_versions: list = dataclasses.field(default_factory=list)  # [version, tokens]
    draft_cache: int = 0  # rows that the last verification left for drafts to read
    prefill_reads: int = 0  # of its request, as far as they are counted


class Emission(NamedTuple):
    """What an outcome adds to one output."""

    output: Output
    tokens: list  # the new ones that stand
    finish_reason: str | None  # None: it goes on
    stop_reason: str | int | None


class Outputs:
    """The unfinished outputs by request id, and the metrics of the finished ones.

    Args:
      shape: StepShape of the largest K.
      with_acceptance: keep running counts for `acceptance`.
    """

    def __init__(self, shape, *, with_acceptance):
        self._shape = shape
        self._unfinished = {}
        self.with_acceptance = with_acceptance
        self._judged = np.zeros(shape.num_draft_tokens)
        self._accepted = np.zeros(shape.num_draft_tokens)
        self.num_emitted = 0  # tokens, of all requests
        self.num_silent = 0  # unfinished requests without a token
        self.max_new_tokens = 0  # that the unfinished requests can still emit
        self.finished_metrics = []

    def __len__(self):
        return len(self._unfinished)

    def add(self, output, progress=None):
        """Take in the output of a new request, or of one that goes on."""
        self._unfinished[output.request.request_id] = output
        request = output.request
        self.num_silent += len(request.tokens) == request.num_prompt
        self.max_new_tokens += request.limit - len(request.tokens)
        if progress is None:
            return
        output.logprobs.extend(progress.logprobs)
        output.top_logprobs.extend(progress.top_logprobs)
        output.params_versions = [list(item) for item in progress.params_versions]
        output.metrics = copy.deepcopy(progress.metrics)
        if output.sampling.stop:
            output.text.push(progress.token_ids)

    def start_clock(self):
        """Count the time of requests from now, unless one has emitted something."""
        if self.num_emitted:
            return
        now = time.perf_counter()
        for output in self._unfinished.values():
            output.submitted_s = now

    def get(self, request_id):
        """The unfinished Output of a request, or None."""
        return self._unfinished.get(request_id)

    @property
    def acceptance(self):
        """Share of the recent drafts accepted, by position; NaN where none was judged.

        A tuple of K floats; older verifications count less, with a memory of about
        64 outcomes.
        """
        with np.errstate(invalid="ignore"):
            return tuple((self._accepted / self._judged).tolist())

    def progress(self, known):
        """RequestProgress of outputs longer than `known` (request id -> tokens).

        Its token ids and log-probabilities are those after the known ones.
        """
        found = []
        for request_id, output in self._unfinished.items():
            request, first = output.request, known.get(request_id, 0)
            if len(request.tokens) - request.num_prompt > first:
                found.append(
                    RequestProgress(
                        request_id=request_id,
                        prompt_index=output.prompt_index,
                        sample_index=output.sample_index,
                        token_ids=tuple(request.tokens[request.num_prompt + first :]),
                        logprobs=tuple(output.logprobs[first:]),
                        top_logprobs=tuple(output.top_logprobs[first:]),
                        params_versions=_as_tuples(output.params_versions),
                        metrics=copy.deepcopy(output.metrics),
                    )
                )
        return found

    def judge(self, planned, outcome, version, *, with_text):
        """(rows that each verify lane committed int [n], Emissions) of an outcome.

        `version` is that of the weights the step ran with; `with_text` says whether
        `hand_out` will make events.
        """
        num_lanes = len(planned.requests)
        accepted = outcome.num_accepted[:num_lanes]
        is_seed = accepted == SEED
        committed = np.where(is_seed, planned.num_rows, accepted + 1)
        num_rows, cascade = planned.num_rows, itertools.repeat(None)
        if outcome.cascade is not None:
            counts = outcome.cascade[:num_lanes]
            num_rows = np.where(is_seed, num_rows, counts[:, 0] + 1)
            cascade = itertools.starmap(CascadeCounts, counts.tolist())
        if self.with_acceptance:
            self._count_acceptance(num_rows - 1, accepted, ~is_seed)
        emitted = np.where(planned.is_replay, 0, outcome.num_emitted[:num_lanes])
        lanes = zip(
            range(num_lanes),
            planned.requests,
            emitted.tolist(),
            outcome.is_done[:num_lanes].tolist(),
            outcome.tokens[:num_lanes].tolist(),
            outcome.logprobs[:num_lanes].tolist(),
            accepted.tolist(),
            num_rows.tolist(),
            self._selected(planned, is_seed).tolist(),
            planned.is_whole.tolist(),
            strict=True,
        )
        if outcome.prompts is not None:
            note_prompts(planned, outcome.prompts, is_seed)
        emissions = self._judge_scored(planned, outcome)
        for (lane, request, count, is_done, tokens, logprobs, *judged), counts in zip(
            lanes, cascade, strict=False
        ):
            output = self._unfinished.get(request.request_id)
            if output is None or count == 0 or request.is_scored:
                continue  # ended while this step was in flight, or a replay
            self._record(output, *judged, counts)
            if with_text:
                _push_known(output)  # tokens that came while nobody listened
            emission = _emission(output, tokens[:count], logprobs[:count], is_done)
            count = len(emission.tokens)
            if most := output.sampling.top_logprobs:
                output.top_logprobs += outcome.top_of(lane, count, most)
            self._count_emitted(output, count, version)
            emissions.append(emission)
        return committed, emissions

    def _judge_scored(self, planned, outcome):
        """Emissions of no token, of requests whose last tokens are scored."""
        ended = []
        for lane, request in enumerate(planned.requests):
            if not request.is_scored:
                continue
            output = self._unfinished.get(request.request_id)
            if output is None:
                continue
            known = outcome.known_logprobs(lane, int(planned.num_rows[lane]))
            first = int(planned.seed_starts[lane]) + 1 - request.num_prompt
            del output.logprobs[first:]  # after a preemption they come again
            output.logprobs.extend(known.tolist())
            if not planned.is_replay[lane]:
                ended.append(Emission(output, [], "length", None))
        return ended

    def hand_out(self, emissions, results, events):
        """Ended outputs join `results`; their requests hold the tokens by now.

        `events` is a list to fill with StreamEvents, or None if nobody wants them.
        """
        for output, tokens, reason, stop in emissions:
            ended = None
            if reason:
                ended = self.finish(output, reason, stop)
                results.append(ended)
            if events is not None:
                events.append(_event(output, len(tokens), ended))

    def finish(self, output, reason, stop_reason):
        """End an output whose request is released; returns its DecodeResult."""
        request = output.request
        self.num_silent -= len(request.tokens) == request.num_prompt
        self.max_new_tokens -= request.limit - len(request.tokens)
        del self._unfinished[request.request_id]
        new = tuple(request.tokens[request.num_prompt :])
        output.metrics.finish(num_output_tokens=len(new))
        output.metrics.total_time_s = time.perf_counter() - output.submitted_s
        self.finished_metrics.append(output.metrics)
        return DecodeResult(
            request_id=request.request_id,
            prompt_index=output.prompt_index,
            sample_index=output.sample_index,
            prompt_token_ids=tuple(request.tokens[: request.num_prompt]),
            token_ids=new,
            params_versions=_as_tuples(output.params_versions),
            output_text=output.text,
            logprobs=tuple(output.logprobs),
            top_logprobs=tuple(output.top_logprobs),
            **of_prompt(request.prompt_logprobs),
            finish_reason=reason,
            stop_reason=stop_reason,
            metrics=output.metrics,
        )

    def take_metrics(self):
        """`finished_metrics`, which are none from now on."""
        taken, self.finished_metrics = self.finished_metrics, []
        return taken

    def _selected(self, planned, is_seed):
        """Tokens that each verification selected for drafting, int [n]."""
        requests = planned.requests
        if planned.num_queries == 1 or not self._shape.draft_lanes:
            return np.zeros(len(requests), np.int64)
        # A seed verify starts below the tokens known, a cycle at the pending one.
        below = np.where(is_seed, planned.num_rows, 1)
        return self._shape.budget_tokens(
            np.array([len(r.tokens) for r in requests], np.int64) - below,
            ratio=np.array([r.budget_ratio for r in requests], np.float32),
            floor=np.array([r.min_budget for r in requests], np.int32),
        )

    def _count_emitted(self, output, count, version):
        request, versions = output.request, output.params_versions
        self.num_emitted += count
        self.max_new_tokens -= count
        self.num_silent -= len(request.tokens) == request.num_prompt
        if not versions or versions[-1][0] != version:
            versions.append([version, 0])
        versions[-1][1] += count

    def _count_acceptance(self, num_drafts, accepted, is_cycle):
        position = np.arange(self._judged.size)
        judged = (num_drafts[:, None] > position) & is_cycle[:, None]
        self._judged *= 1 - 1 / 64
        self._accepted *= 1 - 1 / 64
        self._judged += judged.sum(0)
        self._accepted += (judged & (accepted[:, None] > position)).sum(0)

    def _record(self, output, num_accepted, num_rows, selected, is_whole, cascade):
        """Count acceptance and KV traffic of one verification.

        `cascade` is its CascadeCounts, or None: as many draft steps as drafts.
        """
        request, metrics = output.request, output.metrics
        reads = metrics.kv_tokens_read
        if num_accepted == SEED:
            length = len(request.tokens)
            if length == request.num_prompt:
                elapsed = time.perf_counter() - output.submitted_s
                metrics.time_to_first_token_s = elapsed
            reads.prefill += request.prefill_reads - output.prefill_reads + length
            output.prefill_reads = request.prefill_reads
            tail = num_rows
        else:
            drafts = num_rows - 1
            steps = drafts if self._shape.draft_lanes else 0
            guesses, tail_keys = 0, steps * (steps + 1) // 2
            if cascade is not None:
                _, steps, guesses, tail_keys = cascade
            if is_whole and (drafts or not metrics.max_draft_tokens):
                metrics.record_verification(
                    num_accepted=num_accepted,
                    num_drafted=drafts,
                    num_draft_steps=steps,
                    num_guesses=guesses,
                )
            else:
                metrics.num_short_steps += 1
            reads.draft += steps * output.draft_cache + tail_keys
            reads.verify += request.committed + num_rows
            tail = num_accepted + 1
        reads.gather += selected
        output.draft_cache = selected + tail


def _as_tuples(versions):
    return tuple(tuple(item) for item in versions)


def _emission(output, tokens, logprobs, is_done):
    """The Emission of new tokens, up to a stop; keeps their log-probabilities."""
    text, reason, stop = output.text, None, None
    if len(output.stop_ids) > NUM_STOP_IDS:  # more than the device looks for
        ends = (i for i, token in enumerate(tokens, 1) if token in output.stop_ids)
        if (end := next(ends, None)) is not None:
            tokens, is_done = tokens[:end], True
    # The device cuts an outcome at its first stop token, which is no text, or at the
    # limit.
    is_stopped = is_done and tokens[-1] in output.stop_ids
    if is_done:
        reason, stop = ("stop", tokens[-1]) if is_stopped else ("length", None)
    if output.sampling.stop:
        num_read = text.num_pushed
        if text.push(tokens[: -1 if is_stopped else None]):
            tokens = tokens[: text.num_pushed - num_read]
            reason, stop = "stop", text.stop_string
    output.logprobs.extend(logprobs[: len(tokens)])
    return Emission(output, tokens, reason, stop)


def _push_known(output):
    """Push the tokens that were not; returns the text that is certain by now."""
    request, text = output.request, output.text
    text.push(request.tokens[request.num_prompt + text.num_pushed :])
    return text.take()


def _event(output, count, result):
    """The StreamEvent of the last `count` tokens.

    `result` is the DecodeResult if the request ended: then all remaining text is news.
    """
    request = output.request
    if result is None:
        text, reason = _push_known(output), None
    else:
        text, reason = output.text.rest(result.text or ""), result.finish_reason
    new = tuple(request.tokens[len(request.tokens) - count :])
    return StreamEvent(request.request_id, new, text, reason)
