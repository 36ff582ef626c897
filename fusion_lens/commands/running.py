"""`run`, and what reads a run's folder: `report` and `compare`."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from fusion_lens.cli_inputs import (
    dictionary_names,
    open_judge,
    open_model,
    open_questions,
    require_writable,
    resuming_command,
    segments_of,
    typed_command,
)
from fusion_lens.cli_options import (
    SegmentsOption,
    StorageOption,
    given,
    recipe_of,
    settings_of,
    sources_of,
    with_options,
)
from fusion_lens.errors import ConfigError, QuestionError, one_of

ENGINES = ("local", "ray")
_GATE_QUESTIONS = 100


@with_options(recipe=recipe_of, settings=settings_of, sources=sources_of)
def run(
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/latest"),
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with the run in that folder where it ended."),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a run in that folder.")
    ] = False,
    block_size: Annotated[
        int | None,
        typer.Option(
            help="Questions that are run together and written at once: more fill the engine, fewer "
            "are lost to a kill.",
            show_default="64",
        ),
    ] = None,
    engine: Annotated[
        str, typer.Option(help="local: this process; ray: several, here or on a cluster.")
    ] = "local",
    address: Annotated[
        str | None,
        typer.Option(help="With ray: a cluster's, auto for the one started here; else its own."),
    ] = None,
    workers: Annotated[
        int, typer.Option(help="With ray: processes, each with the model once.")
    ] = 2,
    gpus_per_worker: Annotated[
        float, typer.Option(help="With ray: GPUs of each, of which a part is allowed.")
    ] = 0.0,
    threads_per_worker: Annotated[int, typer.Option(help="With ray: CPU threads of each.")] = 1,
    questions: Annotated[
        str | None,
        typer.Option(
            help="JSONL or CSV file, or simpleqa (from the hub); without it Atlas' own questions."
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="Which split, if the file names splits.")] = "test",
    limit: Annotated[int, typer.Option(help="Questions to run, from the first.")] = 60,
    question_id: Annotated[
        list[str] | None, typer.Option(help="Only this question; may be repeated.")
    ] = None,
    topic: Annotated[str | None, typer.Option(help="Only questions of this topic.")] = None,
    answer_type: Annotated[
        str | None, typer.Option(help="Only questions of this answer type.")
    ] = None,
    sample: Annotated[
        int | None,
        typer.Option(help="A seeded sample of so many, in proportion to topics and answer types."),
    ] = None,
    failed: Annotated[
        bool,
        typer.Option(
            "--select-failed",
            help="Only questions the unsteered model gets wrong (paper: the judge says so).",
        ),
    ] = False,
    judge: Annotated[
        str,
        typer.Option(
            help="lexical (offline), or a model as inspect-ai names it: openai/gpt-4o, "
            "anthropic/..., ollama/..., hf/...; keys come from the environment."
        ),
    ] = "lexical",
    judge_cache: Annotated[
        Path | None, typer.Option(help="File that keeps a judge model's replies.")
    ] = None,
    judge_price: Annotated[
        str | None,
        typer.Option(help="IN,OUT: what a judge model costs per million tokens, to be told."),
    ] = None,
    grade: Annotated[
        bool | None,
        typer.Option(
            "--grade/--no-grade",
            help="Have the judge model grade from 1 to 5 too.",
            show_default="no; paper: yes",
        ),
    ] = None,
    arms: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated. There are also masked, and gated by what is learned on "
            "questions of other splits.",
            show_default="baseline,best_of_n,answer_in_prompt,full,segmented,generic,"
            "mismatched,random,unembed; paper: baseline,full,segmented",
        ),
    ] = None,
    centre: Annotated[
        bool, typer.Option("--centre", help="Subtract the other questions' mean delta.")
    ] = False,
    reach: Annotated[
        bool | None,
        typer.Option(
            "--reach/--no-reach",
            help="Also measure paraphrases, neighbours and unrelated text.",
            show_default="yes; paper: no",
        ),
    ] = None,
    unrelated: Annotated[
        Path | None,
        typer.Option(help="Text file for the divergence; without it Atlas' own for Atlas."),
    ] = None,
    dictionary: Annotated[
        list[str] | None,
        typer.Option(
            help="Whose features the report shows of every plan: as for features, or none.",
            show_default="atlas-crosscoder for Atlas",
        ),
    ] = None,
    segments: SegmentsOption = "thirds",
    storage: StorageOption = None,
    *,
    recipe: Any,
    settings: Any,
    sources: Any,
) -> int:
    """Tune and score every question under every arm; write results, plans, figures and a
    summary."""
    from fusion_lens.atlas import UNRELATED
    from fusion_lens.durable import replace_text
    from fusion_lens.experiment import run as run_experiment
    from fusion_lens.pictures import write_figures
    from fusion_lens.progress import bars
    from fusion_lens.question_gates import fit_question_gate, held_out
    from fusion_lens.questions import select_questions, stratified
    from fusion_lens.ray_engine import RayEngine
    from fusion_lens.report import failure_lines, markdown_report
    from fusion_lens.report_page import html_report
    from fusion_lens.run_folder import require_free
    from fusion_lens.run_plots import run_figures
    from fusion_lens.selection import select_failed
    from fusion_lens.workers import Engine, LocalEngine

    if limit < 1:
        raise ConfigError(f"limit must be at least 1, but got {limit}.")
    config = given(
        settings.experiment,
        arms=None if arms is None else tuple(arms.split(",")),
        segments=segments_of(segments),
        centre=centre,
        reach=reach,
        unrelated=UNRELATED if unrelated is None and recipe.model is None else unrelated,
        block_size=block_size,
        storage=storage,
    )
    tuning = config.tuning
    available = open_questions(questions, recipe.model)
    matching = select_questions(
        available,
        split=None if question_id else split,
        ids=tuple(question_id or ()),
        topic=topic,
        answer_type=answer_type,
    )
    splits = {question.split for question in matching}
    if len(splits) > 1 and question_id:
        raise QuestionError(
            f"questions of one run must be of one split, but got {', '.join(map(str, splits))}."
        )
    chosen = matching if sample is None else stratified(matching, sample, tuning.search.seed)
    if not question_id:
        chosen = chosen[:limit]
    source: dict[str, Any] = {
        "file": "atlas" if questions is None else Path(questions).name,
        "split": None if question_id else split,
        "topic": topic,
        "answer_type": answer_type,
        "sample": sample,
        "limit": None if question_id else limit,
        "available": len(matching),
    }
    if resume and overwrite:
        raise ConfigError("a run can be resumed or overwritten, but got both; leave one out.")
    existing = "resume" if resume else "overwrite" if overwrite else "refuse"
    require_free(out, existing)
    require_writable(out / "results.jsonl")
    judging = open_judge(
        judge, judge_cache, settings.grade if grade is None else grade, judge_price
    )
    if grade and not judging.grade:
        raise ConfigError(f"grades need a judge model, but the judge {judging.name} gives none.")
    one_of("engine", engine, ENGINES)
    recipe = replace(
        recipe,
        fluency=settings.perplexity_model,
        dictionaries=tuple(dictionary_names(dictionary, recipe.model)),
    )
    with ExitStack() as stack:
        on: Engine
        if engine == "ray":
            ray = RayEngine(
                recipe,
                workers=workers,
                address=address,
                gpus_per_worker=gpus_per_worker,
                threads=threads_per_worker,
            )
            on = stack.enter_context(ray)
        if engine == "local" or failed or "gated" in config.arms:
            opened = open_model(recipe)
        if engine == "local":
            on = LocalEngine(recipe.worker(opened))
        progress = stack.enter_context(bars())
        if failed:
            selected = select_failed(
                opened,
                chosen,
                tuning,
                pool=available,
                judge=judging,
                by_judge=settings.failed_by_judge,
                progress=progress,
            )
            chosen = list(selected.questions)
            source["selected"] = selected.to_dict()
            if not chosen:
                raise QuestionError(
                    f"at least one question must be failed, but of {selected.asked} that were "
                    f"asked the model is right on {selected.right} and none is selected."
                )
        starts = sources.starts(on.describe().model, chosen)
        config = replace(config, tuning=replace(tuning, starts=starts))
        gate = None
        if "gated" in config.arms:
            others = held_out(available, chosen)
            gate = fit_question_gate(opened, others[:_GATE_QUESTIONS], tuning)
        try:
            results = run_experiment(
                on,
                chosen,
                config,
                out=out,
                existing=existing,
                pool=available,
                donors=[question for question in available if question.split in splits],
                judge=judging,
                gate=gate,
                source=source,
                command=typed_command(),
                progress=progress,
            )
        except KeyboardInterrupt:
            print(f"interrupted; to go on: {resuming_command()}", file=sys.stderr)
            return 130
    _print_tables(results.summary)
    replace_text(out / "report.md", markdown_report(results.summary))
    replace_text(out / "report.html", html_report(results))
    missing = write_figures(run_figures(results), out / "figures")
    if missing is not None:
        print(missing)
    for line in failure_lines(results.summary):
        print(f"failed: {line}", file=sys.stderr)
    print(f"written to {out} in {results.summary['seconds']:.0f} s")
    if results.summary["interrupted"]:
        print(f"interrupted; to go on: {resuming_command()}", file=sys.stderr)
        return 130
    return 3 if results.summary["failures"] else 0


def report(
    folder: Annotated[Path, typer.Argument(help="The folder of a run.")],
) -> int:
    """Print the tables of a run and write its report.md and report.html."""
    from fusion_lens.durable import replace_text
    from fusion_lens.report import markdown_report
    from fusion_lens.report_page import html_report
    from fusion_lens.results import load_results

    results = load_results(folder)
    _print_tables(results.summary)
    replace_text(folder / "report.md", markdown_report(results.summary))
    replace_text(folder / "report.html", html_report(results))
    print(f"written to {folder / 'report.md'} and {folder / 'report.html'}")
    return 0


def compare(
    one: Annotated[Path, typer.Argument(help="The folder of a run.")],
    other: Annotated[Path, typer.Argument(help="The folder of another.")],
) -> int:
    """The second run minus the first, arm by arm, over the questions both have."""
    from fusion_lens.report import run_differences
    from fusion_lens.results import load_results
    from fusion_lens.summary import compare_runs

    runs = load_results(one), load_results(other)
    table = run_differences(compare_runs(*(run.records for run in runs)), (str(one), str(other)))
    table.show()
    return 0


def _print_tables(summary: dict[str, Any]) -> None:
    from fusion_lens.report import closing_lines, sections

    for section in sections(summary, between="\n"):
        section.show()
        print()
    for line in closing_lines(summary):
        print(line)
