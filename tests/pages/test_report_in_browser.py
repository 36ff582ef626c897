"""`report.html` in a real browser: opened from disk, clicked, typed at, measured."""

from __future__ import annotations

import os
import re
import shutil
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import expect, sync_playwright
from sample_runs import HOSTILE, empty_run, hostile_run, large_run, small_run

from fusion_lens.report_page import html_report
from fusion_lens.run_plots import run_figures

pytestmark = pytest.mark.pages

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
QUIET = (
    *("--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
SECONDS = 3.0


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if path is None:
        reason = "no Chromium was found (Debian: apt-get install chromium)"
        if os.environ.get("FUSION_LENS_BROWSER") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    with sync_playwright() as started:
        opened = started.chromium.launch(executable_path=path, args=list(QUIET))
        yield opened
        opened.close()


@dataclass
class Opened:
    """A page, and what went wrong in it."""

    page: Any
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    work: float = 0.0
    """Seconds the page's main thread computed until everything was drawn."""

    def ids(self) -> list[str]:
        """Of the rows shown."""
        return self.page.locator("#table tbody td.c-id .id").all_text_contents()

    def column(self, name: str) -> list[str]:
        return self.page.locator(f'#table tbody td[data-label="{name}"]').all_text_contents()

    def title(self) -> str:
        return self.page.text_content("#detail-title")

    def focused(self) -> str:
        return self.page.evaluate("document.activeElement.id || document.activeElement.textContent")


Open = Callable[..., Opened]


@pytest.fixture
def open_page(browser: Any, pages: dict[str, Path]) -> Iterator[Open]:
    """Open a run's page from disk without a network; afterwards nothing may have complained."""
    contexts, opened = [], []

    def start(run: str = "small", width: int = 1280, scheme: str = "light", at: str = "") -> Opened:
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True
        )
        contexts.append(context)
        made = Opened(context.new_page())
        opened.append(made)
        made.page.on("console", lambda told: made.complaints.append(f"{told.type}: {told.text}"))
        made.page.on("pageerror", lambda error: made.complaints.append(f"error: {error}"))
        made.page.on("dialog", lambda box: (made.complaints.append("alert"), box.dismiss()))
        made.page.on("request", lambda request: made.requests.append(request.url))
        made.page.add_init_script(
            "window.violations = []; document.addEventListener('securitypolicyviolation',"
            " (event) => window.violations.push(event.violatedDirective));"
        )
        devtools = context.new_cdp_session(made.page)
        devtools.send("Performance.enable", {"timeDomain": "threadTicks"})
        address = pages[run].as_uri()
        made.page.goto(address + at)
        made.page.wait_for_selector("html[data-ready=yes]", timeout=60_000, state="attached")
        metrics = devtools.send("Performance.getMetrics")["metrics"]
        made.work = next(m["value"] for m in metrics if m["name"] == "TaskDuration")
        assert made.requests == [address]
        return made

    yield start
    for each in opened:
        assert each.complaints == []
        assert each.page.evaluate("[window.violations, typeof window.pwned]") == [[], "undefined"]
        outside = [url for url in each.requests if not url.startswith(("file:", "data:", "blob:"))]
        assert outside == []
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages with space")
    made = {"small": small_run, "hostile": hostile_run, "large": large_run, "empty": empty_run}
    for name, run in made.items():
        (folder / f"{name}.html").write_text(html_report(run()), encoding="utf-8")
    return {name: folder / f"{name}.html" for name in made}


def test_every_figure_is_drawn_without_a_touch(open_page: Open) -> None:
    drawn = open_page().page.evaluate(
        "[...document.querySelectorAll('.plot')].map((plot) => ["
        " plot.querySelectorAll('svg.main-svg').length > 0,"
        " plot.querySelectorAll("
        "  '.point, .box, .js-line, .scatterlayer path, .heatmaplayer image').length])"
    )
    assert len(drawn) == len(run_figures(small_run()))
    assert all(svg and marks >= 1 for svg, marks in drawn)


def test_a_search_narrows_to_what_any_arm_said_whatever_the_accents(open_page: Open) -> None:
    opened = open_page()
    assert opened.ids() == ["lovelace", "harris", "quist"]
    for text, expected in {
        "quist": ["quist"],
        "JOSE": ["harris"],
        "RED book": ["lovelace"],
        "ada oslo": ["quist"],  # his reference text is hers
        "nowhere": [],
        "": ["lovelace", "harris", "quist"],
    }.items():
        opened.page.fill("#search", text)
        told = f"{len(expected)} question{'' if len(expected) == 1 else 's'} of 3 shown"
        expect(opened.page.locator("#count")).to_have_text(told)
        expect(opened.page.locator("#table tbody td.c-id .id")).to_have_text(expected)


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("right", ["quist"]),
        ("wrong", ["lovelace", "harris"]),
        ("became_right", ["quist"]),
        ("became_wrong", []),
        ("other_text", ["lovelace", "quist"]),
        ("arms_differ", ["lovelace", "quist"]),
        ("zero_won", ["harris"]),
        ("steered", ["lovelace", "quist"]),
        ("worse", ["quist"]),
    ],
)
def test_quick_filters(open_page: Open, choice: str, expected: list[str]) -> None:
    opened = open_page()
    opened.page.select_option("#filter", choice)
    assert opened.ids() == expected


