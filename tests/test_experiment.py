from __future__ import annotations

import dataclasses
import gc
import json
import math
import os
import shutil
import signal
from dataclasses import replace
from typing import Any

import optuna
import pytest
import torch
from kinds import gate_of

import fusion_lens.experiment as experiment
from fusion_lens import arms, workers
from fusion_lens.atlas import QUESTIONS as ATLAS_QUESTIONS
from fusion_lens.deltas import Deltas
from fusion_lens.errors import (
    ConfigError,
    DeviceError,
    OutputError,
    PlanError,
    ResumeError,
    SearchError,
)
from fusion_lens.experiment import ExperimentConfig, run
from fusion_lens.generation import GenerationConfig, Row, generate
from fusion_lens.identity import identify
from fusion_lens.methods.dsas import FittedGate
from fusion_lens.models import HookedModel, load_model
from fusion_lens.perplexity import PerplexityModel
from fusion_lens.plan_files import load_plan
from fusion_lens.plans import Step
from fusion_lens.preparation import TuningConfig
from fusion_lens.prompts import question_prompt
from fusion_lens.questions import Question, load_questions, select_questions
from fusion_lens.results import load_records, load_results, plan_path
from fusion_lens.run_folder import RunFolder
from fusion_lens.search import SearchConfig
from fusion_lens.starts import Starts

QUICK = TuningConfig(
    search=SearchConfig(trials=6, round_size=3, high=6.0),
    generation=GenerationConfig(max_new_tokens=8),
    explanation_tokens=6,
)
THREE = ("baseline", "full", "segmented")
QUESTIONS = [
    Question(id="a", question="Who wrote the red book?", answer="Ada Lovelace", subject="book"),
    Question(id="b", question="When was it written?", answer="in 1843", subject="book"),
    Question(id="c", question="When was Tom born?", answer="3 May 1901", subject="Tom"),
]


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """A run of three questions under all arms, and its folder."""
    folder = tmp_path_factory.mktemp("run")
    return run(tiny, QUESTIONS, ExperimentConfig(arms=THREE, tuning=QUICK), out=folder), folder


def test_every_question_has_a_record_for_every_arm_in_order(finished) -> None:
    results, _ = finished
    arms = ("baseline", "full", "segmented")
    assert [(r.question_id, r.arm) for r in results.records] == [
        (question.id, arm) for question in QUESTIONS for arm in arms
    ]
    for record in results.records:
        assert record.n_trials == (1 if record.arm == "baseline" else 6)
        names = {"baseline": set(), "full": {"full"}, "segmented": {"early", "middle", "late"}}
        assert set(record.coeffs) == names[record.arm]


def test_the_baseline_is_the_unsteered_greedy_run_without_its_prompt(tiny, finished) -> None:
    results, _ = finished
    for question, record in zip(QUESTIONS, results.records[::3], strict=True):
        prompt = question_prompt(tiny, question.question)
        assert record.completion == generate(tiny, [Row(prompt)], QUICK.generation)[0].text
        assert prompt.text not in record.completion


def test_a_tuned_arm_is_never_below_the_baseline_on_the_objective(finished) -> None:
    results, _ = finished
    by_key = {(r.question_id, r.arm): r for r in results.records}
    for question in QUESTIONS:
        for arm in ("full", "segmented"):
            record, base = by_key[question.id, arm], by_key[question.id, "baseline"]
            assert record.objective >= base.objective
            if record.zero_won:
                assert record.completion == base.completion
                assert record.injected_norm == 0.0


def test_a_saved_plan_reproduces_the_record(tiny, finished) -> None:
    results, folder = finished
    for record in results.records:
        if record.arm == "baseline":
            continue
        plan = load_plan(plan_path(folder, record.question_id, record.arm))
        assert plan.coeffs == record.coeffs
        assert plan.injected_norm == pytest.approx(record.injected_norm)
        prompt = question_prompt(tiny, record.question)
        assert generate(tiny, [Row(prompt, plan)], QUICK.generation)[0].text == record.completion


def test_the_folder_holds_what_was_returned(finished) -> None:
    results, folder = finished
    loaded = load_results(folder)
    assert loaded.records == results.records
    assert loaded.summary == json.loads(json.dumps(results.summary))
    assert loaded.details == results.details


