from __future__ import annotations

from dataclasses import replace

import pytest
from conftest import deltas_of
from lent import lent

from fusion_lens.arms import Bench, Chosen
from fusion_lens.decoding import Row
from fusion_lens.divergence import kl_unrelated
from fusion_lens.engine_log import EngineLog
from fusion_lens.generation import GenerationConfig, generate
from fusion_lens.models import HookedModel
from fusion_lens.plans import make_plan
from fusion_lens.preparation import TuningConfig
from fusion_lens.prompts import question_prompt, tokenize
from fusion_lens.questions import Neighbour, Question
from fusion_lens.scores import exact_match, extract_answer
from fusion_lens.scoring import Scorer
from fusion_lens.search import SearchConfig
from fusion_lens.transfer import Reach, measure
from fusion_lens.tuning import Job, make_segments, tune_jobs

CONFIG = TuningConfig(
    search=SearchConfig(trials=3),
    generation=GenerationConfig(max_new_tokens=5, slots=16, cache_length=64),
    explanation_tokens=4,
)
WORDINGS = ("Who was the cat?", "When did Tom go?", "Who sat there?", "Where was it?")


def said(model: HookedModel, question: str, plan=None, prefix: str = "") -> str:
    prompt = question_prompt(model, question, prefix=prefix)
    settings = replace(CONFIG.generation, cache_length=None)
    return generate(model, [Row(prompt, plan)], settings)[0].text


@pytest.fixture(scope="module")
def plan(tiny: HookedModel):
    return make_plan(deltas_of(tiny), (4.0, -8.0, 6.0))


@pytest.fixture(scope="module")
def reached(tiny: HookedModel, plan):
    """A question whose gold is what the plan says to the first paraphrase, and whose first two
    neighbours the unsteered model answers rightly; five arms of it."""
    gold = extract_answer(said(tiny, WORDINGS[0], plan))
    known = [extract_answer(said(tiny, text)) for text in WORDINGS[2:]]
    question = Question(
        "q",
        "Who wrote the red book?",
        gold,
        explanation="So it is.",
        paraphrases=WORDINGS[:2],
        neighbours=(
            Neighbour(WORDINGS[2], known[0]),
            Neighbour(WORDINGS[3], known[1]),
            Neighbour("When?", "not what it says"),
        ),
    )
    with lent(tiny, CONFIG, [question]) as lenders:
        item = lenders.prepared["q"]
        score = Scorer(tiny, CONFIG)
        bench = Bench(tiny, CONFIG, lenders, score, EngineLog(), prefix_room=32)
        graded = score([item], generate(tiny, [item.row(CONFIG)], CONFIG.generation))[0]
        plain = Chosen(item, "baseline", graded, 0.0)
        job = Job(item, make_segments("thirds", 4), "segmented")
        steered = replace(tune_jobs(tiny, [job], CONFIG)[0][0], plan=plan)
        chosen = [
            plain,
            replace(plain, arm="segmented", tuned=steered),
            replace(plain, arm="generic", tuned=replace(steered, plan=plan * 0.0)),
            replace(plain, arm="answer_in_prompt", prefix=f"{gold}\nSo it is.\n\n"),
            replace(plain, arm="best_of_n", n_samples=3),
        ]
        unrelated = [tokenize(tiny, "Once there was a cat."), tokenize(tiny, "Tom went home.")]
        told: list[int] = []
        made = measure(bench, chosen, unrelated, progress=told.append)
        assert told == sorted(told)
        assert (told[-1], len(set(told)) > 3) == (len(chosen), True)
        without = measure(bench, chosen[:2], [])
    return question, dict(zip([c.arm for c in chosen], made, strict=True)), without, unrelated


def hits(model: HookedModel, pairs, plan=None, prefix: str = "") -> float:
    right = [exact_match(said(model, text, plan, prefix), gold) for text, gold in pairs]
    return sum(right) / len(right)


def test_transfer_is_the_share_of_paraphrases_answered_rightly(
    tiny: HookedModel, plan, reached
) -> None:
    question, reach, _, _ = reached
    asked = [(text, question.answer) for text in question.paraphrases]
    assert {each.transfer_n for each in reach.values()} == {2}
    assert reach["baseline"].transfer_exact_match == hits(tiny, asked)
    assert reach["segmented"].transfer_exact_match == hits(tiny, asked, plan) >= 0.5
    prefix = f"{question.answer}\nSo it is.\n\n"
    assert reach["answer_in_prompt"].transfer_exact_match == hits(tiny, asked, prefix=prefix)


def test_specificity_counts_the_neighbours_that_the_unsteered_model_knows(
    tiny: HookedModel, plan, reached
) -> None:
    question, reach, _, _ = reached
    known = [(each.question, each.answer) for each in question.neighbours[:2]]
    assert {each.neighbours_n for each in reach.values()} == {2}
    assert reach["baseline"].neighbours_kept == 1.0
    assert reach["segmented"].neighbours_kept == hits(tiny, known, plan) < 1.0
    # the greedy run is among the samples, and it is right
    assert reach["best_of_n"].neighbours_kept == 1.0


def test_a_zero_plan_reaches_as_far_as_no_plan(reached) -> None:
    _, reach, _, _ = reached
    assert reach["generic"] == reach["baseline"]


def test_the_divergence_is_that_of_the_plan_or_of_the_prefix(
    tiny: HookedModel, plan, reached
) -> None:
    question, reach, _, unrelated = reached
    told = tokenize(tiny, f"{question.answer}\nSo it is.\n\n", prepend_bos=False).tokens
    steered, prefixed = kl_unrelated(tiny, unrelated, [plan, told])
    assert reach["baseline"].kl_unrelated == 0.0
    assert reach["segmented"].kl_unrelated == steered > 0.01
    assert reach["answer_in_prompt"].kl_unrelated == prefixed > 0.0
    # a choice among samples has no next-token distribution
    assert reach["best_of_n"].kl_unrelated is None


def test_without_unrelated_text_its_divergence_is_unscored(reached) -> None:
    _, reach, without, _ = reached
    assert [each.kl_unrelated for each in without] == [None, None]
    assert without[1] == replace(reach["segmented"], kl_unrelated=None)


def test_a_question_without_other_wordings_is_unscored_never_0(tiny: HookedModel) -> None:
    question = Question("q", "Who wrote the red book?", "Ada", explanation="So.")
    with lent(tiny, CONFIG, [question]) as lenders:
        item = lenders.prepared["q"]
        score = Scorer(tiny, CONFIG)
        bench = Bench(tiny, CONFIG, lenders, score, EngineLog())
        graded = score([item], generate(tiny, [item.row(CONFIG)], CONFIG.generation))[0]
        made = measure(bench, [Chosen(item, "baseline", graded, 0.0)], [])
    assert made == [Reach(None, 0, None, 0, None)]
