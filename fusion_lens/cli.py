"""`fusion-lens`: arguments in, exit code out.

Exit codes: 0 done; 1 bad input or a bad file (one line on stderr says what must hold); 2 a
malformed command line; 3 the run ended but some questions failed (listed); 130 interrupted. Heavy
packages are imported inside the commands, so that `--help` is quick.
"""

from __future__ import annotations

import inspect
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fusion_lens.errors import ConfigError, FusionLensError, OutputError, QuestionError

if TYPE_CHECKING:
    from fusion_lens.judges import Judge
    from fusion_lens.models import HookedModel
    from fusion_lens.questions import Question
    from fusion_lens.tuning import Progress

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Prompt-specific activation steering at every layer: record, inject, tune, evaluate.",
)

# typer has a copy of click of its own or uses the installed one, depending on its version
_ClickException: Any = next(
    kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException"
)

ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model", help="Checkpoint folder or hub name; without it Atlas, the bundled model."
    ),
]
DtypeOption = Annotated[str, typer.Option(help="float32, bfloat16, float16 or float64.")]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, ...; chosen if not given.")]
SegmentsOption = Annotated[
    str, typer.Option(help="full, thirds, layers, or a number of even segments.")
]
TokensOption = Annotated[int, typer.Option(help="New tokens per completion, at most.")]
SlotsOption = Annotated[
    int | None, typer.Option(help="Rows generated at once; by the device's size if not given.")
]
CacheOption = Annotated[
    int | None,
    typer.Option(help="Positions of a row's cache; by the file's longest question if not given."),
]
ExecutorOption = Annotated[
    str, typer.Option(help="lean, hooks (the reference, slower), or auto: lean where it can be.")
]
ChatOption = Annotated[bool, typer.Option(help="Wrap questions in the tokenizer's chat template.")]
StorageOption = Annotated[
    str | None, typer.Option(help="Optuna storage URL that gets every finished study.")
]


def _tuning_config(
    trials: Annotated[
        int, typer.Option(help="Trials per question and tuned arm, the zero plan included.")
    ] = 30,
    round_size: Annotated[
        int, typer.Option(help="Trials asked at once; the sampler learns between rounds.")
    ] = 5,
    seed: Annotated[int, typer.Option(help="Seed of samplers and bootstrap.")] = 0,
    parametrisation: Annotated[
        str,
        typer.Option(help="coeff: one in [0, 1.5] per segment; alpha_gamma: the paper's pair."),
    ] = "coeff",
    objectives: Annotated[
        str,
        typer.Option(
            help="weighted: 0.7 overlap - 0.3 clipped perplexity; pareto: the two kept apart "
            "(the plan chosen is still the weighted best)."
        ),
    ] = "weighted",
    mean: Annotated[
        str,
        typer.Option(
            help="question: a constant shift; sequence: the authors' hook, without a cache."
        ),
    ] = "question",
    positions: Annotated[str, typer.Option(help="all, prompt or completion.")] = "all",
    steer_special: Annotated[
        bool, typer.Option(help="Steer BOS and other special tokens too.")
    ] = False,
    max_new_tokens: TokensOption = 48,
    explanation_tokens: Annotated[
        int, typer.Option(help="Tokens of the model's own explanation; 0: none.")
    ] = 48,
    explanation_marker: Annotated[
        str | None,
        typer.Option(help="Text that the model's explanation follows, such as **Explanation:**."),
    ] = None,
    slots: SlotsOption = None,
    cache_length: CacheOption = None,
    executor: ExecutorOption = "auto",
    chat: ChatOption = False,
) -> Any:
    """The options that `run` and `tune` share, as a `TuningConfig`."""
    from fusion_lens.generation import GenerationConfig
    from fusion_lens.prompts import Template
    from fusion_lens.search import SearchConfig
    from fusion_lens.tuning import TuningConfig

    return TuningConfig(
        search=SearchConfig(
            trials=trials,
            round_size=round_size,
            seed=seed,
            parametrisation=parametrisation,
            objectives=objectives,
        ),
        generation=GenerationConfig(
            max_new_tokens=max_new_tokens,
            slots=slots,
            cache_length=cache_length,
            executor=executor,
        ),
        template=Template(chat=chat),
        mean=mean,
        positions=positions,
        steer_special=steer_special,
        explanation_tokens=explanation_tokens,
        explanation_marker=explanation_marker,
    )


