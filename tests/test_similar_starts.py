from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import deltas_of
from records import LOVELACE, make_results, saved

from fusion_lens.errors import ConfigError, InputFileError, PlanError, SearchError
from fusion_lens.identity import identify
from fusion_lens.models import HookedModel
from fusion_lens.plan_files import save_plan
from fusion_lens.plans import make_plan
from fusion_lens.questions import Question
from fusion_lens.results import Summary, plan_path
from fusion_lens.similar_starts import similar_starts

# id, text, objective, coefficients of early, middle and late
DONE = (
    ("d1", "When was Ann Ray born?", 0.2, (0.1, 0.0, 0.0)),
    ("d2", "When was Bo Sen born?", 0.4, (0.2, 0.0, 0.0)),
    ("d3", "Where was Bo Sen born?", 0.9, (0.3, 0.0, 0.0)),
    ("d4", "Who wrote the green book?", 0.9, (0.4, 0.5, 0.0)),
    ("d5", "When was Cy Tor born?", 0.9, (0.0, 0.0, 0.0)),
)
BORN = Question("born", "When was Di Pell born?", "3 May 1901")
BOOK = Question("book", "Who wrote the red book?", "Ada Lovelace")


@pytest.fixture(scope="module")
def folder(tiny: HookedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose segmented arm chose these coefficients."""
    path = tmp_path_factory.mktemp("run")
    records = []
    for name, text, objective, coeffs in DONE:
        plan = make_plan(deltas_of(tiny), coeffs)
        records.append(
            replace(
                LOVELACE,
                question_id=name,
                question=text,
                arm="segmented",
                coeffs=plan.coeffs,
                objective=objective,
                injected_norm=plan.injected_norm,
            )
        )
    saved(path, replace(make_results(), records=tuple(records), details=()))
    for name, _, _, coeffs in DONE:
        save_plan(make_plan(deltas_of(tiny), coeffs), plan_path(path, name, "segmented"))
    return path


def early(starts: tuple[tuple[float, ...], ...]) -> list[float]:
    return [start[0] for start in starts]


def test_the_plans_of_the_most_similar_questions_come_first(tiny, folder) -> None:
    (born, born_starts), (book, book_starts) = similar_starts(
        folder, identify(tiny), [BORN, BOOK], k=3
    )
    # of two that share as many words the one that came to more; where the zero plan won is nothing
    # to start from
    assert (born, early(born_starts)) == ("born", [0.2, 0.1, 0.3])
    assert (book, early(book_starts)) == ("book", [0.4, 0.3, 0.2])
    # four layers in thirds: two, one, one
    assert book_starts[0] == (0.4, 0.4, 0.5, 0.0)


def test_a_question_starts_the_same_alone_and_among_others(tiny, folder) -> None:
    both = similar_starts(folder, identify(tiny), [BOOK, BORN], k=2)
    assert similar_starts(folder, identify(tiny), [BORN], k=2) == both[1:]
    assert len(both[0][1]) == 2


def test_a_run_that_has_the_question_is_refused(tiny, folder) -> None:
    same = replace(BORN, question="when was Ann Ray born")
    with pytest.raises(SearchError, match=r"a run must be of other questions than .* 'born' among"):
        similar_starts(folder, identify(tiny), [BOOK, same])


def test_a_run_that_was_not_finished_is_refused(tiny, folder, tmp_path) -> None:
    made = make_results()
    saved(tmp_path, replace(made, summary=Summary(made.summary | {"interrupted": True})))
    with pytest.raises(SearchError, match=r"must be finished, but .* was interrupted"):
        similar_starts(tmp_path, identify(tiny), [BORN])
    (tmp_path / "summary.json").unlink()
    with pytest.raises(InputFileError, match="a run that ended"):
        similar_starts(tmp_path, identify(tiny), [BORN])


def test_a_run_of_another_model_is_refused(atlas, folder) -> None:
    with pytest.raises(PlanError, match="must be used on the model it was made on"):
        similar_starts(folder, identify(atlas), [BORN])


def test_a_run_without_the_arm_and_numbers_below_one_are_refused(tiny, folder, tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"must have the arm 'full', but .* has segmented"):
        similar_starts(folder, identify(tiny), [BORN], arm="full")
    with pytest.raises(ConfigError, match="k must be at least 1, but got 0"):
        similar_starts(folder, identify(tiny), [BORN], k=0)


def test_a_plan_that_is_missing_is_named(tiny, folder, tmp_path) -> None:
    shutil.copytree(folder, tmp_path / "run")
    path = plan_path(tmp_path / "run", "d2", "segmented")
    path.unlink()
    with pytest.raises(PlanError, match=path.name):
        similar_starts(tmp_path / "run", identify(tiny), [BORN])
