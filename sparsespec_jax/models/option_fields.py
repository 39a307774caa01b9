"""Checks of the fields of frozen option records; they make numbers Python's own.

Each raises ValueError that names the field, the value and what would work. No jax.
"""

import operator
from collections.abc import Mapping

from sparsespec_jax.models.fields import LARGEST, shown

MAX_INT = LARGEST  # of what travels in int32
_SETS = set | frozenset
_NO_NUMBERS = tuple("bcmMOSU")  # numpy's letters of bool, complex, times, texts


def require(condition, message):
    """ValueError with the message, unless the condition holds."""
    if not condition:
        raise ValueError(message)


def put(record, name, value):
    """Set a field of a record, although it is frozen."""
    object.__setattr__(record, name, value)


def put_int(record, name, low, high=MAX_INT):
    """Make a field a Python int; ValueError unless it is an integer in [low, high].

    Integers of numpy, arrays without axes and whatever else stands for an index are
    integers; floats are none, whole or not, and neither is True. `high=None` is no
    bound.
    """
    put(record, name, _to_int(name, getattr(record, name), low, high))


def put_float(record, name, low, high, *, open_low=False):
    """Make a field a Python float; ValueError unless it is a number in [low, high].

    Numbers of numpy and arrays without axes are numbers, strings and True are none.
    """
    value = getattr(record, name)
    number = _as_float(value)
    require(number is not None, f"{name} must be a number, got {shown(value)}")
    ok = number <= high and (number > low if open_low else number >= low)
    bracket = "(" if open_low else "["
    require(ok, f"{name} must be in {bracket}{low}, {high}], got {shown(value)}")
    put(record, name, number)


def put_flag(record, name):
    """Make a field a Python bool; ValueError unless it is True or False."""
    value = getattr(record, name)
    ok = isinstance(value, bool) or _kind(value) == "b"
    require(ok, f"{name} must be True or False, got {shown(value)}")
    put(record, name, bool(value))


def put_choice(record, name, choices):
    """Make a field one of some strings; ValueError if it is none of them."""
    value = getattr(record, name)
    ok = isinstance(value, str) and value in choices
    require(ok, f"{name} must be one of {choices}, got {shown(value)}")
    put(record, name, str(value))


def _kind(value):
    """The letter that numpy gives the type of an array without axes, else None."""
    is_scalar = getattr(value, "ndim", None) == 0
    return getattr(getattr(value, "dtype", None), "kind", None) if is_scalar else None


def _to_int(name, value, low, high):
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    ok = number is not None and number >= low and (high is None or number <= high)
    bound = f">= {low}" if high is None else f"in [{low}, {high}]"
    require(ok, f"{name} must be an integer {bound}, got {shown(value)}")
    return number


def _as_float(value):
    """The float that a number is; None for what is no number."""
    is_array = getattr(value, "ndim", 0) > 0
    if is_array or isinstance(value, bool | str | bytes) or _kind(value) in _NO_NUMBERS:
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _items(name, values, what):
    """What a list, array, set, range or generator holds; None holds nothing."""
    try:
        items = () if values is None else tuple(values)
    except TypeError:
        items = None
    ok = items is not None and not isinstance(values, str | bytes | dict)
    require(ok, f"{name} must be a list of {what}, got {shown(values)}")
    return items


def put_ints(record, name, low, high=MAX_INT):
    """Make a field a tuple of Python ints (see `put_int`), sorted if it was a set."""
    values = getattr(record, name)
    each = f"each of {name}"
    ints = [_to_int(each, v, low, high) for v in _items(name, values, "integers")]
    put(record, name, tuple(sorted(ints) if isinstance(values, _SETS) else ints))


def put_biases(record, name, most):
    """Make a dict of token ids and numbers a sorted tuple of (int, float) pairs.

    Pairs are taken too, and ids as texts: JSON has no others. ValueError unless each
    number is in [-most, most] and no id comes twice.
    """
    given = getattr(record, name)
    pairs = given.items() if isinstance(given, Mapping) else given
    what = f"{name} must be a dict of token ids and numbers, got {shown(given)}"
    try:
        pairs = [] if pairs is None else [(token, bias) for token, bias in pairs]
    except (TypeError, ValueError):
        raise ValueError(what) from None
    found = {}
    for token, bias in pairs:
        if isinstance(token, str) and token.isdecimal():
            token = int(token)
        token = _to_int(f"each token id of {name}", token, 0, MAX_INT)
        number = _as_float(bias)
        ok = number is not None and -most <= number <= most
        each = f"each bias of {name} must be a number in [-{most}, {most}]"
        require(ok, f"{each}, got {shown(bias)}")
        require(token not in found, f"{name} has token id {token} twice: give it once")
        found[token] = number
    put(record, name, tuple(sorted(found.items())))


def put_texts(record, name):
    """Make a field a tuple of non-empty strings, sorted if it was a set."""
    values = getattr(record, name)
    texts = [values] if isinstance(values, str) else _items(name, values, "strings")
    for text in texts:
        ok = isinstance(text, str) and text
        require(ok, f"{name} must hold non-empty strings, got {shown(text)}")
    texts = [str(text) for text in texts]
    put(record, name, tuple(sorted(texts) if isinstance(values, _SETS) else texts))
