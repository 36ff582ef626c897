from __future__ import annotations

import io

from rich.console import Console

from fusion_lens.tables import Section, Shows

HOSTILE = "<script>alert(1)</script> & [red]x[/red] \"'"


class Shown(Shows):
    def table(self) -> Section:
        return Section(
            f"title {HOSTILE}",
            ("name", "n", "text"),
            (("a", "12.5", HOSTILE), ("b", "-", (("same ", False), ("<b>new</b>", True)))),
            (f"note {HOSTILE}",),
        )


def test_html_holds_every_text_escaped_and_marks_what_differs() -> None:
    html = Shown()._repr_html_()
    assert "<script>" not in html
    assert html.count("&lt;script&gt;alert(1)&lt;/script&gt; &amp; [red]x[/red]") == 3
    assert "same <mark>&lt;b&gt;new&lt;/b&gt;</mark></td>" in html
    assert html.startswith("<table><caption")
    assert html.endswith("</p>")


def test_numbers_stand_on_the_right_and_texts_on_the_left() -> None:
    html = Shown().table().to_html()
    sides = [part.split(";")[0] for part in html.split('style="text-align: ')[2:]]
    assert sides == ["left", "right", "left"] * 3


def test_a_table_without_names_has_no_head() -> None:
    assert "<thead>" not in Section("t", ("", ""), (("a", "b"),)).to_html()


def test_a_terminal_shows_the_same_and_reads_no_markup() -> None:
    console = Console(width=120, file=io.StringIO())
    console.print(Shown())
    text = console.file.getvalue()
    assert text.count("[red]x[/red]") == 3
    assert "same <b>new</b>" in text


def test_what_a_row_is_called_stays_on_one_line_where_others_must_fold() -> None:
    header = ("arm", "n", "correct", "incorrect", "not attempted", "of attempted", "F", "unscored")
    rows = tuple((arm, "60", *["100.0%"] * 5, "0") for arm in ("answer_in_prompt", "full"))
    console = Console(width=80, file=io.StringIO())
    console.print(Section("labels", header, rows).to_rich())
    lines = console.file.getvalue().splitlines()
    assert "answer_in_prompt  60" in lines[4]
    assert lines[5].startswith("full ")
    # a text is folded as before
    long = Section("texts", ("said", "n"), (("word " * 30, "1"),))
    console.print(long.to_rich())
    assert console.file.getvalue().count("word") == 30


def test_markdown_holds_the_text_of_marked_cells() -> None:
    assert Shown().table().to_markdown().splitlines()[3] == "| b | - | same <b>new</b> |"


def test_a_table_shows_itself_as_the_value_it_is_of_does() -> None:
    table = Shown().table()
    assert table._repr_html_() == Shown()._repr_html_()
    texts = []
    for shown in (table, Shown()):
        console = Console(width=120, file=io.StringIO())
        console.print(shown)
        texts.append(console.file.getvalue())
    assert texts[0] == texts[1]
