"""A table of texts, for the terminal, as Markdown and as HTML; what values show of themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from fusion_lens.differences import marked_html

if TYPE_CHECKING:
    from rich.console import Group
    from rich.text import Text

Cell = str | Sequence[tuple[str, bool]]
"""A text, or its pieces, those with True marked."""

_LEFT = ("label", "text", "unsteered", "steered", "")
_LONGEST_NAME = 24
_CELL = 'style="text-align: {}; white-space: pre-wrap; max-width: 40em"'


@dataclass(frozen=True, slots=True)
class Section:
    """A table of texts: its title, header and cells, and what is said below it. Columns after the
    first are aligned on the right, but for labels and texts."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = ()

    def to_rich(self) -> Group:
        """For the terminal: title, table and notes."""
        from rich.box import SIMPLE_HEAD
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(
            box=SIMPLE_HEAD,
            show_edge=False,
            show_header=any(self.header),
            padding=(0, 1, 0, 0),
            pad_edge=False,
        )
        for n, name in enumerate(self.header):
            table.add_column(
                name,
                justify=self._side(n),  # type: ignore[arg-type]
                # a cell that does not fit is folded: cut off, a perplexity of 1234.5 reads 123
                overflow="fold",
                no_wrap=n == 0 and self._begins_with_names(),
            )
        for row in self.rows:
            table.add_row(*map(_rich, row))
        return Group(Text(self.title), table, *map(Text, self.notes))

    def show(self) -> None:
        """Print it on the terminal."""
        from rich.console import Console

        Console().print(self.to_rich())

    def to_markdown(self) -> str:
        """The table alone."""
        rule = ["---", *["---:"] * (len(self.header) - 1)]
        rows = [list(self.header), rule, *([_markdown(cell) for cell in row] for row in self.rows)]
        return "\n".join("| " + " | ".join(row) + " |" for row in rows)

    def to_html(self) -> str:
        """A `<table>`, every text escaped, and a paragraph for every note."""
        head = "".join(
            f"<th {_CELL.format(self._side(n))}>{escape(name)}</th>"
            for n, name in enumerate(self.header)
        )
        body = "".join(
            "<tr>"
            + "".join(
                f"<td {_CELL.format(self._side(n))}>{_html(cell)}</td>"
                for n, cell in enumerate(row)
            )
            + "</tr>"
            for row in self.rows
        )
        head = f"<thead><tr>{head}</tr></thead>" if any(self.header) else ""
        return (
            f'<table><caption style="text-align: left">{escape(self.title)}</caption>'
            f"{head}<tbody>{body}</tbody></table>"
            + "".join(f"<p>{escape(note)}</p>" for note in self.notes)
        )

    def _repr_html_(self) -> str:
        return self.to_html()

    def __rich__(self) -> Group:
        return self.to_rich()

    def _begins_with_names(self) -> bool:
        """Whether the first cells are short: what rows are called is the last to be folded."""
        return max((len(_rich(row[0])) for row in self.rows), default=0) <= _LONGEST_NAME

    def _side(self, column: int) -> str:
        return "right" if column > 0 and self.header[column] not in _LEFT else "left"


class Shows:
    """What has a table of itself: Jupyter shows it as HTML, rich in a terminal."""

    __slots__ = ()

    def table(self) -> Section:
        """The value as a small table."""
        raise NotImplementedError

    def _repr_html_(self) -> str:
        return self.table().to_html()

    def __rich__(self) -> Group:
        return self.table().to_rich()


def _markdown(cell: Cell) -> str:
    text = cell if isinstance(cell, str) else "".join(text for text, _ in cell)
    return text.replace("|", "\\|").replace("\n", "<br>")


def _html(cell: Cell) -> str:
    return escape(cell) if isinstance(cell, str) else marked_html(cell)


def _rich(cell: Cell) -> Text:
    """Not markup: a label may hold what rich would take for it."""
    from rich.text import Text

    if isinstance(cell, str):
        return Text(cell)
    return Text.assemble(*((text, "bold underline" if marked else "") for text, marked in cell))
