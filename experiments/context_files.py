"""Chat prompts over long texts that any machine has: source files and documents.

Source files are those of Python's standard library and of the installed numpy, jax and
flax; documents are the language reference that Python carries and the docstrings of
numpy, jax.numpy and flax.linen. Which are taken, and what is asked about each, follows
from a seed, the versions of these packages and the tokenizer, and from nothing else.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.metadata
import inspect
import itertools
import pathlib
import platform
import random
import sysconfig
from collections.abc import Sequence

import numpy as np

from experiments.prompts import as_chat

PACKAGES = ("numpy", "jax", "flax")
_DOCUMENTED = ("numpy", "jax.numpy", "flax.linen")
# Tests, other people's packages, and what a machine generates for itself.
_SKIPPED = frozenset(
    """site-packages dist-packages test tests testing internal_test_util idlelib
    turtledemo lib2to3 pydoc_data encodings ensurepip __pycache__""".split()
)
_SKIPPED_FILES = ("test_", "conftest", "_sysconfigdata", "__config__")
# Longer lines, long ones throughout, or few functions: tables of data.
_LONGEST_LINE, _LONG_LINE, _LINES_A_FUNCTION = 200, 60, 100
_SLACK = 32  # a prompt is longer than asked by at most 1 / _SLACK
# Characters that a token of a long text stands for, at least and at most.
_FEWEST_CHARACTERS, _MOST_CHARACTERS = 2, 6
_DOCUMENTS_TRIED = 20
_ORIGINS = ("python", "numpy", None, "jax", "flax")  # in turn; None: a document

# (kind of the answer, what is asked). The kinds tell where drafts come from: text
# of the prompt written again, text of the model's own, and steps of an argument.
_OF_CODE = (
    (
        "free",
        "Explain what this code does to somebody who has never seen it: first the "
        "whole in one paragraph, then every class and function in the order of the "
        "file, with what it takes, what it returns and why it is there.",
    ),
    (
        "copied",
        "Write the first two hundred lines of this file again in full, with a type "
        "annotation on every function and a comment above every block that needs one. "
        "Leave nothing out and change nothing else.",
    ),
    (
        "reasoning",
        "Find the function of this file that is hardest to follow. Call it by hand "
        "with two inputs of your own: go through it line by line, say what each "
        "variable holds after the line, and end with what is returned and whether "
        "that is right.",
    ),
    (
        "free",
        "Review this file as a strict but kind colleague. Make at least eight remarks "
        "about mistakes, missing checks, names and speed, the gravest first; quote the "
        "line that each is about and show the line that you would write instead.",
    ),
    (
        "copied",
        "Write tests with pytest for this file: at least ten, each for one function, "
        "with the edge cases that its code betrays. Import what is needed.",
    ),
)
_OF_DOCUMENTS = (
    (
        "free",
        "Turn this into a tutorial for a beginner: keep the order, explain every "
        "notion in plain words, and give a small worked example for each.",
    ),
    (
        "reasoning",
        "Set yourself ten questions that this text answers only if several of its "
        "places are put together. Answer each, step by step, and name the places.",
    ),
    (
        "copied",
        "Write down every rule that this text states, one after another, in its own "
        "words, and under each the example that the text gives for it, or a new one.",
    ),
)
_TASKS = {True: _OF_CODE, False: _OF_DOCUMENTS}  # by whether the text is code


@dataclasses.dataclass(frozen=True)
class Text:
    """A text to ask about."""

    origin: str  # "python", a package, or the module that is documented
    name: str
    lines: tuple[str, ...]
    sections: tuple[str, ...] = ()  # of a document

    @property
    def parts(self):
        """What no other prompt may be made of."""
        return {(self.origin, part) for part in self.sections or (self.name,)}


@dataclasses.dataclass(frozen=True)
class FilePrompt:
    """Token ids of a prompt, and what it is made of."""

    ids: tuple[int, ...]
    target: int  # tokens asked for
    kind: str
    origin: str
    name: str

    def described(self):
        """All but the ids, as JSON types."""
        described = dataclasses.asdict(self)
        del described["ids"]
        return described | {"tokens": len(self.ids)}


def versions():
    """What the texts follow from, beside the seed and the tokenizer."""
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version()} | found


def file_prompts(tokenizer, *, lengths: Sequence[int], count: int, seed: int):
    """`count` FilePrompts of each length, over texts that are all different.

    A prompt has at least `length` tokens, and at most 1 / 32 more. The first so many
    of them are of all lengths.

    Raises:
      ValueError: there are not so many texts that are long enough.
    """
    rng = random.Random(seed)
    tasks = {is_code: itertools.cycle(t) for is_code, t in _TASKS.items()}
    used: set[tuple[str, str]] = set()
    prompts = []
    for length in sorted(lengths, reverse=True):  # long texts are few
        for index in range(count):
            origin = _ORIGINS[index % len(_ORIGINS)]
            kind, task = next(tasks[origin is not None])
            candidates = _candidates(origin, length, rng, used)
            fitted = ((t, _fitted(tokenizer, t, task, length)) for t in candidates)
            found = next(((t, ids) for t, ids in fitted if ids is not None), None)
            if found is None:
                raise ValueError(
                    f"no text is left for prompt {index + 1} of {count} with {length} "
                    "tokens: ask for fewer, or for shorter ones"
                )
            text, ids = found
            used |= text.parts
            prompt = FilePrompt(ids, length, kind, text.origin, text.name)
            prompts.append((index, length, prompt))
    return [prompt for *_, prompt in sorted(prompts, key=lambda found: found[:2])]


def _candidates(origin, length, rng, used):
    """Texts that may be long enough, those of the origin wanted first."""
    if origin is None:
        texts = (_document(rng, length, used) for _ in range(_DOCUMENTS_TRIED))
    else:
        texts = list(code_texts())
        rng.shuffle(texts)
        texts.sort(key=lambda text: text.origin != origin)
    for text in texts:
        is_long = sum(map(len, text.lines)) >= _FEWEST_CHARACTERS * length
        if is_long and not text.parts & used:
            yield text


def _fitted(tokenizer, text, task, length):
    """Ids of the task over the text's first lines, as many as fit; None if too few."""
    most = length + length // _SLACK
    room, num_lines = _MOST_CHARACTERS * most, 0
    while num_lines < len(text.lines) and room > 0:
        room -= len(text.lines[num_lines])
        num_lines += 1
    low, high, best = 1, num_lines, None
    while low <= high:
        middle = (low + high) // 2
        ids = tokenizer.encode_chat(_chat(text, task, middle))
        if len(ids) > most:
            high = middle - 1
        else:
            low, best = middle + 1, ids
    return tuple(best) if best is not None and len(best) >= length else None