def test_the_summary_holds_means_intervals_and_provenance(finished) -> None:
    results, _ = finished
    summary = results.summary
    assert summary["schema_version"] == 7
    provenance = summary["provenance"]
    assert provenance["seed"] == 0
    assert provenance["processing_mode"] == "unprocessed"
    assert provenance["settings"]["tuning"]["search"]["trials"] == 6
    assert provenance["versions"]["torch"].startswith("2.")
    for arm, content in summary["arms"].items():
        own = [r for r in results.records if r.arm == arm]
        assert (content["n"], content["clusters"]) == (3, 2)
        overlap = content["metrics"]["overlap"]
        assert overlap["mean"] == pytest.approx(sum(r.overlap for r in own) / 3)
        assert overlap["low"] <= overlap["mean"] <= overlap["high"]
        logs = [math.log(r.perplexity) for r in own]
        assert content["metrics"]["perplexity"]["mean"] == pytest.approx(math.exp(sum(logs) / 3))
    assert all(record.explanation for record in results.records)
    assert all(record.finite and record.margin > 0 for record in results.records)
    # an explanation, the baseline and 6 trials under each of two arms, for each of 3 questions
    assert summary["engine"] == {"rows": {"lean": 42, "hooks": 0}, "reasons": [], "halvings": 0}


def comparable(records) -> list[object]:
    """Everything but the times."""
    return [dataclasses.replace(record, seconds=0.0) for record in records]


def test_the_same_seed_gives_the_same_run_and_blocks_do_not_matter(tiny, finished) -> None:
    results, _ = finished
    again = run(tiny, QUESTIONS, ExperimentConfig(arms=THREE, tuning=QUICK, block_size=2))
    assert comparable(again.records) == comparable(results.records)


def test_another_selection_of_a_file_gives_the_same_numbers_to_the_last_bit(tiny, finished) -> None:
    results, _ = finished
    config = ExperimentConfig(arms=THREE, tuning=QUICK)
    some = run(tiny, QUESTIONS[1:2], config, pool=QUESTIONS)
    assert comparable(some.records) == comparable(results.records)[3:6]
    generation = some.summary["provenance"]["settings"]["tuning"]["generation"]
    # 3 trials a round under each of six arms for every question of the file, in eights, whatever
    # arms are run
    assert (generation["slots"], generation["cache_length"]) == (56, 40)


def lines_without_times(folder) -> list[str]:
    lines = (folder / "results.jsonl").read_text("utf-8").splitlines()
    return [json.dumps(json.loads(line) | {"seconds": 0, "crc32": ""}) for line in lines]


def same_summary(results) -> dict[str, Any]:
    """What is the same however often the run was taken up, in whatever blocks."""
    summary = json.loads(json.dumps(results.summary))
    del summary["provenance"]["settings"]["block_size"]
    return {k: v for k, v in summary.items() if k not in ("seconds", "resumed", "engine")}


def test_results_are_byte_equal_in_any_order_and_any_blocks(tiny, finished, tmp_path) -> None:
    _, folder = finished
    config = ExperimentConfig(arms=THREE, tuning=QUICK, block_size=2)
    run(tiny, QUESTIONS[::-1], config, out=tmp_path)
    assert sorted(lines_without_times(tmp_path)) == sorted(lines_without_times(folder))


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["lean", "hooks"])
def test_another_slot_shape_gives_the_same_completions_and_coefficients(atlas, executor) -> None:
    questions = select_questions(load_questions(ATLAS_QUESTIONS), split="dev", limit=3)

    def outcome(slots: int, cache_length: int | None) -> list[tuple[object, ...]]:
        generation = GenerationConfig(slots=slots, cache_length=cache_length, executor=executor)
        tuning = TuningConfig(SearchConfig(trials=10), generation)
        records = run(atlas, questions, ExperimentConfig(arms=THREE, tuning=tuning)).records
        # a flip is only to be expected where two logits are this close
        assert all(record.margin > 1e-4 for record in records)
        return [(r.question_id, r.arm, r.completion, r.coeffs, r.best_trial) for r in records]

    assert outcome(30, None) == outcome(7, 96)


@pytest.mark.slow
def test_a_block_of_questions_leaves_no_study_and_no_deltas_behind(tiny, monkeypatch) -> None:
    alive = []
    keep = experiment._Loop._keep

    def counting(*args: Any) -> None:
        gc.collect()
        objects = gc.get_objects()
        alive.append(sum(issubclass(type(o), (optuna.Study, Deltas)) for o in objects))
        keep(*args)

    monkeypatch.setattr(experiment._Loop, "_keep", counting)
    many = [dataclasses.replace(QUESTIONS[0], id=str(i)) for i in range(6)]
    search = dataclasses.replace(QUICK.search, trials=2)
    tuning = dataclasses.replace(QUICK, search=search)
    results = run(tiny, many, ExperimentConfig(arms=THREE, tuning=tuning, block_size=1))
    assert len(results.records) == 18
    # the first block may find what earlier tests left; a block has two studies and one question
    assert len(alive) == 6
    assert max(alive[1:]) <= alive[0]


