"""`fusion-lens`: arguments in, exit code out.

Exit codes: 0 done; 1 bad input or a bad file (one line on stderr says what must hold); 2 a
malformed command line; 3 the run ended but some questions failed (listed); 130 interrupted. Heavy
packages are imported inside the commands, so that `--help` is quick.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fusion_lens.cli_inputs import (
    dictionary_names,
    open_contrasts,
    open_judge,
    open_model,
    open_questions,
    require_writable,
    resuming_command,
    segments_of,
    typed_command,
    whole_numbers,
)
from fusion_lens.cli_options import (
    ChatOption,
    DeviceOption,
    DtypeOption,
    EightBitOption,
    ModelOption,
    SegmentsOption,
    SlotsOption,
    StorageOption,
    given,
    with_settings,
)
from fusion_lens.errors import ConfigError, FusionLensError, QuestionError, one_of

if TYPE_CHECKING:
    from fusion_lens.models import HookedModel
    from fusion_lens.protocols import Protocol
    from fusion_lens.teacher_forcing import Text

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Prompt-specific activation steering at every layer: record, inject, tune, evaluate.",
)

ENGINES = ("local", "ray")
_GATE_QUESTIONS = 100

# typer has a copy of click of its own or uses the installed one, depending on its version
_ClickException: Any = next(
    kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException"
)


@app.command()
@with_settings
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
    model: ModelOption = None,
    segments: SegmentsOption = "thirds",
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    load_in_8bit: EightBitOption = False,
    storage: StorageOption = None,
    *,
    settings: Any,
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
    from fusion_lens.recipes import Recipe
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
        unrelated=UNRELATED if unrelated is None and model is None else unrelated,
        block_size=block_size,
        storage=storage,
    )
    tuning = config.tuning
    available = open_questions(questions, model)
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
    names = tuple(dictionary_names(dictionary, model))
    recipe = Recipe(model, dtype, device, load_in_8bit, settings.perplexity_model, names)
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
            opened = open_model(model, dtype, device, load_in_8bit=load_in_8bit)
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


@app.command()
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


@app.command()
def compare(
    one: Annotated[Path, typer.Argument(help="The folder of a run.")],
    other: Annotated[Path, typer.Argument(help="The folder of another.")],
) -> int:
    """The second run minus the first, arm by arm, over the questions both have."""
    from rich.console import Console

    from fusion_lens.report import run_differences
    from fusion_lens.results import load_results
    from fusion_lens.summary import compare_runs

    runs = load_results(one), load_results(other)
    table = run_differences(compare_runs(*(run.records for run in runs)), (str(one), str(other)))
    Console().print(table.to_rich())
    return 0


@app.command()
@with_settings
def tune(
    question: Annotated[str, typer.Argument(help="The question, without any template.")],
    answer: Annotated[str, typer.Option(help="The gold answer.")],
    explanation: Annotated[
        str | None, typer.Option(help="Given explanation; without it the model writes its own.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Where the chosen plan goes.")] = Path(
        "plan.safetensors"
    ),
    model: ModelOption = None,
    segments: SegmentsOption = "thirds",
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    load_in_8bit: EightBitOption = False,
    storage: StorageOption = None,
    *,
    settings: Any,
) -> int:
    """Tune one question: what the model said, what it says now, and the coefficients; saves the
    plan."""
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
    fluency = open_perplexity(settings.perplexity_model, device)
    opened = open_model(model, dtype, device, load_in_8bit=load_in_8bit)
    with bars() as progress:
        tuned = tune_question(
            opened,
            asked,
            segments=segments_of(segments),
            config=settings.experiment.tuning,
            fluency=fluency,
            progress=progress,
        )
    save_plan(tuned.plan, out)
    if storage is not None:
        export_tuned(tuned, storage, asked.question)
    print(_tuned_text(tuned))
    print(f"plan saved to {out}")
    return 130 if tuned.tuned.interrupted else 0


@app.command()
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
    model: ModelOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    load_in_8bit: EightBitOption = False,
) -> int:
    """Continue a prompt, steered by a saved plan."""
    from fusion_lens.generation import GenerationConfig, Row
    from fusion_lens.generation import generate as generate_rows
    from fusion_lens.plan_files import load_plan
    from fusion_lens.prompts import Template, question_prompt, tokenize

    if not prompt.strip():
        raise QuestionError(f"a prompt must not be empty, but got {prompt!r}.")
    config = GenerationConfig(max_new_tokens=max_new_tokens, temperature=temperature)
    loaded = load_plan(plan) * scale
    opened = open_model(model, dtype, device, load_in_8bit=load_in_8bit)
    if question or chat:
        read = question_prompt(opened, prompt, Template(chat=chat))
    else:
        read = tokenize(opened, prompt)
    completion = generate_rows(opened, [Row(read, loaded, seed)], config)[0]
    print(completion.text)
    return 0


@app.command()
@with_settings
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
    model: ModelOption = None,
    segments: SegmentsOption = "thirds",
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    load_in_8bit: EightBitOption = False,
    *,
    settings: Any,
) -> int:
    """Which sparse features a plan moves, on the text it writes; the error beside them. The options
    of a search are for --question-id; a plan of a run is read with the run's own template and
    length."""
    from rich.console import Console

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
    if dictionary is None and model is not None:
        raise ConfigError("a model other than Atlas needs --dictionary.")
    if top < 1 or coding < 0:
        raise ConfigError(
            f"top must be at least 1 and coding at least 0, but got {top} and {coding}."
        )
    opened = open_model(model, dtype, device, load_in_8bit=load_in_8bit)
    shelved = open_dictionaries(dictionary or ["atlas-sae"], opened)
    tuning = settings.experiment.tuning
    if plan is not None:
        text = _steered_text(opened, plan, question, tuning)
    else:
        assert question_id is not None
        text = _tuned_text_of(opened, question_id, questions, model, segments, settings, device)
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
            Console().print(table.to_rich())
    if out is not None:
        plots = (plot_top_features, plot_layer_features, plot_token_features)
        missing = write_figures([plot(found, labels=labels) for plot in plots], out)
        if missing is not None:
            print(missing, file=sys.stderr)
        if not as_json:
            print(f"figures written to {out}")
    return 0


@app.command()
def questions(
    atlas: Annotated[int, typer.Option("--atlas", help="How many questions to make.")],
    seed: Annotated[int, typer.Option(help="Another seed draws other people of the world.")] = 1,
    out: Annotated[Path, typer.Option(help="The JSONL file to write.")] = Path("questions.jsonl"),
    slots: SlotsOption = None,
) -> int:
    """Make questions from Atlas' world that Atlas fails, half of them dev and half test."""
    from fusion_lens.atlas.questions import make_questions
    from fusion_lens.generation import GenerationConfig, Row
    from fusion_lens.generation import generate as generate_rows
    from fusion_lens.progress import bars
    from fusion_lens.prompts import tokenize
    from fusion_lens.questions import save_questions

    require_writable(out)
    model = open_model(None, None, None)

    def complete(prompts: Sequence[str], max_new_tokens: int) -> list[tuple[str, bool]]:
        config = GenerationConfig(max_new_tokens=max_new_tokens, slots=slots)
        rows = [Row(tokenize(model, prompt)) for prompt in prompts]
        with bars() as progress:
            written = generate_rows(
                model, rows, config, progress=lambda done: progress("asking", done, len(rows))
            )
        return [(completion.text, completion.ended) for completion in written]

    made = make_questions(atlas, seed, complete)
    save_questions(made, out)
    print(f"{len(made)} questions written to {out}")
    return 0


