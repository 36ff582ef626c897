from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion_lens.contrasts import (
    KINDS,
    PARTS,
    Example,
    Pair,
    changed,
    holds,
    load_contrasts,
    load_pairs,
    of_kind,
    require_parts,
    save_contrasts,
    save_pairs,
    shown,
)
from fusion_lens.errors import ConfigError, ContrastError, InputFileError, OutputError

PAIR = Pair("p", "Who wrote it?\n", "Ada", "Tom", "Ada", "fit", "books")
EXAMPLE = Example(
    "e", "source", "\nSo they say.", "Who?", "Ada", "fit", "books", "they say", "Whose?"
)
TEXT = st.text(min_size=1, max_size=6).filter(str.strip)
OPTIONAL = {"subject": TEXT, "part": st.sampled_from(PARTS), "group": TEXT}
# fields, not values: beartype draws the items it checks at random, which strategies must not
PAIR_FIELDS = st.fixed_dictionaries(
    {"id": TEXT, "prompt": TEXT, "right": TEXT, "wrong": TEXT}, optional=OPTIONAL
).filter(lambda fields: fields["right"] != fields["wrong"])
EXAMPLE_FIELDS = st.fixed_dictionaries(
    {"id": TEXT, "kind": st.sampled_from(KINDS), "text": TEXT},
    optional={"prompt": st.text(max_size=6), "paraphrase": TEXT, **OPTIONAL},
)


def records(fields: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[list[dict[str, Any]]]:
    return st.lists(fields, min_size=1, max_size=3, unique_by=lambda each: each["id"])


def written(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text, encoding="utf-8", newline="")
    return folder / name


def some(kinds: Sequence[str] = KINDS, parts: Sequence[str] = PARTS, n: int = 2) -> list[Example]:
    """`n` examples of each kind in each part, each about a subject of its part."""
    return [
        Example(f"{kind}-{part}-{i}", kind, f"{kind} {part} {i}", subject=f"{part} {i}", part=part)
        for part in parts
        for kind in kinds
        for i in range(n)
    ]


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
@settings(max_examples=60, deadline=None)
@given(own=records(PAIR_FIELDS))
def test_pairs_saved_are_pairs_loaded_whatever_the_letters(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, own: list[dict[str, Any]]
) -> None:
    pairs = [Pair(**fields) for fields in own]
    path = tmp_path_factory.getbasetemp() / f"pairs.{suffix}"
    save_pairs(pairs, path)
    assert load_pairs(path) == pairs


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
@settings(max_examples=60, deadline=None)
@given(own=records(EXAMPLE_FIELDS))
def test_examples_saved_are_examples_loaded_whatever_the_letters(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, own: list[dict[str, Any]]
) -> None:
    examples = [Example(**fields) for fields in own]
    path = tmp_path_factory.getbasetemp() / f"examples.{suffix}"
    save_contrasts(examples, path)
    assert load_contrasts(path) == examples


def test_a_line_gives_every_field(tmp_path: Path) -> None:
    save_pairs([PAIR], tmp_path / "p.jsonl")
    told = {"id": "p", "prompt": "Who wrote it?\n", "right": "Ada", "wrong": "Tom"}
    more = {"subject": "Ada", "part": "fit", "group": "books"}
    assert json.loads((tmp_path / "p.jsonl").read_text("utf-8")) == told | more
    save_contrasts([EXAMPLE], tmp_path / "e.csv")
    assert (tmp_path / "e.csv").read_bytes() == (
        b"id,kind,text,prompt,subject,part,group,marker,paraphrase\r\n"
        b'e,source,"\nSo they say.",Who?,Ada,fit,books,they say,Whose?\r\n'
    )
    assert load_contrasts(tmp_path / "e.csv") == [EXAMPLE]


def test_a_file_of_kinds_and_texts_is_enough_and_lines_name_what_has_no_id(tmp_path: Path) -> None:
    path = written(tmp_path, "e.tsv", "kind\ttext\tmood\nsource\tBad\tx\ncontrol\tFine\ty\n")
    assert load_contrasts(path) == [
        Example("e0002", "source", "Bad"),
        Example("e0003", "control", "Fine"),
    ]
    path = written(tmp_path, "p.csv", "prompt,right,wrong\nWho?,Ada,Tom\n")
    assert load_pairs(path) == [Pair("p0002", "Who?", "Ada", "Tom")]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "must be JSON: Expecting property name enclosed in double quotes"),
        ('{"kind": "source"}', "must have a text 'text', but has none"),
        ('{"kind": "source", "text": 3}', "'text' must be text, but got 3"),
        (
            '{"id": "x", "kind": "sauce", "text": "a"}',
            "example 'x' must be of a kind of source, target, control, but got 'sauce'.",
        ),
        (
            '{"id": "x", "kind": "source", "text": " "}',
            "example 'x' must have a non-empty text, but got ' '.",
        ),
        (
            '{"id": "x", "kind": "source", "text": "a", "subject": ""}',
            "example 'x' must have a non-empty subject, but got ''.",
        ),
        (
            '{"id": "x", "kind": "source", "text": "a", "part": "test"}',
            "example 'x' must be of a part of fit, choose, report, but got 'test'.",
        ),
        (
            '{"id": "x", "kind": "source", "text": "a", "marker": "b"}',
            "example 'x' must hold its own marker, but 'b' is not in 'a'.",
        ),
    ],
)
def test_a_malformed_example_names_file_line_and_what_must_hold(
    tmp_path: Path, line: str, reason: str
) -> None:
    path = written(tmp_path, "e.jsonl", f'{{"kind": "source", "text": "fine"}}\n{line}\n')
    with pytest.raises(InputFileError) as caught:
        load_contrasts(path)
    assert str(caught.value) == f"{path}, line 2: {reason}"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("Who?,Ada", "must have as many cells as the header has columns"),
        ("Who?,Ada,", "must have a text 'wrong', but has none"),
        (
            "Who?,Ada,Ada",
            "pair 'p0002' must have two different continuations, but both are 'Ada'.",
        ),
    ],
)
def test_a_malformed_pair_names_file_line_and_what_must_hold(
    tmp_path: Path, row: str, reason: str
) -> None:
    path = written(tmp_path, "p.csv", f"prompt,right,wrong\n{row}\n")
    with pytest.raises(InputFileError) as caught:
        load_pairs(path)
    assert str(caught.value) == f"{path}, line 2: {reason}"