def test_at_a_temperature_all_arms_draw_the_same_numbers(tiny) -> None:
    hot = dataclasses.replace(QUICK.generation, temperature=1.0)
    config = ExperimentConfig(arms=THREE, tuning=dataclasses.replace(QUICK, generation=hot))
    results = run(tiny, QUESTIONS, config)
    base = {r.question_id: r for r in results.records if r.arm == "baseline"}
    assert len({r.completion for r in base.values()}) == 3
    for record in results.records:
        assert record.objective >= base[record.question_id].objective


def test_a_storage_that_cannot_take_the_studies_fails_before_the_work(tiny, tmp_path) -> None:
    url = f"sqlite:///{tmp_path / 'studies.db'}"
    config = ExperimentConfig(arms=("full",), tuning=QUICK, storage=url)
    run(tiny, QUESTIONS[:1], config)
    with pytest.raises(SearchError, match="the study 'a/full' must be new to the storage, but it"):
        run(tiny, QUESTIONS[:1], config, out=tmp_path / "never")
    assert not (tmp_path / "never").exists()
    broken = dataclasses.replace(config, storage="nonsense")
    with pytest.raises(SearchError, match="the storage must be an Optuna storage URL that can be"):
        run(tiny, QUESTIONS[:1], broken)


def test_a_study_of_a_block_that_was_lost_is_replaced(tiny, tmp_path, monkeypatch) -> None:
    url = f"sqlite:///{tmp_path / 'studies.db'}"
    config = ExperimentConfig(arms=("full",), tuning=QUICK, storage=url, reach=False)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "add", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tiny, QUESTIONS[:1], config, out=tmp_path / "run")
    assert optuna.get_all_study_names(url) == ["a/full"]
    results = run(tiny, QUESTIONS[:1], config, out=tmp_path / "run", existing="resume")
    assert (len(results.records), results.summary["resumed"]) == (1, 0)
    study = optuna.load_study(study_name="a/full", storage=url)
    assert len(study.trials) == QUICK.search.trials
    # of another run it is not, also where this one is gone on with
    later = dataclasses.replace(config, storage=None, block_size=1)
    folder = tmp_path / "later"
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "add", killed)
        with pytest.raises(KeyboardInterrupt):
            run(
                tiny,
                QUESTIONS[:1],
                dataclasses.replace(later, arms=("full", "baseline")),
                out=folder,
            )
    asked = dataclasses.replace(config, arms=("full", "baseline"))
    with pytest.raises(SearchError, match="the study 'a/full' must be new"):
        run(tiny, QUESTIONS[:1], asked, out=folder, existing="resume")
    assert len(optuna.load_study(study_name="a/full", storage=url).trials) == QUICK.search.trials
    with pytest.raises(SearchError, match="the study 'a/full' must be new"):
        run(tiny, QUESTIONS[:1], config, out=tmp_path / "other", existing="resume")


def test_another_seed_gives_other_coefficients(tiny, finished) -> None:
    results, _ = finished
    found = {json.dumps([r.coeffs for r in results.records])}
    for seed in (5, 6, 7):
        search = dataclasses.replace(QUICK.search, seed=seed)
        config = ExperimentConfig(arms=THREE, tuning=dataclasses.replace(QUICK, search=search))
        found.add(json.dumps([r.coeffs for r in run(tiny, QUESTIONS, config).records]))
    assert len(found) > 1


def test_a_question_that_fails_is_recorded_with_its_reason_and_the_run_goes_on(tiny) -> None:
    long = Question(id="long", question="Who " * 80, answer="Ada")
    nothing = Question(id="nothing", question="Who?", answer="</s>")
    results = run(tiny, [QUESTIONS[0], long, nothing], ExperimentConfig(arms=THREE, tuning=QUICK))
    failures = {f["question_id"]: (f["error"], f["message"]) for f in results.summary["failures"]}
    assert failures.keys() == {"long", "nothing"}
    assert {f["arm"] for f in results.summary["failures"]} == {None}
    assert failures["long"][0] == "ContextLengthError"
    assert "must fit the model's context" in failures["long"][1]
    assert failures["nothing"][0] == "SpanError"
    assert "the answer must be found in the reference's tokens" in failures["nothing"][1]
    assert {r.question_id for r in results.records} == {"a"}


