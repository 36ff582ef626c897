"""Questions -> an inspect-ai task: ask, label as SimpleQA does, count. `fusion_lens/simpleqa`.

Labels are CORRECT, INCORRECT and NOT_ATTEMPTED, by a grader model with the prompt of
`judge_prompts`, or by spelling and value (`judges.LexicalJudge`). What a grader does not settle is
unscored, with the reason, and counts in no figure. A sample can name a plan of its own, so that a
run's plans are measured by the harness too; any provider's model can be asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fusion_lens.cli_inputs import open_questions
from fusion_lens.errors import ConfigError, MissingExtraError, QuestionError
from fusion_lens.inspect_models import SteeredAPI
from fusion_lens.judge_prompts import judge_prompt
from fusion_lens.judges import JudgeItem, LexicalJudge
from fusion_lens.llm_judge import label_verdict
from fusion_lens.prompts import Template
from fusion_lens.questions import Question, select_questions
from fusion_lens.results import plan_path
from fusion_lens.scores import LABELS, of_attempted, text_scores

try:
    from inspect_ai import Task, task
    from inspect_ai.dataset import MemoryDataset, Sample
    from inspect_ai.model import GenerateConfig, Model, get_model, model_roles
    from inspect_ai.scorer import (
        Metric,
        SampleScore,
        Score,
        Scorer,
        Target,
        mean,
        metric,
        scorer,
        stderr,
    )
    from inspect_ai.solver import Generate, Solver, TaskState, solver
except ImportError as error:
    raise MissingExtraError("inspect-ai", "inspect") from error

_SHARES = tuple(name.lower() for name in LABELS)
_MATCHES = ("exact_match", "contained_match", "overlap", "token_f1")
_CLUSTER = "cluster"
_GRADING = GenerateConfig(temperature=0.0, max_tokens=64)


@task
def simpleqa(
    questions: str = "atlas",
    split: str | None = "test",
    grader: str | None = None,
    plans: str | None = None,
    arm: str = "segmented",
    template: str | None = None,
) -> Task:
    """Short questions with one answer each.

    Args:
        questions: "atlas", "simpleqa" (the published set, from the hub), or a file as
            `load_questions` reads it.
        split: The split that is asked, where the questions have any.
        grader: Who labels: a model as inspect-ai names it, or "lexical". Without one, the model in
            the role `grader`, or "lexical" if there is none.
        plans: A run's folder: each question is steered by the plan the run tuned for it, and
            questions without one are left out.
        arm: The arm whose plans these are.
        template: What is asked, with `{question}` in it. Without one, the bare question, or the
            question template of the package where messages go to a model of fusion_lens as they
            are: what the plans of a run were tuned on.

    Raises:
        ConfigError: if the template has no place for the question.
        InputFileError: if the questions cannot be read.
        QuestionError: if none is left.
    """
    asked = select_questions(
        open_questions(None if questions == "atlas" else questions, None), split=split
    )
    samples = [_sample(question, None) for question in asked]
    if plans is not None:
        paths = [plan_path(Path(plans), question.id, arm) for question in asked]
        samples = [
            _sample(question, path)
            for question, path in zip(asked, paths, strict=True)
            if path.is_file()
        ]
        if not samples:
            raise QuestionError(
                f"at least one question must have a plan of the arm {arm!r}, but the first is to "
                f"be {paths[0]}, and neither that nor another is there."
            )
    return Task(
        dataset=MemoryDataset(samples, name=Path(questions).stem),
        solver=ask(template),
        scorer=[label(grader), match()],
    )


@solver
def ask(template: str | None = None) -> Solver:
    """Ask the sample's question, by `simpleqa`'s template, steered by the sample's plan if it names
    one.

    Raises:
        ConfigError: if the template has no place for the question, or the sample has a plan and the
            model is none of fusion_lens.
    """
    if template is not None:
        Template(question=template)

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        api = get_model().api
        bare = not isinstance(api, SteeredAPI) or api.chat
        text = template or ("{question}" if bare else Template().question)
        state.user_prompt.text = text.format(question=state.input_text)
        plan = state.metadata.get("plan")
        if plan is None:
            return await generate(state)
        if not isinstance(api, SteeredAPI):
            raise ConfigError(
                f"a plan must steer a model of fusion_lens, but the model is {state.model}."
            )
        return await generate(state, extra_body={"plan": plan})

    return solve


@metric
def figures() -> Metric:
    """SimpleQA's figures over labels: `attempted_accuracy` and `f`, as `label_figures` has them."""

    def count(scores: list[SampleScore]) -> Mapping[str, float]:
        correct, incorrect = (
            sum(float(score.score.as_dict()[name] or 0.0) for score in scores)
            for name in ("correct", "incorrect")
        )
        told = of_attempted(correct, incorrect, float(len(scores)))
        return dict(zip(("attempted_accuracy", "f"), told, strict=True))

    return count


@scorer(metrics=[{name: [mean(), stderr(cluster=_CLUSTER)] for name in _SHARES}, figures()])
def label(grader: str | None = None) -> Scorer:
    """One of SimpleQA's labels, by `simpleqa`'s `grader`: 1 for that label and 0 for the others, so
    that a mean over epochs means something. A question's subject is its cluster."""

    async def score(state: TaskState, target: Target) -> Score:
        item = JudgeItem(state.input_text, target[0], tuple(target[1:]), state.output.completion)
        model = _grader(grader)
        if model is None:
            (verdict,) = LexicalJudge().judge([item])
        else:
            verdict = label_verdict(item, await model.generate(judge_prompt("label", item)))
        told = {"judge": LexicalJudge.name if model is None else str(model)}
        if verdict.label is None:
            return Score.unscored(
                reason="grader_failed",
                answer=verdict.answer,
                explanation=verdict.explanation,
                metadata=told,
            )
        return Score(
            value={name: float(name == verdict.label.lower()) for name in _SHARES},
            answer=verdict.answer,
            explanation=verdict.explanation,
            metadata=told | {"label": verdict.label},
        )

    return score


@scorer(metrics={name: [mean(), stderr(cluster=_CLUSTER)] for name in _MATCHES})
def match() -> Scorer:
    """The package's own text metrics; one that cannot be had is unscored."""

    async def score(state: TaskState, target: Target) -> Score:
        scores = text_scores(state.output.completion, target[0], tuple(target[1:]))
        return Score(
            value={
                name: float("nan") if (value := scores[name].value) is None else value
                for name in _MATCHES
            },
            answer=scores["exact_match"].answer,
            explanation="; ".join(f"{name}: {scores[name].explanation}" for name in _MATCHES),
        )

    return score


def _grader(name: str | None) -> Model | None:
    """None: the lexical judge."""
    if name is None:
        return get_model(role="grader", config=_GRADING) if "grader" in model_roles() else None
    return None if name == LexicalJudge.name else get_model(name, config=_GRADING)


def _sample(question: Question, plan: Path | None) -> Sample:
    told = {"topic": question.topic, "answer_type": question.answer_type}
    return Sample(
        id=question.id,
        input=question.question,
        target=[question.answer, *question.aliases],
        metadata={
            _CLUSTER: question.subject or question.id,
            **{name: text for name, text in told.items() if text is not None},
            **({} if plan is None else {"plan": str(plan)}),
        },
    )