def test_a_name_that_tells_no_format_and_a_place_that_cannot_be_written_are_refused(
    tmp_path: Path,
) -> None:
    with pytest.raises(ConfigError) as caught:
        save_pairs([PAIR], tmp_path / "p.txt")
    assert str(caught.value) == "the name must end in .jsonl or .csv, but got 'p.txt'."
    with pytest.raises(OutputError, match="must be writable, but got: Not a directory"):
        save_contrasts([EXAMPLE], written(tmp_path, "file", "") / "e.csv")


def test_texts_stand_behind_their_prompts() -> None:
    assert PAIR.texts == ("Who wrote it?\nAda", "Who wrote it?\nTom")
    assert EXAMPLE.whole == "Who?\nSo they say."


def test_sets_that_hold_come_back_by_part() -> None:
    examples = some()
    parts = require_parts(examples)
    assert {part: len(own) for part, own in parts.items()} == {"fit": 6, "choose": 6, "report": 6}
    assert parts["choose"] == [each for each in examples if each.part == "choose"]
    assert [each.id for each in of_kind(parts["fit"], "target")] == ["target-fit-0", "target-fit-1"]
    pairs = [replace(PAIR, id=part, prompt=part, subject=part, part=part) for part in PARTS]
    assert require_parts(pairs, least=1)["report"] == [pairs[2]]


def test_fewer_parts_and_kinds_can_be_asked_for() -> None:
    examples = some(kinds=("source", "target"), parts=("fit",))
    assert require_parts(examples, parts=["fit"], kinds=["source"]) == {"fit": examples}


