"""Prompts: built-in problems, essays and puzzles, and prompt files."""

from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib
import random

from sparsespec_jax.host.intake import prepare_all
from sparsespec_jax.loading.chat import chat_messages

# A prompt is text, a list of chat messages or a list of token ids.
Prompt = str | list[dict] | list[int]
_VARIABLES = "chat_template_kwargs"
_COMMON_VARIABLES = ("tools", "documents", "enable_thinking")


@dataclasses.dataclass(frozen=True)
class PromptLine:
    """A prompt of a file, and what its line says beside it."""

    prompt: Prompt
    chat_template_kwargs: dict | None = None
    rest: dict = dataclasses.field(default_factory=dict)  # keys that are the user's


def prepare_lines(model, lines, laws):
    """PreparedPrompt of each PromptLine; `laws` are as many SamplingParams.

    Raises:
        ValueError: as `intake.prepare_all`.
    """
    prompts = [line.prompt for line in lines]
    variables = [line.chat_template_kwargs for line in lines]
    return prepare_all(model, prompts, laws, variables)


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


# Problems that take many steps and no figures to look up.
_REASONING = (
    "A clock loses 4 minutes an hour and another gains 2. Both are set right at noon. "
    "When do they next show the same time, and when do both next show the right one?",
    "In how many ways can a path of 10 squares be covered by tiles of 1, 2 and 3 "
    "squares if no two tiles of 3 may touch? Set up a recurrence and work it out.",
    "Five people shake hands at a party, nobody with their own partner. Asked, all but "
    "the host name a different number of handshakes. How many did the partner of the "
    "host make? Argue case by case.",
    "A tank has two inlets that fill it in 6 and 9 hours and a leak that empties it in "
    "12. The leak opens only above half. How long does filling take from empty?",
    "Show that among any 7 whole numbers there are two whose difference or sum is "
    "divisible by 10. Then find the largest set for which it fails.",
    "A robot walks on a grid from (0, 0) to (6, 5), right or up. Squares (2, 2) and "
    "(4, 3) are holes. Count its ways in two different manners and compare.",
    "Three switches outside a room belong to three lamps inside. You may enter twice. "
    "Plan what to do if one of the lamps may be broken, and prove that it suffices.",
    "Find all whole numbers n below 200 for which n squared ends in the digits of n. "
    "Reason with remainders before you test anything.",
    "A game: from a heap of 50 stones players take 1, 3 or 4 in turn; who takes the "
    "last wins. Who wins, and by what rule? Derive the pattern and prove it.",
    "A train of 200 m passes a walker who goes the same way in 10 s and one who comes "
    "towards it in 8 s; both walk equally fast. How fast are train and walkers?",
    "You have weights of 1, 3, 9 and 27 g and a balance. Which whole weights up to 40 "
    "g can be told, and how is 23 g weighed? Explain why no four weights do better.",
    "Two urns hold 3 red and 2 blue, and 1 red and 4 blue balls. One ball moves from "
    "the first to the second, then one is drawn from the second: it is red. What is "
    "the chance that the ball that moved was red? Check by listing all cases.",
    "A sequence starts 1, 1 and goes on with the sum of the last two, less 1 if that "
    "sum is even. Work out its first fifteen members, guess a law and try to prove it.",
    "A farmer fences a rectangle along a river with 120 m of fence and one dividing "
    "fence at a right angle to the river. Which shape has most area? Solve it by "
    "completing a square and again by symmetry.",
    "Each of 8 boxes is heavier than the one before by the same amount, but one was "
    "filled wrongly. Plan weighings in pairs that find it, and count the worst case.",
    "Write 2026 as a sum of consecutive whole numbers in every possible way, and "
    "explain how the number of ways follows from its divisors.",
)


def essays(count: int) -> list[Prompt]:
    """`count` chats that ask for a long text, all different; at most 32."""
    pairs = list(itertools.product(_ESSAYS, _TOPICS))
    if count > len(pairs):
        raise ValueError(f"num_prefixes must be at most {len(pairs)}, got {count}")
    random.Random(0).shuffle(pairs)
    return [as_chat(task.format(topic)) for task, topic in pairs[:count]]


def reasoning(count: int) -> list[Prompt]:
    """The first `count` of 16 problems as chats that ask for every step.

    Raises:
        ValueError: there are not so many.
    """
    if count > len(_REASONING):
        raise ValueError(
            f"num_prefixes must be at most {len(_REASONING)} for reasoning, got {count}"
        )
    return [
        as_chat(f"{problem}\n\nThink it through step by step, and check the result.")
        for problem in _REASONING[:count]
    ]


_ESSAYS = (
    "Explain in detail, with worked examples, {}.",
    "Write a long and careful essay about {}.",
    "Tell a long story, rich in detail, in which someone discovers {}.",
    "Set yourself three hard exercises about {} and solve them step by step.",
)
_TOPICS = (
    "how prime numbers are distributed",
    "the geometry of triangles and circles",
    "the tides and the motion of the moon",
    "how bread rises and why it browns",
    "counting arguments and the pigeonhole principle",
    "the history of measuring time",
    "how a city supplies itself with water",
    "linear equations and their applications",
)


