"""Options: frozen records whose fields are the flags of a command.

The one place where flags are defined. A command declares a subclass of `Options`;
`define` makes a flag of every field, `parse` builds the record from what was given.
Values are checked when a record is made, from the shell and from code alike.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass

from absl import flags

_MODEL = (
    "Name, directory, GGUF file or Hugging Face id of the model; where weights are "
    "random, a preset. tiny: random weights of two layers, for tests."
)
_DEFINE = {
    str: flags.DEFINE_string,
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    bool: flags.DEFINE_bool,
    tuple: flags.DEFINE_list,
    list: flags.DEFINE_multi_string,
}


def option(
    default=dataclasses.MISSING, text=_MODEL, *, choices=None, at_least=None,
    at_most=None, kind=None, of=None, is_recorded=True,
):  # fmt: skip
    """A field of an `Options` record.

    Args:
        default: its value if the flag is not given; none: it must be given.
        text: its help.
        choices: the values, or items, that it takes.
        at_least: least value of it, or of its items.
        at_most: largest value.
        kind: its type, where the default does not tell it. `list` is a tuple of texts
            whose flag is given once for each: a text may hold commas and line ends.
        of: type of the items of a tuple, where the default does not tell it.
        is_recorded: a resumed run must have the same value.
    """
    known = default is not dataclasses.MISSING and default is not None
    kind = kind or (type(default) if known else str)
    of = of or (type(default[0]) if kind is tuple and default else str)
    metadata = dict(
        help=text, choices=choices, at_least=at_least, at_most=at_most, kind=kind,
        of=of, is_recorded=is_recorded,
    )  # fmt: skip
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Base of the records; every field is made by `option`."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            is_list = field.metadata["kind"] in (tuple, list)
            if is_list and field.default and value == ():
                raise ValueError(f"--{field.name} is empty: name at least one")
            items = value if is_list else (value,)
            for item in items or ():
                if item is not None:
                    _check(field.name, item, **field.metadata)

    @classmethod
    def defaults(cls, given: dict) -> dict:
        """Values of fields that are not given, where they are not the usual ones."""
        del given
        return {}

    def recorded(self) -> dict:
        """The values that a resumed run must have too."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.metadata["is_recorded"]
        }


@dataclass(frozen=True, kw_only=True)
class Writes(Options):
    """Of tools that write one file or folder."""

    output: str = option(text="What to write.")


@dataclass(frozen=True, kw_only=True)
class RunOptions(Writes):
    """What every experiment takes beside its own options."""

    output: str | None = option(None, "Run directory; default: runs/NAME-DATE-TIME.")
    resume: bool = option(False, "Go on with the run in --output.")
    smoke: bool = option(False, "A tiny model and few rows: does it run at all?")
    commit: str | None = option(None, "Commit to record if git cannot say.")
    part: str | None = option(None, "i/n: only the i-th of n parts of the rows.")
    take: tuple[str, ...] = option((), "Other runs whose rows are taken over.")


def define(*kinds) -> None:
    """Define the flags of these subclasses of Options."""
    for kind in kinds:
        for field in dataclasses.fields(kind):
            text = field.metadata["help"]
            if field.metadata["choices"]:
                text += f" One of {', '.join(map(str, field.metadata['choices']))}."
            if field.default not in (dataclasses.MISSING, None):
                text += f" (default: {_shown(field.default)})"
            _DEFINE[field.metadata["kind"]](field.name, None, text)
            flag = flags.FLAGS[field.name]  # --help lists those of the command
            flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)


def parse(kind, changes=None):
    """The record of `kind` that the flags say, `changes` in place of its defaults.

    Raises:
        ValueError: a value is out of range, or one that is needed is missing.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}
    given = {name: flags.FLAGS[name].value for name in fields}
    given = {
        name: _converted(fields[name], value)
        for name, value in given.items()
        if value is not None
    }
    return make(kind, (changes or {}) | given)


def make(kind, values):
    """The record of `kind` with these values; ValueError as `parse`."""
    values = kind.defaults(values) | values
    for field in dataclasses.fields(kind):
        if field.default is dataclasses.MISSING and field.name not in values:
            raise ValueError(f"--{field.name} is missing: {field.metadata['help']}")
    return kind(**values)


def _converted(field, value):
    """The value of a flag; absl leaves the items of lists as text."""
    if field.metadata["kind"] not in (tuple, list):
        return value
    try:
        return tuple(map(field.metadata["of"], value))
    except ValueError as error:
        raise ValueError(f"--{field.name}: {error}") from None


def _shown(value):
    return ",".join(map(str, value)) if isinstance(value, tuple) else value


def _check(name, value, *, choices, at_least, at_most, **_):
    if choices is not None and value not in choices:
        raise ValueError(f"{name} must be one of {list(choices)}, got {value!r}")
    if at_least is not None and value < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {value}")
    if at_most is not None and value > at_most:
        raise ValueError(f"{name} must be at most {at_most}, got {value}")