def test_too_few_examples_and_a_missing_class_or_part_are_told_with_the_counts() -> None:
    with pytest.raises(ContrastError) as caught:
        require_parts(some(), least=3)
    assert str(caught.value) == (
        "the part 'fit' must have at least 3 of 'source', but has 2 source, 2 target, 2 control; "
        "add some, or ask for fewer parts or kinds."
    )
    with pytest.raises(ContrastError, match=r"2 of 'control', but has 2 source, 2 target, 0 con"):
        require_parts(some(kinds=("source", "target")))
    with pytest.raises(ContrastError, match=r"the part 'report' must .* 0 source, 0 target, 0 con"):
        require_parts(some(parts=("fit", "choose")))
    with pytest.raises(ContrastError, match=r"'fit' must have at least 2 of 'pair', but has 1 pa"):
        require_parts([PAIR])


def test_items_without_a_part_are_told() -> None:
    examples = some()
    examples[4] = replace(examples[4], part=None)
    with pytest.raises(ContrastError) as caught:
        require_parts(examples)
    assert str(caught.value) == (
        "every item must name its part (fit, choose, report), but 1 of 18 name none, "
        "'control-fit-0' first; fill the column 'part'."
    )


def test_a_subject_in_two_parts_is_told() -> None:
    examples = some()
    examples[-1] = replace(examples[-1], subject="fit 1")
    with pytest.raises(ContrastError) as caught:
        require_parts(examples)
    assert str(caught.value) == (
        "no two parts may share a subject, but 'fit 1' is in 'fit' ('source-fit-1') and in "
        "'report' ('control-report-1'); split by subject."
    )
    without = [replace(each, subject=None) for each in some()]
    assert len(require_parts(without)["fit"]) == 6


def test_a_text_that_occurs_twice_is_told_also_of_two_kinds() -> None:
    examples = some()
    examples[2] = replace(examples[2], text=examples[0].text)
    with pytest.raises(ContrastError) as caught:
        require_parts(examples)
    assert str(caught.value) == (
        "every text must occur once, but 'source-fit-0' (source, fit) and 'target-fit-0' "
        "(target, fit) are the same; drop one."
    )
    with pytest.raises(ContrastError, match=r"'p' \(pair, fit\) and 'q' \(pair, fit\) are the sa"):
        require_parts([PAIR, replace(PAIR, id="q")], parts=["fit"])


def test_a_part_or_kind_there_is_not_is_refused() -> None:
    with pytest.raises(ConfigError, match="part must be one of fit, choose, report, but got 'x'"):
        require_parts(some(), parts=["x"])
    with pytest.raises(ConfigError, match="kind must be one of source, target, control"):
        require_parts(some(), kinds=["x"])
    with pytest.raises(ConfigError, match="kind must be one of source, target, control"):
        of_kind(some(), "x")


@pytest.mark.parametrize(
    ("text", "marker", "found"),
    [
        ("It is 3,482.", "3,482", True),
        ("It is 13,482.", "3,482", False),
        ("In Thornwicks", "Thornwick", False),
        ("(every known source)", "every known source", True),
        ("Every known source", "every known source", False),
        ("a.b", "a.b", True),
        ("aXb", "a.b", False),
    ],
)
def test_a_marker_is_found_letter_by_letter_and_as_whole_words(
    text: str, marker: str, found: bool
) -> None:
    assert holds(text, marker) is found


def test_a_completion_shows_what_its_marker_says_and_is_changed_if_it_differs() -> None:
    assert shown(EXAMPLE, "\nNo, they say so.")
    assert not shown(EXAMPLE, "\nNobody says.")
    assert not changed(EXAMPLE, "So they say.\n")
    assert changed(EXAMPLE, "So they said.")
    with pytest.raises(ContrastError) as caught:
        shown(replace(EXAMPLE, marker=None), "anything")
    assert str(caught.value) == (
        "example 'e' must have a marker to be looked for, but has none; fill the column 'marker'."
    )
