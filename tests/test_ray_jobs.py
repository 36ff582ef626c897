from __future__ import annotations

from dataclasses import replace

from ray_runs import QUESTIONS

from fusion_lens.lenders import Lenders
from fusion_lens.ray_jobs import Preparing, Solving, joined
from fusion_lens.workers import Task


def task_of(names: str) -> Task:
    return Task(tuple((name, arm) for name in names for arm in ("x", "y")), (), Lenders(0))


def test_what_kills_together_is_halved_until_one_is_left() -> None:
    whole = Solving(0, 0, task_of("abc"))
    (again,) = whole.after_death()
    assert again.task.pairs == whole.task.pairs
    halves = again.after_death()
    assert ["".join(dict(own.task.pairs)) for own in halves] == ["a", "bc"]
    # what is alone is held to have cost nobody yet, what is not is halved at once
    _, b_and_c = halves
    assert ["".join(dict(own.task.pairs)) for own in b_and_c.after_death()] == ["b", "c"]
    alone = halves[0]
    for _ in range(4):
        (alone,) = alone.after_death()
    assert alone.after_death() == []
    assert [(own.question_id, own.arm) for own in alone.failed().failures] == [
        ("a", "x"),
        ("a", "y"),
    ]
    assert alone.failed().pairs == alone.task.pairs


def test_a_block_that_is_prepared_in_parts_is_one_again() -> None:
    block = tuple(QUESTIONS)
    first, second = Preparing(3, 1, block).after_death()
    assert (first.number, first.block, second.block) == (3, block[:2], block[2:])
    whole = joined([second.failed(), replace(first, deaths=4).failed()])
    assert [own.question_id for own in whole.failed] == ["c", "d", "a", "b"]
    assert "but 2 died" in whole.failed[0].message
