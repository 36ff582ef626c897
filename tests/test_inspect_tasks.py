"""`inspect eval` of steered models: the log is read back, and says what the package itself says."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from inspect_ai import eval as inspect_eval
from inspect_ai.log import EvalLog, EvalSample, list_eval_logs, read_eval_log
from inspect_ai.model import Model, ModelOutput, ModelUsage, get_model
from inspect_ai.scorer import SampleScore, Score
from judge_server import serving

from fusion_lens import replies
from fusion_lens.activations import record
from fusion_lens.atlas import QUESTIONS
from fusion_lens.decoding import GenerationConfig, Row
from fusion_lens.deltas import make_deltas
from fusion_lens.errors import ConfigError, InputFileError, QuestionError
from fusion_lens.generation import generate
from fusion_lens.inspect_tasks import figures, simpleqa
from fusion_lens.judge_prompts import judge_prompt
from fusion_lens.judges import JudgeItem, LexicalJudge
from fusion_lens.models import HookedModel
from fusion_lens.plan_files import save_plan
from fusion_lens.plans import Plan, make_plan
from fusion_lens.prompts import question_prompt, reference_prompt
from fusion_lens.questions import Question, load_questions, save_questions, select_questions
from fusion_lens.results import plan_path
from fusion_lens.scores import label_figures, text_scores

KEY = "sk-never-to-be-seen-0123456789"
MOST_TOKENS = 24
SHAPE = {"slots": 4, "cache_length": 64}
ALL = select_questions(load_questions(QUESTIONS), split="test")
ASKED = ALL[:4]


def plan_of(model: HookedModel, question: Question, scale: float) -> Plan:
    reference = reference_prompt(model, question.question, question.answer)
    deltas = make_deltas(*record(model, [reference, question_prompt(model, question.question)]))
    return make_plan(deltas, scale)


@pytest.fixture(scope="module")
def plan(atlas: HookedModel) -> Plan:
    """Of the first question: what it does to the others is nothing to be proud of."""
    return plan_of(atlas, ASKED[0], 0.6)


@pytest.fixture(scope="module")
def plan_file(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("plans") / "plan.safetensors"
    save_plan(plan, path)
    return str(path)


@pytest.fixture(scope="module", autouse=True)
def held(atlas: HookedModel) -> Iterator[Model]:
    """Atlas stays open from one evaluation to the next."""
    model = get_model("fusion_lens/atlas", memoize=False)
    yield model
    model.api.close()


Run = Callable[..., EvalLog]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Evaluate `simpleqa` and read the log back."""

    def evaluate(*, limit: int = len(ASKED), **options: Any) -> EvalLog:
        task_args = options.pop("task_args", {})
        model_args = {**SHAPE, **options.pop("model_args", {})}
        (log,) = inspect_eval(
            "fusion_lens/simpleqa",
            model="fusion_lens/atlas",
            model_args=model_args,
            task_args=task_args,
            limit=limit,
            max_tokens=MOST_TOKENS,
            display="none",
            log_dir=str(tmp_path / "logs"),
            **options,
        )
        assert log.status == "success", log.error
        return read_eval_log(log.location)

    return evaluate


def samples_of(log: EvalLog) -> list[EvalSample]:
    assert log.samples is not None
    return log.samples


def texts(log: EvalLog) -> list[str]:
    return [sample.output.completion for sample in samples_of(log)]


def metrics(log: EvalLog) -> dict[str, dict[str, float]]:
    """By score and metric."""
    assert log.results is not None
    return {
        score.name: {name: metric.value for name, metric in score.metrics.items()}
        for score in log.results.scores
    }


def own_texts(model: HookedModel, plans: list[Plan | None]) -> list[str]:
    """What `generate` writes to the questions that are asked."""
    rows = [
        Row(question_prompt(model, question.question), plan)
        for question, plan in zip(ASKED, plans, strict=True)
    ]
    config = GenerationConfig(max_new_tokens=MOST_TOKENS, **SHAPE)
    return [done.text for done in generate(model, rows, config)]


def replying(reply: Callable[[str], str]) -> Model:
    """inspect-ai's mock model, which replies to a prompt as the function says."""

    def output(input: Any, tools: Any, tool_choice: Any, config: Any) -> ModelOutput:
        made = ModelOutput.from_content("mockllm/model", reply(input[-1].text))
        # without, inspect-ai fetches a tokenizer to count what it would have used
        made.usage = ModelUsage(input_tokens=1, output_tokens=1, total_tokens=2)
        return made

    return get_model("mockllm/model", custom_outputs=output)


