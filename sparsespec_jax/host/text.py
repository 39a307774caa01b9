"""Between text and tokens: prompts in, text and stop strings out. No jax."""

import codecs
import operator
from collections.abc import Mapping, Set
from reprlib import repr as short

import numpy as np

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_LONG_WINDOW = 8  # tokens of broken UTF-8 of which the first are settled

# What is refused as a prompt, and what to give instead.
_INSTEAD = {
    bytes | bytearray | memoryview: "decode bytes first: bytes(...).decode('utf-8')",
    Mapping: "a chat is a list of messages: wrap a single message in []",
    Set: "a set has no order: give a list",
    int | float | complex | np.generic: "put token ids into a list",
    type(None): "give a text, or leave the prompt out",
}


def encode_prompt(prompt, model, chat_template_kwargs=None):
    """Token ids of a prompt: text, chat messages (dicts) or token ids.

    Ids may be a list, a tuple, a range or a one-dimensional array of integers.
    `chat_template_kwargs` are variables of the chat template, a dict: its own
    (`enable_thinking`, say), `tools`, `documents`, `add_generation_prompt`.

    Raises:
      ValueError: a prompt that is empty or of another type, an id outside the
        vocabulary, text without a tokenizer, a chat that its template refuses,
        variables that the template never reads or of a prompt that is no chat.
    """
    variables = _variables(chat_template_kwargs)
    items = None if isinstance(prompt, str) else _items(prompt)
    if items and all(isinstance(item, Mapping) for item in items):
        tokens = _tokenizer(model, "a chat prompt").encode_chat(items, **variables)
    elif variables:
        raise ValueError(
            f"chat_template_kwargs ({', '.join(variables)}) are of chats, and "
            f"{short(prompt)} is none: write it as [{{'role': 'user', 'content': ...}}]"
        )
    elif items is None:
        tokens = _tokenizer(model, "a text prompt").encode(str(prompt))
    elif set(map(type, items)) == {int}:  # a job has a million of them
        tokens = items
    else:
        tokens = [_as_id(item) for item in items]
    if not tokens:
        raise ValueError(f"the prompt {short(prompt)} has no tokens; give at least one")
    vocab_size = model.config.vocab_size
    if not (0 <= min(tokens) and max(tokens) < vocab_size):
        outside = next(t for t in tokens if not 0 <= t < vocab_size)
        raise ValueError(
            f"token id {outside} is outside the model's vocabulary "
            f"[0, {vocab_size}): was the prompt made for another model?"
        )
    return tokens


def _variables(chat_template_kwargs):
    """The variables of a chat template as a dict; ValueError if they are none."""
    given = {} if chat_template_kwargs is None else chat_template_kwargs
    if not isinstance(given, Mapping) or not all(isinstance(k, str) for k in given):
        raise ValueError(
            "chat_template_kwargs must be a dict of template variables such as "
            f"{{'enable_thinking': False}}, got {short(given)}"
        )
    if "messages" in given:
        raise ValueError("chat_template_kwargs holds 'messages', which the prompt is")
    return dict(given)


def no_tokenizer(model, needs, *, instead):
    """The error of what `needs` a tokenizer, for a model that has none, and why."""
    return ValueError(
        f"{needs} a tokenizer, and model {model.name!r} has none: "
        f"{model.tokenizer_problem}. Give {instead}, or load it with its tokenizer"
    )


def _tokenizer(model, what):
    if model.tokenizer is None:
        raise no_tokenizer(model, f"{what} needs", instead="token ids")
    return model.tokenizer


def _items(prompt):
    """What a prompt that is no text holds, as a list."""
    what = f"a prompt is text, chat messages or token ids, got {type(prompt).__name__}"
    for refused, instead in _INSTEAD.items():
        if isinstance(prompt, refused):
            raise ValueError(f"{what}: {instead}")
    try:
        shape = getattr(prompt, "shape", None)
        is_row = not isinstance(shape, tuple) or len(shape) == 1
        if is_row and hasattr(prompt, "__array__"):  # one copy, also from a device
            prompt = np.asanyarray(prompt).tolist()
        items = list(prompt) if is_row else []
    except Exception as error:  # whatever the prompt's own class raises
        raise ValueError(f"{what}: it cannot be read as a list ({error})") from error
    if not is_row:
        raise ValueError(
            f"{what} of shape {shape}: a prompt is one row of ids; give each row as a "
            "prompt of its own"
        )
    return items


def _as_id(item):
    try:
        if isinstance(item, bool | np.bool_):
            raise TypeError("a truth value is no token id")
        return operator.index(item)
    except Exception as error:  # whatever the item's own class raises
        raise ValueError(
            "a prompt given as a sequence holds token ids or chat messages "
            f"throughout, got {short(item)}"
        ) from error


