from __future__ import annotations

import sys
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import ipywidgets
import pytest
from asked import ASKED, QUICK

from fusion_lens import panel as panels
from fusion_lens.atlas import QUESTIONS
from fusion_lens.decoding import Row
from fusion_lens.differences import marked_words
from fusion_lens.errors import ConfigError, MissingExtraError, PlanError
from fusion_lens.generation import generate
from fusion_lens.models import HookedModel
from fusion_lens.panel import SteeringPanel, steering_panel
from fusion_lens.perplexity import PerplexityModel
from fusion_lens.preparation import TuningConfig, prepare_one
from fusion_lens.questions import Question, load_questions
from fusion_lens.search import SearchConfig
from fusion_lens.tuning import Job, TunedPlan, make_segments, tune

ROWS = ["text", "exact match", "overlap", "perplexity", "objective", "injected norm"]


class Table(HTMLParser):
    """The cells of a panel's table by row, what is marked in them, its caption, the notes below it,
    and all tags there are."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.cells: list[list[str]] = []
        self.marked: list[str] = []
        self.caption = ""
        self.notes: list[str] = []
        self.tags: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()

    def __getitem__(self, row: str) -> list[str]:
        return next(cells for name, *cells in self.cells if name == row)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)
        self._open.append(tag)
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")
        if tag == "mark":
            self.marked.append("")
        if tag == "p":
            self.notes.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "caption" in self._open:
            self.caption += data
        elif "p" in self._open:
            self.notes[-1] += data
        elif self._open:
            self.cells[-1][-1] += data
        if "mark" in self._open:
            self.marked[-1] += data


@pytest.fixture(scope="module")
def tuned(atlas: HookedModel) -> TunedPlan:
    """A plan that steers: on the random tiny model none beats the zero plan."""
    config = TuningConfig(search=SearchConfig(trials=15))
    made = tune(atlas, load_questions(QUESTIONS)[-1], config=config)
    assert not made.tuned.zero_won
    return made


@pytest.fixture
def panel(atlas: HookedModel, tuned: TunedPlan) -> SteeringPanel:
    return steering_panel(atlas, tuned)


@pytest.fixture
def generated(monkeypatch: pytest.MonkeyPatch) -> list[Row]:
    """The rows that panels have run."""
    ran: list[Row] = []

    def counting(model: HookedModel, rows: list[Row], config: object) -> Any:
        ran.extend(rows)
        return generate(model, rows, config)  # type: ignore[arg-type]

    monkeypatch.setattr(panels, "generate", counting)
    return ran


# without the zero plan the one that is chosen steers, on a random model too
STEERED = replace(QUICK, search=replace(QUICK.search, zero_first=False, low=1.0))
CONFIGS = {
    "greedy": STEERED,
    "sampled": replace(STEERED, generation=replace(QUICK.generation, temperature=0.8)),
    "sequence": replace(STEERED, mean="sequence"),
    "completion": replace(STEERED, positions="completion"),
    "pairs": replace(STEERED, search=replace(STEERED.search, parametrisation="alpha_gamma")),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_sliders_begin_at_the_chosen_coefficients_and_write_what_the_search_wrote(
    name: str, tiny: HookedModel, generated: list[Row]
) -> None:
    tuned = tune(tiny, ASKED, config=CONFIGS[name])
    assert tuned.unsteered is None
    panel = steering_panel(tiny, tuned)
    assert panel.coeffs == tuned.plan.coeffs
    assert min(panel.coeffs.values()) > 0
    assert panel.graded.completion == tuned.best.completion
    assert panel.graded.objective == tuned.best.objective
    assert panel.message.value == ""
    seed = tuned.job.prepared.row(tuned.config).seed
    prompt = tuned.job.prepared.prompt
    (plain,) = generate(tiny, [Row(prompt, None, seed)], tuned.config.generation)
    said, says = Table(panel.output.value)["text"]
    assert (said, says) == (plain.text.strip(), tuned.best.completion.text.strip())
    assert len(generated) == 2
    panel.buttons["Zero"].click()
    assert panel.coeffs == {"early": 0.0, "middle": 0.0, "late": 0.0}
    assert panel.graded.completion.text == plain.text


def test_a_slider_is_named_after_its_segment_and_covers_the_search_range(
    panel: SteeringPanel,
) -> None:
    assert [slider.description for slider in panel.sliders.values()] == [
        "early, layers 0 to 1",
        "middle, layers 2 to 3",
        "late, layers 4 to 5",
    ]
    for slider in panel.sliders.values():
        assert (slider.min, slider.max, slider.continuous_update) == (0.0, 1.5, False)
        assert slider.tooltip == f"coefficient of {slider.description}"
    assert all(button.tooltip for button in panel.buttons.values())


def test_the_table_holds_the_scores_of_both_texts(panel: SteeringPanel, tuned: TunedPlan) -> None:
    table = Table(panel.output.value)
    assert [name for name, *_ in table.cells[1:]] == ROWS
    assert table.cells[0] == ["", "unsteered", "steered"]
    for column, graded in enumerate((tuned.unsteered, tuned.best)):
        assert table["overlap"][column] == f"{graded.overlap:.2f}"
        assert table["perplexity"][column] == f"{graded.perplexity:.2f}"
        assert table["exact match"][column] == "no"
        assert table["objective"][column] == f"{graded.objective:+.3f}"
    assert table["injected norm"] == ["0.00", f"{tuned.plan.injected_norm:.2f}"]
    question = tuned.job.prepared.question
    assert table.caption == question.question
    assert table.notes == [f"gold: {question.answer}"]


def test_the_words_that_differ_are_marked_in_both_texts(
    panel: SteeringPanel, tuned: TunedPlan
) -> None:
    said, says = (each.completion.text.strip() for each in (tuned.unsteered, tuned.best))
    pieces = marked_words(says, said) + marked_words(said, says)
    assert Table(panel.output.value).marked == [piece for piece, marked in pieces if marked] != []


def test_a_moved_slider_shows_what_the_engine_writes_there(
    panel: SteeringPanel, atlas: HookedModel, tuned: TunedPlan
) -> None:
    before = panel.output.value
    panel.sliders["late"].value = 0.25
    coeffs = tuned.plan.coeffs | {"late": 0.25}
    assert panel.plan.coeffs == panel.coeffs == coeffs
    row = tuned.job.prepared.row(tuned.config, tuned.job.plan(coeffs, tuned.config))
    (alone,) = generate(atlas, [row], tuned.config.generation)
    table = Table(panel.output.value)
    assert panel.output.value != before
    assert table["text"][1] == alone.text.strip()
    assert panel.graded.completion.text == alone.text
    assert table["objective"][1] == f"{panel.graded.objective:+.3f}"
    assert table["injected norm"][1] == f"{panel.plan.injected_norm:.2f}"


def test_the_buttons_set_all_sliders_at_once_and_nothing_is_run_twice(
    panel: SteeringPanel, tuned: TunedPlan, generated: list[Row]
) -> None:
    first = panel.output.value
    panel.buttons["Zero"].click()
    assert panel.coeffs == {"early": 0.0, "middle": 0.0, "late": 0.0}
    table = Table(panel.output.value)
    assert table["text"] == [tuned.unsteered.completion.text.strip()] * 2
    assert table.marked == []
    assert table["injected norm"] == ["0.00", "0.00"]
    panel.buttons["Reset to tuned"].click()
    assert panel.coeffs == tuned.plan.coeffs
    assert panel.output.value == first
    assert generated == []
    panel.sliders["early"].value = 1.25
    panel.buttons["Zero"].click()
    assert len(generated) == 1


def test_an_error_is_shown_in_place_of_scores_that_are_not_those_of_the_sliders(
    panel: SteeringPanel,
) -> None:
    shown = panel.output.value
    panel.sliders["late"].max = 2e6
    panel.sliders["late"].value = 1.5e6
    assert "PlanError: coefficients must be finite and below 1e6" in panel.message.value
    assert 'role="alert"' in panel.message.value
    assert panel.output.value == ""
    panel.buttons["Reset to tuned"].click()
    assert (panel.message.value, panel.output.value) == ("", shown)


@pytest.mark.parametrize("error", [RuntimeError("<b>out</b> of memory"), KeyboardInterrupt()])
def test_whatever_is_raised_is_shown_escaped(
    panel: SteeringPanel, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def broken(*_: object) -> None:
        raise error

    monkeypatch.setattr(panels, "generate", broken)
    panel.sliders["late"].value = 1.0
    assert type(error).__name__ in panel.message.value
    assert "<b>" not in panel.message.value
    assert ("&lt;b&gt;out&lt;/b&gt; of memory" in panel.message.value) == bool(error.args)
    monkeypatch.undo()
    panel.sliders["late"].value = 0.9
    assert panel.message.value == ""


def test_logits_that_are_not_finite_are_told(
    panel: SteeringPanel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(model: HookedModel, rows: list[Row], config: Any) -> Any:
        return [replace(each, finite=False) for each in generate(model, rows, config)]

    monkeypatch.setattr(panels, "generate", broken)
    panel.sliders["late"].value = 1.0
    assert "logits are not finite at these coefficients" in panel.message.value
    table = Table(panel.output.value)
    assert table["overlap"][1] == table["perplexity"][1] == "unscored"


def test_another_perplexity_model_than_the_search_had_is_told(
    tiny: HookedModel, gpt2_folder: Any
) -> None:
    fluency = PerplexityModel(gpt2_folder)
    # overlap alone would not tell them apart
    config = replace(QUICK, search=replace(QUICK.search, weight=0.0))
    tuned = tune(tiny, ASKED, config=config, fluency=fluency)
    assert steering_panel(tiny, tuned, fluency=fluency).message.value == ""
    panel = steering_panel(tiny, tuned)
    assert f"saw an objective of {tuned.best.objective:+.3f} at these" in panel.message.value
    assert Table(panel.output.value)["text"][1] == tuned.best.completion.text.strip()


def test_a_prepared_question_without_a_search_begins_at_zero(tiny: HookedModel) -> None:
    job = Job(prepare_one(tiny, ASKED, QUICK), make_segments(2, 4), "by hand")
    panel = steering_panel(tiny, job, config=QUICK)
    assert panel.coeffs == {"segment_0": 0.0, "segment_1": 0.0}
    assert [*panel.buttons] == ["Zero"]
    slider = panel.sliders["segment_1"]
    assert (slider.description, slider.max) == ("segment_1, layers 2 to 3", 6.0)
    slider.value = 6.0
    assert Table(panel.output.value)["injected norm"][1] == f"{panel.plan.injected_norm:.2f}"
    assert panel.plan.injected_norm > 0


def test_a_hostile_question_becomes_no_markup(tiny: HookedModel) -> None:
    asked = Question("x", "Who <script>x()</script>?", "<img onerror=x()>", explanation="")
    prepared = prepare_one(tiny, asked, QUICK)
    panel = steering_panel(tiny, Job(prepared, make_segments("layers", 4), "x"), config=QUICK)
    assert panel.sliders["segment_3"].description == "segment_3, layer 3"
    table = Table(panel.output.value)
    known = {"table", "caption", "thead", "tbody", "tr", "th", "td", "mark", "p"}
    assert set(table.tags) <= known
    assert (table.caption, table.notes) == (asked.question, [f"gold: {asked.answer}"])


def test_a_notebook_shows_the_panel_as_the_widget_it_is(panel: SteeringPanel) -> None:
    shown = panel._repr_mimebundle_(include=None, exclude=None)
    view = shown["application/vnd.jupyter.widget-view+json"]
    assert view["model_id"] == panel.box.model_id
    assert isinstance(panel.box, ipywidgets.VBox)
    assert panel.box.children[-2:] == (panel.message, panel.output)


def test_a_tuned_plan_takes_no_other_config_and_no_other_model(
    tiny: HookedModel, tuned: TunedPlan, atlas: HookedModel
) -> None:
    with pytest.raises(ConfigError, match="shown with the config it was tuned with"):
        steering_panel(atlas, tuned, config=QUICK)
    with pytest.raises(PlanError, match="must be used on the model it was made on"):
        steering_panel(tiny, tuned)


def test_without_ipywidgets_the_error_names_the_extra(
    atlas: HookedModel, tuned: TunedPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'fusion-lens\[notebook\]'"):
        steering_panel(atlas, tuned)
