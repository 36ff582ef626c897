"""`tune` one question, and `generate` under the plan that came of it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from fusion_lens.cli_inputs import open_model, require_writable, segments_of
from fusion_lens.cli_options import (
    ChatOption,
    SegmentsOption,
    StorageOption,
    recipe_of,
    settings_of,
    sources_of,
    with_options,
)
from fusion_lens.errors import QuestionError


@with_options(recipe=recipe_of, settings=settings_of, sources=sources_of)
def tune(
    question: Annotated[str, typer.Argument(help="The question, without any template.")],
    answer: Annotated[str, typer.Option(help="The gold answer.")],
    explanation: Annotated[
        str | None, typer.Option(help="Given explanation; without it the model writes its own.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Where the chosen plan goes.")] = Path(
        "plan.safetensors"
    ),
    segments: SegmentsOption = "thirds",
    storage: StorageOption = None,
    *,
    recipe: Any,
    settings: Any,
    sources: Any,
) -> int:
    """Tune one question: what the model said, what it says now, and the coefficients; saves the
    plan."""
    from fusion_lens.engine_log import EngineLog
    from fusion_lens.identity import identify
    from fusion_lens.plan_files import save_plan
    from fusion_lens.progress import bars
    from fusion_lens.questions import Question
    from fusion_lens.recipes import open_perplexity
    from fusion_lens.search import check_storage
    from fusion_lens.tuning import export_tuned
    from fusion_lens.tuning import tune as tune_question

    asked = Question(id="question", question=question, answer=answer, explanation=explanation)
    require_writable(out)
    if storage is not None:
        check_storage(storage, [asked.question])
    fluency = open_perplexity(settings.perplexity_model, recipe.device)
    opened = open_model(recipe)
    log = EngineLog()
    starts = sources.starts(identify(opened), [asked])
    with bars() as progress:
        tuned = tune_question(
            opened,
            asked,
            segments=segments_of(segments),
            config=replace(settings.experiment.tuning, starts=starts),
            fluency=fluency,
            progress=progress,
            log=log,
        )
    save_plan(tuned.plan, out)
    if storage is not None:
        export_tuned(tuned, storage, asked.question)
    print(_tuned_text(tuned, log.reasons))
    print(f"plan saved to {out}")
    return 130 if tuned.tuned.interrupted else 0


@with_options(recipe=recipe_of)
def generate(
    prompt: Annotated[str, typer.Argument(help="The text to continue, as it is.")],
    plan: Annotated[Path, typer.Option(help="A plan that tune or run saved.")],
    scale: Annotated[float, typer.Option(help="Multiplies every coefficient.")] = 1.0,
    question: Annotated[
        bool, typer.Option("--question", help="The text is a question: put it into the template.")
    ] = False,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the samples.")] = 0,
    max_new_tokens: Annotated[
        int, typer.Option(help="New tokens of the completion, at most.")
    ] = 48,
    chat: ChatOption = False,
    *,
    recipe: Any,
) -> int:
    """Continue a prompt, steered by a saved plan."""
    from fusion_lens.engine_log import EngineLog
    from fusion_lens.generation import GenerationConfig, Row
    from fusion_lens.generation import generate as generate_rows
    from fusion_lens.plan_files import load_plan
    from fusion_lens.prompts import Template, question_prompt, tokenize

    if not prompt.strip():
        raise QuestionError(f"a prompt must not be empty, but got {prompt!r}.")
    config = GenerationConfig(max_new_tokens=max_new_tokens, temperature=temperature)
    loaded = load_plan(plan) * scale
    opened = open_model(recipe)
    if question or chat:
        read = question_prompt(opened, prompt, Template(chat=chat))
    else:
        read = tokenize(opened, prompt)
    log = EngineLog()
    completion = generate_rows(opened, [Row(read, loaded, seed)], config, log=log)[0]
    print(completion.text)
    for reason in log.reasons:
        print(f"note: hook points because {reason}", file=sys.stderr)
    return 0


def _tuned_text(tuned: Any, reasons: Sequence[str]) -> str:
    best = tuned.tuned.best
    prepared = tuned.job.prepared
    reference = prepared.reference
    left_out = " ".join(reference.str_tokens[t] for t in reference.special) or "none"
    pooled = reference.text[len(prepared.prompt.text) :].strip()
    before = tuned.unsteered

    def change(shown: Callable[[Any], str]) -> str:
        return shown(tuned.best) if before is None else f"{shown(before)} -> {shown(tuned.best)}"

    lines = [
        ("reference", f"{pooled!r} ({len(reference.pooled)} tokens; special tokens: {left_out})"),
        *([] if before is None else [("it said", repr(before.completion.text.strip()))]),
        ("it says now", repr(tuned.best.completion.text.strip())),
        ("coefficients", ", ".join(f"{name} {c:.3f}" for name, c in best.coeffs.items())),
        (
            "objective",
            change(lambda graded: f"{graded.objective:+.3f}")
            + f" (trial {best.number} of {len(tuned.tuned.trials)})",
        ),
        ("right", change(lambda graded: str(bool(graded.exact_match)))),
        ("perplexity", change(lambda graded: _shown(graded.perplexity))),
    ]
    lines += [("engine", f"hook points because {reason}") for reason in reasons]
    if tuned.tuned.zero_won:
        lines.append(("note", "no trial beat the zero plan: the saved plan does not steer"))
    if len(tuned.tuned.front) > 1:
        for trial in tuned.tuned.front:
            coeffs = ", ".join(f"{name} {c:.3f}" for name, c in trial.coeffs.items())
            overlap, perplexity = trial.outcome.overlap, _shown(trial.outcome.perplexity)
            text = f"overlap {_shown(overlap)}, perplexity {perplexity}: {coeffs}"
            lines.append((f"front #{trial.number}", text))
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in lines)


def _shown(value: float | None) -> str:
    return "unscored" if value is None else f"{value:.2f}"
