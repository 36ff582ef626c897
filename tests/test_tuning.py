from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import optuna
import pytest
import torch
from asked import ASKED, OTHER, QUICK
from kinds import affine_of, gate_of

import fusion_lens.tuning as tuning
from fusion_lens.errors import (
    ConfigError,
    QuestionError,
    SearchError,
)
from fusion_lens.generation import GenerationConfig, Row, generate
from fusion_lens.plans import Plan, Segment
from fusion_lens.preparation import TuningConfig, prepare, prepare_one
from fusion_lens.search import Parameter, SearchConfig
from fusion_lens.starts import Starts
from fusion_lens.tuning import (
    Job,
    MethodJob,
    TunedPlan,
    check_starts,
    export_tuned,
    make_segments,
    tune,
    tune_jobs,
)


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


FOUR = ((0.5, 0.5, 1.0, 0.25), (2.0, 1.0, 0.0, 0.0))
THIRDS = [
    {"early": 0.5, "middle": 1.0, "late": 0.25},
    {"early": 1.5, "middle": 0.0, "late": 0.0},
]
"""The same in early, middle and late: two layers, one and one."""


def tried(plan: TunedPlan) -> list[dict[str, float]]:
    return [trial.coeffs for trial in plan.tuned.trials]


def test_searches_start_at_the_questions_own_coefficients_and_at_those_of_all(tiny) -> None:
    starts = Starts(own=((OTHER.id, FOUR[1:]),), shared=FOUR[:1])
    config = replace(QUICK, starts=starts)
    prepared, _ = prepare(tiny, [ASKED, OTHER], config)
    parts = [make_segments(name, 4) for name in ("thirds", 2)]
    jobs = [Job(item, own, "x") for item in prepared for own in parts]
    red, red_halves, born, born_halves = tune_jobs(tiny, jobs, config)[0]
    assert tried(red)[1] == THIRDS[0]
    assert tried(born)[1:3] == THIRDS[::-1]
    # segments of other layers take the mean of theirs
    assert tried(red_halves)[1] == {"segment_0": 0.5, "segment_1": 0.625}
    assert tried(born_halves)[1] == {"segment_0": 1.5, "segment_1": 0.0}
    assert {len(plan.tuned.trials) for plan in (red, born)} == {8}


def test_the_first_of_every_kind_of_start_comes_before_the_second_of_any(tiny) -> None:
    starts = Starts(own=((ASKED.id, FOUR),), shared=((0.125,) * 4,), lengths=(0.5, 1.0))
    config = replace(QUICK, starts=starts)
    (job,) = (Job(item, make_segments("thirds", 4), "x") for item in prepare(tiny, [ASKED])[0])
    made = job.starts(tiny, config)
    (own, shared, first, again, second) = made
    assert (own, again) == tuple(THIRDS)
    assert set(shared.values()) == {0.125}
    assert (max(first.values()), max(second.values())) == (0.5, 1.0)


def test_starts_along_the_gradient_are_the_same_alone_and_beside_others(tiny, untouched) -> None:
    untouched(tiny)
    config = replace(QUICK, starts=Starts(lengths=(0.5,)))
    prepared, _ = prepare(tiny, [ASKED, OTHER], config)
    jobs = [Job(item, make_segments("thirds", 4), "x") for item in prepared]
    together, _ = tune_jobs(tiny, jobs, config)
    for job, plan in zip(jobs, together, strict=True):
        assert tried(tune_jobs(tiny, [job], config)[0][0]) == tried(plan)
        assert max(tried(plan)[1].values()) == 0.5
    assert tried(together[0])[1] != tried(together[1])[1]


def test_starts_that_no_search_could_begin_with_are_refused() -> None:
    parts = make_segments("thirds", 4)
    check_starts(replace(QUICK, starts=Starts(shared=FOUR)), parts)
    for starts in (Starts(shared=((7.0,) * 4,)), Starts(own=(("a", ((7.0,) * 4,)),))):
        with pytest.raises(SearchError, match=r"a start must lie in \[0, 6\]"):
            check_starts(replace(QUICK, starts=starts), parts)
    with pytest.raises(ConfigError, match="must have a coefficient for every layer, but has 3"):
        check_starts(replace(QUICK, starts=Starts(shared=((1.0,) * 3,))), parts)
    with pytest.raises(ConfigError, match="starts along a gradient need a constant shift"):
        TuningConfig(mean="sequence", starts=Starts(lengths=(0.5,)))


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


def test_an_interrupt_gives_the_trials_so_far_and_a_model_without_hooks(
    tiny, untouched, monkeypatch
) -> None:
    untouched(tiny)
    calls = []
    real = tuning.generate

    def interrupted(*args, **options):
        calls.append(1)
        if len(calls) == 2:
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


