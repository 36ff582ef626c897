"""Files of contrasts -> checked values: pairs, and source, target and control texts. Knows no
model.

A `Pair` is a prompt that goes on rightly or wrongly, for methods that compare the two at the last
token (CAA, control vectors, ITI; AUSteer, arXiv 2602.04428). An `Example` is a text of one kind,
for methods that learn from sets (DSAS, arXiv 2512.03661; Linear-AcT): "source" shows the behaviour
to change, "target" what is wanted instead, "control" what must stay as it is.

Both may name a `part`: a method is fitted on "fit", its strength is chosen on "choose", and what is
said of it is measured on "report". Files are JSONL, CSV or TSV, other columns are ignored.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from fusion_lens.durable import replace_text
from fusion_lens.errors import ConfigError, ContrastError, InputFileError, one_of, require_text
from fusion_lens.record_files import Layout, jsonl_line, load_records, text_field

PARTS = ("fit", "choose", "report")
KINDS = ("source", "target", "control")

_PAIR = "pair"


@dataclass(frozen=True, slots=True)
class Pair:
    """`prompt + right` against `prompt + wrong`; white space between belongs to the continuations.

    `subject` is who or what it is about: the cluster for statistics, and what no two parts share.
    `group` is what figures are broken down by.
    """

    id: str
    prompt: str
    right: str
    wrong: str
    subject: str | None = None
    part: str | None = None
    group: str | None = None

    def __post_init__(self) -> None:
        what = f"pair {self.id!r}"
        require_text(
            ContrastError, what, id=self.id, prompt=self.prompt, right=self.right, wrong=self.wrong
        )
        _require_text_or_none(what, subject=self.subject, part=self.part, group=self.group)
        if self.right == self.wrong:
            raise ContrastError(
                f"{what} must have two different continuations, but both are {self.right!r}."
            )
        _require_part(what, self.part)

    @property
    def texts(self) -> tuple[str, str]:
        """The right and the wrong text, prompt included."""
        return self.prompt + self.right, self.prompt + self.wrong


@dataclass(frozen=True, slots=True)
class Example:
    """`text` is of the kind, behind `prompt`, which may be empty.

    `marker` is the string whose presence in what a model writes after the prompt counts as what the
    kind stands for: the behaviour (source), what is wanted (target), what is kept (control).
    `paraphrase` is the prompt in other words, which nothing is fitted or chosen on.
    """

    id: str
    kind: str
    text: str
    prompt: str = ""
    subject: str | None = None
    part: str | None = None
    group: str | None = None
    marker: str | None = None
    paraphrase: str | None = None

    def __post_init__(self) -> None:
        what = f"example {self.id!r}"
        require_text(ContrastError, what, id=self.id, kind=self.kind, text=self.text)
        _require_text_or_none(
            what,
            subject=self.subject,
            part=self.part,
            group=self.group,
            marker=self.marker,
            paraphrase=self.paraphrase,
        )
        if self.kind not in KINDS:
            raise ContrastError(
                f"{what} must be of a kind of {', '.join(KINDS)}, but got {self.kind!r}."
            )
        _require_part(what, self.part)
        if self.marker is not None and not holds(self.text, self.marker):
            raise ContrastError(
                f"{what} must hold its own marker, but {self.marker!r} is not in {self.text!r}."
            )

    @property
    def whole(self) -> str:
        """The text behind its prompt."""
        return self.prompt + self.text


Item = TypeVar("Item", Pair, Example)


def load_pairs(path: str | Path) -> list[Pair]:
    """Read `prompt, right, wrong`; `id`, `subject`, `part`, `group` are optional.

    Raises:
        InputFileError: if the file cannot be read, a line is malformed or an id occurs twice; names
            the line.
    """
    return load_records(path, _reader(Pair, "p"), noun="pair", layout_of=_layout_of)


def load_contrasts(path: str | Path) -> list[Example]:
    """Read `kind, text`; `id`, `prompt`, `subject`, `part`, `group`, `marker`, `paraphrase` are
    optional.

    Raises:
        InputFileError: if the file cannot be read, a line is malformed or an id occurs twice; names
            the line.
    """
    return load_records(path, _reader(Example, "e"), noun="example", layout_of=_layout_of)


def save_pairs(pairs: Iterable[Pair], path: str | Path) -> None:
    """Write JSONL, empty fields left out, or CSV.

    Raises:
        ConfigError: if the name ends in neither.
        OutputError: if the file cannot be written.
    """
    _save(pairs, Pair, Path(path))


def save_contrasts(examples: Iterable[Example], path: str | Path) -> None:
    """Write JSONL, empty fields left out, or CSV.

    Raises:
        ConfigError: if the name ends in neither.
        OutputError: if the file cannot be written.
    """
    _save(examples, Example, Path(path))


def require_parts(
    items: Sequence[Item],
    *,
    least: int = 2,
    parts: Sequence[str] = PARTS,
    kinds: Sequence[str] = KINDS,
) -> dict[str, list[Item]]:
    """The items of each part, in file order, once they are fit to use.

    Every part of `parts` must have `least` items, of each kind of `kinds` where they are examples;
    no text may occur twice, in one kind or in two, and no subject in two parts. Items without a
    subject are not compared: whether they are about the same cannot be told. Items of other parts
    are left out.

    Raises:
        ConfigError: if a part or kind is not one of those there are.
        ContrastError: if something of this does not hold.
    """
    for name in parts:
        one_of("part", name, PARTS)
    for name in kinds:
        one_of("kind", name, KINDS)
    unparted = [item.id for item in items if item.part is None]
    if unparted:
        raise ContrastError(
            f"every item must name its part ({', '.join(PARTS)}), but {len(unparted)} of "
            f"{len(items)} name none, {unparted[0]!r} first; fill the column 'part'."
        )
    kept = {name: [item for item in items if item.part == name] for name in parts}
    pairs = any(isinstance(item, Pair) for item in items)
    _require_enough(kept, least, (_PAIR,) if pairs else kinds)
    _require_once(items)
    _require_apart(items)
    return kept


def of_kind(examples: Iterable[Example], kind: str) -> list[Example]:
    """The examples of one kind, in order.

    Raises:
        ConfigError: if the kind is not one of those there are.
    """
    one_of("kind", kind, KINDS)
    return [example for example in examples if example.kind == kind]


def holds(text: str, marker: str) -> bool:
    """Whether `marker` stands in `text`, letter by letter and not inside a longer word or number
    ("3,482" is not in "13,482")."""
    return re.search(rf"(?<!\w){re.escape(marker)}(?!\w)", text) is not None


def shown(example: Example, completion: str) -> bool:
    """Whether what a model wrote after the example's prompt holds the example's marker.

    Raises:
        ContrastError: if the example has none.
    """
    if example.marker is None:
        raise ContrastError(
            f"example {example.id!r} must have a marker to be looked for, but has none; "
            "fill the column 'marker'."
        )
    return holds(completion, example.marker)


def changed(example: Example, completion: str) -> bool:
    """Whether what a model wrote is another text than the example's, white space around it aside:
    damage, where the example is a control that the unsteered model wrote."""
    return completion.strip() != example.text.strip()


def _require_enough(
    kept: Mapping[str, Sequence[Pair | Example]], least: int, classes: Sequence[str]
) -> None:
    for part, items in kept.items():
        counts = dict.fromkeys(classes, 0)
        for item in items:
            kind = item.kind if isinstance(item, Example) else _PAIR
            if kind in counts:
                counts[kind] += 1
        for kind, count in counts.items():
            if count < least:
                told = ", ".join(f"{n} {name}" for name, n in counts.items())
                raise ContrastError(
                    f"the part {part!r} must have at least {least} of {kind!r}, but has {told}; "
                    "add some, or ask for fewer parts or kinds."
                )


def _require_once(items: Iterable[Pair | Example]) -> None:
    seen: dict[tuple[str, ...], Pair | Example] = {}
    for item in items:
        first = seen.setdefault(
            item.texts if isinstance(item, Pair) else (item.prompt, item.text), item
        )
        if first is not item:
            raise ContrastError(
                f"every text must occur once, but {_told(first)} and {_told(item)} are the same; "
                "drop one."
            )


def _require_apart(items: Iterable[Pair | Example]) -> None:
    part_of: dict[str, Pair | Example] = {}
    for item in items:
        if item.subject is None:
            continue
        first = part_of.setdefault(item.subject, item)
        if first.part != item.part:
            raise ContrastError(
                f"no two parts may share a subject, but {item.subject!r} is in {first.part!r} "
                f"({first.id!r}) and in {item.part!r} ({item.id!r}); split by subject."
            )


def _told(item: Pair | Example) -> str:
    kind = item.kind if isinstance(item, Example) else _PAIR
    return f"{item.id!r} ({kind}, {item.part})"


def _require_text_or_none(what: str, **values: str | None) -> None:
    given = {name: value for name, value in values.items() if value is not None}
    require_text(ContrastError, what, **given)


def _require_part(what: str, part: str | None) -> None:
    if part is not None and part not in PARTS:
        raise ContrastError(f"{what} must be of a part of {', '.join(PARTS)}, but got {part!r}.")


def _layout_of(header: Sequence[str]) -> Layout:
    # a CSV has no other way to say that there is nothing
    return lambda row, number: {key: cell or None for key, cell in row.items()}


def _reader(kind: type[Item], prefix: str) -> Callable[[Path, int, Mapping[str, Any]], Item]:
    required = ("prompt", "right", "wrong") if kind is Pair else ("kind", "text")

    def make(path: Path, line: int, record: Mapping[str, Any]) -> Item:
        given = {"id": f"{prefix}{line:04d}"}
        for field in fields(kind):
            value = text_field(path, line, record, field.name)
            if value is not None:
                given[field.name] = value
            elif field.name in required:
                raise InputFileError(path, f"must have a text {field.name!r}, but has none", line)
        try:
            return kind(**given)
        except ContrastError as error:
            raise InputFileError(path, str(error), line) from error

    return make


def _save(items: Iterable[Pair | Example], kind: type[Pair] | type[Example], path: Path) -> None:
    records = [asdict(item) for item in items]
    if path.suffix == ".jsonl":
        replace_text(path, "".join(map(jsonl_line, records)))
    elif path.suffix == ".csv":
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, [field.name for field in fields(kind)])
        writer.writeheader()
        writer.writerows(records)
        replace_text(path, text.getvalue())
    else:
        raise ConfigError(f"the name must end in .jsonl or .csv, but got {path.name!r}.")