def _with_tuning(command: Callable[..., int]) -> Callable[..., int]:
    """The command with the options of `_tuning_config` in the place of its parameter `tuning`."""
    own = inspect.signature(command, eval_str=True).parameters
    shared = inspect.signature(_tuning_config, eval_str=True).parameters

    def wrapped(**options: Any) -> int:
        config = _tuning_config(**{name: options.pop(name) for name in shared})
        return command(**options, tuning=config)

    kept = [parameter for name, parameter in own.items() if name != "tuning"]
    wrapped.__signature__ = inspect.Signature([*kept, *shared.values()])  # type: ignore[attr-defined]
    wrapped.__name__, wrapped.__doc__ = command.__name__, command.__doc__
    return wrapped


@app.command()
@_with_tuning
def run(
    out: Annotated[
        Path, typer.Option(help="Folder of the run; an earlier run in it is replaced.")
    ] = Path("runs/latest"),
    questions: Annotated[
        Path | None, typer.Option(help="JSONL or CSV; without it Atlas' own questions.")
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
        typer.Option("--select-failed", help="Only questions the unsteered model gets wrong."),
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
    arms: Annotated[str, typer.Option(help="Comma-separated.")] = (
        "baseline,best_of_n,answer_in_prompt,full,segmented,generic,mismatched,random,unembed"
    ),
    centre: Annotated[
        bool, typer.Option("--centre", help="Subtract the other questions' mean delta.")
    ] = False,
    reach: Annotated[
        bool,
        typer.Option(help="Also measure paraphrases, neighbours and unrelated text."),
    ] = True,
    unrelated: Annotated[
        Path | None,
        typer.Option(help="Text file for the divergence; without it Atlas' own for Atlas."),
    ] = None,
    model: ModelOption = None,
    segments: SegmentsOption = "thirds",
    dtype: DtypeOption = "float32",
    device: DeviceOption = None,
    storage: StorageOption = None,
    *,
    tuning: Any,
) -> int:
    """Tune and score every question under every arm; write results, plans, figures and a
    summary."""
    from fusion_lens.atlas import UNRELATED
    from fusion_lens.experiment import ExperimentConfig
    from fusion_lens.experiment import run as run_experiment
    from fusion_lens.plots import run_figures, write_figures
    from fusion_lens.questions import select_questions, stratified
    from fusion_lens.report import failure_lines, markdown_report
    from fusion_lens.results import write_text
    from fusion_lens.selection import select_failed

    if limit < 1:
        raise ConfigError(f"limit must be at least 1, but got {limit}.")
    config = ExperimentConfig(
        arms=tuple(arms.split(",")),
        segments=_segments(segments),
        tuning=tuning,
        centre=centre,
        reach=reach,
        unrelated=UNRELATED if unrelated is None and model is None else unrelated,
        storage=storage,
    )
    available = _questions(questions, model)
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
        "file": "atlas" if questions is None else questions.name,
        "split": None if question_id else split,
        "topic": topic,
        "answer_type": answer_type,
        "sample": sample,
        "limit": None if question_id else limit,
        "available": len(matching),
    }
    _require_writable(out / "results.jsonl")
    judging = _judge(judge, judge_cache)
    opened = _load(model, dtype, device)
    with _progress() as progress:
        if failed:
            selected = select_failed(
                opened, chosen, tuning, pool=available, judge=judging, progress=progress
            )
            chosen = list(selected.questions)
            source["selected"] = selected.to_dict()
            if not chosen:
                raise QuestionError(
                    f"at least one question must be failed, but the model is right on all "
                    f"{selected.asked}."
                )
        results = run_experiment(
            opened,
            chosen,
            config,
            out=out,
            pool=available,
            donors=[question for question in available if question.split in splits],
            judge=judging,
            source=source,
            progress=progress,
        )
    _print_tables(results.summary)
    write_text(out / "report.md", markdown_report(results.summary))
    missing = write_figures(run_figures(results), out / "figures")
    if missing is not None:
        print(missing)
    for line in failure_lines(results.summary):
        print(f"failed: {line}", file=sys.stderr)
    print(f"written to {out} in {results.summary['seconds']:.0f} s")
    if results.summary["interrupted"]:
        return 130
    return 3 if results.summary["failures"] else 0


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="The folder of a run.")],
) -> int:
    """Print the tables of a run and write its report.md."""
    from fusion_lens.report import markdown_report
    from fusion_lens.results import load_results, write_text

    summary = load_results(folder).summary
    _print_tables(summary)
    write_text(folder / "report.md", markdown_report(summary))
    print(f"written to {folder / 'report.md'}")
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
    Console().print(table.to_table())
    return 0