def test_a_tuned_plan_shows_the_steered_text_beside_the_unsteered_one(tiny) -> None:
    tuned = tune(tiny, ASKED, config=QUICK)
    table = tuned.table()
    assert table.title == ASKED.question
    # on this random model nothing beats the zero plan: both texts are one, and nothing is marked
    assert tuned.tuned.zero_won
    text = tuned.unsteered.completion.text.strip()
    assert table.rows[0] == ("text", [(text, False)], [(text, False)])
    best = replace(tuned.best, completion=replace(tuned.best.completion, text=f"{text} Ada"))
    search = replace(tuned.tuned, best=replace(tuned.tuned.best, outcome=best))
    said, says = replace(tuned, tuned=search).table().rows[0][1:]
    assert (said, says) == ([(text, False)], [(f"{text} ", False), ("Ada", True)])
    objective = {row[0]: row[1:] for row in table.rows}["objective"]
    assert objective == (f"{tuned.unsteered.objective:+.3f}", f"{tuned.best.objective:+.3f}")
    assert table.notes[0] == f"gold: {ASKED.answer}"


def ranking_of(n_layers: int, d_model: int) -> torch.Tensor:
    """All units, in a random order."""
    order = torch.randperm(n_layers * d_model, generator=torch.Generator().manual_seed(0))
    return torch.stack([order // d_model, order % d_model], dim=1)


def test_how_many_units_of_a_ranking_are_injected_is_sought_too(tiny) -> None:
    item = prepare_one(tiny, ASKED, QUICK)
    ranking = ranking_of(4, 32)
    job = Job(item, make_segments("full", 4), "masked", ranking=ranking)
    (tuned,), _ = tune_jobs(tiny, [job], QUICK)
    ks = [trial.extra["k"] for trial in tuned.tuned.trials]
    assert ks[0] == len(ranking) == 128
    assert len(set(ks)) > 3
    for trial in tuned.tuned.trials:
        (step,) = job.plan(trial.values, QUICK).steps
        kept = ranking[: trial.extra["k"]]
        assert int(step.units.sum()) == trial.extra["k"]
        assert bool(step.units[kept[:, 0], kept[:, 1]].all())
        expected = trial.coeffs["full"] * item.deltas.vectors[kept[:, 0], kept[:, 1]]
        assert trial.injected_norm == pytest.approx(float(expected.norm()), abs=1e-5)
    (chosen,) = tuned.plan.steps
    assert int(chosen.units.sum()) == tuned.tuned.best.extra["k"]
    assert f"k {tuned.tuned.best.extra['k']}" in tuned.table().notes[1]
    # without a k: all units, as an unmasked plan
    unmasked = Job(item, make_segments("full", 4), "full").plan({"full": 2.0}, QUICK)
    assert torch.equal(job.plan({"full": 2.0}, QUICK).steps[0].shift, unmasked.steps[0].shift)


def test_a_gate_is_on_every_plan_of_its_search(tiny) -> None:
    item = prepare_one(tiny, ASKED, QUICK)
    shut = gate_of(tiny, "resid_post", bias=torch.full((4,), -1e4))
    jobs = [
        Job(item, make_segments("full", 4), name, gate=gate)
        for name, gate in (("shut", shut), ("free", None))
    ]
    (gated, free), _ = tune_jobs(tiny, jobs, QUICK)
    assert gated.plan.steps[0].gate is shut
    texts = {trial.outcome.completion.text for trial in gated.tuned.trials}
    assert texts == {gated.unsteered.completion.text}
    assert len({trial.outcome.completion.text for trial in free.tuned.trials}) > 1


def test_a_fitted_method_is_tuned_in_its_own_range(tiny) -> None:
    item = prepare_one(tiny, ASKED, QUICK)
    step = affine_of(tiny, "mlp_out", coeffs=(1.0, 1.0, 1.0))
    sharp = Parameter("sharpness", 0.5, 2.0)

    def make(values: Mapping[str, float | int]) -> Plan:
        return Plan((step,)) * (values["strength"] * values["sharpness"])

    job = MethodJob(item, "affine", make, 1.0, 9.0, (sharp,))
    (tuned,), _ = tune_jobs(tiny, [job], QUICK)
    first, *others = tuned.tuned.trials
    assert first.values == {"strength": 0.0, "sharpness": 2.0}
    assert first.outcome.completion == generate(tiny, [item.row(QUICK)], QUICK.generation)[0]
    assert all(1.0 <= trial.coeffs["strength"] <= 9.0 for trial in others)
    assert all(0.5 <= trial.extra["sharpness"] <= 2.0 for trial in others)
    best = tuned.tuned.best
    scale = best.coeffs["strength"] * best.extra["sharpness"]
    assert tuned.plan.coeffs["early"] == pytest.approx(scale)
    again = generate(tiny, [item.row(QUICK, tuned.plan)], QUICK.generation)[0]
    assert again == tuned.best.completion
    # what is not given is at its highest, as in the zero plan's trial
    assert job.plan({"strength": 1.5}, QUICK).coeffs["late"] == 3.0
