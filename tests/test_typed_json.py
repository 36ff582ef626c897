from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from traceback import format_exception
from typing import Any, NotRequired

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typing_extensions import TypedDict

from fusion_lens.errors import ConfigError
from fusion_lens.typed_json import DEEPEST, parsed, typed


class BelowError(ConfigError):
    """A refusal with a cause of its own."""


@dataclass(frozen=True)
class Point:
    name: str
    at: tuple[float, ...]
    n: int
    sure: bool
    note: str | None
    weights: dict[str, float] = field(default_factory=dict)
    scale: float | int = 1
    place: str | int = "left"
    size: int = field(init=False, default=3)

    def __post_init__(self) -> None:
        if len(self.at) > 2:
            raise ValueError("a point has at most two coordinates")
        if self.n < 0:
            raise BelowError from KeyError(self.name)


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


@pytest.mark.parametrize("scale", [2, 2.0, 0.5, 10**400, -(2**63)])
def test_a_number_that_may_be_either_stays_what_it_is(scale: float) -> None:
    made = typed(Point, GOOD | {"scale": scale}).scale
    assert made == scale
    assert type(made) is type(scale)


def test_what_a_value_refuses_is_raised_as_it_is() -> None:
    with pytest.raises(BelowError) as caught:
        typed(Drawing, {"points": [GOOD, GOOD | {"n": -1}], "more": None})
    assert isinstance(caught.value.__cause__, KeyError)
    assert caught.value.__context__ is None


def test_a_typed_dict_keeps_what_it_does_not_name() -> None:
    content = {"points": [GOOD], "more": [1, {"x": None}], "other": "kept"}
    made = typed(Drawing, content)
    assert made == {**content, "points": [typed(Point, GOOD)]}
    with pytest.raises(ValueError, match=r"^title must be a valid string, but got 3$"):
        typed(Drawing, content | {"title": 3})
    with pytest.raises(ValueError, match=r"^points\[0\]\.n must be a valid integer, but got '3'$"):
        typed(Drawing, content | {"points": [GOOD | {"n": "3"}]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": 1}, "name must be a valid string, but got 1"),
        ({"n": True}, "n must be a valid integer, but got True"),
        ({"n": 3.0}, "n must be a valid integer, but got 3.0"),
        ({"sure": 1}, "sure must be a valid boolean, but got 1"),
        ({"at": "ab"}, "at must be a valid array, but got 'ab'"),
        ({"at": [0.5, None]}, r"at\[1\] must be a valid number, but got None"),
        ({"at": [False]}, r"at\[0\] must be a valid number, but got False"),
        ({"at": [10**400]}, r"at\[0\] must be a finite number, but got 1000"),
        ({"at": [1, 2, 3]}, "a point has at most two coordinates"),
        ({"note": []}, "note must be a valid string, but got list"),
        ({"weights": {"a": "b"}}, r"weights\.a must be a valid number, but got 'b'"),
        ({"weights": []}, "weights must be an object, but got list"),
        ({"scale": [1]}, "scale must be float or int, but got list"),
        ({"place": True}, "place must be str or int, but got True"),
        ({"place": 1.0}, "place must be str or int, but got 1.0"),
        ({"colour": "red"}, "colour is no known field"),
        ({"size": 3}, "size is no known field"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        typed(Point, GOOD | change)
    assert "pydantic" not in "".join(format_exception(caught.value))


def test_a_field_that_is_missing_and_another_kind_of_value_are_named() -> None:
    with pytest.raises(ValueError, match=r"^at must be there, but is not$"):
        typed(Point, {"name": "a"})
    for other in (None, [], "text", 3):
        with pytest.raises(ValueError, match=r"^it must be an object, but got "):
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


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)  # fmt: skip


@given(VALUES)
def test_what_json_can_say_is_parsed_as_it_is(value: Any) -> None:
    assert parsed(json.dumps(value)) == value


@given(VALUES, st.floats(allow_nan=False, allow_infinity=False), st.text())
def test_what_fits_is_given_as_it_is_to_the_last_bit(more: Any, x: float, name: str) -> None:
    point = GOOD | {"name": name, "at": [x], "weights": {name: x}}
    made = typed(Drawing, {"points": [point], "more": more, "other": more})
    assert json.dumps([made["more"], made["other"]]) == json.dumps([more, more])
    (drawn,) = made["points"]
    assert (drawn.name, repr(drawn.at), repr(drawn.weights)) == (name, repr((x,)), repr({name: x}))
