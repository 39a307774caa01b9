"""Prompts: the built-in mathematics problems and prompt files."""

from __future__ import annotations

import json
import pathlib

# A prompt is text, a list of chat messages or a list of token ids.
Prompt = str | list[dict] | list[int]

_PROBLEMS = (
    "A ferry leaves the north bank every 12 minutes and the south bank every 18 "
    "minutes. Both leave together at nine o'clock. How often do they leave together "
    "before noon? Explain each step.",
    "Prove that the sum of the first n odd numbers is a perfect square, first with a "
    "picture described in words and then by induction.",
    "Two trains start 300 km apart and drive towards each other at 70 and 80 km/h. A "
    "swallow flies between them at 110 km/h until they meet. How far does the swallow "
    "fly? Give two different solutions.",
    "A bag holds 5 red and 7 blue marbles. Three are drawn without putting any back. "
    "Work out the chance that exactly two are red, and check it by a second method.",
)


def built_in() -> list[Prompt]:
    """The built-in problems as chat messages."""
    return [as_chat(problem) for problem in _PROBLEMS]


def as_chat(text: str) -> Prompt:
    """`text` as the only user turn of a chat."""
    return [{"role": "user", "content": text}]


def load_prompts(path: str, *, chat: bool) -> list[Prompt]:
    """Prompts of a file, or the built-in ones for an empty path.

    A .txt file holds one prompt per non-empty line. A line of a .jsonl file is a
    string, or an object with exactly one of ``prompt`` (text), ``messages`` (list of
    ``{"role", "content"}``) and ``token_ids`` (list of integers); its other keys are
    ignored.

    Args:
        path: the file; "" for the built-in problems.
        chat: wrap text prompts as the user turn of a chat.

    Raises:
        ValueError: the file is missing, empty or of another kind, or a line of it is
            malformed (the message names file and line).
    """
    if not path:
        return built_in()
    suffix = pathlib.Path(path).suffix
    if suffix not in (".txt", ".jsonl"):
        raise ValueError(f"prompts: {path} must end in .txt or .jsonl")
    try:
        lines = pathlib.Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(f"prompts: cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"prompts: {path} is not UTF-8 text") from None
    prompts = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            prompt = line if suffix == ".txt" else _parse(line, f"{path}:{number}")
            as_text = isinstance(prompt, str)
            prompts.append(as_chat(prompt) if as_text and chat else prompt)
    if not prompts:
        raise ValueError(f"prompts: {path} holds no prompt")
    return prompts


def _parse(line, where) -> Prompt:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise ValueError(f"prompts: {where} is not JSON: {error}") from None
    if isinstance(value, str):
        value = {"prompt": value}
    kinds = {"prompt": _is_text, "messages": _is_chat, "token_ids": _is_ids}
    found = [k for k in kinds if isinstance(value, dict) and k in value]
    if len(found) != 1:
        raise ValueError(
            f"prompts: {where} must be a string or an object with one of "
            f"{', '.join(kinds)}; found {found or type(value).__name__}"
        )
    kind = found[0]
    if not kinds[kind](value[kind]):
        raise ValueError(f"prompts: {where}: {kind} is empty or of the wrong type")
    return value[kind]


def _is_text(value):
    return isinstance(value, str) and bool(value.strip())


def _is_chat(value):
    def is_message(item):
        keys = ("role", "content")
        return isinstance(item, dict) and all(
            isinstance(item.get(key), str) for key in keys
        )

    return isinstance(value, list) and bool(value) and all(map(is_message, value))


def _is_ids(value):
    def is_id(item):
        return isinstance(item, int) and not isinstance(item, bool) and item >= 0

    return isinstance(value, list) and bool(value) and all(map(is_id, value))