@app.command()
@_with_tuning
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
    dtype: DtypeOption = "float32",
    device: DeviceOption = None,
    storage: StorageOption = None,
    *,
    tuning: Any,
) -> int:
    """Tune one question: what the model said, what it says now, and the coefficients; saves the
    plan."""
    from fusion_lens.plan_files import save_plan
    from fusion_lens.questions import Question
    from fusion_lens.search import check_storage
    from fusion_lens.tuning import export_tuned
    from fusion_lens.tuning import tune as tune_question

    asked = Question(id="question", question=question, answer=answer, explanation=explanation)
    _require_writable(out)
    if storage is not None:
        check_storage(storage, [asked.question])
    opened = _load(model, dtype, device)
    with _progress() as progress:
        tuned = tune_question(
            opened, asked, segments=_segments(segments), config=tuning, progress=progress
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
    max_new_tokens: TokensOption = 48,
    chat: ChatOption = False,
    model: ModelOption = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = None,
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
    opened = _load(model, dtype, device)
    if question or chat:
        read = question_prompt(opened, prompt, Template(chat=chat))
    else:
        read = tokenize(opened, prompt)
    completion = generate_rows(opened, [Row(read, loaded, seed)], config)[0]
    print(completion.text)
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
    from fusion_lens.prompts import tokenize
    from fusion_lens.questions import save_questions

    _require_writable(out)
    model = _load(None, "float32", None)

    def complete(prompts: Sequence[str], max_new_tokens: int) -> list[tuple[str, bool]]:
        config = GenerationConfig(max_new_tokens=max_new_tokens, slots=slots)
        rows = [Row(tokenize(model, prompt)) for prompt in prompts]
        with _progress() as progress:
            written = generate_rows(
                model, rows, config, progress=lambda done: progress("asking", done, len(rows))
            )
        return [(completion.text, completion.ended) for completion in written]

    made = make_questions(atlas, seed, complete)
    save_questions(made, out)
    print(f"{len(made)} questions written to {out}")
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

    from fusion_lens.report import engine_line, lender_lines, sections, tuned_lines

    for section in sections(summary, between="\n"):
        Console().print(section.to_table())
        print()
    for line in (*tuned_lines(summary), *lender_lines(summary), engine_line(summary)):
        print(line)


def _segments(text: str) -> str | int:
    return int(text) if re.fullmatch(r"-?[0-9]{1,9}", text) else text


def _judge(name: str, cache: Path | None) -> Judge:
    from fusion_lens.judges import LexicalJudge

    if name == "lexical":
        return LexicalJudge()
    from fusion_lens.llm_judge import LLMJudge

    judge = LLMJudge(name, cache=cache)
    judge.open()
    return judge


def _questions(path: Path | None, model: str | None) -> list[Question]:
    from fusion_lens.atlas import QUESTIONS
    from fusion_lens.questions import load_questions

    if path is None and model is not None:
        raise ConfigError(
            "a model other than Atlas needs questions of its own; give --questions FILE."
        )
    return load_questions(QUESTIONS if path is None else path)


def _load(model: str | None, dtype: str, device: str | None) -> HookedModel:
    from fusion_lens.models import load_model

    warnings.filterwarnings("ignore", category=DeprecationWarning)
    return load_model(model, dtype=dtype, device=device)


def _require_writable(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        existed = path.exists()
        path.open("ab").close()
        if not existed:
            path.unlink()
    except OSError as error:
        raise OutputError(path, error.strerror or str(error)) from error


@contextmanager
def _progress() -> Iterator[Progress]:
    from tqdm import tqdm

    live = sys.stderr.isatty()
    bars: dict[str, tqdm[Any]] = {}

    def show(stage: str, done: int, total: int) -> None:
        if stage not in bars:
            bars[stage] = tqdm(
                desc=stage, unit="row", mininterval=0.1 if live else 15, dynamic_ncols=True
            )
        bars[stage].total = total
        bars[stage].update(done - bars[stage].n)

    try:
        yield show
    finally:
        for bar in bars.values():
            bar.close()


def _tuned_text(tuned: Any) -> str:
    best = tuned.tuned.best
    prepared = tuned.job.prepared
    reference = prepared.reference
    left_out = " ".join(reference.str_tokens[t] for t in reference.special) or "none"
    pooled = reference.text[len(prepared.prompt.text) :].strip()
    lines = [
        ("reference", f"{pooled!r} ({len(reference.pooled)} tokens; special tokens: {left_out})"),
        ("it said", repr(tuned.unsteered.completion.text.strip())),
        ("it says now", repr(tuned.best.completion.text.strip())),
        ("coefficients", ", ".join(f"{name} {c:.3f}" for name, c in best.coeffs.items())),
        (
            "objective",
            f"{tuned.unsteered.objective:+.3f} -> {tuned.best.objective:+.3f} "
            f"(trial {best.number} of {len(tuned.tuned.trials)})",
        ),
        ("right", f"{bool(tuned.unsteered.exact_match)} -> {bool(tuned.best.exact_match)}"),
        ("perplexity", f"{_shown(tuned.unsteered.perplexity)} -> {_shown(tuned.best.perplexity)}"),
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