def test_logits_that_are_not_finite_fail_their_arm_alone(tiny, monkeypatch) -> None:
    real = arms.generate

    def first_fails(*args, **options):
        first, *others = real(*args, **options)
        return [dataclasses.replace(first, finite=False), *others]

    # the baseline's; the trials are generated elsewhere
    monkeypatch.setattr(arms, "generate", first_fails)
    results = run(tiny, QUESTIONS[:2], ExperimentConfig(arms=THREE, tuning=QUICK, reach=False))
    (failure,) = results.summary["failures"]
    assert (failure["question_id"], failure["arm"]) == ("a", "baseline")
    assert failure["error"] == "ActivationError"
    assert "the model's logits must be finite" in failure["message"]
    base, *others = results.records
    assert (base.finite, base.n_not_finite) == (False, 1)
    assert (base.overlap, base.nll, base.objective) == (None, None, -0.3)
    assert all(r.finite and r.n_not_finite == 0 for r in others)


def test_a_run_in_which_every_question_fails_still_ends(tiny) -> None:
    long = Question(id="long", question="Who " * 80, answer="Ada")
    results = run(tiny, [long], ExperimentConfig(arms=THREE, tuning=QUICK))
    assert results.records == ()
    assert results.summary["arms"]["full"]["n"] == 0
    assert results.summary["arms"]["full"]["metrics"]["overlap"]["mean"] is None


def interrupting(monkeypatch, owner: Any, name: str, times: int = 1) -> list[int]:
    """`owner.name` with so many Ctrl-C in its second call."""
    calls: list[int] = []
    real = getattr(owner, name)

    def pressed(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)
        return real(*args, **options)

    monkeypatch.setattr(owner, name, pressed)
    return calls


@pytest.mark.parametrize(("owner", "name"), [(arms, "tune_jobs"), (workers, "details_of")])
def test_an_interrupt_ends_the_run_when_the_block_is_written(
    tiny, tmp_path, monkeypatch, untouched, capsys, finished, owner, name
) -> None:
    untouched(tiny)
    interrupting(monkeypatch, owner, name)
    config = ExperimentConfig(arms=THREE, tuning=QUICK, block_size=1)
    results = run(tiny, QUESTIONS, config, out=tmp_path)
    assert results.summary["interrupted"]
    assert comparable(results.records) == comparable(finished[0].records)[:6]
    assert load_results(tmp_path).records == results.records
    assert [each.question_id for each in load_results(tmp_path).details] == ["a", "b"]
    counted = {arm: (c["n"], c["unscored"]) for arm, c in results.summary["arms"].items()}
    assert counted == dict.fromkeys(THREE, (2, 0))
    assert "stopping when this batch is written" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_interrupt_ends_the_run_at_once_and_loses_the_block_in_work(
    tiny, tmp_path, monkeypatch, untouched, finished
) -> None:
    untouched(tiny)
    interrupting(monkeypatch, arms, "tune_jobs", times=2)
    config = ExperimentConfig(arms=THREE, tuning=QUICK, block_size=1)
    with pytest.raises(KeyboardInterrupt):
        run(tiny, QUESTIONS, config, out=tmp_path)
    monkeypatch.undo()
    assert not (tmp_path / "summary.json").exists()
    assert len(load_records(tmp_path / "results.jsonl")) == 3
    results = run(tiny, QUESTIONS, config, out=tmp_path, existing="resume")
    assert (results.summary["resumed"], results.summary["interrupted"]) == (3, False)
    assert lines_without_times(tmp_path) == lines_without_times(finished[1])
    # the others' deltas among them
    assert results.details == finished[0].details
    assert same_summary(results) == same_summary(finished[0])


def test_what_is_done_is_not_done_again(tiny, tmp_path, monkeypatch, finished) -> None:
    config = ExperimentConfig(arms=THREE, tuning=QUICK)
    run(tiny, QUESTIONS, config, out=tmp_path)
    path = tmp_path / "results.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    # one arm of the second question is missing, and all of the third but its details
    path.write_bytes(b"".join(lines[:5]))
    asked = []
    real = arms.tune_jobs

    def watched(model, jobs, *args, **options):
        asked.extend((job.prepared.question.id, job.arm) for job in jobs)
        return real(model, jobs, *args, **options)

    monkeypatch.setattr(arms, "tune_jobs", watched)
    details = (tmp_path / "details.jsonl").read_bytes()
    results = run(tiny, QUESTIONS, config, out=tmp_path, existing="resume")
    assert asked == [("b", "segmented"), ("c", "full"), ("c", "segmented")]
    assert path.read_bytes().splitlines(keepends=True)[:5] == lines[:5]
    assert lines_without_times(tmp_path) == lines_without_times(finished[1])
    assert (tmp_path / "details.jsonl").read_bytes() == details
    assert results.summary["resumed"] == 5
    # nothing is left to do, and the model is not asked
    asked.clear()
    again = run(tiny, QUESTIONS, config, out=tmp_path, existing="resume")
    assert (asked, again.summary["resumed"]) == ([], 9)
    assert again.records == results.records
    same = ("arms", "comparisons", "groups", "failures", "questions")
    assert {key: again.summary[key] for key in same} == {key: results.summary[key] for key in same}


