from __future__ import annotations

import dataclasses

import optuna
import pytest
import torch

import fusion_lens.tuning as tuning
from fusion_lens.errors import (
    ActivationError,
    ConfigError,
    ContextLengthError,
    QuestionError,
    SpanError,
)
from fusion_lens.generation import Completion, GenerationConfig, Row, generate
from fusion_lens.models import HookedModel
from fusion_lens.plans import Segment
from fusion_lens.questions import Question
from fusion_lens.search import SearchConfig
from fusion_lens.tuning import (
    Job,
    Scorer,
    TuningConfig,
    export_tuned,
    make_segments,
    prepare,
    prepare_one,
    seed_of,
    tune,
    tune_jobs,
)

QUICK = TuningConfig(
    search=SearchConfig(trials=8, round_size=4, high=6.0),
    generation=GenerationConfig(max_new_tokens=10),
    explanation_tokens=8,
)
ASKED = Question(id="red", question="Who wrote the red book?", answer="Ada Lovelace")
OTHER = Question(
    id="born", question="When was Tom born?", answer="3 May 1901", explanation="He was"
)


def test_the_explanation_is_the_models_own_continuation_unless_given(tiny) -> None:
    own, given = prepare(tiny, [ASKED, OTHER], QUICK)[0]
    prompt = tuning.explanation_prompt(tiny, ASKED.question, ASKED.answer)
    written = generate(tiny, [Row(prompt)], GenerationConfig(max_new_tokens=8))[0].text
    assert own.explanation == written.strip() != ""
    assert own.reference.text.endswith(f"Ada Lovelace\n{written.strip()}")
    assert given.explanation == "He was"
    assert given.reference.text.endswith("3 May 1901\nHe was")


def test_a_marker_cuts_the_explanation_and_zero_tokens_mean_none(tiny) -> None:
    marked = TuningConfig(explanation_tokens=8, explanation_marker="<never written>")
    assert prepare_one(tiny, ASKED, marked).explanation == ""
    assert prepare_one(tiny, ASKED, TuningConfig(explanation_tokens=0)).explanation == ""


def test_deltas_are_reference_minus_steered_prompt(tiny) -> None:
    prepared = prepare_one(tiny, ASKED, QUICK)
    recorded = tuning.record(tiny, [prepared.reference, prepared.prompt])
    assert torch.allclose(prepared.deltas.reference, recorded[0].mean, atol=1e-6)
    assert torch.allclose(prepared.deltas.base, recorded[1].mean, atol=1e-6)


def test_a_question_that_does_not_fit_is_a_failure_and_the_others_go_on(tiny) -> None:
    long = Question(id="long", question="Who " * 60, answer="Ada")
    prepared, failures = prepare(tiny, [ASKED, long, OTHER], QUICK)
    assert [p.question.id for p in prepared] == ["red", "born"]
    assert [(f.question_id, type(f.cause)) for f in failures] == [("long", ContextLengthError)]
    with pytest.raises(ContextLengthError, match=r"\+ 10 > 128 tokens; shorten the prompt or low"):
        prepare_one(tiny, long, QUICK)


def test_a_long_reference_is_a_failure_too(tiny) -> None:
    long = Question(id="long", question="Who?", answer="Ada", explanation="so " * 100)
    _, failures = prepare(tiny, [long], QUICK)
    assert type(failures[0].cause) is ContextLengthError


def test_activations_that_are_not_finite_are_a_failure_of_their_question_alone(
    tiny, monkeypatch
) -> None:
    real = tuning.record

    def failing(model, prompts, **options):
        if any("Tom" in prompt.text for prompt in prompts):
            raise ActivationError("activations must be finite, but a mean holds NaN or infinity.")
        return real(model, prompts, **options)

    monkeypatch.setattr(tuning, "record", failing)
    prepared, failures = prepare(tiny, [ASKED, OTHER], QUICK)
    assert [p.question.id for p in prepared] == ["red"]
    assert [(f.question_id, type(f.cause)) for f in failures] == [("born", ActivationError)]


