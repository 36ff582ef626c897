from __future__ import annotations

from datetime import date
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusion_lens.values import Date, Number, agrees, find_values, unit_beside, unit_name

OCTOBER = Date(2018, 10, 23)
MONTHS = (
    *("January", "February", "March", "April", "May", "June", "July"),
    *("August", "September", "October", "November", "December"),
)


def values(text: str) -> list[Date | Number]:
    return [found.value for found in find_values(text)]


def number(value: str | int) -> Number:
    return Number(Decimal(value))


@pytest.mark.parametrize(
    "text",
    [
        "October 23, 2018",
        "October 23 2018",
        "Oct. 23rd, 2018",
        "October the 23rd, 2018",
        "October the twenty-third, 2018",
        "23 October 2018",
        "23 Oct 2018",
        "23rd of October, 2018",
        "23 of October of 2018",
        "the 23rd of October, in the year 2018",
        "23/October/2018",
        "2018 October 23",
        "2018-10-23",
        "2018/10/23",
        "23.10.2018",
        "10/23/2018",  # no month has the number 23
        "OCTOBER 23, 2018",
    ],
)
def test_a_day_is_one_date_however_it_is_written(text: str) -> None:
    assert values(f"It was {text}.") == [OCTOBER]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("March 1962", Date(1962, 3)),
        ("March, 1962.", Date(1962, 3)),
        ("Feb 2010", Date(2010, 2)),
        ("1990", Date(1990)),
        ("nineteen ninety", Date(1990)),
        ("eighteen sixty-six", Date(1866)),
        ("nineteen oh five", Date(1905)),
        ("10 August 843", Date(843, 8, 10)),
        ("July 7", Date(None, 7, 7)),
        ("1st January", Date(None, 1, 1)),
        ("the second of May", Date(None, 5, 2)),
        ("July", Date(None, 7)),
        ("in May", Date(None, 5)),
        ("May", Date(None, 5)),
    ],
)
def test_what_a_date_leaves_open_is_none(text: str, expected: Date) -> None:
    assert values(text) == [expected]


@pytest.mark.parametrize(
    "text",
    [
        "03/04/2018",  # in March or in April
        "1,5",  # a point or a list
        "5.0.4",
        "41:18",
        "1/4,000",
        "MZ-05",
        "SH207",
        "1992-049B",
        "10.1515/cllt-2017-0057",
        "the 1990s",
        "June Huh",
        "He may march on.",
        "one of them",
        "the one",
    ],
)
def test_what_a_text_leaves_open_is_not_read(text: str) -> None:
    assert values(text) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5", [number(5)]),
        ("25", [number(25)]),
        ("1,500", [number(1500)]),
        ("1,00,000", [number(100_000)]),
        ("10\u00a0084", [number(10_084)]),
        ("28,326.51", [number("28326.51")]),
        ("3.50", [number("3.5")]),
        ("It is 3.5.", [number("3.5")]),
        ("-5", [number(-5)]),
        ("−5", [number(-5)]),
        ("minus 5", [number(-5)]),
        ("minus five", [number(-5)]),
        ("1.5 million", [number(1_500_000)]),
        ("500 crore", [number(5 * 10**9)]),
        ("fifteen hundred", [number(1500)]),
        ("one hundred and five", [number(105)]),
        ("two thousand and five", [number(2005)]),
        ("three million, two hundred thousand", [number(3_200_000)]),
        ("a hundred", [number(100)]),
        ("twenty-five", [number(25)]),
        ("five and six", [number(5), number(6)]),
        ("9-11", [number(9), number(11)]),
        ("1903–1904", [Date(1903), Date(1904)]),
        ("29-year-old", [number(29)]),
        ("105km", [number(105)]),
        ("1435 mm", [number(1435)]),
        ("1435", [Date(1435)]),
        ("2490", [number(2490)]),
        ("1 second", [number(1)]),
        ("٣٤", [number(34)]),
        ("9" * 5000, [number("9" * 5000)]),  # more digits than `int` reads
        ("68%", [Number(Decimal(68), percent=True)]),
        ("68 per cent", [Number(Decimal(68), percent=True)]),
        ("57th", [Number(Decimal(57), ordinal=True)]),
        ("fifty-seventh", [Number(Decimal(57), ordinal=True)]),
        ("31 April 2000", [number(31), Date(2000, 4)]),
    ],
)
def test_numbers_are_read_by_value(text: str, expected: list[Date | Number]) -> None:
    assert values(text) == expected


def test_what_is_found_comes_in_order_with_the_characters_that_spell_it() -> None:
    text = "On May 5, 1990 it sold 1,500 copies, one hundred of them abroad."
    found = find_values(text)
    assert [text[each.start : each.end] for each in found] == [
        *("May 5, 1990", "1,500", "one hundred")
    ]
    assert [each.value for each in found] == [Date(1990, 5, 5), number(1500), number(100)]


@given(st.dates(min_value=date(1000, 1, 1), max_value=date(2199, 12, 31)))
def test_every_day_is_the_same_in_every_spelling(day: date) -> None:
    month = MONTHS[day.month - 1]
    spellings = (
        f"{month} {day.day}, {day.year}",
        f"{day.day} {month[:3]} {day.year}",
        f"{day.day} of {month} {day.year}",
        day.isoformat(),
    )
    for text in spellings:
        assert values(text) == [Date(day.year, day.month, day.day)]


@given(st.integers(min_value=0, max_value=10**15))
def test_separators_change_no_number(whole: int) -> None:
    [found] = values(f"{whole:,}")
    assert agrees(found, number(whole))
    assert agrees(found, values(str(whole))[0])


@given(st.text(max_size=60))
def test_values_never_overlap_and_lie_within_the_text(text: str) -> None:
    end = 0
    for found in find_values(text):
        assert end <= found.start < found.end <= len(text)
        end = found.end


@pytest.mark.parametrize(
    ("found", "gold", "expected"),
    [
        ("25", "25", True),
        ("25", "5", False),
        ("5", "25", False),
        ("1,990", "1990", True),  # a bare year is a number too
        ("1990", "1,990", True),
        ("1990%", "1990", False),
        ("68%", "68", False),
        ("3rd", "3", True),
        ("March 3, 1990", "1990", True),
        ("1990", "March 3, 1990", False),
        ("March 1990", "March 3, 1990", False),
        ("March 3, 1990", "March 1990", True),
        ("March 3, 1990", "March 3", True),
        ("3 April 1984", "4 March 1984", False),
        ("March 3, 1990", "3", False),
        ("3", "March 3, 1990", False),
    ],
)
def test_a_value_says_another_if_it_is_the_same_or_a_more_precise_date(
    found: str, gold: str, expected: bool
) -> None:
    assert agrees(values(found)[0], values(gold)[0]) is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3 km", "kilometre"),
        ("3km", "kilometre"),
        ("3 kilometers", "kilometre"),
        ("5 °C", "celsius"),
        ("5 degrees Celsius", "celsius"),
        ("$500", "dollar"),
        ("500 US dollars", None),  # "US" is what stands beside it
        ("Rs. 500", "rupee"),
        ("66 votes", None),
        ("66", None),
    ],
)
def test_a_unit_stands_after_its_value_or_a_currency_before(
    text: str, expected: str | None
) -> None:
    [found] = find_values(text)
    assert unit_beside(text, found.start, found.end) == expected


def test_a_unit_has_one_name() -> None:
    names = [unit_name(word) for word in ("km", "Kilometers", "feet", "degrees Celsius", "votes")]
    assert names == ["kilometre", "kilometre", "foot", "celsius", None]