def test_what_questions_lend_is_told_of_all_of_them_however_few_were_left(tiny, tmp_path) -> None:
    config = ExperimentConfig(arms=("mismatched",), tuning=QUICK, reach=False)
    before = run(tiny, QUESTIONS[:2], config, donors=QUESTIONS, out=tmp_path)
    assert before.summary["donors"] == {"n": 3, "mismatched": 2, "sharing_a_word": 0}
    for name in ("b", "a", None):
        if name is not None:
            plan_path(tmp_path, name, "mismatched").unlink()
        options = {"donors": QUESTIONS, "out": tmp_path, "existing": "resume"}
        after = run(tiny, QUESTIONS[:2], config, **options)
        assert after.summary["resumed"] == (2 if name is None else 1)
        assert same_summary(after) == same_summary(before)


def test_a_plan_that_is_gone_is_made_again(tiny, tmp_path) -> None:
    config = ExperimentConfig(arms=THREE, tuning=QUICK)
    before = run(tiny, QUESTIONS, config, out=tmp_path)
    path = plan_path(tmp_path, "b", "full")
    content = path.read_bytes()
    path.unlink()
    after = run(tiny, QUESTIONS, config, out=tmp_path, existing="resume")
    assert path.read_bytes() == content
    assert (after.summary["resumed"], comparable(after.records)) == (8, comparable(before.records))


def test_a_run_goes_on_only_as_what_it_was(tiny, other_folder, tmp_path) -> None:
    config = ExperimentConfig(arms=("baseline",), tuning=QUICK, reach=False)
    run(tiny, QUESTIONS, config, out=tmp_path)
    kept = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    search = dataclasses.replace(QUICK.search, trials=7)
    longer = dataclasses.replace(config, tuning=dataclasses.replace(QUICK, search=search))
    asked = [*QUESTIONS[:2], dataclasses.replace(QUESTIONS[2], answer="4 May 1901")]
    for model, questions, other, says in (
        (tiny, QUESTIONS, longer, r"settings\.tuning\.search\.trials was 6 and is 7"),
        (tiny, asked, config, "questions_sha256 was "),
        (tiny, QUESTIONS[:2], config, r"questions was \['a', 'b', 'c'\] and is \['a', 'b'\]"),
        (load_model(other_folder), QUESTIONS, config, r"model\.weights was "),
        (tiny, QUESTIONS, dataclasses.replace(config, arms=THREE), r"settings\.arms was "),
    ):
        with pytest.raises(ResumeError, match=says):
            run(model, questions, other, out=tmp_path, existing="resume")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == kept
    # how questions are taken together changes nothing
    blocks = dataclasses.replace(config, block_size=1)
    assert run(tiny, QUESTIONS, blocks, out=tmp_path, existing="resume").summary["resumed"] == 3
    with pytest.raises(OutputError, match="it holds a run, which can be continued"):
        run(tiny, QUESTIONS, config, out=tmp_path)
    again = run(tiny, QUESTIONS[:2], config, out=tmp_path, existing="overwrite")
    assert [record.question_id for record in again.records] == ["a", "b"]