@app.command()
def compare_methods(
    contrasts: Annotated[
        str | None,
        typer.Option(
            help="JSONL or CSV of source, target and control texts in three parts; for Atlas "
            "sources or context.",
            show_default="sources for Atlas",
        ),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated.",
            show_default="prompting,fusion,generic,fusion_masked,generic_masked,caa,act_add,"
            "control_mean,control_pca,iti,linear_act,dsas_end_to_end,austeer",
        ),
    ] = None,
    gates: Annotated[
        str,
        typer.Option(
            help="Comma-separated: dsas, and its controls permuted and constant; or none."
        ),
    ] = "dsas",
    units: Annotated[
        str, typer.Option(help="Numbers of units that AUSteer and masks are tried with.")
    ] = "1,10,100",
    unrelated: Annotated[
        Path | None,
        typer.Option(help="Text file for the divergence; without it Atlas' own for Atlas."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="New tokens per completion, at most.")] = 48,
    seed: Annotated[int, typer.Option(help="Seed of folds, draws and bootstrap.")] = 0,
    as_json: Annotated[
        Path | None, typer.Option("--json", help="Where a record per method and strength goes.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for figures; none without it.")] = None,
    model: ModelOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    load_in_8bit: EightBitOption = False,
) -> int:
    """Steering methods on the same texts: effect on a behaviour against damage to what must stay,
    with and without a gate."""
    from rich.console import Console

    from fusion_lens.atlas import UNRELATED
    from fusion_lens.divergence import unrelated_texts
    from fusion_lens.front_plots import plot_fronts
    from fusion_lens.method_bench import compare_methods as compare
    from fusion_lens.method_suite import METHODS
    from fusion_lens.pictures import write_figures
    from fusion_lens.progress import bars

    examples = open_contrasts(contrasts, model)
    if as_json is not None:
        require_writable(as_json)
    opened = open_model(model, dtype, device, load_in_8bit=load_in_8bit)
    text = UNRELATED if unrelated is None and model is None else unrelated
    with bars() as progress:
        bench = compare(
            opened,
            examples,
            methods=METHODS if methods is None else tuple(methods.split(",")),
            gates=() if gates == "none" else tuple(gates.split(",")),
            units=whole_numbers("units", units),
            unrelated=() if text is None else unrelated_texts(opened, text),
            max_new_tokens=max_new_tokens,
            seed=seed,
            progress=progress,
        )
    for table in (bench.table(), *bench.gate_tables()):
        Console().print(table.to_rich())
        print()
    if as_json is not None:
        bench.write(as_json)
        print(f"written to {as_json}")
    if out is not None:
        missing = write_figures([plot_fronts(bench)], out)
        print(missing or f"figures written to {out}")
    return 0