def test_two_questions_of_one_id_are_refused(tiny) -> None:
    with pytest.raises(ConfigError, match="question ids must be unique"):
        prepare(tiny, [ASKED, dataclasses.replace(OTHER, id="red")], QUICK)


def test_questions_of_one_id_prepared_apart_are_scored_apart(tiny, monkeypatch) -> None:
    one = prepare_one(tiny, ASKED, QUICK)
    other = prepare_one(tiny, dataclasses.replace(ASKED, answer="Tom"), QUICK)
    completion = Completion("Ada Lovelace", (40, 41), ended=False)
    score = Scorer(tiny, QUICK)
    first, second = score([one, other], [completion, completion])
    assert (first.overlap, second.overlap) == (1.0, 0.0)
    scored: list[int] = []
    real = tuning.completion_nll

    def counting(model: HookedModel, texts: list[object], **options: object) -> list[float | None]:
        scored.append(len(texts))
        return real(model, texts, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(tuning, "completion_nll", counting)
    again = Completion("Ada Lovelace", (40, 41), ended=False, margin=0.5)
    (third,) = score([one], [again])
    assert scored == [0]
    assert (third, third.completion.margin) == (first, 0.5)


def test_tuning_finds_coefficients_that_beat_the_unsteered_model(stories_folder) -> None:
    from fusion_lens.models import load_model

    model = load_model(stories_folder)
    question = "What did Lily see in the park?"
    config = TuningConfig(search=SearchConfig(trials=20), generation=GenerationConfig(24))
    tuned = tune(model, question, "a big red ball", config=config)
    assert tuned.unsteered.overlap < tuned.best.overlap
    assert tuned.best.objective > tuned.unsteered.objective
    again = generate(model, [Row(tuned.job.prepared.prompt, tuned.plan)], config.generation)[0]
    assert again == tuned.best.completion
    assert tuned.plan.coeffs == tuned.tuned.best.coeffs
    assert set(tuned.plan.coeffs) == {"early", "middle", "late"}


def test_a_hooked_transformer_is_tuned_as_it_is(tiny, hooked_transformer, untouched) -> None:
    untouched(hooked_transformer)
    bridge, hooked = (tune(model, ASKED, config=QUICK) for model in (tiny, hooked_transformer))
    assert [t.coeffs for t in hooked.tuned.trials] == [t.coeffs for t in bridge.tuned.trials]
    assert hooked.best.completion == bridge.best.completion
    assert torch.allclose(hooked.plan.steps[0].shift, bridge.plan.steps[0].shift, atol=1e-4)


def test_trial_one_is_the_unsteered_model(tiny) -> None:
    tuned = tune(tiny, ASKED, config=QUICK)
    plain = generate(tiny, [Row(tuned.job.prepared.prompt)], QUICK.generation)[0]
    assert tuned.tuned.trials[0].coeffs == {"early": 0.0, "middle": 0.0, "late": 0.0}
    assert tuned.unsteered.completion == plain


def test_a_search_finds_the_same_alone_and_beside_others(tiny) -> None:
    prepared, _ = prepare(tiny, [ASKED, OTHER], QUICK)
    jobs = [
        Job(item, make_segments(name, 4), name) for item in prepared for name in ("full", "thirds")
    ]
    together, _ = tune_jobs(tiny, jobs, QUICK)
    for job, plan in zip(jobs, together, strict=True):
        alone = tune_jobs(tiny, [job], QUICK)[0][0]
        assert [t.coeffs for t in alone.tuned.trials] == [t.coeffs for t in plan.tuned.trials]
        texts = [t.outcome.completion.text for t in plan.tuned.trials]
        assert [t.outcome.completion.text for t in alone.tuned.trials] == texts
    assert len({plan.tuned.trials[1].coeffs["full"] for plan in together[::2]}) == 2


def test_all_trials_of_a_round_are_one_call_of_generate(tiny, monkeypatch) -> None:
    sizes = []
    real = tuning.generate
    monkeypatch.setattr(
        tuning,
        "generate",
        lambda m, rows, *a, **k: sizes.append(len(rows)) or real(m, rows, *a, **k),
    )
    prepared, _ = prepare(tiny, [ASKED, OTHER], QUICK)
    sizes.clear()
    tune_jobs(tiny, [Job(p, make_segments("full", 4), "full") for p in prepared], QUICK)
    assert sizes == [8, 8]


def test_identical_completions_of_a_question_are_scored_once(tiny, monkeypatch) -> None:
    scored = []
    real = tuning.completion_nll

    def counting(model, texts, **options):
        scored.extend((prompt.text, completion.tokens) for prompt, completion in texts)
        return real(model, texts, **options)

    monkeypatch.setattr(tuning, "completion_nll", counting)
    config = TuningConfig(
        search=SearchConfig(trials=8, high=0.01), generation=GenerationConfig(max_new_tokens=6)
    )
    tuned = tune(tiny, ASKED, config=config)
    distinct = {trial.outcome.completion.tokens for trial in tuned.tuned.trials}
    assert len(scored) == len(set(scored)) == len(distinct) < 8


def test_an_interrupt_gives_the_trials_so_far_and_a_model_without_hooks(
    tiny, untouched, monkeypatch
) -> None:
    untouched(tiny)
    calls = []
    real = tuning.generate

    def interrupted(*args, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(tuning, "generate", interrupted)
    tuned = tune(tiny, ASKED, config=QUICK)
    assert tuned.tuned.interrupted
    assert len(tuned.tuned.trials) == 4
    calls[:] = [1]
    with pytest.raises(KeyboardInterrupt):
        tune(tiny, ASKED, config=QUICK)


def test_the_finished_study_goes_to_a_storage_with_prompt_text_and_scores(tiny, tmp_path) -> None:
    tuned = tune(tiny, ASKED, config=QUICK)
    url = f"sqlite:///{tmp_path / 'studies.db'}"
    export_tuned(tuned, url, "red")
    study = optuna.load_study(study_name="red", storage=url)
    assert len(study.trials) == 8
    for stored, trial in zip(study.trials, tuned.tuned.trials, strict=True):
        attributes = stored.user_attrs
        assert attributes["prompt"] == tuned.job.prepared.prompt.text
        assert attributes["completion"] == trial.outcome.completion.text
        assert attributes["overlap"] == trial.outcome.overlap
        assert attributes["coeffs"] == trial.coeffs
        assert stored.value == trial.outcome.objective


def test_segments_have_names_numbers_or_layers_of_their_own() -> None:
    assert [s.name for s in make_segments("thirds", 6)] == ["early", "middle", "late"]
    assert len(make_segments("layers", 6)) == 6
    assert len(make_segments(2, 6)) == 2
    assert make_segments([Segment("x", 0, 1)], 6) == (Segment("x", 0, 1),)
    with pytest.raises(ConfigError, match="segments must be one of full, thirds, layers, but got"):
        make_segments("quarters", 6)


def test_an_empty_question_or_answer_is_refused(tiny) -> None:
    with pytest.raises(QuestionError, match="must have a non-empty answer"):
        tune(tiny, "Who?", " ", config=QUICK)
    with pytest.raises(QuestionError, match="must have a non-empty question"):
        tune(tiny, "", "Ada", config=QUICK)


def test_an_answer_that_is_not_in_the_reference_is_refused(tiny) -> None:
    question = Question(id="q", question="Who?", answer="</s>", explanation="")
    with pytest.raises(SpanError, match="'</s>' has no known token of its own"):
        prepare_one(tiny, question, QUICK)


def test_seeds_depend_on_their_parts_alone() -> None:
    assert seed_of(0, "q", "full") == seed_of(0, "q", "full")
    assert len({seed_of(0, "q", "full"), seed_of(1, "q", "full"), seed_of(0, "qf", "ull")}) == 3
