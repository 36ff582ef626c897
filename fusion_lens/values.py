"""Text -> the dates and numbers in it, by value.

`October 23, 2018`, `23rd of October, 2018` and `2018-10-23` are one date; `1,500`, `1500` and
`fifteen hundred` one number. What a text leaves open is not read: `03/04/2018` (which is the
month?), `1,5` (a point?), `5.0.4`, `41:18`, `MZ-05`. A bare figure from 1000 to 2199 is a year and
equals the number. Units are words beside the value. Knows nothing of answers.
"""

from __future__ import annotations

import re
from calendar import monthrange
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal, localcontext


@dataclass(frozen=True, slots=True)
class Date:
    """A day, a month or a year; None where the text leaves a part open."""

    year: int | None = None
    month: int | None = None
    day: int | None = None


@dataclass(frozen=True, slots=True)
class Number:
    """A number; `68%` is the percentage 68, and `3rd` the ordinal of 3."""

    value: Decimal
    percent: bool = False
    ordinal: bool = False


@dataclass(frozen=True, slots=True)
class Found:
    """A value and the characters [start, end) that spell it."""

    value: Date | Number
    start: int
    end: int


_MONTHS = (
    *("january", "february", "march", "april", "may", "june", "july"),
    *("august", "september", "october", "november", "december"),
)
_UNIT_NAMES = {
    "kilometre": "km kilometer",
    "metre": "m meter",
    "centimetre": "cm centimeter",
    "millimetre": "mm millimeter",
    "mile": "mi",
    "foot": "ft feet",
    "inch": "inches",
    "yard": "yd",
    "kilogram": "kg kilo",
    "gram": "g gramme",
    "tonne": "",
    "litre": "l liter",
    "hectare": "ha",
    "acre": "",
    "second": "s sec",
    "minute": "min",
    "hour": "h hr hrs",
    "day": "",
    "week": "",
    "month": "",
    "year": "yr yrs",
    "century": "centuries",
    "celsius": "°c",
    "fahrenheit": "°f",
    "dollar": "$ usd",
    "euro": "€ eur",
    "pound": "£ lb lbs gbp",
    "rupee": "₹ rs inr",
    "yen": "¥ jpy",
}
_UNITS = {
    form: name
    for name, others in _UNIT_NAMES.items()
    for one in (name, *others.split())
    for form in ((one, f"{one}s") if len(one) > 2 else (one,))  # "ms" is no metre
}
_ATTACHED = r"(?:km|cm|mm|m|ft|mi|kg|g|ha|h|hr|min|sec|usd|eur)\b"

_ONES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_TEENS = (
    *("ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen"),
    *("sixteen", "seventeen", "eighteen", "nineteen"),
)
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_ORDINAL_ONES = (
    *("first", "second", "third", "fourth", "fifth"),
    *("sixth", "seventh", "eighth", "ninth"),
)
_ORDINAL_TEENS = ("twelfth", *(f"{word}th" for word in _TEENS if word != "twelve"))
_SCALES = {
    "thousand": 3,
    "lakh": 5,
    "million": 6,
    "crore": 7,
    "billion": 9,
    "trillion": 12,
}
_WORD_VALUES = {
    **{word: n for n, word in enumerate((*_ONES, *_TEENS))},
    **{word: 10 * n for n, word in enumerate(_TENS, start=2)},
    **{word: n for n, word in enumerate(_ORDINAL_ONES, start=1)},
    **{f"{word}th": n for n, word in enumerate(_TEENS, start=10)},
    "twelfth": 12,
    **{f"{word[:-1]}ieth": 10 * n for n, word in enumerate(_TENS, start=2)},
}


def _any(words: Iterator[str] | tuple[str, ...]) -> str:
    return "(?:" + "|".join(sorted(words, key=len, reverse=True)) + ")"


