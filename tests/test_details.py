from __future__ import annotations

import json
import zlib
from pathlib import Path

import pytest
from records import detail

from fusion_lens.details import DETAILS, Marked, Trace, load_details
from fusion_lens.errors import InputFileError
from fusion_lens.json_lines import append_lines


def test_details_are_loaded_as_they_were_written(tmp_path: Path) -> None:
    odd = Marked(("\u2028", "<b>", "\x85", "é\n"), (0, 3))
    written = [detail("a", (1.0, 2.0)), detail("b/ü", (3.0,), generic_share=None, captured=odd)]
    append_lines(tmp_path / DETAILS, written[:1])
    append_lines(tmp_path / DETAILS, iter(written[1:]))
    assert load_details(tmp_path) == tuple(written)


def test_a_run_without_details_has_none(tmp_path: Path) -> None:
    assert load_details(tmp_path) == ()


def test_norms_are_relative_to_the_base_of_the_same_layer() -> None:
    made = detail("a", (1.0, 3.0, 2.0), base_norms=(4.0, 2.0, 0.0))
    assert made.relative_norms == (0.25, 1.5, float("inf"))


def test_a_shift_is_the_steered_log_probability_less_the_unsteered_one() -> None:
    assert Trace("full", ("a", "b"), (-0.5, -2.0), (-1.5, -0.25)).shifts == (1.0, -1.75)


def test_a_trace_without_a_log_probability_for_every_token_is_refused() -> None:
    with pytest.raises(ValueError, match="every token must have two log-probabilities"):
        Trace("full", ("a", "b"), (-0.5, -2.0), (-1.5,))


@pytest.mark.parametrize(
    "change",
    [
        lambda own: own.pop("captured"),
        lambda own: own["captured"].update(marked=[99]),
        lambda own: own["traces"][0].update(steered=[]),
        lambda own: own["features"][0].update(colour="red"),
        lambda own: own.update(delta_norms=None),
        lambda own: own.update(delta_norms=["a"]),
        lambda own: own.update(base_norms=[1.0, 2.0]),
        lambda own: own.update(generic_share=[1.0, 2.0]),
        lambda own: own["steered"].update(tokens="Who"),
        lambda own: own.update(question_id="\ud800"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, change) -> None:
    append_lines(tmp_path / DETAILS, [detail("a", (1.0,)), detail("b", (2.0,))])
    lines = (tmp_path / DETAILS).read_text("utf-8").splitlines()
    content = json.loads(lines[1])
    change(content)
    del content["crc32"]
    changed = json.dumps(content)
    line = f'{changed[:-1]}, "crc32": "{zlib.crc32(changed.encode()):08x}"}}'
    (tmp_path / DETAILS).write_text(f"{lines[0]}\n{line}\n", encoding="utf-8")
    with pytest.raises(InputFileError, match=r"line 2.*must be a question's details"):
        load_details(tmp_path)