class OutputText:
    """The text of one output: whole, or as its tokens come.

    The text of n tokens is what the tokenizer decodes all of them to, however they
    came and whoever asked. A stop string is complete at the first token after which
    that text holds one, replacement characters at its end set aside: they may be a
    character that is not finished. The text then ends before it.

    What a stream is given after n tokens depends on these tokens alone, and begins the
    text of every longer output. Held back are text that later tokens can change (see
    `decoder_rules`), replacement characters at its end, and what may begin a stop
    string.

    Nothing is decoded before somebody asks: a stop string or a stream pushes tokens as
    they come, otherwise `finish` decodes the whole output at once.
    """

    def __init__(self, tokenizer, stop):
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._tokens = []  # those that text to come depends on, all until it is settled
        self._end = 0  # how many of them end at a place to cut
        self._known = 0  # characters of their text that are settled
        self._held = ""  # settled text that is not given out,
        self._num_marks = 0  # and the replacement characters at its end
        self._run = None  # the ByteRun that the last token belongs to
        self._fresh = []  # pieces of text that is given out, but not taken
        self._num_taken = 0  # characters
        self.num_pushed = 0  # tokens
        self.stop_string = None

    def push(self, tokens):
        """Read more tokens; True if a stop string is complete.

        The token that completes it is the last one read; `num_pushed` counts it.
        """
        if self.stop_string is not None:
            return True
        if self._tokenizer is None or not self._stop:
            self.num_pushed += len(tokens)
            if self._tokenizer is not None:
                self._read(tokens)
            return False
        for token in tokens:
            self.num_pushed += 1
            if self._read((token,)):
                return True
        return False

    def take(self):
        """The text that is certain by now and was not taken before."""
        fresh, self._fresh = "".join(self._fresh), []
        self._num_taken += len(fresh)
        return fresh

    def rest(self, text):
        """What nobody has taken yet of `text`, which `finish` returned."""
        return text[self._num_taken :]

    def finish(self, token_ids):
        """The whole text of an output, an unfinished character included.

        `token_ids` are all its tokens, those pushed included. None without tokenizer.
        """
        if self._tokenizer is None:
            return None
        text = self._tokenizer.decode(token_ids)
        return text if self.stop_string is None else text.partition(self.stop_string)[0]

    def _read(self, tokens):
        """Take in tokens, one if there are stop strings; True if one is complete."""
        rule, end, kept = self._tokenizer.decoder_rule, self._end, len(self._tokens)
        for token in tokens:
            piece = self._tokenizer.piece(token)
            if piece is not None:
                self._tokens.append(token)
                if rule.ends_run(piece):
                    self._end = len(self._tokens)
        if len(self._tokens) == kept:
            return False
        if self._stop and self._may_stop(piece) and self._find_stop():
            return True
        if rule.kind == "bytes":
            self._settle_characters()
        elif self._end > end:
            self._settle_tokens()
        self._release()
        return False

    def _may_stop(self, piece):
        """False only if no stop string can be complete with this token.

        It saves decoding a long run of byte tokens again with each of them.
        """
        byte = self._tokenizer.decoder_rule.byte(piece)
        if byte is None:
            self._run = None
            return True
        if any(_REPLACEMENT in stop for stop in self._stop):
            return True  # one that was set aside may count now
        if self._run is None:
            self._run = ByteRun(self._held, keep=max(map(len, self._stop)))
        return self._run.add(byte) and self._run.text.endswith(self._stop)

    def _find_stop(self):
        """True if a stop string, which becomes `stop_string`, is in the text."""
        text = self._tokenizer.decode(self._tokens)[self._known :]
        text = text.rstrip(_REPLACEMENT)
        if not text:
            return False  # as before the last token
        # Text that was given out is part of no stop string: `_release` sees to it.
        text = self._held + _REPLACEMENT * self._num_marks + text
        found = [(at, stop) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stop_string = min(found)[1]
        return bool(found)

    def _settle_tokens(self):
        """Settle the text of all tokens up to the last place to cut."""
        settled, rest = self._tokens[: self._end], self._tokens[self._end :]
        text = self._tokenizer.decode(settled)
        self._hold(text[self._known :])
        self._known, size = len(text), 1
        # Decoders treat the beginning of a text in a way of its own, which is over as
        # soon as there is text: then the last tokens that have text stand for all.
        while text and size < len(settled):
            if known := len(self._tokenizer.decode(settled[-size:])):
                settled, self._known = settled[-size:], known
            size *= 2
        self._tokens, self._end = settled + rest, len(settled)

    def _settle_characters(self):
        """Settle the finished characters of tokens that are bytes."""
        decode = self._tokenizer.decode
        whole = decode(self._tokens)
        finished = whole.rstrip(_REPLACEMENT)
        self._hold(finished[self._known :])
        self._known = len(finished)
        if finished == whole:
            self._tokens, self._known = [], 0
        if len(self._tokens) < _LONG_WINDOW:
            return
        # Of 4 neighbouring places one is in no character, which has at most 4 bytes.
        # Where two halves decode to the text of the whole, no character spans them.
        for cut in range(len(self._tokens) - 3, len(self._tokens) - 7, -1):
            first, last = decode(self._tokens[:cut]), decode(self._tokens[cut:])
            if last and first + last == whole:
                self._hold(first[self._known :])
                self._known = max(0, self._known - len(first))
                self._tokens = self._tokens[cut:]
                return

    def _hold(self, text):
        """Add settled text to what is held back."""
        body = text.rstrip(_REPLACEMENT)
        if body:
            self._held += _REPLACEMENT * self._num_marks + body
            self._num_marks = 0
        self._num_marks += len(text) - len(body)

    def _release(self):
        """Give out the held text that no stop string can cut."""
        end = len(self._held)
        for stop in self._stop:
            at = self._held.find(stop[0], max(0, len(self._held) - len(stop) + 1))
            while at >= 0 and not stop.startswith(self._held[at:]):
                at = self._held.find(stop[0], at + 1)
            if at >= 0:
                end = min(end, at)
        if end:
            self._fresh.append(self._held[:end])
            self._held = self._held[end:]


class ByteRun:
    """Neighbouring byte tokens: their text as long as it is valid UTF-8.

    `text` is the end, of `keep` characters, of what was before and that text.
    """

    def __init__(self, before, *, keep):
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._keep = keep
        self.text = before[-keep:]

    def add(self, byte):
        """Take in a byte; True if it completes a character."""
        if self._decoder is None:
            return False
        try:
            character = self._decoder.decode(bytes([byte]))
        except UnicodeDecodeError:  # no byte of the run is text, whatever follows
            self._decoder = None
            return False
        self.text = (self.text + character)[-self._keep :]
        return bool(character)