def test_a_header_sorts_up_down_and_not_with_unscored_last(open_page: Open) -> None:
    opened = open_page()
    header = opened.page.locator("#table th", has_text="objective")
    orders = []
    for _ in range(3):
        header.locator("button").click()
        orders.append((header.get_attribute("aria-sort"), opened.ids()))
    assert orders == [
        ("ascending", ["quist", "lovelace", "harris"]),
        ("descending", ["lovelace", "harris", "quist"]),
        ("none", ["lovelace", "harris", "quist"]),
    ]
    perplexity = opened.page.locator("#table th", has_text="perplexity").locator("button")
    for _ in range(2):
        perplexity.click()
        assert opened.ids()[-1] == "harris"
        assert opened.column("perplexity")[-1] == "–"


def test_the_arm_that_is_chosen_fills_the_steered_columns(open_page: Open) -> None:
    opened = open_page()
    assert opened.column("segmented") == [
        "Ada wrote\nthe book.",
        "Tom Harris. He wrote it.",
        "In Oslo.",
    ]
    chosen = "early 0.25middle 0.50late 1.25"
    assert opened.column("coefficients") == [chosen, "zero plan", chosen]
    assert opened.column("change") == ["0.00", "0.00", "−0.44"]
    opened.page.select_option("#arm", "full")
    assert opened.column("full") == ["Ada Lovelace. He wrote it.", "Tom Harris. He wrote it.", "–"]
    assert opened.column("right") == ["✓ right", "✗ wrong", "–"]
    assert opened.column("change") == ["+0.56", "0.00", "–"]


def test_a_click_on_a_row_opens_its_question_in_full(open_page: Open) -> None:
    opened = open_page()
    opened.page.click("#table tbody tr:nth-child(1) td.c-gold")
    page = opened.page
    page.wait_for_selector("dialog[open]")
    assert opened.title() == "Who wrote the red book?"
    headings = page.locator("#detail h3").all_text_contents()
    assert headings == ["What each arm said", "Scores", "Layers", "Tokens", "Features"]
    said = page.locator(".said li")
    assert said.locator("h4").all_text_contents() == [
        *("baseline ✗ wrong", "full ✓ right", "segmented ✗ wrong")
    ]
    # against "Tom Harris. He wrote it."
    assert said.nth(1).locator("mark").all_text_contents() == ["Ada", "Lovelace."]
    assert said.nth(2).locator("mark").all_text_contents() == ["Ada", "the", "book."]
    bars = page.locator("#detail .bars svg")
    assert bars.count() == 3
    assert (
        bars.nth(1)
        .get_attribute("aria-label")
        .endswith("layer 0 0.500, layer 1 1.00, layer 2 unscored, layer 3 1.50")
    )
    heights = (
        bars.nth(0).locator("rect").evaluate_all("all => all.map((r) => +r.getAttribute('height'))")
    )
    assert [height / heights[0] for height in heights] == pytest.approx([1, 2, 3, 4.5])
    cells = page.locator(".coefficients tbody tr").nth(1).locator("td")
    assert [(c.text_content(), c.get_attribute("colspan")) for c in cells.all()] == [
        *(("early 0.25", "2"), ("middle 0.50", "1"), ("late 1.25", "1"))
    ]
    assert page.locator(".token.chosen").all_text_contents() == [
        *("⏎", " Ada", " Lovelace", "."),
        *("⏎", " Ada"),
    ]
    trace = page.locator("#detail .trace").nth(0)
    assert trace.locator(".shift").all_text_contents() == ["+0.3", "−0.3", "−0.8", "−1.3", "−1.8"]
    assert trace.locator(".shifted").nth(3).get_attribute("title") == (
        '" Lovelace": log p −1.50 steered, −0.25 unsteered, change −1.25 nats'
    )
    trace.locator("summary").click()
    assert trace.locator("tbody tr").nth(3).text_content() == " Lovelace−1.500−0.250−1.250"
    rows = page.locator(".features tbody tr")
    assert rows.all_text_contents() == ["217before a name+4.5025 %", "all18unlabelled−1.50–"]


