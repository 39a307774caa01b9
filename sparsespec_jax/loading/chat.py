"""Chat templates: Jinja sources that write messages as one text."""

from __future__ import annotations

import datetime
import functools
import json
import traceback
from collections.abc import Iterable, Mapping, Sequence
from reprlib import repr as short
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.sandbox


def chat_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages as templates read them: their content is one text.

    Content given as parts of {"type": "text", "text": ...} is joined. Keys whose value
    is None are left out, for a template would write the word.

    Raises:
        ValueError: a message that is no mapping, has no role, or content that is no
            text. Only a message with tool calls may have no content.
    """
    return [_message(number, message) for number, message in enumerate(messages)]


def _message(number: int, message: Any) -> dict[str, Any]:
    what = f"message {number} of the chat"
    if not isinstance(message, Mapping):
        raise ValueError(
            f"{what} must be a mapping with 'role' and 'content', got {short(message)}"
        )
    message = {key: value for key, value in message.items() if value is not None}
    if not isinstance(message.get("role"), str):
        raise ValueError(
            f"{what}: 'role' must be a string such as 'user', got "
            f"{short(message.get('role'))}"
        )
    if "content" not in message and message.get("tool_calls"):
        return message
    content = message.get("content")
    if isinstance(content, list | tuple):
        content = "".join(
            _part(f"{what}, part {i}", part) for i, part in enumerate(content)
        )
    if not isinstance(content, str):
        raise ValueError(
            f"{what}: 'content' must be a text or a list of text parts, got "
            f"{short(content)}"
        )
    return message | {"content": content}


def _part(what: str, part: Any) -> str:
    text = part.get("text") if isinstance(part, Mapping) else None
    if not isinstance(text, str) or part.get("type") != "text":
        raise ValueError(
            f"{what}: 'content' parts must be {{'type': 'text', 'text': ...}}, got "
            f"{short(part)}: only text can be encoded"
        )
    return text


def render(source: str, variables: Mapping[str, Any]) -> str:
    """The template filled with variables.

    Raises:
        ValueError: the template is wrong, refuses the messages or fails on them.
    """
    try:
        return _compiled(source).render(variables)
    except Exception as error:  # a template can raise what Python can
        name = "" if isinstance(error, jinja2.TemplateError) else type(error).__name__
        raise ValueError(
            f"the chat template failed{_place(error)}: {name and name + ': '}{error}"
        ) from error


def _place(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == "<template>"]
    line = getattr(error, "lineno", None) or (lines[-1] if lines else None)
    return f" in line {line}" if line else ""


def check_variables(source: str, names: Iterable[str]) -> None:
    """ValueError if the template never reads one of these variables.

    A template that is damaged reads nothing; `render` says what is wrong with it.
    """
    environment = _environment()
    try:
        read = jinja2.meta.find_undeclared_variables(environment.parse(source))
    except jinja2.TemplateError:
        return
    if unknown := sorted(set(names) - read):
        known = sorted(read - set(environment.globals) - {"messages"})
        raise ValueError(
            f"the chat template reads no variable {unknown[0]!r}; beside the messages "
            f"it reads {', '.join(known) or 'nothing'}"
        )


@functools.lru_cache(maxsize=16)
def _compiled(source: str) -> jinja2.Template:
    return _environment().from_string(source)


@functools.cache
def _environment() -> jinja2.Environment:
    """Jinja as chat templates expect it; sandboxed, since they come with weights."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _now
    return environment


class _Generation(jinja2.ext.Extension):
    """{% generation %} marks for training what the model wrote; its body is text."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML characters.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
