"""Between text and tokens: prompts in, incremental text and stop strings out."""

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def encode_prompt(prompt, tokenizer, vocab_size):
    """Token ids of a prompt: text, chat messages (dicts) or token ids.

    Raises:
      ValueError: an empty prompt, an id outside the vocabulary, a prompt of another
        type, or text without a tokenizer.
    """
    if isinstance(prompt, str):
        _need_tokenizer(tokenizer, "a text prompt")
        tokens = tokenizer.encode(prompt)
    elif not hasattr(prompt, "__iter__"):
        raise ValueError(
            f"a prompt is text, chat messages or token ids, got {type(prompt).__name__}"
        )
    else:
        items = list(prompt)
        if items and all(isinstance(item, dict) for item in items):
            _need_tokenizer(tokenizer, "a chat prompt")
            tokens = tokenizer.encode_chat(items)
        else:
            tokens = _as_ids(items)
    if not tokens:
        raise ValueError(f"the prompt {prompt!r} has no tokens; give at least one")
    outside = [t for t in tokens if not 0 <= t < vocab_size]
    if outside:
        raise ValueError(
            f"token id {outside[0]} is outside the model's vocabulary "
            f"[0, {vocab_size}): was the prompt made for another model?"
        )
    return list(tokens)


def _as_ids(items):
    ids = []
    for item in items:
        if isinstance(item, bool | str | bytes | dict) or not hasattr(
            item, "__index__"
        ):
            raise ValueError(
                "a prompt given as a sequence holds token ids or chat messages "
                f"throughout, got {item!r}"
            )
        ids.append(item.__index__())
    return ids


def _need_tokenizer(tokenizer, what):
    if tokenizer is None:
        raise ValueError(f"{what} needs a tokenizer and this model has none; give ids")


class OutputText:
    """The text of one output: on demand, or grown token by token.

    Nothing is decoded before somebody asks: a stop string or a stream pushes tokens as
    they come, otherwise `finish` decodes the whole output at once. Tokens are judged
    one at a time, so where a stop string ends does not depend on how many tokens a
    step committed.
    """

    def __init__(self, tokenizer, stop):
        self._tokenizer = tokenizer
        self._stop = stop
        self._ids = []
        self._context = 0  # tokens from here to _given are decoded as context only:
        self._given = 0  # a token's text can depend on the one before it
        self.text = ""
        self.stop_string = None

    @property
    def num_pushed(self):
        """Tokens pushed so far."""
        return len(self._ids)

    def push(self, token):
        """Add one token; returns True if a stop string is now complete."""
        self._ids.append(token)
        if self._tokenizer is None:
            return False
        fresh = self._fresh()
        if fresh.endswith(_REPLACEMENT):  # an unfinished character
            return False
        self._context, self._given = self._given, len(self._ids)
        self.text += fresh
        return bool(fresh) and self._find_stop(len(fresh))

    def finish(self, token_ids):
        """The whole text of an output, an unfinished character included.

        `token_ids` are all its tokens, those pushed included. None without tokenizer.
        """
        if self._tokenizer is None:
            return None
        if self.stop_string is not None:
            return self.text
        if not self._ids:
            return self._tokenizer.decode(list(token_ids))
        for token in token_ids[len(self._ids) :]:
            self.push(token)
        return self.text + self._fresh()

    def _fresh(self):
        known = self._tokenizer.decode(self._ids[self._context : self._given])
        return self._tokenizer.decode(self._ids[self._context :])[len(known) :]

    def _find_stop(self, num_fresh):
        found = []
        for stop in self._stop:
            begin = max(0, len(self.text) - num_fresh - len(stop) + 1)
            at = self.text.find(stop, begin)
            if at >= 0:
                found.append((at, stop))
        if not found:
            return False
        at, self.stop_string = min(found)
        self.text = self.text[:at]
        return True
