"""From a prompt and its SamplingParams to the records that serve it. No jax.

A prompt is encoded and checked once, by `prepare`; everything after that takes the
PreparedPrompt.
"""

import dataclasses
import time

from sparsespec_jax.config import SamplingParams
from sparsespec_jax.host.edits import prepare_edits
from sparsespec_jax.host.metrics import RequestMetrics
from sparsespec_jax.host.outputs import Output
from sparsespec_jax.host.prompt_logprobs import PromptLogprobs
from sparsespec_jax.host.request import Request, token_array
from sparsespec_jax.host.text import OutputText, encode_prompt, no_tokenizer
from sparsespec_jax.plan.edits import RequestEdits, StepExtras
from sparsespec_jax.plan.slot_params import is_greedy, slot_params, stop_ids


@dataclasses.dataclass(frozen=True, eq=False)
class PreparedPrompt:
    """A prompt as token ids, and what is to follow it: encoded and checked."""

    token_ids: tuple[int, ...]
    sampling: SamplingParams
    stop_ids: frozenset  # token ids that end the output
    edits: RequestEdits | None  # None if it leaves the logits as they are
    extras: StepExtras  # that its steps need

    @property
    def limit(self):
        """Tokens, prompt and output, at which a request ends."""
        return len(self.token_ids) + self.sampling.max_tokens


def prepare(model, prompt, sampling=None, chat_template_kwargs=None):
    """PreparedPrompt of a prompt: text, chat messages or token ids.

    `chat_template_kwargs` as `encode_prompt` takes them.

    Raises:
      ValueError: as `encode_prompt`; or stop strings without a tokenizer, or a stop
        token id outside the vocabulary; or as `prepare_edits`.
    """
    sampling = sampling or SamplingParams()
    tokens = encode_prompt(prompt, model, chat_template_kwargs)
    if sampling.stop and model.tokenizer is None:
        raise no_tokenizer(model, "stop strings need", instead="stop_token_ids")
    largest, vocab = max(sampling.stop_token_ids, default=0), model.config.vocab_size
    if largest >= vocab:
        raise ValueError(
            f"stop token id {largest} is outside the vocabulary of {vocab} tokens, so "
            "it could stop nothing: leave it out"
        )
    stops = stop_ids(model.config.eos_ids, sampling)
    edits = prepare_edits(model, sampling)
    extras = edits.extras(vocab)
    return PreparedPrompt(
        tuple(tokens), sampling, stops, edits if sampling.edits else None, extras
    )


def prepare_all(model, prompts, sampling, chat_template_kwargs=None):
    """PreparedPrompt of each prompt.

    `sampling` is a list of as many SamplingParams, `chat_template_kwargs` None or a
    list of as many dicts or Nones.

    Raises:
      ValueError: as `prepare`, with the number of the prompt in front.
    """
    variables = chat_template_kwargs or [None] * len(prompts)
    prepared = []
    for number, given in enumerate(zip(prompts, sampling, variables, strict=True)):
        try:
            prepared.append(prepare(model, *given))
        except ValueError as error:
            raise ValueError(f"prompt {number}: {error}") from error
    return prepared


def check_length(prepared, model, max_length):
    """ValueError if an engine of that length could not serve a PreparedPrompt."""
    if prepared.limit > max_length:
        raise ValueError(
            f"a prompt of {len(prepared.token_ids)} tokens and max_tokens="
            f"{prepared.sampling.max_tokens} make {prepared.limit}, max_length is "
            f"{max_length}: shorten one of them"
            + ("" if prepared.limit > model.config.max_length else " or raise it")
        )


def check_progress(progress, sampling):
    """ValueError if a request of this RequestProgress has ended or lacks values."""
    if (count := len(progress.token_ids)) >= sampling.max_tokens:
        raise ValueError(
            f"{count} tokens are emitted, max_tokens is {sampling.max_tokens}: the "
            "request had ended"
        )
    if sampling.top_logprobs and len(progress.top_logprobs) != count:
        raise ValueError(
            f"{count} tokens are emitted, {len(progress.top_logprobs)} of them with "
            "top_logprobs: resume it with top_logprobs=0, or from a progress with all"
        )


