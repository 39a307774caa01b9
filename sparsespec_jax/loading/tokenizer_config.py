"""What tokenizer_config.json says beside tokenizer.json: tokens and chat templates."""

from __future__ import annotations

import json
from pathlib import Path
from reprlib import repr as short
from typing import Any

import tokenizers

_NAMES = tuple(f"{name}_token" for name in "bos eos unk sep pad cls mask".split())
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


class TokenizerConfig:
    """The tokenizer_config.json of a directory, checked; without the file all is empty.

    Attributes:
        special_tokens: the text of special tokens by name ("eos_token"), those that the
            file names.
        chat_template: Jinja source, or several by name, or None. The file
            chat_template.jinja comes before what the configuration holds.

    Raises:
        ValueError: a file is no JSON object or no UTF-8, or a key is of a wrong type.
    """

    def __init__(self, directory: Path):
        """Read and check the files of directory."""
        self._path = directory / "tokenizer_config.json"
        self._keys = self._read()
        self.special_tokens: dict[str, str] = {}
        for key, value in self._keys.items():
            # Other names are the model's own, such as image_token; add_bos_token is no
            # token.
            is_text = isinstance(value, str) or "content" in _object(value)
            if key in _NAMES or (key.endswith("_token") and is_text):
                self._name_token(key, value)
        for key, value in _object(self._keys.get("extra_special_tokens")).items():
            self._name_token(key, value)
        self.chat_template = self._chat_template(directory / "chat_template.jinja")

    def add_tokens(self, backend: tokenizers.Tokenizer) -> None:
        """Add the listed tokens that the backend lacks, or has with other flags.

        Raises:
            ValueError: a token's id is another token's, or is not the next free one.
        """
        listed = self._keys.get("added_tokens_decoder") or {}
        if not isinstance(listed, dict):
            self._refuse("added_tokens_decoder", "an object", listed)
        known = backend.get_added_tokens_decoder()
        numbered = {self._id(key): entry for key, entry in listed.items()}
        for token_id, entry in sorted(numbered.items()):
            token = self._added_token(f"added_tokens_decoder.{token_id}", entry)
            if known.get(token_id) == token:
                continue
            self._check_id(backend, token.content, token_id)
            _add(backend, token)
            if (free := backend.token_to_id(token.content)) != token_id:
                raise self._conflict(token.content, token_id, f"the next one is {free}")
        added = {token.content for token in backend.get_added_tokens_decoder().values()}
        for text in (*self.special_tokens.values(), *self._unnamed()):
            if text and text not in added:
                _add(backend, tokenizers.AddedToken(text, special=True))

    def _check_id(self, backend, text: str, token_id: int) -> None:
        """Raise if the id or the token is taken already, by another."""
        there, own = backend.id_to_token(token_id), backend.token_to_id(text)
        if own is not None and own != token_id:
            raise self._conflict(text, token_id, f"there its id is {own}")
        if own is None and there is not None:
            raise self._conflict(text, token_id, f"there that is {there!r}")

    def _conflict(self, text: str, token_id: int, reason: str) -> ValueError:
        return ValueError(
            f"{self._path}: added_tokens_decoder gives the token {text!r} the id "
            f"{token_id}, which does not fit tokenizer.json: {reason}. Fetch both "
            "files again from one source"
        )

    def _read(self) -> dict[str, Any]:
        if not self._path.is_file():
            return {}
        try:
            keys = json.loads(_text(self._path))
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{self._path} is not JSON: {error}") from error
        if not isinstance(keys, dict):
            raise ValueError(f"{self._path} must hold an object, got {short(keys)}")
        return keys

    def _name_token(self, key: str, value: Any) -> None:
        if value is not None:
            self.special_tokens[key] = self._content(key, value)

    def _unnamed(self) -> list[str]:
        """Special tokens that are listed without a name."""
        key = "extra_special_tokens"
        if not self._keys.get(key):
            key = "additional_special_tokens"
        listed = self._keys.get(key) or []
        if isinstance(listed, dict):
            return []  # these have names
        if not isinstance(listed, list):
            self._refuse(key, "a list", listed)
        return [self._content(f"{key}[{i}]", item) for i, item in enumerate(listed)]

    def _content(self, key: str, token: Any) -> str:
        # Files write a token as a string or as an object with its string inside.
        text = token.get("content") if isinstance(token, dict) else token
        if not isinstance(text, str):
            self._refuse(key, "a string or an object with 'content'", token)
        return text

    def _id(self, key: str) -> int:
        if not (key.isascii() and key.isdigit() and int(key) < 2**32):
            self._refuse("added_tokens_decoder", "an object with ids as keys", key)
        return int(key)

    def _added_token(self, key: str, entry: Any) -> tokenizers.AddedToken:
        if not isinstance(entry, dict):
            self._refuse(key, "an object with 'content'", entry)
        text = self._content(key, entry)
        flags = {name: entry[name] for name in _FLAGS if name in entry}
        for name, flag in flags.items():
            if not isinstance(flag, bool):
                self._refuse(f"{key}.{name}", "true or false", flag)
        if text in self.special_tokens.values():
            flags["special"] = True
        return tokenizers.AddedToken(text, **flags)

    def _chat_template(self, beside: Path) -> str | dict[str, str] | None:
        if beside.is_file():
            return _text(beside)
        found = self._keys.get("chat_template")
        if isinstance(found, list):  # several, by name
            for i, entry in enumerate(found):
                keys = [_object(entry).get(key) for key in ("name", "template")]
                if not all(isinstance(key, str) for key in keys):
                    wanted = "an object with 'name' and 'template'"
                    self._refuse(f"chat_template[{i}]", wanted, entry)
            return {entry["name"]: entry["template"] for entry in found}
        values = found.values() if isinstance(found, dict) else (found or "",)
        if not all(isinstance(value, str) for value in values):
            self._refuse("chat_template", "a string or strings by name", found)
        return found

    def _refuse(self, key: str, wanted: str, value: Any):
        raise ValueError(
            f"{self._path}: {key} must be {wanted}, got {short(value)}: mend the file "
            "or fetch it again"
        )


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _add(backend: tokenizers.Tokenizer, token: tokenizers.AddedToken) -> None:
    # Which of the two methods is called decides what the token's own flag says.
    (backend.add_special_tokens if token.special else backend.add_tokens)([token])


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error
