from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from fusion_lens.errors import ConfigError, PlanError, SearchError
from fusion_lens.identity import ModelIdentity
from fusion_lens.presets import Preset, preset_starts, require_apart, text_digest
from fusion_lens.questions import Question
from fusion_lens.segments import thirds

MODEL = ModelIdentity("m", "TransformerBridge", "unprocessed", 4, 8, "float32", "w", "e")
RED = Question("red", "Who wrote the red book?", "Ada Lovelace")
BORN = Question("born", "When was Tom born?", "3 May 1901")
PRESET = Preset(
    model=MODEL,
    segments=thirds(4),
    starts=((1.0, 0.0, 0.0), (0.25, 0.5, 0.75)),
    gains=(0.2, 0.1),
    weight=0.7,
    questions=(text_digest(RED.question),),
    versions={"python": "3.12"},
)


def test_its_starts_are_layer_by_layer_in_their_order() -> None:
    assert preset_starts(PRESET, MODEL, [BORN]) == (
        (1.0, 1.0, 0.0, 0.0),
        (0.25, 0.25, 0.5, 0.75),
    )


def test_another_dtype_of_the_same_weights_is_the_same_model() -> None:
    wider = replace(MODEL, dtype="bfloat16", name="other")
    assert len(preset_starts(PRESET, wider, [])) == 2


def test_a_preset_of_another_model_is_refused() -> None:
    with pytest.raises(SearchError) as caught:
        preset_starts(PRESET, replace(MODEL, n_layers=6), [])
    assert str(caught.value) == (
        "a preset must be of the model that is steered, but n_layers must be 4, but the model has "
        "6."
    )
    with pytest.raises(SearchError, match="but it was made on m"):
        preset_starts(PRESET, replace(MODEL, weights="x"), [])


def test_a_question_it_was_made_on_is_refused_however_it_is_spelt() -> None:
    again = Question("other", "who wrote  the red book", "somebody else")
    with pytest.raises(SearchError) as caught:
        preset_starts(PRESET, MODEL, [BORN, again])
    assert str(caught.value) == (
        "a preset must be of other questions than those that start from it, but got 1 of the same, "
        "'other' among them; take questions of another split."
    )
    require_apart(PRESET.questions, [BORN], "a preset")


@pytest.mark.parametrize(
    ("changed", "kind", "says"),
    [
        ({"gains": (0.2,)}, ConfigError, r"a finite gain, but got 2 starts and the gains \(0.2,\)"),
        ({"gains": (0.2, math.nan)}, ConfigError, "a finite gain"),
        ({"weight": 1.5}, ConfigError, "0 <= weight <= 1 must hold"),
        ({"questions": ()}, ConfigError, "at least one question, but got none"),
        ({"starts": ((1.0,), (0.5, 0.5, 0.5))}, PlanError, "must have one coefficient"),
        ({"segments": thirds(6)}, PlanError, "must lie within the model's 4 layers"),
    ],
)
def test_what_is_no_preset_is_refused(changed: dict[str, Any], kind: type, says: str) -> None:
    with pytest.raises(kind, match=says):
        replace(PRESET, **changed)


def test_its_table_has_a_row_for_each_start_or_says_that_there_is_none() -> None:
    table = PRESET.table()
    assert table.title == "preset for m, of 1 questions"
    assert table.rows[1] == ("2", "0.250", "0.500", "0.750", "+0.100")
    assert table.notes == ()
    empty = replace(PRESET, starts=(), gains=()).table()
    assert empty.notes == ("nothing was better than the zero plan: it has no start",)
