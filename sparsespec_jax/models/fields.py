"""Values of a model's files, read by key and type; every error names file and key."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LARGEST = 2**31 - 1  # of a size or an id: what the device's integers hold
_REQUIRED = object()


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object that a file holds.

    Stricter than Python's own reader: a key given twice is refused, because either
    value could be meant, and so are NaN and Infinity, which are not JSON.

    Raises:
        ValueError: there is no such file, or it holds anything else.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ValueError(f"there is no {path.name} in {path.parent}") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    return parse_object(str(path), text)


def parse_object(origin: str, text: str) -> dict[str, Any]:
    """The JSON object that text holds; origin is what errors call it."""

    def no_number(name: str):
        raise ValueError(f"{name} is no JSON value")

    def no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            twin = next(key for key in keys if keys.count(key) > 1)
            raise ValueError(f"key {twin!r} is given more than once")
        return found

    try:
        found = json.loads(text, parse_constant=no_number, object_pairs_hook=no_twins)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{origin} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{origin} is {shown(found)}; it must be a JSON object")
    return found


def shown(value: Any) -> str:
    """The value as errors print it: one line of bounded length."""
    return reprlib.repr(value)


class Fields:
    """The values of one file, or of one object in it, by key.

    A default of None makes null a value like absence; any other default stands for
    absence alone, and null is refused.
    """

    def __init__(self, path: Path, values: Mapping[str, Any], *, prefix: str = ""):
        """Prefix stands before each key in errors, e.g. "rope_scaling."."""
        self.path = path
        self.values = values
        self._prefix = prefix

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def name(self, key: str) -> str:
        """What errors call a key."""
        return f"{self._prefix}{key}"

    def refusal(self, key: str, must: str) -> ValueError:
        """The error that says what the value of key must be."""
        value = shown(self.values.get(key))
        return ValueError(
            f"{self.path}: {self.name(key)} is {value}; it must be {must}"
        )

    def get(self, key: str, default: Any = _REQUIRED) -> Any:
        """The value as it is."""
        if key in self.values:
            return self.values[key]
        if default is _REQUIRED:
            raise ValueError(f"{self.path} lacks {self.name(key)}, which is required")
        return default

    def size(self, key: str, default: Any = _REQUIRED, *, least: int = 1) -> Any:
        """An integer from least to LARGEST."""
        value = self.get(key, default)
        if value is None and default is None:
            return None
        if type(value) is not int or not least <= value <= LARGEST:
            raise self.refusal(key, f"an integer from {least} to {LARGEST}")
        return value

    def number(self, key: str, default: Any = _REQUIRED) -> Any:
        """A finite number above 0, as a float."""
        value = self.get(key, default)
        if value is None and default is None:
            return None
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise self.refusal(key, "a number above 0")
        try:
            return float(value)
        except OverflowError:
            raise self.refusal(key, "a number that a float can hold") from None

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.get(key, default)
        if type(value) is not bool:
            raise self.refusal(key, "true or false")
        return value

    def token_ids(self, key: str, *, vocab_size: int) -> tuple[int, ...]:
        """The ids that one integer, a list of them, or null stands for."""
        value = self.get(key, None)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(i) is int and 0 <= i < vocab_size for i in ids):
            raise self.refusal(
                key,
                f"a token id or a list of them, each below vocab_size ({vocab_size})",
            )
        return tuple(ids)

    def within(self, key: str) -> Fields | None:
        """The fields of an object under key; None where there is none."""
        value = self.get(key, None)
        if value is None or value == {}:
            return None
        if not isinstance(value, dict):
            raise self.refusal(key, "an object or null")
        return Fields(self.path, value, prefix=f"{self.name(key)}.")


def read_heads(
    fields: Fields, *, hidden: str, heads: str, kv_heads: str, head_dim: str
) -> dict[str, int]:
    """The sizes of a model's heads under a format's keys, by their ModelConfig names.

    Without kv_heads every head has its own; without head_dim the heads share hidden.
    """
    hidden_size, num_heads = fields.size(hidden), fields.size(heads)
    num_kv_heads = fields.size(kv_heads, None) or num_heads
    if num_heads % num_kv_heads:
        raise fields.refusal(kv_heads, f"a divisor of {heads} ({num_heads})")
    width = fields.size(head_dim, None)
    if width is None:
        width = hidden_size // num_heads
        if hidden_size % num_heads or width % 2:
            raise fields.refusal(
                hidden, f"an even multiple of {heads} ({num_heads}) without {head_dim}"
            )
    if width % 2:
        raise fields.refusal(head_dim, "even, for rotary embedding")
    return {
        "hidden_size": hidden_size,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": width,
    }
