"""Text to token ids and back, and chat templates.

One class over the ``tokenizers`` package, filled from a Hugging Face directory
(``tokenizer.json``) or from the bare vocabulary of a GGUF file.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from sparsespec_jax.loading.chat import chat_messages, check_variables, render
from sparsespec_jax.loading.decoder_rules import DecoderRule, decoder_rule
from sparsespec_jax.loading.tokenizer_config import TokenizerConfig

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
        chat_template: Jinja source, or several by name, or None if the model has no
            chat format.
        special_tokens: the text of special tokens by the names that templates use.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_id: int | None = None,
        eos_ids: Sequence[int] = (),
        chat_template: str | Mapping[str, str] | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ):
        """Wrap a backend; nothing is added to it.

        special_tokens: None takes "bos_token" and "eos_token" from the ids.
        """
        self.backend = backend
        self.bos_id = bos_id
        self.eos_ids = tuple(eos_ids)
        self.chat_template = chat_template
        if special_tokens is None:
            ids = {"bos_token": bos_id, "eos_token": next(iter(eos_ids), None)}
            texts = {k: i if i is None else self._text(i) for k, i in ids.items()}
            special_tokens = {k: text for k, text in texts.items() if text is not None}
        self.special_tokens = dict(special_tokens)

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of text; special tokens written out in it become their ids.

        add_special_tokens: let the post-processor add what it does (for many models a
        leading BOS, for the default model nothing).

        Raises:
            ValueError: the text has half of a surrogate pair, or what the vocabulary
                cannot write.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"character {error.start} of the text is {text[error.start]!r}, half "
                "of a surrogate pair, which is no character: read the text with "
                "errors='replace'"
            ) from None
        try:
            return self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        except Exception as error:  # the package raises bare Exception
            raise ValueError(
                f"the tokenizer cannot encode the text: {error}"
            ) from error

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of ids; bytes that end amid a character become replacement marks."""
        ids = [int(i) for i in ids]
        return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)

    @functools.cached_property
    def decoder_rule(self) -> DecoderRule:
        """Where the text of growing ids may be cut."""
        return decoder_rule(self.backend.decoder)

    def piece(self, token_id: int) -> str | None:
        """The token as the decoder reads it; None if ``decode`` leaves it out."""
        piece = self._text(token_id)
        return None if piece in self._left_out else piece

    @functools.cached_property
    def _left_out(self) -> frozenset[str]:
        """Tokens that ``decode`` skips: those that are or once were special."""
        decode, added = self.backend.decode, self.backend.get_added_tokens_decoder()
        special = {token.content for token in added.values() if token.special}
        once = {self._text(i) for i in added if decode([i]) != decode([i], False)}
        return frozenset(special | once)

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
            ValueError: there is no template, a message is no text (see
                ``chat_messages``), the template never reads a variable, or it fails.
        """
        known = {"tools": None, "documents": None} | self.special_tokens | variables
        known["messages"] = chat_messages(messages)
        known["add_generation_prompt"] = add_generation_prompt
        template = self._template(known["tools"])
        if variables:
            check_variables(template, variables)
        return render(template, known)

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
        template = self.chat_template
        if isinstance(template, Mapping):
            named = template.items()
            template = [{"name": name, "template": text} for name, text in named]
        described = self.special_tokens | {"chat_template": template}
        text = json.dumps(described, indent=2, ensure_ascii=False)
        (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")

    def _text(self, token_id: int) -> str | None:
        return self.backend.id_to_token(token_id)

    def _template(self, tools: Any) -> str:
        found = self.chat_template
        if found is None:
            raise ValueError(
                "this model has no chat template: it is a base model, or its "
                "tokenizer_config.json is missing; encode plain text instead"
            )
        if isinstance(found, str):
            return found
        names = ("default",) if tools is None else ("tool_use", "default")
        for name in names:
            if name in found:
                return found[name]
        raise ValueError(
            f"this model has chat templates named {sorted(found)} and none named "
            f"{names[-1]!r}: set tokenizer.chat_template to the source of one"
        )


def tokenizer_from_directory(
    directory: str | Path, *, eos_ids: Sequence[int] = ()
) -> Tokenizer:
    """The tokenizer of a Hugging Face directory.

    Texts are encoded whole: truncation and padding that tokenizer.json stores are not
    applied. Tokens that only tokenizer_config.json lists are added.

    eos_ids: the model's, put before the one that the tokenizer's files name.

    Raises:
        ValueError: tokenizer.json is missing, or a file is damaged or wrong.
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
    backend.no_truncation()
    backend.no_padding()
    config = TokenizerConfig(directory)
    config.add_tokens(backend)
    bos, eos = (
        backend.token_to_id(config.special_tokens.get(name, ""))
        for name in ("bos_token", "eos_token")
    )
    named = () if eos is None else (eos,)
    return Tokenizer(
        backend,
        bos_id=bos,
        eos_ids=tuple(dict.fromkeys((*eos_ids, *named))),
        chat_template=config.chat_template,
        special_tokens=config.special_tokens,
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
        ValueError: pre_tokenizer is not one of PRE_TOKENIZERS, or tokens, merges, types
            and bos_id do not fit each other.
    """
    if pre_tokenizer not in PRE_TOKENIZERS:
        raise ValueError(
            f"pre-tokenizer {pre_tokenizer!r} is not known; supported are "
            f"{', '.join(PRE_TOKENIZERS)}. A wrong one gives other ids for the same "
            "text, so none is assumed: load the model's own directory instead"
        )
    if len(token_types) != len(tokens):
        raise ValueError(
            f"the vocabulary has {len(tokens)} tokens and {len(token_types)} types of "
            "tokens; there must be one a token: the file is damaged"
        )
    if add_bos and bos_id is not None and not 0 <= bos_id < len(tokens):
        raise ValueError(
            f"bos_id {bos_id} is outside the vocabulary of {len(tokens)} tokens"
        )
    vocabulary = {token: i for i, token in enumerate(tokens)}
    # A space inside a token is spelled as another character, so one space splits.
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    # No unknown token: bytes without a token are dropped, as the originals do.
    whole_words = pre_tokenizer == "llama-bpe"
    try:
        model = models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=whole_words)
    except Exception as error:  # the package raises bare Exception
        raise ValueError(
            f"the merges do not fit the vocabulary ({error}): the file is damaged"
        ) from error
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
