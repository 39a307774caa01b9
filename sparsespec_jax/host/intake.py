"""From a prompt and its SamplingParams to the records that serve it. No jax."""

import time

from sparsespec_jax import plan as plan_lib
from sparsespec_jax.host.metrics import RequestMetrics
from sparsespec_jax.host.outputs import Output
from sparsespec_jax.host.request import Request, token_array
from sparsespec_jax.host.text import OutputText, encode_prompt, no_tokenizer


def check_prompt(model, prompt, sampling, max_length):
    """Token ids of `prompt`; ValueError if no engine of that length could serve it."""
    tokens = encode_prompt(prompt, model)
    total = len(tokens) + sampling.max_tokens
    if total > max_length:
        raise ValueError(
            f"a prompt of {len(tokens)} tokens and max_tokens={sampling.max_tokens}"
            f" make {total}, max_length is {max_length}: shorten one of them"
            + ("" if total > model.config.max_length else " or raise it")
        )
    if sampling.stop and model.tokenizer is None:
        raise no_tokenizer(model, "stop strings need", instead="stop_token_ids")
    largest, vocab = max(sampling.stop_token_ids, default=0), model.config.vocab_size
    if largest >= vocab:
        raise ValueError(
            f"stop token id {largest} is outside the vocabulary of {vocab} tokens, so "
            "it could stop nothing: leave it out"
        )
    return tokens


def check_progress(progress, sampling):
    """ValueError if a request of this RequestProgress had ended."""
    if (count := len(progress.token_ids)) >= sampling.max_tokens:
        raise ValueError(
            f"{count} tokens are emitted, max_tokens is {sampling.max_tokens}: the "
            "request had ended"
        )


def make_request(model, tokens, sampling, speculation, *, request_id, sample=0):
    """The scheduler's record of one sample of a prompt."""
    limit = len(tokens) + sampling.max_tokens
    stops = plan_lib.stop_ids(model.config.eos_ids, sampling)
    return Request(
        request_id=request_id,
        tokens=token_array(tokens),
        num_prompt=len(tokens),
        limit=limit,
        budget_ratio=speculation.budget_ratio,
        min_budget=speculation.min_budget,
        slot_params=plan_lib.slot_params(sampling, sample, limit, stops, speculation),
    )


def make_output(model, request, sampling, speculation, *, prompt_index, sample):
    """The empty output of a request, submitted now."""
    return Output(
        request=request,
        sampling=sampling,
        prompt_index=request.request_id if prompt_index is None else prompt_index,
        sample_index=sample,
        text=OutputText(model.tokenizer, sampling.stop),
        stop_ids=plan_lib.stop_ids(model.config.eos_ids, sampling),
        metrics=RequestMetrics(
            max_draft_tokens=speculation.num_draft_tokens,
            max_draft_steps=speculation.cycle - 1,
            num_prompt_tokens=request.num_prompt,
        ),
        submitted_s=time.perf_counter(),
    )