def check_scored(token_ids, sampling, shape):
    """ValueError if token ids are no whole output that an engine of `shape` scores."""
    if len(token_ids) != sampling.max_tokens or sampling.n > 1:
        raise ValueError(
            f"{len(token_ids)} tokens are to be scored, with max_tokens="
            f"{sampling.max_tokens} and n={sampling.n}: they must be as many, and n 1"
        )
    for name, unused in (("top_logprobs", 0), ("prompt_logprobs", None)):
        if (value := getattr(sampling, name)) != unused:
            raise ValueError(
                f"{name} is {value}, but scored tokens come without others beside "
                f"them: set it to {unused}"
            )
    if shape.num_draft_tokens < 1:
        raise ValueError(
            "scoring feeds several tokens at once: num_draft_tokens must be 1 or more"
        )


def samples_to_queue(prepared, model, max_length, shape, progress, scored):
    """(numbers of the samples, tokens emitted so far, PromptLogprobs or None).

    Of what an engine is to queue; all samples share the PromptLogprobs.

    Raises:
      ValueError: an engine of this length and StepShape could not serve it, by the
        three checks above.
    """
    check_length(prepared, model, max_length)
    samples, emitted = range(prepared.sampling.n), ()
    if progress is not None:
        check_progress(progress, prepared.sampling)
        samples, emitted = [progress.sample_index], progress.token_ids
    num_top, told = prepared.sampling.prompt_logprobs, None
    if num_top is not None:
        told = PromptLogprobs(len(prepared.token_ids), num_top)
    if told and shape.prefill_chunk < 2:
        raise ValueError(
            f"prompt_logprobs need prefill_chunk of 2 or more, got "
            f"{shape.prefill_chunk}: raise it"
        )
    if scored is not None:
        check_scored(scored, prepared.sampling, shape)
        emitted = scored
    return samples, emitted, told


def extras_of(prepared, *, is_scored):
    """StepExtras that the steps of a PreparedPrompt need; of one that is scored, too.

    A law did not choose the tokens that are scored, which a greedy one must be told.
    """
    sampling = prepared.sampling
    judged = is_scored and sampling.logprobs == "processed" and is_greedy(sampling)
    return prepared.extras._replace(judges_greedy=judged)


def make_request(
    prepared,
    speculation,
    request_id,
    *,
    sample=0,
    emitted=(),
    group=None,
    expected=None,
    is_scored=False,
    told=None,
):
    """The scheduler's record of one sample of a PreparedPrompt.

    `emitted` are tokens that it has already, `group` is the same number for all samples
    of a prompt, `expected` the tokens that it will emit, if that is known. `is_scored`
    says that `emitted` is all there will be, `told` are the PromptLogprobs.
    """
    num_prompt = len(prepared.token_ids)
    return Request(
        request_id=request_id,
        tokens=token_array((*prepared.token_ids, *emitted)),
        num_prompt=num_prompt,
        limit=prepared.limit,
        budget_ratio=speculation.budget_ratio,
        min_budget=speculation.min_budget,
        slot_params=slot_params(
            prepared.sampling, sample, prepared.limit, prepared.stop_ids, speculation
        ),
        prompt_group=group,
        edits=prepared.edits,
        expected_length=None if expected is None else num_prompt + expected,
        is_scored=is_scored,
        prompt_logprobs=told,
    )


def make_output(model, request, prepared, speculation, *, prompt_index, sample):
    """The empty output of a request, submitted now."""
    return Output(
        request=request,
        sampling=prepared.sampling,
        prompt_index=prompt_index,
        sample_index=sample,
        text=OutputText(model.tokenizer, prepared.sampling.stop),
        stop_ids=prepared.stop_ids,
        metrics=RequestMetrics(
            max_draft_tokens=speculation.num_draft_tokens,
            max_draft_steps=speculation.cycle - 1,
            num_prompt_tokens=request.num_prompt,
        ),
        submitted_s=time.perf_counter(),
    )