def test_the_log_of_a_steered_model_holds_what_generate_writes_under_its_plan(
    atlas, run, plan, plan_file, monkeypatch
) -> None:
    rows: list[int] = []

    def counted(model: HookedModel, asked: Any, config: GenerationConfig) -> Any:
        rows.append(len(asked))
        return generate(model, asked, config)

    monkeypatch.setattr(replies, "generate", counted)
    together = {"plan": plan_file, "batch_size": len(ASKED), "window": 60.0}
    steered = run(model_args=together)
    assert rows == [len(ASKED)]
    unsteered = run()
    assert texts(steered) == own_texts(atlas, [plan] * len(ASKED))
    assert texts(unsteered) == own_texts(atlas, [None] * len(ASKED))
    assert texts(steered)[0] != texts(unsteered)[0]
    assert steered.eval.model == "fusion_lens/atlas"
    assert steered.eval.model_args == {**SHAPE, **together}
    assert [sample.input for sample in samples_of(steered)] == [q.question for q in ASKED]
    first = samples_of(steered)[0]
    assert first.messages[0].text == question_prompt(atlas, ASKED[0].question).text
    assert first.messages[1].text == texts(steered)[0]


def test_without_a_grader_labels_and_matches_are_the_packages_own(run) -> None:
    log = run()
    items = [
        JudgeItem(q.question, q.answer, q.aliases, text)
        for q, text in zip(ASKED, texts(log), strict=True)
    ]
    labels = [verdict.label for verdict in LexicalJudge().judge(items)]
    for sample, item, label in zip(samples_of(log), items, labels, strict=True):
        assert sample.scores is not None
        told = sample.scores["label"]
        assert label is not None
        assert told.metadata == {"judge": "lexical", "label": label}
        assert told.value[label.lower()] == 1.0
        assert sum(told.value.values()) == 1.0
        scores = text_scores(item.completion, item.answer, item.aliases)
        match = sample.scores["match"]
        assert match.value == {name: scores[name].value for name in match.value}
        assert set(match.value) == {"exact_match", "contained_match", "overlap", "token_f1"}
    figures_of = label_figures(labels)
    found = metrics(log)
    assert found["correct"]["mean"] == figures_of.correct
    assert found["incorrect"]["mean"] == figures_of.incorrect
    assert found["label"] == {
        "attempted_accuracy": figures_of.attempted_accuracy,
        "f": figures_of.f,
    }


def test_a_mock_graders_labels_arrive_and_what_it_does_not_settle_is_unscored(run) -> None:
    asked: list[str] = []

    def grade(prompt: str) -> str:
        asked.append(prompt)
        number = next(n for n, q in enumerate(ASKED) if q.question in prompt)
        return ("CORRECT", "INCORRECT", "NOT_ATTEMPTED", "It is a mystery.")[number]

    log = run(model_roles={"grader": replying(grade)})
    items = [
        JudgeItem(q.question, q.answer, q.aliases, text)
        for q, text in zip(ASKED, texts(log), strict=True)
    ]
    assert sorted(asked) == sorted(judge_prompt("label", item) for item in items)
    told = [sample.scores["label"] for sample in samples_of(log) if sample.scores]
    assert [score.explanation for score in told] == [
        "CORRECT",
        "INCORRECT",
        "NOT_ATTEMPTED",
        "unscored, no single label: It is a mystery.",
    ]
    assert told[0].value == {"correct": 1.0, "incorrect": 0.0, "not_attempted": 0.0}
    assert told[3].value != told[3].value
    assert told[3].reason == "grader_failed"
    assert told[3].metadata == {"judge": "mockllm/model"}
    found = metrics(log)
    assert found["correct"]["mean"] == pytest.approx(1 / 3)
    assert found["correct"]["stderr"] == pytest.approx(1 / 3)
    assert found["label"] == {"attempted_accuracy": 0.5, "f": pytest.approx(0.4)}
    assert log.results is not None
    unscored = {score.name: score.unscored_samples for score in log.results.scores}
    assert (unscored["label"], unscored["correct"], unscored["overlap"]) == (1, 1, 0)


