from __future__ import annotations

import dataclasses

from asked import ASKED, QUICK

import fusion_lens.scoring as scoring
from fusion_lens.generation import Completion, GenerationConfig
from fusion_lens.models import HookedModel
from fusion_lens.preparation import TuningConfig, prepare_one
from fusion_lens.scoring import Scorer
from fusion_lens.search import SearchConfig
from fusion_lens.tuning import tune


def test_questions_of_one_id_prepared_apart_are_scored_apart(tiny, monkeypatch) -> None:
    one = prepare_one(tiny, ASKED, QUICK)
    other = prepare_one(tiny, dataclasses.replace(ASKED, answer="Tom"), QUICK)
    completion = Completion("Ada Lovelace", (40, 41), ended=False)
    score = Scorer(tiny, QUICK)
    first, second = score([one, other], [completion, completion])
    assert (first.overlap, second.overlap) == (1.0, 0.0)
    scored: list[int] = []
    real = scoring.completion_nll

    def counting(model: HookedModel, texts: list[object], **options: object) -> list[float | None]:
        scored.append(len(texts))
        return real(model, texts, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(scoring, "completion_nll", counting)
    again = Completion("Ada Lovelace", (40, 41), ended=False, margin=0.5)
    (third,) = score([one], [again])
    assert scored == [0]
    assert (third, third.completion.margin) == (first, 0.5)


def test_identical_completions_of_a_question_are_scored_once(tiny, monkeypatch) -> None:
    scored = []
    real = scoring.completion_nll

    def counting(model, texts, **options):
        scored.extend((prompt.text, completion.tokens) for prompt, completion in texts)
        return real(model, texts, **options)

    monkeypatch.setattr(scoring, "completion_nll", counting)
    config = TuningConfig(
        search=SearchConfig(trials=8, high=0.01), generation=GenerationConfig(max_new_tokens=6)
    )
    tuned = tune(tiny, ASKED, config=config)
    distinct = {trial.outcome.completion.tokens for trial in tuned.tuned.trials}
    assert len(scored) == len(set(scored)) == len(distinct) < 8