def test_a_run_goes_on_only_with_the_config_and_the_tokenizer_it_had(
    tiny, tiny_folder, tmp_path
) -> None:
    """Weights are the same in all of them."""
    config = ExperimentConfig(arms=("baseline",), tuning=QUICK, reach=False)
    run(tiny, QUESTIONS, config, out=tmp_path / "run")

    def other(name: str, file: str, change) -> HookedModel:
        folder = shutil.copytree(tiny_folder, tmp_path / name)
        content = json.loads((folder / file).read_text("utf-8"))
        change(content)
        (folder / file).write_text(json.dumps(content), "utf-8")
        return load_model(folder)

    wider = other("wider", "config.json", lambda own: own.update(rms_norm_eps=1e-3))
    with pytest.raises(ResumeError, match=r"config\.rms_norm_eps was 1e-0\d and is 0\.001"):
        run(wider, QUESTIONS, config, out=tmp_path / "run", existing="resume")
    told = other(
        "told", "tokenizer_config.json", lambda own: own.update(chat_template="{{ messages }}")
    )
    with pytest.raises(ResumeError, match="tokenizer was "):
        run(told, QUESTIONS, config, out=tmp_path / "run", existing="resume")
    copied = load_model(shutil.copytree(tiny_folder, tmp_path / "copied"))
    again = run(copied, QUESTIONS, config, out=tmp_path / "run", existing="resume")
    assert again.summary["resumed"] == 3


def test_a_device_that_is_broken_ends_the_run_and_blames_no_question(
    tiny, tmp_path, monkeypatch
) -> None:
    config = ExperimentConfig(arms=("baseline",), tuning=QUICK, reach=False, block_size=1)
    chosen, calls = workers.choose, []

    def breaks(*args, **kwargs):
        calls.append(None)
        if len(calls) == 2:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        return chosen(*args, **kwargs)

    monkeypatch.setattr(workers, "choose", breaks)
    with pytest.raises(DeviceError, match="says: CUDA error: an illegal memory access"):
        run(tiny, QUESTIONS, config, out=tmp_path)
    again = run(tiny, QUESTIONS, config, out=tmp_path, existing="resume")
    assert (again.summary["resumed"], again.summary["failures"]) == (1, [])


def test_a_run_that_was_asked_to_stop_too_late_is_done(tiny, tmp_path) -> None:
    config = ExperimentConfig(arms=("baseline", "full"), tuning=QUICK, reach=False)

    def press(stage: str, done: int, total: int) -> None:
        if stage == "trials" and done == total:
            os.kill(os.getpid(), signal.SIGINT)

    results = run(tiny, QUESTIONS, config, out=tmp_path, progress=press)
    assert (results.summary["interrupted"], len(results.records)) == (False, 6)


def test_an_engine_has_what_measures_and_explains_itself(tiny, gpt2_folder) -> None:
    engine = workers.LocalEngine(workers.Worker(tiny))
    with pytest.raises(ConfigError, match="an engine has fluency and explain itself"):
        run(engine, QUESTIONS, fluency=PerplexityModel(gpt2_folder))


def test_a_run_goes_on_only_with_the_perplexity_model_and_dictionaries_it_had(
    tiny, gpt2_folder, tmp_path
) -> None:
    config = ExperimentConfig(arms=("baseline",), tuning=QUICK, reach=False)
    fluency = PerplexityModel(gpt2_folder)
    run(tiny, QUESTIONS, config, fluency=fluency, out=tmp_path)
    assert run(tiny, QUESTIONS, config, fluency=fluency, out=tmp_path, existing="resume").summary[
        "resumed"
    ]
    trained = PerplexityModel(gpt2_folder)
    with torch.no_grad():
        next(trained._model.parameters()).mul_(1.1)
    for changes, says in (
        ({"fluency": trained}, "perplexity_weights was "),
        ({"fluency": fluency, "explain": lambda texts: [()] * len(texts)}, "explained was False"),
    ):
        with pytest.raises(ResumeError, match=says):
            run(tiny, QUESTIONS, config, out=tmp_path, existing="resume", **changes)


def test_progress_counts_trials_samples_and_reach_of_all_questions(tiny) -> None:
    told: list[tuple[str, int, int]] = []
    arms = ("baseline", "best_of_n", "answer_in_prompt", "segmented")
    config = ExperimentConfig(arms=arms, tuning=QUICK, block_size=2)
    asked = [replace(q, paraphrases=("Who was it?", "And who?")) for q in QUESTIONS]
    run(tiny, asked, config, progress=lambda *own: told.append(own))
    for stage, total in (("preparing", 3), ("trials", 2 * 6 * 3), ("reach", 4 * 3)):
        done = [done for own, done, _ in told if own == stage]
        assert done == sorted(set(done))
        assert {total for own, _, total in told if own == stage} == {total}
        assert done[-1] == total
        assert len(done) > (2 if stage == "preparing" else 3)