def _chat(text, task, num_lines):
    """A chat prompt about the first lines of a text."""
    content = "".join(text.lines[:num_lines]).rstrip("\n")
    if text.sections:
        head = f"Read this, {text.origin}, {text.name}:"
        return as_chat(f"{head}\n\n{content}\n\n{task}")
    part = "" if num_lines == len(text.lines) else f", its first {num_lines} lines"
    head = f"This is the file `{text.name}` of {text.origin}{part}:"
    return as_chat(f"{head}\n\n```python\n{content}\n```\n\n{task}")


@functools.cache
def code_texts() -> tuple[Text, ...]:
    """The source files, sorted by origin and name."""
    roots = {"python": pathlib.Path(sysconfig.get_paths()["stdlib"])}
    for name in PACKAGES:
        roots[name] = pathlib.Path(importlib.import_module(name).__file__).parent
    return tuple(
        text
        for origin, root in roots.items()
        for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).parts)
        if (text := _code(origin, root, path)) is not None
    )


def _code(origin, root, path):
    """The file as a Text, or None if it is none to ask about."""
    parts = path.relative_to(root).parts
    name = parts[-1].removesuffix(".py")
    skips = _SKIPPED.intersection(parts) or name.startswith(_SKIPPED_FILES)
    if skips or parts[0].startswith("config-") or name.endswith("_test"):
        return None
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except (OSError, UnicodeDecodeError):
        return None  # of another encoding, as few old files are
    size, longest = sum(map(len, lines)), max(map(len, lines), default=0)
    functions = sum(line.lstrip().startswith("def ") for line in lines)
    if longest > _LONGEST_LINE or size > len(lines) * _LONG_LINE:
        return None
    if not functions or functions * _LINES_A_FUNCTION < len(lines):
        return None
    return Text(origin, "/".join(parts), tuple(lines))


@functools.cache
def _references() -> tuple[tuple[str, dict[str, str]], ...]:
    """(name, {section: text}) of each reference."""
    from pydoc_data.topics import topics  # the language reference

    references = [("the language reference of Python", dict(sorted(topics.items())))]
    for name in _DOCUMENTED:
        module = importlib.import_module(name)
        references.append((f"the reference of {name}", _docstrings(module)))
    return tuple(references)


def _docstrings(module) -> dict[str, str]:
    """Those of the module's public functions and classes by name, each once."""
    sections: dict[str, str] = {}
    for name in sorted(dir(module)):
        value = getattr(module, name)
        is_number = isinstance(value, type) and issubclass(value, np.generic)
        if name.startswith("_") or not callable(value) or is_number:
            continue  # the text of a type of numbers names the machine
        text = inspect.getdoc(value) or ""
        if " at 0x" not in text and text not in sections.values():
            sections[name] = text
    return sections


def _document(rng, length, used) -> Text:
    """Sections that follow each other and no document has, from a random one on."""
    origin, sections = rng.choice(_references())
    names = [*sections]
    first = rng.randrange(len(names))
    lines: list[str] = []
    taken = []
    room = _MOST_CHARACTERS * length
    for name in names[first:] + names[:first]:
        if room < 0:
            break
        if (origin, name) not in used:
            text = f"## {name}\n\n{sections[name].strip()}\n\n"
            lines += text.splitlines(keepends=True)
            taken.append(name)
            room -= len(text)
    title = f"from {taken[0]!r} on" if taken else "nothing"
    return Text(origin, title, tuple(lines), tuple(taken))
