from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from asked import ASKED, OTHER

from fusion_lens.decoding import GenerationConfig
from fusion_lens.errors import ConfigError, SearchError
from fusion_lens.generation import generate
from fusion_lens.identity import identify
from fusion_lens.preparation import TuningConfig, prepare
from fusion_lens.presets import text_digest
from fusion_lens.questions import Question
from fusion_lens.scoring import Scorer
from fusion_lens.search import SearchConfig
from fusion_lens.segments import thirds
from fusion_lens.statistics import Interval
from fusion_lens.suggestions import Cell, Suggestion, best_of_rows, suggest
from fusion_lens.tuning import Job, tune_jobs

QUICK = TuningConfig(
    search=SearchConfig(weight=0.5),
    generation=GenerationConfig(max_new_tokens=8),
    explanation_tokens=4,
)
LONG = Question("long", "Who " * 200, "Ada")


@pytest.fixture(scope="module")
def swept(tiny) -> Suggestion:
    """Two questions at two strengths, and one that does not fit."""
    return suggest(tiny, [ASKED, LONG, OTHER], strengths=(8.0, 2), config=QUICK, progress=False)


@dataclass(frozen=True)
class Told:
    """What a sweep has to know of a completion."""

    objective: float


def cell(segment: str, coeff: float, gain: float) -> Cell:
    return Cell(segment, coeff, Interval(gain, None, None, 1, 0, 1))


def test_every_segment_and_all_together_are_tried_at_every_strength(swept) -> None:
    assert [(own.segment, own.coeff) for own in swept.cells] == [
        (row, coeff) for row in ("early", "middle", "late", "all") for coeff in (2.0, 8.0)
    ]
    assert {own.gain.n for own in swept.cells} == {2}


def test_a_gain_is_what_a_search_would_find_there(tiny, swept) -> None:
    prepared, _ = prepare(tiny, [ASKED, OTHER], QUICK)
    score = Scorer(tiny, QUICK)
    for name, coeffs in (("early", (8.0, 0.0, 0.0)), ("all", (8.0, 8.0, 8.0))):
        gains = []
        starts = dict(zip(("early", "middle", "late"), coeffs, strict=True))
        for item in prepared:
            job = Job(item, thirds(4), "x")
            search = replace(QUICK, search=SearchConfig(trials=1, weight=0.5, high=9.0))
            (zero,), _ = tune_jobs(tiny, [job], search, score=score)
            row = item.row(QUICK, job.plan(starts, QUICK))
            (graded,) = score([item], generate(tiny, [row], QUICK.generation))
            gains.append(graded.objective - zero.best.objective)
        (found,) = [own for own in swept.cells if (own.segment, own.coeff) == (name, 8.0)]
        assert found.gain.mean == pytest.approx(sum(gains) / 2, abs=1e-5)


def test_what_cannot_be_prepared_is_told_and_left_out(swept) -> None:
    assert [(own.question_id, own.error) for own in swept.failures] == [
        ("long", "ContextLengthError")
    ]
    assert swept.preset.questions == tuple(text_digest(q.question) for q in (ASKED, OTHER))
    assert swept.table().notes[-1].startswith("failed: long: prompt + completion must fit")


def test_the_preset_holds_what_it_was_made_with(tiny, swept) -> None:
    preset = swept.preset
    assert (preset.model, preset.segments, preset.weight) == (identify(tiny), thirds(4), 0.5)
    assert {"python", "torch", "optuna"} <= preset.versions.keys()
    assert list(preset.gains) == sorted(preset.gains, reverse=True)


def test_of_every_row_the_best_is_taken_and_of_equal_ones_the_weaker() -> None:
    cells = (
        cell("early", 0.5, 0.1),
        cell("early", 1.0, 0.1),
        cell("late", 0.5, -0.2),
        cell("late", 1.0, -0.1),
    )
    assert best_of_rows(cells) == (cells[0], cells[3])


def test_the_best_four_that_gain_become_starts_the_largest_first(tiny, monkeypatch) -> None:
    """The four layers and all of them, at one strength, on two questions."""
    objectives = [0.0, 0.02, 0.3, 0.009, 0.05, 0.04]

    def graded(score, owners, completions):
        return [Told(objectives[n // 2]) for n in range(len(owners))]

    monkeypatch.setattr(Scorer, "__call__", graded)
    options = {"strengths": (2.0,), "config": QUICK, "progress": False}
    made = suggest(tiny, [ASKED, OTHER], segments="layers", **options)
    assert made.preset.starts == (
        (0.0, 2.0, 0.0, 0.0),
        (0.0, 0.0, 0.0, 2.0),
        (2.0, 2.0, 2.0, 2.0),
        (2.0, 0.0, 0.0, 0.0),
    )
    assert made.preset.gains == pytest.approx((0.3, 0.05, 0.04, 0.02))
    # the third layer gains too little
    objectives[3] = 0.45
    made = suggest(tiny, [ASKED, OTHER], segments="layers", **options)
    assert made.preset.gains == pytest.approx((0.45, 0.3, 0.05, 0.04))
    objectives[1:] = [-0.1] * 5
    made = suggest(tiny, [ASKED, OTHER], segments="layers", **options)
    assert made.preset.starts == ()


def test_one_segment_is_not_tried_twice(tiny) -> None:
    found = suggest(tiny, [ASKED], segments="full", strengths=(2.0,), config=QUICK, progress=False)
    assert [own.segment for own in found.cells] == ["full"]
    # one question has no interval
    assert found.table().rows[0][-1] == "-"


def test_progress_counts_every_row(tiny) -> None:
    told: list[tuple[str, int, int]] = []
    suggest(
        tiny,
        [ASKED],
        segments="full",
        strengths=(1.0, 2.0),
        config=QUICK,
        progress=lambda *own: told.append(own),
    )
    assert told[-1] == ("sweep", 3, 3)


def test_what_cannot_be_swept_is_refused(tiny) -> None:
    with pytest.raises(ConfigError, match="at least one question to try strengths on"):
        suggest(tiny, [], config=QUICK)
    for strengths in ((), (0.0, 1.0), (float("inf"),)):
        with pytest.raises(ConfigError, match="strengths must be above 0 and at least one"):
            suggest(tiny, [ASKED], strengths=strengths, config=QUICK)
    with pytest.raises(SearchError, match="at least one question must be fit to be steered"):
        suggest(tiny, [LONG], config=QUICK, progress=False)
