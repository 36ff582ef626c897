from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from lent import lent

from fusion_lens.arms import Bench, Chosen, choose
from fusion_lens.attribution import FeatureEffect
from fusion_lens.details import FeatureShare
from fusion_lens.engine_log import EngineLog
from fusion_lens.generation import GenerationConfig
from fusion_lens.models import HookedModel
from fusion_lens.plans import full, thirds
from fusion_lens.preparation import TuningConfig
from fusion_lens.questions import Question
from fusion_lens.scoring import Scorer
from fusion_lens.search import SearchConfig
from fusion_lens.teacher_forcing import Text
from fusion_lens.tracing import details_of

CONFIG = TuningConfig(
    search=SearchConfig(trials=5, zero_first=False, low=0.5),
    generation=GenerationConfig(max_new_tokens=6, slots=8, cache_length=64),
    explanation_tokens=4,
)
QUESTIONS = [
    Question("a", "Who wrote the red book?", "Ada Lovelace"),
    Question("b", "Who was at home?", "Tom Harris"),
]


@pytest.fixture(scope="module")
def chosen(tiny: HookedModel) -> Iterator[tuple[Bench, list[Chosen]]]:
    with lent(tiny, CONFIG, QUESTIONS) as lenders:
        log = EngineLog()
        bench = Bench(tiny, CONFIG, lenders, Scorer(tiny, CONFIG), log)
        segments = {"full": full(4), "segmented": thirds(4), "last": thirds(4)[-1:]}
        arms = ("baseline", "full", "segmented")
        yield bench, choose(bench, list(lenders.prepared.values()), arms, segments)


def test_every_steered_arm_has_its_completion_token_by_token(tiny, chosen) -> None:
    bench, made = chosen
    details = details_of(bench, list(bench.lenders.prepared.values()), made)
    assert [each.question_id for each in details] == ["a", "b"]
    by_key = {(each.prepared.question.id, each.arm): each for each in made}
    for detail in details:
        assert [trace.arm for trace in detail.traces] == ["full", "segmented"]
        for trace in detail.traces:
            own = by_key[detail.question_id, trace.arm]
            written = own.graded.completion
            assert len(trace.tokens) == len(written.tokens)
            # the unsteered model's own log-probabilities are what the completion's nll is made of
            nll = -math.fsum(trace.unsteered) / len(trace.tokens)
            assert nll == pytest.approx(own.graded.nll, rel=1e-3)
            # a greedy completion's tokens are likely under the plan that wrote it
            assert sum(trace.shifts) > 0


def test_layers_and_tokens_are_those_of_the_question(tiny, chosen) -> None:
    bench, made = chosen
    item = bench.lenders.prepared["a"]
    detail = details_of(bench, [item], made)[0]
    assert detail.delta_norms == pytest.approx(item.deltas.norms.tolist(), rel=1e-4)
    assert detail.base_norms == pytest.approx(item.deltas.base.norm(dim=-1).tolist(), rel=1e-4)
    other = bench.lenders.prepared["b"].deltas.vectors
    cosine = torch.nn.functional.cosine_similarity(item.deltas.vectors, other, dim=-1)
    assert detail.generic_share == pytest.approx(cosine.square().tolist(), rel=1e-3)
    assert detail.captured.marked == item.reference.pooled
    assert "".join(detail.captured.tokens[t] for t in detail.captured.marked).startswith(
        "Ada Lovelace\n"
    )
    assert detail.steered.marked == tuple(
        t for t in range(len(item.prompt.tokens)) if t not in item.prompt.special
    )
    assert detail.features == ()
    assert detail.features_of is None


def test_features_are_those_of_the_segmented_plan(tiny, chosen) -> None:
    bench, made = chosen
    asked: list[Text] = []

    def explain(texts):
        asked.extend(texts)
        return [
            [FeatureEffect("sae", 1, n, 0.1234567, None, "a name")] for n, _ in enumerate(texts)
        ]

    details = details_of(bench, list(bench.lenders.prepared.values()), made, explain)
    plans = [each.plan for each in made if each.arm == "segmented"]
    assert [text.plan for text in asked] == plans
    assert [each.features for each in details] == [
        (FeatureShare(1, n, 0.12346, None, "a name"),) for n in (0, 1)
    ]
    assert {each.features_of for each in details} == {"segmented"}


def test_a_question_without_a_plan_has_layers_and_no_trace(tiny, chosen) -> None:
    bench, made = chosen
    unsteered = [each for each in made if each.arm == "baseline"]
    detail = details_of(bench, [bench.lenders.prepared["b"]], unsteered)[0]
    assert detail.traces == ()
    assert detail.steered.marked == ()
    assert len(detail.delta_norms) == 4


def test_a_zero_plan_marks_no_token_and_hides_none_that_another_arm_steers(tiny, chosen) -> None:
    bench, made = chosen
    item = bench.lenders.prepared["b"]
    full, segmented = (each for each in made if each.prepared is item and each.tuned)

    def zeroed(each: Chosen) -> Chosen:
        return replace(each, tuned=replace(each.tuned, plan=each.tuned.plan * 0))

    def marked(*arms: Chosen) -> tuple[int, ...]:
        return details_of(bench, [item], arms)[0].steered.marked

    assert marked(zeroed(full), zeroed(segmented)) == ()
    steered = tuple(t for t in range(len(item.prompt.tokens)) if t not in item.prompt.special)
    assert marked(full, zeroed(segmented)) == marked(zeroed(full), segmented) == steered != ()
