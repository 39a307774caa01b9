"""Where the text of growing token ids may be cut, by the decoder of a tokenizer.

Text is cut after token n if the text of the first n tokens begins that of any longer
output, and if the text of what follows can be had from the tokens that follow and a few
before them. Which places those are depends on the steps that a decoder is made of. What
is not known here is never cut: a text that comes late is better than one taken back.
"""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

_BYTE = re.compile("<0x([+0-9A-Fa-f][0-9A-Fa-f])>")
_EACH_TOKEN = ("Replace", "Strip", "Metaspace", "WordPiece")


@dataclasses.dataclass(frozen=True)
class DecoderRule:
    """How a decoder lets its text be cut.

    `kind` is one of
      "bytes": tokens are bytes of UTF-8; cut wherever no character is unfinished.
      "tokens": every token adds its own text, given any text before it; cut anywhere.
      "runs": as "tokens", but neighbouring byte tokens (<0xE4>) are judged together:
        one wrong byte undoes the characters of its whole run. Cut outside of runs.
      "whole": nothing is known; never cut.
    """

    kind: str
    replaced: tuple[tuple[str, str], ...] = ()  # ("runs") in tokens, before bytes count
    is_plain: bool = False  # ("runs") the characters of a run are not changed further

    def ends_run(self, token: str) -> bool:
        """True if the text may be cut after `token`, whatever follows."""
        if self.kind == "runs":
            return self._byte(token) is None
        return self.kind == "tokens"

    def byte(self, token: str) -> int | None:
        """The byte that `token` adds to a run as it is, if it adds one."""
        return self._byte(token) if self.is_plain else None

    def _byte(self, token: str) -> int | None:
        for old, new in self.replaced:
            token = token.replace(old, new)
        found = _BYTE.fullmatch(token)
        return int(found[1], 16) if found else None


def decoder_rule(decoder: Any) -> DecoderRule:
    """The rule of a decoder of the ``tokenizers`` package (None: tokens and spaces)."""
    if decoder is None:
        return DecoderRule("tokens")
    try:
        steps = _steps(json.loads(decoder.__getstate__()))
    except Exception:  # written in Python: the package cannot describe it
        return DecoderRule("whole")
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return DecoderRule("bytes")
    first_fuse = kinds.index("Fuse") if "Fuse" in kinds else len(kinds)
    # What is fused is one text: only what strips its beginning leaves the rest alone.
    if not all(
        kind == "Fuse" or (kind == "Strip" and step["stop"] == 0)
        for kind, step in zip(kinds[first_fuse:], steps[first_fuse:], strict=True)
    ):
        return DecoderRule("whole")
    before, kinds = steps[:first_fuse], kinds[:first_fuse]
    if "ByteFallback" not in kinds:
        is_known = all(kind in _EACH_TOKEN for kind in kinds)
        return DecoderRule("tokens" if is_known else "whole")
    at = kinds.index("ByteFallback")
    replaced = [_literal(step) for step in before[:at]]
    if None in replaced or not all(kind in _EACH_TOKEN for kind in kinds[at + 1 :]):
        return DecoderRule("whole")
    return DecoderRule("runs", tuple(replaced), is_plain=kinds[-1] == "ByteFallback")


def _steps(described: dict[str, Any]) -> list[dict[str, Any]]:
    if described["type"] != "Sequence":
        return [described]
    return [step for inner in described["decoders"] for step in _steps(inner)]


def _literal(step: dict[str, Any]) -> tuple[str, str] | None:
    """(old, new) of a step that replaces a fixed text, else None."""
    old = step["pattern"].get("String") if step["type"] == "Replace" else None
    return (old, step["content"]) if old else None
