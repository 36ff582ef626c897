from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, NotRequired, TypedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusion_lens.typed_json import DEEPEST, parsed, typed


@dataclass(frozen=True)
class Point:
    name: str
    at: tuple[float, ...]
    n: int
    sure: bool
    note: str | None
    weights: dict[str, float] = field(default_factory=dict)
    size: int = field(init=False, default=3)

    def __post_init__(self) -> None:
        if len(self.at) > 2:
            raise ValueError("a point has at most two coordinates")


class Drawing(TypedDict):
    points: list[Point]
    title: NotRequired[str]
    more: Any


GOOD: dict[str, Any] = {"name": "é", "at": [0.5, 2], "n": 3, "sure": True, "note": None}


def test_a_value_is_made_of_what_has_its_fields_and_types() -> None:
    made = typed(Point, GOOD | {"weights": {"a": 0.25}})
    assert made == Point("é", (0.5, 2), 3, True, None, {"a": 0.25})
    # an integer that stands for a float becomes one
    assert json.dumps(asdict(made)["at"]) == "[0.5, 2.0]"
    assert typed(Point, GOOD).weights == {}


def test_a_typed_dict_keeps_what_it_does_not_name() -> None:
    content = {"points": [GOOD], "more": [1, {"x": None}], "other": "kept"}
    made = typed(Drawing, content)
    assert made == {**content, "points": [typed(Point, GOOD)]}
    with pytest.raises(ValueError, match=r"^title must be str, but got 3$"):
        typed(Drawing, content | {"title": 3})
    with pytest.raises(ValueError, match=r"^points\[0\]\.n must be int, but got '3'$"):
        typed(Drawing, content | {"points": [GOOD | {"n": "3"}]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": 1}, "name must be str, but got 1"),
        ({"n": True}, "n must be int, but got True"),
        ({"n": 3.0}, "n must be int, but got 3.0"),
        ({"sure": 1}, "sure must be bool, but got 1"),
        ({"at": "ab"}, r"at must be tuple\[float, \.\.\.\], but got 'ab'"),
        ({"at": [0.5, None]}, r"at\[1\] must be float, but got None"),
        ({"at": [False]}, r"at\[0\] must be float, but got False"),
        ({"at": [10**400]}, r"at\[0\] must be float, but got 1000"),
        ({"at": [1, 2, 3]}, "a point has at most two coordinates"),
        ({"note": []}, r"note must be str \| None, but got list"),
        ({"weights": {"a": "b"}}, r"weights\.a must be float, but got 'b'"),
        ({"weights": []}, r"weights must be dict\[str, float\], but got list"),
        ({"colour": "red"}, "colour is no field of Point"),
        ({"size": 3}, "size is no field of Point"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        typed(Point, GOOD | change)


def test_a_field_that_is_missing_and_another_kind_of_value_are_named() -> None:
    with pytest.raises(ValueError, match=r"^at must be there, but is not$"):
        typed(Point, {"name": "a"})
    for other in (None, [], "text", 3):
        with pytest.raises(ValueError, match=r"^it must be Point, but got "):
            typed(Point, other)


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Expecting property name"),
        ("[NaN]", "numbers must be finite, but got nan"),
        ('{"a": [-Infinity]}', "numbers must be finite, but got -inf"),
        ("1e999", "numbers must be finite, but got inf"),
        ("1" * 5000, "Exceeds the limit"),
        (r'{"a": "\ud800"}', "surrogates not allowed"),
        (r'{"\udfff": 1}', "surrogates not allowed"),
        (nested(DEEPEST + 1), "brackets must be nested at most 50 deep, but are deeper"),
        (nested(100_000), "maximum recursion depth exceeded"),
        (b"\xff", "codec can't decode byte 0xff"),
    ],
)
def test_what_later_work_cannot_take_is_refused(text: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parsed(text)


def test_other_programs_may_write_numbers_that_are_not_finite() -> None:
    assert parsed('{"loss": Infinity}', finite=False) == {"loss": float("inf")}
    with pytest.raises(ValueError, match="surrogates not allowed"):
        parsed(r'["\ud800"]', finite=False)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=20,
    )
)  # fmt: skip
def test_what_json_can_say_is_parsed_as_it_is(value: Any) -> None:
    assert parsed(json.dumps(value)) == value
