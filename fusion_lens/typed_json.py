"""JSON that somebody may have tampered with -> values of declared types, every field checked.

`parsed` refuses what a parser takes and later work does not: brackets too deep to be walked, half a
surrogate pair, and in what the package itself writes NaN and infinity. `typed` makes of it a value
of a dataclass, a `TypedDict` or a plain type: a field that is missing, unknown or of another type
is named. Knows no file: whoever reads one adds its name and the line.
"""

from __future__ import annotations

import json
import math
import types
import typing
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any, NotRequired, TypeVar

T = TypeVar("T")

DEEPEST = 50
"""Brackets inside each other. What the package writes has fewer than ten."""

_Check = Callable[[Any, str], Any]


def parsed(text: str | bytes, *, finite: bool = True) -> Any:
    """The value of a JSON document.

    Raises:
        ValueError: if it is none, is nested too deeply, holds a text that is not UTF-8, or where
            numbers must be `finite` one that is not.
    """
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError(str(error)) from error
    _require_plain(value, finite)
    return value


def typed(kind: Callable[..., T], content: Any) -> T:
    """`content`, as `parsed` gives it, as a value of `kind`.

    A `dict` is as it was; fields it does not name are left in a `TypedDict`. An integer stands for
    a `float`, and becomes one.

    Raises:
        ValueError: if it is of another type somewhere; names the place. Whatever the value itself
            refuses is raised as it is.
    """
    made: T = _check(kind)(content, "")
    return made


def _require_plain(value: Any, finite: bool) -> None:
    level = [value]
    for _ in range(DEEPEST):
        below: list[Any] = []
        for each in level:
            match each:
                case dict():
                    below += each.keys()
                    below += each.values()
                case list():
                    below += each
                case str():
                    each.encode()
                case float() if finite and not math.isfinite(each):
                    raise ValueError(f"numbers must be finite, but got {each}")
        if not below:
            return
        level = below
    raise ValueError(f"brackets must be nested at most {DEEPEST} deep, but are deeper")


@cache
def _check(kind: Any) -> _Check:
    """What makes a value of `kind` of a JSON value at a place."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return lambda value, place: value
    if origin in (types.UnionType, typing.Union):
        return _one_of(kind, [_check(each) for each in inner])
    if origin is tuple:
        return _tuple(kind, _check(inner[0]))
    if origin is list:
        return _list(kind, _check(inner[0]))
    if origin is dict:
        return _dict(kind, _check(inner[1]))
    if is_dataclass(kind):
        return _dataclass(kind)
    if typing.is_typeddict(kind):
        return _typed_dict(kind)
    return _plain(kind)


def _plain(kind: Any) -> _Check:
    def check(value: Any, place: str) -> Any:
        right = type(value) is kind or (kind is float and type(value) is int)
        if not right:
            raise _other(kind, value, place)
        if kind is float:
            try:
                return float(value)
            except OverflowError:
                raise _other(kind, value, place) from None
        return value

    return check


def _one_of(kind: Any, checks: list[_Check]) -> _Check:
    exact = {each for each in typing.get_args(kind) if each in (int, float, str, bool)}

    def check(value: Any, place: str) -> Any:
        if type(value) in exact:
            return value
        faults = []
        for each in checks:
            try:
                return each(value, place)
            except ValueError as error:
                faults.append(error)
        # what is wrong further in says more than that the whole is
        further = [each for each in faults if not str(each).startswith(f"{place or 'it'} must be ")]
        raise further[0] if further else _other(kind, value, place)

    return check


def _tuple(kind: Any, item: _Check) -> _Check:
    as_list = _list(kind, item)
    return lambda value, place: tuple(as_list(value, place))


def _list(kind: Any, item: _Check) -> _Check:
    def check(value: Any, place: str) -> Any:
        if type(value) is not list:
            raise _other(kind, value, place)
        return [item(each, f"{place}[{i}]") for i, each in enumerate(value)]

    return check


def _dict(kind: Any, item: _Check) -> _Check:
    def check(value: Any, place: str) -> Any:
        if type(value) is not dict:
            raise _other(kind, value, place)
        return {key: item(each, _inside(place, key)) for key, each in value.items()}

    return check


def _dataclass(kind: Any) -> _Check:
    hints = typing.get_type_hints(kind)
    checks = {field.name: _check(hints[field.name]) for field in fields(kind) if field.init}
    needed = {
        field.name
        for field in fields(kind)
        if field.init and field.default is MISSING and field.default_factory is MISSING
    }

    def check(value: Any, place: str) -> Any:
        made = _fields(kind, value, place, checks, needed)
        unknown = sorted(value.keys() - checks.keys())
        if unknown:
            raise ValueError(f"{_inside(place, unknown[0])} is no field of {kind.__name__}")
        return kind(**made)

    return check


def _typed_dict(kind: Any) -> _Check:
    # __required_keys__ does not know NotRequired where annotations are kept as text
    hints = typing.get_type_hints(kind, include_extras=True)
    needed = {name for name, own in hints.items() if typing.get_origin(own) is not NotRequired}
    checks = {name: _check(own) for name, own in typing.get_type_hints(kind).items()}

    def check(value: Any, place: str) -> Any:
        made = _fields(kind, value, place, checks, needed)
        return {**value, **made}

    return check


def _fields(
    kind: Any, value: Any, place: str, checks: dict[str, _Check], needed: set[str]
) -> dict[str, Any]:
    if type(value) is not dict:
        raise _other(kind, value, place)
    missing = sorted(needed - value.keys())
    if missing:
        raise ValueError(f"{_inside(place, missing[0])} must be there, but is not")
    return {
        name: check(value[name], _inside(place, name))
        for name, check in checks.items()
        if name in value
    }


def _inside(place: str, name: str) -> str:
    return f"{place}.{name}" if place else name


def _other(kind: Any, value: Any, place: str) -> ValueError:
    told = str(kind) if typing.get_args(kind) else kind.__name__
    got = f"{value!r:.60}" if not isinstance(value, dict | list) else type(value).__name__
    return ValueError(f"{place or 'it'} must be {told}, but got {got}")