_SMALL = rf"(?:{_any(_TENS)}(?:[-\s]{_any(_ONES[1:])})?|{_any(_TEENS)}|{_any(_ONES)})"
_HUNDREDS = rf"(?:(?:{_SMALL}|a)[-\s]hundred(?:\s(?:and\s)?{_SMALL})?|{_SMALL})"
_SCALE = _any(tuple(_SCALES))
_CARDINAL = rf"(?:{_HUNDREDS}|a(?=[-\s]{_SCALE}))(?:[-\s]{_SCALE}(?:,?\s(?:and\s)?{_HUNDREDS})?)*"
_ORDINAL = (
    rf"(?:(?:{_any(_TENS)}[-\s])?{_any(_ORDINAL_ONES)}|{_any(_ORDINAL_TEENS)}"
    rf"|{_any(tuple(f'{word[:-1]}ieth' for word in _TENS))})"
)
_YEAR_WORDS = re.compile(
    rf"\b(?P<century>{_any(_TEENS)}|twenty)[-\s]"
    rf"(?P<year>{_any(_TENS)}(?:[-\s]{_any(_ONES[1:])})?|{_any(_TEENS)}|oh[-\s]{_any(_ONES[1:])})\b",
    re.IGNORECASE,
)
_WORDS = re.compile(
    rf"\b(?:(?P<ordinal>{_ORDINAL})|(?P<minus>(?:minus|negative)\s)?(?P<cardinal>{_CARDINAL}))\b",
    re.IGNORECASE,
)

_MONTH = (
    r"(?P<month>jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?"
    r"|sept?(?:ember)?|oct(?:ober)?|nov(?:ember)?|dec(?:ember)?)(?![a-z])\.?"
)
_DAY = rf"(?P<day>\d{{1,2}}(?:st|nd|rd|th)?(?!\w)|{_ORDINAL}\b)"
_YEAR = r"(?P<year>[12]\d{3}|\d{3}(?! [a-z]))(?!\w)"
_GAP = r"(?:\s*[,/-]\s*|\s+)(?:(?:of|in)\s+(?:the\s+year\s+)?)?"
_DAY_MONTH = rf"(?<![\w.:/]){_DAY}(?:\s+day)?(?:\s+of)?(?:\s*[/-]\s*|\s+){_MONTH}"
_MONTH_DAY = rf"(?<!\w){_MONTH}[\s,/-]+(?:the\s+)?{_DAY}"
_FIGURE_DATES = (
    re.compile(
        r"(?<![\w./-])(?P<year>\d{4})(?P<sep>[-/.])(?P<m>\d{1,2})(?P=sep)(?P<day>\d{1,2})(?![\w/-])"
    ),
    re.compile(
        r"(?<![\w./-])(?P<one>\d{1,2})(?P<sep>[-/.])(?P<two>\d{1,2})(?P=sep)(?P<year>\d{4})(?![\w/-])"
    ),
)
_NAMED_DATES = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        rf"{_DAY_MONTH}{_GAP}{_YEAR}",
        rf"{_MONTH_DAY}{_GAP}{_YEAR}",
        rf"(?<![\w.:/-])(?P<year>[12]\d{{3}}){_GAP}{_MONTH}\s+{_DAY}",
        rf"(?<!\w){_MONTH}{_GAP}(?P<year>[12]\d{{3}})(?!\w)",
        rf"{_DAY_MONTH}(?!\w)",
        rf"{_MONTH_DAY}(?![-–]?\d)",
    )
)
# "may" is a verb and "June Huh" a person
_LONE_MONTH = re.compile(
    r"\b(?P<month>January|February|April|June|July|August|September|October|November|December"
    r"|(?<=\bin )(?:May|March)|(?<=\bof )(?:May|March)|(?<!.)(?:May|March)(?=\W*\Z))\b(?! +[A-Z])"
)
_DIGITS = (
    r"(?:\d{1,3}(?:,\d{2,3})*,\d{3}|\d{1,3}(?:[\u00a0\u2009\u202f]\d{3})+|\d+)(?:\.\d+)?|\.\d+"
)
_LEFT = r"(?<!\w)(?<!\d[.:,])(?<!\w[-/])"
_RIGHT = rf"(?!\d)(?![.:,/]\d)(?!/\w)(?!-\d)(?:(?!\w)|(?={_ATTACHED}))"
_RANGE = re.compile(rf"{_LEFT}(?P<low>{_DIGITS})\s?[-–—]\s?(?P<high>{_DIGITS}){_RIGHT}")
_NUMBER = re.compile(
    rf"(?:(?P<minus>(?<![\w)])[-−]|\b(?:minus|negative)\s)|{_LEFT})"
    rf"(?P<digits>{_DIGITS})(?P<ordinal>(?:st|nd|rd|th)\b)?{_RIGHT}"
    rf"(?P<scales>(?:[-\s](?:hundred|{_SCALE})\b)*)(?P<percent>\s?%|\sper\s?cent\b)?",
    re.IGNORECASE,
)
_UNIT_AFTER = re.compile(
    r"[\s-]*(°\s?[cf]\b|degrees?\s(?:celsius|fahrenheit)|[^\W\d_]+|[$€£₹¥])", re.IGNORECASE
)
_UNIT_BEFORE = re.compile(r"([$€£₹¥]|\b[^\W\d_]+)\.?\s?[-−]?$")


