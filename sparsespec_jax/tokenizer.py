"""Text to token ids and back, and chat templates.

One class over the ``tokenizers`` package, filled from a Hugging Face directory
(``tokenizer.json``) or from the bare vocabulary of a GGUF file.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

# Token types of GGUF vocabularies.
_CONTROL, _USER_DEFINED = 3, 4

# Where words end before byte-pair merging, by the names that GGUF files use.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_AFTER_DIGITS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LETTERS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_SPLIT_PATTERNS = {
    "llama-bpe": _CONTRACTIONS + _LETTERS + r"\p{N}{1,3}" + _AFTER_DIGITS,
    "qwen2": _CONTRACTIONS + _LETTERS + r"\p{N}" + _AFTER_DIGITS,
}
PRE_TOKENIZERS = ("gpt-2", "smollm", *_SPLIT_PATTERNS)


class Tokenizer:
    """Token ids of texts and chats; immutable after construction.

    Attributes:
        backend: the ``tokenizers.Tokenizer`` that does the work.
        bos_id: id that starts a text, or None. ``encode`` adds it only if the
            backend's post-processor says so.
        eos_ids: ids any of which ends a text.
        chat_template: Jinja source, or None if the model has no chat format.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_id: int | None = None,
        eos_ids: Sequence[int] = (),
        chat_template: str | None = None,
    ):
        """Wrap a backend; nothing is added to it."""
        self.backend = backend
        self.bos_id = bos_id
        self.eos_ids = tuple(eos_ids)
        self.chat_template = chat_template

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of text; special tokens written out in it become their ids.

        add_special_tokens: let the post-processor add what it does (for many models a
        leading BOS, for the default model nothing).
        """
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of ids; bytes that end amid a character become replacement marks."""
        ids = [int(i) for i in ids]
        return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def decode_stream(self, *, skip_special_tokens: bool = True) -> DecodeStream:
        """A decoder that takes ids as they come and gives out whole characters."""
        return DecodeStream(self.backend, skip_special_tokens=skip_special_tokens)

    def token_id(self, token: str) -> int:
        """Id of one token given as it is written in the vocabulary."""
        found = self.backend.token_to_id(token)
        if found is None:
            raise ValueError(f"the vocabulary has no token {token!r}")
        return found

    def chat_text(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The chat template filled with messages of {"role": ..., "content": ...}.

        variables: what else the template reads, e.g. ``enable_thinking`` or ``tools``.

        Raises:
            ValueError: there is no template, or it refuses these messages.
        """
        if self.chat_template is None:
            raise ValueError(
                "this model has no chat template: it is a base model, or its "
                "tokenizer_config.json is missing; encode plain text instead"
            )
        special = {"bos_token": self._token(self.bos_id), "eos_token": self._eos()}
        try:
            template = _environment().from_string(self.chat_template)
            return template.render(
                messages=list(messages),
                add_generation_prompt=add_generation_prompt,
                **(special | variables),
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template failed: {error}") from error

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], **options: Any
    ) -> list[int]:
        """Ids of ``chat_text``; the template alone says what special tokens occur."""
        return self.encode(
            self.chat_text(messages, **options), add_special_tokens=False
        )

    def save(self, directory: str | Path) -> None:
        """Write what ``tokenizer_from_directory`` reads back."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(directory / "tokenizer.json"))
        described = {
            "bos_token": self._token(self.bos_id),
            "eos_token": self._eos(),
            "chat_template": self.chat_template,
        }
        text = json.dumps(described, indent=2, ensure_ascii=False)
        (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")

    def _token(self, token_id: int | None) -> str | None:
        return None if token_id is None else self.backend.id_to_token(token_id)

    def _eos(self) -> str | None:
        return self._token(self.eos_ids[0]) if self.eos_ids else None


class DecodeStream:
    """Text of a growing list of ids; joins the bytes of split characters."""

    def __init__(self, backend: tokenizers.Tokenizer, *, skip_special_tokens: bool):
        """Start at the beginning of a text."""
        self._backend = backend
        self._stream = decoders.DecodeStream(skip_special_tokens=skip_special_tokens)

    def push(self, token_id: int) -> str:
        """What text token_id completes, "" while a character is incomplete."""
        return self._stream.step(self._backend, int(token_id)) or ""


def tokenizer_from_directory(
    directory: str | Path, *, eos_ids: Sequence[int] = ()
) -> Tokenizer:
    """The tokenizer of a Hugging Face directory.

    eos_ids: the model's, put before the one that the tokenizer's files name.

    Raises:
        ValueError: tokenizer.json is missing or damaged.
    """
    directory = Path(directory)
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise ValueError(
            f"{directory} has no tokenizer.json. Write one with transformers: "
            "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR). Decoding token "
            "ids works without."
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises bare Exception
        raise ValueError(f"{path} cannot be read: {error}") from error
    described = _read_json(directory / "tokenizer_config.json")
    special = {
        kind: _special_id(backend, described.get(f"{kind}_token"))
        for kind in ("bos", "eos")
    }
    named = () if special["eos"] is None else (special["eos"],)
    return Tokenizer(
        backend,
        bos_id=special["bos"],
        eos_ids=tuple(dict.fromkeys((*eos_ids, *named))),
        chat_template=_chat_template(directory, described),
    )


def tokenizer_from_vocabulary(
    tokens: Sequence[str],
    merges: Sequence[str],
    *,
    token_types: Sequence[int],
    pre_tokenizer: str,
    bos_id: int | None = None,
    add_bos: bool = False,
    eos_ids: Sequence[int] = (),
    chat_template: str | None = None,
) -> Tokenizer:
    """A byte-level BPE tokenizer from the vocabulary that a GGUF file carries.

    tokens: in id order, bytes spelled as in GPT-2. merges: "left right", best first.
    token_types: 1 ordinary, 3 special, 4 added by the user; one a token.

    Raises:
        ValueError: pre_tokenizer is not one of PRE_TOKENIZERS.
    """
    if pre_tokenizer not in PRE_TOKENIZERS:
        raise ValueError(
            f"pre-tokenizer {pre_tokenizer!r} is not known; supported are "
            f"{', '.join(PRE_TOKENIZERS)}. A wrong one gives other ids for the same "
            "text, so none is assumed: load the model's own directory instead"
        )
    vocabulary = {token: i for i, token in enumerate(tokens)}
    # A space inside a token is spelled as another character, so one space splits.
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    # No unknown token: bytes without a token are dropped, as the originals do.
    whole_words = pre_tokenizer == "llama-bpe"
    model = models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=whole_words)
    backend = tokenizers.Tokenizer(model)
    if pre_tokenizer == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = _pre_tokenizer(pre_tokenizer)
    backend.decoder = decoders.ByteLevel()
    for kind, add in (
        (_CONTROL, backend.add_special_tokens),
        (_USER_DEFINED, backend.add_tokens),
    ):
        special = kind == _CONTROL
        # Not normalised: the markers must be found before the text is split.
        add(
            [
                tokenizers.AddedToken(token, special=special, normalized=False)
                for token, its_kind in zip(tokens, token_types, strict=True)
                if its_kind == kind
            ]
        )
    if add_bos and bos_id is not None:
        bos = tokens[bos_id]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, bos_id)]
        )
    return Tokenizer(
        backend, bos_id=bos_id, eos_ids=eos_ids, chat_template=chat_template
    )


