"""`features`: what a plan moves, taken apart by dictionaries."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fusion_lens.cli_inputs import open_model, open_questions, segments_of
from fusion_lens.cli_options import (
    SegmentsOption,
    recipe_of,
    settings_of,
    with_options,
)
from fusion_lens.errors import ConfigError

if TYPE_CHECKING:
    from fusion_lens.models import HookedModel
    from fusion_lens.protocols import Protocol
    from fusion_lens.recipes import Recipe
    from fusion_lens.teacher_forcing import Text


@with_options(recipe=recipe_of, settings=settings_of)
def features(
    question_id: Annotated[
        str | None, typer.Option(help="Tune this question of the file, then take its plan apart.")
    ] = None,
    plan: Annotated[
        Path | None, typer.Option(help="A plan that tune or run saved, instead of a search.")
    ] = None,
    question: Annotated[
        str | None,
        typer.Option(help="With --plan: its question. A plan inside a run's folder knows it."),
    ] = None,
    dictionary: Annotated[
        list[str] | None,
        typer.Option(
            help="atlas-sae, atlas-crosscoder, RELEASE/ID of sae-lens, or a folder; may be "
            "repeated.",
            show_default="atlas-sae",
        ),
    ] = None,
    kind: Annotated[
        str,
        typer.Option(
            help="injected: what the plan adds at each layer; total: steered minus unsteered."
        ),
    ] = "injected",
    against: Annotated[
        Path | None,
        typer.Option(help="Another plan, on the same text: which features differ."),
    ] = None,
    coding: Annotated[
        int, typer.Option(help="Also write the change as so many signed decoder directions.")
    ] = 0,
    top: Annotated[int, typer.Option(help="Features to show.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for figures; none without it.")] = None,
    questions: Annotated[
        str | None, typer.Option(help="JSONL or CSV file; without it Atlas' own questions.")
    ] = None,
    segments: SegmentsOption = "thirds",
    *,
    recipe: Any,
    settings: Any,
) -> int:
    """Which sparse features a plan moves, on the text it writes; the error beside them. The options
    of a search are for --question-id; a plan of a run is read with the run's own template and
    length."""
    from fusion_lens.attribution import attribute
    from fusion_lens.feature_plots import (
        plot_layer_features,
        plot_token_features,
        plot_top_features,
    )
    from fusion_lens.feature_report import (
        coding_rows,
        coding_table,
        compare_features,
        difference_table,
    )
    from fusion_lens.pictures import write_figures
    from fusion_lens.plan_files import load_plan
    from fusion_lens.shelves import labels_of, open_dictionaries

    if (question_id is None) == (plan is None):
        raise ConfigError("features needs either --question-id or --plan, and not both.")
    if dictionary is None and recipe.model is not None:
        raise ConfigError("a model other than Atlas needs --dictionary.")
    if top < 1 or coding < 0:
        raise ConfigError(
            f"top must be at least 1 and coding at least 0, but got {top} and {coding}."
        )
    opened = open_model(recipe)
    shelved = open_dictionaries(dictionary or ["atlas-sae"], opened)
    tuning = settings.experiment.tuning
    if plan is not None:
        text = _steered_text(opened, plan, question, tuning)
    else:
        assert question_id is not None
        text = _tuned_text_of(opened, question_id, questions, segments, recipe, settings)
    texts = [text] if against is None else [text, replace(text, plan=load_plan(against))]
    dictionaries = [each.dictionary for each in shelved]
    found, *others = attribute(opened, dictionaries, texts, kind=kind)
    labels = labels_of(shelved, found, top)
    if as_json:
        content = found.to_dict(top, labels)
        if others:
            content["against"] = [
                {**asdict(each), "effect": effect, "other": other}
                for each, effect, other in compare_features(found, others[0], labels)[:top]
            ]
        if coding:
            content["coding"] = coding_rows(found, dictionaries, coding, labels)
        print(json.dumps(content, ensure_ascii=False, allow_nan=False))
    else:
        print(f"{text.prompt.text!r} -> {_written(opened, text)!r}")
        tables = [found.table(top, labels)]
        tables += [difference_table(found, o, ("plan", "other"), top, labels) for o in others]
        if coding:
            tables.append(coding_table(found, dictionaries, coding, labels))
        for table in tables:
            table.show()
    if out is not None:
        plots = (plot_top_features, plot_layer_features, plot_token_features)
        missing = write_figures([plot(found, labels=labels) for plot in plots], out)
        if missing is not None:
            print(missing, file=sys.stderr)
        if not as_json:
            print(f"figures written to {out}")
    return 0


def _steered_text(model: HookedModel, file: Path, question: str | None, tuning: Any) -> Text:
    """What a saved plan writes after its question."""
    from fusion_lens.generation import GenerationConfig, Row
    from fusion_lens.generation import generate as generate_rows
    from fusion_lens.plan_files import load_plan
    from fusion_lens.prompts import Template, question_prompt
    from fusion_lens.results import load_results, plan_path
    from fusion_lens.teacher_forcing import Text

    loaded = load_plan(file)
    if not loaded.injected_norm:
        raise ConfigError(
            f"a plan must inject something to be taken apart, but {file} is a zero plan: no trial "
            "beat the unsteered model."
        )
    folder, template, generation = file.resolve().parent.parent, tuning.template, tuning.generation
    record = None
    if question is None and (folder / "summary.json").is_file():
        results = load_results(folder)
        own = [
            each
            for each in results.records
            if plan_path(folder, each.question_id, each.arm) == file.resolve()
        ]
        if own:
            record, question = own[0], own[0].question
            used = results.summary["provenance"]["settings"]["tuning"]
            template = Template(**used["template"])
            generation = GenerationConfig(**used["generation"])
    if question is None:
        raise ConfigError(
            f"a plan outside a run's folder needs its question, but {file} is in none; "
            "give --question."
        )
    prompt = question_prompt(model, question, template)
    written = generate_rows(model, [Row(prompt, loaded)], generation)[0]
    if record is not None and written.text != record.completion:
        print("note: the plan writes another text here than in its run", file=sys.stderr)
    return Text(prompt, written.tokens, loaded)


def _tuned_text_of(
    model: HookedModel,
    question_id: str,
    file: str | None,
    segments: str,
    recipe: Recipe,
    settings: Protocol,
) -> Text:
    """What a question's plan writes, found by a search."""
    from fusion_lens.progress import bars
    from fusion_lens.questions import select_questions
    from fusion_lens.recipes import open_perplexity
    from fusion_lens.teacher_forcing import Text
    from fusion_lens.tuning import tune as tune_question

    (asked,) = select_questions(open_questions(file, recipe.model), ids=(question_id,))
    with bars() as progress:
        tuned = tune_question(
            model,
            asked,
            segments=segments_of(segments),
            config=settings.experiment.tuning,
            fluency=open_perplexity(settings.perplexity_model, recipe.device),
            progress=progress,
        )
    if not tuned.plan.injected_norm:
        raise ConfigError(
            f"a plan must inject something to be taken apart, but no trial beat the zero plan for "
            f"{question_id!r}; try more --trials or another question."
        )
    return Text(tuned.job.prepared.prompt, tuned.best.completion.tokens, tuned.plan)


def _written(model: HookedModel, text: Text) -> str:
    from fusion_lens.models import decode

    return decode(model, text.written)