def find_values(text: str) -> list[Found]:
    """Every date and number of the text, in order and without overlap."""
    found: list[Found] = []
    rest = text
    for value, start, end in _all_values(text):
        if "\0" not in rest[start:end]:
            found.append(Found(value, start, end))
            rest = rest[:start] + "\0" * (end - start) + rest[end:]
    return sorted(found, key=lambda each: each.start)


def agrees(found: Date | Number, gold: Date | Number) -> bool:
    """Whether `found` says `gold`: the same number, the same date, or a more precise date.

    March 3, 1990 says 1990; 1990 does not say March 3, 1990.
    """
    match found, gold:
        case Date(), Date():
            return all(
                wanted is None or got == wanted
                for got, wanted in (
                    (found.year, gold.year),
                    (found.month, gold.month),
                    (found.day, gold.day),
                )
            )
        case Number(), Number():
            return (found.value, found.percent) == (gold.value, gold.percent)
        case (Number() as number, Date(int(year), None, None)) | (
            Date(int(year), None, None),
            Number() as number,
        ):
            return number.value == year and not number.percent
    return False


def unit_beside(text: str, start: int, end: int) -> str | None:
    """The unit of the value at [start, end), by its full singular name; None where no known unit is
    written directly after it, nor a currency directly before."""
    after = _UNIT_AFTER.match(text, end)
    before = _UNIT_BEFORE.search(text[max(0, start - 20) : start])
    return (unit_name(after[1]) if after else None) or (unit_name(before[1]) if before else None)


def unit_name(word: str) -> str | None:
    """The full singular name of a unit (`km` -> `kilometre`); None where the word is none."""
    return _UNITS.get(re.sub(r"^degrees?|\s", "", word.casefold()))


def _all_values(text: str) -> Iterator[tuple[Date | Number, int, int]]:
    has_digit = re.search(r"\d", text)
    patterns: tuple[re.Pattern[str], ...] = _FIGURE_DATES if has_digit else ()
    if re.search(_MONTH, text, re.IGNORECASE):
        patterns += (*_NAMED_DATES, _LONE_MONTH)
    for pattern in patterns:
        for match in pattern.finditer(text):
            date = _date(match)
            if date is not None:
                yield date, match.start(), match.end()
    if has_digit:
        for match in _RANGE.finditer(text):
            for end in ("low", "high"):
                yield _plain(match[end], text[match.end(end) :]), match.start(end), match.end(end)
        for match in _NUMBER.finditer(text):
            yield _number(match, text), match.start(), match.end()
    for match in _YEAR_WORDS.finditer(text):
        year = 100 * _sum_of_words(match["century"]) + _sum_of_words(match["year"])
        yield Date(year), match.start(), match.end()
    for match in _WORDS.finditer(text):
        if not _is_no_number(match, text):
            yield _spelt(match), match.start(), match.end()


