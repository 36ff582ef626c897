from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from lent import lent

from fusion_lens.arms import DEFAULT_ARMS as ARMS
from fusion_lens.arms import TUNED, Bench, choose, prefix_of
from fusion_lens.decoding import Row
from fusion_lens.engine_log import EngineLog
from fusion_lens.generation import GenerationConfig, generate
from fusion_lens.lenders import Lenders
from fusion_lens.likelihood import completion_nll
from fusion_lens.models import HookedModel
from fusion_lens.preparation import TuningConfig
from fusion_lens.prompts import question_prompt, tokenize
from fusion_lens.questions import Question
from fusion_lens.scoring import Scorer
from fusion_lens.search import SearchConfig
from fusion_lens.tuning import make_segments

CONFIG = TuningConfig(
    search=SearchConfig(trials=4, round_size=2, high=6.0),
    generation=GenerationConfig(max_new_tokens=6, slots=16, cache_length=64),
    explanation_tokens=4,
)
QUESTIONS = [
    Question("a", "Who wrote the red book?", "Ada Lovelace"),
    Question("b", "Who was at home?", "Tom Harris", explanation="He was."),
    Question("c", "Who sat in the house?", "a cat"),
]
SEGMENTS = {
    "full": make_segments("full", 4),
    "segmented": make_segments("thirds", 4),
    "last": make_segments("thirds", 4)[-1:],
}


def bench_of(model: HookedModel, lenders: Lenders, **options: object) -> Bench:
    log = EngineLog()
    made = Bench(model, CONFIG, lenders, Scorer(model, CONFIG, log=log), log, prefix_room=24)
    return replace(made, **options)


@pytest.fixture(scope="module")
def bench(tiny: HookedModel) -> Iterator[Bench]:
    with lent(tiny, CONFIG, QUESTIONS) as lenders:
        yield bench_of(tiny, lenders)


@pytest.fixture(scope="module")
def chosen(bench: Bench):
    made = choose(bench, list(bench.lenders.prepared.values()), ARMS, SEGMENTS)
    return {(each.prepared.question.id, each.arm): each for each in made}


def test_every_arm_chooses_for_every_question_in_order(chosen) -> None:
    assert list(chosen) == [(name, arm) for name in "abc" for arm in ARMS]


def test_the_best_of_n_is_the_best_of_its_samples_and_the_greedy_run(
    tiny: HookedModel, bench: Bench, chosen
) -> None:
    from fusion_lens.arms import samples_of

    hot = replace(CONFIG.generation, temperature=1.0)
    for name, item in bench.lenders.prepared.items():
        rows = samples_of(item, item.prompt, CONFIG, "sample")
        assert len(rows) == 3
        samples = bench.score([item] * 3, generate(tiny, rows, hot))
        assert len({each.completion.tokens for each in samples}) > 1
        best = max(each.objective for each in (*samples, chosen[name, "baseline"].graded))
        assert chosen[name, "best_of_n"].graded.objective == best
        assert chosen[name, "best_of_n"].n_samples == 4


def test_the_answer_goes_before_the_question(tiny: HookedModel, bench: Bench, chosen) -> None:
    item = bench.lenders.prepared["b"]
    assert prefix_of(item) == "Tom Harris\nHe was.\n\n"
    prompt = tokenize(
        tiny, "Tom Harris\nHe was.\n\nQuestion: Who was at home?\nAnswer and explanation:"
    )
    text = generate(tiny, [Row(prompt)], replace(CONFIG.generation, cache_length=None))[0].text
    assert chosen["b", "answer_in_prompt"].graded.completion.text == text
    assert chosen["b", "answer_in_prompt"].plan is None
    # scored given the prompt that it had
    graded = chosen["b", "answer_in_prompt"].graded
    (nll,) = completion_nll(tiny, [(prompt, graded.completion)])
    assert graded.nll == pytest.approx(nll, abs=1e-5)
    # no empty line where there is no explanation
    assert prefix_of(replace(item, explanation="")) == "Tom Harris\n\n"


def test_tuned_arms_differ_in_vectors_and_segments_only(bench: Bench, chosen) -> None:
    for (name, arm), each in chosen.items():
        if arm not in TUNED:
            assert each.tuned is None
            continue
        job = each.tuned.job
        assert job.segments == SEGMENTS[TUNED[arm].segments]
        lent = bench.lenders.lend(TUNED[arm].vectors, bench.lenders.prepared[name], bench.model)
        assert torch.equal(job.deltas.vectors, lent.vectors)
        assert len(each.tuned.tuned.trials) == 4
        assert each.graded.objective >= chosen[name, "baseline"].graded.objective


def test_a_zero_plan_is_no_plan(chosen) -> None:
    for each in chosen.values():
        if each.tuned is not None:
            assert (each.plan is None) == each.tuned.tuned.zero_won


def test_a_prompt_that_does_not_fit_leaves_the_arm_without_a_choice(
    tiny: HookedModel, bench: Bench
) -> None:
    item = bench.lenders.prepared["a"]
    long = replace(item, explanation="She wrote it. " * 60)
    made = choose(bench, [long], ("baseline", "answer_in_prompt"), SEGMENTS)
    assert [each.arm for each in made] == ["baseline"]
    assert not bench.fits(question_prompt(tiny, "Who? " * 200), prefixed=True)


def test_vectors_that_nobody_lends_leave_the_arm_without_a_choice(tiny: HookedModel) -> None:
    with lent(tiny, CONFIG, QUESTIONS) as lenders:
        bench = bench_of(tiny, lenders)
        lenders.donors.clear()
        items = list(lenders.prepared.values())
        made = choose(bench, items, ("mismatched", "full"), SEGMENTS)
        assert [each.arm for each in made] == ["full"] * 3
