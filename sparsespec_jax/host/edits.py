"""What requests change of their logits: checked, encoded, sent when it is due. No jax.

The options are those of SamplingParams; `plan/edits.py` makes arrays of them.
"""

from sparsespec_jax.host.text import no_tokenizer
from sparsespec_jax.plan.edits import RequestEdits, edit_arrays, prompt_rows


def prepare_edits(model, sampling):
    """RequestEdits of SamplingParams.

    Raises:
      ValueError: a token id outside the vocabulary, bad words without a tokenizer, more
        log-probabilities than tokens, or a law that could be left without a token.
    """
    vocab = model.config.vocab_size
    ids = {
        "logit_bias": [token for token, _ in sampling.logit_bias],
        "allowed_token_ids": sampling.allowed_token_ids or (),
    }
    for name, tokens in ids.items():
        if (largest := max(tokens, default=0)) >= vocab:
            raise ValueError(
                f"token id {largest} of {name} is outside the vocabulary of {vocab} "
                "tokens: leave it out"
            )
    for name in ("top_logprobs", "prompt_logprobs"):
        if (count := getattr(sampling, name) or 0) > vocab:
            raise ValueError(
                f"{name} is {count}, the vocabulary has {vocab} tokens: lower it"
            )
    ends = {*model.config.eos_ids, *sampling.stop_token_ids}
    words = _encoded(model, sampling.bad_words)
    edits = RequestEdits(
        sampling=sampling,
        ends=tuple(sorted(i for i in ends if i < vocab)) if sampling.min_tokens else (),
        banned=tuple(word[0] for word in words if len(word) == 1),
        words=tuple(word for word in words if len(word) > 1),
    )
    _check_something_is_left(edits, vocab)
    return edits


def _encoded(model, bad_words):
    """Token ids of each bad word: as it stands, and behind a space if that is alike."""
    if bad_words and model.tokenizer is None:
        raise no_tokenizer(model, "bad_words need", instead="logit_bias")

    def encode(text):
        return tuple(model.tokenizer.encode(text, add_special_tokens=False))

    found = {}  # in order, none twice
    for word in bad_words:
        plain, spaced = (encode(front + word.lstrip()) for front in ("", " "))
        if not plain:
            raise ValueError(f"bad word {word!r} has no tokens: leave it out")
        found[plain] = None
        if len(spaced) == len(plain) and spaced[0] != plain[0]:
            found[spaced] = None
    if outside := [i for ids in found for i in ids if i >= model.config.vocab_size]:
        raise ValueError(
            f"token id {outside[0]} of bad_words is outside the vocabulary of "
            f"{model.config.vocab_size} tokens: was the tokenizer made for this model?"
        )
    return tuple(found)


def _check_something_is_left(edits, vocab):
    """ValueError if excluded tokens could be all that are allowed."""
    sampling = edits.sampling
    excluded = {*edits.ends, *edits.banned, *(word[-1] for word in edits.words)}
    if sampling.allowed_token_ids is None:
        if len(excluded) < vocab:
            return
    elif not excluded.issuperset(sampling.allowed_token_ids):
        return
    raise ValueError(
        "every token that is allowed could be excluded at once, by bad_words or by "
        f"min_tokens={sampling.min_tokens}: allow one that neither excludes"
    )


class EditLoads:
    """Which slots' arrays of edits have to be sent before a step, and their values."""

    def __init__(self, vocab_size):
        self._vocab_size = vocab_size
        self._edited = set()  # slots whose last holder changed its logits

    def before(self, plan, planned, extras):
        """What goes with a step of `extras`: (PlannedVerifies, slots to load).

        A slot to load is (slot, arrays by name). It is due at each seed verify of a
        request that changes its logits, also of one that came back; and of the next
        holder of its slot, which may change nothing.
        """
        planned = planned._replace(num_top=extras.top_logprobs)
        if plan is not None and extras.prompt_logprobs:
            planned = planned._replace(prompts=prompt_rows(plan, extras))
        if plan is None or not extras.edits:
            return planned, ()
        loads, is_seed = [], plan.views["seed_counts"] >= 0
        for lane, request in enumerate(planned.requests):
            edits, slot = request.edits, request.slot
            if not is_seed[lane] or (edits is None and slot not in self._edited):
                continue
            (self._edited.discard if edits is None else self._edited.add)(slot)
            known = request.tokens, request.num_prompt, int(planned.seed_starts[lane])
            arrays = edit_arrays(extras, self._vocab_size, edits, *known)
            loads.append((slot, arrays))
        return planned, loads