def _date(match: re.Match[str]) -> Date | None:
    parts = match.groupdict()
    year = int(parts["year"]) if parts.get("year") else None
    if parts.get("one"):
        one, two = int(parts["one"]), int(parts["two"])
        if one <= 12 and two <= 12 and one != two:
            return None  # 03/04/2018 is in March or in April
        month, day = (one, two) if two > 12 else (two, one)
    elif parts.get("m"):
        month, day = int(parts["m"]), int(parts["day"])
    else:
        if year is None and parts["month"] in {"may", "march", "mar"}:
            return None  # "5 may have died"
        month = 1 + next(
            n for n, name in enumerate(_MONTHS) if name.startswith(parts["month"][:3].casefold())
        )
        day = _day(parts["day"]) if parts.get("day") else 0
    if not 1 <= month <= 12 or day > monthrange(year or 2000, month)[1]:
        return None
    return Date(year, month, day or None)


def _day(text: str) -> int:
    digits = re.match(r"\d+", text)
    return int(digits[0]) if digits else _sum_of_words(text)


def _plain(digits: str, after: str) -> Date | Number:
    """A bare figure: a year, unless a unit follows it."""
    if re.fullmatch(r"1\d{3}|2[01]\d{2}", digits):
        unit = _UNIT_AFTER.match(after)
        if unit is None or unit_name(unit[1]) is None:
            return Date(int(digits))
    return Number(Decimal(re.sub(r"[,\u00a0\u2009\u202f]", "", digits)))


def _number(match: re.Match[str], text: str) -> Date | Number:
    plain = _plain(match["digits"], text[match.end("digits") :])
    if not any(match[part] for part in ("minus", "ordinal", "scales", "percent")):
        return plain
    value = plain.value if isinstance(plain, Number) else Decimal(match["digits"])
    for scale in re.findall(r"[a-z]+", match["scales"].casefold()):
        value = _times_ten_to(value, _SCALES.get(scale, 2))
    if match["minus"]:
        value = -value
    return Number(value, percent=bool(match["percent"]), ordinal=bool(match["ordinal"]))


def _spelt(match: re.Match[str]) -> Number:
    total = Decimal(_sum_of_words(match["ordinal"] or match["cardinal"]))
    return Number(-total if match["minus"] else total, ordinal=bool(match["ordinal"]))


def _sum_of_words(text: str) -> int:
    total = part = 0
    for word in re.findall(r"[a-z]+", text.casefold()):
        if word == "hundred":
            part = max(part, 1) * 100
        elif word in _SCALES:
            total += max(part, 1) * 10 ** _SCALES[word]
            part = 0
        else:
            part += _WORD_VALUES.get(word, 0)
    return total + part


def _is_no_number(match: re.Match[str], text: str) -> bool:
    """Whether a number word is a pronoun ("the one", "one of them") or a unit ("1 second")."""
    word = match[0].casefold()
    before = re.search(r"(\w+)\W*$", text[max(0, match.start() - 20) : match.start()])
    if word == "one":
        follows_of = re.match(r"\s+of\b", text[match.end() :])
        pronoun = before and before[1].casefold() in {"no", "the", "this", "that", "any", "each"}
        return bool(pronoun or follows_of)
    return word == "second" and before is not None and before[1].isdecimal()


def _times_ten_to(value: Decimal, power: int) -> Decimal:
    with localcontext() as context:
        context.prec = len(value.as_tuple().digits) + power
        return value.scaleb(power)