def test_a_question_that_makes_the_work_fail_is_found_and_the_rest_goes_on(
    tiny, tmp_path, monkeypatch, finished
) -> None:
    real = arms.tune_jobs

    def failing(model, jobs, *args, **options):
        if any((job.prepared.question.id, job.arm) == ("b", "full") for job in jobs):
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        return real(model, jobs, *args, **options)

    monkeypatch.setattr(arms, "tune_jobs", failing)
    config = ExperimentConfig(arms=THREE, tuning=QUICK)
    results = run(tiny, QUESTIONS, config, out=tmp_path)
    expected = [r for r in finished[0].records if (r.question_id, r.arm) != ("b", "full")]
    assert comparable(results.records) == comparable(expected)
    (failure,) = results.summary["failures"]
    assert (failure["question_id"], failure["arm"], failure["error"]) == (
        "b",
        "full",
        "RuntimeError",
    )
    assert "can't allocate memory" in failure["message"]
    assert results.summary["engine"]["halvings"] == 0
    assert [each.question_id for each in results.details] == ["a", "b", "c"]
    # it is tried again, and found again
    again = run(tiny, QUESTIONS, config, out=tmp_path, existing="resume")
    assert again.summary["failures"] == results.summary["failures"]
    monkeypatch.undo()
    mended = run(tiny, QUESTIONS, config, out=tmp_path, existing="resume")
    assert mended.summary["failures"] == []
    assert lines_without_times(tmp_path) == lines_without_times(finished[1])


def test_details_that_fail_are_a_failure_that_lasts(tiny, tmp_path, monkeypatch, finished) -> None:
    real = workers.details_of

    def failing(bench, items, *args):
        if any(item.question.id == "b" for item in items):
            raise RuntimeError("no features")
        return real(bench, items, *args)

    monkeypatch.setattr(workers, "details_of", failing)
    config = ExperimentConfig(arms=THREE, tuning=QUICK)
    results = run(tiny, QUESTIONS, config, out=tmp_path)
    assert comparable(results.records) == comparable(finished[0].records)
    assert [each.question_id for each in results.details] == ["a", "c"]
    told = [{"question_id": "b", "arm": None, "error": "RuntimeError", "message": "no features"}]
    assert results.summary["failures"] == told
    again = run(tiny, QUESTIONS, config, out=tmp_path, existing="resume")
    assert again.summary["failures"] == told
    # once, also where an arm of the question is made again
    plan_path(tmp_path, "b", "full").unlink()
    again = run(tiny, QUESTIONS, config, out=tmp_path, existing="resume")
    assert (again.summary["failures"], again.summary["resumed"]) == (told, 8)


def test_any_number_of_segments(tiny) -> None:
    config = ExperimentConfig(arms=("segmented",), segments=4, tuning=QUICK)
    results = run(tiny, QUESTIONS[:1], config)
    assert len(results.records[0].coeffs) == 4


def test_more_segments_than_layers_end_the_run_before_it_starts(tiny, tmp_path) -> None:
    with pytest.raises(PlanError, match=r"1 <= segments <= layers must hold"):
        run(
            tiny,
            QUESTIONS,
            ExperimentConfig(arms=THREE, segments=5, tuning=QUICK),
            out=tmp_path / "never",
        )
    assert not (tmp_path / "never").exists()


def test_bad_settings_are_refused(tiny, tmp_path) -> None:
    with pytest.raises(
        ConfigError, match="arms must be one of baseline, best_of_n, answer_in_prompt"
    ):
        ExperimentConfig(arms=("baseline", "magic"))
    with pytest.raises(ConfigError, match="that of answer_in_prompt holds the answer; leave"):
        ExperimentConfig(
            arms=("baseline", "answer_in_prompt"), tuning=TuningConfig(metrics="published")
        )
    published = ExperimentConfig(arms=("baseline",), tuning=TuningConfig(metrics="published"))
    with pytest.raises(ConfigError, match="the published metrics must have a perplexity model"):
        run(tiny, QUESTIONS[:1], published)
    with pytest.raises(ConfigError, match="question ids must be unique"):
        run(tiny, [QUESTIONS[0], QUESTIONS[0]])
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="must be writable"):
        run(tiny, QUESTIONS, ExperimentConfig(arms=THREE, tuning=QUICK), out=tmp_path / "file")


def gate_for(model: HookedModel, **changed: Any) -> FittedGate:
    gate = gate_of(model, "resid_post")
    made = FittedGate(gate, "resid_post", identify(model), 12, 9, (0.9,) * 4, (1.0,) * 4)
    return replace(made, **changed)