def test_what_is_missing_is_said(open_page: Open) -> None:
    opened = open_page(at="#q=harris")
    told = opened.page.text_content("#detail-body")
    assert "the zero plan won: nothing is injected" in told
    assert "No generic share: it needs other questions." in told
    assert "No arm has a plan that injects anything" in told
    assert "None: the run had no dictionary" in told
    opened.page.click("#next")
    expect(opened.page.locator("#detail-title")).to_have_text("Where is Quist?")
    told = opened.page.text_content("#detail-body")
    assert "This run kept none of this question" in told
    assert "This arm failed on the question, or was not run." in told


def test_a_run_without_questions_opens(open_page: Open) -> None:
    opened = open_page("empty", at="#q=nobody")
    assert opened.ids() == []
    assert opened.page.text_content("#count") == "0 questions of 0 shown"
    assert not opened.page.is_visible(".pager")


def test_previous_and_next_go_through_what_is_shown_and_escape_gives_the_focus_back(
    open_page: Open,
) -> None:
    opened = open_page()
    page = opened.page
    page.select_option("#filter", "steered")
    page.click("text=Who wrote the red book?")
    page.wait_for_selector("dialog[open]")
    assert page.text_content("#detail-place") == "1 of 2"
    assert page.is_disabled("#previous")
    page.click("#next")
    assert (opened.title(), page.text_content("#detail-place")) == ("Where is Quist?", "2 of 2")
    assert page.evaluate("location.hash") == "#q=quist"
    assert page.is_disabled("#next")
    page.keyboard.press("ArrowLeft")
    assert opened.title() == "Who wrote the red book?"
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Escape")
    page.wait_for_selector("dialog", state="hidden")
    assert opened.focused() == "Where is Quist?"
    assert page.evaluate("location.hash") == "#questions"


def test_a_link_opens_a_question_and_back_closes_it(open_page: Open) -> None:
    opened = open_page(at="#q=quist")
    assert opened.title() == "Where is Quist?"
    opened.page.click("#close")
    opened.page.click("text=Who is Tom?")
    opened.page.wait_for_selector("dialog[open]")
    opened.page.go_back()
    opened.page.wait_for_selector("dialog", state="hidden")
    assert opened.focused() == "Who is Tom?"


def test_the_keyboard_alone_reaches_search_table_detail_and_back(open_page: Open) -> None:
    opened = open_page()
    page = opened.page

    def tab_to(wanted: str) -> None:
        for _ in range(80):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement === document.body"):
                continue  # from the last control the browser's own follow
            outlined = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
            assert outlined != "none", f"{opened.focused()} shows no focus"
            if opened.focused() == wanted:
                return
        raise AssertionError(f"{wanted} was not reached")

    page.keyboard.press("Tab")
    assert opened.focused() == "Skip to the questions"
    page.keyboard.press("Enter")
    tab_to("search")
    page.keyboard.type("oslo")
    expect(page.locator("#table tbody tr")).to_have_count(1)
    tab_to("Where is Quist?")
    page.keyboard.press("Enter")
    page.wait_for_selector("dialog[open]")
    assert opened.title() == "Where is Quist?"
    tab_to("close")
    page.keyboard.press("Escape")
    page.wait_for_selector("dialog", state="hidden")
    assert opened.focused() == "Where is Quist?"


def test_hostile_text_stays_text_wherever_it_is_shown(open_page: Open) -> None:
    opened = open_page("hostile")
    page = opened.page
    assert opened.ids() == [text.replace("\x00", "\x00") for text in HOSTILE]
    assert opened.column("gold") == list(HOSTILE)
    for i, text in enumerate(HOSTILE):
        page.locator("#table .open").nth(i).click()
        page.wait_for_selector("dialog[open]")
        assert opened.title() == f"{i} {text}"
        shown = page.locator(".said li .completion").all_text_contents()
        assert shown == [f"{arm} {text}".strip() for arm in ("baseline", "segmented")]
        assert page.locator(".features tbody th").all_text_contents() == [text]
        assert page.locator("#detail .trace").first.locator(".token").nth(1).text_content() == text
        assert page.locator("#detail a, #detail img, #detail script").count() == 0
        page.click("#close")
    inserted = page.evaluate(
        "document.querySelectorAll('main img, main script, main a[href], main [onload],"
        " main [onerror]').length"
    )
    assert inserted == 0
    assert page.text_content("#command") == HOSTILE[0]


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("run", ["small", "hostile", "large"])
def test_nothing_overflows_and_everything_is_large_enough(
    open_page: Open, run: str, width: int
) -> None:
    page = open_page(run, width=width).page
    measure = """() => {
      const seen = (element) => element.checkVisibility({ visibilityProperty: true });
      const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
      const small = [];
      while (walker.nextNode()) {
        const parent = walker.currentNode.parentElement;
        if (!walker.currentNode.textContent.trim() || !seen(parent)) continue;
        if (parseFloat(getComputedStyle(parent).fontSize) < 11) small.push(parent.textContent);
      }
      const controls = [...document.querySelectorAll("button, input, select, summary, nav a")];
      const tight = controls.filter(seen).map((e) => [e.textContent, e.getBoundingClientRect()])
        .filter(([, box]) => box.height < 24 || box.width < 24).map(([text]) => text);
      return { over: document.documentElement.scrollWidth - innerWidth, small, tight };
    }"""
    fine = {"over": 0, "small": [], "tight": []}
    assert page.evaluate(measure) == fine
    page.locator("#table .open").first.click()
    page.wait_for_selector("dialog[open]")
    assert page.evaluate(measure) == fine
    body = page.evaluate(
        "[document.getElementById('detail-body')].map((e) => e.scrollWidth - e.clientWidth)[0]"
    )
    assert body == 0


