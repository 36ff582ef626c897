"""What an evaluation must say where nothing is there, and where something was put there."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from lent import lent
from scipy.stats import bootstrap

from fusion_lens import workers
from fusion_lens.arms import TUNED, Bench, choose
from fusion_lens.atlas import QUESTIONS
from fusion_lens.controls import Donor
from fusion_lens.decoding import Completion, GenerationConfig
from fusion_lens.engine_log import EngineLog
from fusion_lens.experiment import ExperimentConfig, run
from fusion_lens.graders import grade
from fusion_lens.lenders import Lenders
from fusion_lens.models import HookedModel
from fusion_lens.plans import full, thirds
from fusion_lens.preparation import TuningConfig, with_engine_shape
from fusion_lens.questions import load_questions, select_questions
from fusion_lens.scores import words
from fusion_lens.scoring import Scorer
from fusion_lens.search import SearchConfig


def shaped(model: HookedModel, questions, **search: object) -> TuningConfig:
    config = TuningConfig(
        search=SearchConfig(**search),
        generation=GenerationConfig(max_new_tokens=24),
        explanation_tokens=24,
    )
    return with_engine_shape(model, questions, config, n_rows=256)


def bench_of(model: HookedModel, config: TuningConfig, lenders: Lenders) -> Bench:
    log = EngineLog()
    return Bench(model, config, lenders, Scorer(model, config, log=log), log)


# vectors that are no deltas, and a mask that is counted as deltas are gathered
ELSEWHERE = {"unembed", "masked"}
SEGMENTS = {"full": full(6), "segmented": thirds(6), "last": thirds(6)[-1:]}


def test_zero_deltas_give_the_baselines_completions_token_for_token(atlas: HookedModel) -> None:
    questions = select_questions(load_questions(QUESTIONS), split="dev", limit=10)
    config = shaped(atlas, questions, trials=5)
    with lent(atlas, config, questions, size=16) as lenders:
        for name, item in lenders.prepared.items():
            lenders.prepared[name] = replace(item, deltas=item.deltas - item.deltas)
        lenders.generic.total *= 0.0
        items = list(lenders.prepared.values())
        arms = ("baseline", *(arm for arm in TUNED if arm not in ELSEWHERE))
        made = choose(bench_of(atlas, config, lenders), items, arms, SEGMENTS)
    base = {
        each.prepared.question.id: each.graded.completion.tokens
        for each in made
        if each.arm == "baseline"
    }
    tuned = [each for each in made if each.tuned is not None]
    assert {each.arm for each in tuned} == set(TUNED) - ELSEWHERE
    assert len(tuned) > 40
    for each in tuned:
        for trial in each.tuned.tuned.trials:
            assert trial.outcome.completion.tokens == base[each.prepared.question.id]
        assert each.tuned.tuned.zero_won


@pytest.mark.slow
def test_against_another_questions_gold_segmented_and_mismatched_are_alike(
    atlas: HookedModel,
) -> None:
    questions = load_questions(QUESTIONS)[:120]
    config = shaped(atlas, questions, trials=4)
    by_id = {question.id: question for question in questions}
    rng = np.random.default_rng(0)

    def apart(*names: str) -> bool:
        golds = [set(words(by_id[name].answer)) - {"the"} for name in names]
        return all(not one & other for i, one in enumerate(golds) for other in golds[:i])

    with lent(atlas, config, questions, size=64) as lenders:
        items = []
        for name, item in sorted(lenders.prepared.items()):
            others = [str(other) for other in rng.permutation(sorted(by_id)) if other != name]
            gold = next(other for other in others if apart(name, other))
            donor = next(other for other in others if other != gold and apart(name, gold, other))
            lenders.donors[name] = Donor(donor, 0)
            scored = replace(item.question, answer=by_id[gold].answer)
            items.append(replace(item, question=scored))
        arms = ("segmented", "mismatched")
        made = choose(bench_of(atlas, config, lenders), items, arms, SEGMENTS)
    objective = {(c.prepared.question.id, c.arm): c.graded.objective for c in made}
    diffs = [objective[name, "segmented"] - objective[name, "mismatched"] for name in by_id]
    assert any(diffs)
    interval = bootstrap(
        (np.array(diffs),), np.mean, confidence_level=0.99, rng=np.random.default_rng(0)
    ).confidence_interval
    assert -0.05 < interval.low <= interval.high < 0.05


def test_a_planted_effect_is_detected(atlas: HookedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    questions = select_questions(load_questions(QUESTIONS), split="dev", limit=12)
    real = workers.choose

    def planted(bench: Bench, *args: object, **options: object):
        made = real(bench, *args, **options)
        for n, each in enumerate(made):
            if each.arm == "segmented":
                gold = Completion(each.prepared.question.answer, (5, 6), ended=True)
                graded = grade(each.prepared.question, gold, each.graded.nll)
                made[n] = replace(each, graded=graded)
        return made

    monkeypatch.setattr(workers, "choose", planted)
    config = ExperimentConfig(
        arms=("segmented", "generic", "random"),
        tuning=TuningConfig(
            search=SearchConfig(trials=3),
            generation=GenerationConfig(max_new_tokens=12),
            explanation_tokens=12,
        ),
        reach=False,
    )
    summary = run(atlas, questions, config).summary
    for comparison in summary["comparisons"]:
        if comparison["metric"] in ("overlap", "exact_match", "correct", "token_f1"):
            assert comparison["p_holm"] < 0.01
            assert comparison["low"] > 0.5