def test_masked_and_gated_arms_are_run_where_they_are_asked_for(tiny, tmp_path) -> None:
    config = ExperimentConfig(arms=("segmented", "masked", "gated"), tuning=QUICK, reach=False)
    results = run(tiny, QUESTIONS, config, gate=gate_for(tiny), out=tmp_path / "run")
    assert [r.arm for r in results.records] == ["segmented", "masked", "gated"] * 3
    for record in results.records:
        (step,) = load_plan(plan_path(tmp_path / "run", record.question_id, record.arm)).steps
        assert isinstance(step, Step)
        assert (step.gate is not None) == (record.arm == "gated")
        assert (step.units is not None) == (record.arm == "masked")
        if record.arm == "masked":
            assert step.units is not None
            assert record.extra == {"k": int(step.units.sum())}
        else:
            assert record.extra == {}
    told = results.summary["provenance"]["settings"]["gate"]
    assert told["open"] == [True, False, True, True]
    assert (told["n_source"], told["accuracy"]) == (12, [0.9] * 4)
    assert load_results(tmp_path / "run").records == results.records
    kinds = {each["b"] for each in results.summary["comparisons"]}
    assert {"masked", "gated"} <= kinds


def test_the_gated_arm_needs_a_gate_that_fits(tiny, other_folder) -> None:
    config = ExperimentConfig(arms=("gated",), tuning=QUICK, reach=False)
    for gate, says in (
        (None, "'gated' must be given a gate that was fitted on other questions"),
        (gate_for(load_model(other_folder)), "must be of the model that is run"),
        (gate_for(tiny, site="mlp_out"), "needs a gate at resid_post, but got mlp_out"),
    ):
        with pytest.raises(ConfigError, match=says):
            run(tiny, QUESTIONS, config, gate=gate)
    for arm in ("masked", "gated"):
        with pytest.raises(ConfigError, match=f"{arm} needs a constant shift"):
            ExperimentConfig(arms=(arm,), tuning=replace(QUICK, mean="sequence"))


def test_alone_in_its_file_a_question_has_no_mask(tiny) -> None:
    config = ExperimentConfig(arms=("segmented", "masked"), tuning=QUICK, reach=False)
    results = run(tiny, QUESTIONS[:2], config)
    assert [r.arm for r in results.records] == ["segmented"] * 2
    assert results.summary["arms"]["masked"]["unscored"] == 2


def test_what_a_run_starts_from_is_part_of_what_it_is(tiny, finished, tmp_path) -> None:
    plain, folder = finished
    # nothing is said where nothing is asked for
    assert "starts" not in plain.summary["provenance"]["settings"]["tuning"]
    own = (("a", ((0.5, 0.5, 0.25, 1.0),)),)
    starts = Starts(own=own, shared=((1.0, 1.0, 0.0, 0.0),))
    config = ExperimentConfig(arms=THREE, tuning=replace(QUICK, starts=starts))
    results = run(tiny, QUESTIONS[:1], config, out=tmp_path / "run", pool=QUESTIONS)
    told = results.summary["provenance"]["settings"]["tuning"]["starts"]
    assert (told["shared"], told["lengths"]) == (((1.0, 1.0, 0.0, 0.0),), ())
    again = {"out": tmp_path / "run", "pool": QUESTIONS, "existing": "resume"}
    assert run(tiny, QUESTIONS[:1], config, **again).summary["resumed"] == 3
    for other, says in (
        (replace(starts, shared=()), r"tuning\.starts\.shared was \[\[1\.0"),
        (replace(starts, own=()), r"tuning\.starts\.own_sha256 was"),
        (replace(starts, lengths=(0.5,)), r"tuning\.starts\.lengths was \[\] and is \[0\.5\]"),
        (Starts(), r"tuning\.starts\.shared was"),
    ):
        changed = replace(config, tuning=replace(QUICK, starts=other))
        with pytest.raises(ResumeError, match=says):
            run(tiny, QUESTIONS[:1], changed, **again)
    with pytest.raises(ResumeError, match=r"tuning\.starts\.shared was None"):
        run(tiny, QUESTIONS, config, out=folder, existing="resume")


def test_a_run_that_would_start_outside_its_range_is_refused_before_it_begins(tiny) -> None:
    # the arm of all layers starts inside it, the last segment does not
    starts = Starts(shared=((0.0, 0.0, 0.0, 9.0),))
    config = ExperimentConfig(arms=("full",), tuning=replace(QUICK, starts=starts), reach=False)
    assert run(tiny, QUESTIONS[:1], config).summary["failures"] == []
    config = replace(config, arms=("full", "unembed"))
    with pytest.raises(SearchError, match=r"a start must lie in \[0, 6\], .* 9 for 'late'"):
        run(tiny, QUESTIONS[:1], config)