def test_every_question_is_steered_by_the_plan_a_run_tuned_for_it(atlas, run, tmp_path) -> None:
    plans = [plan_of(atlas, question, 0.6) for question in (ASKED[0], ASKED[2])]
    folder = tmp_path / "run"
    (folder / "plans").mkdir(parents=True)
    for question, plan in zip((ASKED[0], ASKED[2]), plans, strict=True):
        save_plan(plan, plan_path(folder, question.id, "full"))
    log = run(task_args={"plans": str(folder), "arm": "full"}, limit=10)
    assert [sample.id for sample in samples_of(log)] == [ASKED[0].id, ASKED[2].id]
    own = own_texts(atlas, [plans[0], None, plans[1], None])
    assert texts(log) == [own[0], own[2]]
    assert own[2] != own_texts(atlas, [plans[0]] * 4)[2]
    with pytest.raises(QuestionError, match=r"at least one question must have a plan of the arm"):
        simpleqa(plans=str(folder), arm="segmented")


def test_a_plan_steers_no_model_of_another_provider(tmp_path, plan_file) -> None:
    folder = tmp_path / "run"
    (folder / "plans").mkdir(parents=True)
    path = plan_path(folder, ASKED[0].id, "segmented")
    path.write_bytes(Path(plan_file).read_bytes())
    (log,) = inspect_eval(
        simpleqa(plans=str(folder)),
        model=replying(str.upper),
        display="none",
        log_dir=str(tmp_path / "logs"),
    )
    assert log.error is not None
    assert "a plan must steer a model of fusion_lens, but the model is mockllm/model" in str(
        log.error.message
    )


def test_other_models_and_chat_models_are_asked_the_bare_question(tmp_path) -> None:
    (log,) = inspect_eval(
        simpleqa(),
        model=replying(str.upper),
        limit=2,
        display="none",
        log_dir=str(tmp_path / "logs"),
    )
    assert texts(log) == [question.question.upper() for question in ASKED[:2]]
    (log,) = inspect_eval(
        simpleqa(template="Q: {question} A:"),
        model=replying(str.upper),
        limit=1,
        display="none",
        log_dir=str(tmp_path / "logs"),
    )
    assert texts(log) == [f"Q: {ASKED[0].question} A:".upper()]


def test_questions_come_from_any_file(tmp_path) -> None:
    path = tmp_path / "mine.jsonl"
    save_questions(ASKED[:2], path)
    task = simpleqa(questions=str(path), split=None)
    assert task.dataset.name == "mine"
    assert [sample.target for sample in task.dataset] == [[q.answer, *q.aliases] for q in ASKED[:2]]
    assert [sample.metadata["cluster"] for sample in task.dataset if sample.metadata] == [
        q.subject for q in ASKED[:2]
    ]
    assert len(simpleqa().dataset) == len(ALL)
    with pytest.raises(InputFileError):
        simpleqa(questions=str(tmp_path / "none.jsonl"))
    with pytest.raises(ConfigError, match=r"template must contain {question}"):
        simpleqa(template="Who?")


def test_figures_over_epochs_are_of_the_mean_shares() -> None:
    shares = [(1.0, 0.0), (0.5, 0.5), (0.0, 0.0), (0.0, 1.0)]
    scores = [
        SampleScore(score=Score(value={"correct": right, "incorrect": wrong}))
        for right, wrong in shares
    ]
    accuracy, share = 1.5 / 3.0, 1.5 / 4
    assert figures()(scores) == {
        "attempted_accuracy": accuracy,
        "f": pytest.approx(2 * accuracy * share / (accuracy + share)),
    }


@pytest.mark.slow
def test_inspect_eval_on_the_command_line_with_a_server_that_grades(
    atlas, plan, plan_file, tmp_path
) -> None:
    logs = tmp_path / "logs"
    with serving() as server:
        done = subprocess.run(
            [
                *(sys.executable, "-m", "inspect_ai", "eval", "fusion_lens/simpleqa"),
                *("--model", "fusion_lens/atlas", "-M", f"plan={plan_file}", "-M", "scale=1.0"),
                *("-M", "slots=4", "-M", "cache_length=64", "-T", "questions=atlas"),
                *("--model-role", "grader=openai-api/judge/model"),
                *("--limit", "4", "--max-tokens", str(MOST_TOKENS)),
                *("--log-dir", str(logs), "--display", "plain", "--log-format", "json"),
            ],
            cwd=tmp_path,
            env=os.environ
            | {"JUDGE_API_KEY": KEY, "JUDGE_BASE_URL": server.base_url, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert server.keys == {KEY}
        assert server.asked("You check an answer") == 4
    (info,) = list_eval_logs(str(logs))
    log = read_eval_log(info)
    assert texts(log) == own_texts(atlas, [plan] * 4)
    assert metrics(log)["correct"] == {"mean": 1.0, "stderr": 0.0}
    everything = "".join(path.read_text("utf-8") for path in logs.iterdir())
    assert KEY not in everything + done.stdout + done.stderr