CONTRAST = """(selectors) => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgb = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = rgb(getComputedStyle(at).backgroundColor);
      if (colour[3] === 255) return colour;
    }
    return [255, 255, 255, 255];
  };
  return selectors.map((selector) => {
    const all = [...document.querySelectorAll(selector)];
    const found = all.map((element) => {
      const [a, b] = [rgb(getComputedStyle(element).color), ground(element)].map(light);
      return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    });
    return [selector, Math.min(...found)];
  });
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast_in_both_schemes_and_the_button_switches_them(
    open_page: Open, scheme: str
) -> None:
    page = open_page(scheme=scheme).page
    ground = "getComputedStyle(document.body).backgroundColor"
    outside = [
        "body",
        ".lead",
        ".summary td b",
        ".ci",
        ".bar nav a",
        "button",
        "select",
        ".lines li",
    ]
    outside += [
        ".open",
        ".clamp",
        ".verdict",
        "#count",
        ".facts dt",
        "pre",
        "footer",
        "#table th button",
    ]
    seen = page.evaluate(CONTRAST, outside)
    page.click("#table .open >> nth=0")
    page.wait_for_selector("dialog[open]")
    inside = [
        "#detail h2",
        ".note",
        "mark",
        ".shifted .token",
        ".shift",
        ".token.chosen",
        ".filled",
    ]
    seen += page.evaluate(CONTRAST, [*inside, ".effect", ".scores td", ".features th", ".none"])
    assert [(name, ratio) for name, ratio in seen if ratio < 4.5] == []
    page.click("#close")
    before = page.evaluate(ground)
    page.click("#theme")
    assert page.evaluate(ground) != before
    # the figures follow
    ink = "rgb(29, 33, 39)" if scheme == "dark" else "rgb(231, 234, 238)"
    expect(page.locator(".plot .xtick text").first).to_have_css("fill", ink)


def test_the_command_is_copied_or_selected(open_page: Open) -> None:
    page = open_page().page
    page.click("#copy")
    expect(page.locator("#copy")).to_have_text(re.compile("Copied|Selected: copy it by hand"))


def test_a_page_of_the_table_holds_50_rows_and_the_pager_turns_it(open_page: Open) -> None:
    opened = open_page("large")
    page = opened.page
    assert page.text_content("#page") == "1–50 of 1,000"
    assert opened.ids()[0] == "test-0000"
    assert page.is_disabled("#earlier")
    page.click("#later")
    assert (len(opened.ids()), opened.ids()[0]) == (50, "test-0050")
    page.click("#table .open >> nth=49")
    page.wait_for_selector("dialog[open]")
    page.click("#next")
    expect(page.locator("#detail-place")).to_have_text("101 of 1,000")
    page.click("#close")
    assert page.text_content("#page") == "101–150 of 1,000"


def test_a_thousand_questions_under_nine_arms_open_in_three_seconds(open_page: Open) -> None:
    tables, figures, work = [], [], []
    for _ in range(3):
        opened = open_page("large")
        marks = opened.page.evaluate(
            "Object.fromEntries(performance.getEntriesByType('mark')"
            ".map((mark) => [mark.name, mark.startTime / 1000]))"
        )
        tables.append(marks["table-ready"])
        figures.append(marks["figures-drawn"])
        work.append(opened.work)
    table, drawn, worked = map(statistics.median, (tables, figures, work))
    print(f"1,000 x 9: table {table:.2f} s, figures {drawn:.2f} s, of them {worked:.2f} s of work")
    # on a machine that is busy with something else, waiting is not the page's
    busy = os.getloadavg()[0] > (os.cpu_count() or 1)
    assert (worked if busy else drawn) < SECONDS
