from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import deltas_of

from fusion_lens.controls import (
    GenericDelta,
    generic_share,
    mismatched_donors,
    towards_unembedding,
    turned,
    with_vectors,
)
from fusion_lens.models import HookedModel
from fusion_lens.questions import Question


def of(answer: str, answer_type: str | None = "Person", name: str | None = None) -> Question:
    return Question(id=name or answer, question="Who?", answer=answer, answer_type=answer_type)


def test_the_generic_delta_is_the_mean_of_the_others(tiny: HookedModel) -> None:
    deltas = deltas_of(tiny)
    generic = GenericDelta()
    for name, factor in (("a", 1.0), ("b", 2.0), ("c", 6.0), ("c", 100.0)):
        generic.add(name, deltas * factor)
    assert torch.allclose(generic.without({"a": deltas}), 4.0 * deltas.vectors)
    assert torch.allclose(generic.without({"c": deltas * 6.0}), 1.5 * deltas.vectors, atol=1e-6)
    both = {"a": deltas, "c": deltas * 6.0}
    assert torch.allclose(generic.without(both), 2.0 * deltas.vectors, atol=1e-6)
    assert torch.allclose(generic.without({"stranger": deltas}), 3.0 * deltas.vectors)
    alone = GenericDelta()
    assert alone.without({"a": deltas}) is None
    alone.add("a", deltas)
    assert alone.without({"a": deltas}) is None
    assert torch.allclose(alone.without({"b": deltas}), deltas.vectors)


def test_the_generic_share_is_a_squared_cosine_per_layer(tiny: HookedModel) -> None:
    deltas = deltas_of(tiny)
    other = torch.zeros_like(deltas.vectors)
    vectors = other.clone()
    vectors[0, 0] = other[0, 0] = 3.0  # the same direction
    vectors[1, 0], other[1, 1] = 1.0, 5.0  # at right angles
    vectors[2, 0], vectors[2, 1], other[2, 0] = 1.0, -1.0, -2.0  # 45 degrees
    share = generic_share(with_vectors(deltas, vectors), other)
    assert share.tolist() == pytest.approx([1.0, 0.0, 0.5, 0.0])


def test_vectors_of_any_kind_are_kept_exactly(tiny: HookedModel) -> None:
    deltas = deltas_of(tiny)
    vectors = torch.randn_like(deltas.vectors)
    made = with_vectors(deltas, vectors)
    assert torch.equal(made.vectors, vectors)
    assert (made.layout, made.model) == (deltas.layout, deltas.model)


def test_a_turn_keeps_norms_and_cosines_between_layers_and_nothing_else(tiny: HookedModel) -> None:
    deltas = deltas_of(tiny)
    gram = deltas.vectors @ deltas.vectors.T
    turns = [turned(deltas, seed).vectors for seed in range(200)]
    for vectors in turns[:5]:
        assert torch.allclose(vectors @ vectors.T, gram, rtol=1e-4, atol=1e-5 * float(gram.max()))
    assert torch.equal(turned(deltas, 3).vectors, turns[3])
    cosines = torch.stack(
        [torch.nn.functional.cosine_similarity(v, deltas.vectors, dim=-1) for v in turns]
    )
    d_model = deltas.vectors.shape[1]
    # uniform on the sphere: mean 0 with variance 1/d
    assert cosines.mean(dim=0).abs().max() < 4 / (d_model * 200) ** 0.5
    assert torch.allclose(cosines.var(dim=0), torch.full((4,), 1 / d_model), rtol=0.5)


def test_more_layers_than_dimensions_can_be_turned_and_a_zero_delta_stays_zero(
    tiny: HookedModel,
) -> None:
    deltas = deltas_of(tiny)
    narrow = replace(deltas.model, d_model=2)
    made = replace(deltas, reference=torch.randn(4, 2), base=torch.zeros(4, 2), model=narrow)
    gram = made.vectors @ made.vectors.T
    vectors = turned(made, 0).vectors
    assert torch.allclose(vectors @ vectors.T, gram, atol=1e-5)
    assert not turned(deltas - deltas, 0).vectors.any()


def test_the_unembedding_arm_has_the_deltas_norms_and_the_gold_tokens_direction(
    tiny: HookedModel,
) -> None:
    deltas = deltas_of(tiny)
    made = towards_unembedding(tiny, deltas, (5, 9))
    assert torch.allclose(made.norms, deltas.norms, rtol=1e-5)
    direction = (tiny.W_U[:, 5] + tiny.W_U[:, 9]).detach()
    cosine = torch.nn.functional.cosine_similarity(made.vectors, direction[None], dim=-1)
    assert torch.allclose(cosine, torch.ones(4))


def test_a_donor_is_another_question_of_the_type_that_shares_no_word() -> None:
    questions = [
        of("Ada Lovelace"),
        of("Ada Byron"),
        of("Tom Harris"),
        of("Tom of York"),
        of("3 May 1901", "Date"),
        of("the 4 June 1902", "Date"),
        of("May 1901", "Date", name="m"),
        of("7", "Number"),
    ]
    donors = mismatched_donors(questions, seed=0)
    by_id = {question.id: question for question in questions}
    assert set(donors) == {question.id for question in questions} - {"7"}
    for name, donor in donors.items():
        assert donor.id != name
        assert by_id[donor.id].answer_type == by_id[name].answer_type
    people = {"Ada Lovelace", "Ada Byron", "Tom Harris", "Tom of York"}
    assert {donors[name].id for name in people} == people
    assert all(donors[name].shared == 0 for name in people)
    # 3 May 1901 and May 1901 can avoid each other only in one direction
    shared = sorted(donors[name].shared for name in ("3 May 1901", "the 4 June 1902", "m"))
    assert shared == [0, 0, 2]


def test_donors_depend_on_the_seed_and_not_on_the_order() -> None:
    questions = [of(f"name{i} surname{i}") for i in range(30)]
    donors = mismatched_donors(questions, seed=0)
    assert donors == mismatched_donors(questions[::-1], seed=0)
    other = mismatched_donors(questions, seed=1)
    assert sum(donors[name].id == other[name].id for name in donors) < 10


def test_without_types_all_questions_are_of_one_and_aliases_count_as_gold() -> None:
    one, two = of("Ada", None), replace(of("Tom", None), aliases=("Ada",))
    three = of("Eve", None)
    donors = mismatched_donors([one, two, three], seed=0)
    assert sum(donor.shared for donor in donors.values()) == 1
