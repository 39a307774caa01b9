"""The checker of array types in tests: beartype, which also looks into records.

A record is a NamedTuple. beartype sees only that a value is one; here the values of its
fields have to fit the annotations of the fields too, wherever a record is passed to a
function or returned, however it was made (`_replace` and `jax.tree.map` ask no
constructor). Its letters are those of the call: they have one size in all records and
arrays of it.
"""

import functools
import types
import typing

import beartype
from beartype.door import is_bearable
from beartype.vale import Is


def check(function):
    """The function with its arguments and its result checked (for jaxtyping's hook).

    Options check what they are made of by themselves, and users see that.
    """
    if function.__name__ == "__init__":
        return function
    hints = function.__annotations__
    function.__annotations__ = {name: into_records(hints[name]) for name in hints}
    return beartype.beartype(function)


def into_records(hint):
    """The annotation with a check of fields for each record in it."""
    if is_record(hint):
        return typing.Annotated[hint, Is[functools.partial(_fits, hint)]]
    parts = typing.get_args(hint)
    inside = tuple(into_records(part) for part in parts)
    if inside == parts:
        return hint
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return typing.Union[inside]  # noqa: UP007
    if parts[1:] == (...,) or len(parts) == 1:  # beartype would look at one item
        each = functools.partial(_all_fit, inside[0])
        return typing.Annotated[typing.get_origin(hint), Is[each]]
    assert typing.get_origin(hint) is tuple, f"records inside {hint}"
    return tuple[inside]


def is_record(hint):
    """True for the class of a record."""
    return (
        isinstance(hint, type) and issubclass(hint, tuple) and hasattr(hint, "_fields")
    )


@functools.cache
def _hints_of(record):
    return {
        name: into_records(hint)
        for name, hint in typing.get_type_hints(record, include_extras=True).items()
    }


def _fits(record, value):
    """True if each field is what its annotation says; names the first that is not."""
    if not isinstance(value, record):
        return False
    for name, hint in _hints_of(record).items():
        field = getattr(value, name)
        if not is_bearable(field, hint):
            shown = getattr(field, "aval", field)
            raise TypeError(f"{record.__name__}.{name} is no {hint}: {shown}")
    return True


def _all_fit(hint, values):
    return all(is_bearable(value, hint) for value in values)
