"""Log-probabilities of a prompt's own tokens, gathered as steps tell them. No jax."""


class PromptLogprobs:
    """Those of one prompt, shared by its samples: one feeds what others take over.

    Attributes:
      logprobs: of its first tokens, in order; the first one has None.
      top_logprobs: in each place the likeliest tokens as (token id, log-probability),
        best first; empty if none were asked for.
    """

    def __init__(self, num_prompt, num_top):
        self._num_prompt, self._num_top = num_prompt, num_top
        self.logprobs = [None]
        self.top_logprobs = [()] if num_top else []

    def note(self, first, told, row, count):
        """Take in `count` rows of a PromptTold, from `row` on.

        They are of the tokens at positions `first` and behind; those of the output,
        and those that are known, are left out. A request that is fed again after it
        lost its pages tells what is known.
        """
        known = len(self.logprobs)
        end = min(first + count, self._num_prompt)
        if end <= known:
            return
        if first > known:
            raise RuntimeError(f"prompt tokens {known} to {first} were not told of")
        logprobs, tops = told.rows(row + known - first, end - known)
        self.logprobs += logprobs
        if self._num_top:
            self.top_logprobs += [top[: self._num_top] for top in tops]


def of_prompt(told):
    """What a DecodeResult has of PromptLogprobs, by name; nothing of None."""
    if told is None:
        return {}
    names = {"prompt_logprobs": told.logprobs, "prompt_top_logprobs": told.top_logprobs}
    return {name: tuple(values) for name, values in names.items()}


def note_prompts(planned, told, is_seed):
    """Take in what a step told of prompts, for the requests that asked.

    `told` is the PromptTold of a step of PlannedVerifies, `is_seed` says which of its
    verifications are seed verifies.
    """
    sizes = planned.prompts
    for lane, request in enumerate(planned.requests):
        if request.prompt_logprobs is not None and is_seed[lane]:
            first = int(planned.seed_starts[lane]) + 1
            count = int(planned.num_rows[lane]) - 1
            request.prompt_logprobs.note(first, told, lane * sizes.num_queries, count)
    before = sizes.num_lanes * sizes.num_queries
    for lane, (request, start, count) in enumerate(planned.chunks):
        if request.prompt_logprobs is not None:
            row = before + lane * sizes.chunk
            request.prompt_logprobs.note(start + 1, told, row, count)