def main() -> None:
    """The entry point: every expected error is one line."""
    try:
        code = app(standalone_mode=False)
    except FusionLensError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        code = 1
    except _ClickException as error:
        if error.format_message():
            print(f"error: {error.format_message()}", file=sys.stderr)
        code = error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)


def _print_tables(summary: dict[str, Any]) -> None:
    from rich.console import Console

    from fusion_lens.report import closing_lines, sections

    for section in sections(summary, between="\n"):
        Console().print(section.to_rich())
        print()
    for line in closing_lines(summary):
        print(line)


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
    named: str | None,
    segments: str,
    settings: Protocol,
    device: str | None,
) -> Text:
    """What a question's plan writes, found by a search."""
    from fusion_lens.progress import bars
    from fusion_lens.questions import select_questions
    from fusion_lens.recipes import open_perplexity
    from fusion_lens.teacher_forcing import Text
    from fusion_lens.tuning import tune as tune_question

    (asked,) = select_questions(open_questions(file, named), ids=(question_id,))
    with bars() as progress:
        tuned = tune_question(
            model,
            asked,
            segments=segments_of(segments),
            config=settings.experiment.tuning,
            fluency=open_perplexity(settings.perplexity_model, device),
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


def _tuned_text(tuned: Any) -> str:
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


if __name__ == "__main__":
    main()
