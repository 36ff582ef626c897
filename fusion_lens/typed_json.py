"""JSON that somebody may have tampered with -> values of declared types, every field checked.

`parsed` refuses what a parser takes and later work does not: brackets too deep to be walked, half a
surrogate pair, and in what the package itself writes NaN and infinity. `typed` makes of it a value
of a dataclass, a `TypedDict` or a plain type, through pydantic: a field that is missing, unknown or
of another type is named. Knows no file: whoever reads one adds its name and the line.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

T = TypeVar("T")

DEEPEST = 50
"""Brackets inside each other. What the package writes has fewer than ten."""


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

    A `dict` is as it was; fields it does not name are left in a `TypedDict`, which must be that of
    `typing_extensions`. An integer stands for a `float`, and becomes one; floats are finite.

    Raises:
        ValueError: if it is of another type somewhere; names the place. Whatever the value itself
            refuses is raised as it is.
    """
    made: T = _maker(kind)(content)
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
def _maker(kind: Any) -> Callable[[Any], Any]:
    """What makes a value of `kind` of a JSON value."""
    # 0.1 s that `import fusion_lens` and `--help` do without
    from pydantic import TypeAdapter, ValidationError
    from pydantic_core import SchemaValidator

    validator = SchemaValidator(_exact(TypeAdapter(kind).core_schema))

    def make(content: Any) -> Any:
        try:
            # strict with Python's values, it would refuse a list for a tuple
            return validator.validate_json(json.dumps(content), strict=True)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
        raise _fault(first)

    return make


def _exact(schema: Any) -> Any:
    """A schema of pydantic's core, and what `typed` asks for besides, at every depth."""
    match schema:
        case list():
            return [_exact(each) for each in schema]
        case dict():
            return {name: _exact(each) for name, each in schema.items()} | _besides(schema)
    return schema


def _besides(schema: dict[str, Any]) -> dict[str, Any]:
    # a configuration would reach the dataclasses inside a TypedDict too
    match schema.get("type"):
        case "dataclass-args":
            return {"extra_behavior": "forbid"}
        case "typed-dict":
            return {"extra_behavior": "allow"}
        case "float":  # 10**400 would become infinity
            return {"allow_inf_nan": False}
        case "list" | "tuple" | "dict":  # a fault is 1 KB, and only the first is told
            return {"fail_fast": True}
        case "union":  # else a fault per choice, at a place that is not in the file
            told = " or ".join(each["type"] for each in schema["choices"])
            return {
                "custom_error_type": "union",
                "custom_error_message": f"Input should be {told}",
            }
    return {}


def _fault(error: ErrorDetails) -> Exception:
    refused = error.get("ctx", {}).get("error")
    if isinstance(refused, Exception):
        return refused
    steps = [f"[{step}]" if isinstance(step, int) else f".{step}" for step in error["loc"]]
    place = "".join(steps).removeprefix(".") or "it"
    if error["type"] == "missing":
        return ValueError(f"{place} must be there, but is not")
    if error["type"] == "unexpected_keyword_argument":
        return ValueError(f"{place} is no known field")
    value = error["input"]
    got = type(value).__name__ if isinstance(value, dict | list) else f"{value!r:.60}"
    return ValueError(f"{place} {error['msg'].replace('Input should', 'must')}, but got {got}")
