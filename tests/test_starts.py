from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusion_lens.errors import ConfigError
from fusion_lens.segments import Segment, even_segments, full, one_layer, per_layer, thirds
from fusion_lens.starts import Starts, by_layer, in_segments

COEFFS = st.floats(0, 1.5, allow_nan=False)


@given(st.lists(COEFFS, min_size=3, max_size=3))
def test_for_the_same_division_a_start_is_what_it_was(coeffs: list[float]) -> None:
    names = ("early", "middle", "late")
    layers = by_layer(thirds(26), coeffs, 26)
    assert len(layers) == 26
    assert in_segments(layers, thirds(26)) == dict(zip(names, coeffs, strict=True))


def test_for_another_division_it_is_the_mean_over_the_layers_of_each_part() -> None:
    layers = by_layer(thirds(6), (0.5, 1.0, 0.0), 6)
    assert layers == (0.5, 0.5, 1.0, 1.0, 0.0, 0.0)
    assert in_segments(layers, full(6)) == {"full": 0.5}
    assert in_segments(layers, even_segments(6, 2)) == {"segment_0": 2 / 3, "segment_1": 1 / 3}
    assert list(in_segments(layers, per_layer(6)).values()) == list(layers)


def test_layers_of_no_segment_start_at_0() -> None:
    assert by_layer(one_layer(1, 3), (0.7,), 3) == (0.0, 0.7, 0.0)


def test_a_segment_beyond_the_layers_of_a_start_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        in_segments((0.5, 0.5), (Segment("late", 1, 3),))
    assert str(caught.value) == (
        "a start must have a coefficient for every layer, but has 2 and segment 'late' ends with "
        "layer 2."
    )


def test_a_question_has_its_own_starts_or_none() -> None:
    starts = Starts(own=(("a", ((0.5,),)), ("b", ((1.0,), (0.25,)))))
    assert starts.of("b") == ((1.0,), (0.25,))
    assert starts.of("c") == ()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"shared": ((0.5,), (0.5, 0.5))}, "all starts must be of as many layers"),
        ({"shared": ((0.5,),), "own": (("a", ((0.5, 0.5),)),)}, "all starts must be of as many"),
        ({"own": (("a", ((math.nan,),)),)}, "coefficients of a start must be finite"),
        ({"lengths": (0.0,)}, r"must be above 0 and finite, but got \(0.0,\)"),
        ({"lengths": (math.inf,)}, "must be above 0 and finite"),
    ],
)
def test_what_is_no_start_is_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Starts(**given)
