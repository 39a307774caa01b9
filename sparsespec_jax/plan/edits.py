"""What requests change of their logits before the law: sizes, and the arrays of a slot.

The device keeps these arrays for every slot (`device/editing.py`). A slot's are sent
ahead of the seed verify of its holder; from there the compiled step keeps them up to
date. No jax.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from sparsespec_jax.config import SamplingParams
from sparsespec_jax.plan.outcome import PromptRows
from sparsespec_jax.plan.slot_params import NO_TOKEN

ANY_TOKEN = -2  # in a bad word's place: fits whatever is there, NO_TOKEN included


class StepExtras(NamedTuple):
    """What a compiled step does beside the plain law; nothing of it costs nothing."""

    bias: bool = False  # biases and excluded tokens
    penalties: bool = False
    num_words: int = 0  # bad words of several tokens that a slot can have
    word_tokens: int = 0  # of the longest
    top_logprobs: int = 0  # likeliest tokens told with each token
    prompt_logprobs: int = 0  # 1 + those told with each prompt token; 0: no prompt
    judges_greedy: bool = False  # of tokens that the law did not choose, T = 0

    @property
    def edits(self):
        """True if the device keeps arrays of slots."""
        return bool(self.bias or self.penalties or self.num_words)

    def joined(self, other):
        """What does both."""
        return StepExtras(*map(max, self, other))


NO_EXTRAS = StepExtras()


def rounded(count):
    """The next power of two, so that few sizes are compiled; 0 stays."""
    return 1 << (count - 1).bit_length() if count else 0


@dataclasses.dataclass(frozen=True, eq=False)
class RequestEdits:
    """What one request changes of its logits, checked and encoded.

    Attributes:
      sampling: its SamplingParams.
      ends: token ids that `min_tokens` holds back.
      banned: bad words of one token.
      words: bad words of several tokens, as tuples of token ids.
    """

    sampling: SamplingParams
    ends: tuple[int, ...]
    banned: tuple[int, ...]
    words: tuple[tuple[int, ...], ...]

    def extras(self, vocab_size):
        """StepExtras that the request needs."""
        sampling, told = self.sampling, self.sampling.prompt_logprobs
        lists = sampling.logit_bias, sampling.allowed_token_ids, self.banned
        return StepExtras(
            bias=any(lists) or sampling.min_tokens > 0,
            penalties=sampling.penalties,
            num_words=rounded(len(self.words)),
            word_tokens=rounded(max(map(len, self.words), default=0)),
            top_logprobs=min(rounded(sampling.top_logprobs), vocab_size),
            prompt_logprobs=0 if told is None else 1 + min(rounded(told), vocab_size),
        )

    def bias_row(self, vocab_size):
        """float32 [V]: what is added to the logits, -inf for a token never allowed."""
        row = np.zeros(vocab_size, np.float32)
        if self.sampling.allowed_token_ids is not None:
            row[:] = -np.inf
            row[list(self.sampling.allowed_token_ids)] = 0.0
        for token, bias in self.sampling.logit_bias:
            row[token] += np.float32(bias)
        row[list(self.banned)] = -np.inf
        return row


def prompt_rows(plan, extras):
    """PromptRows of a StepPlan whose step tells of prompts, by StepExtras."""
    shape = plan.shape
    return PromptRows(
        num_lanes=0 if plan.prefill and shape.runs_cycles else shape.verify_lanes,
        num_queries=shape.num_queries,
        num_chunks=shape.prefill_lanes if plan.prefill else 0,
        chunk=shape.prefill_chunk,
        num_top=extras.prompt_logprobs - 1,
    )


def edit_fields(extras, vocab_size):
    """(shape, dtype, neutral value) of a slot's arrays by name, of those it has."""
    words, before = extras.num_words, max(extras.word_tokens - 1, 0)
    fields = {
        "penalties": ((3,), np.float32, (0.0, 0.0, 1.0)),
        "lengths": ((2,), np.int32, 0),
    }
    if extras.bias:
        fields["bias"] = (vocab_size,), np.float32, 0.0
        fields["ends"] = (vocab_size,), np.bool_, False
    if extras.penalties:
        fields["counts"] = (vocab_size,), np.int32, 0
        fields["in_prompt"] = (vocab_size,), np.bool_, False
    if extras.num_words:
        fields["word_starts"] = (words, before), np.int32, ANY_TOKEN
        fields["word_ends"] = (words,), np.int32, vocab_size  # no token
        fields["recent"] = (before,), np.int32, NO_TOKEN
    return fields


def neutral_arrays(extras, vocab_size):
    """The arrays of a slot whose logits stay as they are, by name."""
    return {
        name: np.broadcast_to(np.asarray(value, dtype), shape).copy()
        for name, (shape, dtype, value) in edit_fields(extras, vocab_size).items()
    }


def edit_arrays(extras, vocab_size, edits, tokens, num_prompt, start):
    """The arrays of a slot whose holder verifies from position `start` on, by name.

    Args:
      edits: its RequestEdits, or None.
      tokens: of prompt and output, those up to `start` at least.
      num_prompt: tokens of the prompt.
    """
    arrays = neutral_arrays(extras, vocab_size)
    if edits is None:
        return arrays
    sampling = edits.sampling
    output = np.asarray(tokens[num_prompt : start + 1], np.int32)
    arrays["penalties"][:] = (
        sampling.presence_penalty, sampling.frequency_penalty,
        sampling.repetition_penalty,
    )  # fmt: skip
    arrays["lengths"][:] = num_prompt, num_prompt + sampling.min_tokens
    if extras.bias:
        arrays["bias"] = edits.bias_row(vocab_size)
        arrays["ends"][list(edits.ends)] = True
    if extras.penalties:
        arrays["counts"] += np.bincount(output, minlength=vocab_size).astype(np.int32)
        arrays["in_prompt"][np.asarray(tokens[:num_prompt], np.int32)] = True
    if extras.num_words:
        for place, word in enumerate(edits.words):
            before = word[:-1]
            arrays["word_starts"][place, -len(before) :] = before
            arrays["word_ends"][place] = word[-1]
        known = output[-arrays["recent"].size :]
        arrays["recent"][arrays["recent"].size - known.size :] = known
    return arrays
