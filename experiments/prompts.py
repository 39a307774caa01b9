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
    ignored. Lines end at a line feed, or a carriage return and a line feed, and nowhere
    else.

    Args:
        path: the file, UTF-8 with or without a byte-order mark; "" for the built-in
            problems.
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
    prompts = []
    for number, line in enumerate(_read_lines(path), start=1):
        if line.strip():
            parse = _parse_text if suffix == ".txt" else _parse
            prompt = parse(line, f"{path}:{number}")
            as_text = isinstance(prompt, str)
            prompts.append(as_chat(prompt) if as_text and chat else prompt)
    if not prompts:
        raise ValueError(f"prompts: {path} holds no prompt")
    return prompts


def _read_lines(path):
    """Lines of a text file without their ends; other separators are text."""
    try:
        text = pathlib.Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"prompts: cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        number = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"prompts: {path}:{number} is not UTF-8 text") from None
    return [line.removesuffix("\r") for line in text.split("\n")]


def _parse_text(line, where) -> str:
    if "\0" in line:
        raise ValueError(
            f"prompts: {where} holds a NUL byte: save the file as UTF-8 text"
        )
    return line


def _parse(line, where) -> Prompt:
    try:
        value = json.loads(
            line, object_pairs_hook=_without_repeats, parse_constant=_refuse_constant
        )
    except RecursionError:
        raise ValueError(f"prompts: {where} is nested too deeply") from None
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
    try:
        json.dumps(value[kind], ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        code = ord(error.object[error.start])
        raise ValueError(
            f"prompts: {where}: {kind} holds \\u{code:04x}, half of a surrogate pair, "
            "which is no character"
        ) from None
    return value[kind]


def _without_repeats(pairs):
    """A dict of the pairs; which of two values is meant, nobody can say."""
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {repeated!r} is there twice")
    return value


def _refuse_constant(name):
    raise ValueError(f"{name} is no JSON number")


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