def _pre_tokenizer(name: str) -> pre_tokenizers.PreTokenizer:
    if name == "gpt-2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
        return pre_tokenizers.Sequence([digits, gpt2])
    words = pre_tokenizers.Split(
        tokenizers.Regex(_SPLIT_PATTERNS[name]), behavior="isolated"
    )
    spelled = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([words, spelled])


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def _special_id(backend: tokenizers.Tokenizer, token: Any) -> int | None:
    # Files write a token as a string or as an object with its string inside.
    text = token.get("content") if isinstance(token, dict) else token
    return None if text is None else backend.token_to_id(text)


def _chat_template(directory: Path, described: dict[str, Any]) -> str | None:
    beside = directory / "chat_template.jinja"
    if beside.is_file():
        return beside.read_text(encoding="utf-8")
    found = described.get("chat_template")
    if isinstance(found, list):  # several, by name
        by_name = {entry["name"]: entry["template"] for entry in found}
        found = by_name.get("default")
    return found


def _environment() -> jinja2.Environment:
    """Jinja as chat templates expect it; sandboxed, since they come with weights."""

    def refuse(message: str):
        raise jinja2.TemplateError(message)

    def to_json(value: Any, indent: int | None = None) -> str:
        # Jinja's own escapes HTML characters.
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(
        form
    )
    return environment