def built_in() -> list[Prompt]:
    """The built-in problems as chat messages."""
    return [as_chat(problem) for problem in _PROBLEMS]


def as_chat(text: str) -> Prompt:
    """`text` as the only user turn of a chat."""
    return [{"role": "user", "content": text}]


def load_prompts(
    path: str, *, chat: bool, chat_template_kwargs: dict | None = None
) -> list[PromptLine]:
    """Prompts of a file, or the built-in ones for an empty path.

    A .txt file holds one prompt per non-empty line. A line of a .jsonl file is a
    string, or an object with exactly one of ``prompt`` (text), ``messages`` (list of
    ``{"role", "content"}``, content a text or parts ``{"type": "text", "text"}``) and
    ``token_ids`` (list of integers). ``chat_template_kwargs`` beside it holds variables
    of the chat template; all other keys are `rest`. Lines end at a line feed, or a
    carriage return and a line feed, and nowhere else.

    Args:
        path: the file, UTF-8 with or without a byte-order mark; "" for the built-in
            problems.
        chat: wrap text prompts as the user turn of a chat.
        chat_template_kwargs: of all lines; a line's own come before.

    Raises:
        ValueError: the file is missing, empty or of another kind, or a line of it is
            malformed (the message names file and line).
    """
    if not path:
        return [PromptLine(chat, chat_template_kwargs) for chat in built_in()]
    suffix = pathlib.Path(path).suffix
    if suffix not in (".txt", ".jsonl"):
        raise ValueError(f"prompts: {path} must end in .txt or .jsonl")
    lines = []
    for number, line in enumerate(_read_lines(path), start=1):
        if line.strip():
            parse = _parse_text if suffix == ".txt" else parse_json
            found = parse(line, f"{path}:{number}")
            lines.append(completed(found, chat, chat_template_kwargs))
    if not lines:
        raise ValueError(f"prompts: {path} holds no prompt")
    return lines


def completed(line: PromptLine, chat: bool, variables: dict | None) -> PromptLine:
    """A line as `load_prompts` gives it, with what all lines have."""
    variables = (variables or {}) | (line.chat_template_kwargs or {}) or None
    is_text = isinstance(line.prompt, str)
    prompt = as_chat(line.prompt) if chat and is_text else line.prompt
    return PromptLine(prompt, variables, line.rest)


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


def _parse_text(line, where) -> PromptLine:
    if "\0" in line:
        raise ValueError(
            f"prompts: {where} holds a NUL byte: save the file as UTF-8 text"
        )
    return PromptLine(line)


def parse_json(line, where) -> PromptLine:
    """PromptLine of a line of a .jsonl file, see `load_prompts`; ValueError if none."""
    try:
        value = _DECODE(line)
    except RecursionError:
        raise ValueError(f"prompts: {where} is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"prompts: {where} is not JSON: {error}") from None
    return parse_value(value, where)


def parse_value(value, where) -> PromptLine:
    """PromptLine of what a line of a .jsonl file holds; `where` names it in errors."""
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
    try:
        fits = kinds[kind](value[kind])
    except ValueError as error:
        raise ValueError(f"prompts: {where}: {error}") from None
    if not fits:
        raise ValueError(f"prompts: {where}: {kind} is empty or of the wrong type")
    variables = value.get(_VARIABLES)
    if not isinstance(variables, dict | None):
        raise ValueError(f"prompts: {where}: {_VARIABLES} must be an object")
    for name in _COMMON_VARIABLES:
        if name in value:
            raise ValueError(f"prompts: {where}: put {name} into {_VARIABLES}")
    texts = (_VARIABLES,) if kind == "token_ids" else (kind, _VARIABLES)
    _refuse_half_pairs({k: value[k] for k in texts if k in value}, where)
    rest = {k: v for k, v in value.items() if k not in (kind, _VARIABLES)}
    return PromptLine(value[kind], variables, rest)


def _refuse_half_pairs(texts, where):
    for name, value in texts.items():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            code = ord(error.object[error.start])
            raise ValueError(
                f"prompts: {where}: {name} holds \\u{code:04x}, half of a surrogate "
                "pair, which is no character"
            ) from None


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


# Made once: a job has a million lines.
_DECODE = json.JSONDecoder(
    object_pairs_hook=_without_repeats, parse_constant=_refuse_constant
).decode


def _is_text(value):
    return isinstance(value, str) and bool(value.strip())


def _is_chat(value):
    return isinstance(value, list) and bool(chat_messages(value))


def _is_ids(value):
    # True and False are of another type.
    is_list = isinstance(value, list) and bool(value)
    return is_list and set(map(type, value)) == {int} and min(value) >= 0
